"""The toy's words: captions from a scene's attributes, and back.

A scene is described by size, colour, shape, place and background; a caption may leave some of them out. What training
never sees is listed here: `HELD_OUT` combinations of attributes, and the phrasings `UNSEEN`.
"""

import re
from typing import NamedTuple

import numpy as np

# Attribute -> value -> its wordings.
WORDS = {
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "colour": {colour: (colour,) for colour in ("red", "yellow", "green", "blue")},
    "shape": {shape: (shape,) for shape in ("disc", "square", "triangle", "cross")},
    "place": {
        "upper left": ("at the upper left", "in the upper left"), "top": ("at the top",),
        "upper right": ("at the upper right", "in the upper right"), "left": ("at the left", "on the left"),
        "centre": ("in the centre", "in the middle"), "right": ("at the right", "on the right"),
        "lower left": ("at the lower left", "in the lower left"), "bottom": ("at the bottom",),
        "lower right": ("at the lower right", "in the lower right"),
    },
    "background": {"dark": ("dark",), "light": ("light",)},
}
PLACES = tuple(WORDS["place"])                          # three rows of three, in reading order
# A part in brackets goes with its attribute. Words occur in both lists, phrasings in one.
PHRASINGS = (
    "a [{size} ][{colour} ]{shape}[ {place}][ on a {background} background]",
    "[{place}, ]a [{size} ][{colour} ]{shape}[ on a {background} background]",
    "[on a {background} background, ]a [{size} ][{colour} ]{shape}[ {place}]",
    "there is a [{size} ][{colour} ]{shape}[ {place}][, {background} background]",
    "a picture of a [{size} ][{colour} ]{shape}[ {place}][, {background} background]",
    "a {shape}[ {place}][, {colour}][, {size}][, {background} background]",
)
UNSEEN = (
    "[{place} there is a ][{size} ][{colour} ]{shape}[ on a {background} background]",
    "[{background} background, ]a picture of a [{size} ][{colour} ]{shape}[ {place}]",
    "a {shape}[, {colour}][, {size}][, {place}][, {background} background]",
)


class Scene(NamedTuple):
    """A picture's attributes; None where a caption leaves one out."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None
    background: str | None = None

    def shows(self, other: "Scene") -> bool:
        """Whether everything that `other` names is true of this scene."""
        return all(theirs in (None, mine) for mine, theirs in zip(self, other, strict=True))


# Combinations that no training picture shows.
HELD_OUT = (
    Scene(size="small", colour="red", shape="cross"), Scene(size="large", colour="yellow", shape="disc"),
    Scene(size="small", colour="blue", shape="triangle"), Scene(size="large", colour="green", shape="square"),
    Scene(colour="red", shape="square", place="upper left"), Scene(colour="green", shape="disc", place="bottom"),
    Scene(colour="blue", shape="cross", place="right"), Scene(colour="yellow", shape="triangle", place="centre"),
)


# Kinds of captions: phrasings, and whether the picture is one of the held-out combinations.
KINDS = {"training": (PHRASINGS, False), "phrasings": (UNSEEN, False), "combinations": (PHRASINGS, True)}


def draw_scene(rng: np.random.Generator, index: int, held_out: bool = False) -> Scene:
    """The scene of picture `index`: the 16 kinds of shape, or the HELD_OUT combinations, in turn, else random."""
    kinds = HELD_OUT if held_out else [Scene(colour=c, shape=s) for c in WORDS["colour"] for s in WORDS["shape"]]
    kind = kinds[index % len(kinds)]
    while True:
        scene = Scene(*(value or str(rng.choice(list(WORDS[name]))) for name, value in kind._asdict().items()))
        if held_out or not any(scene.shows(other) for other in HELD_OUT):
            return scene


def describe(scene: Scene, phrasing: str, rng: np.random.Generator) -> str:
    """`scene` in the words of `phrasing`, each attribute in one of its wordings; None is left out."""
    words = {name: str(rng.choice(WORDS[name][value])) for name, value in scene._asdict().items() if value}
    words.setdefault("shape", "shape")

    def part(match: re.Match) -> str:
        return match[1] if re.search(r"{(\w+)}", match[1])[1] in words else ""

    return re.sub(r"\[(.*?)\]", part, phrasing).format(**words).strip(" ,")


def write_caption(scene: Scene, phrasings: tuple[str, ...], rng: np.random.Generator) -> str:
    """A caption of `scene` in one of `phrasings`; names most attributes."""
    named = {"size": 0.75, "colour": 0.9, "shape": 0.9, "place": 0.75, "background": 0.75}
    part = Scene(**{name: getattr(scene, name) for name, share in named.items() if rng.uniform() < share})
    return describe(part, str(rng.choice(phrasings)), rng)


def parse(caption: str) -> Scene:
    """The attributes that a caption names: the inverse of `describe`."""
    def value(name: str) -> str | None:
        return next((value for value, wordings in WORDS[name].items()
                     if any(re.search(rf"\b{wording}\b", caption) for wording in wordings)), None)
    return Scene(*map(value, Scene._fields))
