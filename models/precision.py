"""How products and convolutions of float32 are computed: in float32, or in TF32, the tensor cores' 10-bit mantissa."""

import contextlib
from collections.abc import Iterator

import torch


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
