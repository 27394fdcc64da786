"""Small frozen networks with random weights and a small prepared data set, so that nothing is downloaded."""

import json
import os
import tempfile

# Before torch and the hub's client are imported: the suite is the CPU's, and neither asks the network nor finds what a
# user has cached.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(VISIBLE_BEFORE=os.environ.get("CUDA_VISIBLE_DEVICES", "all"), CUDA_VISIBLE_DEVICES="",
                  HF_HUB_OFFLINE="1", HF_HOME=tempfile.mkdtemp(prefix="empty-hub-"),
                  TORCH_HOME=tempfile.mkdtemp(prefix="empty-torch-"))

import diffusers.utils.logging
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from evaluations.features import Extractor
from models.vae import Codec

# it keeps the stderr of its first use: not that of a test, which is closed behind it
diffusers.utils.logging.get_logger()

SIDE, CLASSES, IMAGES = 32, 3, 12
LONGEST = ("test_kills.py", "test_from_reg.py", "test_launch.py", "test_train.py", "test_end_to_end.py",
           "test_survival.py")


def pytest_collection_modifyitems(items):
    """The longest files come first, so that two workers end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def without_accelerates_state():
    """Each test begins as a new process does, in whatever order they run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A diffusers AutoencoderKL with random weights: 32 px -> latents (4, 8, 8)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4, sample_size=SIDE, scaling_factor=0.5, shift_factor=0.1)
    folder = tmp_path_factory.mktemp("networks") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A small vision transformer with random weights in timm's folder form: 32 px, 4x4 patches, width 32."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model_args = dict(img_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **model_args)
    folder = tmp_path_factory.mktemp("networks") / "encoder"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 32, "model_args": model_args,
              "pretrained_cfg": {"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, vae_folder):
    """Twelve images of noise in three classes with their moments, as `convert` and `encode` write them."""
    from models.vae import load_codec

    codec: Codec = load_codec(str(vae_folder))
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    moments = codec.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    labels = {"images": [], "vae-sd": []}
    for i in range(IMAGES):
        names = {"images": f"00000/img{i:08d}.png", "vae-sd": f"00000/img-mean-std-{i:08d}.npy"}
        for kind, name in names.items():
            (folder / kind / "00000").mkdir(parents=True, exist_ok=True)
            labels[kind].append([name, i % CLASSES])
        Image.fromarray(images[i]).save(folder / "images" / names["images"])
        np.save(folder / "vae-sd" / names["vae-sd"], moments[i])
    (folder / "images" / "dataset.json").write_text(json.dumps({"labels": labels["images"]}))
    record = {"labels": labels["vae-sd"], "vae": codec.space.to_record()}
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def train_flags(data_dir, encoder_folder, vae_folder, tmp_path):
    """Flags of a training run that takes seconds: SiT-T/2 on 17 tokens."""
    return ["--data-dir", str(data_dir), "--enc-type", f"local-dir:{encoder_folder}", "--vae", str(vae_folder),
            "--output-dir", str(tmp_path), "--exp-name", "run", "--model", "SiT-T/2", "--projector-dim", "32",
            "--batch-size", "4", "--num-workers", "0", "--sampling-steps", "0", "--logging-steps", "1"]


@pytest.fixture(scope="session")
def trained(data_dir, encoder_folder, vae_folder, tmp_path_factory):
    """A REG experiment of two steps, shared by the session: read it, or copy it before changing it."""
    import train

    output = tmp_path_factory.mktemp("trained")
    train.main(["--data-dir", str(data_dir), "--enc-type", f"local-dir:{encoder_folder}", "--vae", str(vae_folder),
                "--output-dir", str(output), "--exp-name", "run", "--model", "SiT-T/2", "--projector-dim", "32",
                "--batch-size", "4", "--num-workers", "0", "--sampling-steps", "0", "--max-train-steps", "2"])
    return output / "run"


# --- scoring
# ---------------------------------------------------------------------------------------------------------------------


def random_images(count, height=16, width=16, seed=0):
    """uint8 (count, height, width, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


class MeanColours(torch.nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def colours():
    """Three features per image, so that few images suffice and the answer is plain numpy."""
    return Extractor(MeanColours(), torch.device("cpu"), "colours", "0", None)


def tf32_and_autocast():
    """Switches of matrix products and convolutions under the names that this PyTorch knows, and what a product comes
    out as.
    """
    product = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision, product
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, product


@pytest.fixture
def lax():
    """TF32 and autocast on, as a user or training may have them."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield tf32_and_autocast()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --- captions
# ---------------------------------------------------------------------------------------------------------------------

WORDS = ["a", "small", "large", "red", "blue", "disc", "square", "at", "the", "upper", "left", "on", "dark", ",",
         "background"]


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A CLIP of transformers with random weights, tokenizer and image processor: 32 px, text width 32, 16 positions.

    Its tokens are WORDS and their letters.
    """
    import transformers

    letters = sorted(set("".join(WORDS)))
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:                                            # each word is merged from the left
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(" ".join(parts[:2]))
            parts = ["".join(parts[:2]), *parts[2:]]
            tokens.append(parts[0])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder = tmp_path_factory.mktemp("networks") / "tiny-clip"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
               pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(vocab_size=len(tokens), max_position_embeddings=16, **size, **ids),
        vision_config=dict(image_size=SIDE, patch_size=8, **size), projection_dim=16)).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
                                    ).save_pretrained(folder)
    return folder
