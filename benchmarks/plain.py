"""The plain way to train, for comparison: eager float32, loops over samples in the alignment and over parameters."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from loss import SILoss, weighted
from models.sit import SiT


def alignment_loss(projected: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """`loss.alignment_loss` of tokens (B, T, E), one sample after the other."""
    total = 0.0
    for tokens, features in zip(projected, targets, strict=True):
        for token, feature in zip(tokens, features, strict=True):                         # (T, E) each
            total = total - (F.normalize(token, dim=-1) * F.normalize(feature, dim=-1)).sum(dim=-1).mean()
    return total / (len(projected) * len(projected[0]))


def objective(**settings) -> SILoss:
    """`SILoss` with the looped alignment."""
    found = SILoss(**settings)
    found.alignment_loss = alignment_loss
    return found


def adamw(model: SiT, args) -> torch.optim.AdamW:
    """AdamW with the settings of train.py, one parameter at a time."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate,
                             betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                             weight_decay=args.adam_weight_decay, foreach=False, fused=False)


@torch.no_grad()
def update_ema(ema: SiT, model: SiT, decay: float) -> None:
    for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        average.mul_(decay).add_(parameter, alpha=1 - decay)


def step(model: SiT, ema: SiT, optimizer: torch.optim.AdamW, loss: SILoss, batches: Iterable[dict],
         args) -> torch.Tensor:
    """One update from the mean over `batches` (arguments of SILoss, of equal size); returns their mean loss."""
    totals = []
    for batch in batches:
        total = weighted(loss(model, **batch), beta=args.cls, lam=args.proj_coeff)
        total.backward()
        totals.append(total.detach())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= len(totals)
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    update_ema(ema, model, args.ema_decay)
    return torch.stack(totals).mean()
