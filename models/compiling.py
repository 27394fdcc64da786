"""torch.compile for the blocks of a network, where it works."""

import torch
from torch import nn

from models.errors import notice


def compile_blocks(network: nn.Module) -> bool:
    """Compile the modules of `network.blocks` in place; returns False, after one notice, where torch.compile does not work."""
    device = next(network.parameters()).device
    try:
        torch.compile(lambda x: x.cos() + 1, dynamic=False)(torch.zeros(4, device=device))
    except Exception as error:                                    # no compiler, no driver, no cache folder: each raises its own
        notice(f"warning: torch.compile does not work here ({type(error).__name__}): going on without it")
        return False
    for block in network.blocks:
        block.compile(dynamic=False)
    return True
