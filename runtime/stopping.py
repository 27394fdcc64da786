"""Stopping on request: SIGTERM, SIGUSR1 (Slurm's --signal) and Ctrl-C let the step finish; all ranks stop at the same one."""

import multiprocessing
import os
import signal
import time

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = 75               # exit status after a stop with everything saved: EX_TEMPFAIL of sysexits.h, "try again"
REPEATED = 0.5             # seconds in which a signal is the first one again: Slurm's may come from two sides
SUPERVISED = "SUPERVISED"  # set by runtime.launch for its ranks: it counts the signals, and kills at the second


class StopRequest:
    """Within `with StopRequest() as stop:` a first signal sets `stop.asked`, a later second one ends the process at once.

    Under runtime.launch a rank ignores the second: the launcher counts, and Slurm may signal every process of a job.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.shield = Shield()
        self._group = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self.shield.over.value = 1
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > REPEATED and SUPERVISED not in os.environ:
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: one answer for all ranks, which must all call it. The device is not waited for."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.asked is not None
        if self._group is None:
            self._group = dist.new_group(backend="gloo")          # between the CPUs, whatever the GPUs use
        asked = torch.tensor(0 if self.asked is None else int(self.asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        if asked and self.asked is None:
            self.asked, self._since = signal.Signals(int(asked)), time.monotonic()
        return bool(asked)


class Shield:
    """For data loader workers, as `worker_init_fn`: a signal to all processes of a job must not take them from a rank that stops.

    They end with their rank, or by SIGTERM once `over` is set: then it is the rank's own way to end them.
    """

    def __init__(self):
        self.over = multiprocessing.RawValue("b", 0)

    def __call__(self, _: int) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self.over.value else None)
