"""How fast and in what precision PyTorch computes: torch.compile part by part, TF32, and the CPU memory that a process keeps.

The blocks of a transformer share one graph, so that a network of 28 compiles as fast as one of 2; between them gradients become ready one
by one, so that DDP exchanges them while the rest is still computed; and what draws random numbers (label drop, noise) stays outside and
draws what it draws without compiling.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from runtime.messages import UserError, notice

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


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU computes what is float32 in TF32, from now on; inside of `float32_arithmetic` that counts instead."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def float32_arithmetic(tf32: bool = False) -> Iterator[None]:
    """Inside, float32 is float32 (PyTorch's default lets convolutions on a GPU be TF32), or with `tf32` all is; afterwards as before."""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):           # PyTorch 2.9 and later, where the older switches may refuse to be read
        switches = [(part, "fp32_precision", "tf32" if tf32 else "ieee")
                    for part in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)]
    else:
        switches = [(part, "allow_tf32", tf32) for part in (backends.cuda.matmul, backends.cudnn)]
    before = [getattr(part, name) for part, name, _ in switches]
    try:
        for part, name, value in switches:
            setattr(part, name, value)
        yield
    finally:
        for (part, name, _), value in zip(switches, before, strict=True):
            setattr(part, name, value)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 that is float32: TF32 and autocast off inside, as they were afterwards. (TF32 alone moves features by 0.7 %.)"""
    with float32_arithmetic(), torch.autocast(device.type, enabled=False):
        yield


def keep_memory() -> None:
    """Have this process keep what it frees, as PyTorch does with a GPU's memory; where the C library is not glibc, nothing happens.

    glibc gives blocks of more than 32 MiB back to the system at once, and takes a page fault for every 4 KiB when they are needed again, in
    every training step. On a virtual machine those were up to three quarters of the alignment's time. They end after a few steps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)                                    # M_TRIM_THRESHOLD: never give back the end of the heap
        mallopt(-4, 0)                                            # M_MMAP_MAX: no blocks of their own
