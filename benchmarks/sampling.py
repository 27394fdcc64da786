"""Sampling, from noise to PNG files: `python -m benchmarks.sampling [--baseline]`.

Everything is done by generate.py's own functions, with random weights, which do not change the time. An *evaluation* is one image through
the network once: a guided step takes two for each image. The plain way is the network in float32 without the compiler, the two halves of
guidance one after the other, the decoder in float32, and PNG files written before the next block is begun.
"""

import argparse
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import (
    Row,
    matmul_peak,
    open_device,
    parser,
    precision_that_suits,
    profile,
    ratio,
    report,
    timed,
)
from benchmarks.vae import random_codec
from evaluations.sample_folder import BlockWriter, SampleFolder, prepare, write_block
from generate import make_blocks, make_ready
from models.sit import SiT, SiT_models
from models.vae import Codec, LatentSpace, load_codec
from runtime.messages import UserError, notice, without_traceback
from runtime.speed import allow_tf32, compile_parts
from samplers import LAST_SDE_TIME, Sampling, sample_images

CLASS_TOKEN = 768
WANTED, STEPS = 50_000, 250                                       # the published setting, whose time is extrapolated


def parse_args(argv=None) -> argparse.Namespace:
    flags = parser("Time sampling: network, decoder, PNG files, and all of it.", repeats=3)
    flags.add_argument("--model", choices=tuple(SiT_models), default=None, metavar="NAME", help="None: SiT-XL/2 on CUDA, SiT-S/2 on a CPU")
    flags.add_argument("--resolution", type=int, default=None, metavar="R", help="None: 256 on CUDA, 128 on a CPU")
    flags.add_argument("--batch-size", type=int, default=None, metavar="IMAGES", help="images per block; None: 64 on CUDA, 8 on a CPU")
    flags.add_argument("--num-steps", type=int, default=4, metavar="STEPS", help="solver steps of what is timed")
    flags.add_argument("--blocks", type=int, default=2, metavar="N", help="blocks of the whole path")
    flags.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default=None,
                       help="of network and decoder; None: bf16 where there are instructions for it, else fp32")
    flags.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="compile the network; None: on CUDA")
    flags.add_argument("--model-url", type=str, default=None, metavar="VAE", help="decoder: hub id, folder, ema or mse; None: random")
    return flags.parse_args(argv)


def sized(args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The arguments with sizes that suit the machine. Raises UserError for sizes that cannot be."""
    suits = {"model": "SiT-XL/2", "resolution": 256, "batch_size": 64, "compile": True} if device.type == "cuda" else \
        {"model": "SiT-S/2", "resolution": 128, "batch_size": 8, "compile": False}
    suits["precision"] = precision_that_suits(device)
    for name, value in suits.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in (("resolution", 1), ("batch_size", 1), ("num_steps", 1), ("blocks", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least {least}")
    if args.precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs a CUDA device: use fp32 or bf16")
    if args.resolution % 64:
        raise UserError(f"--resolution is {args.resolution}: give a multiple of 64, which every model and decoder can cut")
    return args


# --------------------------------------------------------------------------------------------------------------- what is timed

@dataclass(frozen=True)
class Way:
    """One way of sampling: ours, or the plain one."""

    network: SiT
    codec: Codec | None                                           # None: there is no diffusers
    precision: str
    compiled: bool
    beside: bool                                                  # whether PNG files are written beside the sampling


def random_network(name: str, side: int, channels: int, device: torch.device) -> SiT:
    """Without zeros, which heads and gates begin with and a GPU multiplies at a higher clock. Drawn on the device, in no time."""
    torch.manual_seed(0)
    with device:
        network = SiT_models[name](input_size=side, in_channels=channels, z_dims=(), cls_token_dim=CLASS_TOKEN)
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    return network.eval().requires_grad_(False)


def in_halves(network: SiT, whole: int) -> SiT:
    """The network, which from now on evaluates a batch of more than `whole` in two."""
    forward = network.forward

    def halves(x, t, y, cls_token=None):
        if len(x) <= whole:
            return forward(x, t, y, cls_token=cls_token)
        (v1, _, cls1), (v2, _, cls2) = (forward(*pieces, cls_token=tokens) for *pieces, tokens in zip(
            x.split(whole), t.split(whole), y.split(whole), cls_token.split(whole), strict=True))
        return torch.cat([v1, v2]), [], torch.cat([cls1, cls2])

    network.forward = halves
    return network


def open_codec(name: str | None, device: torch.device) -> Codec | None:
    try:
        return random_codec(device) if name is None else load_codec(name, device)
    except ModuleNotFoundError as error:
        notice(f"without decoding and the whole path: {error.name} is not there (pip install diffusers)")
        return None


class NoCodec:
    """Decodes nothing, where the network alone is timed."""

    @staticmethod
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return latents.new_zeros(len(latents), 3, 1, 1, dtype=torch.uint8)


def photographs(count: int, side: int) -> torch.Tensor:
    """uint8 (count, 3, side, side) with the detail of photographs at all scales: a PNG of 256 px takes about 110 KB, as ImageNet's do."""
    torch.manual_seed(0)
    images = torch.full((count, 3, side, side), 128.0)
    for cells in (4, 16, 64, 256):
        images += nn.functional.interpolate(64 / cells**0.5 * torch.randn(count, 3, cells, cells), (side, side), mode="bilinear")
    return images.clamp(0, 255).to(torch.uint8)


def evaluate(way: Way, guided: bool, inputs: tuple[torch.Tensor, ...]) -> None:
    """The network once: B evaluations, or 2B."""
    latents, times, labels, tokens = (torch.cat([x, x]) if guided else x for x in inputs)
    with torch.no_grad(), torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=way.precision == "bf16"):
        way.network(latents, times, labels, cls_token=tokens)


def integrate(way: Way, guided: bool, count: int, num_steps: int) -> None:
    """All that the sampler does in so many steps: evaluations, noise, the state in float64. Decodes nothing."""
    how = Sampling(num_steps=num_steps, cfg_scale=2.3 if guided else 1.0, guidance_high=1.0, precision=way.precision)
    sample_images(way.network, NoCodec, range(count), how)


def write(way: Way, folder: SampleFolder, images: torch.Tensor) -> None:
    """The same images as every block of the folder."""
    if way.beside:
        with BlockWriter(folder) as writer:
            for block in folder.blocks:
                writer.put(block, images, None)
        return
    for block in folder.blocks:
        write_block(folder, block, images, None)


def whole_path(way: Way, folder: SampleFolder, num_steps: int) -> None:
    """From indices to files, guided in the published interval."""
    how = Sampling(num_steps=num_steps, precision=way.precision)
    if way.beside:
        make_blocks(folder, folder.blocks, way.network, way.codec, how, way.compiled, show=False)
        return
    for block in folder.blocks:
        images, _, _ = sample_images(way.network, way.codec, block, how)
        write_block(folder, block, images, None)


# ---------------------------------------------------------------------------------------------------------------------- ideals

def network_flops(name: str, side: int, channels: int) -> int:
    """Of one evaluation."""
    with torch.device("meta"):
        network = SiT_models[name](input_size=side, in_channels=channels, z_dims=(), cls_token_dim=CLASS_TOKEN)
        inputs = torch.zeros(1, channels, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*inputs, cls_token=torch.zeros(1, CLASS_TOKEN))
    return counter.get_total_flops()


def decoder_flops(codec: Codec, side: int) -> int:
    """Of one image."""
    with torch.device("meta"):
        vae = type(codec.vae).from_config(codec.vae.config)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.decode(torch.zeros(1, codec.space.channels, side, side))
    return counter.get_total_flops()


def guided_steps(num_steps: int) -> int:
    """How many of the SDE's steps begin in the published interval of guidance."""
    times = torch.linspace(1, LAST_SDE_TIME, num_steps, dtype=torch.float64).tolist()
    return sum(Sampling.guidance_low <= t <= Sampling.guidance_high for t in times)


# ------------------------------------------------------------------------------------------------------------------------ rows

class Timer:
    """Times one thing in every way."""

    def __init__(self, ways: dict[str, Way], args: argparse.Namespace, device: torch.device):
        self.ways, self.device, self.warmup, self.repeats = ways, device, args.warmup, args.repeats

    def row(self, name: str, run: Callable[[Way], None], work: int, unit: str, ideal: float | None = None,
            formula: str = "") -> tuple[Row, dict[str, float]]:
        """`run` does `work` things: a row of things per second, and the median seconds of one thing in each way."""
        def once(way: Way) -> None:
            allow_tf32(way.precision != "fp32")
            run(way)

        taken = timed({key: partial(once, way) for key, way in self.ways.items()}, self.device, self.warmup, self.repeats)
        each = {key: median(seconds) / work for key, seconds in taken.items()}
        plain = {"baseline": 1 / each["plain"], "ratio": ratio(taken["ours"], taken["plain"])} if "plain" in taken else {}
        return Row(name, 1 / each["ours"], unit, ideal, formula, **plain), each


def open_ways(args: argparse.Namespace, codec: Codec | None, side: int, channels: int, device: torch.device) -> dict[str, Way]:
    """Ours and, with --baseline, the plain one; `codec` becomes ours. Says in `args.compile` whether the network is compiled."""
    network, ways = random_network(args.model, side, channels, device), {}
    if args.baseline:
        plain = in_halves(deepcopy(network), args.batch_size)
        ways["plain"] = Way(plain, deepcopy(codec), "fp32", compiled=False, beside=False)
    args.compile = make_ready(network, device, args.precision, args.compile)
    if codec is not None and args.precision == "bf16":
        codec.in_bf16()
        if args.compile:
            compile_parts(codec.vae)
    return {"ours": Way(network, codec, args.precision, args.compile, beside=True), **ways}


def measure(args: argparse.Namespace, device: torch.device, place: Path) -> list[Row]:
    """All rows; files are written below `place`."""
    codec, count, num_steps = open_codec(args.model_url, device), args.batch_size, args.num_steps
    space = LatentSpace() if codec is None else codec.space
    side, channels = args.resolution // space.downsampling, space.channels
    ways = open_ways(args, codec, side, channels, device)
    timer, rows = Timer(ways, args, device), []
    allow_tf32(args.precision != "fp32")
    peak, source = matmul_peak(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)

    each = network_flops(args.model, side, channels)
    about = "evaluations/s", peak / each, f"{each / 1e9:.4g} GFLOP each at {source}"
    inputs = (torch.randn(count, channels, side, side, device=device), torch.full((count,), 0.5, device=device),
              torch.zeros(count, dtype=torch.long, device=device), torch.randn(count, CLASS_TOKEN, device=device))
    step = {}                                                     # seconds of one evaluation and its share of the rest, by kind and way
    for guided, name in enumerate(("conditional", "guided")):
        rows.append(timer.row(f"network, {name}", partial(evaluate, guided=guided, inputs=inputs), (1 + guided) * count, *about)[0])
        row, step[name] = timer.row(f"steps, {name}", partial(integrate, guided=guided, count=count, num_steps=num_steps),
                                    (1 + guided) * count * num_steps, *about)
        rows.append(row)

    folder = SampleFolder(place / "samples", args.blocks * count, count, args.resolution, None, png=True)
    prepare(folder, False, {})
    row, png = timer.row("PNG files", partial(write, folder=folder, images=photographs(count, args.resolution)), folder.count, "images/s")
    rows.append(row)

    decoding, decoder = dict.fromkeys(ways, 0.0), 0
    if codec is not None:
        decoder = decoder_flops(codec, side)
        row, decoding = timer.row("decoding", lambda way: way.codec.decode(inputs[0]).cpu(), count, "images/s", peak / decoder,
                                  f"{decoder / 1e9:.4g} GFLOP each")
        evaluations = num_steps + guided_steps(num_steps)
        path = partial(whole_path, folder=folder, num_steps=num_steps)
        rows += [row, timer.row(f"whole path, {num_steps} steps", path, folder.count, "images/s", peak / (evaluations * each + decoder),
                                f"{evaluations} evaluations and decoding")[0]]
        allow_tf32(args.precision != "fp32")
        profile(lambda: path(ways["ours"]), args.profile, device)

    guided = guided_steps(STEPS)
    hours = {}
    for key, way in ways.items():
        sampled = (STEPS - guided) * step["conditional"][key] + 2 * guided * step["guided"][key] + decoding[key]
        hours[key] = WANTED / 3600 * (max(sampled, png[key]) if way.beside else sampled + png[key])
    plain = {"baseline": hours["plain"], "ratio": hours["ours"] / hours["plain"]} if "plain" in hours else {}
    rows.append(Row(f"{WANTED} images, {STEPS} steps, from the above", hours["ours"], "h",
                    WANTED / 3600 * ((STEPS + guided) * each + decoder) / peak,
                    f"{STEPS + guided} evaluations" + (" and decoding" if codec is not None else ", without decoding"), **plain))
    return rows


@without_traceback
def main(argv=None) -> None:
    args = parse_args(argv)
    device = open_device(args)
    sized(args, device)
    with tempfile.TemporaryDirectory() as place:
        rows = measure(args, device, Path(place))
    names = ("model", "resolution", "batch_size", "num_steps", "blocks", "precision", "compile")
    report("sampling", rows, {name: getattr(args, name) for name in names}, device, args.output)


if __name__ == "__main__":
    main()
