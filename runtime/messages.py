"""Messages to the user: one-sentence errors and notices, each printed once however many processes run."""

import errno
import functools
import json
import os
import sys
import time
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from typing import IO


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what is wrong, why, and what to do."""

    status = 2                                                    # of the program that it ends


class MayPass(UserError):
    """A failure whose cause may pass: the same command may succeed later."""

    status = 75                                                   # as runtime.stopping.STOPPED


class Unfailing:
    """A text stream that never raises: what cannot be written is lost, an unknown character is replaced.

    For a log on a full disk, a terminal that is gone, or a pipe whose reader has ended (`| tee log` after Ctrl-C).
    """

    def __init__(self, stream: IO | None):
        self.stream = stream or open(os.devnull, "w")             # noqa: SIM115  (None: closed, as by `>&-`)
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def close(self) -> None:
        """Flush, or drop what cannot be written: the interpreter would try again, and exit with status 120."""
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def say(message: str, stream: IO | None = None) -> None:
    """Print and flush, to stdout by default, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=stream or sys.stdout, flush=True)


def notice(message: str) -> None:
    """`say` on stderr."""
    say(message, sys.stderr)


def is_rank() -> bool:
    """Whether runtime.launch started this process."""
    return os.environ.get("LAUNCHER_PID") == str(os.getppid())


def without_traceback(main):
    """Wrap a program's `main`: print a UserError as one line on stderr and exit with its status; 130 after Ctrl-C.

    Nothing that is printed ends the program. A rank hands its sentence to the launcher, which prints the first one,
    after everything that other ranks print.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        out, err = Unfailing(sys.stdout), Unfailing(sys.stderr)
        with closing(out), closing(err), redirect_stdout(out), redirect_stderr(err):
            try:
                return main(*args, **kwargs)
            except (UserError, OSError, MemoryError, RuntimeError) as error:
                torchs = "DefaultCPUAllocator" in str(error) or type(error).__name__ == "OutOfMemoryError"
                if isinstance(error, RuntimeError) and not torchs:
                    raise
                if isinstance(error, MemoryError | RuntimeError):
                    reason = str(error).partition("\n")[0][:200]
                    error = UserError(f"not enough memory ({reason}); ask for less at a time, or use a larger machine")
                if isinstance(error, OSError):
                    if error.errno != errno.ENAMETOOLONG:
                        raise
                    error = UserError(f"{str(error.filename)[:80]}...: the name is too long for this disk; shorten it")
                # An error from a data loader worker is a printed traceback whose last line is the sentence.
                last = str(error).strip().splitlines()[-1]
                sentence = last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
                if is_rank():                                     # torch's elastic agent reads this file
                    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
                        json.dump({"message": sentence, "timestamp": int(time.time())}, file)
                else:
                    print(f"error: {sentence}", file=sys.stderr)
                sys.exit(error.status)
            except KeyboardInterrupt:
                notice("interrupted: give the same command again to continue")
                sys.exit(130)

    return wrapped
