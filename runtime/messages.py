"""What is said to the user: a mistake that ends the program in one sentence, and notices, each once however many processes run."""

import functools
import os
import sys
import time
from typing import IO


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what came, what was expected, what to do."""


def say(message: str, stream: IO | None = None) -> None:
    """Print at once, to stdout by default, by the first process only."""
    if os.environ.get("RANK", "0") == "0":
        _print(message, stream or sys.stdout)


def _print(message: str, stream: IO) -> None:
    """Where nobody reads any more (`| tee log` after Ctrl-C), the program goes on in silence."""
    try:
        print(message, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def notice(message: str) -> None:
    """`say` on stderr."""
    say(message, sys.stderr)


def without_traceback(main):
    """Wrap a program's `main`: a UserError ends it with its sentence on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # What stops every process is said by the first, whose end makes the launcher stop the others while they wait here.
            time.sleep(0 if os.environ.get("LOCAL_RANK", "0") == "0" else 3)
            # A data loader worker hands its error over as a printed traceback, whose last line is the sentence.
            sentence = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.UserError: ")
            _print(f"error: {sentence}", sys.stderr)
            sys.exit(2)
        except RuntimeError as error:
            if "by peer" not in str(error) or os.environ.get("WORLD_SIZE", "1") == "1":  # a connection that another process closed
                raise
            if "SUPERVISED" not in os.environ:                    # runtime.launch knows it, and that one has said why
                time.sleep(5)
                _print("error: another process ended in the middle of the work, and this one with it: see what it said", sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            notice("interrupted: the same command goes on from what is whole")
            sys.exit(130)

    return wrapped
