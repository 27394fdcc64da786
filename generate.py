"""Sample a checkpoint: an .npz for scoring, images as PNG, a grid for people, class tokens on request; `bash eval.sh` also scores.

Image i depends on (seed, i) alone. Work is cut into fixed blocks of consecutive indices, dealt whole to the processes, so the
images are bit-equal for any number of processes. The same command again makes only what is not there: a block whose file is whole is
kept, any other is made again whole, so that an interruption at any moment does not show in the result.
"""

import argparse
import hashlib
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluations.sample_folder import BlockWriter, SampleFolder, blocks_to_make, finish, prepare, write_outputs
from models import checkpoint
from models.interpolant import PATHS
from models.sit import SiT, SiT_models
from models.vae import SHORTHANDS, Codec, LatentSpace, load_codec
from runtime import run as runs
from runtime.files import sha256
from runtime.launch import join_processes, leave_processes
from runtime.messages import UserError, notice, without_traceback
from runtime.speed import allow_tf32, choose_same_kernels, compile_parts, require_same_everywhere
from samplers import Sampling, image_label, image_rng, sample_images


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample a REG, REPA or SiT checkpoint; the last line printed is the .npz file.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    what = parser.add_argument_group("what")
    what.add_argument("--ckpt", type=str, required=True, metavar="PATH", help="checkpoint file, or experiment folder: its newest")
    what.add_argument("--model", choices=tuple(SiT_models), default=None, metavar="NAME", help="for released files, which do not say it")
    what.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last weights")
    what.add_argument("--vae", type=str, default=None, metavar="VAE", help="decoder: hub id, folder, ema or mse; None: the checkpoint's")
    what.add_argument("--sample-dir", type=str, default=None, metavar="DIR", help="None: samples/ in the experiment, else ./samples")
    what.add_argument("--num-fid-samples", type=int, default=50_000, metavar="N", help="number of images")
    what.add_argument("--save-cls-tokens", action="store_true", help="also write the generated class tokens (REG)")
    what.add_argument("--no-png", action="store_true", help="write samples.npz and the grid only, no images/ folder")

    how = parser.add_argument_group("how (the defaults are the published guided setting)")
    how.add_argument("--mode", choices=("sde", "ode"), default=Sampling.mode, help="Euler-Maruyama, or Euler")
    how.add_argument("--heun", action="store_true", help="Heun instead of Euler, for ode")
    how.add_argument("--num-steps", type=int, default=Sampling.num_steps, metavar="STEPS", help="solver steps")
    how.add_argument("--cfg-scale", type=float, default=Sampling.cfg_scale, metavar="S", help="guidance of the latents; 1: none")
    how.add_argument("--cls-cfg-scale", type=float, default=None, metavar="S",
                     help="guidance of the class token; None: as --cfg-scale; 0: conditional only")
    how.add_argument("--guidance-low", type=float, default=Sampling.guidance_low, metavar="T", help="guided from this t on, in [0, 1]")
    how.add_argument("--guidance-high", type=float, default=Sampling.guidance_high, metavar="T", help="guided up to this t, inclusive")
    how.add_argument("--labels", choices=("random", "balanced"), default=Sampling.labels, help="uniformly random, or every class in turn")
    how.add_argument("--classes", type=str, default=None, metavar="LIST", help="comma-separated classes to take in turn, e.g. 207,360")
    how.add_argument("--global-seed", type=int, default=Sampling.seed, metavar="SEED", help="image i depends on (seed, i) alone")

    run = parser.add_argument_group("machine")
    run.add_argument("--per-proc-batch-size", type=int, default=64, metavar="IMAGES",
                     help="images per block; another size may move a few pixel values by one level")
    run.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default=Sampling.precision,
                     help="of the network; the solver's state is float64")
    run.add_argument("--vae-precision", choices=("fp32", "bf16"), default="fp32",
                     help="of the decoder; bf16 moves some pixel values by a level or two, fp32 convolves in TF32 on a GPU unless "
                          "--precision is fp32, too")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                     help="compile the network, which may move a few pixel values by one level, and a decoder in bf16, which moves as "
                          "many as bf16 does by itself; None: on CUDA")
    return parser.parse_args(argv)


def sampling_of(args: argparse.Namespace, model: SiT, path_type: str) -> Sampling:
    """The sampling settings. Raises UserError for what would be ignored, or cannot be."""
    if not 1 <= args.cfg_scale < math.inf:                        # nan too
        raise UserError(f"--cfg-scale is {args.cfg_scale}: give 1 for no guidance, or a number above")
    if args.cls_cfg_scale is not None and not math.isfinite(args.cls_cfg_scale):
        raise UserError(f"--cls-cfg-scale is {args.cls_cfg_scale}: give a number, or leave it out to take --cfg-scale")
    if path_type not in PATHS:
        raise UserError(f"the checkpoint was trained on the path {path_type!r}: expected {' or '.join(PATHS)}, use another file")
    if args.cls_cfg_scale is not None and (model.cls_token_dim is None or args.cfg_scale == 1):
        why = "the model has no class token" if model.cls_token_dim is None else "with --cfg-scale 1 nothing is guided"
        raise UserError(f"--cls-cfg-scale {args.cls_cfg_scale} would be ignored, since {why}: leave it out")
    if args.cfg_scale > 1 and model.y_embedder.dropout_prob == 0:
        raise UserError(f"--cfg-scale is {args.cfg_scale}, but the checkpoint was trained with --cfg-prob 0 and never saw the null label: "
                        "give --cfg-scale 1")
    if args.classes is not None and args.labels != "random":
        raise UserError(f"--labels {args.labels} came with --classes, which are taken in turn: leave --labels out")
    if not 0 <= args.guidance_low <= args.guidance_high <= 1:
        raise UserError(f"the guidance interval is [{args.guidance_low}, {args.guidance_high}]: give 0 <= low <= high <= 1")
    if args.heun and args.mode != "ode":
        raise UserError("--heun came with --mode sde, which has no Heun step: add --mode ode")
    if args.save_cls_tokens and model.cls_token_dim is None:
        raise UserError("--save-cls-tokens came, but the checkpoint has no class-token slot: leave it out")
    for name, least in (("num_steps", 1), ("num_fid_samples", 1), ("per_proc_batch_size", 1), ("global_seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least {least}")
    if args.precision == "tf32" and not torch.cuda.is_available():
        raise UserError("--precision tf32 needs a CUDA device, and there is none: use fp32 or bf16")
    classes = None
    if args.classes is not None:
        try:
            classes = tuple(int(c) for c in args.classes.split(","))
        except ValueError:
            raise UserError(f"--classes is {args.classes!r}: give whole numbers with commas, e.g. 207,360") from None
        if not all(0 <= c < model.num_classes for c in classes):
            raise UserError(f"--classes is {args.classes}, but the checkpoint has classes 0 to {model.num_classes - 1}: choose among them")
    return Sampling(mode=args.mode, num_steps=args.num_steps, heun=args.heun, cfg_scale=args.cfg_scale, cls_cfg_scale=args.cls_cfg_scale,
                    guidance_low=args.guidance_low, guidance_high=args.guidance_high, seed=args.global_seed, labels=args.labels,
                    classes=classes, path_type=path_type, precision=args.precision)


def sample_dir(path: Path, args: argparse.Namespace) -> Path:
    """Where the folders of samples are: beside the checkpoints of an experiment, if not said otherwise."""
    ours = path.parent.name == runs.CHECKPOINTS
    return Path(args.sample_dir or (path.parent.parent / "samples" if ours else "samples"))


def folder_name(path: Path, how: Sampling, args: argparse.Namespace, vae: str) -> str:
    """A name that carries every setting that changes an image."""
    experiment = f"{path.parent.parent.name}-" if path.parent.name == runs.CHECKPOINTS else ""
    parts = [f"{experiment}{path.stem}", *(["model"] if args.weights == "model" else []),
             how.mode + ("-heun" if how.heun else ""), f"steps{how.num_steps}", f"cfg{how.cfg_scale:.12g}"]
    if how.cfg_scale > 1:
        if how.cls_cfg_scale is not None:
            parts.append(f"cls{how.cls_cfg_scale:.12g}")
        parts.append(f"t{how.guidance_low:.12g}-{how.guidance_high:.12g}")
    parts += [how.labels if how.classes is None else "classes" + "+".join(map(str, how.classes)), f"seed{how.seed}",
              how.precision, *(["compiled"] if args.compile else []), vae_tag(vae), *(["bf16"] if args.vae_precision == "bf16" else []),
              f"batch{args.per_proc_batch_size}", f"n{args.num_fid_samples}"]
    return "-".join(parts)


def vae_tag(vae: str) -> str:
    """The decoder's name, with a few letters of where it is: two folders may share a name."""
    place = str(Path(vae).resolve()) if Path(vae).is_dir() else vae
    return f"vae-{Path(vae).name}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"


def describe(path: Path, state: dict, how: Sampling, args: argparse.Namespace, vae: str, device: torch.device) -> dict:
    """Everything that made the images, for settings.json and from there for metrics.json."""
    return {
        "checkpoint": str(path),
        "checkpoint_sha256": sha256(path),
        "step": state.get("steps"),
        "weights": args.weights,
        "vae": vae,
        "vae_precision": args.vae_precision,
        "sampling": asdict(how),
        "compiled": args.compile,
        "num_images": args.num_fid_samples,
        "per_proc_batch_size": args.per_proc_batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "diffusers", "timm")}},
        "training": state.get("args"),
    }


def labels_of(count: int, num_classes: int, how: Sampling) -> np.ndarray:
    """The classes (N,) of images 0 to `count` - 1."""
    return np.array([image_label(i, image_rng(how.seed, i), num_classes, how) for i in range(count)])


def make_ready(model: SiT, device: torch.device, precision: str, compiled: bool) -> bool:
    """Bring the network to the device in its fastest form, with `compiled` blocks if asked and possible; returns whether they are."""
    model.to(device)
    if precision == "bf16":
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.to(torch.bfloat16)                          # once what autocast does at every evaluation: the same bits
    if not compiled:
        return False
    choose_same_kernels()
    return compile_parts(model)


def make_blocks(folder: SampleFolder, blocks: list[range], model: SiT, codec: Codec, how: Sampling, compiled: bool, show: bool) -> None:
    """One process's `blocks`, from indices to files, which are written while the next block is sampled."""
    whole = len(folder.blocks[0])
    with BlockWriter(folder) as writer:
        for block in tqdm(blocks, desc="sampling", unit="block", disable=not show):
            # Each size would be compiled anew, which takes longer than to sample the last block as if all of it were wanted.
            indices = range(block.start, block.start + whole) if compiled else block
            images, _, class_tokens = sample_images(model, codec, indices, how)
            writer.put(block, images[:len(block)], None if class_tokens is None else class_tokens[:len(block)])


@without_traceback
def main(argv=None) -> None:
    args = parse_args(argv)
    path = runs.find(args.ckpt)
    state = checkpoint.read(path)
    model = checkpoint.build_for_sampling(state, args.model, args.weights)
    space = LatentSpace.from_record(state["latent_space"]) if "latent_space" in state else LatentSpace()
    how = sampling_of(args, model, (state.get("args") or {}).get("path_type", "linear"))

    world = join_processes()
    if world.device.type == "cpu":
        torch.set_num_threads(1)                                  # the number of threads would show in the last bits: use processes
    allow_tf32(args.precision != "fp32")
    # Before anything is named: where the compiler does not work, the images are those of --no-compile.
    args.compile = make_ready(model, world.device, args.precision, world.device.type == "cuda" if args.compile is None else args.compile)
    require_same_everywhere(args.compile)

    vae = args.vae or space.decoder
    vae = SHORTHANDS.get(vae, vae)
    folder = SampleFolder(sample_dir(path, args) / folder_name(path, how, args, vae), args.num_fid_samples, args.per_proc_batch_size,
                          side=model.input_size * space.downsampling, png=not args.no_png,
                          token_width=model.cls_token_dim if args.save_cls_tokens else None)
    settings = missing = None
    if world.is_main_process:
        settings = describe(path, state, how, args, vae, world.device)
        missing = blocks_to_make(folder, settings)
    from accelerate.utils import broadcast_object_list  # slow to import

    missing, = broadcast_object_list([missing])                   # one answer for all: they may see a shared disk at different times
    if missing is None:
        notice(f"already there: {folder.count} images of these settings in {folder.path}")
    else:
        codec = load_codec(vae, world.device)
        if args.vae_precision == "bf16":
            codec.in_bf16()
            if args.compile:
                compile_parts(codec.vae)
        space.require_same(codec.space, "the checkpoint", "the decoder")
        there = len(folder.blocks) - len(missing)
        if there:
            notice(f"goes on: {there} of {len(folder.blocks)} blocks are there")
        if world.is_main_process:
            prepare(folder, there > 0, settings)
        world.wait_for_everyone()
        make_blocks(folder, missing[world.process_index::world.num_processes], model, codec, how, args.compile, world.is_main_process)
        world.wait_for_everyone()
        if world.is_main_process:
            write_outputs(folder, labels_of(folder.count, model.num_classes, how))
    if world.is_main_process:
        finish(folder, made=missing or [])
        if missing is not None:
            notice(f"{folder.count} images in {folder.path}: {', '.join(sorted(part.name for part in folder.path.iterdir()))}")
    world.wait_for_everyone()
    if world.is_local_main_process:                               # on every node, so that each can go on with the file
        print(folder.samples)


if __name__ == "__main__":
    main()
    leave_processes()
