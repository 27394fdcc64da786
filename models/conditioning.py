"""What an image is asked to show: class labels or captions, two implementations of one interface.

    draw(index, rng)     what image `index` shows, from its own generator: a label or a caption
    embed(shown)         what the network sees of a batch (B, ...); `argument` is its name in the network's forward
    null(n)              its unconditional counterpart (n, ...), for guidance
    drop(embedded, p)    training: a share p replaced by the null condition; of labels the network does that itself

What trains, samples, guides and scores uses this interface; only the programs that open a condition tell the two apart.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from models.text import DEFAULT, TextEncoder
from runtime.messages import UserError


@dataclass(frozen=True)
class ClassLabels:
    """Class labels for models.sit.SiT. The network itself drops them in training (`class_dropout_prob`)."""

    num_classes: int                         # also the null label
    labels: str = "random"                   # random: uniform from (seed, i) · balanced: i modulo the number of classes
    classes: tuple[int, ...] | None = None   # in turn, instead of all classes
    seen: tuple[int, ...] | None = None      # the classes that exist, if the training data lacked others
    device: torch.device | str = "cpu"

    argument: ClassVar[str] = "y"
    published: ClassVar[dict] = {"cfg_scale": 2.3, "guidance_high": 0.85}
    count: ClassVar[int] = 50_000            # samples of a published score

    def draw(self, index: int, rng: np.random.Generator) -> int:
        """The label of image `index`; a random one is the first draw of its generator."""
        among = self.seen or range(self.num_classes)
        drawn = int(rng.integers(len(among)))  # drawn in every mode, so that image i's noise does not depend on it
        if self.classes is not None:
            return self.classes[index % len(self.classes)]
        return among[index % len(among) if self.labels == "balanced" else drawn]

    def embed(self, shown: Sequence[int] | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(shown).to(self.device, non_blocking=True)                  # (B,)

    def null(self, n: int) -> torch.Tensor:
        return torch.full((n,), self.num_classes, device=self.device)                     # (n,)

    def drop(self, embedded: torch.Tensor, share: float) -> torch.Tensor:
        return embedded

    def settings(self) -> dict:
        """What decides which image shows what, for settings.json."""
        return {"labels": self.labels, "classes": self.classes, "seen": self.seen}

    def record(self) -> dict:
        """What a checkpoint says of the condition."""
        return {"classes": list(self.seen)} if self.seen else {}

    def __str__(self) -> str:
        return f"{self.num_classes} classes"


@dataclass(frozen=True)
class Captions:
    """Captions for models.mmdit.MMDiT, as the states of a frozen text encoder.

    An entry of `prompts` is one caption, or several of one image with line breaks between them.
    """

    prompts: Sequence[str]
    encoder: TextEncoder | None              # None: not loaded yet, `embed` is impossible
    null_states: torch.Tensor | None         # (L, W), of the empty caption
    order: str = "random"                    # random: uniform from (seed, i) · in-order: image i shows prompt i
    per_prompt: int = 1                      # images of one prompt, in a row
    source: str | None = None                # the text encoder's SHA-256, or its name where no checkpoint recorded it

    argument: ClassVar[str] = "context"
    published: ClassVar[dict] = {"cfg_scale": 2.0, "guidance_high": 1.0}      # REPA's for COCO
    count: ClassVar[int] = 30_000

    def draw(self, index: int, rng: np.random.Generator) -> str:
        """The caption of image `index`; the first two draws of its generator choose an entry and one of its captions.

        Both are drawn in every mode, so that image i's noise does not depend on the prompts.
        """
        first, second = rng.random(2)
        count = len(self.prompts)
        among = self.prompts[int(first * count) if self.order == "random" else index // self.per_prompt % count]
        among = among.split("\n")
        return among[int(second * len(among))]

    def embed(self, shown: Sequence[str]) -> torch.Tensor:
        """Text states (B, L, W) of one caption of each entry, drawn from PyTorch's generator where there are several.

        Those of the training data are drawn so at each access, from the run's own randomness.
        """
        choices = [entry.split("\n") for entry in shown]
        captions = [among[int(torch.randint(len(among), ())) if len(among) > 1 else 0] for among in choices]
        return self.encoder.states(captions)                                              # (B, L, W)

    def null(self, n: int) -> torch.Tensor:
        return self.null_states.expand(n, -1, -1)                                         # (n, L, W)

    def drop(self, embedded: torch.Tensor, share: float) -> torch.Tensor:
        """Replace all states of a caption with those of the empty one, with probability `share`."""
        dropped = torch.rand(len(embedded), device=embedded.device) < share               # (B,)
        return torch.where(dropped[:, None, None], self.null_states, embedded)

    def settings(self) -> dict:
        digest = hashlib.sha256("\0".join(self.prompts).encode(errors="surrogateescape")).hexdigest()
        return {"captions": self.order, "prompts": len(self.prompts), "prompts_sha256": digest,
                "samples_per_prompt": self.per_prompt, "text_encoder": self.source}

    def record(self) -> dict:
        return {"text": {"encoder": self.encoder.name, "sha256": self.encoder.sha256, "length": self.encoder.length,
                         "width": self.encoder.width, "null": self.null_states.cpu()}}

    def __str__(self) -> str:
        return f"captions through {self.encoder.name}"


Conditions = ClassLabels | Captions


def open_captions(prompts: Sequence[str], name: str | None, length: int | None, device: torch.device,
                  recorded: dict | None, path: Path | None = None, width: int | None = None, **how) -> Captions:
    """Captions with a text encoder that gives `length` states, by default as many as it can, of `width` if given.

    If the checkpoint `path` has `recorded` its own, it is that; of the same files, `name` may be another place of them.
    Raises UserError if the encoder cannot be loaded, is not the one recorded, or gives states of another width.
    """
    recorded = recorded or {}
    encoder = TextEncoder(name or recorded.get("encoder", DEFAULT), device, recorded.get("length", length))
    width = recorded.get("width", width)
    if width not in (None, encoder.width):
        raise UserError(f"--text-encoder {encoder.name}: gives states of width {encoder.width}, {path} was trained "
                        f"with {width}; use its own text encoder")
    if encoder.sha256 != recorded.get("sha256", encoder.sha256):
        raise UserError(f"--text-encoder {encoder.name}: other weights or another vocabulary than {path} was trained "
                        "with; use its own text encoder")
    null = recorded["null"].to(device) if recorded else encoder.states([""])[0]           # (L, W)
    return Captions(prompts, encoder, null, source=encoder.sha256, **how)
