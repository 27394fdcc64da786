"""One training step: `python -m benchmarks.train_step [--baseline]`.

The step is train.py's own: moments and uint8 images, or stored features, to the device, frozen encoder, objective, backward pass,
clipping, AdamW, EMA, metering. The data are random and the encoder has random weights; neither changes the time. The plain way is
benchmarks/plain.py.
"""

import argparse
import gc
import os
import resource
from collections.abc import Callable
from copy import deepcopy
from statistics import median
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

import loss
import train
from benchmarks import plain
from benchmarks.harness import (
    Row,
    bandwidth,
    count_launches,
    matmul_peak,
    open_device,
    parser,
    precision_that_suits,
    profile,
    ratio,
    report,
    timed,
)
from loss import SILoss
from models.cached_features import pack
from models.encoders import CachedEncoder, Encoder
from models.sit import SiT_models
from models.vae import LatentSpace
from preprocessing.encode_features import describe
from runtime.log import Meter, Skips
from runtime.messages import UserError, notice, without_traceback
from runtime.speed import compile_parts, compiler_works, float32_arithmetic

CLASSES = 1000
PIECE = 32                   # images in memory at a time in the plain way, whose float32 takes 0.63 GiB for each of XL's
MEMORY = 141e9               # bytes of an H200, whose batch-size ceiling is computed where there is no GPU
OFTENER = 5                  # runs of the alignment and of the update for each of the step, which takes as long as ten of them
ALIGNED = (256, 257, 768)    # batch, tokens and encoder width of the alignment that is timed alone


def parse_args(argv=None) -> argparse.Namespace:
    flags = parser("Time one training step, and its alignment and update alone.")
    flag = argparse.BooleanOptionalAction
    flags.add_argument("--model", type=str, default=None, metavar="LIST", help="None: SiT-XL/2,SiT-B/2 on CUDA, SiT-B/2 on a CPU")
    flags.add_argument("--resolution", type=int, default=256, metavar="PIXELS")
    flags.add_argument("--batch-size", type=int, default=None, metavar="IMAGES",
                       help="None: 8 on a CPU; on CUDA 256, or the half, the quarter ... that fits its memory")
    flags.add_argument("--enc-type", type=str, default="dinov2-vit-b", metavar="NAME", help="its weights are random")
    flags.add_argument("--encoder", choices=("online", "cached"), default="online", help="cached: stored features come with the batch")
    flags.add_argument("--precisions", type=str, default=None, metavar="LIST",
                       help="of no, bf16, fp16; None: bf16 on CUDA, no on a CPU, and bf16 where it has instructions for it")
    flags.add_argument("--compile", action=flag, default=None, help="None: on CUDA")
    flags.add_argument("--activation-checkpointing", action=flag, default=False)
    return flags.parse_args(argv)


def settings_of(args: argparse.Namespace, precision: str) -> argparse.Namespace:
    """train.py's own settings for this step."""
    flags = ["--model", args.model, "--enc-type", args.enc_type, "--batch-size", str(args.batch_size), "--mixed-precision", precision,
             "--resolution", str(args.resolution), "--num-classes", str(CLASSES), "--compile" if args.compile else "--no-compile"]
    if args.activation_checkpointing:
        flags.append("--activation-checkpointing")
    return train.resolve(train.parse_args(flags))


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As the loader gives it: on the host, ready to be copied to a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def random_batch(settings: argparse.Namespace, space: LatentSpace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """images uint8 (B, 3, R, R), moments (B, 2C, H, W), labels (B,) as the loader gives them."""
    count, side = settings.batch_size, settings.resolution // space.downsampling
    batch = (torch.randint(0, 256, (count, 3, settings.resolution, settings.resolution), dtype=torch.uint8),
             torch.rand(count, 2 * space.channels, side, side), torch.randint(0, CLASSES, (count,)))
    return tuple(pinned(part, device) for part in batch)


def random_features(settings: argparse.Namespace, device: torch.device) -> tuple[CachedEncoder, dict[str, torch.Tensor]]:
    """What stands in the encoder's place, and stored features of a batch as the loader gives them."""
    record = describe(settings.enc_type, None, settings.resolution, "float16")
    count, tokens = settings.batch_size, record.grid**2
    stored = pack(torch.randn(count, record.width), torch.randn(count, tokens, record.width), record.dtype)
    encoder = CachedEncoder(record, settings.resolution // LatentSpace().downsampling // SiT_models[settings.model].keywords["patch_size"])
    return encoder, {part: pinned(torch.from_numpy(stored[part].copy()), device) for part in stored.dtype.names}


def build(settings: argparse.Namespace, device: torch.device) -> tuple[LatentSpace, list[Encoder], torch.nn.Module]:
    """With random weights that are drawn on the device: a CPU takes seconds for those of XL."""
    space = LatentSpace()
    with device:
        encoders = train.open_encoders(settings, space, device, pretrained=False)
        return space, encoders, train.build_model(settings, space, encoders).train()


def open_accelerator(settings: argparse.Namespace, device: torch.device) -> Accelerator:
    AcceleratorState._reset_state()                               # one process times several precisions
    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"} if device.type == "cpu" else {}):
        return train.open_accelerator(settings)


def fast_step(settings: argparse.Namespace, device: torch.device, cached: bool) -> Callable[[], object]:
    """train.py's step on one batch, as a function without arguments."""
    space, encoders, model = build(settings, device)
    accelerator = open_accelerator(settings, device)
    meter, skips = Meter(), Skips(settings.max_skipped_updates)
    model.checkpointing = settings.activation_checkpointing
    ema = deepcopy(model).eval().requires_grad_(False)
    if settings.compile:
        settings.compile = all([compile_parts(network) for network in (model, *([] if cached else encoders))])
    optimizer = train.open_optimizer(model, settings)
    objective = SILoss(align=settings.align, compile=settings.compile)
    prepared = accelerator.prepare(model)
    images, moments, labels = random_batch(settings, space, device)
    features = []
    if cached:
        encoder, stored = random_features(settings, device)
        images, encoders, features = torch.zeros(settings.batch_size, 0, dtype=torch.uint8), [encoder], [stored]

    def run() -> None:
        train.reseed(settings.seed, 0, 0, 0)
        batch = train.prepare_batch(images, moments, labels, space, encoders, settings, accelerator, features)
        terms, total = train.backward(accelerator, prepared, objective, batch, settings, last=True)
        train.add_terms(meter, terms, total)
        grad_norm = train.update(model, ema, optimizer, accelerator.scaler, settings)
        meter.add("grad_norm", grad_norm)
        skips.note(train.named([terms], grad_norm))

    return run


def plain_step(settings: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """The plain way's step, float32, with the encoder; large batches in pieces, since they do not fit a GPU so."""
    space, encoders, model = build(settings, device)
    ema = deepcopy(model).eval().requires_grad_(False)
    optimizer = plain.adamw(model, settings)
    objective = plain.objective(align=settings.align)
    images, moments, labels = random_batch(settings, space, device)

    def batches():
        for piece in zip(images.split(PIECE), moments.split(PIECE), labels.split(PIECE), strict=True):
            pixels, mean_and_std, y = (part.to(device) for part in piece)
            (class_token, features), = [encoder.features(pixels, with_class_token=True) for encoder in encoders]
            mean, _ = mean_and_std.chunk(2, dim=1)
            latents = space.latents(mean_and_std, torch.randn_like(mean))
            yield dict(images=latents, model_kwargs=dict(y=y), cls_token=class_token, zs=[features])

    def run() -> None:
        with float32_arithmetic():                                # train.py's settings would give it TF32
            plain.step(model, ema, optimizer, objective, batches(), settings)

    return run


def flops_per_image(settings: argparse.Namespace, cached: bool) -> float:
    """Of one image's forward and backward pass, with the encoder's forward unless its features are cached; counted on meta tensors."""
    space, encoders, model = build(settings, torch.device("meta"))
    model.checkpointing = False                                   # what is computed twice is not useful work
    with torch.device("meta"):
        mean = torch.zeros(1, space.channels, model.input_size, model.input_size)
        class_token, features = torch.zeros(1, encoders[0].embed_dim), torch.zeros(1, model.pos_embed.shape[1], encoders[0].embed_dim)
        with FlopCounterMode(display=False) as flops:
            if not cached:
                encoders[0].model.forward_features(torch.zeros(1, 3, encoders[0].input_size, encoders[0].input_size))
            terms = SILoss()(model, mean, dict(y=torch.zeros(1, dtype=torch.long)), zs=[features], cls_token=class_token,
                             time_input=torch.zeros(1), noises=mean, cls_noises=class_token)
            train.total_loss(terms, settings).backward()
    return flops.get_total_flops()


# ------------------------------------------------------------------------------------------------------------------------ the rows

def step_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Images/s of the whole step of one model, for each precision; its launches and memory."""
    rows, cached = [], args.encoder == "cached"
    for precision in args.precisions.split(","):
        settings = settings_of(args, precision)
        name = f"{args.model}, batch {args.batch_size}, {'float32' if precision == 'no' else precision}"
        if device.type == "cuda":
            gc.collect()                                          # accelerate's wrapped forward holds the model before in a circle
            torch.cuda.reset_peak_memory_stats(device)
        ways = {"fast": fast_step(settings, device, cached)}
        ways["fast"]()
        memory = peak_memory(device)                              # before anything else takes some
        if args.baseline:
            ways["plain"] = plain_step(settings, device)
        seconds = timed(ways, device, args.warmup, args.repeats)
        profile(ways["fast"], args.profile and args.profile / f"{args.model.replace('/', '-')}-{precision}", device)
        flops = flops_per_image(settings, cached)
        peak, source = matmul_peak(device, {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
        name += ", compiled" * settings.compile
        rate = {way: args.batch_size / median(found) for way, found in seconds.items()}
        rows.append(Row(name, rate["fast"], "images/s", peak / flops, f"{source} / {flops / 1e9:.1f} GFLOP per image",
                        rate.get("plain"), ratio(seconds["fast"], seconds["plain"]) if args.baseline else None))
        if device.type == "cuda" or not settings.compile:         # on a CPU operators are counted, as they run without the compiler
            pieces = -(-args.batch_size // PIECE)
            rows.append(Row(f"{name}: launches", count_launches(ways["fast"], device), "",
                            formula=f"the plain way's in {pieces} pieces" if args.baseline and pieces > 1 else "",
                            baseline=count_launches(ways["plain"], device) if args.baseline else None))
        rows.append(Row(f"{name}: peak memory of {'the first step' if device.type == 'cuda' else 'this process so far'}", memory, "GiB"))
        rows.append(memory_row(name, settings, device))
    return rows


def kept_bytes(settings: argparse.Namespace, device: torch.device, images: int) -> tuple[int, int]:
    """What the eager forward pass of so many images keeps for the backward pass, beside the weights; bytes of the states of training."""
    settings = argparse.Namespace(**{**vars(settings), "batch_size": images})
    space, encoders, model = build(settings, device)
    model.checkpointing = settings.activation_checkpointing
    accelerator = open_accelerator(settings, device)
    batch = train.prepare_batch(*random_batch(settings, space, device), space, encoders, settings, accelerator)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage                    # held, so that no place is used twice
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved), accelerator.autocast():
        terms = SILoss(align=settings.align)(model, **batch)
    assert terms.denoising.requires_grad
    states = 20 * sum(p.numel() for p in model.parameters()) + 4 * sum(p.numel() for encoder in encoders for p in encoder.parameters())
    return sum(storage.nbytes() for storage in kept.values()), states


def memory_of(settings: argparse.Namespace, device: torch.device) -> tuple[float, float, float]:
    """Bytes that each image of a batch takes in the eager step, bytes of the rest, and bytes of the GPU; computed, not tried."""
    (two, states), (four, _) = (kept_bytes(settings, device, images) for images in (2, 4))
    each = (four - two) / 2                                       # what does not grow with the batch is the weights in bf16
    return each, states + two - 2 * each, torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else MEMORY


def memory_row(name: str, settings: argparse.Namespace, device: torch.device) -> Row:
    """Memory that each image of a batch takes, and how many images a GPU's memory would hold by that."""
    each, fixed, memory = memory_of(settings, device)
    return Row(f"{name}: kept per image, eager", each / 2**30, "GiB",
               formula=f"at most {(memory - fixed) / each:.0f} images beside {fixed / 1e9:.1f} GB of states in {memory / 1e9:.0f} GB")


def fitting_batch(args: argparse.Namespace, device: torch.device) -> int:
    """256 images or the half, the quarter ... that fits the GPU in eager mode, twice the states beside them if there is a plain way."""
    if device.type == "cpu":
        return 8
    precision = args.precisions.split(",")[0]
    each, fixed, memory = memory_of(settings_of(argparse.Namespace(**{**vars(args), "batch_size": 4}), precision), device)
    sizes = [256 >> halvings for halvings in range(8)]
    return next((size for size in sizes if size * each + (1 + args.baseline) * fixed < 0.9 * memory), 1)


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU as PyTorch counts it since the count was reset, else of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def alignment_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Where there is a compiler: forward and backward of the alignment loss at batch 256, compiled, against the loop over samples."""
    if not compiler_works(device.type):
        return []
    projected, target = torch.randn(ALIGNED, device=device, requires_grad=True), torch.randn(ALIGNED, device=device)
    compiled = torch.compile(loss.alignment_loss, dynamic=False)

    def both_passes(function: Callable) -> Callable[[], None]:
        def run() -> None:
            projected.grad = None
            function([projected], [target]).backward()
        return run

    ways = {"fast": both_passes(compiled), "plain": both_passes(plain.alignment_loss)} if args.baseline else {"fast": both_passes(compiled)}
    seconds = timed(ways, device, args.warmup, args.repeats * OFTENER)
    moved, (speed, source) = 5 * projected.numel() * 4, bandwidth(device)
    return [Row(f"alignment loss, batch {ALIGNED[0]}, compiled", median(seconds["fast"]), "s", moved / speed,
                f"{moved / 1e9:.2f} GB (two tensors read twice, one written) / {source}", *compared(seconds))]


def update_row(args: argparse.Namespace, device: torch.device) -> Row:
    """Fused AdamW and EMA of one model in one pass each, against one parameter at a time."""
    settings = settings_of(args, "no")
    _, _, model = build(settings, device)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4) if parameter.requires_grad else None
    ema, taken = deepcopy(model).requires_grad_(False), torch.ones((), device=device)
    fused, looped = train.open_optimizer(model, settings), plain.adamw(model, settings)

    def fast() -> None:
        fused.step()
        train.update_ema(ema, model, settings.ema_decay, taken)

    def slow() -> None:
        looped.step()
        plain.update_ema(ema, model, settings.ema_decay)

    seconds = timed({"fast": fast, "plain": slow} if args.baseline else {"fast": fast}, device, args.warmup, args.repeats * OFTENER)
    moved, (speed, source) = 10 * 4 * sum(p.numel() for p in model.parameters()), bandwidth(device)
    return Row(f"{args.model}, AdamW and EMA", median(seconds["fast"]), "s", moved / speed,
               f"{moved / 1e9:.2f} GB (7 passes over the parameters for AdamW, 3 for EMA) / {source}", *compared(seconds))


def compared(seconds: dict[str, list[float]]) -> tuple[float | None, float | None]:
    """A row's last two fields: the plain way's median, and the ratio to it."""
    if "plain" not in seconds:
        return None, None
    return median(seconds["plain"]), ratio(seconds["fast"], seconds["plain"])


@without_traceback
def main(argv=None) -> None:
    args = parse_args(argv)
    device = open_device(args)
    on_gpu = device.type == "cuda"
    args.model = args.model or ("SiT-XL/2,SiT-B/2" if on_gpu else "SiT-B/2")
    args.precisions = args.precisions or ("bf16" if on_gpu else "no,bf16" if precision_that_suits(device) == "bf16" else "no")
    args.compile = on_gpu if args.compile is None else args.compile
    for flag, known in (("model", tuple(SiT_models)), ("precisions", ("no", "bf16", "fp16"))):
        unknown = set(getattr(args, flag).split(",")) - set(known)
        if unknown:
            raise UserError(f"--{flag} names {', '.join(map(repr, sorted(unknown)))}: give a list of {','.join(known)}, without spaces")
    if "fp16" in args.precisions.split(",") and not on_gpu:
        raise UserError("--precisions names fp16, which needs a CUDA device: give a list of no and bf16")
    if "," in args.enc_type:
        raise UserError(f"--enc-type {args.enc_type} names several encoders: give one")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: give at least 1")
    step = 8 * max(SiT_models[name].keywords["patch_size"] for name in args.model.split(","))
    if args.resolution < step or args.resolution % step:
        raise UserError(f"--resolution is {args.resolution}: give a multiple of {step}, the VAE's 8 pixels times the patch")
    if args.baseline and args.encoder == "cached":
        notice("the plain way runs its encoder: the ratio holds the gain of cached features, too")
    rows = []
    for name in args.model.split(","):
        one = argparse.Namespace(**{**vars(args), "model": name})
        try:
            one.batch_size = args.batch_size or fitting_batch(one, device)
            rows += step_rows(one, device)
            rows.append(update_row(one, device))
        except torch.OutOfMemoryError as error:
            notice(f"{name} is left out: {str(error).splitlines()[0]} Give a smaller --batch-size")
    rows += alignment_rows(args, device)
    settings = ("resolution", "encoder", "enc_type", "compile", "activation_checkpointing", "repeats")
    report("train_step", rows, {name: getattr(args, name) for name in settings}, device, args.output)


if __name__ == "__main__":
    main()
