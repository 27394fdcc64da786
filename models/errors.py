"""The one exception that means: the user can mend this, and the message says how."""

import functools
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
