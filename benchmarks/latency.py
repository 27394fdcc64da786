"""Latency and FLOPs of REG against SiT, the same network with and without the class-token slot: `--only latency`.

The paper's claim (arXiv 2507.01467): less than 0.5 % more. Weights are random, settings are those of sampling, and the
two are timed in turn. FLOPs are those of matrix products and attention, counted on meta tensors.
"""

from functools import partial
from statistics import median

import torch

from benchmarks import harness
from benchmarks.sampling import CLASS_TOKEN, evaluate, network_flops, random_inputs, random_network
from generate import make_ready
from models.sit import SiT
from models.vae import LatentSpace
from samplers import Sampling, euler_sampler

SIZES = {"cuda": {"model": "SiT-XL/2", "batches": (64, 256, 1), "compile": True, "repeats": 50},
         "cpu": {"model": "SiT-T/2", "batches": (8, 1), "compile": False, "repeats": 15}}
SLOTS = {"REG": CLASS_TOKEN, "SiT": None}
CLAIM = 1.005


def guided_step(network: SiT, precision: str, inputs: tuple[torch.Tensor, ...]) -> None:
    """One guided step of the ODE sampler: two evaluations per image."""
    latents, _, labels, tokens = inputs
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=precision == "bf16"):
        euler_sampler(network, latents, labels, num_steps=1, cfg_scale=Sampling.cfg_scale, cls_latents=tokens)


def measure(device: torch.device, model: str, batches: tuple[int, ...], compile: bool, resolution: int = 256,
            repeats: int = 50) -> harness.Table:
    """The table: the forward pass at each of the `batches`, and a guided step of as many images as the first has."""
    precision, space = "bf16" if harness.has_fast_bf16(device) else "fp32", LatentSpace()
    sizes = model, resolution // space.downsampling, space.channels
    settings = {"model": model, "resolution": resolution, "precision": precision, "compile": compile}
    table = harness.Table("latency", settings, device)
    each = {name: network_flops(*sizes, slot) for name, slot in SLOTS.items()}
    counted = each["REG"] / each["SiT"]
    for name in SLOTS:
        table.add(f"{name}, one evaluation", {"ours": [each[name] / 1e9]}, unit="GFLOP")
    table.add("REG / SiT, FLOPs", {"ours": [counted]}, unit="times", formula=f"claimed: below {CLAIM}")
    networks = {name: random_network(*sizes, device, slot) for name, slot in SLOTS.items()}
    for network in networks.values():
        make_ready(network, device, precision, compile)
    peak, source = harness.matmul_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    for what, run, count, factor in (("forward", evaluate, batches[0], 1), ("guided step", guided_step, batches[0], 2),
                                     *(("forward", evaluate, count, 1) for count in batches[1:])):
        torch.compiler.reset()                                    # PyTorch compiles a function for eight shapes at most
        ways = {name: partial(run, network, precision, random_inputs(network, count))
                for name, network in networks.items()}
        seconds, work = harness.timed(ways, device, repeats), factor * count * each["SiT"]
        table.add(f"SiT, {what}, batch {count}", {"ours": seconds["SiT"]}, ideal=work / peak,
                  formula=f"{work / 1e9:.4g} GFLOP / {source}")
        ratio = median(seconds["REG"]) / median(seconds["SiT"])
        table.add(f"REG / SiT, {what}, batch {count}", {"ours": [ratio]}, unit="times",
                  formula=f"of medians; claimed: below {CLAIM}, FLOPs: {counted:.5f}")
    return table
