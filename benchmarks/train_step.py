"""One training step: `python -m benchmarks.train_step [--model LIST] [--profile DIR]`.

The step is that of `train.train`, with random images, moments and weights, which do not change the time: copies to the
device, frozen encoder, objective, backward pass, clipping, AdamW, EMA, metering. The plain way is benchmarks/plain.py.
"""

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import repeat
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import loss
import train
from benchmarks import harness, plain
from models.conditioning import ClassLabels
from models.sit import SiT_models
from models.vae import LatentSpace
from runtime.arguments import Parser, at_least
from runtime.log import Meter, peak_memory
from runtime.messages import UserError, without_traceback
from runtime.speed import float32_arithmetic

CLASSES = 1000
PIECE = 32                   # images at a time in the plain way, whose float32 takes 0.63 GiB for each of XL/2's
SPACE = LatentSpace()
SIZES = {"cuda": {"model": "SiT-XL/2,SiT-B/2", "batch_size": 256, "compile": True},
         "cpu": {"model": "SiT-B/2", "batch_size": 8, "compile": False}}


class Steps:
    """Stands in for runtime.run.Run: lets `train.train` take steps that are timed in turn with the plain way."""

    def __init__(self, turns: harness.Turns, open_plain: Callable[[], Callable], folder: Path | None):
        self.turns, self.open_plain, self.folder, self.meter = turns, open_plain, folder, Meter()
        self.memory: dict[str, float] = {}

    def steps(self) -> Iterator[int]:
        plain_step = None
        for way in self.turns:
            if way == "ours":
                yield 1                                           # the body of train.train runs here
                continue
            if plain_step is None:                                # in the warm-up, after our own peak of memory
                self.memory, plain_step = peak_memory(self.turns.device), self.open_plain()
            plain_step()
        if self.folder is not None:
            with harness.profile(self.folder, self.turns.device):
                yield 1

    def after(self, step: int) -> None:
        """Nothing is due."""


def random_batch(count: int, resolution: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """images uint8 (B, 3, R, R), moments (B, 2C, H, W), labels (B,) on the host, as the loader gives them."""
    side = resolution // SPACE.downsampling
    batch = (torch.randint(0, 256, (count, 3, resolution, resolution), dtype=torch.uint8),
             torch.rand(count, 2 * SPACE.channels, side, side), torch.randint(0, CLASSES, (count,)))
    return tuple(part.pin_memory() if device.type == "cuda" else part for part in batch)


def open_accelerator(settings: argparse.Namespace, device: torch.device) -> Accelerator:
    AcceleratorState._reset_state()                               # one process times several precisions
    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"} if device.type == "cpu" else {}):
        return train.open_accelerator(settings)


def open_plain(settings: argparse.Namespace, resolution: int, batch: tuple, device: torch.device) -> Callable:
    """Return the plain way's step as a function; large batches go in pieces, to fit a GPU in float32."""
    with device:
        encoders = train.open_encoders(settings, SPACE, resolution, device, pretrained=False)
        model = train.build_model(settings, SPACE, resolution, ClassLabels(CLASSES), encoders).train()
    ema, optimizer = deepcopy(model).eval().requires_grad_(False), plain.adamw(model, settings)
    objective = plain.objective(align=settings.align)

    def pieces():
        for piece in zip(*(part.split(PIECE) for part in batch), strict=True):
            images, moments, labels = (part.to(device) for part in piece)
            with torch.no_grad():
                cls_token, targets = train.encode(encoders, [images], True)
            yield dict(images=SPACE.sample(moments), model_kwargs=dict(y=labels), cls_token=cls_token, zs=targets)

    def run() -> None:
        with float32_arithmetic():
            plain.step(model, ema, optimizer, objective, pieces(), settings)

    return run


def flops_per_image(settings: argparse.Namespace, resolution: int) -> int:
    """Forward and backward pass of one image, with the encoder's forward pass."""
    with torch.device("meta"):
        encoders = train.open_encoders(settings, SPACE, resolution, "meta", pretrained=False)
        model = train.build_model(settings, SPACE, resolution, ClassLabels(CLASSES), encoders).train()
        latents = torch.zeros(1, SPACE.channels, model.input_size, model.input_size)
        image = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8)

        def run() -> None:
            with torch.no_grad():
                cls_token, targets = train.encode(encoders, [image], True)
            terms = loss.SILoss()(model, latents, dict(y=torch.zeros(1, dtype=torch.long)), targets, cls_token,
                                  time_input=torch.zeros(1), noises=latents, cls_noises=cls_token)
            loss.weighted(terms, beta=settings.cls, lam=settings.proj_coeff).backward()

        return harness.flops(run)


def step_rows(table: harness.Table, settings: argparse.Namespace, resolution: int, repeats: int, profile: Path | None,
              device: torch.device) -> None:
    """The whole step with train.py's `settings`, and its memory on a GPU."""
    batch = random_batch(settings.batch_size, resolution, device)
    gc.collect()                                                  # a network before, which accelerate holds in a cycle
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    accelerator = open_accelerator(settings, device)
    with device:
        encoders = train.open_encoders(settings, SPACE, resolution, device, pretrained=False)
        labels = ClassLabels(CLASSES, device=device)
        networks = train.open_networks(settings, SPACE, resolution, labels, encoders, device)
    steps = Steps(harness.Turns(["ours", "plain"], device, repeats),
                  partial(open_plain, settings, resolution, batch, device), profile)
    train.train(settings, steps, train.to_device(repeat(batch), device, 1), SPACE, encoders, labels, *networks,
                accelerator)

    each = flops_per_image(settings, resolution)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision]
    peak, source = harness.matmul_peak(device, dtype)
    name = f"{settings.model}, batch {settings.batch_size}, {str(dtype).removeprefix('torch.')}"
    formula = f"{source} / {each / 1e9:.4g} GFLOP"
    table.add(name, steps.turns.seconds, settings.batch_size, "images/s", peak / each, formula)
    memory = steps.memory or peak_memory(device)                  # {} on a CPU; the plain way may not have run
    if memory:
        table.add(f"{name}: peak memory", {"ours": [memory["peak_memory_gib"]]}, unit="GiB")


def measure(device: torch.device, model: str, batch_size: int, compile: bool, resolution: int = 256,
            enc_type: str = "dinov2-vit-b", precision: str | None = None, activation_checkpointing: bool = False,
            repeats: int = 5, profile: Path | None = None) -> harness.Table:
    """The table for the models in the comma-separated list `model`; `precision` None: bf16 where it is fast."""
    precision = precision or ("bf16" if harness.has_fast_bf16(device) else "no")
    fixed = {"enc_type": enc_type, "batch_size": batch_size, "mixed_precision": precision, "compile": compile,
             "activation_checkpointing": activation_checkpointing}
    table = harness.Table("train_step", {"resolution": resolution, **fixed}, device)
    for name in model.split(","):
        if name not in SiT_models:
            raise UserError(f"--model {model}: {name!r} is unknown; expected some of {', '.join(SiT_models)}")
        settings = argparse.Namespace(**{**vars(train.parse_args([])), **fixed, "model": name})
        step_rows(table, train.resolve(settings), resolution, repeats, profile, device)
    return table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags, flag = Parser(description="Time one training step beside the plain way."), argparse.BooleanOptionalAction
    flags.add_argument("--model", metavar="LIST", help="None: SiT-XL/2,SiT-B/2 on a GPU, SiT-B/2 on a CPU")
    flags.add_argument("--batch-size", type=at_least(1), metavar="IMAGES", help="None: 256 on a GPU, 8 on a CPU")
    flags.add_argument("--resolution", type=at_least(64), default=256, metavar="PIXELS", help="side of the images")
    flags.add_argument("--enc-type", default="dinov2-vit-b", metavar="NAME", help="one encoder, with random weights")
    flags.add_argument("--precision", choices=("no", "bf16", "fp16"), help="None: bf16 where it is fast, else no")
    flags.add_argument("--compile", action=flag, help="None: on a GPU")
    flags.add_argument("--activation-checkpointing", action=flag, default=False, help="less memory, more time")
    flags.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="steps that count")
    flags.add_argument("--profile", type=Path, metavar="DIR", help="write a trace of one step")
    return flags.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {name: value for name, value in vars(parse_args(argv)).items() if value is not None}
    measure(device, **{**SIZES[device.type], **given})


if __name__ == "__main__":
    main()
