"""The latent codec: pixels -> moments -> latents -> pixels, around diffusers' autoencoders.

Conventions are diffusers': latents = (raw - shift) * scale, where shift is the mean and scale 1 / std of the raw
latents, one number or one per channel. A VAE without a shift has shift 0.
Shape letters: B batch, C latent channels, H W latent size, R image size; R = H * downsampling.
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from runtime.messages import UserError, notice
from runtime.npz import load_npz
from runtime.run import read_file
from runtime.stores import shown


@dataclass(frozen=True)
class Published:
    """A published VAE. `kind`: diffusers' class, or LDM for a .pt file with the names of the latent diffusion program.

    `normalisation` is where scale and shift are: `scalar` or `channels` in config.json, `batch norm`, `file` beside
    the weights, or `inside` the network. `licence`: of the weights. `decoder`: a better one for the same latents.
    """

    id: str
    kind: str
    downsampling: int
    channels: int
    normalisation: str
    licence: str
    subfolder: str | None = None
    decoder: str | None = None


KL, FLUX2, RAE, LDM = "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderRAE", "LDM"
VAES = {
    # The published recipe encodes with the MSE fine-tune and decodes with its EMA sibling: one latent space.
    "mse": Published("stabilityai/sd-vae-ft-mse", KL, 8, 4, "scalar", "MIT", decoder="ema"),
    "ema": Published("stabilityai/sd-vae-ft-ema", KL, 8, 4, "scalar", "MIT"),
    "e2e-sd": Published("REPA-E/e2e-sdvae-hf", KL, 8, 4, "channels", "see its card"),
    "e2e-invae": Published("REPA-E/e2e-invae-hf", KL, 16, 32, "channels", "MIT"),
    "e2e-vavae": Published("REPA-E/e2e-vavae-hf", KL, 16, 32, "channels", "see its card"),
    "va-vae": Published("hustvl/vavae-imagenet256-f16d32-dinov2", LDM, 16, 32, "file", "MIT"),
    "sd3.5": Published("stabilityai/stable-diffusion-3.5-medium", KL, 8, 16, "scalar", "Stability Community", "vae"),
    "e2e-sd3.5": Published("REPA-E/e2e-sd3.5-vae", KL, 8, 16, "channels", "see its card"),
    "flux1": Published("black-forest-labs/FLUX.1-schnell", KL, 8, 16, "scalar", "Apache-2.0", "vae"),
    "e2e-flux": Published("REPA-E/e2e-flux-vae", KL, 8, 16, "channels", "see its card"),
    "flux2": Published("black-forest-labs/FLUX.2-klein-4B", FLUX2, 16, 128, "batch norm", "Apache-2.0", "vae"),
    "rae-dinov2": Published("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", RAE, 16, 768, "inside", "MIT"),
}
SHORTHANDS = {name: row.id for name, row in VAES.items()}
DECODERS = {row.id: VAES[row.decoder].id for row in VAES.values() if row.decoder}
WEIGHTS, LDM_STATISTICS = "diffusion_pytorch_model", "latents_stats.pt"
# Parts of the names of weights: diffusers -> LDM, in this order.
LDM_NAMES = {"mid_block.attentions.0": "mid.attn_1", "down_blocks": "down", "resnets": "block", "attentions": "attn",
             "downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out",
             "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
             "to_out.0": "proj_out"}
LARGEST, MAX_WIDTH = 2**10, 2**14  # channels of latents or pixels per latent; any number in a config.json
PIECE = 32  # images or latents in the network at a time; a decoder's feature map of 32 takes 2 GiB at 256 px in float32
Numbers = float | tuple[float, ...]  # one for all channels, or one for each


@dataclass(frozen=True)
class LatentSpace:
    """What latents mean: numbers that data set, checkpoint and decoder must share, and the VAE they came from.

    The name may differ (two fine-tunes of one VAE share a latent space), the numbers may not. `stats` is the SHA-256
    of the file that scale and shift were read from, or "" if they are the VAE's own.
    """

    vae: str = SHORTHANDS["mse"]
    scale: Numbers = 0.18215
    shift: Numbers = 0.0
    channels: int = 4
    downsampling: int = 8
    stats: str = ""

    @classmethod
    def from_record(cls, record: object, where: str = "the VAE record") -> "LatentSpace":
        """The inverse of `to_record`. Raises UserError, naming `where`, for what no VAE has: other types, a scale of 0,
        another number of scales than channels, whole numbers beyond LARGEST, a name that is no hub id and no path.
        """
        known = {"stats": "", **record} if isinstance(record, dict) else {}
        for field in fields(cls):
            value = known.get(field.name)
            if field.type is Numbers:
                each = value if isinstance(value, list | tuple) else [value]
                fits = all(type(one) in (float, int) and abs(one) <= 1e6 and (one >= 1e-6 or field.name == "shift")
                           for one in each) and (each is not value or 0 < len(each) == known.get("channels"))
                if fits:
                    known[field.name] = each[0] if len(set(each)) == 1 else tuple(each)
            elif field.type is int:
                fits = type(value) is int and 0 < value <= LARGEST
            else:
                fits = type(value) is str and value.isprintable() and len(value) <= 4096 and \
                    max(len(part.encode()) for part in value.split("/")) <= 255
            if not fits:
                size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
                value = value if type(value) in (int, float) else f"a {type(value).__name__}{size}"
                raise UserError(f"{where}: the VAE's {field.name} is {value}; use another file, or encode the data set "
                                "again")
        return cls(**{field.name: known[field.name] for field in fields(cls)})

    def to_record(self) -> dict:
        """A plain dict, for dataset.json and for checkpoints; scale and shift are lists where channels differ."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
                if value != ""}

    def require_same(self, other: "LatentSpace", mine: str, theirs: str) -> None:
        """Raise UserError if a number differs between `mine` (self) and `theirs` (other); the VAE's name may."""
        for name in ("channels", "downsampling", "scale", "shift"):
            a, b, at = getattr(self, name), getattr(other, name), ""
            if a != b:
                if tuple in (type(a), type(b)):
                    a, b = (np.broadcast_to(one, self.channels) for one in (a, b))        # (C,) each
                    i = np.flatnonzero(a != b)[0]
                    a, b, at = a[i], b[i], f" in channel {i}"
                raise UserError(f"{mine} has latent {name} {a}{at} ({self.vae}), {theirs} has {b} ({other.vae}); "
                                "use the VAE that the data set was encoded with")

    def latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sample the posterior and normalise it: moments (B, 2C, H, W), noise (B, C, H, W) -> latents (B, C, H, W)."""
        mean, std = moments.float().chunk(2, dim=1)                               # (B, C, H, W) each
        raw = mean + std * noise
        return (raw - over_channels(self.shift, raw.device)) * over_channels(self.scale, raw.device)

    def sample(self, moments: torch.Tensor) -> torch.Tensor:
        """Draw latents (B, C, H, W) from the posterior described by moments (B, 2C, H, W), normalised."""
        mean, _ = moments.chunk(2, dim=1)
        return self.latents(moments, torch.randn_like(mean))

    @property
    def decoder(self) -> str:
        """The VAE that decodes these latents unless the user names another."""
        return DECODERS.get(self.vae, self.vae)


@lru_cache
def over_channels(numbers: Numbers, device: torch.device) -> Numbers | torch.Tensor:
    """One number unchanged; numbers per channel as (C, 1, 1), kept on the device so that no step waits for a copy."""
    with torch.inference_mode(False):                             # training uses what decoding may have made
        return torch.tensor(numbers, device=device)[:, None, None] if isinstance(numbers, tuple) else numbers


def normalisation(mean: object, std: object, channels: int, where: str) -> dict[str, list[float]]:
    """Scale and shift of `LatentSpace` from mean and std of the raw latents: arrays, tensors or lists of C numbers.

    Raises UserError, naming `where`, unless both have one finite number per channel and each std is above 0.
    """
    found = {}
    for name, values in (("mean", mean), ("std", std)):
        try:
            shape = tuple(values.shape if hasattr(values, "shape") else np.shape(values))
            fits = math.prod(shape) == max(shape) == channels     # before anything is allocated
            one = torch.as_tensor(values if fits else [], dtype=torch.float64, device="cpu").flatten()        # (C,)
        except (TypeError, ValueError, RuntimeError):             # words, ragged lists, a tensor without numbers
            one, shape = torch.empty(0), type(values).__name__
        bad = ~one.isfinite() | (one <= 0) & (name == "std")
        if len(one) != channels or bad.any():
            fault = f"{one[bad][0]} in a channel" if len(one) == channels else f"of shape {shown(str(shape))[:40]}"
            raise UserError(f"{where}: its latent {name} is {fault}; expected {channels} finite numbers"
                            f"{', each above 0' * (name == 'std')}")
        found[name] = one
    return {"scale": (1 / found["std"]).tolist(), "shift": found["mean"].tolist()}


def read_statistics(path: Path) -> tuple[object, object]:
    """Mean and std, unchecked, of an npz or of a file of torch.save without code. Raises UserError for others."""
    found = load_npz(path, ("mean", "std")) if path.suffix == ".npz" else read_file(path)
    if not {"mean", "std"} <= found.keys():
        raise UserError(f"{shown(path)}: holds no mean and std; name an npz or pt with both, as `stats-latents` writes")
    return found["mean"], found["std"]


def read_space(record: object, moments_shape: tuple[int, int, int], image_side: int | None, where: str
               ) -> tuple[LatentSpace, int]:
    """The latent space of a data set and the side R of its images, checked against moments_shape (2C, H, W).

    `record` is "vae" of dataset.json; None, in data prepared by other programs, means the default, with a notice.
    `image_side` None takes R from the moments. Raises UserError, naming `where`, if they do not fit together.
    """
    if record is None:
        notice(f"{where}: does not record its VAE; assuming {LatentSpace()}")
    space = LatentSpace() if record is None else LatentSpace.from_record(record, where)
    resolution = image_side or moments_shape[1] * space.downsampling
    side = resolution / space.downsampling
    if moments_shape != (2 * space.channels, side, side):
        raise UserError(f"{where}: moments of shape {tuple(moments_shape)} are not those of {resolution} px images by "
                        f"{space.vae} (f{space.downsampling}c{space.channels}); encode the images again")
    return space, resolution


class Codec:
    """A frozen autoencoder with its latent space; `space.vae` is the name it was loaded by, shorthands resolved.

    AutoencoderKLFlux2's latents are folded, 2x2 positions to channel 4c + 2 row + column. AutoencoderRAE encodes
    without noise (std 0) and normalises inside.
    """

    def __init__(self, vae: torch.nn.Module, name: str, statistics: tuple | None = None):
        """`statistics`: mean and std from a file beside the weights; else the config's latents_mean and latents_std.

        Both replace scaling_factor and shift_factor. (Diffusers' SDXL, for latents of another std than 1, multiplies
        by scaling_factor as well.) Raises UserError for impossible numbers.
        """
        config, kind = vae.config, type(vae).__name__
        self.vae, self.unit_range, self.fold = vae, kind == RAE, config.patch_size[0] if kind == FLUX2 else 1
        self.side = getattr(vae, "decoder_image_size", None)      # R, of a network for one size
        channels, factor = (config.encoder_hidden_size, config.patch_size) if kind == RAE else (
            config.latent_channels * self.fold**2, 2 ** (len(config.block_out_channels) - 1) * self.fold)
        scale, shift = (config.scaling_factor, config.shift_factor or 0.0) if kind == KL else (1.0, 0.0)
        self.space = LatentSpace.from_record({"vae": name, "scale": scale, "shift": shift, "channels": channels,
                                              "downsampling": factor}, name)
        self.scalar = None                                        # the config's scalars, where they are not used
        if kind == FLUX2:
            statistics = vae.bn.running_mean, (vae.bn.running_var.double() + config.batch_norm_eps).sqrt()
        elif statistics is None and kind == KL and (config.latents_mean, config.latents_std) != (None, None):
            statistics, self.scalar = (config.latents_mean, config.latents_std), self.space
        if statistics:
            self.use_statistics(statistics, name)

    def use_statistics(self, statistics: tuple[object, object], where: str, stats: str = "") -> None:
        """Take mean and std of `where` as the latent space's; `stats` as `LatentSpace` has it. Raises UserError."""
        numbers = normalisation(*statistics, self.space.channels, where)
        self.space = LatentSpace.from_record({**self.space.to_record(), **numbers, "stats": stats}, where)

    def use_space(self, space: LatentSpace, whose: str) -> None:
        """Decode latents of `space`: the VAE's own; one of the same VAE from a statistics file; or, with a notice, the
        same VAE's scalars, which were recorded when latents_mean and latents_std were ignored.

        Raises UserError for another latent space, naming `whose` it is; for a folder, which may have moved, a notice.
        """
        before = self.scalar is not None and (space.scale, space.shift) == (self.scalar.scale, self.scalar.shift)
        if before or space.stats:                                 # numbers that do not tell the VAE
            if self.space.vae not in (space.vae, space.decoder):
                if not os.path.isdir(self.space.vae):
                    raise UserError(f"{whose}: encoded by {space.vae}, not by {self.space.vae}; use its own VAE")
                notice(f"{whose}: encoded by {space.vae}; {self.space.vae} must be the same VAE to decode it")
            if before:
                notice(f"{whose}: recorded without the statistics of {self.space.vae}; they are not used")
            self.space = replace(self.space, scale=space.scale, shift=space.shift)
        space.require_same(self.space, whose, "the decoder")

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, R, R) -> moments (B, 2C, H, W), float32: the posterior's mean, then its std.

        Nothing waits for a GPU, not even the copy of images in pinned memory.
        """
        x = images.to(self.vae.device, non_blocking=True).float() / 127.5 - 1     # to() would widen them before copying

        def moments(piece: torch.Tensor) -> torch.Tensor:
            if self.unit_range:
                mean = self.vae.encode((piece + 1) / 2).latent
                return torch.cat([mean, torch.zeros_like(mean)], dim=1).float()
            posterior = self.vae.encode(piece).latent_dist
            return torch.cat([pixel_unshuffle(x, self.fold) for x in (posterior.mean, posterior.std)], dim=1).float()

        return self._in_pieces(moments, x.to(self.vae.dtype))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) -> pixels uint8 (B, 3, R, R), truncated as the published numbers were."""
        scale, shift = (over_channels(one, self.vae.device) for one in (self.space.scale, self.space.shift))
        raw = latents.to(device=self.vae.device, dtype=torch.float32) / scale + shift

        def pixels(piece: torch.Tensor) -> torch.Tensor:
            image = self.vae.decode(pixel_shuffle(piece, self.fold)).sample.float()
            return (255 * image if self.unit_range else 127.5 * image + 127.5).clamp(0, 255).to(torch.uint8)

        return self._in_pieces(pixels, raw.to(self.vae.dtype))

    def _in_pieces(self, compute: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """`compute` PIECE of the `inputs` (B, ...) at a time, so that a larger B takes no more memory."""
        return torch.cat([compute(piece) for piece in inputs.split(PIECE)])

    def in_bf16(self) -> "Codec":
        """Convert the network to bfloat16; on CUDA to channels last, too, for cuDNN's bf16 convolutions."""
        self.vae.bfloat16()
        if self.vae.device.type == "cuda":
            self.vae.to(memory_format=torch.channels_last)
        return self


def load_codec(name: str, device: torch.device | str = "cpu") -> Codec:
    """Load a VAE by its name in VAES, hub id or local folder, frozen, float32.

    Raises UserError if it is neither a folder with an autoencoder nor available from the hub or its cache.
    """
    row = next((row for key, row in VAES.items() if name in (key, row.id)), None)
    name = row.id if row else name
    folder = os.path.isdir(name)
    if not folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"no VAE at {name}: use an existing folder, a hub id like {SHORTHANDS['ema']}, or one of "
                        + ", ".join(f"{key} (f{one.downsampling}c{one.channels})" for key, one in VAES.items()))
    try:
        codec = _open(name, row.subfolder if row else None, folder, row is not None and row.kind == LDM)
    except UserError:
        raise
    except Exception as error:                                    # diffusers raises anything for an edited config.json
        if not folder and not isinstance(error, OSError | ValueError | LookupError | RuntimeError):
            raise
        fault = "no readable AutoencoderKL in this folder" if folder else "no readable VAE on the hub or in its cache"
        raise UserError(f"{name}: {fault} ({' '.join(str(error).split())[:200]}); name a folder with config.json and "
                        f"{WEIGHTS}.safetensors") from error
    if row is not None and row.normalisation == "channels" and codec.scalar is None:
        raise UserError(f"{name}: its config.json lacks latents_mean and latents_std; download it, and encode with "
                        "--vae FOLDER --latent-stats FILE")
    codec.vae.to(device)
    return codec


def _open(name: str, subfolder: str | None, folder: bool, ldm: bool) -> Codec:
    """The codec in a folder or a repository of the hub. Raises what diffusers does."""
    import diffusers  # slow to import, and training without pictures does not need it
    from huggingface_hub import snapshot_download

    place = Path(name, subfolder or "")
    if ldm or folder and not (place / "config.json").exists() and (place / LDM_STATISTICS).exists():
        place = place if folder else Path(snapshot_download(name, allow_patterns="*.pt"))
        statistics, weights = place / LDM_STATISTICS, sorted(set(place.glob("*.pt")) - {place / LDM_STATISTICS})
        if len(weights) != 1 or not statistics.exists():
            raise UserError(f"{place}: expected {LDM_STATISTICS} and one other .pt file, the weights of a VA-VAE")
        return Codec(read_ldm(weights[0]), name, read_statistics(statistics))
    if folder:
        _require_whole(place)
    kind = diffusers.AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name", KL)
    if kind not in (KL, FLUX2, RAE):
        raise UserError(f"{name}: holds a {shown(str(kind))[:99]}; expected {KL}, {FLUX2} or {RAE}")
    if not hasattr(diffusers, kind):
        raise UserError(f"{name}: diffusers {diffusers.__version__} has no {kind}; install a newer diffusers")
    vae, loading = getattr(diffusers, kind).from_pretrained(name, subfolder=subfolder, output_loading_info=True)
    if loading["missing_keys"]:                                   # diffusers leaves them uninitialised
        raise ValueError(f"{len(loading['missing_keys'])} weights are missing")
    return Codec(vae.eval().requires_grad_(False), name)


def ldm_name(name: str, levels: int) -> str:
    """LDM's name of a weight of an AutoencoderKL: decoder.up_blocks.0.resnets.1.X -> decoder.up.3.block.1.X."""
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in LDM_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def read_stored(path: Path) -> dict:
    """The state dict in a file of torch.save. Raises UserError for tensors that claim more numbers than it stores."""
    weights = read_file(path)
    weights = weights.get("state_dict", weights)
    if sum(one.nbytes for one in weights.values() if isinstance(one, torch.Tensor)) > path.stat().st_size:
        raise UserError(f"{path}: the weights claim more numbers than are stored; name another file")
    return weights


def read_ldm(path: Path) -> torch.nn.Module:
    """An AutoencoderKL from a .pt file with LDM's names; shapes tell its architecture. Raises for other files."""
    from diffusers import AutoencoderKL

    weights = read_stored(path)
    block = "encoder.down.{}.block.{}.conv1.weight".format
    widths = [len(weights[block(i, 0)]) for i in range(64) if block(i, 0) in weights]
    attends = [f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(len(widths))]
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=widths, latent_channels=len(weights["post_quant_conv.weight"]),
                            down_block_types=["Attn" * one + "DownEncoderBlock2D" for one in attends],
                            up_block_types=["Attn" * one + "UpDecoderBlock2D" for one in reversed(attends)],
                            layers_per_block=sum(block(0, i) in weights for i in range(64)))
    state = {name: weights[ldm_name(name, len(widths))].reshape(one.shape) for name, one in vae.state_dict().items()}
    vae.load_state_dict(state, assign=True)                       # attention is a 1x1 convolution there, linear here
    return vae.float().eval().requires_grad_(False)


def _require_whole(folder: Path) -> None:
    """Raise UserError for a folder that is known to be no VAE, or holds code or absurd sizes. Code in it is not run."""
    if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
        raise UserError(f"{folder}: a pipeline with its VAE inside; name {folder / 'vae'}")
    files = [path for path in (folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin") if path.exists()]
    if not files and list(folder.glob(f"{WEIGHTS}.fp16.*")):
        raise UserError(f"{folder}: has the fp16 variant only, which is rounded; download {WEIGHTS}.safetensors")
    for path in files[:1]:                                        # diffusers prefers safetensors, too
        with open(path, "rb") as file:
            if file.read(100).startswith(b"version https://git-lfs"):
                raise UserError(f"{path}: a pointer of git-lfs, no weights; run `git lfs pull` there, or download it")
        if path.suffix == ".bin":
            read_stored(path)                                     # refuses code before diffusers sees the file
    config = json.loads((folder / "config.json").read_text())
    for name, value in config.items():
        limit = 64 if "layers" in name else MAX_WIDTH
        if any(isinstance(number, int | np.integer) and number > limit for number in np.ravel(value)):
            raise UserError(f"{folder / 'config.json'}: {name} is {shown(str(value))[:99]}; expected at most {limit}")
