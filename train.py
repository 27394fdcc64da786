"""Train REG (arXiv 2507.01467), REPA or SiT on prepared latents: `bash train.sh`, or `python train.py --help`.

One step: image -> frozen encoder (or its cache) -> class token and features; moments -> latents; loss.py on the pair; clip, AdamW, EMA.
Two counters: `step` counts optimiser updates, `draws` global batches taken. Data position and randomness follow from `draws`.
"""

import argparse
import json
import netrc
import os
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from dataset import (
    BadSamples,
    Features,
    GlobalBatchSampler,
    LatentDataset,
    Reading,
    WatchedDataset,
    feature_stores,
    features_path,
)
from evaluations.extraction import reference_cache
from evaluations.features import Extractor, load_extractor
from evaluations.images import ImageSet, open_images
from evaluations.scoring import choose, evaluate
from loss import ALIGNED_TOKENS, SILoss, Terms
from models import checkpoint
from models.cached_features import UnfitFeatures, features_folder
from models.encoders import CachedEncoder, Encoder, load_encoders, require_class_tokens, require_made_by, with_weights
from models.interpolant import PATHS
from models.sit import SiT, SiT_models
from models.vae import Codec, LatentSpace, load_codec
from runtime import run as runs
from runtime.files import write_whole
from runtime.launch import require_joined
from runtime.log import Log, Meter, Skips
from runtime.messages import UserError, notice, say, without_traceback
from runtime.speed import allow_tf32, compile_parts, keep_memory
from runtime.stopping import STOPPED, StopRequest
from samplers import Sampling, sample_images

GRID_IMAGES = 16             # a training grid: so many EMA samples, with this setting
GRID = Sampling(mode="ode", num_steps=50)
SCORED = Sampling(mode="ode", num_steps=50, cfg_scale=1.0)  # --eval-samples: unguided, cheap enough to be drawn while training
SCORED_BLOCK = 64            # of which so many are drawn at a time
PATIENCE = timedelta(hours=1)  # the others wait while the first process writes its last checkpoint or draws a grid
SHOWN = ("loss", "denoising_loss", "cls_loss", "align_cosine", "grad_norm", "images_per_second")  # of a log line, on the terminal


# ------------------------------------------------------------------------------------------------------------------ arguments

def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train REG, REPA or SiT; the same command resumes.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=str, default="data/imagenet256", metavar="DIR", help="folder with images/ and vae-sd/")
    data.add_argument("--resolution", type=int, default=None, metavar="PIXELS", help="side of the images; None: as the data set has it")
    data.add_argument("--num-classes", type=int, default=None, metavar="N", help="number of classes; None: what the data set says")
    data.add_argument("--num-workers", type=int, default=4, metavar="N", help="data loader processes per rank")
    data.add_argument("--skip-bad-samples", type=int, default=0, metavar="N",
                      help="so many unreadable files are named and replaced by their neighbours; one more ends the run")
    data.add_argument("--cached-features", choices=("auto", "off", "require"), default="auto",
                      help="read what `encode --enc-type` stored instead of running the encoders; auto: where it is there and fits them")

    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", type=str, default="exps", metavar="DIR", help="holds one folder per experiment")
    output.add_argument("--exp-name", type=str, default=None, metavar="NAME", help="name of the experiment; None: from method and model")
    output.add_argument("--report-to", choices=("none", "wandb", "tensorboard"), default="none", help="tracker beside metrics.jsonl")
    output.add_argument("--logging-steps", type=int, default=100, metavar="STEPS", help="steps between log lines")
    output.add_argument("--checkpointing-steps", type=int, default=50_000, metavar="STEPS", help="steps between checkpoints")
    output.add_argument("--keep-last", type=int, default=0, metavar="K", help="checkpoints to keep, the newest; 0: all")
    output.add_argument("--keep-every", type=int, default=0, metavar="STEPS", help="keep every checkpoint of these steps, too; 0: none")
    output.add_argument("--resume", type=str, default="auto", metavar="FILE|auto|none",
                        help="go on from a checkpoint; auto: the experiment's newest whole one; none: a new experiment")
    output.add_argument("--resume-step", type=int, default=0, metavar="STEP", help="go on from the experiment's checkpoint of this step")
    output.add_argument("--sampling-steps", type=int, default=10_000, metavar="STEPS",
                        help=f"steps between grids of {GRID_IMAGES} EMA samples ({GRID.mode}, {GRID.num_steps} steps, "
                             f"scale {GRID.cfg_scale} in [{GRID.guidance_low}, {GRID.guidance_high}]); 0: none")
    output.add_argument("--vae", type=str, default=None, metavar="VAE",
                        help="VAE that decodes samples: hub id, folder, ema or mse; None: the data set's, or its recipe's decoder")
    output.add_argument("--dry-run", action="store_true", help="print configuration, parameters and GFLOPs, and stop")

    scoring = parser.add_argument_group("scoring while training")
    scoring.add_argument("--eval-steps", type=int, default=0, metavar="STEPS",
                         help=f"steps between scores of EMA samples ({SCORED.mode}, {SCORED.num_steps} steps, unguided, {SCORED.labels} "
                              "labels), logged as fid_10k or the like; 0: none")
    scoring.add_argument("--eval-samples", type=int, default=10_000, metavar="N", help="images; FID compares at equal counts only")
    scoring.add_argument("--ref-batch", type=str, default=None, metavar="REF", help="reference: npz, image folder or statistics file")
    scoring.add_argument("--features", type=str, default="inception", metavar="inception|dinov2|local-dir:FOLDER", help="feature network")
    scoring.add_argument("--inception-weights", type=str, default=None, metavar="FILE",
                         help="weights of the Inception of 2015-12-05; None: torch hub cache, else download")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=("reg", "repa", "sit"), default="reg",
                        help="reg: class-token slot and alignment; repa: alignment of patches; sit: neither")
    method.add_argument("--align", choices=tuple(ALIGNED_TOKENS), default=None, help="aligned tokens; None: all for reg, patches for repa")
    method.add_argument("--proj-coeff", type=float, default=0.5, metavar="LAMBDA", help="weight of the alignment; 0: no projector is built")
    method.add_argument("--cls", type=float, default=0.03, metavar="BETA", help="weight of the class token's velocity loss")
    method.add_argument("--enc-type", type=str, default="dinov2-vit-b", metavar="NAMES",
                        help="encoders, comma-separated, the first gives the class token; local-dir:FOLDER for a timm folder")
    method.add_argument("--encoder-weights", type=str, default=None, metavar="FILES", help="one file per encoder, instead of the hub")
    method.add_argument("--encoder-depth", type=int, default=None, metavar="BLOCK", help="block that is aligned; None: T/S/B 4, L/XL 8")
    method.add_argument("--projector-dim", type=int, default=2048, metavar="WIDTH", help="hidden width of the projectors")
    method.add_argument("--path-type", choices=tuple(PATHS), default="linear", help="interpolant between data and noise")
    method.add_argument("--weighting", choices=("uniform", "lognormal"), default="uniform", help="law of t")
    method.add_argument("--cfg-prob", type=float, default=0.1, metavar="P", help="share of labels dropped for guidance, 0 to 1")

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=tuple(SiT_models), default="SiT-XL/2", metavar="NAME", help="SiT-{T,S,B,L,XL}/{2,4,8}")
    model.add_argument("--qk-norm", action=flag, default=False, help="LayerNorm on queries and keys")
    model.add_argument("--fused-attn", action=flag, default=True, help="the backend's attention kernels")
    model.add_argument("--activation-checkpointing", action=flag, default=False,
                       help="keep only the blocks' inputs for the backward pass: batches several times as large, about a quarter more time")
    model.add_argument("--init-weights", type=str, default=None, metavar="FILE", help="start a new run from a checkpoint's EMA weights")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--max-train-steps", type=int, default=400_000, metavar="STEPS", help="optimiser updates")
    optim.add_argument("--batch-size", type=int, default=256, metavar="IMAGES",
                       help="images per update, over all processes and accumulation")
    optim.add_argument("--gradient-accumulation-steps", type=int, default=1, metavar="N", help="micro-batches per update")
    optim.add_argument("--learning-rate", type=float, default=1e-4, metavar="LR", help="constant")
    optim.add_argument("--adam-beta1", type=float, default=0.9, metavar="BETA1", help="AdamW")
    optim.add_argument("--adam-beta2", type=float, default=0.999, metavar="BETA2", help="AdamW")
    optim.add_argument("--adam-epsilon", type=float, default=1e-8, metavar="EPS", help="AdamW")
    optim.add_argument("--adam-weight-decay", type=float, default=0.0, metavar="WD", help="AdamW")
    optim.add_argument("--max-grad-norm", type=float, default=1.0, metavar="NORM", help="gradients are clipped to this norm")
    optim.add_argument("--ema-decay", type=float, default=0.9999, metavar="DECAY", help="of the averaged weights, per update")
    optim.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default=None,
                       help="autocast; None: bf16 where CUDA has it, else no")
    optim.add_argument("--compile", action=flag, default=None,
                       help="torch.compile for the blocks of SiT and encoders and for the alignment; None: on CUDA")
    optim.add_argument("--allow-tf32", action=flag, default=True, help="TF32 for what stays in float32 on CUDA")
    optim.add_argument("--max-skipped-updates", type=int, default=20, metavar="K",
                       help="an update with non-finite gradients is skipped; so many in a row end the run")
    optim.add_argument("--seed", type=int, default=0, metavar="SEED", help="of initialisation, data order and all noise")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on other flags. Raises UserError where flags contradict each other or the machine."""
    aligned = {"reg": "all", "repa": "patches", "sit": None}[args.method]
    if args.align is not None and args.method != "reg" and args.align != aligned:
        raise UserError(f"--align {args.align} came with --method {args.method}, which has no class token to align: leave --align out")
    if args.align is not None and args.proj_coeff == 0:
        raise UserError(f"--align {args.align} came with --proj-coeff 0, which aligns nothing: leave one of them out")
    check_ranges(args)
    if args.method == "sit":
        args.proj_coeff, args.enc_type = 0.0, None
    if not needs_encoder(args):
        if args.cached_features == "require":
            raise UserError(f"--cached-features require came with --method {args.method} --proj-coeff {args.proj_coeff:g}, which needs no "
                            "features: leave it out")
        args.cached_features = "off"
    args.align = (args.align or aligned) if args.proj_coeff > 0 else None
    size = SiT_models[args.model].keywords
    if args.encoder_depth is None:
        args.encoder_depth = size["encoder_depth"]
    if not 1 <= args.encoder_depth <= size["depth"]:
        raise UserError(f"--encoder-depth {args.encoder_depth} came, but {args.model} has {size['depth']} blocks: use 1 to {size['depth']}")
    args.exp_name = args.exp_name or f"{args.method}-{args.model.lower().replace('/', '-')}"
    if args.resume_step:
        if args.resume != "auto":
            raise UserError(f"--resume-step {args.resume_step} came with --resume {args.resume}: give one of them")
        args.resume = str(runs.checkpoint_path(Path(args.output_dir) / args.exp_name, args.resume_step))
    if args.mixed_precision is None:
        args.mixed_precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16 needs a CUDA device, and there is none: use bf16 or no")
    if args.compile is None:
        args.compile = torch.cuda.is_available()
    if args.eval_steps and args.ref_batch is None:
        raise UserError(f"--eval-steps {args.eval_steps} came without a reference: name an npz or an image folder with --ref-batch")
    if args.ref_batch is not None and not args.eval_steps:
        raise UserError(f"--ref-batch {args.ref_batch} came, but --eval-steps is 0 and nothing is scored: give --eval-steps too")
    if args.report_to != "none":
        require_tracker(args.report_to)
    return args


# The least a flag may be, and where it must also stay below 1.
AT_LEAST = {2: ("eval_samples",),
            1: ("batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps", "checkpointing_steps", "projector_dim",
                "max_skipped_updates", "resolution", "num_classes"),
            0: ("num_workers", "seed", "sampling_steps", "eval_steps", "keep_last", "keep_every", "resume_step", "skip_bad_samples",
                "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "proj_coeff", "cls", "cfg_prob",
                "ema_decay", "max_grad_norm")}
SHARES = ("adam_beta1", "adam_beta2", "ema_decay", "cfg_prob")


def check_ranges(args: argparse.Namespace) -> None:
    """Raise UserError for a number that makes no sense; `not >=` also refuses nan."""
    for least, names in AT_LEAST.items():
        for name in names:
            if getattr(args, name) is not None and not getattr(args, name) >= least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least {least}")
    for name in SHARES:
        if getattr(args, name) > 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give a share between 0 and 1")
    for name, useless in (("adam_beta1", 1), ("adam_beta2", 1), ("max_grad_norm", 0)):
        if getattr(args, name) == useless:
            raise UserError(f"--{name.replace('_', '-')} is {useless}, with which nothing would be learned: give another number")


def require_tracker(name: str) -> None:
    """Raise UserError when the tracker is not installed, or wandb neither logged in nor offline."""
    if find_spec(name) is None:
        raise UserError(f"--report-to {name} came, but {name} is not installed: pip install {name}, or use --report-to none")
    if name == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun") and "WANDB_API_KEY" not in os.environ:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        try:
            known = netrc.netrc().authenticators(host) is not None
        except OSError:
            known = False
        if not known:
            raise UserError("--report-to wandb came, but nobody is logged in: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline")


# --------------------------------------------------------------------------------------------------------------------- set-up

def open_data(args: argparse.Namespace) -> tuple[LatentDataset, LatentSpace]:
    """The data set and what its latents mean; --cached-features becomes what auto comes to, require or off, so that a change is said."""
    if args.cached_features != "off":
        try:
            features = open_features(args)
            opened = read_data(args, features)
        except UnfitFeatures as error:
            if args.cached_features == "require":
                raise
            notice(f"warning: cached features are not used: {error}")
        else:
            args.cached_features = "require" if features else "off"
            return opened
        args.cached_features = "off"
    return read_data(args, [])


def open_features(args: argparse.Namespace) -> list[Features]:
    """The stored features of each of the run's encoders, or none where none are there and none are required.

    Raises UnfitFeatures where only some encoders have theirs, or other weights made them.
    """
    encoders = with_weights(args.enc_type, args.encoder_weights)
    paths = [features_path(args.data_dir, name) for name, _ in encoders]
    if args.cached_features == "auto" and not any(paths):
        others = [path.name for path in feature_stores(args.data_dir)]
        if others:                                                # perhaps an encoder's whose folder was typed in another way
            notice(f"{args.data_dir} holds {', '.join(others)}, but none of {args.enc_type}, which therefore runs while training: name the "
                   "encoder as it was encoded, or give --cached-features off")
        return []
    found = []
    for (name, weights), path in zip(encoders, paths, strict=True):
        if path is None:
            raise UnfitFeatures(f"{args.data_dir} holds no {features_folder(name)}: make it with `python -m preprocessing.dataset_tools "
                                f"encode --enc-type {name}`, or give --cached-features off")
        found.append(Features(path))
        require_made_by(found[-1].record, path, name, weights)
    return found


def read_data(args: argparse.Namespace, features: list[Features]) -> tuple[LatentDataset, LatentSpace]:
    """The data set with these features, or where there are none with the images that the encoders need, and what its latents mean."""
    data = LatentDataset(args.data_dir, args.resolution, args.num_classes, with_images=needs_encoder(args) and not features,
                         features=features)
    if data.vae_record is None:
        space = LatentSpace()
        notice(f"{args.data_dir} does not say which VAE wrote it: taken as {space.vae}, scale {space.scale}, shift {space.shift}")
    else:
        space = LatentSpace.from_record(data.vae_record)
    args.num_classes = data.num_classes
    args.resolution = data.resolution or data.moments_shape[1] * space.downsampling
    side = args.resolution // space.downsampling
    if data.moments_shape != (2 * space.channels, side, side):
        raise UserError(f"{args.data_dir} holds moments of shape {data.moments_shape}, but images of {args.resolution} px give "
                        f"{(2 * space.channels, side, side)} with {space.vae}: encode it again to record its VAE")
    return data, space


def needs_encoder(args: argparse.Namespace) -> bool:
    """REG takes the class token from an encoder, REPA only its alignment target."""
    return args.method == "reg" or args.proj_coeff > 0


def open_encoders(args: argparse.Namespace, space: LatentSpace, device, pretrained: bool = True,
                  features: Sequence[Features] = ()) -> list[Encoder | CachedEncoder]:
    """The frozen encoders that the method needs, or what answers from `features` in their place; REG's must all have a class token."""
    if not needs_encoder(args):
        return []
    grid = args.resolution // space.downsampling // SiT_models[args.model].keywords["patch_size"]
    if features:
        encoders = [CachedEncoder(one.record, grid) for one in features]
        if args.method == "reg":
            require_class_tokens(encoders)
        return encoders
    if args.method == "reg":
        with torch.device("meta"):                                # before any weight is fetched
            require_class_tokens(load_encoders(args.enc_type, "meta", args.resolution, pretrained=False, grid=grid))
    return load_encoders(args.enc_type, device, args.resolution, pretrained, grid, args.encoder_weights)


def build_model(args: argparse.Namespace, space: LatentSpace, encoders: list[Encoder | CachedEncoder]) -> SiT:
    return SiT_models[args.model](
        input_size=args.resolution // space.downsampling,
        in_channels=space.channels,
        num_classes=args.num_classes,
        class_dropout_prob=args.cfg_prob,
        encoder_depth=args.encoder_depth,
        z_dims=tuple(encoder.embed_dim for encoder in encoders) if args.proj_coeff > 0 else (),
        projector_dim=args.projector_dim,
        cls_token_dim=encoders[0].embed_dim if args.method == "reg" else None,
        qk_norm=args.qk_norm,
        fused_attn=args.fused_attn,
    )


def open_optimizer(model: SiT, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW in one kernel for all parameters, which can leave an update out without asking the host (`update`)."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, eps=args.adam_epsilon,
                             betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay, fused=True)


def dry_run(args: argparse.Namespace) -> None:
    """Print the resolved configuration, parameter counts and GFLOPs of one forward pass, without touching a weight."""
    if Path(args.data_dir).exists():
        _, space = open_data(args)
    else:
        space = LatentSpace()
        args.resolution, args.num_classes = args.resolution or 256, args.num_classes or 1000
        cut = space.downsampling * SiT_models[args.model].keywords["patch_size"]
        if args.resolution % cut:
            raise UserError(f"--resolution is {args.resolution}: give a multiple of {cut}, the VAE's {space.downsampling} pixels times the "
                            f"patch of {args.model}")
        notice(f"{args.data_dir} does not exist: described for ImageNet at {args.resolution} px")
    with torch.device("meta"):
        model = build_model(args, space, open_encoders(args, space, "meta", pretrained=False))
        latents = torch.zeros(1, model.in_channels, model.input_size, model.input_size)
        cls_token = None if model.cls_token_dim is None else torch.zeros(1, model.cls_token_dim)
        with FlopCounterMode(display=False) as flops:
            model(latents, torch.zeros(1), torch.zeros(1, dtype=torch.long), cls_token)
    parameters = sum(p.numel() for p in model.parameters())
    at_inference = parameters - sum(p.numel() for p in model.projectors.parameters())
    print(json.dumps({**vars(args), "latent_space": space.to_record()}, indent=2))
    print(f"{args.model}, {args.method}: {parameters / 1e6:.3f}M parameters ({at_inference / 1e6:.3f}M without projectors), "
          f"{flops.get_total_flops() / 1e9:.2f} GFLOPs forward for one image ({flops.get_total_flops() / 2e9:.2f} GMAC)")


def open_scoring(args: argparse.Namespace, device: torch.device) -> tuple[ImageSet, Extractor] | None:
    """The reference and the feature network, which are seen to suit each other; None without --eval-steps."""
    if not args.eval_steps:
        return None
    reference = open_images(args.ref_batch, "--ref-batch")
    extractor = load_extractor(args.features, device, args.inception_weights)
    choose(["fid" if extractor.is_inception else "fd"], reference, reference, extractor)
    return reference, extractor


def open_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate's view of this process; refuses a launcher whose processes do not see each other."""
    # Accumulation is written out in the loop: accelerate must not divide the loss once more, whatever its own configuration says.
    accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE),
                                               DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
                              log_with=None if args.report_to == "none" else args.report_to,
                              project_dir=str(Path(args.output_dir) / args.exp_name))
    require_joined(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        keep_memory()
    allow_tf32(args.allow_tf32)
    return accelerator


# What makes a run the same one; every other setting may change on the way, and the change is said.
SAME_RUN = ("method", "align", "model", "enc_type", "encoder_depth", "projector_dim", "qk_norm", "path_type", "weighting", "resolution",
            "num_classes", "batch_size", "seed")


def require_same_run(state: dict, args: argparse.Namespace, data: LatentDataset, space: LatentSpace, path: Path, processes: int) -> None:
    """Raise UserError where the checkpoint belongs to another model, other data or another order of it; say what else has changed."""
    missing = {"model", "ema", "opt", "scaler", "args", "steps", "draws", "latent_space", "data"} - state.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}, without which it cannot be resumed: start from its weights with "
                        f"--init-weights {path} and another --exp-name")
    LatentSpace.from_record(state["latent_space"]).require_same(space, f"the checkpoint {path}", "the data set")
    if state["data"] != data.fingerprint:
        raise UserError(f"{path} was trained on other data than {args.data_dir} (files or labels differ: fingerprint "
                        f"{state['data'][:12]}, now {data.fingerprint[:12]}): use its data set, or another --exp-name")
    before = state["args"]
    for name in SAME_RUN:
        if before.get(name) != getattr(args, name):
            raise UserError(f"{path} was trained with --{name.replace('_', '-')} {before.get(name)}, now {getattr(args, name)} came: "
                            "keep it, or use another --exp-name")
    now = {**vars(args), "processes": processes}
    then = {**before, "processes": state.get("processes")}
    changed = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
    if changed:
        notice(f"resuming with changed settings: {', '.join(changed)}")


# ----------------------------------------------------------------------------------------------------------------- one update

def reseed(*key: int) -> None:
    """Seed all of PyTorch's generators from (seed, draws, micro-batch, rank), so that a resumed run draws what a straight one does."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def total_loss(terms: Terms, args: argparse.Namespace) -> torch.Tensor:
    """denoising + beta * cls + lambda * proj (REG, §3), a scalar."""
    total = terms.denoising.mean()
    if terms.cls is not None:
        total = total + args.cls * terms.cls.mean()
    if terms.proj is not None:
        total = total + args.proj_coeff * terms.proj
    return total


def backward(accelerator: Accelerator, model, objective: SILoss, batch: dict, args, last: bool) -> tuple[Terms, torch.Tensor]:
    """Add one micro-batch's share to the gradient. `batch` is what SILoss takes; ranks exchange gradients after the last one only."""
    with nullcontext() if last else accelerator.no_sync(model):
        terms = objective(model, **batch)
        total = total_loss(terms, args)
        accelerator.backward(total / args.gradient_accumulation_steps)
    return terms, total


def update(model: SiT, ema: SiT, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler | None, args) -> torch.Tensor:
    """Clip, AdamW and EMA from the gradients of all ranks; returns their norm, a scalar.

    Where the norm is not finite, weights, EMA and AdamW's state stay as they are: a bad number on any rank makes it so on all. That is
    decided on the device, and the host does not wait for it. The fp16 scaler halves its scale on the same occasion.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    skipped = (~grad_norm.isfinite()).float()
    optimizer.found_inf = skipped                                 # where fused AdamW looks, as it is told by GradScaler
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()
    update_ema(ema, model, args.ema_decay, 1 - skipped)
    return grad_norm


@torch.no_grad()
def update_ema(ema: SiT, model: SiT, decay: float, taken: torch.Tensor) -> None:
    """ema <- decay * ema + (1 - decay) * model where `taken` is 1, in one pass over the memory; 0 leaves it."""
    weight = (1 - decay) * taken                                  # on the device: a number would make the host wait for `taken`
    parameters, averages = list(model.parameters()), list(ema.parameters())
    torch._foreach_lerp_(averages, parameters, [weight] * len(averages))


def prepare_batch(images, moments, labels, space: LatentSpace, encoders: list[Encoder | CachedEncoder], args, accelerator: Accelerator,
                  features: Sequence[dict] = ()) -> dict:
    """uint8 images (B, 3, R, R) or cached features, moments (B, 2C, H, W), labels (B,) -> the arguments of SILoss."""
    device = accelerator.device
    moments, labels = moments.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    mean, _ = moments.chunk(2, dim=1)
    batch = dict(images=space.latents(moments, torch.randn_like(mean)), model_kwargs=dict(y=labels))
    if encoders:
        if features:                                              # as they were stored until they are on the device
            seen = [{part: value.to(device, non_blocking=True) for part, value in one.items()} for one in features]
        else:
            seen = [images.to(device, non_blocking=True)] * len(encoders)
        with accelerator.autocast():
            encoded = [encoder.features(each, with_class_token=args.method == "reg") for encoder, each in zip(encoders, seen, strict=True)]
        batch["cls_token"] = encoded[0][0] if args.method == "reg" else None              # (B, E)
        batch["zs"] = [features for _, features in encoded] if args.proj_coeff > 0 else None  # (B, T, E) each
    return batch


# -------------------------------------------------------------------------------------------------------------------- logging

def add_terms(meter: Meter, terms: Terms, total: torch.Tensor) -> None:
    """The terms of a micro-batch, the denoising loss also by quarters of t."""
    meter.add("loss", total)
    meter.add("denoising_loss", terms.denoising)
    for quarter in range(4):                                      # t in [0, 1/4), ..., [3/4, 1]
        meter.add(f"denoising_loss_t{quarter + 1}of4", terms.denoising, (terms.t * 4).long().clamp(max=3) == quarter)
    if terms.cls is not None:
        meter.add("cls_loss", terms.cls)
    if terms.proj is not None:
        meter.add("proj_loss", terms.proj)
        meter.add("align_cosine", -terms.proj)


def named(terms: list[Terms], grad_norm: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What an update came from: the terms of its micro-batches, and the norm of all ranks' gradients."""
    parts = {"denoising_loss": [micro.denoising for micro in terms], "cls_loss": [micro.cls for micro in terms],
             "proj_loss": [micro.proj for micro in terms], "grad_norm": [grad_norm]}
    return {name: values for name, values in parts.items() if values[0] is not None}


def peak_memory(device: torch.device) -> dict[str, float]:
    """For the log: the most GPU memory that PyTorch has held on this rank since the start, GiB."""
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def start_trackers(accelerator: Accelerator, experiment: Path, args: argparse.Namespace) -> None:
    """The tracker that --report-to asks for; wandb goes on with the run whose id is kept in the experiment's folder."""
    settings = {}
    if args.report_to == "wandb":
        kept = experiment / "wandb_id.txt"
        if not kept.exists():
            write_whole(kept, lambda partial: partial.write_text(uuid.uuid4().hex))
        settings = {"wandb": {"name": args.exp_name, "id": kept.read_text(), "resume": "allow"}}
    accelerator.init_trackers("REG", config={name: str(value) for name, value in vars(args).items()}, init_kwargs=settings)


def log_line(log: Log | None, accelerator: Accelerator, line: dict, shown: tuple[str, ...]) -> None:
    """One line to metrics.jsonl (`log`, on the first process) and to the tracker, and the names in `shown` to the terminal."""
    accelerator.log({name: value for name, value in line.items() if name not in ("step", "skipped")}, step=line["step"])
    if log is not None:
        log.append(line)
        say(" · ".join([f"step {line['step']:7d}", *(f"{name} {line[name]:.4f}" for name in shown if name in line)]))


def grid_path(experiment: Path, step: int) -> Path:
    return experiment / "grids" / f"{step:07d}.png"


def draw_grid(experiment: Path, accelerator: Accelerator, ema: SiT, codec: Codec, how: Sampling, step: int) -> None:
    """A grid of EMA samples with fixed labels and noise, as PNG and to the tracker."""
    images, _, _ = sample_images(ema, codec, range(GRID_IMAGES), how)
    grid = make_grid(images, nrow=round(GRID_IMAGES**0.5))                                # uint8 (3, ., .)
    try:
        write_whole(grid_path(experiment, step), lambda partial: to_pil_image(grid).save(partial, "png"))
    except UserError as error:                                    # a full disk, say: no reason to end a run
        notice(f"warning: {error}")
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": grid.permute(1, 2, 0)[None].numpy()}, step=step, **layout)


class Interrupted(Exception):
    """Scoring was given up, on all ranks at the same block."""


def score_samples(ema: SiT, codec: Codec, reference: ImageSet, extractor: Extractor, args: argparse.Namespace, processes: int,
                  stop: StopRequest) -> dict[str, float]:
    """The Frechet distance of EMA samples to the reference, on the first process; {} on others. Raises Interrupted on a signal."""
    how = replace(SCORED, seed=args.seed, path_type=args.path_type)
    rounds = args.eval_samples // (SCORED_BLOCK * processes)      # in which every rank has a block

    def blocks(ranges):
        for number, indices in enumerate(ranges):
            if number < rounds and stop.agreed():
                raise Interrupted
            yield sample_images(ema, codec, indices, how)[0].permute(0, 2, 3, 1).numpy()  # (n, R, R, 3)

    samples = ImageSet("EMA samples", args.eval_samples, (args.resolution, args.resolution), blocks)
    metric = "fid" if extractor.is_inception else "fd"
    result = evaluate(reference, samples, extractor, [metric], batch_size=SCORED_BLOCK, cache=reference_cache())
    return {} if result is None else {score_name(extractor.key, args.eval_samples): result[extractor.key]}


def score_name(key: str, count: int) -> str:
    """A distance with its number of samples, since it compares at equal numbers only: fid_10k."""
    return f"{key}_{count // 1000}k" if count % 1000 == 0 else f"{key}_{count}"


# ------------------------------------------------------------------------------------------------------------------- the loop

@without_traceback
def main(argv=None) -> None:
    args = resolve(parse_args(argv))
    if args.dry_run:
        return dry_run(args)
    with StopRequest() as stop, Reading(args.num_workers) as reading:
        run(args, stop, reading)


def run(args: argparse.Namespace, stop: StopRequest, reading: Reading) -> None:
    """Train until --max-train-steps, or until a signal; then everything is saved, and the exit status is STOPPED."""
    # The door: everything that can be wrong with the data, the launcher or the weights shows before the first step.
    data, space = open_data(args)
    accelerator = open_accelerator(args)
    batches = GlobalBatchSampler(len(data), args.batch_size, seed=args.seed, accumulation=args.gradient_accumulation_steps,
                                 rank=accelerator.process_index, world_size=accelerator.num_processes)
    experiment = Path(args.output_dir) / args.exp_name
    resumed = runs.resumable(experiment, args.resume, checkpoint.read)
    if resumed is not None:
        require_same_run(resumed[1], args, data, space, resumed[0], accelerator.num_processes)
    with accelerator.local_main_process_first():                  # one process downloads, the others find the cache
        encoders = open_encoders(args, space, accelerator.device, features=data.features)
        decodes = args.eval_steps or args.sampling_steps and accelerator.is_main_process
        codec = load_codec(args.vae or space.decoder, accelerator.device) if decodes else None
        scoring = open_scoring(args, accelerator.device)
    if codec is not None:
        space.require_same(codec.space, "the data set", "the decoder")

    reseed(args.seed)
    model = build_model(args, space, encoders).to(accelerator.device)
    model.checkpointing = args.activation_checkpointing
    ema = deepcopy(model).eval().requires_grad_(False)
    if args.compile:
        args.compile = all([compile_parts(network) for network in (model, *(one for one in encoders if isinstance(one, Encoder)))])
    optimizer = open_optimizer(model, args)
    flags = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    aligned = args.align if args.method == "reg" and args.align else "all"                # without a slot, all tokens are patches
    objective = SILoss(path_type=args.path_type, weighting=args.weighting, align=aligned, compile=args.compile)

    # The same command resumes: the newest whole checkpoint holds all the state there is.
    step = draws = 0
    meter, skips = Meter(), Skips(args.max_skipped_updates)
    if resumed is not None:
        path, state = resumed
        checkpoint.load_weights(model, state, "model")
        checkpoint.load_weights(ema, state, "ema")
        try:
            optimizer.load_state_dict(state["opt"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds the state of another optimiser ({error}): start from its weights with --init-weights {path} and "
                            "another --exp-name") from error
        for group in optimizer.param_groups:
            group.update(flags)                                   # the flags count, not what the checkpoint was trained with
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        step, draws = state["steps"], state["draws"]
        if "log" in state:
            meter.resume(state["log"]["meter"], accelerator)
            skips.events, skips.in_a_row = state["log"]["skipped"], state["log"]["in_a_row"]
        resumed = state = None                                    # a checkpoint is several times the model: let it go
        say(f"resumed {path} at step {step}")
    elif args.init_weights is not None:
        for network in (model, ema):
            checkpoint.load_weights(network, args.init_weights)
    unwrapped = model
    model = accelerator.prepare(model.train())
    starts = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise UserError(f"the processes would start at steps {starts}: {experiment} must be on a disk that all nodes share")

    saver = log = None                                            # the first process writes
    if accelerator.is_main_process:
        saver = runs.Saver(experiment, args.keep_last, args.keep_every)
        runs.set_aside(experiment, step)
        log = Log(experiment / "metrics.jsonl", step)
        if step < args.max_train_steps:
            runs.save_args(experiment, vars(args))
        else:
            say(f"nothing to do: {experiment} has its {args.max_train_steps} steps; raise --max-train-steps to go on")
        start_trackers(accelerator, experiment, args)
    batches.start = draws
    watched = WatchedDataset(data, reading, skip_bad=args.skip_bad_samples)
    loader = iter(DataLoader(watched, batch_sampler=batches, num_workers=args.num_workers, worker_init_fn=stop.shield,
                             pin_memory=accelerator.device.type == "cuda"))
    for one in data.features:
        say(f"{one.record.enc_type} is not run: its features ({one.record.dtype}, weights {one.record.weights[:12]}) are read from "
            f"{one.store.path}")
    say(f"{args.model}, {args.method}: {len(data):,} images, {args.num_classes} classes, {accelerator.num_processes} process(es), "
        f"mixed precision {args.mixed_precision}, step {step} of {args.max_train_steps}")

    def due(every: int) -> bool:
        return every > 0 and (step % every == 0 or step == args.max_train_steps)

    def save() -> None:
        """The first process copies the state, and writes it while training goes on; all take part, unless a log line was just written."""
        unlogged = {"meter": meter.state(accelerator), "skipped": skips.events, "in_a_row": skips.in_a_row}
        if saver is not None:
            saver.wait()                                          # one copy at a time
            saver.start(checkpoint.capture(model=unwrapped, ema=ema, optimizer=optimizer, scaler=accelerator.scaler, args=vars(args),
                                           step=step, draws=draws, latent_space=space.to_record(), data=data.fingerprint,
                                           processes=accelerator.num_processes, log=unlogged))

    def show(owed: bool = False) -> None:
        """The grid and the score that are due at this step; `owed`: where a run that ended did not come to them."""
        nonlocal interrupted
        if due(args.sampling_steps):
            if accelerator.is_main_process and not (owed and grid_path(experiment, step).exists()):
                draw_grid(experiment, accelerator, ema, codec, replace(GRID, seed=args.seed, path_type=args.path_type), step)
            accelerator.wait_for_everyone()
        if scoring is not None and due(args.eval_steps):
            name = score_name(scoring[1].key, args.eval_samples)
            there = owed and log is not None and any(line["step"] == step and name in line for line in log.lines)
            if broadcast_object_list([there])[0]:
                return
            try:
                scores = score_samples(ema, codec, *scoring, args, accelerator.num_processes, stop)
            except Interrupted:
                interrupted = True
            else:
                log_line(log, accelerator, {"step": step, **scores}, tuple(scores))

    interrupted = False
    if step > 0:
        show(owed=True)

    bad = BadSamples(data, args.skip_bad_samples)
    saved, logged = step, draws
    while step < args.max_train_steps and not stop.agreed():
        all_terms = []
        for micro in range(args.gradient_accumulation_steps):
            before = time.perf_counter()
            images, moments, labels, *features, replaced = next(loader)
            meter.waited += time.perf_counter() - before
            bad.note(replaced[replaced >= 0].tolist())
            reseed(args.seed, draws, micro, accelerator.process_index)
            batch = prepare_batch(images, moments, labels, space, encoders, args, accelerator, features)
            terms, total = backward(accelerator, model, objective, batch, args, last=micro == args.gradient_accumulation_steps - 1)
            add_terms(meter, terms, total)
            all_terms.append(terms)
        grad_norm = update(unwrapped, ema, optimizer, accelerator.scaler, args)
        meter.add("grad_norm", grad_norm)
        skips.note(named(all_terms, grad_norm))
        draws += 1
        step += 1                                                 # taken as made until something is due, and the device is asked
        if not any(map(due, (args.logging_steps, args.checkpointing_steps, args.sampling_steps, args.eval_steps))):
            continue
        skipped = skips.settle(accelerator, step, draws)
        step -= skipped
        if skips.too_many:
            break
        if skipped:
            continue                                              # what seemed to be due is not yet

        if due(args.logging_steps):
            bad.join(gather_object(sorted(bad.found)) if args.skip_bad_samples else [])
            line = {"step": step, "draws": draws, **meter.read(accelerator, (draws - logged) * args.batch_size), "lr": args.learning_rate,
                    **peak_memory(accelerator.device), **skips.read()}
            log_line(log, accelerator, line, SHOWN)
            logged = draws
        paused = time.perf_counter()
        if due(args.checkpointing_steps):
            save()
            saved = step
        elif due(args.logging_steps) and saver is not None and saver.failure is not None:
            save()                                                # again, by the first process alone: nothing is unlogged
        show()
        meter.since += time.perf_counter() - paused               # of the next line's images/s only training counts

    step -= skips.settle(accelerator, step, draws)
    if saved != step:
        save()
    if saver is not None:
        saver.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if skips.too_many:
        raise skips.too_many
    if step < args.max_train_steps or interrupted:
        notice(f"stopped by {stop.asked.name} after step {step}: give the same command again to go on")
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
