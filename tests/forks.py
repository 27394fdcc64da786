"""Run functions in forked processes: fast, because nothing is imported again."""

import multiprocessing.context
import os
import socket
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState

PATIENCE = 300               # seconds for a function that takes a few


class Forked(multiprocessing.context.ForkProcess):
    """A forked process with the methods of subprocess.Popen."""

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode


def start(function: Callable, *args, **environment: str) -> Forked:
    """Start `function(*args)` in a forked process with these environment variables, without accelerate's state."""

    def child() -> None:
        os.environ.update(environment)
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        function(*args)

    process = Forked(target=child)
    process.start()
    return process


def run_main(rank: int, main: Callable, argv: list) -> None:
    """A rank of a program: for `two_ranks(run_main, train.main, argv)`."""
    main([*map(str, argv)])


def two_ranks(function: Callable, *args) -> None:
    """Run `function(rank, *args)` in two joined CPU processes. Raises AssertionError if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true",
                      MASTER_PORT=str(free.getsockname()[1]))
    ranks = [start(function, rank, *args, RANK=str(rank), LOCAL_RANK=str(rank), **joined) for rank in (0, 1)]
    try:
        assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
