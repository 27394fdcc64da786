"""Start one program on every GPU of one or several nodes, stop it, and join its processes.

    python -m runtime.launch train.py [flags]         # what train.sh calls
    python -m runtime.launch -m package.module [flags]

Environment:
    NUM_GPUS     GPUs on this node, default all; without a GPU the number of CPU processes, default 1
    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several nodes; default Slurm's own, one task per node (srun)
    REQUEUE=1    under Slurm, requeue the job after a stop by SIGTERM or SIGUSR1

The first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C is forwarded to every rank; a second one ends them all. The exit status is
that of the rank that failed first, 128 + N after signal N. No rank outlives this process.

Torch's elastic agent starts and watches the ranks. It runs in a thread: its own signal handlers lose the ranks' exit
status and end a rank that takes long to save, and it does not react to signals while it waits for other nodes.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from runtime.messages import UserError, notice, without_traceback
from runtime.stopping import STOPPED, StopRequest

PATIENCE = timedelta(hours=12)  # ranks wait while the first one downloads, writes a file, or computes scores
MEETING = 1800                  # seconds that nodes wait for each other


class Plan(NamedTuple):
    """This node runs `processes` of nodes * processes ranks, from node * processes on, which meet at address:port."""

    processes: int
    variables: dict[str, str]    # environment variables to set for the ranks
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0                # 0: any free one


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={text}: expected a whole number of at least 1")
    return int(text)


def _nodes(environment: Mapping[str, str]) -> int:
    return _count(environment, "NNODES", _count(environment, "SLURM_NNODES", 1))


def _node_rank(environment: Mapping[str, str]) -> str | None:
    return environment.get("NODE_RANK") or environment.get("SLURM_NODEID")


def _first_host(environment: Mapping[str, str]) -> str:
    """The first name of Slurm's list of nodes, as in `node[03-17],big1`; empty without Slurm."""
    short = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", short).split(",")[0]


def is_first_node(environment: Mapping[str, str]) -> bool:
    """Whether this node is the one that writes files shared by all nodes."""
    return _nodes(environment) == 1 or _node_rank(environment) == "0"


def launch_plan(environment: Mapping[str, str], gpus: int, cores: int) -> Plan:
    """What to start on a node with `gpus` and `cores`.

    Raises UserError where the environment asks for more GPUs than there are or does not say which of several nodes
    this one is.
    """
    processes, nodes = _count(environment, "NUM_GPUS", gpus or 1), _nodes(environment)
    if gpus and processes > gpus:
        raise UserError(f"NUM_GPUS={processes}: this machine has {gpus} GPUs")
    tasks, hosts = (_count(environment, f"SLURM_STEP_NUM_{name}", 1) for name in ("TASKS", "NODES"))
    if tasks > hosts:
        raise UserError(f"srun started {tasks} tasks on {hosts} nodes, and each uses all GPUs: use --ntasks-per-node=1")
    variables = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}  # leave the CPU cores to the data loaders
    if not gpus:  # accelerate joins CPU processes only if told to; threads that spin while waiting starve data loaders
        variables = {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive",
                     "OMP_NUM_THREADS": str(max(1, cores // processes))}
    variables = {name: value for name, value in variables.items() if not environment.get(name)}
    if nodes == 1:
        return Plan(processes, variables)
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_NUM_NODES" not in environment and not environment.get("NNODES"):
        raise UserError(f"SLURM_NNODES={nodes}: sbatch runs a script on the first node alone; submit one that calls "
                        "`srun --ntasks-per-node=1 bash train.sh ...`")
    node, address = _node_rank(environment), environment.get("MASTER_ADDR") or _first_host(environment)
    if not node or not address:
        raise UserError(f"NNODES={nodes}: NODE_RANK or MASTER_ADDR is not set; set both on each node, or use srun")
    if not node.isdecimal() or int(node) >= nodes:
        raise UserError(f"NODE_RANK={node}: expected 0 to {nodes - 1}")
    return Plan(processes, variables, nodes, int(node), address, _count(environment, "MASTER_PORT", 29500))


# ----------------------------------------------------------------------------------------------- starting and stopping

def launch(program: list[str]) -> int:
    """Run `python *program` on every GPU of this node; returns the exit status. After a stop, see `requeue`."""
    plan = launch_plan(os.environ, torch.cuda.device_count(), os.cpu_count() or 1)
    os.environ.update(plan.variables, LAUNCHER_PID=str(os.getpid()))
    port = plan.port or _free_port()
    meeting = StaticTCPRendezvous(plan.address, port, plan.node, plan.nodes, run_id="launch", timeout=MEETING)
    command = ("-I", str(Path(__file__).with_name("rank.py")), *program)
    spec = WorkerSpec(role="rank", local_world_size=plan.processes, entrypoint=sys.executable, args=command,
                      rdzv_handler=meeting, max_restarts=0, monitor_interval=0.1,
                      master_addr=plan.address, master_port=port)
    logging.disable(logging.ERROR)                                # the agent's: a rank's own message says more
    try:
        with StopRequest() as stop, TemporaryDirectory(prefix="ranks-") as folder:
            status = _watch(LocalElasticAgent(spec, DefaultLogsSpecs(folder)), stop, plan)
    except dist.DistError as error:
        raise UserError(f"MASTER_ADDR={plan.address} MASTER_PORT={port}: {str(error).splitlines()[0]}") from error
    finally:
        logging.disable(logging.NOTSET)
    requeue(os.environ, status, stop.asked)
    return status


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _watch(agent: LocalElasticAgent, stop: StopRequest, plan: Plan) -> int:
    """Run the agent and forward the first signal, once, to each rank; returns the exit status."""
    outcome, told, remind = ThreadPool(1).apply_async(agent.run), set(), time.monotonic() + 5
    while not outcome.ready():
        ranks = {worker.id for worker in agent.get_worker_group().workers if worker.id}   # process ids
        if not ranks and time.monotonic() > remind:
            remind += 300
            notice(f"node {plan.node} waits for all {plan.nodes} nodes to reach {plan.address}:{plan.port}")
        if stop.asked:
            if not ranks:                                         # the other nodes have not arrived
                return 128 + stop.asked
            for rank in ranks - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, stop.asked)
            told = ranks
        outcome.wait(0.05)
    failures = outcome.get().failures
    if not failures:
        return 0
    # First is a rank with a UserError, then the earliest; within a second, the agent's SIGTERM follows from another.
    rank, first = min(failures.items(), key=lambda item: (
        not os.path.isfile(item[1].error_file), item[1].timestamp, item[1].exitcode in (STOPPED, -signal.SIGTERM)))
    if os.path.isfile(first.error_file):
        notice(f"error: {first.message}")
    elif first.exitcode < 0 and not stop.asked:
        memory = " (out of memory?)" if first.exitcode == -signal.SIGKILL else ""
        notice(f"rank {rank} was killed by {first.signal_name()}{memory}")
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def requeue(environment: Mapping[str, str], status: int, signalled: signal.Signals | None) -> None:
    """With REQUEUE=1, requeue this Slurm job from its first node if a signal other than Ctrl-C ended the program."""
    stopped = status == STOPPED or signalled and status != 0      # Slurm may have signalled the ranks alone
    if environment.get("REQUEUE") != "1" or not stopped or signalled == signal.SIGINT:
        return
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        notice("REQUEUE=1, but this is no Slurm job: give the same command again")
    elif is_first_node(environment):
        try:
            subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            notice(f"Slurm did not requeue job {job}: {(getattr(error, 'stderr', None) or str(error)).strip()}")
        else:
            notice(f"requeued Slurm job {job}")


# ------------------------------------------------------------------------------------------------------------- joining

def require_joined(num_processes: int) -> None:
    """Raise UserError where accelerate joined fewer processes than were started: each would do the whole work alone."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != num_processes:
        raise UserError(f"{started} processes were started, but accelerate sees {num_processes}: use train.sh, "
                        "eval.sh or ACCELERATE_USE_CPU=true for torchrun on a CPU")


def blocks(count: int, size: int) -> list[range]:
    """Cut 0 .. count - 1 into blocks of `size` consecutive indices; the last may be smaller.

    Processes take `blocks(...)[rank::world_size]`: the cut, and so every result, does not depend on their number.
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def join_processes(cpu: bool = False):
    """Join all processes; returns accelerate's PartialState (`process_index`, `num_processes`, `device`, ...).

    `cpu` uses no GPU; the default is one GPU per process.
    """
    from accelerate import PartialState  # slow to import: only where processes are joined

    # Unlike Accelerator, PartialState ignores ACCELERATE_USE_CPU, and joins CPU processes only with cpu=True.
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    world = PartialState(cpu=cpu or asked or not torch.cuda.is_available(), timeout=PATIENCE)
    require_joined(world.num_processes)
    return world


def leave_processes() -> None:
    """Destroy the process group, if there is one; a program that ends in order calls it last.

    gloo's threads must end before the interpreter: one that holds a tensor then asks for the GIL, and the process
    aborts.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@without_traceback
def main(argv: list[str]) -> None:
    """Launch a program and exit with its status."""
    sys.exit(launch(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
