"""The latent codec: pixels -> moments -> latents -> pixels, around diffusers' AutoencoderKL.

Conventions are diffusers': latents = (raw - shift) * scale, and a VAE without a shift has shift 0.
Shape letters: B batch, C latent channels, H W latent size, R image size; R = H * downsampling.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from runtime.messages import UserError, notice
from runtime.run import read_file
from runtime.stores import shown

SHORTHANDS = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}
# The published recipe encodes with the MSE fine-tune and decodes with its EMA sibling: one latent space, two decoders.
DECODERS = {SHORTHANDS["mse"]: SHORTHANDS["ema"]}
WEIGHTS = "diffusion_pytorch_model"
LARGEST, MAX_WIDTH = 2**10, 2**14  # channels of latents or pixels per latent; any number in a config.json
PIECE = 32  # images or latents in the network at a time; a decoder's feature map of 32 takes 2 GiB at 256 px in float32


@dataclass(frozen=True)
class LatentSpace:
    """What latents mean: four numbers that data set, checkpoint and decoder must share, and the VAE they came from.

    The name may differ (two fine-tunes of one VAE share a latent space), the numbers may not.
    """

    vae: str = SHORTHANDS["mse"]
    scale: float = 0.18215
    shift: float = 0.0
    channels: int = 4
    downsampling: int = 8

    @classmethod
    def from_record(cls, record: object, where: str = "the VAE record") -> "LatentSpace":
        """The inverse of `to_record`. Raises UserError, naming `where`, for what no VAE has: other types, a scale of 0,
        whole numbers beyond LARGEST, a name that is no hub id and no path.
        """
        known = record if isinstance(record, dict) else {}
        for field in fields(cls):
            value = known.get(field.name)
            if field.type is float:
                fits = type(value) in (float, int) and abs(value) <= 1e6 and (value >= 1e-6 or field.name == "shift")
            elif field.type is int:
                fits = type(value) is int and 0 < value <= LARGEST
            else:
                fits = type(value) is str and value.isprintable() and len(value) <= 4096 and \
                    max(len(part.encode()) for part in value.split("/")) <= 255
            if not fits:
                value = value if type(value) in (int, float) else f"a {type(value).__name__}"
                raise UserError(f"{where}: the VAE's {field.name} is {value}; use another file, or encode the data set "
                                "again")
        return cls(**{field.name: known[field.name] for field in fields(cls)})

    def to_record(self) -> dict:
        """A plain dict, for dataset.json and for checkpoints."""
        return asdict(self)

    def require_same(self, other: "LatentSpace", mine: str, theirs: str) -> None:
        """Raise UserError if a number differs between `mine` (self) and `theirs` (other); the VAE's name may."""
        for name in ("scale", "shift", "channels", "downsampling"):
            a, b = getattr(self, name), getattr(other, name)
            if a != b:
                raise UserError(f"{mine} has latent {name} {a} ({self.vae}), {theirs} has {b} ({other.vae}); "
                                "use the VAE that the data set was encoded with")

    def latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sample the posterior and normalise it: moments (B, 2C, H, W), noise (B, C, H, W) -> latents (B, C, H, W)."""
        mean, std = moments.float().chunk(2, dim=1)                               # (B, C, H, W) each
        raw = mean + std * noise
        return (raw - self.shift) * self.scale

    def sample(self, moments: torch.Tensor) -> torch.Tensor:
        """Draw latents (B, C, H, W) from the posterior described by moments (B, 2C, H, W), normalised."""
        mean, _ = moments.chunk(2, dim=1)
        return self.latents(moments, torch.randn_like(mean))

    @property
    def decoder(self) -> str:
        """The VAE that decodes these latents unless the user names another."""
        return DECODERS.get(self.vae, self.vae)


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
                        f"{space}; encode the images again")
    return space, resolution


class Codec:
    """A frozen AutoencoderKL with its latent space; `space.vae` is the name it was loaded by, shorthands resolved."""

    def __init__(self, vae: torch.nn.Module, name: str):
        config = vae.config
        self.vae = vae
        self.space = LatentSpace.from_record({
            "vae": name, "scale": config.scaling_factor, "shift": config.shift_factor or 0.0,
            "channels": config.latent_channels, "downsampling": 2 ** (len(config.block_out_channels) - 1)}, name)

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, R, R) -> moments (B, 2C, H, W), float32: the posterior's mean, then its std.

        Nothing waits for a GPU, not even the copy of images in pinned memory.
        """
        x = images.to(self.vae.device, non_blocking=True).float() / 127.5 - 1     # to() would widen them before copying

        def moments(piece: torch.Tensor) -> torch.Tensor:
            posterior = self.vae.encode(piece).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1).float()

        return self._in_pieces(moments, x.to(self.vae.dtype))

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) -> pixels uint8 (B, 3, R, R), truncated as the published numbers were."""
        raw = latents.to(device=self.vae.device, dtype=torch.float32) / self.space.scale + self.space.shift

        def pixels(piece: torch.Tensor) -> torch.Tensor:
            return (127.5 * self.vae.decode(piece).sample.float() + 127.5).clamp(0, 255).to(torch.uint8)

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
    """Load a VAE by hub id, local folder or shorthand (`ema`, `mse`), frozen, float32.

    Raises UserError if it is neither a folder with an AutoencoderKL nor available from the hub or its cache.
    """
    from diffusers import AutoencoderKL  # slow to import, and training without pictures does not need it

    name = SHORTHANDS.get(name, name)
    folder = os.path.isdir(name)
    if not folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"no VAE at {name}: use an existing folder, a hub id like {SHORTHANDS['ema']}, or "
                        f"{' or '.join(SHORTHANDS)}")
    try:
        if folder:
            _require_whole(Path(name))
        vae, loading = AutoencoderKL.from_pretrained(name, output_loading_info=True)
        if loading["missing_keys"]:                               # diffusers leaves them uninitialised
            raise ValueError(f"{len(loading['missing_keys'])} weights are missing")
        codec = Codec(vae.eval().requires_grad_(False), name)
    except UserError:
        raise
    except Exception as error:                                    # diffusers raises anything for an edited config.json
        if not folder and not isinstance(error, (OSError, ValueError)):
            raise
        fault = "no readable AutoencoderKL in this folder" if folder else "VAE neither on the hub nor in its cache"
        raise UserError(f"{name}: {fault} ({' '.join(str(error).split())[:200]}); name a folder with config.json and "
                        f"{WEIGHTS}.safetensors") from error
    vae.to(device)
    return codec


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
            read_file(path)                                       # refuses code before diffusers sees the file
    config = json.loads((folder / "config.json").read_text())
    for name, value in config.items():
        limit = 64 if name == "layers_per_block" else MAX_WIDTH
        if any(isinstance(number, int | np.integer) and number > limit for number in np.ravel(value)):
            raise UserError(f"{folder / 'config.json'}: {name} is {shown(str(value))[:99]}; expected at most {limit}")
