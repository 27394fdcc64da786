"""Remake the toy's three frozen networks from freshly drawn images, on a GPU or on two CPU cores.

    python -m toy.train_networks --dest toy/networks

features/   a small ResNet, the witness: it judges class agreement and gives the features of the Fréchet distance
vae/        a diffusers AutoencoderKL, 32 px pictures <-> latents (4, 8, 8)
encoder/    a timm ViT: class token and 4 x 4 patch tokens, the target of REG's alignment and the partner of its latents

Each is an ordinary folder, as diffusers or timm would save it, with weights rounded to float16 to keep the repository small.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from evaluations.features import TimmFeatures
from models.vae import load_codec
from runtime.messages import UserError, without_traceback
from toy.agreement import FEATURES, predict
from toy.draw import ATTRIBUTES, CLASSES, RESOLUTION, draw_many

TRAIN_SEED, TEST_SEED = 1000, 2000       # apart from the seeds of the data set (0) and of its reference (1)
NORMALISE = {"mean": [0.5] * 3, "std": [0.5] * 3}
KL_WEIGHT = 3e-4                          # per latent, against the mean absolute error of a pixel in [-1, 1]

FEATURES_CONFIG = {
    "architecture": "resnet18",
    "num_classes": len(CLASSES),
    "num_features": 128,
    "model_args": {"layers": [1, 1, 1, 1], "channels": [24, 48, 96, 128]},
    # 64 pixels, so that the last of the ResNet's five halvings still sees 2 x 2
    "pretrained_cfg": {"input_size": [3, 64, 64], "interpolation": "bilinear", "first_conv": "conv1", "classifier": "fc", **NORMALISE},
}
ENCODER_CONFIG = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "num_features": 128,
    "model_args": {"img_size": RESOLUTION, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "pretrained_cfg": {"input_size": [3, RESOLUTION, RESOLUTION], "interpolation": "bicubic", "first_conv": "patch_embed.proj",
                       "classifier": "head", **NORMALISE},
}
VAE_ARGS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": RESOLUTION,
}

README = """# The toy's frozen networks

Made by `python -m toy.train_networks` from drawn images (`toy/draw.py`), nothing else; stored as float16, loaded as float32.
`vae/` is a diffusers AutoencoderKL, `encoder/` and `features/` are timm models (`local-dir:`).
Made on {machine}; another machine gives networks of the same quality, not the same bits. Figures, on images drawn with a seed of their own:

"""


@dataclass(frozen=True)
class Pictures:
    """Drawn images and what they were drawn from, on the training device."""

    images: torch.Tensor      # uint8 (N, 3, R, R)
    labels: torch.Tensor      # int64 (N,)
    coverage: torch.Tensor    # float32 (N, 1, R, R)
    attributes: torch.Tensor  # float32 (N, A), standardised


def draw_pictures(seed: int, count: int, device: torch.device) -> Pictures:
    drawings = draw_many(seed, count, progress=True)
    attributes = torch.from_numpy(np.stack([d.attributes for d in drawings]))
    return Pictures(
        images=torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2).contiguous().to(device),
        labels=torch.tensor([d.label for d in drawings], device=device),
        coverage=torch.from_numpy(np.stack([d.coverage for d in drawings]))[:, None].to(device),
        attributes=((attributes - attributes.mean(0)) / attributes.std(0)).to(device),
    )


def prepare(images: torch.Tensor, pretrained_cfg: dict) -> torch.Tensor:
    """uint8 images (B, 3, R, R) -> a timm network's input, resized and normalised as its `pretrained_cfg` says."""
    x = F.interpolate(images.float() / 255, size=tuple(pretrained_cfg["input_size"][1:]), mode="bilinear")
    mean, std = (torch.tensor(pretrained_cfg[key], device=x.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std


def fit(name: str, parameters: list[nn.Parameter], batches: Iterator[torch.Tensor], loss: Callable, steps: int, lr: float) -> None:
    """AdamW with a short warm-up and a cosine decay over `steps`; `loss(indices)` -> {name: term}, their sum is minimised."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(1, steps + 1):
        terms = loss(next(batches))
        optimiser.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            values = "  ".join(f"{key} {value.item():.4f}" for key, value in terms.items())
            print(f"{name} {step}/{steps}  {values}  {time.time() - start:.0f} s", flush=True)


def batches_of(count: int, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Endless batches of indices below `count`, each epoch in another order."""
    while True:
        yield from torch.randperm(count, device=device).split(size)[: count // size]


def train_features(data: Pictures, steps: int) -> nn.Module:
    """Classification under mild noise, blur and change of brightness, so that a decoder's softness does not mislead it."""
    network = timm.create_model(FEATURES_CONFIG["architecture"], num_classes=len(CLASSES), **FEATURES_CONFIG["model_args"])
    network.to(data.images.device).train()

    def loss(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x = prepare(data.images[index], FEATURES_CONFIG["pretrained_cfg"])                # (B, 3, 64, 64)
        each = torch.rand(4, len(x), 1, 1, 1, device=x.device)
        x = torch.lerp(x, F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False), each[0])
        x = x * (0.85 + 0.3 * each[1]) + 0.2 * (each[2] - 0.5) + 0.1 * each[3] * torch.randn_like(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = network(x)
        return {"class": F.cross_entropy(logits.float(), data.labels[index], label_smoothing=0.05)}

    fit("features", list(network.parameters()), batches_of(len(data.images), 128, data.images.device), loss, steps, lr=2e-3)
    return network.eval()


def train_vae(data: Pictures, steps: int) -> AutoencoderKL:
    """Absolute error and a small KL term; afterwards `scaling_factor` = 1 / std of sampled latents, so that they have unit std."""
    vae = AutoencoderKL(**VAE_ARGS).to(data.images.device).train()

    def loss(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x = data.images[index] / 127.5 - 1                                                # (B, 3, R, R)
        with torch.autocast(x.device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            pixels = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()                   # (B, C, H, W)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"pixels": (pixels.float() - x).abs().mean(), "kl": KL_WEIGHT * kl}

    fit("vae", list(vae.parameters()), batches_of(len(data.images), 32, data.images.device), loss, steps, lr=2e-3)
    vae.eval()
    with torch.inference_mode():
        parts = [vae.encode(part / 127.5 - 1).latent_dist.sample() for part in data.images[:4096].split(256)]
    vae.register_to_config(scaling_factor=round(1 / torch.cat(parts).std().item(), 4))
    return vae


def train_encoder(data: Pictures, steps: int) -> nn.Module:
    """The class token must tell class and attributes, the patch tokens what is where. The heads are thrown away."""
    encoder = timm.create_model(ENCODER_CONFIG["architecture"], num_classes=0, **ENCODER_CONFIG["model_args"])
    encoder.to(data.images.device).train()
    # An identity LayerNorm at the end gives class tokens of unit mean square: REG mixes them, unscaled, with unit noise.
    encoder.norm.requires_grad_(False)
    width, cells = encoder.embed_dim, 2 * RESOLUTION // encoder.patch_embed.patch_size[0]
    heads = nn.ModuleDict({
        "class": nn.Linear(width, len(CLASSES)),
        "attributes": nn.Linear(width, len(ATTRIBUTES)),
        "patch_class": nn.Linear(width, len(CLASSES)),
        "patch_cells": nn.Linear(width, 2 * 2 * 4),       # coverage and colour of the 2 x 2 quarters of a patch
    }).to(data.images.device)

    def loss(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x, labels = prepare(data.images[index], ENCODER_CONFIG["pretrained_cfg"]), data.labels[index]
        with torch.autocast(x.device.type, torch.bfloat16):
            features = encoder.forward_features(x)                                        # (B, 1 + N, E)
            token, patches = features[:, 0], features[:, 1:]
            out = {name: head(patches if name.startswith("patch") else token).float() for name, head in heads.items()}
        seen = F.adaptive_avg_pool2d(torch.cat([2 * data.coverage[index] - 1, x], dim=1), cells)    # (B, 4, 2h, 2w)
        target = F.pixel_unshuffle(seen, 2).flatten(2).mT                                 # (B, N, 16)
        return {
            "class": 0.25 * F.cross_entropy(out["class"], labels, label_smoothing=0.05),
            "attributes": F.mse_loss(out["attributes"], data.attributes[index]),
            "patch_class": 0.25 * F.cross_entropy(out["patch_class"].mean(dim=1), labels, label_smoothing=0.05),
            "patch_cells": 2 * F.mse_loss(out["patch_cells"], target),
        }

    parameters = [p for p in [*encoder.parameters(), *heads.parameters()] if p.requires_grad]
    fit("encoder", parameters, batches_of(len(data.images), 128, data.images.device), loss, steps, lr=1e-3)
    return encoder.eval()


def save_timm(network: nn.Module, config: dict, folder: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads; timm casts back to float32."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / "partial.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(folder / "partial.safetensors", folder / "model.safetensors")


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Write a folder that `AutoencoderKL.from_pretrained` reads; diffusers casts back to float32."""
    unfinished = folder.with_name("vae.partial")
    vae.half().save_pretrained(unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    for file in unfinished.iterdir():
        os.replace(file, folder / file.name)
    unfinished.rmdir()


def measure(dest: Path) -> list[str]:
    """What the three saved networks do on images that none of them has seen, one line each."""
    torch.manual_seed(TEST_SEED)
    test = draw_pictures(TEST_SEED, 2048, torch.device("cpu"))
    features, codec = TimmFeatures.load(dest / "features").eval(), load_codec(str(dest / "vae"))
    moments = torch.cat([codec.encode(part) for part in test.images.split(256)])          # (N, 2C, H, W)
    latents = codec.space.latents(moments, torch.randn_like(moments.chunk(2, dim=1)[0]))
    decoded = torch.cat([codec.decode(part) for part in latents.split(256)])
    error = (decoded.float() - test.images.float()).square().mean().item()
    predicted, predicted_again = predict(features, test.images), predict(features, decoded)

    encoder = timm.create_model(f"local-dir:{dest / 'encoder'}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        tokens = torch.cat([encoder.forward_features(prepare(part, encoder.pretrained_cfg)) for part in test.images.split(256)])
    token, half = tokens[:, 0].double(), len(tokens) // 2
    inputs = torch.cat([token, torch.ones(len(token), 1)], dim=1)
    targets = torch.cat([F.one_hot(test.labels, len(CLASSES)), test.attributes], dim=1).double()
    # a linear probe: fitted on one half, tested on the other
    fitted = inputs[half:] @ torch.linalg.lstsq(inputs[:half], targets[:half]).solution
    probe = (fitted[:, : len(CLASSES)].argmax(1) == test.labels[half:]).double().mean().item()
    explained = 1 - (fitted - targets[half:])[:, len(CLASSES):].square().mean(0) / targets[half:, len(CLASSES):].var(0)

    sizes = {file.parent.name: file.stat().st_size / 1e6 for file in sorted(dest.glob("*/*.safetensors"))}
    return [
        f"features: accuracy {100 * (predicted == test.labels).double().mean():.2f} % of {len(test.labels)} fresh images, 16 classes",
        f"vae: reconstructions keep the class that features sees in {100 * (predicted == predicted_again).double().mean():.2f} %, "
        f"PSNR {10 * np.log10(255**2 / error):.1f} dB, latents (4, 8, 8) of std {latents.std():.3f}, mean {latents.mean():.3f}",
        f"encoder: a linear probe of the class token reads the class in {100 * probe:.2f} % and explains of the variance of "
        + ", ".join(f"{name} {100 * value:.0f} %" for name, value in zip(ATTRIBUTES, explained.tolist(), strict=True)),
        f"encoder: the class token's mean square is {token.square().mean():.3f}, its std over images {token.std(0).mean():.3f}",
        "size: " + ", ".join(f"{name} {size:.2f} MB" for name, size in sizes.items()) + f", together {sum(sizes.values()):.2f} MB",
    ]


@without_traceback
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dest", type=Path, default=FEATURES.parent, metavar="FOLDER", help="where the three folders go")
    parser.add_argument("--num-images", type=int, default=24576, help="images to draw and train on")
    parser.add_argument("--features-steps", type=int, default=700, help="optimiser steps, batch 128; 0 keeps the network that is there")
    parser.add_argument("--vae-steps", type=int, default=2500, help="optimiser steps, batch 32; 0 keeps the network that is there")
    parser.add_argument("--encoder-steps", type=int, default=1600, help="optimiser steps, batch 128; 0 keeps the network that is there")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches")
    args = parser.parse_args(argv)

    if args.num_images < 128:
        raise UserError(f"--num-images {args.num_images} is less than a batch: give 128 or more")
    for name in ("features", "vae", "encoder"):
        if getattr(args, f"{name}_steps") == 0 and not (args.dest / name / "config.json").is_file():
            raise UserError(f"--{name}-steps 0 keeps a network, but there is none in {args.dest / name}: give a number of steps")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = draw_pictures(TRAIN_SEED, args.num_images, device)
    if args.features_steps:
        torch.manual_seed(args.seed)
        save_timm(train_features(data, args.features_steps), FEATURES_CONFIG, args.dest / "features")
    if args.vae_steps:
        torch.manual_seed(args.seed)
        save_vae(train_vae(data, args.vae_steps), args.dest / "vae")
    if args.encoder_steps:
        torch.manual_seed(args.seed)
        save_timm(train_encoder(data, args.encoder_steps), ENCODER_CONFIG, args.dest / "encoder")
    figures = measure(args.dest)
    print("\n".join(figures))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    (args.dest / "README.md").write_text(README.format(machine=machine) + "\n".join(f"- {line}" for line in figures) + "\n")


if __name__ == "__main__":
    main()
