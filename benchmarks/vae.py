"""A VAE with random weights, which cost what others cost: Stable Diffusion's sizes beside a GPU, else a small one's."""

import torch

from models.vae import Codec

WIDTHS = {"cuda": (128, 256, 512, 512), "cpu": (16, 32, 32, 32)}  # channels


def autoencoder(device_type: str) -> torch.nn.Module:
    """The network for such a device. Raises ImportError without diffusers."""
    from diffusers import AutoencoderKL  # optional, and slow to import

    torch.manual_seed(0)
    widths = WIDTHS[device_type]
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                         block_out_channels=widths, latent_channels=4, norm_num_groups=min(32, widths[0]), scaling_factor=0.18215)


def random_codec(device: torch.device) -> Codec:
    return Codec(autoencoder(device.type).eval().requires_grad_(False).to(device), "random")
