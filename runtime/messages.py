"""Messages to the user: one-sentence errors and notices, each printed once however many processes run."""

import errno
import functools
import json
import os
import sys
import time
from typing import IO


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what is wrong, why, and what to do."""


def say(message: str, stream: IO | None = None) -> None:
    """Print and flush, to stdout by default, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        _print(message, stream or sys.stdout)


def notice(message: str) -> None:
    """`say` on stderr."""
    say(message, sys.stderr)


def _print(message: str, stream: IO) -> None:
    """Print; where the reader of a pipe has ended (`| tee log` after Ctrl-C), continue without output."""
    try:
        print(message, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_rank() -> bool:
    """Whether runtime.launch started this process."""
    return os.environ.get("LAUNCHER_PID") == str(os.getppid())


def without_traceback(main):
    """Wrap a program's `main`: print a UserError as one line on stderr and exit with status 2; status 130 after Ctrl-C.

    A rank hands its sentence to the launcher, which prints the first one, after everything that other ranks print.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, OSError) as error:
            if isinstance(error, OSError):
                if error.errno != errno.ENAMETOOLONG:
                    raise
                error = f"{str(error.filename)[:80]}...: the name is too long for this disk; shorten it"
            # An error from a data loader worker is a printed traceback whose last line is the sentence.
            sentence = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.UserError: ")
            if is_rank():                                         # torch's elastic agent reads this file
                with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
                    json.dump({"message": sentence, "timestamp": int(time.time())}, file)
            else:
                _print(f"error: {sentence}", sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            notice("interrupted: give the same command again to continue")
            sys.exit(130)

    return wrapped
