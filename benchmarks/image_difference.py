"""How far images of faster settings are from those of float32: `python -m benchmarks.image_difference --ckpt EXPERIMENT`.

The same images, by (seed, index), are sampled in float32 and in every faster setting. What a setting does to single images is told by the
differences in levels of 0 to 255; what it does to a set, by its Frechet distance to a float32 set of *another* seed, beside the distance
of two float32 sets: equal distances cannot be told apart by a score.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness import Row, open_device, report
from evaluations.features import Extractor, load_extractor
from evaluations.metrics import frechet_distance, gaussian_statistics
from generate import make_ready
from models import checkpoint
from models.vae import LatentSpace, load_codec
from runtime import run as runs
from runtime.messages import UserError, notice, without_traceback
from runtime.speed import allow_tf32, compile_parts
from samplers import Sampling, sample_images

TOY_FEATURES = Path(__file__).parents[1] / "toy" / "networks" / "features"
EXACT = ("fp32", False, "fp32")                                   # precision of the network, whether it is compiled, of the decoder
FASTER = {
    "tf32 network": ("tf32", False, "fp32"),
    "compiled network": ("fp32", True, "fp32"),
    "bf16 network": ("bf16", False, "fp32"),
    "bf16 decoder": ("fp32", False, "bf16"),
    "bf16 compiled network, bf16 decoder": ("bf16", True, "bf16"),
}


def parse_args(argv=None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description="Compare images of faster settings with those of float32.", allow_abbrev=False,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--ckpt", type=str, required=True, metavar="PATH", help="checkpoint file, or experiment folder: its newest")
    flags.add_argument("--model", type=str, default=None, metavar="NAME", help="for released files, which do not say it")
    flags.add_argument("--vae", type=str, default=None, metavar="VAE", help="decoder; None: the checkpoint's")
    flags.add_argument("--features", type=str, default=f"local-dir:{TOY_FEATURES}", metavar="SPEC", help="as of evaluations.evaluator")
    flags.add_argument("--inception-weights", type=str, default=None, metavar="FILE", help="as of evaluations.evaluator")
    flags.add_argument("--count", type=int, default=512, metavar="N", help="images of a set")
    flags.add_argument("--batch-size", type=int, default=64, metavar="IMAGES")
    flags.add_argument("--num-steps", type=int, default=50, metavar="STEPS")
    flags.add_argument("--cfg-scale", type=float, default=Sampling.cfg_scale, metavar="S")
    flags.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE", help="cpu or cuda")
    flags.add_argument("--threads", type=int, default=None, metavar="N", help="of a CPU; None: as many as PyTorch takes")
    flags.add_argument("--no-compile", action="store_true", help="leave out the settings that compile")
    flags.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the JSON there, too")
    flags.set_defaults(warmup=0, repeats=1)                       # nothing is timed
    return flags.parse_args(argv)


def sampler(args: argparse.Namespace, device: torch.device) -> Callable[..., torch.Tensor | None]:
    """A function from a setting and a seed to the images uint8 (N, 3, R, R), or None where the setting cannot be had."""
    state = checkpoint.read(runs.find(args.ckpt))
    space = LatentSpace.from_record(state["latent_space"]) if "latent_space" in state else LatentSpace()
    path_type = (state.get("args") or {}).get("path_type", "linear")
    how = Sampling(num_steps=args.num_steps, cfg_scale=args.cfg_scale, path_type=path_type)

    def sample(name: str, precision: str, compiled: bool, vae_precision: str, seed: int) -> torch.Tensor | None:
        network = checkpoint.build_for_sampling(state, args.model).requires_grad_(False)
        if make_ready(network, device, precision, compiled) != compiled:
            notice(f"left out: {name}")
            return None
        codec = load_codec(args.vae or space.decoder, device)
        space.require_same(codec.space, "the checkpoint", "the decoder")
        if vae_precision == "bf16":
            codec.in_bf16()
            if compiled:
                compile_parts(codec.vae)
        allow_tf32(precision != "fp32")
        blocks = [sample_images(network, codec, range(start, start + args.batch_size), replace(how, precision=precision, seed=seed))[0]
                  for start in tqdm(range(0, args.count, args.batch_size), desc=name, unit="block")]
        return torch.cat(blocks)[:args.count]

    return sample


def distance(a: torch.Tensor, b: torch.Tensor, extractor: Extractor) -> float:
    """Frechet distance of two sets of images uint8 (N, 3, R, R)."""
    rows = (torch.cat([extractor(piece)[0].cpu() for piece in images.split(64)]) for images in (a, b))
    return frechet_distance(*(part for features in rows for part in gaussian_statistics(features)))


def compare(name: str, faster: torch.Tensor, exact: torch.Tensor, other: torch.Tensor, yardstick: float, extractor: Extractor) -> list[Row]:
    """The rows of one setting; `other` is the float32 set of another seed, and `yardstick` how far `exact` is from it."""
    levels = (faster.int() - exact.int()).abs()
    return [Row(f"{name}: mean difference", levels.double().mean().item(), "levels"),
            Row(f"{name}: largest difference", levels.max().item(), "levels"),
            Row(f"{name}: pixel values that differ", 100 * (levels > 0).double().mean().item(), "%"),
            Row(f"{name}: pixel values that differ by more than one level", 100 * (levels > 1).double().mean().item(), "%"),
            Row(f"{name}: {extractor.label} to fp32, same seed", distance(faster, exact, extractor), ""),
            Row(f"{name}: {extractor.label} to fp32, another seed", distance(faster, other, extractor), "", baseline=yardstick)]


def measure(args: argparse.Namespace, device: torch.device) -> list[Row]:
    sample = sampler(args, device)                                # before anything is downloaded: the checkpoint may be missing
    extractor = load_extractor(args.features, device, args.inception_weights)
    exact, other = sample("fp32", *EXACT, seed=0), sample("fp32, another seed", *EXACT, seed=1)
    yardstick = distance(exact, other, extractor)
    rows = [Row(f"fp32: {extractor.label} to fp32, another seed", yardstick, "")]
    for name, setting in FASTER.items():
        precision, compiled, _ = setting
        if (precision == "tf32" and device.type != "cuda") or (compiled and args.no_compile):
            continue
        faster = sample(name, *setting, seed=0)
        if faster is not None:
            rows += compare(name, faster, exact, other, yardstick, extractor)
    return rows


@without_traceback
def main(argv=None) -> None:
    args = parse_args(argv)
    device = open_device(args)
    for name, least in (("count", 2), ("batch_size", 1), ("num_steps", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least {least}")
    if not args.cfg_scale >= 1:
        raise UserError(f"--cfg-scale is {args.cfg_scale}: give 1 for no guidance, or a number above")
    rows = measure(args, device)
    settings = {"ckpt": Path(args.ckpt).name, **{name: getattr(args, name) for name in ("count", "batch_size", "num_steps", "cfg_scale")}}
    report("image_difference", rows, settings, device, args.output)


if __name__ == "__main__":
    main()
