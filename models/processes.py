"""The processes that share one run, as a launcher started them and accelerate joined them."""

import os

import torch

from models.errors import UserError


def require_joined(num_processes: int) -> None:
    """Raise UserError when the launcher started more processes than accelerate joined: each would do the whole work alone."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise UserError(f"the launcher started {launched} processes, but accelerate sees {num_processes}: start through train.sh or "
                        "eval.sh, or set ACCELERATE_USE_CPU=true for torchrun on a CPU")


def join_processes():
    """accelerate's PartialState: `process_index` of `num_processes`, `device`, `is_main_process`, `wait_for_everyone()`."""
    from accelerate import PartialState  # slow to import: only where processes are joined

    # Unlike Accelerator, PartialState does not look at ACCELERATE_USE_CPU, and joins nobody on a CPU unless told so.
    world = PartialState(cpu=not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
    require_joined(world.num_processes)
    return world
