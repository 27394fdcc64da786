"""Scores of one checkpoint on the toy: the distance to a fresh draw, what the samples show, and the class token beside its image.

The network that measures (`toy/networks/features`, a small ResNet) is not the encoder that REPA and REG align to: a model taught to
please an encoder may be nearer to the data in that encoder's own eyes than in any other's.
Letters: N samples, M reference images, F features, E encoder width, K classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from evaluations.class_tokens import ClassToken, nearest_mean_accuracy
from evaluations.features import TimmFeatures
from evaluations.metrics import frechet_distance, gaussian_statistics, precision_recall
from models import checkpoint
from models.encoders import LOCAL, load_encoder
from models.sit import SiT
from models.vae import Codec, load_codec
from runtime.speed import full_precision
from samplers import Sampling, sample_images
from toy.agreement import FEATURES, class_of, embed
from toy.draw import draw_many

ENCODER = f"{LOCAL}toy/networks/encoder"      # as train.sh's recipe names it
BLOCK = 256                                   # images that are sampled at a time
SHOWN = (0, 5, 10, 15, 3, 6, 9, 12)           # of them kept for the pictures: each shape and each colour, by balanced labels
NEIGHBOURS = 5                                # training images shown beside a generated class token


@dataclass(frozen=True)
class Judge:
    """Everything that a sample is measured with, on `device`; made once for all checkpoints."""

    device: torch.device
    features: TimmFeatures
    reference: torch.Tensor       # (M, F), features of the fresh draw
    codec: Codec
    encoder: torch.nn.Module      # uint8 images -> class token (B, E)
    known: torch.Tensor           # (T, E), the encoder's class tokens of the training images
    known_labels: torch.Tensor    # (T,)


def open_judge(reference: torch.Tensor, training: torch.Tensor, training_labels: torch.Tensor, device: torch.device) -> Judge:
    """Load the toy's networks, and look at the reference (M, 3, R, R) and the training images (T, 3, R, R), both uint8."""
    features = TimmFeatures.load(FEATURES).eval().to(device)
    encoder = ClassToken(load_encoder(ENCODER, device, reference.shape[-1]))
    return Judge(device, features, embed(features, reference, device), load_codec(str(FEATURES.parent / "vae"), device), encoder,
                 embed(encoder, training, device), training_labels)


@torch.inference_mode()
def draw_samples(model: SiT, judge: Judge, count: int, how: Sampling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Images uint8 (N, 3, R, R), labels (N,), class tokens (N, E) or None; label and noise of image i are those of every model."""
    with full_precision(judge.device):
        blocks = [sample_images(model, judge.codec, range(start, min(start + BLOCK, count)), how) for start in range(0, count, BLOCK)]
    images, labels, tokens = zip(*blocks, strict=True)
    return torch.cat(images), torch.cat(labels), None if tokens[0] is None else torch.cat(tokens)


def distance(judge: Judge, features: torch.Tensor) -> float:
    """The Frechet distance of features (N, F) to the fresh draw."""
    return frechet_distance(*gaussian_statistics(features), *gaussian_statistics(judge.reference))


def image_scores(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Distance, the share of images that show the class asked for, precision and recall of images (N, 3, R, R)."""
    features = embed(judge.features, images, judge.device)                                # (N, F)
    precision, recall = precision_recall(judge.reference, features, "exact")
    return {"distance": distance(judge, features), "class_agreement": share(class_of(judge.features, features) == labels),
            "precision": precision, "recall": recall}


def token_scores(judge: Judge, tokens: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How well class tokens (N, E) fit their images (N, 3, R, R) and labels (N,).

    `token_cosine`: to the encoder's token of the decoded image; `token_cosine_other`: to that of the next image of the same label,
    which is what the label alone would give; `token_agreement`: the nearest mean of the training images' tokens by class is the
    label's; `token_nearest`: cosine to the nearest token of a training image.
    """
    seen = embed(judge.encoder, images, judge.device)                                     # (N, E)
    return {"token_cosine": cosine(tokens, seen), "token_cosine_other": cosine(tokens, seen[next_of_label(labels)]),
            "token_agreement": nearest_mean_accuracy(tokens, labels, judge.known, judge.known_labels)[0],
            "token_nearest": nearest(tokens, judge.known)[0][:, 0].mean().item()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean cosine of the rows of a and b, both (N, E)."""
    return F.cosine_similarity(a.double(), b.double()).mean().item()


def share(true: torch.Tensor) -> float:
    return true.double().mean().item()


def next_of_label(labels: torch.Tensor) -> torch.Tensor:
    """For each image the index of the next one of its label, the last one's being the first; labels (N,) -> (N,)."""
    result = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        result[members] = members.roll(-1)
    return result


def nearest(tokens: torch.Tensor, known: torch.Tensor, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines to, and indices of, the `count` nearest rows of known (T, E) for each of tokens (N, E), both (N, count)."""
    found = (F.normalize(tokens.double()) @ F.normalize(known.double()).T).topk(count, dim=1)
    return found.values, found.indices


def score_checkpoint(path: Path, judge: Judge, count: int, how: Sampling) -> tuple[dict, dict[str, torch.Tensor]]:
    """The scores of a checkpoint's EMA samples, and what the pictures show of them: `images` (S, 3, R, R), S = len(SHOWN), of a
    model with a class-token slot also `neighbours` (S, NEIGHBOURS), the training images nearest to the generated class tokens."""
    images, labels, tokens = draw_samples(checkpoint.build_for_sampling(checkpoint.read(path)).to(judge.device), judge, count, how)
    shown = {"images": images[list(SHOWN)]}
    scores = image_scores(judge, images, labels)
    if tokens is not None:
        scores |= token_scores(judge, tokens, images, labels)
        shown["neighbours"] = nearest(tokens[list(SHOWN)], judge.known, NEIGHBOURS)[1]
    return scores, shown


def repeated_distances(path: Path, judge: Judge, count: int, how: list[Sampling]) -> list[float]:
    """The distance of one checkpoint's samples for each of several samplings: how far the noise alone moves it."""
    model = checkpoint.build_for_sampling(checkpoint.read(path)).to(judge.device)
    return [distance(judge, embed(judge.features, draw_samples(model, judge, count, one)[0], judge.device)) for one in how]


def real_scores(judge: Judge, count: int, resolution: int, seeds: list[int]) -> dict:
    """What no model can beat: scores of real images that nobody has seen, as drawn and as the VAE decodes them again.

    The first seed's draw is scored in full; `distances` has one number per seed, which says how far `count` images move it.
    """
    draws = []
    for seed in seeds:
        drawings = draw_many(seed, count, resolution)
        images = torch.from_numpy(np.stack([drawing.image for drawing in drawings])).permute(0, 3, 1, 2).contiguous()
        draws.append((images, torch.tensor([drawing.label for drawing in drawings])))
    images, labels = draws[0]
    decoded = through_vae(judge.codec, images, judge.device)
    tokens = embed(judge.encoder, images, judge.device)
    return {
        "drawn": image_scores(judge, images, labels) | token_scores(judge, tokens, images, labels),
        "decoded": image_scores(judge, decoded, labels) | token_scores(judge, tokens, decoded, labels),
        "distances": [distance(judge, embed(judge.features, images, judge.device)) for images, _ in draws],
    }


@torch.inference_mode()
def through_vae(codec: Codec, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images (N, 3, R, R), encoded to the mean of their latents and decoded again."""
    decoded = []
    with full_precision(device):
        for part in images.split(BLOCK):
            moments = codec.encode(part.to(device))                                       # (B, 2C, H, W)
            decoded.append(codec.decode(codec.space.latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))).cpu())
    return torch.cat(decoded)
