"""AdamW with the EMA, and the alignment loss forward and backward, which memory bounds: `--only parts`.

The plain ways are those of benchmarks/plain.py.
"""

import argparse

import torch

import train
from benchmarks import harness, plain
from benchmarks.train_step import CLASSES, SPACE
from loss import SILoss
from models.conditioning import ClassLabels

SIZES = {"cuda": {"model": "SiT-XL/2", "batch_size": 256, "compile": True},
         "cpu": {"model": "SiT-S/2", "batch_size": 64, "compile": False}}


def measure(device: torch.device, model: str, batch_size: int, compile: bool, resolution: int = 256,
            repeats: int = 10) -> harness.Table:
    """The table: the update of `model`'s weights, and the loss of `batch_size` images in float32."""
    given = {"model": model, "mixed_precision": "no", "compile": False}
    settings = train.resolve(argparse.Namespace(**{**vars(train.parse_args([])), **given}))
    encoders = train.open_encoders(settings, SPACE, resolution, "meta", pretrained=False)
    network, ema, _, ours = train.open_networks(settings, SPACE, resolution, ClassLabels(CLASSES), encoders, device)
    theirs, finite = plain.adamw(network, settings), torch.ones((), dtype=torch.bool, device=device)
    table = harness.Table("parts", {"model": model, "batch_size": batch_size, "compile": compile}, device)
    for parameter in network.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)

    def update() -> None:                                         # `train.step_if` without freeing the gradients
        ours.found_inf = (~finite).float()
        ours.step()
        train.update_ema(ema, network, settings.ema_decay, finite)

    def plain_update() -> None:
        theirs.step()
        plain.update_ema(ema, network, settings.ema_decay)

    rate, source = harness.bandwidth(device)
    moved = 4 * 10 * sum(parameter.numel() for parameter in network.parameters())  # AdamW 4 reads, 3 writes; EMA 2, 1
    seconds = harness.timed({"ours": update, "plain": plain_update}, device, repeats)
    table.add("AdamW and EMA", seconds, ideal=moved / rate, formula=f"{moved / 1e9:.4g} GB / {source}")

    shape = batch_size, network.pos_embed.shape[1], encoders[0].embed_dim                 # (B, T, E)
    tokens, targets = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)

    def align(function) -> None:
        tokens.grad = None
        function([tokens], [targets]).backward()

    ways = {"ours": SILoss(compile=compile).alignment_loss, "plain": plain.alignment_loss}
    seconds = harness.timed({way: lambda f=function: align(f) for way, function in ways.items()}, device, repeats)
    moved = 4 * 5 * tokens.numel()                                # both are read twice, the gradient is written
    table.add("alignment loss", seconds, ideal=moved / rate, formula=f"{moved / 1e9:.4g} GB / {source}")
    return table
