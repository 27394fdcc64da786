"""Train the toy's four frozen networks on freshly drawn images: the provenance of toy/networks.

    python -m toy.train_networks --dest toy/networks

features/   a small ResNet that only scores: class agreement, and the features of the Frechet distance
vae/        a diffusers AutoencoderKL, 32 px images <-> latents (4, 8, 8)
encoder/    a timm ViT: class token and 4 x 4 patch tokens, REG's second state and alignment target
clip/       a transformers CLIPModel with the toy's words: text encoder of the captions, and the CLIP score

Each is a folder as diffusers, timm or transformers saves it, with weights rounded to float16 to keep the repository
small. The architectures are those of the config.json files in toy/networks. Another machine gives networks of the same
quality, not the same bits.
"""

import functools
import json
import re
import time
from collections.abc import Callable
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
from runtime.arguments import Parser, at_least
from runtime.messages import without_traceback
from toy.agreement import FEATURES, predict
from toy.draw import ATTRIBUTES, CLASSES, RESOLUTION, draw_captioned, draw_many
from toy.words import KINDS, PHRASINGS, UNSEEN, WORDS, describe, parse, write_caption

TRAIN_SEED, TEST_SEED = 1000, 2000       # not the data set's (0), nor its reference's (1)
STEPS = {"features": 700, "vae": 2500, "encoder": 1600, "clip": 1000}
BATCH = {"features": 128, "vae": 32, "encoder": 128, "clip": 128}
TEXT_LENGTH = 16                         # tokens of a caption
KL_WEIGHT = 3e-4                         # per latent, against the mean absolute error of a pixel in [-1, 1]

NETWORKS = FEATURES.parent


@dataclass(frozen=True)
class Pictures:
    """Drawn images and the values they were drawn from, on the training device."""

    images: torch.Tensor      # uint8 (N, 3, R, R)
    labels: torch.Tensor      # int64 (N,)
    coverage: torch.Tensor    # float32 (N, 1, R, R)
    attributes: torch.Tensor  # float32 (N, A), standardised


@functools.cache
def draw_pictures(seed: int, count: int, device: torch.device) -> Pictures:
    drawings = draw_many(seed, count)
    attributes = torch.from_numpy(np.stack([d.attributes for d in drawings]))
    return Pictures(
        images=torch.from_numpy(np.stack([d.image for d in drawings])).permute(0, 3, 1, 2).contiguous().to(device),
        labels=torch.tensor([d.label for d in drawings], device=device),
        coverage=torch.from_numpy(np.stack([d.coverage for d in drawings]))[:, None].to(device),
        attributes=((attributes - attributes.mean(0)) / attributes.std(0)).to(device),
    )


@dataclass(frozen=True)
class Captioned:
    """Drawn scenes with one caption each, on the training device. Attributes are numbers, -1 where none is named."""

    images: torch.Tensor      # uint8 (N, 3, R, R)
    captions: list[str]
    shown: torch.Tensor       # int64 (N, 5), what the scene has
    named: torch.Tensor       # int64 (N, 5), what its caption names


def draw_captions(seed: int, count: int, device: torch.device) -> Captioned:
    drawn, captions = draw_many(seed, count, draw=draw_captioned), []
    for index, (_, scene) in enumerate(drawn):
        captions.append(write_caption(scene, PHRASINGS, np.random.default_rng([seed, index, 3])))
    numbers = [{value: number for number, value in enumerate(values)} for values in WORDS.values()]
    shown, named = (torch.tensor([[found.get(value, -1) for found, value in zip(numbers, scene, strict=True)]
                                  for scene in scenes], device=device)
                    for scenes in ([scene for _, scene in drawn], map(parse, captions)))
    images = torch.from_numpy(np.stack([drawing.image for drawing, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return Captioned(images.to(device), captions, shown, named)


def prepare(images: torch.Tensor, pretrained_cfg: dict) -> torch.Tensor:
    """Resize and normalise uint8 images (B, 3, R, R) to the input of a timm network with this `pretrained_cfg`."""
    x = F.interpolate(images.float() / 255, size=tuple(pretrained_cfg["input_size"][1:]), mode="bilinear")
    mean, std = (torch.tensor(pretrained_cfg[key], device=x.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std


def fit(name: str, parameters: list[nn.Parameter], data: "Pictures | Captioned", loss: Callable, lr: float) -> None:
    """Minimise the sum of `loss(indices)` -> {name: term} by AdamW with a short warm-up and a cosine decay."""
    steps, batch = STEPS[name], BATCH[name]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.05)
    start, batches = time.time(), []
    for step in range(1, steps + 1):
        if not batches:
            order = torch.randperm(len(data.images), device=data.images.device)
            batches = list(order.split(batch)[: len(order) // batch])[::-1]
        terms = loss(batches.pop())
        optimiser.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            values = "  ".join(f"{key} {value.item():.4f}" for key, value in terms.items())
            print(f"{name} {step}/{steps}  {values}  {time.time() - start:.0f} s", flush=True)


def disturb(x: torch.Tensor) -> torch.Tensor:
    """Mild blur, brightness changes and noise on prepared images (B, 3, S, S)."""
    each = torch.rand(4, len(x), 1, 1, 1, device=x.device)
    x = torch.lerp(x, F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False), each[0])
    return x * (0.85 + 0.3 * each[1]) + 0.2 * (each[2] - 0.5) + 0.1 * each[3] * torch.randn_like(x)


def train_features(data: Pictures, folder: Path) -> None:
    """Classify under mild noise, blur and brightness changes, so that a decoder's blur does not mislead the network."""
    network, config = build_timm("features")
    network.to(data.images.device).train()

    def loss(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x = prepare(data.images[index], config["pretrained_cfg"])                # (B, 3, 64, 64)
        x = disturb(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = network(x)                                                           # (B, classes)
        return {"class": F.cross_entropy(logits.float(), data.labels[index], label_smoothing=0.05)}

    fit("features", list(network.parameters()), data, loss, lr=2e-3)
    save_timm(network, config, folder)


def train_vae(data: Pictures, folder: Path) -> None:
    """Absolute error and a small KL term. `scaling_factor` then gives sampled latents unit std."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(NETWORKS / "vae")).to(data.images.device).train()

    def loss(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x = data.images[index] / 127.5 - 1                                                # (B, 3, R, R)
        with torch.autocast(x.device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            pixels = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()                   # (B, C, H, W)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"pixels": (pixels.float() - x).abs().mean(), "kl": KL_WEIGHT * kl}

    fit("vae", list(vae.parameters()), data, loss, lr=2e-3)
    vae.eval()
    with torch.inference_mode():
        parts = [vae.encode(part / 127.5 - 1).latent_dist.sample() for part in data.images[:4096].split(256)]
    vae.register_to_config(scaling_factor=round(1 / torch.cat(parts).std().item(), 4))
    vae.half().save_pretrained(folder)


def train_encoder(data: Pictures, folder: Path) -> None:
    """Class token: predict class and attributes. Patch tokens: predict their part of the image. Heads are dropped."""
    encoder, config = build_timm("encoder")
    encoder.to(data.images.device).train()
    # An identity LayerNorm gives class tokens of unit mean square: REG mixes them, unscaled, with unit noise.
    encoder.norm.requires_grad_(False)
    width, cells = encoder.embed_dim, 2 * RESOLUTION // encoder.patch_embed.patch_size[0]
    heads = nn.ModuleDict({
        "class": nn.Linear(width, len(CLASSES)),
        "attributes": nn.Linear(width, len(ATTRIBUTES)),
        "patch_class": nn.Linear(width, len(CLASSES)),
        "patch_cells": nn.Linear(width, 2 * 2 * 4),       # coverage and colour of the 2 x 2 quarters of a patch
    }).to(data.images.device)

    def loss(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x, labels = prepare(data.images[index], config["pretrained_cfg"]), data.labels[index]
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

    fit("encoder", [p for p in [*encoder.parameters(), *heads.parameters()] if p.requires_grad], data, loss, lr=1e-3)
    save_timm(encoder, config, folder)


def train_clip(data: Captioned, folder: Path) -> None:
    """Contrast pictures and captions; a caption fits every picture of the batch that shows what it names."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = build_tokenizer(folder)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    config = CLIPConfig(
        text_config=dict(vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH, hidden_size=64,
                         intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, **ends),
        vision_config=dict(image_size=RESOLUTION, patch_size=8, hidden_size=96, intermediate_size=384,
                           num_hidden_layers=4, num_attention_heads=4), projection_dim=64)
    clip = CLIPModel(config).to(data.images.device).train()
    tokens = tokenizer(data.captions, padding="max_length", max_length=TEXT_LENGTH,
                       return_tensors="pt").input_ids.to(data.images.device)              # (N, L)

    # One head for both names the attributes, and is dropped; a run without it had learnt less after as many steps.
    sizes = [len(values) for values in WORDS.values()]
    head = nn.Linear(64, sum(sizes), device=data.images.device)

    def naming(embedded: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
        parts = zip(head(10 * embedded).split(sizes, dim=1), attributes.T, strict=True)
        return sum(F.cross_entropy(logits, number, ignore_index=-1) for logits, number in parts) / len(sizes)

    def loss(index: torch.Tensor) -> dict[str, torch.Tensor]:
        x, shown, named = disturb(data.images[index] / 127.5 - 1), data.shown[index], data.named[index]
        fits = ((named < 0) | (named == shown[:, None])).all(dim=2).float()               # (B pictures, B captions)
        out = clip(input_ids=tokens[index], pixel_values=x)
        return {"picture": F.cross_entropy(out.logits_per_image, fits / fits.sum(dim=1, keepdim=True)),
                "caption": F.cross_entropy(out.logits_per_text, fits.T / fits.sum(dim=0)[:, None]),
                "seen": naming(out.image_embeds, shown), "read": naming(out.text_embeds, named)}

    fit("clip", [*clip.parameters(), *head.parameters()], data, loss, lr=1e-3)
    clip.half().save_pretrained(folder)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def build_tokenizer(folder: Path):
    """Write and load CLIP's byte-pair tokenizer with merges that make each of the toy's words one token."""
    from transformers import CLIPTokenizer

    texts = [*PHRASINGS, *UNSEEN, "shape", *(" ".join(sum(values.values(), ())) for values in WORDS.values())]
    words = sorted(set(re.findall(r"[a-z]+|,", re.sub(r"{.*?}", "", " ".join(texts)))))
    letters, merges = sorted(set("".join(words))), []
    words = [" ".join([*word[:-1], f"{word[-1]}</w>"]) for word in words]
    while split := [word for word in words if " " in word]:
        pair = " ".join(split[0].split()[:2])
        merges.append(pair)
        words = [re.sub(rf"(?<!\S){pair}(?!\S)", pair.replace(" ", ""), word) for word in words]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges),
                  "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_timm(name: str) -> tuple[nn.Module, dict]:
    """A timm network with random weights, and the config.json of toy/networks/`name` that describes it."""
    config = json.loads((NETWORKS / name / "config.json").read_text())
    return timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]), config


def save_timm(network: nn.Module, config: dict, folder: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads, and casts to float32."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    save_file({key: value.cpu().contiguous() for key, value in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.inference_mode()
def measure(folder: Path) -> None:
    """Print the quality of the three saved networks on images that were not trained on."""
    torch.manual_seed(TEST_SEED)
    test = draw_pictures(TEST_SEED, 2048, torch.device("cpu"))
    features, codec = TimmFeatures.load(folder / "features").eval(), load_codec(str(folder / "vae"))
    moments = torch.cat([codec.encode(part) for part in test.images.split(256)])          # (N, 2C, H, W)
    latents = codec.space.latents(moments, torch.randn_like(moments.chunk(2, dim=1)[0]))  # (N, C, H, W)
    decoded = torch.cat([codec.decode(part) for part in latents.split(256)])
    psnr = 10 * np.log10(255**2 / (decoded.float() - test.images.float()).square().mean().item())
    seen = predict(features, test.images)
    right, kept = (100 * (seen == other).double().mean() for other in (test.labels, predict(features, decoded)))

    encoder = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True, num_classes=0).eval()
    parts = [prepare(part, encoder.pretrained_cfg) for part in test.images.split(256)]
    token = torch.cat([encoder.forward_features(part)[:, 0] for part in parts]).double()  # (N, E)
    inputs, half = torch.cat([token, torch.ones(len(token), 1)], dim=1), len(token) // 2
    targets = F.one_hot(test.labels, len(CLASSES)).double()
    fitted = inputs[half:] @ torch.linalg.lstsq(inputs[:half], targets[:half]).solution   # a linear probe
    probe = 100 * (fitted.argmax(dim=1) == test.labels[half:]).double().mean()
    print(f"features: accuracy {right:.2f} % of {len(test.labels)} fresh images, 16 classes")
    print(f"vae: {kept:.2f} % of reconstructions keep the class seen by features, PSNR {psnr:.1f} dB, "
          f"latents (4, 8, 8) of std {latents.std():.3f}, mean {latents.mean():.3f}")
    print(f"encoder: a linear probe of the class token gives the class in {probe:.2f} %, "
          f"its mean square is {token.square().mean():.3f}")


@torch.inference_mode()
def measure_clip(folder: Path) -> None:
    """Print how often the right caption scores above those with another value of one attribute, on fresh scenes."""
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = CLIPModel.from_pretrained(folder).float().eval(), CLIPProcessor.from_pretrained(folder)
    for kind, (phrasings, held_out) in KINDS.items():
        rng, right = np.random.default_rng(TEST_SEED), dict.fromkeys(WORDS, 0)
        for index in range(512):
            drawing, scene = draw_captioned(TEST_SEED, index, held_out=held_out)
            phrasing = str(rng.choice(phrasings))
            for name, values in WORDS.items():
                others = [scene._replace(**{name: value}) for value in values]
                texts = [describe(other, phrasing, np.random.default_rng(index)) for other in others]
                inputs = processor(text=texts, images=drawing.image, return_tensors="pt", padding="max_length")
                right[name] += others[clip(**inputs).logits_per_image.argmax()] == scene
        shares = ", ".join(f"{name} {count / 5.12:.1f} % of 1 in {len(WORDS[name])}" for name, count in right.items())
        print(f"clip, {kind}: {shares}")


TRAIN = {"features": (train_features, draw_pictures), "vae": (train_vae, draw_pictures),
         "encoder": (train_encoder, draw_pictures), "clip": (train_clip, draw_captions)}


@without_traceback
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dest", type=Path, default=NETWORKS, metavar="FOLDER", help="holds the four folders")
    parser.add_argument("--only", nargs="+", choices=tuple(TRAIN), default=tuple(TRAIN), help="networks to train")
    parser.add_argument("--num-images", type=at_least(128), default=24576, help="images to draw and train on")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of initial weights and batches")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in args.only:
        train, drawn = TRAIN[name]
        torch.manual_seed(args.seed)
        train(drawn(TRAIN_SEED, args.num_images, device), args.dest / name)
    if set(args.only) - {"clip"}:
        measure(args.dest)
    if "clip" in args.only:
        measure_clip(args.dest / "clip")


if __name__ == "__main__":
    main()
