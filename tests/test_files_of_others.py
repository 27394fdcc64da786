"""Files from elsewhere run no code, and take no more memory than they are worth: every place that reads one."""

import contextlib
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evaluations.class_tokens import read_class_tokens
from evaluations.clip import Clip
from evaluations.features import load_extractor
from evaluations.images import open_images
from models import checkpoint
from models.encoders import load_encoders
from models.text import TextEncoder
from models.vae import load_codec, read_ldm, read_statistics
from runtime.catalogue import Catalogue
from runtime.files import read_object
from runtime.messages import UserError
from runtime.npz import load_npz
from runtime.stores import decode_image, open_store, read_metadata, read_npy

FIRED = []


def fire():
    FIRED.append("code in a file was run")
    return torch.zeros(1)


class Armed:
    def __reduce__(self):
        return fire, ()


def as_zip(path: Path) -> None:
    torch.save({"cls_token": Armed()}, path)


def as_legacy(path: Path) -> None:
    torch.save({"cls_token": Armed()}, path, _use_new_zipfile_serialization=False)


def as_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Armed()))


def as_npy(path: Path) -> None:
    np.save(path, np.array([Armed()], dtype=object), allow_pickle=True)


def as_npz(path: Path) -> None:
    values = np.array([Armed()] * 4, dtype=object)
    names = "arr_0 mean std mu sigma class_tokens labels keys files order metadata stamp extensions"
    np.savez(path, **dict.fromkeys(names.split(), values))


WEIGHTS_FILES = (as_zip, as_legacy, as_pickle)
# place: the file in the test's folder, how it is armed, what reads it
PLACES = {
    "checkpoint": ("x.pt", WEIGHTS_FILES, lambda place: checkpoint.read(place / "x.pt")),
    "shared weights": ("x.safetensors", WEIGHTS_FILES, lambda place: checkpoint.read(place / "x.safetensors")),
    "--encoder-weights": ("x.pth", WEIGHTS_FILES,
                          lambda place: load_encoders(f"local-dir:{place}/encoder", "cpu", weights=[place / "x.pth"])),
    "--enc-type": ("encoder/pytorch_model.bin", WEIGHTS_FILES,
                   lambda place: load_encoders(f"local-dir:{place}/encoder", "cpu", 32)),
    "--features": ("encoder/pytorch_model.bin", WEIGHTS_FILES,
                   lambda place: load_extractor(f"local-dir:{place}/encoder")),
    "--features, safetensors": ("encoder/model.safetensors", WEIGHTS_FILES,
                                lambda place: load_extractor(f"local-dir:{place}/encoder")),
    "--inception-weights": ("x.pth", WEIGHTS_FILES,
                            lambda place: load_extractor("inception", inception_weights=place / "x.pth")),
    "--dinov2-weights": ("x.pth", WEIGHTS_FILES,
                         lambda place: load_extractor("dinov2", dinov2_weights=place / "x.pth")),
    "--vae": ("vae/diffusion_pytorch_model.bin", WEIGHTS_FILES, lambda place: load_codec(str(place / "vae"))),
    "--vae, of latent diffusion": ("x.pt", WEIGHTS_FILES, lambda place: read_ldm(place / "x.pt")),
    "--latent-stats": ("x.pt", WEIGHTS_FILES, lambda place: read_statistics(place / "x.pt")),
    "--latent-stats, npz": ("x.npz", (as_npz, as_pickle), lambda place: read_statistics(place / "x.npz")),
    "--text-encoder": ("clip/pytorch_model.bin", WEIGHTS_FILES, lambda place: TextEncoder(str(place / "clip"))),
    "--clip": ("clip/pytorch_model.bin", WEIGHTS_FILES, lambda place: Clip(str(place / "clip"))),
    "moments and features": ("data/a.npy", (as_npy, as_pickle),
                             lambda place: read_npy(open_store(place / "data"), b"a.npy")),
    "samples and references": ("x.npz", (as_npz, as_pickle), lambda place: open_images(str(place / "x.npz"), "REF")),
    "statistics": ("x.npz", (as_npz, as_pickle), lambda place: load_npz(place / "x.npz", ["mu"])),
    "class tokens": ("x.npz", (as_npz, as_pickle), lambda place: read_class_tokens(place / "x.npz", 4)),
}


@pytest.fixture
def place(tmp_path, encoder_folder, vae_folder, tiny_clip):
    """An encoder, a VAE and a CLIP without weights, and a folder of data."""
    shutil.copytree(tiny_clip, tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, folder in (("encoder", encoder_folder), ("vae", vae_folder)):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "config.json", tmp_path / name)
    (tmp_path / "data").mkdir()
    FIRED.clear()
    return tmp_path


@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name, (_, arms, _) in PLACES.items() for arm in arms])
def test_no_place_runs_code(place, name, arm):
    file, _, read = PLACES[name]
    arm(place / file)
    with pytest.raises(UserError) as refused:
        read(place)
    assert not FIRED and "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("load", [TextEncoder, Clip])
def test_code_beside_a_text_encoder_is_not_run(place, tiny_clip, file, load):
    """Hub repositories may bring classes of their own (`auto_map`); transformers would ask, or run them."""
    shutil.copy(tiny_clip / "model.safetensors", place / "clip")
    (place / "clip" / "own.py").write_text("from tests.test_files_of_others import fire\nfire()\nclass Own: pass\n")
    config = json.loads((place / "clip" / file).read_text())
    names = ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoModel")
    config["auto_map"] = dict.fromkeys(names, "own.Own")
    (place / "clip" / file).write_text(json.dumps(config))
    with contextlib.suppress(UserError):                          # transformers' own class, or a refusal
        load(str(place / "clip"))
    assert not FIRED


@pytest.mark.parametrize("arm", [as_npz, as_pickle])
def test_a_catalogue_runs_no_code(place, arm):
    """The files are listed instead."""
    (place / "data" / "a.npy").touch()
    arm(place / "data" / "catalogue.npz")
    assert Catalogue(open_store(place / "data"), (b".npy",)).names.tolist() == [b"a.npy"] and not FIRED


def test_armed_files_are_armed(place):
    """Else the tests above would show nothing."""
    as_pickle(place / "x.pt")
    pickle.loads((place / "x.pt").read_bytes())
    as_zip(place / "x.pt")
    torch.load(place / "x.pt", weights_only=False)
    as_npz(place / "x.npz")
    np.load(place / "x.npz", allow_pickle=True)["mu"]
    assert len(FIRED) == 3


def test_what_is_more_than_weights_is_named(place):
    as_zip(place / "x.pt")
    with pytest.raises(UserError, match="test_files_of_others.fire"):
        checkpoint.read(place / "x.pt")


# ---- memory ----------------------------------------------------------------------------------------------------------

class Promised:
    """Pickles as a numpy number of many bytes, without the bytes."""

    def __reduce__(self):
        return np.float64(0).__reduce__()[0], (np.dtype("V999"),)


def test_files_that_inflate(tmp_path):
    """A checkpoint whose records are compressed, and weights that repeat one number."""
    torch.save({"ema": {"a": torch.zeros(10**6)}}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "y.pt", "w") as out:
        for name in plain.namelist():
            out.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read(tmp_path / "y.pt")
    torch.save({"ema": {"a": torch.zeros(1)}, "args": {"seed": Promised()}}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read(tmp_path / "w.pt")
    torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(1).expand(10**9, 4, 2, 2)}}, tmp_path / "z.pt")
    with pytest.raises(UserError, match="than are stored"):
        checkpoint.build_for_sampling(checkpoint.read(tmp_path / "z.pt"), "SiT-T/2")


@pytest.mark.parametrize("change", [{"depth": 10**9}, {"embed_dim": 10**9}, {"num_heads": 0}, {"embed_dim": 2**14},
                                    {"img_size": 10**9}, {"patch_size": 10**9}])
@pytest.mark.parametrize("read", [lambda name: load_encoders(name, "cpu", 32), load_extractor])
def test_a_timm_folder_is_held_against_its_weights(tmp_path, encoder_folder, change, read):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="encoder"):
        read(f"local-dir:{folder}")


@pytest.mark.parametrize("change", [{"layers_per_block": 10**9}, {"block_out_channels": [10**9] * 3},
                                    {"latent_channels": 10**9}, {"scaling_factor": 0}, {"block_out_channels": [8] * 3}])
def test_a_vae_is_held_against_its_weights(tmp_path, vae_folder, change):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="vae"):
        load_codec(str(folder))


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_a_clip_of_many_layers_is_refused_before_it_is_built(tmp_path, tiny_clip, tower):
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config[tower]["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    for load in (TextEncoder, Clip):
        with pytest.raises(UserError, match="1000000000 layers"):
            load(str(folder))


def test_weights_of_a_vae_that_repeat_one_number(tmp_path, vae_folder):
    """Of a folder with config.json, and of the latent diffusion program."""
    folder = shutil.copytree(vae_folder, tmp_path / "vae", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {"encoder.down.0.block.0.conv1.weight": torch.zeros(1).expand(2**14, 2**14)}
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    torch.save({"state_dict": weights}, tmp_path / "x.pt")
    for read in (lambda: load_codec(str(folder)), lambda: read_ldm(tmp_path / "x.pt")):
        with pytest.raises(UserError, match="than are stored"):
            read()


def test_a_compressed_dataset_json_is_in_proportion(tmp_path):
    """Two million lists in six KB are refused; so many labels as a compressed data set has are not."""
    labels = json.dumps({"labels": [[f"00000/img{i:08d}.png", 0] for i in range(150_000)]})
    for name, text in (("bomb", '{"labels": [' + "[]," * 2_000_000 + "[]]}"), ("plain", labels)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=5) as archive:
            archive.writestr("dataset.json", text)
    with pytest.raises(UserError, match="dataset.json.*the limit"):
        read_metadata(open_store(tmp_path / "bomb.zip"))
    assert len(read_metadata(open_store(tmp_path / "plain.zip"))["labels"]) == 150_000


@pytest.mark.parametrize(("width", "height"), [(1, 2**27), (2**27, 1), (2**14, 2**14)])
def test_pictures_of_absurd_sizes_are_refused_by_their_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(2**16))), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                    for kind, body in chunks)
    with pytest.raises(UserError, match="x.png: more than"):
        decode_image(b"\x89PNG\r\n\x1a\n" + data, "x.png")


# ---- nested without end ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [600, 100_000])
def test_nested_metadata_of_safetensors(tmp_path, depth):
    about = {"architecture": {}, "latent_space": None, "steps": 1, "weights": "ema", "args": {"path_type": "DEEP"}}
    text = json.dumps(about).replace('"DEEP"', "[" * depth + "]" * depth)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"reg": text})
    with pytest.raises(UserError, match="x.safetensors"):
        checkpoint.read(tmp_path / "x.safetensors")


def test_nested_settings_are_no_settings(tmp_path):
    (tmp_path / "settings.json").write_text("[" * 100_000)
    assert read_object(tmp_path / "settings.json") == {}


# ---- one place that reads --------------------------------------------------------------------------------------------

def test_libraries_are_given_no_file_with_pickle():
    """torch.load is called in one place; timm fetches weights from its hub only."""
    root = Path(__file__).parents[1]
    parts = (".", "models", "runtime", "evaluations", "preprocessing")
    code = {str(path.relative_to(root)): path.read_text() for part in parts for path in (root / part).glob("*.py")}
    assert [name for name, text in code.items() if "torch.load(" in text] == [os.path.join("runtime", "run.py")]
    assert not [name for name, text in code.items() if "allow_pickle=True" in text or "import pickle" in text]
    assert not [name for name, text in code.items() if "pretrained=True)" in text or "timm.models" in text]
