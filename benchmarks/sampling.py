"""Sampling: the network alone, and with solver and decoder, by the functions of generate.py: `--only sampling`.

Weights are random, which does not change the time. An *evaluation* is one image through the network once: a guided step
takes two per image. The plain way is eager float32.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import harness
from benchmarks.encode import random_codec, random_vae
from generate import make_ready
from models.conditioning import ClassLabels
from models.sit import SiT, SiT_models
from models.vae import Codec, LatentSpace
from runtime.speed import allow_tf32
from samplers import LAST_SDE_TIME, Sampling, sample_images

CLASS_TOKEN = 768
WANTED, STEPS = 50_000, 250      # the published setting, whose time is extrapolated
SIZES = {"cuda": {"model": "SiT-XL/2", "resolution": 256, "batch_size": 64, "compile": True},
         "cpu": {"model": "SiT-S/2", "resolution": 128, "batch_size": 8, "compile": False}}


@dataclass(frozen=True)
class Way:
    """One way of sampling."""

    network: SiT
    codec: Codec | SimpleNamespace
    precision: str               # fp32 · bf16


def random_network(name: str, side: int, channels: int, device: torch.device | str,
                   cls_token_dim: int | None = CLASS_TOKEN) -> SiT:
    """A network without zeros, which heads and gates start with and a GPU multiplies at a higher clock."""
    torch.manual_seed(0)
    with torch.device(device):
        network = SiT_models[name](input_size=side, in_channels=channels, z_dims=(), cls_token_dim=cls_token_dim)
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and device != "meta" and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    return network.eval().requires_grad_(False)


def open_ways(model: str, resolution: int, compile: bool, decoder: bool, device: torch.device) -> dict[str, Way]:
    precision = "bf16" if harness.has_fast_bf16(device) else "fp32"
    images_are_latents = SimpleNamespace(space=LatentSpace(), decode=torch.Tensor.clone)
    codec = random_codec(device, precision, compile) if decoder else images_are_latents
    network = random_network(model, resolution // codec.space.downsampling, codec.space.channels, device)
    plain = Way(deepcopy(network), random_codec(device, "fp32", False) if decoder else codec, "fp32")
    make_ready(network, device, precision, compile)
    return {"ours": Way(network, codec, precision), "plain": plain}


def random_inputs(network: SiT, count: int) -> tuple[torch.Tensor, ...]:
    """Latents (B, C, H, W), times (B,), labels (B,), class tokens (B, E) or None, of B = `count` evaluations."""
    size = count, network.in_channels, network.input_size, network.input_size
    with network.pos_embed.device:
        tokens = None if network.cls_token_dim is None else torch.randn(count, network.cls_token_dim)
        return torch.randn(size), torch.full((count,), 0.5), torch.zeros(count, dtype=torch.long), tokens


def evaluate(network: SiT, precision: str, inputs: tuple[torch.Tensor, ...]) -> None:
    """The network once, as the samplers call it, on `random_inputs`."""
    latents, times, labels, tokens = inputs
    with torch.no_grad(), torch.autocast(latents.device.type, torch.bfloat16, enabled=precision == "bf16"):
        network(latents, times, labels, cls_token=tokens)


def evaluations(num_steps: int) -> int:
    """Evaluations per image in `num_steps` SDE steps with the published interval of guidance."""
    times = torch.linspace(1, LAST_SDE_TIME, num_steps, dtype=torch.float64)
    guided = (times >= Sampling.guidance_low) & (times <= Sampling.guidance_high)
    return num_steps + int(guided.sum())


def network_flops(name: str, side: int, channels: int, cls_token_dim: int | None = CLASS_TOKEN) -> int:
    """FLOPs of one evaluation."""
    network = random_network(name, side, channels, "meta", cls_token_dim)
    latents, times, labels, tokens = random_inputs(network, 1)
    return harness.flops(lambda: network(latents, times, labels, cls_token=tokens))


def decoder_flops(device_type: str, side: int) -> int:
    """FLOPs of decoding one image."""
    with torch.device("meta"):
        vae = random_vae(device_type)
        return harness.flops(lambda: vae.decode(torch.zeros(1, vae.config.latent_channels, side, side)))


def measure(device: torch.device, model: str, resolution: int, batch_size: int, compile: bool, num_steps: int = 4,
            repeats: int = 3, decoder: bool = True) -> harness.Table:
    """The table; `num_steps` SDE steps are timed, with a decoder or without."""
    ways, count = open_ways(model, resolution, compile, decoder, device), batch_size
    network, precision = ways["ours"].network, ways["ours"].precision
    table = harness.Table("sampling", {"model": model, "resolution": resolution, "batch_size": batch_size,
                                       "precision": precision, "compile": compile}, device)
    each = network_flops(model, network.input_size, network.in_channels)
    last, ending = (decoder_flops(device.type, network.input_size), " and decoder") if decoder else (0, "")
    allow_tf32(precision != "fp32")
    peak, source = harness.matmul_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    def timed(run) -> dict[str, list[float]]:
        def once(way: Way) -> None:
            allow_tf32(way.precision != "fp32")
            run(way)

        return harness.timed({name: lambda way=way: once(way) for name, way in ways.items()}, device, repeats)

    inputs = random_inputs(network, 2 * count)                    # each image with and without its label
    table.add("network, guided", timed(lambda way: evaluate(way.network, way.precision, inputs)), 2 * count,
              "evaluations/s", peak / each, f"{source} / {each / 1e9:.4g} GFLOP")
    how, number = Sampling(num_steps=num_steps), evaluations(num_steps)
    labels = ClassLabels(network.num_classes, device=device)
    seconds = timed(lambda way: sample_images(way.network, way.codec, range(count),
                                              replace(how, precision=way.precision), labels))
    table.add(f"{num_steps} SDE steps{ending}", seconds, count, "images/s", peak / (number * each + last),
              f"{source} / ({number} evaluations + {last / 1e9:.4g} GFLOP)")
    # In proportion to FLOPs: the decoder's part is small at 250 steps.
    more, hours = evaluations(STEPS) * each + last, WANTED / 3600
    longer = hours / count * more / (number * each + last)
    table.add(f"{WANTED} images, {STEPS} steps, extrapolated",
              {way: [longer * value for value in found] for way, found in seconds.items()}, None, "h",
              hours * more / peak, f"{evaluations(STEPS)} evaluations{ending}")
    return table
