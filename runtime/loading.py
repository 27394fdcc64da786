"""Batches of a DataLoader with worker processes, whose failures are one sentence each."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator

from torch.utils.data import DataLoader

from runtime.files import as_size
from runtime.messages import MayPass, UserError
from runtime.stopping import ignore_ended_workers

SOCKET = 107          # bytes of a socket's path on Linux; workers hand over tensors by sockets in TMPDIR/pymp-.../
SHARED = "/dev/shm"   # where the tensors are


def require_short_tmpdir(workers: int) -> None:
    """Raise UserError where `workers` cannot open their sockets: training would wait for them for ever."""
    longest = SOCKET - len("/pymp-01234567/listener-01234567")
    if workers and len(os.fsencode(tempfile.gettempdir())) > longest:
        raise UserError(f"TMPDIR={tempfile.gettempdir()}: too long for the sockets of data loader workers; use one of "
                        f"up to {longest} bytes, for example TMPDIR=/tmp")


def batches_of(loader: DataLoader) -> Iterator:
    """The batches. Raises UserError if shared memory is too small, and MayPass if a worker was killed."""
    try:
        batches = iter(loader)
        ignore_ended_workers()
        yield from batches
    except (OSError, EOFError, RuntimeError) as error:
        if "shared memory" in str(error) or isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{SHARED}: too small for the batches of data loader workers "
                            f"({as_size(shutil.disk_usage(SHARED).free)} free); use docker run --shm-size=8g, fewer "
                            "workers, or --num-workers 0") from error
        # Batches of a killed worker that are already in the queue cannot be fetched from it.
        killed = str(error).startswith(("DataLoader worker (pid", "Pin memory thread exited"))
        if killed or isinstance(error, ConnectionError | EOFError):
            raise MayPass("a data loader worker was killed (out of memory?): give the same command again, perhaps "
                          "with fewer workers") from error
        raise
