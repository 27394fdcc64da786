"""Start one program on every GPU of one or several nodes, stop it, and join its processes.

    python -m runtime.launch train.py [flags]         # what train.sh calls
    python -m runtime.launch -m package.module [flags]

Environment:
    NUM_GPUS     GPUs on this node, default all; without a GPU the number of CPU processes, default 1
    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several nodes; default Slurm's own, one task per node (srun)
    REQUEUE=1    under Slurm, requeue the job after a stop by SIGTERM or SIGUSR1

The first SIGTERM, SIGUSR1 or Ctrl-C is forwarded to every rank; a second one ends them all. The exit status is that of the rank that
failed first, 128 + N after signal N. No rank outlives this process.

Torch's elastic agent starts and watches the ranks. It runs in a thread, because its own signal handlers lose the ranks' exit status and
end every rank after a fixed time, and because the main thread must stay responsive while the agent waits for other nodes.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from runtime.messages import UserError, notice, without_traceback
from runtime.stopping import STOPPED, StopRequest

PATIENCE = timedelta(hours=12)      # how long ranks wait while the first one downloads, writes a file, or computes scores
MEETING = timedelta(minutes=30)     # how long nodes wait for each other


class Plan(NamedTuple):
    """Ranks node * processes ... of nodes * processes run here and meet at address:port; port 0 is any free one."""

    processes: int
    nodes: int
    node: int
    address: str
    port: int
    variables: dict[str, str]       # environment variables that are set unless the user has


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={text}: expected a whole number of at least 1")
    return int(text)


def _nodes(environment: Mapping[str, str]) -> int:
    return _count(environment, "NNODES", _count(environment, "SLURM_NNODES", 1))


def _node_rank(environment: Mapping[str, str]) -> str | None:
    return environment.get("NODE_RANK") or environment.get("SLURM_NODEID")


def is_first_node(environment: Mapping[str, str]) -> bool:
    """Whether this node is the one that writes files shared by all nodes."""
    return _nodes(environment) == 1 or _node_rank(environment) == "0"


def launch_plan(environment: Mapping[str, str], gpus: int, cores: int) -> Plan:
    """What to start on a node with `gpus` and `cores`. Raises UserError where the environment is incomplete or asks for too much."""
    processes, nodes = _count(environment, "NUM_GPUS", gpus or 1), _nodes(environment)
    if gpus and processes > gpus:
        raise UserError(f"NUM_GPUS={processes}: this machine has {gpus} GPUs")
    tasks, task_nodes = (_count(environment, f"SLURM_STEP_NUM_{name}", 1) for name in ("TASKS", "NODES"))
    if tasks > task_nodes:
        raise UserError(f"srun started {tasks} tasks on {task_nodes} nodes, and each would use all GPUs: use --ntasks-per-node=1")
    variables = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}  # leave the CPU cores to the data loaders
    if not gpus:  # accelerate joins CPU processes only if told to; threads that spin while they wait starve the data loaders
        variables = {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(max(1, cores // processes))}
    variables = {name: value for name, value in variables.items() if not environment.get(name)}
    if nodes == 1:
        return Plan(processes, 1, 0, "127.0.0.1", 0, variables)
    node, address = _node_rank(environment), environment.get("MASTER_ADDR")
    if not address and (hosts := environment.get("SLURM_JOB_NODELIST")):                  # a short form such as node[03-17]
        listed = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True).stdout
        address = listed.split()[0]
    if not node or not address:
        raise UserError(f"NNODES={nodes}: NODE_RANK or MASTER_ADDR is not set; set both on each node, or use srun")
    if not node.isdecimal() or int(node) >= nodes:
        raise UserError(f"NODE_RANK={node}: expected 0 to {nodes - 1}")
    return Plan(processes, nodes, int(node), address, _count(environment, "MASTER_PORT", 29500), variables)


# ------------------------------------------------------------------------------------------------------- starting and stopping

def launch(program: list[str]) -> int:
    """Run `python *program` on every GPU of this node; returns its exit status. Requeues a stopped Slurm job if REQUEUE=1."""
    plan = launch_plan(os.environ, torch.cuda.device_count(), os.cpu_count() or 1)
    os.environ.update(plan.variables, LAUNCHER_PID=str(os.getpid()))
    port = plan.port
    if not port:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
    nodes = StaticTCPRendezvous(plan.address, port, plan.node, plan.nodes, "run", int(MEETING.total_seconds()))
    spec = WorkerSpec(role="rank", local_world_size=plan.processes, entrypoint=sys.executable, rdzv_handler=nodes, max_restarts=0,
                      args=("-I", str(Path(__file__).with_name("rank.py")), *program), monitor_interval=0.1,
                      master_addr=plan.address, master_port=port)
    logging.disable(logging.ERROR)                                # the agent's; a rank's own message is what the user needs
    with StopRequest() as stop, tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            status = _watch(LocalElasticAgent(spec, DefaultLogsSpecs(folder)), stop)
        except dist.DistError as error:
            raise UserError(f"MASTER_ADDR:MASTER_PORT {plan.address}:{port}: {str(error).splitlines()[0]}") from error
        finally:
            logging.disable(logging.NOTSET)
    if os.environ.get("REQUEUE") == "1" and stop.asked != signal.SIGINT and (status == STOPPED or stop.asked and status != 0):
        requeue(os.environ)
    return status


def _watch(agent: LocalElasticAgent, stop: StopRequest) -> int:
    """Run the agent in a thread and forward the first signal, once, to each rank; returns the exit status."""
    outcome, told = Future(), set()

    def run() -> None:
        try:
            outcome.set_result(agent.run())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([outcome], timeout=0.05).done:
        ranks = {worker.id for worker in agent.get_worker_group().workers if worker.id}  # process ids
        if stop.asked and not ranks:
            return 128 + stop.asked                               # the other nodes have not arrived
        for rank in ranks - told if stop.asked else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, stop.asked)
            told.add(rank)
    failures = outcome.result().failures
    return _report(failures, stop.asked is not None) if failures else 0


def _report(failures: dict[int, ProcessFailure], stopped: bool) -> int:
    """Print the error of the rank that failed first; returns the exit status.

    First is one with a UserError, then the earliest; within a second, failures that follow from another come last: an error after a
    killed rank, and the end by the agent's SIGTERM.
    """
    def order(item: tuple[int, ProcessFailure]) -> tuple:
        code = item[1].exitcode
        return not os.path.isfile(item[1].error_file), item[1].timestamp, 2 if code in (STOPPED, -signal.SIGTERM) else code > 0

    rank, first = min(failures.items(), key=order)
    if os.path.isfile(first.error_file):
        notice(f"error: {first.message}")
    elif first.exitcode < 0 and not stopped:
        notice(f"rank {rank} was killed by {first.signal_name()}" + " (out of memory?)" * (first.exitcode == -signal.SIGKILL))
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def requeue(environment: Mapping[str, str]) -> None:
    """Requeue this Slurm job from its first node, and print the outcome."""
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


# --------------------------------------------------------------------------------------------------------------------- joining

def require_joined(num_processes: int) -> None:
    """Raise UserError where the launcher started more processes than accelerate joined: each would do the whole work alone."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise UserError(f"{launched} processes were started, but accelerate sees {num_processes}: start through train.sh or eval.sh, "
                        "or set ACCELERATE_USE_CPU=true for torchrun on a CPU")


def blocks(count: int, size: int) -> list[range]:
    """Cut 0 .. count - 1 into blocks of `size` consecutive indices; the last may be smaller.

    Processes take `blocks(...)[rank::world_size]`: the cut, and so every result, does not depend on their number.
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def join_processes(cpu: bool = False):
    """accelerate's PartialState: `process_index` of `num_processes`, `device`, `is_main_process`, `wait_for_everyone()`.

    `cpu` uses no GPU; the default is one GPU per process.
    """
    from accelerate import PartialState  # slow to import: only where processes are joined

    # Unlike Accelerator, PartialState ignores ACCELERATE_USE_CPU, and joins CPU processes only with cpu=True.
    cpu = cpu or not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    world = PartialState(cpu=cpu, timeout=PATIENCE)
    require_joined(world.num_processes)
    return world


def leave_processes() -> None:
    """Destroy the process group, if there is one; the last line of a program that ends in order, after `main`.

    gloo's threads must end before the interpreter: one that still holds a tensor then asks for the GIL, and the process aborts.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@without_traceback
def main(argv: list[str]) -> None:
    """Launch a program and exit with its status."""
    sys.exit(launch(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
