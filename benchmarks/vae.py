"""The VAE alone, on images and latents that are on the device already: `--only vae`.

Weights are random, sizes those of benchmarks/encode.py. The plain way is eager float32.
"""

from functools import partial

import torch

from benchmarks import harness
from benchmarks.encode import encoder_flops, random_codec
from benchmarks.sampling import decoder_flops

SIZES = {"cuda": {"batch_size": 64, "compile": True}, "cpu": {"batch_size": 4, "compile": False}}


def measure(device: torch.device, batch_size: int, compile: bool, resolution: int = 256,
            repeats: int = 5) -> harness.Table:
    """The table: encoding and decoding of `batch_size` images."""
    precision = "bf16" if harness.has_fast_bf16(device) else "fp32"
    codecs = {"ours": random_codec(device, precision, compile), "plain": random_codec(device, "fp32", False)}
    settings = {"batch_size": batch_size, "resolution": resolution, "precision": precision, "compile": compile}
    table, space = harness.Table("vae", settings, device), codecs["ours"].space
    side = resolution // space.downsampling
    images = torch.randint(0, 256, (batch_size, 3, resolution, resolution), dtype=torch.uint8, device=device)
    latents = torch.randn(batch_size, space.channels, side, side, device=device)
    peak, source = harness.matmul_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    for name, inputs, each in (("encode", images, encoder_flops(device.type, resolution)),
                               ("decode", latents, decoder_flops(device.type, side))):
        ways = {way: partial(getattr(codec, name), inputs) for way, codec in codecs.items()}
        table.add(name, harness.timed(ways, device, repeats, warmup=2), batch_size, "images/s", peak / each,
                  f"{source} / {each / 1e9:.4g} GFLOP")
    return table
