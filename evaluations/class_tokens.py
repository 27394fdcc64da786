"""Scores of REG's class tokens. Letters: N, M images, E encoder width, K classes."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evaluations.extraction import measure, place
from evaluations.features import Extractor
from evaluations.images import ImageSet
from models.encoders import load_encoders, sha256_of_parameters
from runtime.messages import UserError, notice
from runtime.npz import load_npz
from runtime.stores import shown


class ClassToken(nn.Module):
    """uint8 images (B, 3, R, R) -> the encoder's class token (B, E), as in training."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(images)[0]


def load_class_token_extractor(enc_type: str, device: torch.device, resolution: int, weights: str | None,
                               width: int) -> Extractor:
    """The encoder `enc_type` of the training, for images of `resolution` px and class tokens of `width` numbers.

    Raises UserError as `load_encoders` does, and for an encoder of another width.
    """
    encoder, = load_encoders(enc_type, "cpu", resolution, weights=weights, class_tokens=True)
    if encoder.embed_dim != width:
        raise UserError(f"--enc-type {enc_type}: has width {encoder.embed_dim}, the class tokens have {width} numbers; "
                        "name the encoder of the training")
    return Extractor(ClassToken(encoder).to(device), device, enc_type, sha256_of_parameters(encoder), None)


def read_class_tokens(path: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated class tokens (N, E) and labels (N,), -1 without (captions). Raises UserError unless N is `count`."""
    found = {"labels": np.full(count, -1)} | load_npz(path, ("class_tokens", "labels"))
    if len(found) < 2:
        raise UserError(f"{shown(path)}: has no class_tokens; name a file of generate.py --save-cls-tokens")
    tokens, labels = found["class_tokens"], found["labels"]
    if tokens.dtype.kind != "f" or labels.dtype.kind not in "iu" or not np.isfinite(tokens).all():
        raise UserError(f"{shown(path)}: class tokens of {tokens.dtype} and labels of {labels.dtype}, or not finite; "
                        "write the file again with generate.py --save-cls-tokens")
    if tokens.ndim != 2 or len(tokens) != count or labels.shape != (count,):
        raise UserError(f"{shown(path)}: class tokens {tokens.shape} and labels {labels.shape} for {count} images; "
                        "name the file of the same run")
    return torch.from_numpy(tokens).float(), torch.from_numpy(labels).long()


def nearest_mean_accuracy(tokens: torch.Tensor, labels: torch.Tensor, known: torch.Tensor,
                          known_labels: torch.Tensor) -> tuple[float, int]:
    """Share of tokens (N, E) whose nearest class mean (Euclidean, float64) is that of their label, and K.

    The K means are of known (M, E) with their labels; tokens of classes without a mean are left out.
    """
    classes, index = known_labels.unique(return_inverse=True)                     # (K,), (M,)
    means = torch.zeros(len(classes), known.shape[1], dtype=torch.float64).index_add_(0, index, known.double())
    means /= index.bincount(minlength=len(classes))[:, None]                      # (K, E)
    counted = torch.isin(labels, classes)
    nearest = classes[torch.cdist(tokens[counted].double(), means).argmin(dim=1)]
    return float((nearest == labels[counted]).double().mean()), len(classes)


def class_token_scores(tokens: torch.Tensor, labels: torch.Tensor, extractor: Extractor, ref: ImageSet,
                       sample: ImageSet, batch_size: int) -> dict | None:
    """Compare generated class tokens (N, E) with the encoder's tokens of the sample's images, and with the labels (N,).

    `class_token_cosine`: mean cosine similarity. `class_token_accuracy`: nearest class mean of the encoder's tokens of
    the reference, if it has labels. Returns them on the first process; None on others.
    """
    seen = measure(sample, extractor, batch_size, {"pooled"}).pooled              # (N, E)
    labelled = ref.labels is not None and ref.blocks is not None
    known = measure(ref, extractor, batch_size, {"pooled"}).pooled if labelled else None
    if place()[0] != 0:
        return None
    scores = {"class_token_cosine": float(F.cosine_similarity(tokens.double(), seen.cpu().double()).mean())}
    if known is None:
        notice(f"without class_token_accuracy: {ref.name} has no labels (arr_1 in an npz, dataset.json in a folder)")
    elif not np.isin(labels, ref.labels).any():
        notice(f"without class_token_accuracy: {ref.name} has no image of any class that was generated")
    else:
        accuracy, classes = nearest_mean_accuracy(tokens, labels, known.cpu(), torch.from_numpy(ref.labels))
        scores |= {"class_token_accuracy": accuracy, "class_token_classes": classes}
    return scores | {"class_token_encoder": extractor.name, "class_token_encoder_sha256": extractor.weights_sha256}
