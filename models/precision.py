"""float32 that is float32, for what must not depend on a user's or a program's switches."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 that is float32: TF32 and autocast off inside, as they were afterwards. (TF32 alone moves features by 0.7 %.)"""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):           # PyTorch 2.9 and later, where the older switches may refuse to be read
        switches = [(part, "fp32_precision", "ieee")
                    for part in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)]
    else:
        switches = [(part, "allow_tf32", False) for part in (backends.cuda.matmul, backends.cudnn)]
    before = [getattr(part, name) for part, name, _ in switches]
    try:
        for part, name, value in switches:
            setattr(part, name, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (part, name, _), value in zip(switches, before, strict=True):
            setattr(part, name, value)
