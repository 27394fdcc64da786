"""Frozen image encoders from timm: uint8 images -> class token and patch tokens on SiT's token grid.

Shape letters: B batch, R image size, S the network's input size, E encoder width, N = grid^2 patch tokens.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models.cached_features import Features, FeaturesRecord, features_folder, features_path, unpack
from models.weights import plain_weights
from runtime.files import sha256
from runtime.messages import UserError
from runtime.run import read_file
from runtime.stores import shown

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
MAX_NUMBER, MAX_ROW = 2**13, 2**8          # what a config.json may ask for: any size, and patches in a row
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Spec:
    """How to build one encoder and which of its tokens to read."""

    timm_name: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET         # mean, std of pixels in [0, 1]
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
    # MoCo v3's small model has 12 heads, timm's 6; the weights' shapes do not show it.
    "mocov3-vit-s": Spec("vit_small_patch16_224", on_hub=False, model_args=(("num_heads", 12),)),
    "mocov3-vit-b": Spec("vit_base_patch16_224", on_hub=False),
    "mocov3-vit-l": Spec("vit_large_patch16_224", on_hub=False),
}
LOCAL = "local-dir:"


class Preprocess(nn.Module):
    """uint8 images (B, 3, R, R) -> the network's input (B, 3, S, S), float32: normalised, then resized."""

    def __init__(self, input_size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.to(self.mean.device).float() / 255 - self.mean) / self.std
        return x if x.shape[-1] == self.input_size else F.interpolate(x, self.input_size, mode="bicubic")


class Encoder(nn.Module):
    """A frozen timm vision transformer: uint8 images -> class token and patch tokens.

    `embed_dim` is E. Pixels are divided by 255, normalised and resized (bicubic) to the encoder's input; patch tokens
    are pooled or upsampled to `grid` x `grid`.
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
        """The transformer's blocks, for compilation."""
        return getattr(self.model, "blocks", ())

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """uint8 images (B, 3, R, R) -> normed class token (B, E) or None, patch tokens (B, N', E); float32."""
        x = self.preprocess(images)                               # (B, 3, S, S)
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
        """uint8 images (B, 3, R, R) -> class token or None, and targets: (B, 1+N, E) with it in front, or (B, N, E)."""
        return _with_target(*self(images), with_class_token)


class CachedEncoder:
    """Replaces an encoder whose features are stored (models/cached_features.py); has no network."""

    def __init__(self, record: FeaturesRecord, grid: int):
        self.name, self.embed_dim, self.grid = record.enc_type, record.width, grid
        self.has_class_token = record.class_token

    def features(self, stored: dict[str, torch.Tensor],
                 with_class_token: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As `Encoder.features`, from the stored features of B images."""
        class_token, patches = unpack(stored)
        return _with_target(class_token, to_grid(patches, self.grid), with_class_token)


AnyEncoder = Encoder | CachedEncoder


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


# ---- weights ---------------------------------------------------------------------------------------------------------

def create_model(timm_name: str, pretrained: bool, **settings) -> nn.Module:
    """timm's model."""
    import timm  # slow to import, and sampling does not need it

    return timm.create_model(timm_name, pretrained=pretrained, **settings)


def build_with_weights(timm_name: str, file: Path, **settings) -> nn.Module:
    """timm's model with the weights in `file`, in timm's or the original release's form. timm never opens the file.

    The model is first built on the meta device, so that a config.json cannot ask for more memory than the file needs.
    Raises ValueError, RuntimeError or whatever else timm makes of a foreign file.
    """
    state = read_weights(file)
    if timm_name.startswith(LOCAL):
        config = json.loads(Path(timm_name.removeprefix(LOCAL), "config.json").read_text())
        sizes = {"input_size": config["pretrained_cfg"].get("input_size", ()), **config.get("model_args", {})}
        if any(number > (len(state) if "depth" in name or "layers" in name else MAX_NUMBER)
               for name, value in sizes.items() for number in np.ravel(value) if isinstance(number, int | np.integer)):
            raise ValueError("config.json asks for more than the weights")
    with torch.device("meta"):
        model = create_model(timm_name, pretrained=False, **settings)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    state = filter_fn(state, model) if filter_fn else state
    state = {name: value for name, value in state.items()
             if name in model.state_dict() or not name.startswith(("head.", "head_dist.", "fc_norm."))}
    model.load_state_dict(state, assign=True)                     # compares names and shapes
    model = create_model(timm_name, pretrained=False, **settings)
    model.load_state_dict(state)
    return model


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a safetensors file or one of torch.save, read without running code in it."""
    state = load_file(file) if file.suffix == ".safetensors" else read_file(file, mmap=False)
    found = (state[key] for key in ("state_dict_ema", "model_ema", "state_dict", "model") if state.get(key) is not None)
    state = plain_weights(next(found, state))
    momentum_contrast = "base_encoder."                           # MoCo v3's prefix
    if any(name.startswith(momentum_contrast) for name in state):
        state = {name.removeprefix(momentum_contrast): value for name, value in state.items()
                 if name.startswith(momentum_contrast)}
    return state


def timm_weights(folder: Path) -> Path:
    """The weights file in a folder of timm's form, in timm's order of preference. Raises UserError without one."""
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = [path for path in files if path.is_file()]
    if not found or not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no timm model; expected config.json and model.safetensors (or pytorch_model.bin)")
    return found[0]


def sha256_of_parameters(network: nn.Module) -> str:
    """SHA-256 of a state dict, for weights that a library fetched from a file it does not name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def sha256_of_named(name: str, weights: str | Path | None) -> str | None:
    """SHA-256 of a weights file, or of a local folder's weights and settings; None for weights from the hub."""
    if not name.startswith(LOCAL):
        return None if weights is None else sha256(_weights_file(weights))
    folder = Path(name.removeprefix(LOCAL))
    file = timm_weights(folder) if weights is None else _weights_file(weights)
    return hashlib.sha256((sha256(file) + sha256(folder / "config.json")).encode()).hexdigest()


def _weights_file(weights: str | Path) -> Path:
    if not Path(weights).is_file():
        raise UserError(f"--encoder-weights {weights}: no such file; give one per encoder, in the order of --enc-type")
    return Path(weights)


def encoder_ids(enc_type: str, weights: str | None) -> list[str]:
    """What identifies each encoder when a run resumes: `name:`, and the SHA-256 of its files if they are local."""
    return [f"{'local-dir' if name.startswith(LOCAL) else name}:{sha256_of_named(name, file) or ''}"
            for name, file in with_weights(enc_type, weights)]


def same_encoders(before: list[str], now: list[str]) -> bool:
    """Whether two lists of `encoder_ids` mean the same encoders; the hub's weights equal those of any file."""
    pairs = [(a.partition(":"), b.partition(":")) for a, b in zip(before, now, strict=False)]
    same = all(a[0] == b[0] and (a[2] == b[2] or "" in (a[2], b[2])) for a, b in pairs)
    return same and len(before) == len(now)


def require_made_by(record: FeaturesRecord, path: Path, name: str, weights: str | Path | None) -> None:
    """Raise UserError unless the features at `path` were made by the encoder `name` with the weights in use.

    Compares names and files; no network is built. A local folder may have moved: its files identify it.
    """
    remedy = "encode again, or give --cached-features off"
    if record.enc_type != name and not (record.enc_type.startswith(LOCAL) and name.startswith(LOCAL)):
        raise UserError(f"{path}: features of {shown(record.enc_type)}, not of {name}; {remedy}")
    if record.weights_file != sha256_of_named(name, weights):
        raise UserError(f"{path}: made with other weights than {weights or name}; name theirs, {remedy}")


# ---- building an encoder ---------------------------------------------------------------------------------------------

def load_encoder(name: str, device: torch.device | str, resolution: int = 256, pretrained: bool = True,
                 grid: int | None = None, weights: str | Path | None = None) -> Encoder:
    """Build one frozen encoder; see `load_encoders`."""
    if name.startswith(LOCAL):
        spec, patch, native = _local_spec(name)
    elif name in ENCODERS:
        spec, native = ENCODERS[name], None
        patch = _patch_size(spec.timm_name)
    else:
        raise UserError(f"--enc-type {name}: unknown encoder; use {', '.join(ENCODERS)} or {LOCAL}FOLDER")
    if pretrained and weights is None and not spec.on_hub:
        raise UserError(f"--enc-type {name}: no weights on the hub; give its file with --encoder-weights")
    # Patches of 14 and 16 see 16 image pixels each (224 px for a 256 px image and patch 14); others keep their input.
    input_size = patch * (resolution // 16) if native is None or patch in (14, 16) else native
    if not (type(input_size) is int and patch <= input_size <= min(MAX_NUMBER, MAX_ROW * patch)):
        raise UserError(f"--enc-type {name}: an input of {input_size} px in patches of {patch}; expected at most "
                        f"{MAX_NUMBER} px and {MAX_ROW} patches in a row")
    model = _create(name, spec, input_size, pretrained, weights)
    encoder = Encoder(name, model, spec, input_size, grid or resolution // 16)
    return encoder.to(device).eval().requires_grad_(False)


def _create(name: str, spec: Spec, input_size: int, pretrained: bool, weights: str | Path | None) -> nn.Module:
    """timm's model without a head. Raises UserError if it cannot be built, or its weights do not load."""
    settings = {"num_classes": 0, "img_size": input_size, **dict(spec.model_args)}
    folder = Path(name.removeprefix(LOCAL)) if name.startswith(LOCAL) else None
    if weights is not None:
        file = _weights_file(weights)
    else:
        file = timm_weights(folder) if folder is not None and pretrained else None
    try:
        if file is not None:
            return build_with_weights(spec.timm_name, file, **settings)
        return create_model(spec.timm_name, pretrained=pretrained, **settings)
    except Exception as error:                                    # timm can raise anything for a foreign file
        if isinstance(error, TypeError) and "img_size" in str(error):
            raise UserError(f"--enc-type {name}: no vision transformer of variable input size; use another") from error
        if weights is not None:
            raise UserError(f"--encoder-weights {file}: not the weights of {name} ({_first_words(error)}); "
                            "give files in the order of --enc-type") from error
        if folder is not None:
            raise cannot_build(folder, error) from error
        if not isinstance(error, OSError | RuntimeError | SafetensorError):               # not on the hub; damaged
            raise
        raise UserError(f"--enc-type {name}: weights of {spec.timm_name} missing, damaged or unfit "
                        f"({_first_words(error)}); download its model.safetensors, name it with --encoder-weights"
                        ) from error


def _local_spec(name: str) -> tuple[Spec, int, int | None]:
    """Spec, patch size and configured input size of `local-dir:FOLDER`, from the config.json that timm writes."""
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{config_file}: missing, or no usable architecture, pretrained_cfg or model_args "
                        f"({_first_words(error)}); expected what timm's save_for_hf writes") from error
    return Spec(name, normalisation=normalisation), patch or _patch_size(architecture), native


def _patch_size(timm_name: str) -> int:
    found = re.search(r"patch(\d+)", timm_name)
    if not found:
        raise UserError(f"{timm_name}: no vision transformer with a patch size; an encoder needs patch tokens")
    return int(found.group(1))


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def cannot_build(folder: Path, error: Exception) -> UserError:
    """The error for a folder in timm's form that timm fails on."""
    return UserError(f"{folder}: timm cannot build the model, or its weights are damaged ({_first_words(error)}); "
                     "expected save_for_hf's files")


def load_encoders(enc_type: str, device: torch.device | str, resolution: int = 256, pretrained: bool = True,
                  grid: int | None = None, weights: str | list[str | Path] | None = None,
                  class_tokens: bool = False) -> list[Encoder]:
    """Build the frozen encoders of a comma-separated list.

    Args:
        enc_type: names of `ENCODERS` or `local-dir:FOLDER` (timm's form)
        resolution: side of the images in pixels
        pretrained: load weights, from `weights` (one file per encoder), else the hub, its cache or the local folder
        grid: side of SiT's token grid; default resolution // 16
        class_tokens: each must have one

    Raises UserError for an unknown name, missing or unfit weights, a list of another length, or no class token.
    """
    if class_tokens:                                              # before any weight is fetched
        with torch.device("meta"):
            require_class_tokens(load_encoders(enc_type, "meta", resolution, pretrained=False, grid=grid))
    return [load_encoder(name, device, resolution, pretrained, grid, file)
            for name, file in with_weights(enc_type, weights)]


def with_weights(enc_type: str, weights: str | list[str | Path] | None) -> list[tuple[str, str | Path | None]]:
    """Pair the names of a comma-separated list with their weights files or None. Raises UserError for other lengths."""
    names = [name.strip() for name in enc_type.split(",")]
    files = weights.split(",") if isinstance(weights, str) else list(weights or [None] * len(names))
    if len(files) != len(names):
        raise UserError(f"--encoder-weights: {len(files)} files for {len(names)} encoders; give one each, in order")
    return [(name, file or None) for name, file in zip(names, files, strict=True)]


def load_cached(features: Sequence[Features], grid: int, class_tokens: bool) -> list[CachedEncoder]:
    """What gives stored features to the loss, by encoder; arguments and errors are those of `load_encoders`."""
    encoders = [CachedEncoder(one.record, grid) for one in features]
    if class_tokens:
        require_class_tokens(encoders)
    return encoders


def open_features(data_dir: str, enc_type: str, weights: str | None, required: bool) -> list[Features]:
    """The stored features of every encoder of a comma-separated list; [] if some are missing and not `required`.

    Raises UserError if they are missing where required, or were made with other weights.
    """
    encoders = with_weights(enc_type, weights)
    paths = [features_path(data_dir, name) for name, _ in encoders]
    for (name, _), path in zip(encoders, paths, strict=True):
        if required and path is None:
            raise UserError(f"--cached-features require: {data_dir} holds no {features_folder(name)}; make it "
                            f"with `python -m preprocessing.dataset_tools encode --enc-type {name}`")
    found = [Features(path) for path in paths] if all(paths) else []
    for (name, file), one in zip(encoders, found, strict=False):                          # none if some are missing
        require_made_by(one.record, Path(one.store.path), name, file)
    return found


def require_class_tokens(encoders: Sequence[AnyEncoder]) -> None:
    """Raise UserError if an encoder has no class token: REG aligns token 0 with each."""
    for encoder in encoders:
        if not encoder.has_class_token:
            raise UserError(f"--enc-type {encoder.name}: no class token, which REG needs; choose another, or "
                            "--method repa")
