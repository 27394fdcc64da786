"""torch.compile, block by block.

Blocks share one graph, so that a network of 28 compiles as fast as one of 2; between them gradients become ready one by one, so that DDP
exchanges them while the rest is still computed; and what draws random numbers (label drop, noise) stays outside and draws what it draws
without compiling.
"""

import functools

import torch
from torch import nn

from models.errors import notice


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile can build a kernel for this kind of device here; says once why not."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, dynamic=False)(torch.ones(8, device=device_type))
    except Exception as error:                                    # a missing compiler, driver or cache folder: each raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        notice(f"warning: torch.compile does not work here ({reason}): going on without it, more slowly")
        return False
    return True


def compile_blocks(network: nn.Module) -> bool:
    """Compile the modules of `network.blocks` in place; parameters and their names stay. Returns whether this machine can compile.

    A network of another build, without blocks, stays as it is.
    """
    device_type = next(network.parameters()).device.type
    if not compiler_works(device_type):
        return False
    torch._dynamo.config.optimize_ddp = False                     # it would cut a block at DDP's buckets; blocks are cut finely enough
    for block in getattr(network, "blocks", ()):
        block.compile(dynamic=False)
    return True
