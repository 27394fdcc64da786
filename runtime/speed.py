"""Speed and precision: torch.compile part by part, TF32, CPU memory that a process keeps."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from runtime.messages import UserError, notice

# The parts of a network that are compiled, where it has them: modules, or lists of modules.
PARTS = ("blocks", "projectors", "final_layer", "preprocess", "encoder", "decoder")


@functools.cache
def compiler_works(device_type: str) -> bool:
    """Whether torch.compile can build a kernel for this kind of device here; if not, one warning says why."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, dynamic=False)(torch.ones(8, device=device_type))
    except Exception as error:                                    # each missing piece raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        notice(f"warning: torch.compile does not work here ({reason}); going on without it, more slowly")
        return False
    return True


def compile_parts(network: nn.Module) -> bool:
    """Compile the modules named in PARTS in place; parameters and their names stay. Returns whether this machine can.

    Blocks share one graph, so that 28 compile as fast as 2; between them DDP exchanges gradients while the rest is
    computed; and what draws random numbers (label drop, noise) stays outside and draws the same.
    """
    device_type = next(network.parameters()).device.type
    if not compiler_works(device_type):
        return False
    torch._dynamo.config.optimize_ddp = False                     # it would cut a block at DDP's buckets
    for part in (getattr(network, name, ()) for name in PARTS):
        for module in part if isinstance(part, Iterable) else [part]:
            module.compile(dynamic=False)
    return True


def choose_same_kernels() -> None:
    """Let all processes compile the same kernels from now on: the fastest of each process may round differently."""
    from torch._inductor import config  # slow to import

    config.deterministic = True


def require_same_everywhere(compiled: bool) -> None:
    """Raise UserError unless all processes compile, or none."""
    from accelerate.utils import gather_object  # slow to import

    if len(set(gather_object([compiled]))) > 1:
        raise UserError("--compile: torch.compile works in some processes only, which would round "
                        "differently; add --no-compile")


def allow_tf32(allowed: bool) -> None:
    """Let a GPU compute float32 products and convolutions in TF32, or not; `float32_arithmetic` overrides it inside."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def float32_arithmetic(tf32: bool = False) -> Iterator[None]:
    """Compute float32 in float32, or with `tf32` in TF32, inside. (By default PyTorch convolves in TF32 on a GPU.)"""
    backends = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 without TF32 and autocast inside. (TF32 alone moves features by 0.7 %.)"""
    with float32_arithmetic(), torch.autocast(device.type, enabled=False):
        yield


def keep_memory() -> None:
    """Keep freed CPU memory in this process (glibc only), as PyTorch does on a GPU.

    glibc returns blocks of more than 32 MiB to the system at once; the page faults when they are needed again took up
    to three quarters of the alignment's time on a virtual machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-1, -1)                                           # M_TRIM_THRESHOLD: never return the end of the heap
        mallopt(-4, 0)                                            # M_MMAP_MAX: no separately mapped blocks
