"""Starting one program on every GPU of one or several nodes, stopping it, and joining the processes that were started.

    python -m runtime.launch train.py [flags]         # what train.sh calls
    python -m runtime.launch -m package.module [flags]

Environment:
    NUM_GPUS     GPUs on this node, default all; on a machine without one it counts CPU processes, default 1
    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several nodes; default Slurm's own, one task per node (srun)
    REQUEUE=1    under Slurm, give the job back to the queue when SIGTERM or SIGUSR1 has ended it

SIGTERM, SIGUSR1 and Ctrl-C are forwarded to every rank, once; a second signal kills them. The exit status is that of the rank that
failed first, 128 + N for one that died of signal N. No rank outlives this process.

The ranks are started here and not by torchrun, which ends on SIGUSR1 without them, and after SIGTERM with status 1 and a kill after
30 seconds: a checkpoint may take longer. What both do is the same: set RANK, WORLD_SIZE, MASTER_ADDR and the like, and wait.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import IO

import torch
import torch.distributed as dist

from runtime.messages import UserError, notice, without_traceback
from runtime.stopping import REPEATED, STOP_SIGNALS, STOPPED, SUPERVISED

PATIENCE = timedelta(hours=12)  # the others wait while the first process downloads, writes a file, or computes scores
GRACE = 30                      # seconds that rank 0 has to finish its checkpoint when another rank has failed
LAST_RANKS = 60                 # seconds that the last ranks have to end after the first has stopped on a signal


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name} is {text!r}: give a whole number from 1 on")
    return int(text)


def _nodes(environment: Mapping[str, str]) -> int:
    return _count(environment, "NNODES", _count(environment, "SLURM_NNODES", 1))


def _node_rank(environment: Mapping[str, str]) -> str | None:
    return environment.get("NODE_RANK") or environment.get("SLURM_NODEID")


def is_first_node(environment: Mapping[str, str]) -> bool:
    """Whether this node, of one or several that run the same command, writes what is written once."""
    return _nodes(environment) == 1 or _node_rank(environment) == "0"


def _first_host(nodes: str) -> str:
    """The first host of Slurm's short form, as in node[03-17]."""
    return subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout.split()[0]


def launch_plan(environment: Mapping[str, str], gpus: int, cores: int) -> list[dict[str, str]]:
    """The variables to set for each rank of this node, on a machine with `gpus` and `cores`.

    Raises UserError when the environment asks for what is not there or leaves several nodes without their place.
    """
    processes = _count(environment, "NUM_GPUS", gpus or 1)
    if gpus and processes > gpus:
        raise UserError(f"NUM_GPUS is {processes}, but this machine has {gpus}: give at most {gpus}")
    common = {}
    if not gpus:
        # Without the first, processes on a CPU do not find each other; threads that spin in waiting starve the data loader.
        common = {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(max(1, cores // processes))}
    elif processes > 1:
        common = {"OMP_NUM_THREADS": "1"}                         # what a GPU leaves to the CPU is little, and the cores are the loaders'
    common = {name: environment.get(name) or value for name, value in common.items()}
    nodes = _nodes(environment)
    if _count(environment, "SLURM_STEP_NUM_TASKS", 1) > _count(environment, "SLURM_STEP_NUM_NODES", 1):
        raise UserError(f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks on {environment.get('SLURM_STEP_NUM_NODES', 1)} nodes, "
                        "and each would take all GPUs: use one task per node (--ntasks-per-node=1)")
    if nodes * processes == 1:
        return [common]
    node, address, port = 0, "127.0.0.1", None
    if nodes > 1:
        rank = _node_rank(environment)
        address = environment.get("MASTER_ADDR")
        if not address and environment.get("SLURM_JOB_NODELIST"):
            address = _first_host(environment["SLURM_JOB_NODELIST"])
        if not rank or not address:
            raise UserError(f"NNODES is {nodes}, but NODE_RANK or MASTER_ADDR is not set: set both on each node, or use srun")
        if not rank.isdecimal() or int(rank) >= nodes:
            raise UserError(f"NODE_RANK is {rank!r}, but NNODES is {nodes}: give 0 to {nodes - 1}")
        node, port = int(rank), environment.get("MASTER_PORT") or "29500"
    common |= {"MASTER_ADDR": address, "MASTER_PORT": port or _free_port(), "WORLD_SIZE": str(nodes * processes),
               "LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, "RANK": str(node * processes + i), "LOCAL_RANK": str(i)} for i in range(processes)]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# ------------------------------------------------------------------------------------------------------- starting and stopping

def supervise(command: list[str], ranks: list[dict[str, str]], stdout: IO | None = None) -> tuple[int, list[int]]:
    """Run `command` once with each of the variables in `ranks`, and wait; what it prints goes to the file `stdout`.

    Returns the exit status and the signals that came meanwhile. The first rank that fails ends the others; rank 0, which alone writes
    checkpoints, may finish one. Each rank leads a session of its own: Ctrl-C reaches it from here alone, once.
    """
    received, times = [], []

    def note(number: int, _) -> None:
        times.append(time.monotonic())
        if len(times) == 1 or times[-1] - times[0] > REPEATED:
            received.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    running = []
    try:
        for variables in ranks:
            running.append(subprocess.Popen(command, env={**os.environ, SUPERVISED: "1", **variables}, stdout=stdout,
                                            start_new_session=True, preexec_fn=_die_with_the_parent))
        return _wait(running, received), received
    finally:
        for rank in running:
            _kill(rank)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen], received: list[int]) -> int:
    """Until all have ended, one has failed, or a second signal came; returns the exit status."""
    forwarded, stopped_at, failed_at = False, None, None
    while True:
        if len(received) > 1:
            notice("a second signal came: the ranks are killed, and what came after the last checkpoint is lost")
            return 128 + received[1]
        if received and not forwarded:
            forwarded = True
            for rank in ranks:
                rank.send_signal(received[0])                     # nothing, if it has ended
        statuses = [rank.poll() for rank in ranks]
        failed = [(rank, status) for rank, status in enumerate(statuses) if status not in (None, 0, STOPPED)]
        if failed and failed_at is None:
            failed_at, (rank, status) = time.monotonic(), failed[0]
            if status < 0 and not received:
                notice(f"rank {rank} of this node was killed by {signal.Signals(-status).name}" + " (out of memory?)" * (status == -9))
            for other in ranks[1:]:
                _kill(other)
        if failed_at is not None and (statuses[0] is not None or time.monotonic() - failed_at > GRACE):
            return status if status > 0 else 128 - status
        if None not in statuses:
            return max(statuses)
        if STOPPED in statuses:
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at > LAST_RANKS:
                return STOPPED
        time.sleep(0.05)


def _die_with_the_parent() -> None:
    """In a new rank: the kernel kills it when this process ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                # 1: PR_SET_PDEATHSIG


def _kill(rank: subprocess.Popen) -> None:
    """The rank, if it still runs, and the loader workers that it left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):                        # all have ended
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


def requeue(environment: Mapping[str, str]) -> None:
    """Give this Slurm job back to the queue, from its first node; say so, or why not."""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        notice("REQUEUE is set, but this is no Slurm job: give the same command again")
    elif is_first_node(environment):
        try:
            subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            notice(f"Slurm did not requeue job {job}: {(getattr(error, 'stderr', None) or str(error)).strip()}")
        else:
            notice(f"requeued Slurm job {job}")


@without_traceback
def main(argv: list[str]) -> None:
    """Run a program with the plan for this machine, and end with its status."""
    ranks = launch_plan(os.environ, torch.cuda.device_count(), os.cpu_count() or 1)
    status, received = supervise([sys.executable, *argv], ranks)
    stopped = status == STOPPED or len(received) == 1 and status != 0                     # Slurm may signal the ranks alone
    if stopped and signal.SIGINT not in received and os.environ.get("REQUEUE") == "1":
        requeue(os.environ)
    sys.exit(status)


# --------------------------------------------------------------------------------------------------------------------- joining

def require_joined(num_processes: int) -> None:
    """Raise UserError when the launcher started more processes than accelerate joined: each would do the whole work alone."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise UserError(f"the launcher started {launched} processes, but accelerate sees {num_processes}: start through train.sh or "
                        "eval.sh, or set ACCELERATE_USE_CPU=true for torchrun on a CPU")


def blocks(count: int, size: int) -> list[range]:
    """Cut 0 .. count - 1 into blocks of `size` consecutive indices; the last may be smaller.

    Processes take `blocks(...)[rank::world_size]`: the cut, and so every result, does not depend on their number.
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def join_processes(cpu: bool = False):
    """accelerate's PartialState: `process_index` of `num_processes`, `device`, `is_main_process`, `wait_for_everyone()`.

    `cpu` keeps off the GPUs, which are otherwise one per process.
    """
    from accelerate import PartialState  # slow to import: only where processes are joined

    # Unlike Accelerator, PartialState does not look at ACCELERATE_USE_CPU, and joins nobody on a CPU unless told so.
    cpu = cpu or not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    world = PartialState(cpu=cpu, timeout=PATIENCE)
    require_joined(world.num_processes)
    return world


def leave_processes() -> None:
    """Part from the others, if any were joined: the last line of a program that ends in order, behind `main`.

    gloo's threads must end before the interpreter does. One that still holds a tensor then asks for the GIL, and SIGABRT ends the process.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
