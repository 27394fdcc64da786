"""What a process does with the CPU memory that it frees."""

import ctypes
import os


def keep_memory() -> None:
    """Have this process keep what it frees, as PyTorch does with a GPU's memory; where the C library is not glibc, nothing happens.

    glibc gives blocks of more than 32 MiB back to the system at once, and takes a page fault for every 4 KiB when they are needed again, in
    every training step. On a virtual machine those were up to three quarters of the alignment's time. They end after a few steps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)                                    # M_TRIM_THRESHOLD: never give back the end of the heap
        mallopt(-4, 0)                                            # M_MMAP_MAX: no blocks of their own
