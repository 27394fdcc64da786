"""Stop in order on a signal, or where one rank cannot read on: all ranks finish the same step, save and exit.

The signals are SIGTERM, SIGUSR1 (Slurm's --signal), Ctrl-C, and SIGHUP (the terminal is closed) except under nohup.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.messages import MayPass, UserError, is_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STOPPED = 75    # exit status after a stop with everything saved: EX_TEMPFAIL of sysexits.h, "try again"
FAILED = 1000   # a rank cannot go on: larger than any signal's number, so that MAX prefers it
REPEATED = 0.5  # seconds during which further signals count as the first one: Slurm may send it twice


class StopRequest:
    """Context manager: the first signal sets `asked`, a later second one ends the process at once with status 128 + N.

    A rank ignores the second signal: its launcher has a StopRequest of its own, and ends the ranks with itself.
    A rank that cannot read on sets `failure`; a run that has made a step sets `progress`. `patience`: how long ranks
    wait for each other in `agreed`, for example while one of them saves.
    """

    def __init__(self, patience: timedelta = timedelta(hours=1)):
        self.patience = patience
        self.asked: signal.Signals | None = None
        self.failure: Exception | None = None
        self.progress = False
        self.shield = Shield()
        self._group = None

    def __enter__(self) -> "StopRequest":
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS
                        if not (nohup and number == signal.SIGHUP)}
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if isinstance(error, MayPass) and not self.progress:
            error.status = UserError.status                       # "try again" could requeue a job for ever
        self.shield.over.value = 1
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > REPEATED and not is_rank():
            with contextlib.suppress(OSError):                    # not print: the signal may have interrupted one
                os.write(2, b"second signal: ended at once\n")
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop or failed; all then have its `asked` or `failure`.

        All ranks must call it and get the same answer; no GPU is waited for.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return bool(self.failure or self.asked)
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self.patience)   # CPU tensors, also beside NCCL
        asked = torch.tensor(FAILED if self.failure else int(self.asked or 0))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        if asked == FAILED:
            failures = [None] * dist.get_world_size()
            mine = self.failure if isinstance(self.failure, UserError | None) else UserError(repr(self.failure))
            dist.all_gather_object(failures, mine, group=self._group)
            self.failure = self.failure or next(filter(None, failures))
        elif asked and self.asked is None:
            self.asked, self._since = signal.Signals(int(asked)), time.monotonic()
        return bool(asked)

    def leave(self) -> None:
        """End a program that was stopped, with everything saved: raise the failure, or exit with STOPPED."""
        if self.failure is not None:
            raise self.failure
        sys.exit(STOPPED)


def ignore_ended_workers() -> None:
    """Undo PyTorch's SIGCHLD handler, which the first DataLoader with workers sets.

    It raises wherever the program is, so a step could be left half done. The next read also finds a dead worker.
    """
    if threading.current_thread() is threading.main_thread():     # others set no handlers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class Shield:
    """`worker_init_fn` of a DataLoader: workers ignore a signal to all processes of a job, so that ranks stop in order.

    A worker ends with its rank, or by SIGTERM once `over` is set: that is how the DataLoader ends it.
    """

    def __init__(self):
        self.over = multiprocessing.RawValue("b", 0)

    def __call__(self, _: int) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self.over.value else None)
