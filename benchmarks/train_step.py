"""One training step: `python -m benchmarks.train_step [--baseline]`.

The step is train.py's own: moments and uint8 images to the device, frozen encoder, objective, backward pass, clipping, AdamW, EMA. The data
are random and the encoder has random weights; neither changes the time. The plain way is benchmarks/plain.py.
"""

import argparse
import resource
from collections.abc import Callable
from copy import deepcopy
from statistics import median

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
from models.compiling import compile_blocks, compiler_works
from models.encoders import Encoder
from models.errors import UserError, notice, without_traceback
from models.sit import SiT_models
from models.vae import LatentSpace

CLASSES = 1000
PIECE = 64                   # images in memory at a time in the plain way, whose float32 takes 0.63 GiB for each of XL's
MEMORY = 141e9               # bytes of the GPU whose batch-size ceiling is computed: an H200's
ALIGNED = (256, 257, 768)    # batch, tokens and encoder width of the alignment that is timed alone


def parse_args(argv=None) -> argparse.Namespace:
    flags = parser("Time one training step, and its alignment and update alone.")
    flag = argparse.BooleanOptionalAction
    flags.add_argument("--model", type=str, default=None, metavar="LIST", help="None: SiT-XL/2,SiT-B/2 on CUDA, SiT-B/2 on a CPU")
    flags.add_argument("--resolution", type=int, default=256, metavar="PIXELS")
    flags.add_argument("--batch-size", type=int, default=None, metavar="IMAGES", help="None: 256 on CUDA, 8 on a CPU")
    flags.add_argument("--enc-type", type=str, default="dinov2-vit-b", metavar="NAME", help="its weights are random")
    flags.add_argument("--encoder", choices=("online", "cached"), default="online", help="cached: features come with the batch")
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


def random_batch(settings: argparse.Namespace, space: LatentSpace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """images uint8 (B, 3, R, R), moments (B, 2C, H, W), labels (B,) as the loader gives them: on the host, pinned where there is a GPU."""
    count, side = settings.batch_size, settings.resolution // space.downsampling
    batch = (torch.randint(0, 256, (count, 3, settings.resolution, settings.resolution), dtype=torch.uint8),
             torch.rand(count, 2 * space.channels, side, side), torch.randint(0, CLASSES, (count,)))
    return tuple(part.pin_memory() for part in batch) if torch.cuda.is_available() else batch


def build(settings: argparse.Namespace, device: torch.device) -> tuple[LatentSpace, list[Encoder], torch.nn.Module]:
    space = LatentSpace()
    encoders = train.open_encoders(settings, space, device, pretrained=False)
    return space, encoders, train.build_model(settings, space, encoders).to(device).train()


def open_accelerator(settings: argparse.Namespace) -> Accelerator:
    AcceleratorState._reset_state()                               # one process times several precisions
    return train.open_accelerator(settings)


def fast_step(settings: argparse.Namespace, device: torch.device, cached: bool) -> Callable[[], object]:
    """train.py's step on one batch, as a function without arguments."""
    space, encoders, model = build(settings, device)
    accelerator = open_accelerator(settings)
    model.checkpointing = settings.activation_checkpointing
    ema = deepcopy(model).eval().requires_grad_(False)
    if settings.compile:
        settings.compile = all([compile_blocks(network) for network in (model, *(encoder.model for encoder in encoders))])
    optimizer = train.open_optimizer(model, settings)
    objective = SILoss(align=settings.align, compile=settings.compile)
    prepared = accelerator.prepare(model)
    images, moments, labels = random_batch(settings, space)
    kept = train.prepare_batch(images, moments, labels, space, encoders, settings, accelerator) if cached else {}

    def run() -> None:
        batch = {**train.prepare_batch(images, moments, labels, space, [] if cached else encoders, settings, accelerator),
                 **{name: kept[name] for name in ("cls_token", "zs") if cached}}
        train.backward(accelerator, prepared, objective, batch, settings, last=True)
        train.update(model, ema, optimizer, accelerator.scaler, settings)

    return run


def plain_step(settings: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """The plain way's step, float32, with the encoder; large batches in pieces, since they do not fit a GPU so."""
    space, encoders, model = build(settings, device)
    ema = deepcopy(model).eval().requires_grad_(False)
    optimizer = plain.adamw(model, settings)
    objective = plain.objective(align=settings.align)
    images, moments, labels = random_batch(settings, space)

    def batches():
        for piece in zip(images.split(PIECE), moments.split(PIECE), labels.split(PIECE), strict=True):
            pixels, mean_and_std, y = (part.to(device) for part in piece)
            (class_token, features), = [encoder.features(pixels, with_class_token=True) for encoder in encoders]
            mean, _ = mean_and_std.chunk(2, dim=1)
            latents = space.latents(mean_and_std, torch.randn_like(mean))
            yield dict(images=latents, model_kwargs=dict(y=y), cls_token=class_token, zs=[features])

    def run() -> None:
        plain.step(model, ema, optimizer, objective, batches(), settings)

    return run


def flops_per_image(settings: argparse.Namespace, cached: bool) -> float:
    """Of one image's forward and backward pass, with the encoder's forward unless its features are cached; counted on meta tensors."""
    with torch.device("meta"):
        space, encoders, model = build(settings, torch.device("meta"))
        model.checkpointing = False                               # what is computed twice is not useful work
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
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ways = {"fast": fast_step(settings, device, cached)}
        ways["fast"]()
        memory = peak_memory(device)                              # before anything else takes some
        if args.baseline:
            ways["plain"] = plain_step(settings, device)
        seconds = timed(ways, device, args.warmup, args.repeats)
        profile(ways["fast"], args.profile, device)
        flops = flops_per_image(settings, cached)
        peak, source = matmul_peak(device, {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
        name = f"{args.model}, {'float32' if precision == 'no' else precision}{', compiled' if settings.compile else ''}"
        rate = {way: args.batch_size / median(found) for way, found in seconds.items()}
        rows.append(Row(name, rate["fast"], "images/s", peak / flops, f"{source} / {flops / 1e9:.1f} GFLOP per image",
                        rate.get("plain"), ratio(seconds["fast"], seconds["plain"]) if args.baseline else None))
        if device.type == "cuda" or not settings.compile:         # on a CPU operators are counted, as they run without the compiler
            rows.append(Row(f"{name}: launches", count_launches(ways["fast"], device), "",
                            baseline=count_launches(ways["plain"], device) if args.baseline else None))
        rows.append(Row(f"{name}: peak memory of {'the first step' if device.type == 'cuda' else 'this process so far'}", memory, "GiB"))
        rows.append(memory_row(name, settings, device))
    return rows


def kept_bytes(settings: argparse.Namespace, device: torch.device, images: int) -> tuple[int, int]:
    """What the eager forward pass of so many images keeps for the backward pass, beside the weights; bytes of the states of training."""
    settings = argparse.Namespace(**{**vars(settings), "batch_size": images})
    space, encoders, model = build(settings, device)
    model.checkpointing = settings.activation_checkpointing
    accelerator = open_accelerator(settings)
    batch = train.prepare_batch(*random_batch(settings, space), space, encoders, settings, accelerator)
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


def memory_row(name: str, settings: argparse.Namespace, device: torch.device) -> Row:
    """Memory that each image of a batch takes, and how many images a GPU's memory would hold by that; computed, not tried."""
    (two, states), (four, _) = (kept_bytes(settings, device, images) for images in (2, 4))
    each = (four - two) / 2                                       # what does not grow with the batch is the weights in bf16
    fixed = states + two - 2 * each
    return Row(f"{name}: kept per image, eager", each / 2**30, "GiB",
               formula=f"at most {(MEMORY - fixed) / each:.0f} images beside {fixed / 1e9:.1f} GB of states in {MEMORY / 1e9:.0f} GB")


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
    seconds = timed(ways, device, args.warmup, args.repeats)
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

    seconds = timed({"fast": fast, "plain": slow} if args.baseline else {"fast": fast}, device, args.warmup, args.repeats)
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
    args.batch_size = (256 if on_gpu else 8) if args.batch_size is None else args.batch_size
    args.precisions = args.precisions or ("bf16" if on_gpu else "no,bf16" if precision_that_suits(device) == "bf16" else "no")
    args.compile = on_gpu if args.compile is None else args.compile
    for flag, known in (("model", tuple(SiT_models)), ("precisions", ("no", "bf16", "fp16"))):
        unknown = set(getattr(args, flag).split(",")) - set(known)
        if unknown:
            raise UserError(f"--{flag} names {', '.join(sorted(unknown))}: give a list of {', '.join(known)}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}: give at least 1")
    step = 8 * max(SiT_models[name].keywords["patch_size"] for name in args.model.split(","))
    if args.resolution < step or args.resolution % step:
        raise UserError(f"--resolution is {args.resolution}: give a multiple of {step}, the VAE's 8 pixels times the patch")
    if args.baseline and args.encoder == "cached":
        notice("the plain way runs its encoder: the ratio holds the gain of cached features, too")
    rows = []
    for name in args.model.split(","):
        one = argparse.Namespace(**{**vars(args), "model": name})
        rows += [*step_rows(one, device), update_row(one, device)]
    rows += alignment_rows(args, device)
    settings = ("model", "resolution", "batch_size", "encoder", "enc_type", "compile", "activation_checkpointing", "repeats")
    report("train_step", rows, {name: getattr(args, name) for name in settings}, device, args.output)


if __name__ == "__main__":
    main()
