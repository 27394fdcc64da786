"""Frozen image encoders from timm: uint8 images -> class token, and patch tokens on SiT's token grid.

Shape letters: B batch, R image size, E encoder width, N = grid^2 patch tokens.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from models.cached_features import FeaturesRecord, unpack
from runtime.files import sha256
from runtime.messages import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Spec:
    """How to build one encoder and which of its tokens to read."""

    timm_name: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET    # mean, std of pixels in [0, 1]
    patches_before_norm: bool = False         # REPA takes CLIP's and MAE's patch tokens before the last norm
    on_hub: bool = True
    model_args: tuple[tuple[str, int], ...] = ()


def _family(prefix: str, sizes: dict[str, str], **settings) -> dict[str, Spec]:
    return {f"{prefix}-vit-{size}": Spec(timm_name, **settings) for size, timm_name in sizes.items()}


LONG = {"s": "small", "b": "base", "l": "large", "g": "giant", "h": "huge"}
ENCODERS = {
    **_family("dinov2", {s: f"vit_{LONG[s]}_patch14_dinov2.lvd142m" for s in "sblg"}),
    **_family("dinov2reg", {s: f"vit_{LONG[s]}_patch14_reg4_dinov2.lvd142m" for s in "sblg"}),
    **_family("dinov3", {s: f"vit_{LONG[s]}_patch16_dinov3.lvd1689m" for s in "sbl"}),
    **_family("dinov1", {"b": "vit_base_patch16_224.dino"}),
    **_family("mae", {"b": "vit_base_patch16_224.mae", "l": "vit_large_patch16_224.mae",
                      "h": "vit_huge_patch14_224.mae"}, patches_before_norm=True),
    # timm's names without `quickgelu` load the same weights with the wrong activation.
    **_family("clip", {"b": "vit_base_patch16_clip_quickgelu_224.openai",
                       "L": "vit_large_patch14_clip_quickgelu_224.openai"},
              normalisation=CLIP, patches_before_norm=True),
    **_family("jepa", {"h": "vit_huge_patch14_gap_224.in1k_ijepa"}),
    **_family("siglip2", {"b": "vit_base_patch16_siglip_256.v2_webli"}, normalisation=HALF),
    # MoCo v3's small model has 12 heads, timm's 6: the shapes would load all the same.
    "mocov3-vit-s": Spec("vit_small_patch16_224", on_hub=False, model_args=(("num_heads", 12),)),
    "mocov3-vit-b": Spec("vit_base_patch16_224", on_hub=False),
    "mocov3-vit-l": Spec("vit_large_patch16_224", on_hub=False),
}
LOCAL = "local-dir:"


class Preprocess(nn.Module):
    """uint8 images (B, 3, R, R) -> the network's input (B, 3, input_size, input_size), float32: normalised, then
    resized.
    """

    def __init__(self, input_size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.to(self.mean.device).float() / 255 - self.mean) / self.std
        return x if x.shape[-1] == self.input_size else F.interpolate(x, self.input_size, mode="bicubic")


class Encoder(nn.Module):
    """A frozen timm vision transformer: / 255, normalise, bicubic resize, tokens, and if the grids differ pooling or
    upsampling to `grid` x `grid`. `embed_dim` is E; `has_class_token` tells whether there is a class token.
    """

    def __init__(self, name: str, model: nn.Module, spec: Spec, input_size: int, grid: int):
        super().__init__()
        self.name, self.timm_name = name, spec.timm_name
        self.model = model
        self.embed_dim = model.num_features
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.prefix_tokens = model.num_prefix_tokens              # class token and registers
        self.patches_before_norm = spec.patches_before_norm
        self.input_size, self.grid = input_size, grid
        self.preprocess = Preprocess(input_size, *spec.normalisation)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The network's blocks, to compile them; () if it has none."""
        return getattr(self.model, "blocks", ())

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """uint8 images (B, 3, R, R) -> class token (B, E), raw after the final norm, or None; patch tokens (B, N', E);
        float32.
        """
        x = self.preprocess(images)
        if self.patches_before_norm:
            tokens, ((patches, _),) = self.model.forward_intermediates(x, indices=1, norm=False, output_fmt="NLC",
                                                                       return_prefix_tokens=True)
        else:
            tokens = self.model.forward_features(x)               # (B, prefix + N', E)
            patches = tokens[:, self.prefix_tokens:]              # (B, N', E)
        return (tokens[:, 0].float() if self.has_class_token else None), patches.float()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`tokens` with the patch tokens on SiT's grid (B, N, E)."""
        class_token, patches = self.tokens(images)
        return class_token, to_grid(patches, self.grid)

    def features(self, images: torch.Tensor, with_class_token: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """uint8 images (B, 3, R, R) -> class token or None, and the alignment target: (B, 1+N, E) with it in front, or
        (B, N, E).
        """
        return _with_target(*self(images), with_class_token)


class CachedEncoder:
    """Stored features (models/cached_features.py) in place of the encoder: no network, the same results."""

    def __init__(self, record: FeaturesRecord, grid: int):
        self.name, self.embed_dim, self.has_class_token = record.enc_type, record.width, record.class_token
        self.grid = grid

    def features(self, stored: dict[str, torch.Tensor],
                 with_class_token: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As `Encoder.features`, from the stored features of B images."""
        class_token, patches = unpack(stored)
        return _with_target(class_token, to_grid(patches, self.grid), with_class_token)


def _with_target(class_token: torch.Tensor | None, patches: torch.Tensor, with_class_token: bool) -> tuple:
    return class_token, torch.cat([class_token.unsqueeze(1), patches], dim=1) if with_class_token else patches


def to_grid(patches: torch.Tensor, grid: int) -> torch.Tensor:
    """Patch tokens (B, N', E) on a square grid -> (B, grid^2, E): adaptive average pooling down, bilinear up."""
    side = round(patches.shape[1] ** 0.5)
    assert side * side == patches.shape[1], "patch tokens do not form a square"
    if side == grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, (side, side))     # (B, E, side, side)
    maps = F.adaptive_avg_pool2d(maps, grid) if grid < side else F.interpolate(maps, grid, mode="bilinear")
    return maps.flatten(2).transpose(1, 2)                        # (B, N, E)


def read_weights(file: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Read weights of timm or of the encoder's original program: timm's names, resampled to the model's input."""
    state = timm.models.load_state_dict(str(file))
    prefix = "base_encoder."                                      # MoCo v3's name of the encoder (timm drops "module.")
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = filter_fn(state, model) if filter_fn else state
    return {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}


def sha256_of_parameters(network: nn.Module) -> str:
    """Identify weights that a library fetched, whose file is not known."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def timm_weights(folder: Path) -> Path:
    """The weights' file in a timm folder, in timm's order of preference. Raises UserError if a file is missing."""
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = [path for path in files if path.is_file()]
    if not found or not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no timm model: expected a folder with config.json and "
                        "model.safetensors (or pytorch_model.bin)")
    return found[0]


def sha256_of_named(name: str, weights: str | Path | None) -> str | None:
    """sha256 of weights that the user names: a file, or a local folder with its config.json; None for the hub's."""
    if not name.startswith(LOCAL):
        return None if weights is None else sha256(_weights_file(weights))
    folder = Path(name.removeprefix(LOCAL))
    file = timm_weights(folder) if weights is None else _weights_file(weights)
    return hashlib.sha256((sha256(file) + sha256(folder / "config.json")).encode()).hexdigest()


def _weights_file(weights: str | Path) -> Path:
    if not Path(weights).is_file():
        raise UserError(f"no encoder weights at {weights}: --encoder-weights takes one file per encoder, "
                        "in the order of --enc-type")
    return Path(weights)


def require_made_by(record: FeaturesRecord, path: Path, name: str, weights: str | Path | None) -> None:
    """Raise UserError unless the features at `path` are those of the encoder `name` with these weights.

    Weights are compared by the sha256 of their file or local folder, which may have moved; the hub's count as equal.
    """
    if record.enc_type != name and not name.startswith(LOCAL):
        raise UserError(f"{path}: features of {record.enc_type}, not of {name}; encode them, or "
                        "use --cached-features off")
    if sha256_of_named(name, weights) != record.weights_file:
        raise UserError(f"{path}: made with other weights than {weights or name}; name the same with "
                        "--encoder-weights, encode again, or use --cached-features off")


def _local_spec(name: str) -> tuple[Spec, int, int | None]:
    """Spec, patch size and configured input size of `local-dir:FOLDER`, from the folder's config.json (timm's form)."""
    config_file = Path(name.removeprefix(LOCAL)) / "config.json"
    try:
        config = json.loads(config_file.read_text())
        architecture, cfg = str(config["architecture"]), config["pretrained_cfg"]
        model_args = config.get("model_args", {})
        native = model_args.get("img_size") or (cfg["input_size"][-1] if "input_size" in cfg else None)
        patch = model_args.get("patch_size")
        if not isinstance(patch, int | None) or (patch is not None and patch < 1):
            raise ValueError(f"patch_size {patch!r}")
        normalisation = tuple(tuple(map(float, cfg.get(key, usual)))
                              for key, usual in zip(("mean", "std"), IMAGENET, strict=True))
        if any(len(values) != 3 for values in normalisation):
            raise ValueError(f"mean and std {normalisation}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the encoder {name!r} needs a folder in timm's form, but {config_file} is missing or lacks a "
                        f"usable 'architecture', 'pretrained_cfg' or 'model_args' ({_first_words(error)}): name a "
                        "folder with config.json and model.safetensors") from error
    return Spec(name, normalisation=normalisation), patch or _patch_size(architecture), native


def _patch_size(timm_name: str) -> int:
    found = re.search(r"patch(\d+)", timm_name)
    if not found:
        raise UserError(f"{timm_name!r} is no vision transformer with a patch size: an encoder needs patch tokens")
    return int(found.group(1))


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def cannot_build(folder: Path, error: Exception) -> UserError:
    """The error for a timm folder that timm cannot build."""
    return UserError(f"timm cannot build the model in {folder} ({_first_words(error)}): expected the folder as "
                     "timm's save_for_hf writes it")


def load_encoder(name: str, device: torch.device | str, resolution: int = 256, pretrained: bool = True,
                 grid: int | None = None, weights: str | Path | None = None) -> Encoder:
    """Build one frozen encoder; see `load_encoders`."""
    if name.startswith(LOCAL):
        spec, patch, native = _local_spec(name)
    elif name in ENCODERS:
        spec, native = ENCODERS[name], None
        patch = _patch_size(spec.timm_name)
    else:
        raise UserError(f"unknown encoder {name!r}: use {', '.join(ENCODERS)} or {LOCAL}FOLDER")
    if pretrained and weights is None and not spec.on_hub:
        raise UserError(f"{name} has no weights on the hub: give its file with --encoder-weights")
    if weights is not None:
        _weights_file(weights)

    # Patches of 14 and 16 see 16 pixels of the image each (224 px for a 256 px image and patch 14); others keep their
    # own input size.
    input_size = patch * (resolution // 16) if native is None or patch in (14, 16) else native
    try:
        model = timm.create_model(spec.timm_name, pretrained=pretrained and weights is None, num_classes=0,
                                  img_size=input_size, **dict(spec.model_args))
    except OSError as error:                                      # hub and cache both without it
        raise UserError(f"the weights of {name} ({spec.timm_name}) could not be fetched ({type(error).__name__}): "
                        "download the file model.safetensors of that timm model and name it "
                        "with --encoder-weights FILE") from error
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights of {name} ({spec.timm_name}) do not fit or are damaged ({_first_words(error)}): "
                        "place the file again, or name another with --encoder-weights FILE") from error
    except Exception as error:                                    # an edited config.json can make timm raise anything
        if isinstance(error, TypeError) and "img_size" in str(error):
            raise UserError(f"{name!r} is no vision transformer whose input size can be set: an "
                            "encoder needs patch tokens") from error
        if not name.startswith(LOCAL):
            raise
        raise cannot_build(Path(name.removeprefix(LOCAL)), error) from error
    if weights is not None:
        try:
            model.load_state_dict(read_weights(Path(weights), model))
        except Exception as error:                        # a file of something else can make the readers raise anything
            raise UserError(f"{weights} does not hold the weights of {name} ({_first_words(error)}): give files "
                            "in the order of --enc-type") from error
    encoder = Encoder(name, model, spec, input_size, grid or resolution // 16)
    return encoder.to(device).eval().requires_grad_(False)


def load_encoders(enc_type: str, device: torch.device | str, resolution: int = 256, pretrained: bool = True,
                  grid: int | None = None, weights: str | list[str | Path] | None = None) -> list[Encoder]:
    """Build the frozen encoders in a comma-separated list.

    Args:
        enc_type: names of `ENCODERS` or `local-dir:FOLDER` (timm's own form).
        resolution: side of the images, pixels.         grid: side of SiT's token grid; default resolution // 16.
        pretrained: load weights, from `weights` (one file per encoder), or else from the hub, its cache, or the local
        folder.
    Raises UserError for an unknown name, weights that are missing, unreachable or do not fit, or a list of another
    length.
    """
    return [load_encoder(name, device, resolution, pretrained, grid, file)
            for name, file in with_weights(enc_type, weights)]


def with_weights(enc_type: str, weights: str | list[str | Path] | None) -> list[tuple[str, str | Path | None]]:
    """Names in a comma-separated list, each with its weights' file or None. Raises UserError if the lengths differ."""
    names = [name.strip() for name in enc_type.split(",")]
    files = weights.split(",") if isinstance(weights, str) else list(weights or [None] * len(names))
    if len(files) != len(names):
        raise UserError(f"--encoder-weights: {len(files)} files for {len(names)} encoders; give one per "
                        "encoder, in the same order")
    return [(name, file or None) for name, file in zip(names, files, strict=True)]


def require_class_tokens(encoders: list[Encoder | CachedEncoder]) -> None:
    """Raise UserError if an encoder has no class token: REG aligns token 0 with every encoder's."""
    for encoder in encoders:
        if not encoder.has_class_token:
            raise UserError(f"--enc-type {encoder.name}: no class token, which REG noises and aligns; choose "
                            "another, or --method repa")
