"""argparse with ranges in the flag's type, and errors of one line: `--flag VALUE: reason`."""

import argparse
import math
import re
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose help shows defaults, whose flags are not abbreviated, and whose errors are one line."""

    def __init__(self, *args, **settings):
        form = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(*args, **{"formatter_class": form, "allow_abbrev": False} | settings)

    def error(self, message: str) -> NoReturn:
        message = re.sub("^argument ([^ ]+): ", r"\1 ", message)
        self.exit(2, f"error: {message} (see --help)\n")


def at_least(least: int) -> Callable[[str], int]:
    """A type for whole numbers from `least` on."""

    def whole(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least {least}")
        return int(text)

    return whole


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not fits(value):
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
    return value


def finite(text: str) -> float:
    """A type for numbers that are neither infinite nor nan."""
    return _number(text, "a finite number", lambda value: True)


def not_negative(text: str) -> float:
    """A type for finite numbers >= 0."""
    return _number(text, "a number of at least 0", lambda value: value >= 0)


def positive(text: str) -> float:
    """A type for finite numbers > 0."""
    return _number(text, "a number above 0", lambda value: value > 0)


def share(text: str) -> float:
    """A type for numbers in [0, 1]."""
    return _number(text, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def below_one(text: str) -> float:
    """A type for numbers in [0, 1): a decay of 1 would never change anything."""
    return _number(text, "a number from 0 to below 1", lambda value: 0 <= value < 1)
