"""What is said to the user: a mistake that ends the program in one sentence, and notices, each once however many processes run."""

import functools
import os
import sys
import time


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what came, what was expected, what to do."""


def notice(message: str) -> None:
    """Say something on stderr, by the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


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
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            sys.exit(2)
        except RuntimeError as error:
            if "by peer" not in str(error) or os.environ.get("WORLD_SIZE", "1") == "1":  # a connection that another process closed
                raise
            time.sleep(5)                                         # that one has said why, and the launcher is stopping this one
            print("error: another process ended in the middle of the work, and this one with it: see what it said", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            notice("interrupted: the same command goes on from what is whole")
            sys.exit(130)

    return wrapped
