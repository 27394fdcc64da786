"""Feature extractors behind one interface: uint8 images (B, 3, H, W) -> pooled features (B, F) and spatial ones (B, S).

Letters: B batch, H W image size, F feature width, S spatial width (0 but for Inception).
"""

import functools
import http.client
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from evaluations.inception import Inception
from models.encoders import LOCAL, cannot_build, load_encoder, sha256_of_parameters, timm_weights
from runtime.files import sha256
from runtime.messages import UserError, notice
from runtime.speed import full_precision

# The published file under the two names it has been released with, the same bytes (pytorch-fid, torch-fidelity).
INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_FILE = INCEPTION_FILES[0]
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
DINOV2 = "dinov2-vit-l"  # of FD-DINOv2 (Stein et al. 2023), at 224 px


@dataclass(frozen=True)
class Extractor:
    """A frozen network with its identity. Call it with uint8 images (B, 3, H, W) on any device."""

    network: nn.Module
    device: torch.device
    name: str                      # 'inception', 'dinov2', or the base name of the folder
    weights_sha256: str
    weights_verified: bool | None  # is it the published file? None where there is none to compare with
    config: str = ""               # what else decides its features: a timm folder's config.json

    @property
    def is_inception(self) -> bool:
        """A Frechet distance is called FID in Inception's features only, whatever name a folder has."""
        return isinstance(self.network, Inception)

    @functools.cached_property
    def width(self) -> int:
        """F, as a black image shows it."""
        return self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0].shape[1]

    @property
    def key(self) -> str:
        """The Frechet distance's key in JSON."""
        return "fid" if self.is_inception else f"fd_{self.name}"

    @property
    def kid_key(self) -> str:
        """The kernel distance's key in JSON."""
        return "kid" if self.is_inception else f"kid_{self.name}"

    @property
    def label(self) -> str:
        """What the distance is called in print."""
        return "FID" if self.is_inception else f"Frechet distance ({self.name})"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled (B, F) and spatial (B, S) features, float32, on `device`."""
        assert images.dtype == torch.uint8 and images.shape[1] == 3, f"{images.dtype} {tuple(images.shape)}"
        with full_precision(self.device):
            out = self.network(images.to(self.device).contiguous())               # NCHW, whatever layout the caller had
        pooled, spatial = out if isinstance(out, tuple) else (out, out[:, :0])
        return pooled.float(), spatial.float()


def load_extractor(spec: str, device: torch.device | str = "cpu", inception_weights: str | Path | None = None,
                   dinov2_weights: str | Path | None = None) -> Extractor:
    """The extractor that `spec` names: `inception`, `dinov2`, or `local-dir:FOLDER` with a timm model (config.json, model.safetensors).

    Without a file Inception comes from torch hub's cache or the published file is downloaded into it, DINOv2 from timm's hub or
    its cache. Raises UserError for an unknown spec, unreadable or damaged weights, those of another network, or when they cannot be had.
    """
    for name, file in (("inception", inception_weights), ("dinov2", dinov2_weights)):
        if file is not None and spec != name:
            raise UserError(f"--{name}-weights came with --features {spec}, which does not read them: leave it out")
    device, config = torch.device(device), ""
    if spec == "inception":
        path, digest = _inception_file(inception_weights)
        network, name, verified = _load_inception(path), "inception", digest == INCEPTION_SHA256
        if device.type == "cpu":
            network = network.to(memory_format=torch.channels_last)               # half as fast again there
    elif spec == "dinov2":
        network, name, verified = DinoFeatures(dinov2_weights), "dinov2", None
        digest = sha256_of_parameters(network) if dinov2_weights is None else sha256(Path(dinov2_weights))
    elif spec.startswith(LOCAL):
        folder = Path(spec.removeprefix(LOCAL))
        network, name, verified = TimmFeatures.load(folder), folder.resolve().name, None
        digest, config = sha256(timm_weights(folder)), (folder / "config.json").read_text(encoding="utf-8")
    else:
        raise UserError(f"--features is {spec!r}: expected 'inception', 'dinov2' or '{LOCAL}FOLDER' with a timm model")
    network = network.to(device).eval().requires_grad_(False)
    return Extractor(network, device, name, digest, verified, config)


def _inception_file(given: str | Path | None) -> tuple[Path, str]:
    """Where the weights are, and their sha256. Only a file given by the user may differ from the published one."""
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise UserError(f"Inception weights {path} not found: expected the file {INCEPTION_FILE} from {INCEPTION_URL}")
        digest = sha256(path)
        if digest != INCEPTION_SHA256:
            notice(f"warning: {path} is not the published Inception (sha256 {digest}, published {INCEPTION_SHA256}): "
                   "the scores are not comparable to papers'")
        return path, digest
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    path = next((cache / name for name in INCEPTION_FILES if (cache / name).is_file()), cache / INCEPTION_FILE)
    remedy = (f"download {INCEPTION_URL} (sha256 {INCEPTION_SHA256}) elsewhere and place it at {path}, or name it with "
              "--inception-weights (INCEPTION_WEIGHTS=FILE for eval.sh)")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
        except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:  # the last: another hash
            raise UserError(f"the Inception weights {INCEPTION_FILE} are not at hand and did not arrive ({error}): {remedy}") from error
    digest = sha256(path)
    if digest != INCEPTION_SHA256:
        raise UserError(f"{path} is damaged (its sha256 is {digest}): delete it, then {remedy}")
    return path, digest


def _load_inception(path: Path) -> Inception:
    network = Inception()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                    # garbage can make the unpickler raise anything
        raise UserError(f"{path} is no state dict that torch.load(weights_only=True) reads: expected {INCEPTION_FILE}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}: expected the state dict {INCEPTION_FILE}")
    # Converters leave the batch counters out; they mean nothing in inference.
    shapes, expected = ({str(k): _form(v) for k, v in d.items() if not str(k).endswith("num_batches_tracked")}
                        for d in (state, network.state_dict()))
    wrong = sorted(k for k in shapes.keys() | expected.keys() if shapes.get(k) != expected.get(k))
    if wrong:
        raise UserError(f"{path} is not the Inception of 2015-12-05: {len(wrong)} entries differ, for example {wrong[0]} is "
                        f"{shapes.get(wrong[0], 'missing')}, expected {expected.get(wrong[0], 'none')}")
    network.load_state_dict({k: v for k, v in state.items() if k in expected}, strict=False)
    return network


def _form(value) -> tuple[int, ...] | str:
    """The shape of a tensor of floats; of all else, its kind."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return tuple(value.shape) if value.is_floating_point() and value.layout == torch.strided else f"{value.dtype}, {value.layout}"


class DinoFeatures(nn.Module):
    """The class token (B, 1024) of DINOv2 ViT-L/14 at 224 px, for FD-DINOv2 (Stein et al. 2023).

    The resize is bicubic with antialiasing, as PIL's is, and never rounded; then ImageNet's mean and std.
    """

    def __init__(self, weights: str | Path | None):
        super().__init__()
        try:
            self.encoder = load_encoder(DINOV2, "cpu", resolution=256, weights=weights)   # which looks at 256 px images at 224
        except UserError as error:                                # train.py calls the flag otherwise
            raise UserError(str(error).replace("--encoder-weights", "--dinov2-weights")) from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float()                                                        # (B, 3, H, W)
        if tuple(x.shape[2:]) != 2 * (self.encoder.input_size,):
            x = F.interpolate(x, self.encoder.input_size, mode="bicubic", antialias=True)
        return self.encoder(x)[0]


class TimmFeatures(nn.Module):
    """A timm model's features before its classifier: bilinear resize to its input size, its mean and std, then the network."""

    def __init__(self, model: nn.Module):
        super().__init__()
        config = model.pretrained_cfg
        self.model = model
        self.size = tuple(config["input_size"][1:])                               # (height, width)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))

    @classmethod
    def load(cls, folder: Path) -> "TimmFeatures":
        """Read timm's own folder form. The classifier is loaded as it is, so `num_classes` stays what the file says."""
        import timm  # slow to import, and Inception does not need it

        timm_weights(folder)
        try:
            return cls(timm.create_model(f"{LOCAL}{folder}", pretrained=True))
        except Exception as error:                                # an edited config.json can make timm raise anything
            raise cannot_build(folder, error) from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float()                                                        # (B, 3, H, W)
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=False)
        x = (x / 255 - self.mean) / self.std
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)  # (B, F)
