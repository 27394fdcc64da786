"""torch.compile, part by part.

The blocks of a transformer share one graph, so that a network of 28 compiles as fast as one of 2; between them gradients become ready one
by one, so that DDP exchanges them while the rest is still computed; and what draws random numbers (label drop, noise) stays outside and
draws what it draws without compiling.
"""

import functools
from collections.abc import Iterable

import torch
from torch import nn

from models.errors import UserError, notice

# What is compiled of a network, where it has them: modules, and of lists each one. SiT's, an image encoder's, a VAE's.
PARTS = ("blocks", "projectors", "final_layer", "preprocess", "encoder", "decoder")


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


def compile_parts(network: nn.Module) -> bool:
    """Compile the modules named in PARTS in place; parameters and their names stay. Returns whether this machine can compile.

    A network of another build, without such modules, stays as it is.
    """
    device_type = next(network.parameters()).device.type
    if not compiler_works(device_type):
        return False
    torch._dynamo.config.optimize_ddp = False                     # it would cut a block at DDP's buckets; blocks are cut finely enough
    for part in (getattr(network, name, ()) for name in PARTS):
        for module in part if isinstance(part, Iterable) else [part]:
            module.compile(dynamic=False)
    return True


def choose_same_kernels() -> None:
    """In all processes, from now on: else each may take those that it finds the fastest, which round in other ways."""
    from torch._inductor import config  # slow to import

    if hasattr(config, "deterministic"):
        config.deterministic = True
    else:                                                         # older than PyTorch 2.9
        config.triton.autotune_pointwise = False


def require_same_everywhere(compiled: bool) -> None:
    """Raise UserError unless all processes compile, or none."""
    from accelerate.utils import gather_object  # slow to import

    if len(set(gather_object([compiled]))) > 1:
        raise UserError("torch.compile works in some processes only, whose results would differ from the others': add --no-compile")
