"""Starting one program on every GPU of one or several nodes, and joining the processes that were started.

    python -m models.processes train.py [flags]         # what train.sh calls
    python -m models.processes -m package.module [flags]

Environment:
    NUM_GPUS     GPUs on this node, default all; on a machine without one it counts CPU processes, default 1
    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several nodes; default Slurm's own, one task per node (srun)
"""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta

import torch

from models.errors import UserError, without_traceback

PATIENCE = timedelta(hours=12)  # the others wait while the first process downloads, writes a file, or computes scores


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


def launch_plan(environment: Mapping[str, str], gpus: int, cores: int) -> tuple[list[str], dict[str, str]]:
    """torchrun's arguments ([]: one process needs no launcher) and the variables to set, for a machine with `gpus` and `cores`.

    Raises UserError when the environment asks for what is not there or leaves several nodes without their place.
    """
    processes = _count(environment, "NUM_GPUS", gpus or 1)
    if gpus and processes > gpus:
        raise UserError(f"NUM_GPUS is {processes}, but this machine has {gpus}: give at most {gpus}")
    variables = {}
    if not gpus:
        # Without the first, processes on a CPU do not find each other; threads that spin in waiting starve the data loader.
        variables = {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(max(1, cores // processes))}
    nodes = _nodes(environment)
    if _count(environment, "SLURM_STEP_NUM_TASKS", 1) > _count(environment, "SLURM_STEP_NUM_NODES", 1):
        raise UserError(f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks on {environment.get('SLURM_STEP_NUM_NODES', 1)} nodes, "
                        "and each would take all GPUs: use one task per node (--ntasks-per-node=1)")
    if nodes > 1:
        rank = _node_rank(environment)
        address = environment.get("MASTER_ADDR")
        if not address and environment.get("SLURM_JOB_NODELIST"):
            address = _first_host(environment["SLURM_JOB_NODELIST"])
        if not rank or not address:
            raise UserError(f"NNODES is {nodes}, but NODE_RANK or MASTER_ADDR is not set: set both on each node, or use srun")
        return ["--nnodes", str(nodes), "--node_rank", rank, "--master_addr", address,
                "--master_port", environment.get("MASTER_PORT") or "29500", "--nproc_per_node", str(processes)], variables
    return (["--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []), variables


@without_traceback
def main(argv: list[str]) -> None:
    """Run a program with the plan for this machine; end with the exit status of the rank that failed first."""
    arguments, variables = launch_plan(os.environ, torch.cuda.device_count(), os.cpu_count() or 1)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    if not arguments:
        os.execv(sys.executable, [sys.executable, *argv])
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)   # the failing rank has said what is wrong
    try:
        run(parse_args([*arguments, *argv]))
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)


def require_joined(num_processes: int) -> None:
    """Raise UserError when the launcher started more processes than accelerate joined: each would do the whole work alone."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise UserError(f"the launcher started {launched} processes, but accelerate sees {num_processes}: start through train.sh or "
                        "eval.sh, or set ACCELERATE_USE_CPU=true for torchrun on a CPU")


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


if __name__ == "__main__":
    main(sys.argv[1:])
