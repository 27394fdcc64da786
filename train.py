"""Train REG (arXiv 2507.01467), REPA or SiT on prepared latents: `bash train.sh`, or `python train.py --help`.

The algorithm is `train`, below; the objective is in loss.py. `main` opens data, networks and experiment in chapters.
In runtime/, launch.py starts the ranks, run.py writes checkpoints, log.py the log, and stopping.py handles signals.
Data position and randomness follow from (seed, step, micro-batch, rank).
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from dataset import GlobalBatchSampler, LatentDataset
from evaluations.extraction import Measured
from evaluations.features import Extractor, load_extractor
from evaluations.images import ImageSet, open_images
from evaluations.scoring import choose, evaluate, measure_reference
from loss import ALIGNED_TOKENS, SILoss, Terms, weighted
from models import checkpoint
from models.cached_features import Features
from models.checkpoint import MODELS, Network
from models.conditioning import Captions, ClassLabels, Conditions, open_captions
from models.encoders import AnyEncoder, encoder_ids, load_cached, load_encoders, open_features, same_encoders
from models.interpolant import PATHS, auto_shift
from models.mmdit import MMDiT_models
from models.text import DEFAULT, states_shape
from models.vae import Codec, LatentSpace, load_codec, read_space
from runtime import run as disk
from runtime.arguments import Parser, Released, at_least, below_one, epsilon, not_negative, positive, share, time_shift
from runtime.catalogue import MAX_CLASSES
from runtime.files import as_size, write_whole
from runtime.launch import leave_processes, require_joined
from runtime.loading import batches_of, require_short_tmpdir
from runtime.log import Log, peak_memory, require_tracker, track, write_line
from runtime.messages import UserError, notice, say, without_traceback
from runtime.pictures import grid_of
from runtime.speed import allow_tf32, compile_parts, keep_memory
from runtime.stopping import StopRequest
from samplers import Sampling, sample_images

GRID_IMAGES = 16             # EMA samples in a training grid
GRID = Sampling(mode="ode", num_steps=50)
SCORED = Sampling(mode="ode", num_steps=50, cfg_scale=1.0)        # --eval-steps: unguided, cheap enough for training
SCORED_BLOCK = 64            # samples drawn at a time
BYTES_PER_PARAMETER = 20     # in training: the weight, its average, its gradient and AdamW's two moments, in float32
IMAGENET = 1000              # classes that the released programs always build
PATIENCE = timedelta(hours=1)  # the other ranks wait while the first writes a checkpoint or draws a grid
SHOWN = ("loss", "denoising_loss", "cls_loss", "align_cosine", "grad_norm", "images_per_second")  # on the terminal


# -------------------------------------------------------------------------------------------------------- the algorithm

def train(args: argparse.Namespace, run: disk.Run, batches: Iterator[tuple], space: LatentSpace, encoders: list,
          conditions: Conditions, model: Network, ema: Network, objective: SILoss, optimizer: torch.optim.AdamW,
          accelerator: Accelerator) -> None:
    """REG (arXiv 2507.01467, section 3). What `run.after` does (log, save, draw, score) is set up in `schedule`."""
    network, micros = accelerator.prepare(model.train()), args.gradient_accumulation_steps
    for step in run.steps():                                      # start + 1 .. --max-train-steps, or until a signal
        for micro in range(micros):
            seen, moments, shown = next(batches)                  # one for each encoder, (B, 2C, H, W), B
            reseed(args.seed, step - 1, micro, accelerator.process_index)                 # batches count from 0
            latents = space.sample(moments)                       # (B, C, H, W)
            with torch.no_grad(), accelerator.autocast():
                cls_token, targets = encode(encoders, seen, args.method == "reg")         # (B, E), [(B, T, E), ...]
                given = conditions.drop(conditions.embed(shown), args.cfg_prob)           # (B,) or (B, L, W)
            with nullcontext() if micro == micros - 1 else accelerator.no_sync(network):
                terms = objective(network, latents, {conditions.argument: given}, cls_token=cls_token,
                                  zs=targets if args.proj_coeff > 0 else None)
                total = weighted(terms, beta=args.cls, lam=args.proj_coeff)
                accelerator.backward(total / micros)
            meter_terms(run.meter, terms, total)
        accelerator.unscale_gradients(optimizer)                  # fp16 only
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        finite = norm.isfinite()                                  # stays on the device; equal on all ranks
        step_if(finite, optimizer, accelerator.scaler)
        update_ema(ema, model, args.ema_decay, finite)
        run.meter.add_update(norm, finite)
        run.after(step)


def encode(encoders: Sequence[AnyEncoder], seen: list,
           with_class_token: bool) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The first encoder's class token (B, E), raw, or None, and each encoder's targets (B, T, E).

    `seen`: uint8 images (B, 3, R, R) or stored features, by encoder. T is 1+N with the class token in front, else N.
    """
    encoded = [encoder.features(each, with_class_token) for encoder, each in zip(encoders, seen, strict=True)]
    return encoded[0][0] if with_class_token else None, [target for _, target in encoded]


def reseed(*key: int) -> None:
    """Seed PyTorch's generators from (seed, batch number, micro-batch, rank), so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def step_if(finite: torch.Tensor, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler | None) -> None:
    """Take an AdamW step if `finite`, a bool (), else change nothing. The device decides; the host does not wait.

    The fp16 scaler halves its scale after a skipped step.
    """
    optimizer.found_inf = (~finite).float()                       # 1: fused AdamW skips; GradScaler sets it, too
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scaler is not None:
        scaler.update()


@torch.no_grad()
def update_ema(ema: Network, model: Network, decay: float, finite: torch.Tensor) -> None:
    """ema <- decay * ema + (1 - decay) * model if `finite` (), in one pass over the memory."""
    weight = (1 - decay) * finite.float()                         # on the device: a number would make the host wait
    parameters, averages = list(model.parameters()), list(ema.parameters())
    torch._foreach_lerp_(averages, parameters, [weight] * len(averages))


def meter_terms(meter, terms: Terms, total: torch.Tensor) -> None:
    """Log the terms of a micro-batch, the denoising loss also by quarters of t."""
    meter.add("loss", total)
    meter.add("denoising_loss", terms.denoising)
    for quarter in range(4):                                      # t in [0, 1/4), ..., [3/4, 1]
        inside = (terms.t * 4).long().clamp(max=3) == quarter     # (B,)
        meter.add(f"denoising_loss_t{quarter + 1}of4", terms.denoising, inside)
    if terms.cls is not None:
        meter.add("cls_loss", terms.cls)
    if terms.proj is not None:
        meter.add("proj_loss", terms.proj)
        meter.add("align_cosine", -terms.proj)


# ------------------------------------------------------------------------------------------------------------ arguments

# Flags of the released training programs that have no meaning here, and what to use instead.
RELEASED_FLAGS = {
    "epochs": "training is counted in steps; give --max-train-steps (an epoch of ImageNet is 5,005 of 256 images)",
    "legacy": "labels are dropped once, in the network; leave it out; --cfg-prob 0.19 equals two drops of 0.1",
    "logging-dir": "logs are in the experiment's folder, OUTPUT_DIR/EXP_NAME; leave it out",
    "no-legacy": "labels are always dropped once; leave it out",
    "ops-head": "--model decides the number of heads; leave it out",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train REG, REPA or SiT; the same command resumes.")
    flag = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", default="data/imagenet256", metavar="DIR", help="folder with images/ and vae-sd/")
    data.add_argument("--resolution", type=at_least(1, 4096), metavar="PIXELS",
                      help="side of the images; None: the data set's")
    data.add_argument("--num-classes", type=at_least(1, MAX_CLASSES), metavar="N",
                      help="number of classes; None: the data set's")
    data.add_argument("--num-workers", type=at_least(0, 1000), default=4, metavar="N",
                      help="data loader processes per rank")
    data.add_argument("--cached-features", choices=("auto", "off", "require"), default="auto",
                      help="read encoder outputs stored by `encode --enc-type`; auto: if they "
                           "are there for all encoders")

    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", default="exps", metavar="DIR", help="holds one folder per experiment")
    output.add_argument("--exp-name", metavar="NAME", help="name of the experiment; None: from method and model")
    output.add_argument("--report-to", choices=("none", "wandb", "tensorboard"), default="none",
                        help="tracker beside metrics.jsonl")
    output.add_argument("--logging-steps", type=at_least(1), default=100, metavar="STEPS",
                        help="steps between log lines")
    output.add_argument("--checkpointing-steps", type=at_least(1), default=50_000, metavar="STEPS",
                        help="steps between checkpoints")
    output.add_argument("--keep-last", type=at_least(0), default=0, metavar="K",
                        help="checkpoints to keep, the newest; 0: all")
    output.add_argument("--keep-every", type=at_least(0), default=0, metavar="STEPS",
                        help="also keep the checkpoints of every STEPS steps; 0: none")
    output.add_argument("--resume", default="auto", metavar="FILE|auto|none",
                        help="checkpoint to go on from; auto: the newest whole one; none: a new experiment")
    output.add_argument("--resume-step", type=at_least(0), default=0, metavar="STEP",
                        help="go on from the experiment's checkpoint of this step; 0: as --resume says")
    output.add_argument("--sampling-steps", type=at_least(0), default=10_000, metavar="STEPS",
                        help=f"steps between grids of {GRID_IMAGES} EMA samples ({GRID.mode}, {GRID.num_steps} steps, "
                             "guided as published); 0: none")
    output.add_argument("--vae", metavar="VAE",
                        help="VAE that decodes samples: hub id, folder, or a name in docs/data.md; "
                             "None: the one of the data set's recipe")
    output.add_argument("--dry-run", action="store_true", help="print configuration, parameters and GFLOPs, and stop")

    scoring = parser.add_argument_group("scoring while training")
    scoring.add_argument("--eval-steps", type=at_least(0), default=0, metavar="STEPS",
                         help=f"steps between scores of EMA samples ({SCORED.mode}, {SCORED.num_steps} steps, "
                              f"unguided, random labels or captions), logged as e.g. fid_10k; 0: none")
    scoring.add_argument("--eval-samples", type=at_least(2, 10**7), default=10_000, metavar="N",
                         help="samples per score; FID compares at equal numbers only")
    scoring.add_argument("--ref-batch", metavar="REF", help="reference: npz, image folder or statistics file")
    scoring.add_argument("--features", default="inception", metavar="inception|dinov2|local-dir:FOLDER",
                         help="feature network")
    scoring.add_argument("--inception-weights", metavar="FILE",
                         help="weights of the Inception of 2015-12-05; None: torch hub cache, else download")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=("reg", "repa", "sit"), default="reg",
                        help="reg: class-token slot and alignment; repa: alignment of patches; sit: neither")
    method.add_argument("--align", choices=tuple(ALIGNED_TOKENS),
                        help="aligned tokens; None: all for reg, patches for repa")
    method.add_argument("--proj-coeff", type=not_negative, default=0.5, metavar="LAMBDA",
                        help="weight of the alignment; 0: no projector is built")
    method.add_argument("--cls", type=not_negative, default=0.03, metavar="BETA",
                        help="weight of the class token's velocity loss")
    method.add_argument("--enc-type", default="dinov2-vit-b", metavar="NAMES",
                        help="encoders, comma-separated, the first gives the class token; "
                             "local-dir:FOLDER for a timm folder")
    method.add_argument("--encoder-weights", metavar="FILES", help="one file per encoder, instead of the hub")
    method.add_argument("--encoder-depth", type=at_least(1), metavar="BLOCK",
                        help="aligned block; None: T/S/B 4, L/XL 8")
    method.add_argument("--projector-dim", type=at_least(1, 10**9), default=2048, metavar="WIDTH",
                        help="hidden width of the projectors")
    method.add_argument("--path-type", choices=tuple(PATHS), default="linear",
                        help="interpolant between data and noise")
    method.add_argument("--weighting", choices=("uniform", "lognormal"), default="uniform", help="law of t")
    method.add_argument("--time-shift", type=time_shift, default=1.0, metavar="S|auto",
                        help="move t towards noise, t' = S t / (1 + (S - 1) t); auto: S = sqrt(C H W / 4096)")
    method.add_argument("--cfg-prob", type=share, default=0.1, metavar="P",
                        help="share of labels or captions dropped for guidance")

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=tuple(MODELS), default="SiT-XL/2", metavar="NAME",
                       help="SiT-{T,S,B,L,XL}/{1,2,4,8}; for captions MMDiT/2 or MMDiT-T/2")
    model.add_argument("--text-encoder", metavar="NAME|FOLDER", help=f"CLIP or T5, for captions; None: {DEFAULT}")
    model.add_argument("--text-length", type=at_least(2, 4096), metavar="N",
                       help="tokens of a caption; None: the encoder's positions, or 128 for T5")
    model.add_argument("--qk-norm", action=flag, default=False, help="LayerNorm on queries and keys")
    model.add_argument("--fused-attn", action=flag, default=True, help="the backend's attention kernels")
    model.add_argument("--activation-checkpointing", action=flag, default=False,
                       help="keep only block inputs for the backward pass: less memory, about a quarter more time")
    model.add_argument("--init-weights", metavar="PATH|ID",
                       help="start a new run from a checkpoint's EMA weights, an exported folder or a hub id")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--max-train-steps", type=at_least(1), default=400_000, metavar="STEPS",
                       help="global batches to train on")
    optim.add_argument("--batch-size", type=at_least(1, 10**7), default=256, metavar="IMAGES",
                       help="images per step, over all processes and accumulation")
    optim.add_argument("--gradient-accumulation-steps", type=at_least(1), default=1, metavar="N",
                       help="micro-batches per step")
    optim.add_argument("--learning-rate", type=share, default=1e-4, metavar="LR", help="constant")
    optim.add_argument("--adam-beta1", type=below_one, default=0.9, metavar="BETA1", help="AdamW")
    optim.add_argument("--adam-beta2", type=below_one, default=0.999, metavar="BETA2", help="AdamW")
    optim.add_argument("--adam-epsilon", type=epsilon, default=1e-8, metavar="EPS", help="AdamW")
    optim.add_argument("--adam-weight-decay", type=not_negative, default=0.0, metavar="WD", help="AdamW")
    optim.add_argument("--max-grad-norm", type=positive, default=1.0, metavar="NORM",
                       help="gradients are clipped to this norm")
    optim.add_argument("--ema-decay", type=below_one, default=0.9999, metavar="DECAY",
                       help="of the average of the weights, per step")
    optim.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"),
                       help="autocast; None: bf16 where CUDA has it, else no")
    optim.add_argument("--compile", action=flag, help="torch.compile for networks and alignment; None: on CUDA")
    optim.add_argument("--allow-tf32", action=flag, default=True, help="TF32 for what stays in float32 on CUDA")
    optim.add_argument("--max-skipped-updates", type=at_least(1), default=20, metavar="K",
                       help="an update with non-finite gradients is skipped; K in a row end the run")
    optim.add_argument("--seed", type=at_least(0), default=0, metavar="SEED",
                       help="of initialisation, data order and noise")
    for name, instead in RELEASED_FLAGS.items():
        parser.add_argument(f"--{name}", action=Released, instead=instead)
    parser.add_argument("--prediction", action=Released, nargs=None, choices=("v",))      # always velocities
    return parser.parse_args(argv)


def shift_of(args: argparse.Namespace, space: LatentSpace, resolution: int) -> float:
    """--time-shift as a number."""
    auto = auto_shift(space.channels, resolution // space.downsampling)
    return auto if args.time_shift == "auto" else args.time_shift


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in defaults that depend on other flags or the machine. Raises UserError if flags contradict each other."""
    aligned = {"reg": "all", "repa": "patches", "sit": None}[args.method]
    if args.align is not None and args.method != "reg" and args.align != aligned:
        raise UserError(f"--align {args.align}: --method {args.method} has no class token to align; leave --align out")
    if args.align is not None and args.proj_coeff == 0:
        raise UserError(f"--align {args.align}: --proj-coeff 0 aligns nothing; leave one of them out")
    if args.method == "sit":
        args.proj_coeff, args.enc_type = 0.0, None
    if not needs_encoder(args):
        if args.cached_features == "require":
            raise UserError(f"--cached-features require: --method {args.method} --proj-coeff {args.proj_coeff:g} needs "
                            "no features; leave it out")
        args.cached_features = "off"
    args.align = (args.align or aligned) if args.proj_coeff > 0 else None
    if args.model in MMDiT_models:
        args.text_encoder = args.text_encoder or DEFAULT
        if args.num_classes is not None or not args.fused_attn:
            flag = "--no-fused-attn" if args.num_classes is None else f"--num-classes {args.num_classes}"
            raise UserError(f"{flag}: --model {args.model} has captions and no such choice; leave it out")
        _, args.text_length, _ = states_shape(args.text_encoder, args.text_length)
    elif args.text_encoder is not None or args.text_length is not None:
        flag = "--text-length" if args.text_encoder is None else f"--text-encoder {args.text_encoder}"
        raise UserError(f"{flag}: --model {args.model} has class labels; give --model MMDiT/2, or leave it out")
    size = MODELS[args.model].keywords
    if args.encoder_depth is None:
        args.encoder_depth = size["encoder_depth"]
    if args.encoder_depth > size["depth"]:
        raise UserError(f"--encoder-depth {args.encoder_depth}: {args.model} has {size['depth']} "
                        f"blocks; use 1 to {size['depth']}")
    args.exp_name = args.exp_name or f"{args.method}-{args.model.lower().replace('/', '-')}"
    if Path(args.exp_name).is_absolute() or ".." in Path(args.exp_name).parts:
        raise UserError(f"--exp-name {args.exp_name}: leads out of --output-dir; give a name")
    if args.resume_step:
        if args.resume != "auto":
            raise UserError(f"--resume-step {args.resume_step}: contradicts --resume {args.resume}; give one of them")
        args.resume = str(disk.checkpoint_path(Path(args.output_dir) / args.exp_name, args.resume_step))
    cuda = torch.cuda.is_available()
    if args.mixed_precision is None:
        args.mixed_precision = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if args.mixed_precision == "fp16" and not cuda:
        raise UserError("--mixed-precision fp16: needs a CUDA device; use bf16 or no")
    if args.compile is None:
        args.compile = cuda
    if args.eval_steps and args.ref_batch is None:
        raise UserError(f"--eval-steps {args.eval_steps}: needs --ref-batch")
    if args.ref_batch is not None and not args.eval_steps:
        raise UserError(f"--ref-batch {args.ref_batch}: nothing is scored; add --eval-steps")
    require_tracker(args.report_to)
    return args


def needs_encoder(args: argparse.Namespace) -> bool:
    """REG takes the class token from an encoder, REPA only its targets."""
    return args.method == "reg" or args.proj_coeff > 0


# ------------------------------------------------------------------------------------------------------------- chapters

@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = resolve(parse_args(argv))
    if args.dry_run:
        return dry_run(args)
    require_short_tmpdir(args.num_workers)
    with StopRequest(PATIENCE) as stop:
        # Check data, launcher, checkpoint and weights before the first step.
        data, space, resolution = open_data(args)
        accelerator = open_accelerator(args)
        indices = GlobalBatchSampler(len(data), args.batch_size, seed=args.seed,
                                     accumulation=args.gradient_accumulation_steps,
                                     rank=accelerator.process_index, world_size=accelerator.num_processes)
        shift = shift_of(args, space, resolution)
        settings = {**vars(args), "resolution": resolution, "time_shift": shift,
                    "num_classes": None if data.captions else data.num_classes,
                    "cached_features": "require" if data.features else "off", "images": len(data),
                    "processes": accelerator.num_processes, "hardware": hardware_of(accelerator.device)}
        folder = Path(args.output_dir) / args.exp_name
        ids = encoder_ids(args.enc_type, args.encoder_weights) if needs_encoder(args) else []
        resumed = disk.resumable(folder, args.resume, checkpoint.read)
        if resumed is not None:
            require_same_run(*resumed, settings, space, data.fingerprint, ids)
        with accelerator.local_main_process_first():              # one process downloads, the others find the cache
            encoders = open_encoders(args, space, resolution, accelerator.device, features=data.features)
            scoring = open_scoring(args, accelerator.device)
            conditions = open_conditions(args, data, resumed, accelerator.device)
            codec = open_codec(args, space, accelerator)
        model, ema, objective, optimizer = open_networks(args, space, resolution, conditions, encoders,
                                                         accelerator.device, accelerator.num_processes)
        start = open_weights(args, resumed, model, ema, optimizer, accelerator.scaler)
        resumed = None                                            # several times the size of the model: free it

        run = disk.Run(start, args.max_train_steps, stop)
        about = {"args": settings, "latent_space": space.to_record(), "data": data.fingerprint,
                 "processes": accelerator.num_processes, "encoders": ids, **conditions.record()}
        same = dict(seed=args.seed, path_type=args.path_type, time_shift=shift)
        grid, scored = replace(GRID, **same, **conditions.published), replace(SCORED, **same)
        capture = partial(checkpoint.content, model, ema, optimizer, accelerator.scaler, about)
        with disk.open_folder(folder, run, settings, accelerator) as log:
            close = schedule(run, args, folder, log, capture, resolution, ema, codec, scoring, conditions, grid,
                             scored, accelerator)
            indices.start = start
            loader = DataLoader(data, batch_sampler=indices, num_workers=args.num_workers, worker_init_fn=stop.shield,
                                pin_memory=accelerator.device.type == "cuda")
            batches = to_device(run.meter.timed(batches_of(loader)), accelerator.device, len(encoders))
            say(f"{args.model}, {args.method}: {len(data):,} images, {conditions}, "
                f"{accelerator.num_processes} process(es), mixed precision {args.mixed_precision}, "
                f"time shift {shift:g}, step {start} of {args.max_train_steps}")
            train(args, run, run.read_ahead(batches, args.gradient_accumulation_steps), space, encoders, conditions,
                  model, ema, objective, optimizer, accelerator)
            if run.interrupted:
                close(run.step)
                if stop.failure is None:
                    notice(f"stopped by {stop.asked.name} after step {run.step}: give the same command again to go on")
            accelerator.wait_for_everyone()                       # else the launcher may end the rank that still saves
            track(accelerator, accelerator.end_training)
            leave_processes()
        if run.interrupted:
            stop.leave()


def open_data(args: argparse.Namespace) -> tuple[LatentDataset, LatentSpace, int]:
    """The data set, its latent space, and the side R of its images."""
    features = [] if args.cached_features == "off" else open_features(
        args.data_dir, args.enc_type, args.encoder_weights, required=args.cached_features == "require")
    data = LatentDataset(args.data_dir, args.resolution, args.num_classes, features=features,
                         with_images=needs_encoder(args) and not features, captions=args.model in MMDiT_models)
    space, resolution = read_space(data.vae_record, data.moments_shape, data.resolution, args.data_dir)
    for one in features:
        say(f"{one.record.enc_type} is not run: its features ({one.record.dtype}) are read from {one.store.path}")
    return data, space, resolution


def open_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate's view of this process. Raises UserError for a launcher whose processes do not see each other."""
    # Accumulation is written out in `train`: accelerate must not divide the loss again, whatever its own configuration.
    accelerator = Accelerator(mixed_precision=args.mixed_precision,
                              gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE),
                                               DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
                              log_with=None if args.report_to == "none" else args.report_to,
                              project_dir=str(Path(args.output_dir) / args.exp_name))
    require_joined(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        keep_memory()
    allow_tf32(args.allow_tf32)
    return accelerator


# What makes a run the same one. Every other setting may change on the way, and the change is printed.
SAME_RUN = ("method", "align", "model", "enc_type", "encoder_depth", "projector_dim", "qk_norm", "path_type",
            "weighting", "time_shift", "resolution", "num_classes", "text_length", "batch_size", "seed")


def require_same_run(path: Path, state: dict, settings: dict, space: LatentSpace, fingerprint: str,
                     encoders: list[str]) -> None:
    """Raise UserError if the checkpoint is of another model, data set or data order; print other changed settings.

    Encoders are known by their `encoder_ids`; in a checkpoint without them, by their names.
    """
    missing = checkpoint.RESUMED - state.keys()
    if missing:
        raise UserError(f"{path}: cannot be resumed without {', '.join(sorted(missing))}; start from its weights with "
                        f"--init-weights {path} and another --exp-name")
    LatentSpace.from_record(state["latent_space"]).require_same(space, f"the checkpoint {path}", "the data set")
    if state["data"] != fingerprint:
        raise UserError(f"{path}: trained on other files or labels than --data-dir {settings['data_dir']}; use its "
                        "data set, or another --exp-name")
    before = {"time_shift": 1.0, "processes": state.get("processes"), **state["args"]}
    if settings["init_weights"] not in (None, before.get("init_weights")):
        raise UserError(f"--init-weights {settings['init_weights']}: {path} has weights of its own; leave it "
                        "out, or use another --exp-name")
    for name in SAME_RUN:
        found, same = before.get(name), before.get(name) == settings[name]
        if name == "enc_type" and encoders and state.get("encoders"):
            found, same = f"other files of {found}" if same else found, same_encoders(state["encoders"], encoders)
        if not same:
            raise UserError(f"--{name.replace('_', '-')} {settings[name]}: {path} was trained with {found}; "
                            "keep it, or use another --exp-name")
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in settings.items() if before.get(name) != value]
    if changed:
        notice(f"resuming with changed settings: {', '.join(changed)}")


def open_encoders(args: argparse.Namespace, space: LatentSpace, resolution: int, device: torch.device | str,
                  pretrained: bool = True, features: Sequence[Features] = ()) -> list[AnyEncoder]:
    """The frozen encoders that the method needs, or their stored `features`; REG's must all have a class token."""
    if not needs_encoder(args):
        return []
    grid = resolution // space.downsampling // MODELS[args.model].keywords["patch_size"]
    if features:
        return load_cached(features, grid, class_tokens=args.method == "reg")
    return load_encoders(args.enc_type, device, resolution, pretrained, grid, args.encoder_weights,
                         class_tokens=args.method == "reg")


def open_codec(args: argparse.Namespace, space: LatentSpace, accelerator: Accelerator) -> Codec | None:
    """The decoder of grids (first process) and scores (all), or None.

    Raises UserError if it has another latent space.
    """
    if not (args.eval_steps or args.sampling_steps and accelerator.is_main_process):
        return None
    codec = load_codec(args.vae or space.decoder, accelerator.device)
    codec.use_space(space, "the data set")
    return codec


def open_scoring(args: argparse.Namespace, device: torch.device) -> tuple[ImageSet, Extractor] | None:
    """The reference and the feature network, checked against each other; None without --eval-steps."""
    if not args.eval_steps:
        return None
    reference = open_images(args.ref_batch, "--ref-batch")
    extractor = load_extractor(args.features, device, args.inception_weights)
    choose([metric_of(extractor)], reference, reference, extractor)   # in place of samples, which do not exist yet
    return reference, extractor


def open_conditions(args: argparse.Namespace, data: LatentDataset, resumed: tuple[Path, dict] | None,
                    device: torch.device) -> Conditions:
    """Class labels, or captions with their text encoder: that of the resumed checkpoint."""
    if args.model not in MMDiT_models:
        seen = tuple(data.classes_seen.tolist()) if len(data.classes_seen) < data.num_classes else None
        return ClassLabels(data.num_classes, seen=seen, device=device)
    path, state = resumed or (None, {})
    return open_captions(data.captions, args.text_encoder, args.text_length, device, state.get("text"), path)


def build_model(args: argparse.Namespace, space: LatentSpace, resolution: int, conditions: Conditions,
                encoders: Sequence[AnyEncoder]) -> Network:
    """SiT or MMDiT with the class-token slot and the projectors that the method needs."""
    own = (dict(context_dim=conditions.null_states.shape[-1]) if isinstance(conditions, Captions) else
           dict(num_classes=conditions.num_classes, class_dropout_prob=args.cfg_prob, fused_attn=args.fused_attn))
    return MODELS[args.model](
        input_size=resolution // space.downsampling,
        in_channels=space.channels,
        encoder_depth=args.encoder_depth,
        z_dims=tuple(encoder.embed_dim for encoder in encoders) if args.proj_coeff > 0 else (),
        projector_dim=args.projector_dim,
        cls_token_dim=encoders[0].embed_dim if args.method == "reg" else None,
        qk_norm=args.qk_norm,
        **own,
    )


def open_networks(args: argparse.Namespace, space: LatentSpace, resolution: int, conditions: Conditions,
                  encoders: Sequence, device: torch.device, processes: int = 1
                  ) -> tuple[Network, Network, SILoss, torch.optim.AdamW]:
    """The network, its EMA, the objective and AdamW, freshly initialised from --seed and compiled if asked.

    Raises UserError before anything is built if the networks and a process's images do not fit into the memory.
    """
    with torch.device("meta"):
        planned = build_model(args, space, resolution, conditions, encoders)
    pixels = 3 * resolution**2 * args.batch_size // (args.gradient_accumulation_steps * processes)        # bytes
    need, memory = pixels + BYTES_PER_PARAMETER * sum(p.numel() for p in planned.parameters()), memory_of(device)
    if need > memory:
        raise UserError(f"--model {args.model}, --projector-dim {args.projector_dim}, --batch-size {args.batch_size}, "
                        f"{conditions}: needs more than {as_size(need)} of the {as_size(memory)} there are; give "
                        "smaller ones")
    few = isinstance(conditions, ClassLabels) and conditions.num_classes < IMAGENET
    if few and args.num_classes is None and resolution in (256, 512):
        notice(f"the labels have {conditions}; the released programs would build {IMAGENET}, as "
               f"--num-classes {IMAGENET} does")
    reseed(args.seed)
    model = build_model(args, space, resolution, conditions, encoders).to(device)
    model.checkpointing = args.activation_checkpointing
    ema = deepcopy(model).eval().requires_grad_(False)
    networks = [model, *(one for one in encoders if isinstance(one, torch.nn.Module))]
    compiled = args.compile and all([compile_parts(network) for network in networks])
    aligned = args.align if args.method == "reg" and args.align else "all"  # without a slot there are only patches
    objective = SILoss(path_type=args.path_type, weighting=args.weighting, align=aligned, compile=compiled,
                       time_shift=shift_of(args, space, resolution))
    # Fused: one kernel for all parameters, which can skip an update without asking the host (`step_if`).
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                                  weight_decay=args.adam_weight_decay, fused=True)
    return model, ema, objective, optimizer


def hardware_of(device: torch.device) -> str:
    """The device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def memory_of(device: torch.device) -> int:
    """The bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def open_weights(args: argparse.Namespace, resumed: tuple[Path, dict] | None, model: Network, ema: Network,
                 optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler | None) -> int:
    """Load the resumed checkpoint, or --init-weights; return the step to go on from."""
    if resumed is not None:
        start = checkpoint.restore(*resumed, model, ema, optimizer, scaler)
        say(f"resumed {resumed[0]} at step {start}")
        return start
    if args.init_weights is not None:
        checkpoint.load_weights(model, args.init_weights, projectors=False)
        ema.load_state_dict(model.state_dict())
    return 0


def to_device(batches: Iterable[tuple], device: torch.device, encoders: int) -> Iterator[tuple]:
    """Batches on the device: what each of the encoders sees (images or its stored features), moments, and what the
    images show: labels (B,), or the captions of each image, which stay on the host.
    """

    def move(value):
        if isinstance(value, dict):
            return {part: move(tensor) for part, tensor in value.items()}
        return value.to(device, non_blocking=True)

    for images, moments, shown, *features in batches:
        seen = [move(one) for one in features] or [move(images)] * encoders
        yield seen, move(moments), move(shown) if isinstance(shown, torch.Tensor) else shown


# ------------------------------------------------------------------------------------------- what is due between steps

def schedule(run: disk.Run, args: argparse.Namespace, folder: Path, log: Log | None, capture: Callable[[int], dict],
             resolution: int, ema: Network, codec: Codec | None, scoring: tuple[ImageSet, Extractor] | None,
             conditions: Conditions, grid: Sampling, scored: Sampling,
             accelerator: Accelerator) -> Callable[[int], None]:
    """Enter into the run's table what is due after a step: log, save, draw a `grid`, score `scored` samples.

    Returns `close(step)`, which logs and saves what a signal has cut short.
    """
    done = dict.fromkeys(("logged", "saved"), run.step)

    def write_log(step: int) -> None:
        means, bad, in_a_row = run.meter.read(partial(accelerator.reduce, reduction="sum"), args.batch_size)
        done["logged"] = step
        line = {"step": step, **means, "lr": args.learning_rate, **peak_memory(accelerator.device)}
        if bad:
            line["not_finite"] = bad
        write_line(log, accelerator, line, SHOWN)
        if means["skipped_updates"]:
            notice(f"{means['skipped_updates']} update(s) skipped up to step {step}; not finite: {', '.join(bad)}")
        if in_a_row >= args.max_skipped_updates:
            save(step)
            raise UserError(f"--max-skipped-updates {args.max_skipped_updates}: {in_a_row} updates in a row skipped up "
                            f"to step {step}; resume an older checkpoint with a lower --learning-rate")

    def save(step: int) -> None:
        done["saved"] = step
        if accelerator.is_main_process:
            disk.save(folder, capture(step))
            # While updates are skipped, keep all: the older ones may be the last good ones.
            disk.prune(folder, 0 if run.meter.in_a_row else args.keep_last, args.keep_every)

    def draw(step: int) -> None:
        if accelerator.is_main_process:
            draw_grid(folder / "grids" / f"{step:07d}.png", ema, codec, grid, conditions, step, accelerator)
        accelerator.wait_for_everyone()

    @cache
    def measured():                                               # the reference, once per run
        return measure_reference(*scoring, [metric_of(scoring[1])], SCORED_BLOCK)

    def score(step: int) -> None:
        scores = score_samples(ema, codec, *scoring, measured(), args.eval_samples, resolution, scored, conditions)
        if scores:
            write_line(log, accelerator, {"step": step, **scores}, scores)

    def close(step: int) -> None:
        if step > done["logged"]:
            write_log(step)
        run.rescue(step)

    run.rescue = lambda step: save(step) if step > done["saved"] else None
    run.every((args.logging_steps, args.checkpointing_steps), write_log)  # a checkpoint holds no half log line
    run.every((args.checkpointing_steps,), save)
    run.every((args.sampling_steps,), draw, optional="--sampling-steps")
    run.every((args.eval_steps,), score, optional="--eval-steps")
    return close


def draw_grid(path: Path, ema: Network, codec: Codec, how: Sampling, conditions: Conditions, step: int,
              accelerator: Accelerator) -> None:
    """Write a grid of EMA samples with fixed labels or captions and noise, as PNG and to the tracker."""
    images, shown, _ = sample_images(ema, codec, range(GRID_IMAGES), how, conditions)
    grid = grid_of(images, round(GRID_IMAGES**0.5), shown if isinstance(conditions, Captions) else None)
    try:
        write_whole(path, lambda partial: grid.save(partial, "png"))
    except UserError as error:                                    # a full disk: the run goes on
        notice(f"warning: {error}")
    for tracker in list(accelerator.trackers):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        show = partial(tracker.log_images, {"samples": np.asarray(grid)[None]}, step=step, **layout)
        track(accelerator, show)


def score_samples(ema: Network, codec: Codec, reference: ImageSet, extractor: Extractor, measured: Measured, count: int,
                  resolution: int, how: Sampling, conditions: Conditions) -> dict[str, float]:
    """The Frechet distance of `count` EMA samples to the reference, on the first process; {} on others."""

    def blocks(ranges):
        for indices in ranges:
            yield sample_images(ema, codec, indices, how, conditions)[0].permute(0, 2, 3, 1).numpy()  # (n, R, R, 3)

    samples = ImageSet("EMA samples", count, (resolution, resolution), blocks)
    result = evaluate(reference, samples, extractor, [metric_of(extractor)], batch_size=SCORED_BLOCK,
                      measured_ref=measured)
    return {} if result is None else {score_name(extractor.key, count): result[extractor.key]}


def metric_of(extractor: Extractor) -> str:
    """A Frechet distance is called FID in Inception's features only."""
    return "fid" if extractor.is_inception else "fd"


def score_name(key: str, count: int) -> str:
    """A distance with its number of samples, since it compares at equal numbers only: fid_10k."""
    return f"{key}_{count // 1000}k" if count % 1000 == 0 else f"{key}_{count}"


# -------------------------------------------------------------------------------------------------------------- dry run

def dry_run(args: argparse.Namespace) -> None:
    """Print the resolved configuration, parameter counts and GFLOPs of one forward pass, without touching a weight."""
    if Path(args.data_dir).exists():
        data, space, resolution = open_data(args)
        num_classes = data.num_classes
    else:
        space, resolution, num_classes = LatentSpace(), args.resolution or 256, args.num_classes or IMAGENET
        cut = space.downsampling * MODELS[args.model].keywords["patch_size"]
        if resolution % cut:
            raise UserError(f"--resolution {resolution}: expected a multiple of {cut}, {space.downsampling} pixels of "
                            f"the VAE times the patch of {args.model}")
        notice(f"{args.data_dir} does not exist: described for ImageNet at {resolution} px")
    with torch.device("meta"):
        if args.model in MMDiT_models:
            conditions = Captions((), None, torch.empty(states_shape(args.text_encoder, args.text_length)[1:]))
        else:
            conditions = ClassLabels(num_classes, device="meta")
        encoders = open_encoders(args, space, resolution, "meta", pretrained=False)
        model = build_model(args, space, resolution, conditions, encoders)
        latents = torch.zeros(1, model.in_channels, model.input_size, model.input_size)
        cls_token = None if model.cls_token_dim is None else torch.zeros(1, model.cls_token_dim)
        with FlopCounterMode(display=False) as flops:
            model(latents, torch.zeros(1), conditions.null(1), cls_token)
    parameters = sum(p.numel() for p in model.parameters())
    at_inference = parameters - sum(p.numel() for p in model.projectors.parameters())
    settings = {**vars(args), "resolution": resolution, "time_shift": shift_of(args, space, resolution),
                "num_classes": None if args.model in MMDiT_models else num_classes, "latent_space": space.to_record()}
    say(json.dumps(settings, indent=2))
    say(f"{args.model}, {args.method}: {parameters / 1e6:.3f}M parameters ({at_inference / 1e6:.3f}M without "
        f"projectors), {flops.get_total_flops() / 1e9:.2f} GFLOPs forward for one image "
        f"({flops.get_total_flops() / 2e9:.2f} GMAC)")


if __name__ == "__main__":
    main()
