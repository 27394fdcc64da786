"""Feature networks behind one interface: uint8 images (B, 3, H, W) -> pooled features (B, F) and spatial ones (B, S).

Letters: B batch, H W image size, F feature width, S spatial width (0 but for Inception).
"""

import functools
import http.client
import io
import threading
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from evaluations.networks import OTHERS
from models import encoders
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
    """A frozen feature network with its identity. One with a `classifier` is Inception: its distance is called FID."""

    network: nn.Module
    device: torch.device
    name: str                                # 'inception', 'dinov2', a row of FDR6, or the base name of the folder
    weights_sha256: str
    weights_verified: bool | None            # whether it is the published file; None: there is none to compare with
    classifier: torch.Tensor | None = None   # (1008, F), which the Inception Score uses without a bias

    @property
    def is_inception(self) -> bool:
        """Whether the Frechet distance is called FID."""
        return self.classifier is not None

    @functools.cached_property
    def widths(self) -> tuple[int, int]:
        """F and S, measured on a black image."""
        pooled, spatial = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        return pooled.shape[1], spatial.shape[1]

    @property
    def key(self) -> str:
        """The Frechet distance's key in JSON."""
        return "fid" if self.is_inception else f"fd_{self.name}"

    def key_of(self, metric: str) -> str:
        """The key in JSON of a score that has no name of its own in other features, as kid."""
        return metric if self.is_inception else f"{metric}_{self.name}"

    @property
    def label(self) -> str:
        """The Frechet distance's name in print."""
        return "FID" if self.is_inception else f"Frechet distance ({self.name})"

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled (B, F) and spatial (B, S) features, float32, on `device`."""
        assert images.dtype == torch.uint8 and images.shape[1] == 3, f"{images.dtype} {tuple(images.shape)}"
        with full_precision(self.device):
            out = self.network(images.to(self.device).contiguous())               # NCHW, whatever layout it came in
        pooled, spatial = out if isinstance(out, tuple) else (out, out[:, :0])
        return pooled.float(), spatial.float()


def load_extractor(spec: str, device: torch.device | str = "cpu", inception_weights: str | Path | None = None,
                   dinov2_weights: str | Path | None = None) -> Extractor:
    """The extractor `inception`, `dinov2`, one of FDr6, or `local-dir:FOLDER` (timm's config.json, model.safetensors).

    Without a file, Inception's weights are read from torch hub's cache or downloaded into it, DINOv2's from timm's hub
    or its cache. Raises UserError for an unknown spec and for weights that are missing, damaged or another network's.
    """
    for name, file in (("inception", inception_weights), ("dinov2", dinov2_weights)):
        if file is not None and spec != name:
            raise UserError(f"--{name}-weights {file}: not read with --features {spec}; leave it out")
    device, classifier, verified = torch.device(device), None, None
    if spec == "inception":
        path, digest = _inception_file(inception_weights)
        network, name, verified = _load_inception(path), "inception", digest == INCEPTION_SHA256
        classifier = network.network.fc.weight.detach().to(device)
        if device.type == "cpu":
            network = network.to(memory_format=torch.channels_last)               # 1.5 times as fast on a CPU
    elif spec == "dinov2":
        try:
            encoder = encoders.load_encoder(DINOV2, "cpu", resolution=256, weights=dinov2_weights)  # resizes to 224
        except UserError as error:                                # train.py's flag has another name
            raise UserError(str(error).replace("--encoder-weights", "--dinov2-weights")) from error
        network, name = DinoFeatures(encoder), "dinov2"
        digest = encoders.sha256_of_parameters(network) if dinov2_weights is None else sha256(Path(dinov2_weights))
    elif spec in OTHERS:
        network, name = FdNetwork.download(spec), spec
        digest = encoders.sha256_of_parameters(network)
    elif spec.startswith(encoders.LOCAL):
        folder = Path(spec.removeprefix(encoders.LOCAL))
        network, name, digest = TimmFeatures.load(folder), folder.resolve().name, sha256(encoders.timm_weights(folder))
    else:
        raise UserError(f"--features {spec}: expected inception, dinov2, {', '.join(OTHERS)} or {encoders.LOCAL}FOLDER "
                        "with a timm model")
    network = network.to(device).eval().requires_grad_(False)
    return Extractor(network, device, name, digest, verified, classifier)


# ---- Inception -------------------------------------------------------------------------------------------------------

class Inception(nn.Module):
    """uint8 images (B, 3, H, W) of any size -> ADM's two features of the Inception-v3 of 2015-12-05, float32.

    The network is torch-fidelity's, with TensorFlow 1's resize to 299 px. Pooled (B, 2048): `pool_3:0`. Spatial
    (B, 2023): `mixed_6/conv:0`, seven channels of Mixed_6d's first branch after its ReLU, flattened row by row with the
    channel last, as TensorFlow does. Weights are random until `network.load_state_dict`.
    """

    def __init__(self):
        super().__init__()
        try:                                                      # slow to import, and needed only for this network
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError(f"--features inception: needs torch-fidelity ({error}); install it") from error

        class Unloaded(FeatureExtractorInceptionV3):
            """Its constructor downloads weights or unpickles a file; here it gets a file without weights."""

            def load_state_dict(self, state: dict | None, *args, **kwargs):
                return None if state is None else super().load_state_dict(state, *args, **kwargs)

        nothing = io.BytesIO()
        torch.save(None, nothing)
        nothing.seek(0)
        self.network = Unloaded("inception", ["2048"], feature_extractor_weights_path=nothing)
        self.seen = threading.local()                             # on a CPU several threads share the network
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, unit: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.seen.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)          # (B, 17 * 17 * 7)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (pooled,) = self.network(images)                                          # (B, 2048)
        return pooled, self.seen.spatial                                          # (B, 2023)


def _inception_file(given: str | Path | None) -> tuple[Path, str]:
    """Path and sha256 of the weights. Only a file given by the user may differ from the published one."""
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise UserError(f"--inception-weights {path}: not found; expected {INCEPTION_FILE} from {INCEPTION_URL}")
        digest = sha256(path)
        if digest != INCEPTION_SHA256:
            notice(f"warning: {path} is not the published Inception (sha256 {digest}, published {INCEPTION_SHA256}): "
                   "the scores are not comparable to papers'")
        return path, digest
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    path = next((cache / name for name in INCEPTION_FILES if (cache / name).is_file()), cache / INCEPTION_FILE)
    remedy = (f"download {INCEPTION_URL} (sha256 {INCEPTION_SHA256}) and place it at {path}, or name it with "
              "--inception-weights (INCEPTION_WEIGHTS=FILE for eval.sh)")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
        except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:  # last: another hash
            raise UserError(f"{INCEPTION_FILE}: not found and not downloaded ({error}); {remedy}") from error
    digest = sha256(path)
    if digest != INCEPTION_SHA256:
        raise UserError(f"{path}: damaged (sha256 {digest}); delete it, then {remedy}")
    return path, digest


def _load_inception(path: Path) -> Inception:
    """Raises UserError unless the file is a state dict of exactly this network's entries and shapes."""
    inception = Inception()
    try:
        inception.network.load_state_dict(encoders.read_weights(path))  # batch counters may be missing
    except Exception as error:                                    # garbage can make the unpickler raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: not the Inception of 2015-12-05 ({lines[min(1, len(lines) - 1)].strip()}); "
                        f"expected {INCEPTION_FILE}") from error
    return inception


# ---- other networks --------------------------------------------------------------------------------------------------

class DinoFeatures(nn.Module):
    """The class token (B, 1024) of DINOv2 ViT-L/14 at 224 px, for FD-DINOv2 (Stein et al. 2023).

    The resize is bicubic with antialiasing, as PIL's, without rounding; the encoder applies ImageNet's mean and std.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float()                                                        # (B, 3, H, W)
        if tuple(x.shape[2:]) != 2 * (self.encoder.input_size,):
            x = F.interpolate(x, self.encoder.input_size, mode="bicubic", antialias=True)
        return self.encoder(x)[0]                                                 # (B, 1024)


class TimmFeatures(nn.Module):
    """A timm model's features before its classifier: bilinear resize to its input size, its mean and std, network."""

    resize = dict(mode="bilinear", align_corners=False, antialias=False)

    def __init__(self, model: nn.Module):
        super().__init__()
        config = model.pretrained_cfg
        self.model = model
        self.size = tuple(config["input_size"][1:])                               # (height, width)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))

    @classmethod
    def load(cls, folder: Path) -> "TimmFeatures":
        """Read timm's own folder form. The classifier is loaded with it, so `num_classes` stays what the file says."""
        file = encoders.timm_weights(folder)
        try:
            return cls(encoders.build_with_weights(f"{encoders.LOCAL}{folder}", file))
        except Exception as error:                                # an edited config.json can make timm raise anything
            raise encoders.cannot_build(folder, error) from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float()                                                        # (B, 3, H, W)
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, **self.resize)
        return self.pooled((x / 255 - self.mean) / self.std)                      # (B, F)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, height, width) -> (B, F)."""
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)


class FdNetwork(TimmFeatures):
    """A network of FDr6 after an antialiased bicubic resize; a vision transformer computes in bfloat16 on a GPU."""

    resize = dict(mode="bicubic", align_corners=False, antialias=True)

    def __init__(self, name: str, model: nn.Module):
        super().__init__(model)
        self.size, self.is_vit = 2 * (OTHERS[name].size,), bool(OTHERS[name].settings)

    @classmethod
    def download(cls, name: str) -> "FdNetwork":
        """With weights from timm's hub or its cache. Raises UserError if they are not there."""
        row = OTHERS[name]
        try:
            return cls(name, encoders.create_model(row.timm_name, pretrained=True, num_classes=0, **row.settings))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{name}: weights of {row.timm_name} not in the hub's cache and not downloaded ({reason}); "
                            "download them where the hub can be reached, and keep HF_HOME") from error

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_vit:
            return self.model.forward_features(x).mean(dim=(2, 3))                # without the head's norm
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            return super().pooled(x)
