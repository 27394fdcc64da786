"""The one exception that means: the user can mend this, and the message says how."""

import functools
import os
import sys


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what came, what was expected, what to do."""


def without_traceback(main):
    """Wrap a program's `main`: a UserError ends it with its sentence on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # A data loader worker hands its error over as a printed traceback, whose last line is the sentence.
            sentence = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.UserError: ")
            print(f"error: {sentence}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def require_joined(num_processes: int) -> None:
    """Raise UserError when the launcher started more processes than accelerate joined: each would do the whole work alone."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise UserError(f"the launcher started {launched} processes, but accelerate sees {num_processes}: start through train.sh or "
                        "eval.sh, or set ACCELERATE_USE_CPU=true for torchrun on a CPU")
