"""argparse with ranges in the flag's type, and errors of one line: `--flag VALUE: reason`."""

import argparse
import math
import re
from collections.abc import Callable
from typing import NoReturn

SINGLE = 1.2e-38, 3.4e38     # the smallest and the largest number that float32 holds in full


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose help shows defaults, whose flags are not abbreviated, and whose errors are one line."""

    def __init__(self, *args, **settings):
        form = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(*args, **{"formatter_class": form, "allow_abbrev": False} | settings)

    def error(self, message: str) -> NoReturn:
        message = re.sub("^argument ([^ ]+): ", r"\1 ", message)
        self.exit(2, f"error: {message} (see --help)\n")


class Released(argparse.Action):
    """A flag of the released programs that sets nothing: with `instead`, an error that says what to use; else taken."""

    def __init__(self, *args, instead: str | None = None, **settings):
        super().__init__(*args, **{"nargs": "?", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS} | settings)
        self.instead = instead

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if self.instead is not None:
            parser.error(f"{option_string}: {self.instead}")


def at_least(least: int, most: int = 10**18 - 1) -> Callable[[str], int]:
    """A type for whole numbers from `least` to `most`."""

    def whole(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not least <= int(text) <= most:
            limit = f" and at most {most}" * (most < 10**18 - 1)
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least {least}{limit}")
        return int(text)

    return whole


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    """Also refuses what float32, in which networks compute, makes infinite or 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value != 0 and not SINGLE[0] <= abs(value) <= SINGLE[1]:                           # nan, too
        expected = f"{expected}, finite in float32"
    elif fits(value):
        return value
    raise argparse.ArgumentTypeError(f"{text}: expected {expected}")


def not_negative(text: str) -> float:
    """A type for finite numbers >= 0."""
    return _number(text, "a number of at least 0", lambda value: value >= 0)


def positive(text: str) -> float:
    """A type for finite numbers > 0."""
    return _number(text, "a number above 0", lambda value: value > 0)


def time_shift(text: str) -> float | str:
    """A type for shifts of time: a number from 0.001 to 1000, or `auto`."""
    wanted = "a number from 0.001 to 1000, or auto"
    return text if text == "auto" else _number(text, wanted, lambda value: 1e-3 <= value <= 1e3)


def epsilon(text: str) -> float:
    """A type for numbers above 0, up to 1."""
    return _number(text, "a number above 0, up to 1", lambda value: 0 < value <= 1)


def share(text: str) -> float:
    """A type for numbers in [0, 1]."""
    return _number(text, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def guidance(text: str) -> float:
    """A type for guidance scales: numbers from -100 to 100; published ones are below 10."""
    return _number(text, "a number from -100 to 100", lambda value: abs(value) <= 100)


def below_one(text: str) -> float:
    """A type for numbers in [0, 1): a decay of 1 would never change anything."""
    return _number(text, "a number from 0 to below 1", lambda value: 0 <= value < 1)
