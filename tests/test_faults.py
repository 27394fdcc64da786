"""The fault table: what every program does with bad input. One sentence, exit status 2, and all files as they were.

Each case damages something in a folder of its own, runs a program there with relative paths, and compares the whole folder before and
after. New names that a fault leaves by design, so that the same command can go on, are listed with the case.
"""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

import generate
import train
from evaluations import evaluator, sweep
from models import checkpoint
from preprocessing import dataset_tools
from tests.conftest import random_images
from tests.test_end_to_end import shell

# The programs, each with flags that make it finish in a second when nothing is wrong; a case's own flags come after them and win.
PROGRAMS = {
    "train": (train.main, "--data-dir data --enc-type local-dir:encoder --vae vae --output-dir exps --exp-name run --model SiT-T/2 "
                          "--projector-dim 32 --batch-size 4 --num-workers 0 --sampling-steps 0 --logging-steps 1 --max-train-steps 3"),
    "convert": (dataset_tools.main, "convert --source photos --dest out --resolution 32x32 --workers 0"),
    "encode": (dataset_tools.main, "encode --source data/images --dest out --model-url vae --batch-size 4 --workers 0"),
    "check": (dataset_tools.main, "check --source data --output check.png --model-url vae --workers 0"),
    "generate": (generate.main, "--ckpt exps/run --vae vae --num-fid-samples 3 --num-steps 1 --per-proc-batch-size 2"),
    "export": (checkpoint.main, "export"),
    "score": (evaluator.main, "--ref-batch reference.npz --sample-batch samples.npz --features local-dir:encoder --device cpu "
                              "--cache cache --output metrics.json"),
    "stats": (evaluator.main, "stats --features local-dir:encoder --device cpu --keep 4"),
    "sweep": (sweep.main, ""),
}
# What is left where damage is met in the middle of the work: a run's record, a destination that goes on, the reference's features.
STARTED = ("exps", "exps/run", "exps/run/args.json", "exps/run/metrics.jsonl", "exps/run/.lock")
BEGUN = ("out", "out/.unfinished.json", "out/.tmp", "out/00000", "out/00000/*")
CACHED = ("cache", "cache/*")


def case(name: str, damage: Callable | None, program: str, flags: str, sentence: str, *leaves: str):
    """One line of the table: the last line on stderr holds `sentence`, and `leaves` are the new names that may be there."""
    return pytest.param(damage, program, flags, sentence, leaves, id=name)


def snapshot(place: Path) -> dict[str, str | None]:
    """Every name below a folder, hidden or not, with the hash of what it holds; None for folders and links."""
    return {str(path.relative_to(place)): None if path.is_dir() or path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in place.rglob("*")}


def same_but(place: Path, before: dict[str, str | None], leaves: tuple[str, ...]) -> None:
    """Everything is there with the same bytes, and nothing new but what may be left."""
    after = snapshot(place)
    assert {name: after.get(name, "gone") for name in before} == before
    assert [name for name in after.keys() - before.keys() if not any(fnmatch(name, left) for left in leaves)] == []


def one_sentence(said: str, sentence: str) -> None:
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last, said
    assert said.count("error: ") == 1 and "Traceback" not in said


@pytest.fixture
def refused(monkeypatch, capfd):
    """Damages the folder, runs the program in it, and requires one sentence, exit status 2 and the same files."""
    def refused(place: Path, damage, program, flags, sentence, leaves=()) -> None:
        monkeypatch.chdir(place)
        for name in ("REF_BATCH", "FEATURES", "INCEPTION_WEIGHTS"):
            monkeypatch.delenv(name, raising=False)
        if damage is not None:
            damage()
        before = snapshot(place)
        main, always = PROGRAMS[program]
        AcceleratorState._reset_state(reset_partial_state=True)            # as in a new process
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*always.split(), *flags.split()])
        printed = capfd.readouterr()
        assert ended.value.code == 2 and Harmful.SAID not in printed.out
        one_sentence(printed.err, sentence)
        same_but(place, before, leaves)

    return refused


# ---- damages: each is made with names, and called in the case's folder

def write(name: str, content: bytes | str = b"") -> Callable:
    def damage():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str) -> Callable:
    return lambda: os.truncate(name, os.path.getsize(name) // 2)


def flip(name: str, at: float = 0.5) -> Callable:
    """One bit of the byte at this share of the file."""
    def damage():
        data = bytearray(Path(name).read_bytes())
        data[int(at * len(data))] ^= 1
        Path(name).write_bytes(data)

    return damage


def remove(name: str) -> Callable:
    return lambda: shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)


def move(name: str, to: str) -> Callable:
    return lambda: os.rename(name, to)


def all_of(*damages: Callable) -> Callable:
    return lambda: [damage() for damage in damages]


def picture(name: str, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Callable:
    def damage():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(name)

    return damage


def bomb(name: str) -> Callable:
    """A PNG of 69 bytes that says it is 60,000 x 60,000 px."""
    def damage():
        picture(name, size=(1, 1))()
        data = bytearray(Path(name).read_bytes())
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        Path(name).write_bytes(data)

    return damage


def npy(name: str, value: np.ndarray) -> Callable:
    def damage():
        with open(name, "wb") as file:                            # np.save would add .npy to a name
            np.save(file, value, allow_pickle=True)

    return damage


def npz(name: str, *arrays, **named) -> Callable:
    return lambda: np.savez(name, *arrays, **named)


def compressed(name: str) -> Callable:
    return lambda: np.savez_compressed(name, random_images(8))


def says_shape(name: str, shape: tuple[int, ...]) -> Callable:
    """An npz file whose images have this shape by their header, and 1,000 bytes."""
    def damage():
        with zipfile.ZipFile(name, "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            member.write(bytes(1000))

    return damage


def edit(name: str, change: Callable) -> Callable:
    """A JSON file after `change(content)`."""
    def damage():
        content = json.loads(Path(name).read_text())
        change(content)
        Path(name).write_text(json.dumps(content))

    return damage


def zipped(change: Callable = bytes, compression: int = zipfile.ZIP_STORED, more: str | None = None) -> Callable:
    """images/ as images.zip, with one more entry, and its bytes after `change`."""
    def damage():
        folder, data = Path("data/images"), io.BytesIO()
        with zipfile.ZipFile(data, "w", compression) as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, file.relative_to(folder))
            if more is not None:
                archive.writestr(zipfile.ZipInfo("x" * len(more)), b"more")
        shutil.rmtree(folder)
        Path("data/images.zip").write_bytes(change(data.getvalue().replace(b"x" * len(more), more.encode()) if more else data.getvalue()))

    return damage


def says_size(size: int) -> Callable:
    """The zip's list says this size of its first file, whatever it inflates to."""
    def change(data: bytes) -> bytes:
        at = data.index(b"PK\x01\x02") + 24
        return data[:at] + struct.pack("<I", size) + data[at + 4:]

    return change


class Harmful:
    """Says so when a file that holds it is read by pickle."""

    SAID = "code in a file was run"

    def __reduce__(self):
        return print, (self.SAID,)


def pt(value, name: str) -> Callable:
    return lambda: torch.save(value, name)


def state(change: Callable) -> Callable:
    """The checkpoint after `change(content)`; what that returns, if anything, takes its place."""
    def damage():
        content = torch.load(SAVED, weights_only=True)
        torch.save(change(content) or content, SAVED)

    return damage


def without(*names: str) -> Callable:
    return lambda content: {name: value for name, value in content.items() if name not in names}


def safetensors(name: str, metadata: dict[str, str] | None = None) -> Callable:
    return lambda: save_file({"a": torch.zeros(1)}, name, metadata)


# ---- the prepared data set, what prepares it, and the doors of training

def image(i: int) -> str:
    return f"data/images/00000/img{i:08d}.png"


def moments(i: int) -> str:
    return f"data/vae-sd/00000/img-mean-std-{i:08d}.npy"


def label(value) -> Callable:
    """The first label in both dataset.json."""
    return all_of(*(edit(name, lambda content: content["labels"][0].__setitem__(1, value)) for name in (LABELS, RECORD)))


def every(damage_of: Callable) -> Callable:
    return all_of(*(damage_of(i) for i in range(12)))


LABELS, RECORD = "data/images/dataset.json", "data/vae-sd/dataset.json"
CONFIG, NETWORK = "encoder/config.json", "encoder/model.safetensors"
VAE, DECODER = "vae/config.json", "vae/diffusion_pytorch_model.safetensors"
NAN = np.full((8, 8, 8), np.nan, np.float32)
NO_CONFIG = f"{CONFIG} is missing or lacks"
NO_MODEL = "timm cannot build the model in encoder"
NO_VAE = "the folder vae holds no readable AutoencoderKL"

DATA = [
    case("a truncated png", cut(image(5)), "check", "", f"{image(5)} is not a readable image"),
    case("a png without a byte", write(image(5)), "check", "", f"{image(5)} is not a readable image"),
    case("text for a png", write(image(5), "hello"), "check", "", f"{image(5)} is not a readable image"),
    case("a flipped bit in a png", flip(image(5)), "check", "", f"{image(5)} is not a readable image"),
    case("an image of another size", picture(image(5), size=(48, 48)), "check", "", "is RGB of 48x48 px, expected RGB of 32x32"),
    case("an oblong image", picture(image(5), size=(32, 48)), "check", "", "is RGB of 32x48 px, expected RGB of 32x32"),
    case("a picture that says it is huge", bomb(image(5)), "check", "", "has more than 134217728 pixels"),
    case("a link to nowhere", all_of(remove(image(5)), lambda: os.symlink("nowhere", image(5))), "check", "", f"cannot read {image(5)}"),
    case("a folder that holds itself", lambda: os.symlink("../images", "data/images/again"), "check", "", "is a link to a folder"),
    case("truncated moments", cut(moments(5)), "check", "", f"{moments(5)} is not a readable npy file"),
    case("moments that are code", npy(moments(5), np.array([Harmful()])), "check", "", f"{moments(5)} is not a readable npy file"),
    case("an npz for moments", all_of(npz("x.npz", NAN), move("x.npz", moments(5))), "check", "", "has shape None, expected (8, 8, 8)"),
    case("moments of another shape", npy(moments(5), NAN[:, :4, :4]), "check", "", "has shape (8, 4, 4), expected (8, 8, 8) floats"),
    case("moments that are not numbers", npy(moments(5), NAN), "check", "", "the moments of 00000/00000005 are not finite"),
    case("several damages at once", all_of(cut(image(5)), write(moments(6)), picture(image(7), "L")), "check", "", "3 of 12 entries"),
    case("a check into no folder", None, "check", "--output nowhere/check.png", "in a folder that exists"),
    case("a check into no png", None, "check", "--output check.txt", "expected the name of a .png"),
    case("a check with another decoder", edit(VAE, lambda c: c.update(scaling_factor=2.0)), "check", "", "latent scale 0.5"),

    case("training on a truncated png", cut(image(5)), "train", "", f"{image(5)} is not a readable image", *STARTED),
    case("training on another size", picture(image(5), size=(48, 48)), "train", "", f"{image(5)} is RGB of 48x48 px", *STARTED),
    case("training on more damage than is allowed", all_of(cut(image(5)), cut(image(7))), "train", "--skip-bad-samples 1",
         "2 entries cannot be read, more than --skip-bad-samples 1", *STARTED),
    case("training on moments that are not numbers", every(lambda i: npy(moments(i), NAN)), "train", "--max-skipped-updates 2",
         "2 updates in a row were skipped for non-finite numbers", *STARTED),
    case("a truncated png in the first place", cut(image(0)), "train", "", f"{image(0)} is not a readable image"),
    case("an image without moments", remove(moments(5)), "train", "", "1 of 12 images have no partner in data/vae-sd (00000/00000005)"),
    case("moments without an image", remove(image(5)), "train", "", "1 of 12 moments have no partner in data/images (00000/00000005)"),
    case("two images of one key", picture(image(5).replace(".png", ".jpg")), "train", "", "have the same key 00000/00000005"),
    case("images that outgrew their moments", every(lambda i: picture(image(i), size=(64, 64))), "train", "", "belong to 32 px"),
    case("labels that are not json", write(LABELS, '{"labels": ['), "train", "", f"{LABELS} is not JSON"),
    case("labels nested without end", write(LABELS, "[" * 100_000), "train", "", f"{LABELS} is not JSON"),
    case("a dataset.json that is a list", write(LABELS, "[1, 2]"), "train", "", "must be an object"),
    case("a dataset.json that is a folder", all_of(remove(LABELS), write(f"{LABELS}/x")), "train", "", f"cannot read {LABELS}"),
    case("a negative label", label(-1), "train", "", "to be [[name, whole number >= 0], ...]"),
    case("a label beyond 64 bits", label(2**63), "train", "", "to be [[name, whole number >= 0], ...]"),
    case("a label that no memory holds", label(10**12), "train", "",
         f"{RECORD} has label 1000000000000, expected labels below 10000000"),
    case("a missing label", edit(LABELS, lambda c: c["labels"].pop(5)), "train", "", "has no label for 1 of 12 files"),
    case("two labels of one image", edit(LABELS, lambda c: c["labels"].append([c["labels"][0][0], 2])), "train", "", "and with label 2"),
    case("labels that contradict each other", edit(LABELS, lambda c: c["labels"][0].__setitem__(1, 2)), "train", "", "has label 2 in"),
    case("a label beyond the classes", None, "train", "--num-classes 2", "has label 2, expected labels below num_classes 2"),
    case("no classes", None, "train", "--num-classes 0", "--num-classes is 0: give at least 1"),
    case("more classes than any memory holds", None, "train", "--num-classes 100000000", "num_classes is 100000000, expected at most"),
    case("a record that is a number", edit(RECORD, lambda c: c.update(vae=3)), "train", "", "to record channels and downsampling"),
    case("a record of other moments", edit(RECORD, lambda c: c["vae"].update(channels=16)), "train", "", "mean and std of 16 channels"),
    case("a record without a scale", edit(RECORD, lambda c: c["vae"].pop("scale")), "train", "", "lacks scale"),
    case("a record of an endless scale", edit(RECORD, lambda c: c["vae"].update(scale=float("inf"))), "train", "", "a finite scale"),
    case("moments still being written", move(RECORD, "data/vae-sd/.unfinished.json"), "train", "", "data/vae-sd is not finished"),
    case("images still being written", move(LABELS, "data/images/.unfinished.json"), "train", "", "data/images is not finished"),
    case("no moments", remove("data/vae-sd"), "train", "", "data holds no moments: looked for vae-sd, vae-sd.zip"),
    case("folders of other files", every(lambda i: all_of(remove(image(i)), remove(moments(i)))), "train", "", "holds no .npy file"),
    case("no data folder", remove("data"), "train", "", "the data folder data does not exist"),
    case("a file for the images", all_of(remove("data/images"), write("data/images", "hello")), "train", "", "is not a readable zip file"),
    case("another resolution", None, "train", "--resolution 64", "resolution 64 was asked for and the images are 32 px"),
    case("a resolution of 0", None, "train", "--resolution 0", "--resolution is 0: give at least 1"),
    case("a negative resolution", None, "train", "--resolution -32", "--resolution is -32: give at least 1"),
    case("a batch that cannot be cut", None, "train", "--gradient-accumulation-steps 3", "give a multiple of 3"),

    case("a truncated zip", zipped(lambda data: data[:len(data) // 2]), "train", "", "data/images.zip is not a readable zip file"),
    case("a flipped bit in a zip", all_of(zipped(), flip("data/images.zip")), "train", "", "is damaged (wrong size or checksum)", *STARTED),
    case("a zip that leads out", zipped(more="../out.png"), "train", "", "holds ../out.png: expected relative names"),
    case("a zip with an absolute name", zipped(more="/out.png"), "train", "", "holds /out.png: expected relative names"),
    case("a zip with one name twice", zipped(more="00000/img00000005.png"), "train", "", "two files named 00000/img00000005.png"),
    case("a zip of another compression", zipped(compression=zipfile.ZIP_BZIP2), "train", "", "with an unusual compression"),
    case("a zip that says it grows", zipped(says_size(2**31), zipfile.ZIP_DEFLATED), "train", "", "compressed: expected at most 1073741"),
    case("a zip that grows beyond what it says", zipped(says_size(10), zipfile.ZIP_DEFLATED), "train", "", "wrong size or checksum"),

    case("no encoder", None, "train", "--enc-type local-dir:nowhere", "nowhere/config.json is missing or lacks"),
    case("an encoder's truncated config", cut(CONFIG), "train", "", NO_CONFIG),
    case("an encoder's config that is a list", write(CONFIG, "[]"), "train", "", NO_CONFIG),
    case("an encoder's config without settings", edit(CONFIG, lambda c: c.update(pretrained_cfg=None)), "train", "", NO_CONFIG),
    case("an encoder's config without arguments", edit(CONFIG, lambda c: c.update(model_args=None)), "train", "", NO_CONFIG),
    case("an encoder's config with unknown arguments", edit(CONFIG, lambda c: c["model_args"].update(wings=2)), "train", "", NO_MODEL),
    case("an encoder's config with text", edit(CONFIG, lambda c: c["model_args"].update(patch_size="8")), "train", "", NO_CONFIG),
    case("an encoder's config that cannot be", edit(CONFIG, lambda c: c["model_args"].update(num_heads=3)), "train", "", NO_MODEL),
    case("an encoder's config with two means", edit(CONFIG, lambda c: c["pretrained_cfg"].update(mean=[0.5, 0.5])), "train", "", NO_CONFIG),
    case("an encoder that timm does not know", edit(CONFIG, lambda c: c.update(architecture="x_patch8")), "train", "", "encoder"),
    case("an encoder of another depth", edit(CONFIG, lambda c: c["model_args"].update(depth=3)), "train", "", "do not fit or are damaged"),
    case("an encoder without weights", remove(NETWORK), "train", "", "the weights of local-dir:encoder"),
    case("an encoder's truncated weights", cut(NETWORK), "train", "", "do not fit or are damaged"),
    case("a file of no encoder", write("x.pt", "hello"), "train", "--encoder-weights x.pt", "x.pt does not hold the weights"),
    case("more files than encoders", None, "train", "--encoder-weights a,b", "2 files of encoder weights came for 1 encoders"),

    case("an output folder that is a file", write("exps", "mine"), "train", "", "cannot create the folder exps/run"),
    case("an experiment that is a file", write("exps/run", "mine"), "train", "", "cannot create the folder exps/run"),
    case("a file where checkpoints go", write("exps/run/checkpoints", "mine"), "train", "", "cannot write exps/run/checkpoints/", *STARTED),
    case("resuming from nowhere", None, "train", "--resume nowhere.pt", "no checkpoint at nowhere.pt"),
    case("resuming a step of nothing", None, "train", "--resume-step 999", "no checkpoint at exps/run/checkpoints/0000999.pt"),
    case("resuming in two ways", None, "train", "--resume none --resume-step 1", "--resume-step 1 came with --resume none"),
    case("scores against nothing", None, "train", "--eval-steps 1 --ref-batch nowhere.npz", "--ref-batch nowhere.npz not found"),
    case("scores against text", write("x.npz", "hello"), "train", "--eval-steps 1 --ref-batch x.npz", "x.npz is not a readable npz"),
    case("initial weights that are text", write("x.pt", "hello"), "train", "--init-weights x.pt", "x.pt cannot be read as a checkpoint"),

    case("no vae", remove("vae"), "encode", "", "no VAE at vae"),
    case("an empty vae", all_of(remove(VAE), remove(DECODER)), "encode", "", NO_VAE),
    case("a vae's truncated config", cut(VAE), "encode", "", NO_VAE),
    case("a vae's config that is a list", write(VAE, "[]"), "encode", "", NO_VAE),
    case("a vae's config with nothing", edit(VAE, lambda c: c.update(block_out_channels=None)), "encode", "", NO_VAE),
    case("a vae's config without a scale", edit(VAE, lambda c: c.update(scaling_factor=None)), "encode", "", NO_VAE),
    case("a vae of another width", edit(VAE, lambda c: c.update(latent_channels=8)), "encode", "", NO_VAE),
    case("a vae of more layers than weights", edit(VAE, lambda c: c.update(layers_per_block=2)), "encode", "", NO_VAE),
    case("a vae without weights", remove(DECODER), "encode", "", NO_VAE),
    case("a vae's truncated weights", cut(DECODER), "encode", "", NO_VAE),

    case("encoding a truncated png", cut(image(5)), "encode", "", f"{image(5)} is not a readable image", *BEGUN),
    case("encoding an image of another size", picture(image(5), size=(48, 48)), "encode", "", "is RGB of 48x48 px", *BEGUN),
    case("encoding no images", None, "encode", "--source vae", "the source vae holds no images"),
    case("encoding into the source", None, "encode", "--dest data/images/out", "lies in the source"),
    case("encoding over other files", None, "encode", "--dest data", "the destination data holds other files"),
    case("encoding over moments of others", None, "encode", "--dest data/vae-sd", "that this program did not write"),
    case("encoding over a file", write("out", "mine"), "encode", "", "the destination out is a file"),
    case("encoding below a file", write("out", "mine"), "encode", "--dest out/vae-sd", "cannot create out/vae-sd"),
    case("encoding over a folder named zip", write("out.zip/x", "mine"), "encode", "--dest out.zip", "the destination out.zip is a folder"),
    case("encoding over a damaged zip", write("out.zip", "mine"), "encode", "--dest out.zip", "out.zip is not a readable zip file"),
    case("encoding where a zip cannot be collected", write("out.zip.partial", "x"), "encode", "--dest out.zip", "out.zip.partial"),
    case("encoding what was begun otherwise", write("out/.unfinished.json", "{}"), "encode", "", "the destination out was made with"),
    case("encoding what was begun and damaged", write("out/.unfinished.json", "{"), "encode", "", "is damaged: remove out"),

    case("a truncated picture", cut("photos/cat/a.png"), "convert", "", "photos/cat/a.png is not a readable image", *BEGUN),
    case("a huge picture", bomb("photos/dog/d.png"), "convert", "", "photos/dog/d.png has more than 134217728 pixels", *BEGUN),
    case("a strip", picture("photos/dog/d.png", size=(1, 60_000)), "convert", "--resolution 64x64", "enlarged to 64x3840000", *BEGUN),
    case("a picture of floats", picture("photos/dog/e.tif", "F"), "convert", "", "photos/dog/e.tif is a floating-point picture", *BEGUN),
    case("pictures of another size that are not cut", None, "convert", "--transform none", "is 50x40 px, expected 32x32", *BEGUN),
    case("pictures beside class folders", picture("photos/e.png"), "convert", "", "holds 1 pictures beside its class folders (e.png)"),
    case("pictures with a damaged dataset.json", write("photos/dataset.json", "{"), "convert", "", "photos/dataset.json is not JSON"),
    case("pictures without labels", write("photos/dataset.json", '{"labels": []}'), "convert", "", "has no label for 4 of 4 files"),
    case("no size", None, "convert", "--resolution 0x0", "--resolution 0x0 is not understood"),
    case("a conversion of nothing", None, "convert", "--max-images 0", "--max-images 0: expected at least 1"),
    case("a conversion of no pictures", None, "convert", "--source vae", "the source vae holds no pictures"),
    case("a conversion of text", write("x.zip", "hello"), "convert", "--source x.zip", "x.zip is not a readable zip file"),
    case("a conversion into the source", None, "convert", "--dest photos/out", "lies in the source"),
    case("a conversion over images of others", None, "convert", "--dest data/images", "that this program did not write"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, data_dir, encoder_folder, vae_folder) -> Path:
    """What the cases on data begin with: data, encoder and VAE, and four photos in two classes."""
    place = tmp_path_factory.mktemp("prepared")
    for name, source in (("data", data_dir), ("encoder", encoder_folder), ("vae", vae_folder)):
        shutil.copytree(source, place / name)
    for photo, name in zip(random_images(4, 40, 50), ("cat/a", "cat/b", "dog/c", "dog/d"), strict=True):
        (place / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(place / "photos" / f"{name}.png")
    return place


@pytest.mark.parametrize(("damage", "program", "flags", "sentence", "leaves"), DATA)
def test_faults_of_data_and_networks(prepared, tmp_path, refused, damage, program, flags, sentence, leaves):
    refused(shutil.copytree(prepared, tmp_path / "place"), damage, program, flags, sentence, leaves)


# ---- an experiment: resuming, sampling, sharing, sweeps

SAVED = "exps/run/checkpoints/0000001.pt"
NONE_CAN = f"none of the checkpoints can be read ({SAVED}): remove them"
CANNOT = f"{SAVED} cannot be read as a checkpoint"
NEW = "--exp-name new"

RUN = [
    case("resuming a truncated checkpoint", cut(SAVED), "train", "", NONE_CAN),
    case("resuming a checkpoint with a flipped bit", flip(SAVED), "train", "", NONE_CAN),
    case("resuming a pickle with code", write(SAVED, pickle.dumps({"ema": Harmful()})), "train", "", NONE_CAN),
    case("resuming a checkpoint with code", pt({"ema": Harmful()}, SAVED), "train", "", NONE_CAN),
    case("resuming nothing", pt({}, SAVED), "train", "", NONE_CAN),
    case("resuming a zip of others", all_of(npz("x.npz", NAN), move("x.npz", SAVED)), "train", "", NONE_CAN),
    case("resuming two damaged ones", all_of(cut(SAVED), write("exps/run/checkpoints/0000002.pt")), "train", "",
         f"none of the checkpoints can be read (exps/run/checkpoints/0000002.pt, {SAVED})"),
    case("resuming bare weights", state(lambda c: c["ema"]), "train", "", "lacks args, data, draws, "),
    case("resuming a released checkpoint", state(without("draws", "data", "latent_space")), "train", "", "lacks data, draws, latent_space"),
    case("resuming without settings", state(without("args")), "train", "", f"{SAVED} lacks args, without which"),
    case("resuming without a step", state(without("steps")), "train", "", f"{SAVED} lacks steps, without which"),
    case("resuming without weights", state(without("ema")), "train", "", f"{SAVED} lacks ema, without which"),
    case("resuming half weights", state(lambda c: c.update(model=without("pos_embed")(c["model"]))), "train", "", "pos_embed is absent"),
    case("resuming text for weights", state(lambda c: c.update(model="hello")), "train", "", "the checkpoint's 'model' is no state dict"),
    case("resuming another optimiser", state(lambda c: c.update(opt={"state": {}, "param_groups": []})), "train", "", SAVED),
    case("resuming no latent space", state(lambda c: c.update(latent_space=None)), "train", "", NONE_CAN),
    case("resuming another model", None, "train", "--model SiT-T/4", "was trained with --model SiT-T/2, now SiT-T/4 came"),
    case("resuming with another encoder", lambda: shutil.copytree("encoder", "other"), "train", "--enc-type local-dir:other",
         "was trained with --enc-type local-dir:encoder, now local-dir:other came"),
    case("resuming with another batch size", None, "train", "--batch-size 8", "was trained with --batch-size 4, now 8 came"),
    case("resuming with more classes", None, "train", "--num-classes 9", "was trained with --num-classes 3, now 9 came"),
    case("resuming on other data", label(2), "train", "", "was trained on other data than data"),
    case("resuming on less data", all_of(remove(image(5)), remove(moments(5))), "train", "", "was trained on other data than data"),
    case("resuming in another latent space", edit(RECORD, lambda c: c["vae"].update(scale=2)), "train", "", "and the data set has 2"),
    case("resuming at another resolution", None, "train", "--resolution 64", "resolution 64 was asked for"),
    case("a new run in the place of an old one", None, "train", "--resume none", "holds 1 checkpoints up to step 1"),
    case("resuming a file that is not there", None, "train", "--resume nowhere.pt", "no checkpoint at nowhere.pt"),
    case("resuming a file of text", write("x.pt", "hello"), "train", f"{NEW} --resume x.pt", "x.pt cannot be read as a checkpoint"),
    case("resuming another run's file", lambda: shutil.copy(SAVED, "x.pt"), "train", "--resume x.pt", "holds checkpoints of its own"),
    case("resuming foreign safetensors", safetensors("x.safetensors"), "train", f"{NEW} --resume x.safetensors", "as exported weights"),
    case("resuming exported weights", lambda: checkpoint.export(SAVED, "x.safetensors"), "train", f"{NEW} --resume x.safetensors",
         "x.safetensors lacks data, draws, "),
    case("initial weights of another model", None, "train", f"{NEW} --model SiT-T/4 --init-weights {SAVED}", "choose the same --model"),
    case("more steps in a folder for the log", all_of(remove("exps/run/metrics.jsonl"), write("exps/run/metrics.jsonl/x")), "train", "",
         "metrics.jsonl"),

    case("sampling a truncated checkpoint", cut(SAVED), "generate", "", CANNOT),
    case("sampling a checkpoint with a flipped bit", flip(SAVED), "generate", "", CANNOT),
    case("sampling a pickle with code", write(SAVED, pickle.dumps(Harmful())), "generate", "", CANNOT),
    case("sampling a tensor", pt(torch.zeros(3), SAVED), "generate", "", f"{SAVED} holds a Tensor, not a checkpoint"),
    case("sampling from nowhere", None, "generate", "--ckpt nowhere", "no checkpoint at nowhere"),
    case("sampling no experiment", None, "generate", "--ckpt data", "no checkpoint below data/checkpoints"),
    case("sampling foreign safetensors", safetensors("x.safetensors"), "generate", "--ckpt x.safetensors", "as exported weights"),
    case("sampling safetensors that say little", safetensors("x.safetensors", {"reg": '{"weights": "ema"}'}), "generate",
         "--ckpt x.safetensors", "does not describe its architecture"),
    case("a released file without its model", state(without("architecture")), "generate", "", "add --model, e.g. SiT-XL/2"),
    case("a released file as another model", state(without("architecture")), "generate", "--model SiT-B/2", "SiT-B/2 has width 768"),
    case("weights of something else", pt({"a": torch.zeros(1)}, SAVED), "generate", "--model SiT-B/2", "it is not a SiT"),
    case("a checkpoint as another model", None, "generate", "--model SiT-T/4", "contradicts the checkpoint"),
    case("half a description", state(lambda c: c.update(architecture={"depth": 6})), "generate", "", "architecture is not described"),
    case("another description", state(lambda c: c["architecture"].update(depth=7)), "generate", "", "is absent in the checkpoint"),
    case("a description that cannot be", state(lambda c: c["architecture"].update(num_heads=7)), "generate", "",
         "no model can be built from the checkpoint's architecture"),
    case("a path that is unknown", state(lambda c: c["args"].update(path_type="x")), "generate", "",
         "the path 'x': expected linear or cosine"),
    case("no latent space", state(lambda c: c.update(latent_space=None)), "generate", "", f"{SAVED} holds latent_space as NoneType"),
    case("half a latent space", state(lambda c: c.update(latent_space={"vae": "x"})), "generate", "", "lacks scale, shift"),
    case("no averaged weights", state(without("ema")), "generate", "", "the checkpoint has no 'ema' weights"),
    case("a class out of range", None, "generate", "--classes 0,3", "the checkpoint has classes 0 to 2"),
    case("guidance below 1", None, "generate", "--cfg-scale 0.9", "--cfg-scale is 0.9"),
    case("guidance without end", None, "generate", "--cfg-scale inf", "--cfg-scale is inf"),
    case("class guidance that is not a number", None, "generate", "--cls-cfg-scale nan", "--cls-cfg-scale is nan"),
    case("an empty interval", None, "generate", "--guidance-low 0.9 --guidance-high 0.1", "the guidance interval is [0.9, 0.1]"),
    case("no samples", None, "generate", "--num-fid-samples 0", "--num-fid-samples is 0"),
    case("samples below a file", write("mine", "mine"), "generate", "--sample-dir mine/x", "cannot create the folder mine/x"),
    case("samples into a file", write("mine", "mine"), "generate", "--sample-dir mine", "cannot create the folder mine"),
    case("sampling without a vae", None, "generate", "--vae nowhere", "no VAE at nowhere"),
    case("sampling with a truncated vae", cut(DECODER), "generate", "", NO_VAE),
    case("sampling with another vae", edit(VAE, lambda c: c.update(scaling_factor=2.0)), "generate", "", "the decoder has 2.0"),

    case("exporting over a file", write("x.safetensors", "mine"), "export", "exps/run x.safetensors", "x.safetensors is there already"),
    case("exporting to another kind of file", None, "export", "exps/run x.pt", "x.pt does not end in .safetensors"),
    case("exporting below a file", write("mine", "mine"), "export", "exps/run mine/x.safetensors", "cannot write mine/x.safetensors"),
    case("exporting a truncated checkpoint", cut(SAVED), "export", "exps/run x.safetensors", CANNOT),
    case("exporting what is not there", state(without("model")), "export", "exps/run x.safetensors --weights model", "no 'model' weights"),

    case("a sweep of nothing", None, "sweep", "nowhere --cfg-scale 1", "no checkpoint at nowhere"),
    case("a sweep of unknown steps", None, "sweep", "exps/run --steps 1,7", "--steps names '7', and exps/run has checkpoints of training"),
    case("a sweep of steps in a file", None, "sweep", f"{SAVED} --steps 1", "has checkpoints of training steps (none)"),
    case("a sweep of words", None, "sweep", "exps/run --cfg-scale 1,two", "--cfg-scale is '1,two': give numbers from 1 on"),
    case("a sweep of no solver steps", None, "sweep", "exps/run --num-steps 0,50", "--num-steps is '0,50': give whole numbers from 1 on"),
    case("a sweep of an empty interval", None, "sweep", "exps/run --guidance-low 0.9 --guidance-high 1,0.8", "an empty interval"),
]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """What the cases on experiments begin with: a run of one step in exps/run, its data, encoder and VAE."""
    place = shutil.copytree(prepared, tmp_path_factory.mktemp("trained") / "place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main([*PROGRAMS["train"][1].split(), "--max-train-steps", "1"])
    return place


@pytest.mark.parametrize(("damage", "program", "flags", "sentence", "leaves"), RUN)
def test_faults_of_checkpoints(trained, tmp_path, refused, damage, program, flags, sentence, leaves):
    refused(shutil.copytree(trained, tmp_path / "place"), damage, program, flags, sentence, leaves)


# ---- scores

INCEPTION = "--features inception --inception-weights x.pt"
NO_TOKENS = "x.npz is not readable as class tokens"
TOKENS = "--class-tokens x.npz --enc-type local-dir:encoder"
REF, SAMPLE = "reference.npz", "samples.npz"
OF_OTHERS = np.array('{"distance": "fd_encoder"}')

SCORE = [
    case("no reference", remove(REF), "score", "", "--ref-batch reference.npz not found"),
    case("no samples to score", remove(SAMPLE), "score", "", "--sample-batch samples.npz not found"),
    case("a truncated npz", cut(SAMPLE), "score", "", "samples.npz is not a readable npz file"),
    case("a pickle for an npz", write(SAMPLE, pickle.dumps(Harmful())), "score", "", "samples.npz is not a readable npz file"),
    case("an npy for an npz", npy(SAMPLE, random_images(8)), "score", "", "samples.npz is not a readable npz file"),
    case("a flipped bit in an npz", flip(SAMPLE), "score", "", "or give the command again that made it", *CACHED),
    case("a flipped bit in the reference", flip(REF), "score", "", "reference.npz is damaged"),
    case("an npz that ends early", says_shape(SAMPLE, (100, 16, 16, 3)), "score", "", "arr_0 ends before the 100 images"),
    case("an npz of huge images", says_shape(SAMPLE, (2, 10**6, 10**6, 3)), "score", "", "expected images of 1 to 134217728 pixels"),
    case("an npz of code", npz(SAMPLE, np.array([Harmful()] * 4)), "score", "", "arr_0 of samples.npz is object (4,)"),
    case("an npz without arr_0", npz(SAMPLE, images=random_images(8)), "score", "", "samples.npz has no arr_0 but images"),
    case("images of floats", npz(SAMPLE, random_images(8) / 255), "score", "", "arr_0 of samples.npz is float64 (8, 16, 16, 3)"),
    case("images in another order", npz(SAMPLE, random_images(8).transpose(0, 3, 1, 2)), "score", "", "is uint8 (8, 3, 16, 16)"),
    case("one image", npz(SAMPLE, random_images(1)), "score", "", "holds 1 images: a score needs at least 2"),
    case("images without a pixel", npz(SAMPLE, random_images(8)[:, :0]), "score", "", "expected images of 1 to 134217728 pixels"),
    case("a mean without a covariance", npz(REF, mu=np.zeros(32)), "score", "", "reference.npz has mu (32,) and sigma missing"),
    case("a covariance of another width", npz(REF, mu=np.zeros(32), sigma=np.eye(31)), "score", "", "expected (F,) and (F, F)"),
    case("statistics that are not numbers", npz(REF, mu=np.zeros(2), sigma=np.eye(2) * np.nan), "score", "", "are not finite"),
    case("statistics of words", npz(REF, mu=np.array(["a"] * 2), sigma=np.eye(2)), "score", "", "reference.npz is not a readable npz"),
    case("statistics about a list", npz(REF, mu=np.zeros(2), sigma=np.eye(2), about=np.array("[]")), "score", "", "is no JSON object"),
    case("statistics of other features", npz(REF, mu=np.zeros(32), sigma=np.eye(32)), "score", "", "holds statistics of other features"),
    case("statistics of another width", npz(REF, mu=np.zeros(5), sigma=np.eye(5), about=OF_OTHERS), "score", "",
         "has mu of 5 numbers and encoder gives 32"),
    case("an empty folder", lambda: os.mkdir("empty"), "score", "--sample-batch empty", "empty holds 0 images"),
    case("a folder with mixed sizes", picture("made/z.png", size=(32, 33)), "score", "--sample-batch made", "bring all images to", *CACHED),
    case("a folder with a truncated image", cut("made/b.png"), "score", "--sample-batch made", "made/b.png is not a readable", *CACHED),
    case("a folder with transparency", picture("made/b.png", "RGBA"), "score", "--sample-batch made", "b.png has mode RGBA", *CACHED),
    case("a folder with a huge image", bomb("made/a.png"), "score", "--sample-batch made", "made/a.png has more than 134217728 pixels"),
    case("settings that are not json", write("settings.json", "{"), "score", "", "settings.json is not JSON"),
    case("an unknown score", None, "score", "--metrics lpips", "--metrics names 'lpips'"),
    case("a score of other features", None, "score", "--metrics fid", "--metrics names 'fid'"),
    case("a device that is not there", None, "score", "--device cuda:77", "--device is 'cuda:77' and torch sees"),
    case("unknown features", None, "score", "--features vgg", "--features is 'vgg'"),
    case("features from nowhere", None, "score", "--features local-dir:nowhere", "nowhere is no timm model"),
    case("features without weights", remove(NETWORK), "score", "", "encoder is no timm model"),
    case("features' truncated weights", cut(NETWORK), "score", "", NO_MODEL),
    case("features' config without settings", edit(CONFIG, lambda c: c.update(pretrained_cfg=None)), "score", "", NO_MODEL),
    case("features' config that cannot be", edit(CONFIG, lambda c: c["model_args"].update(num_heads=3)), "score", "", NO_MODEL),
    case("weights of features that are not asked for", None, "score", "--inception-weights x.pt", "came with --features local-dir:encoder"),
    case("inception from nowhere", None, "score", INCEPTION, "Inception weights x.pt not found"),
    case("inception that is text", write("x.pt", "hello"), "score", INCEPTION, "x.pt is no state dict"),
    case("inception with code", pt({"a": Harmful()}, "x.pt"), "score", INCEPTION, "x.pt is no state dict"),
    case("inception of something else", pt({"a": torch.zeros(1)}, "x.pt"), "score", INCEPTION, "x.pt is not the Inception of 2015-12-05"),
    case("inception of numbers", pt({1: torch.zeros(1)}, "x.pt"), "score", INCEPTION, "x.pt is not the Inception of 2015-12-05"),
    case("inception that is a list", pt([torch.zeros(1)], "x.pt"), "score", INCEPTION, "x.pt holds a list"),
    case("a result below a file", write("mine", "mine"), "score", "--output mine/metrics.json", "mine/metrics.json cannot be written"),
    case("a result in a new folder", remove(REF), "score", "--output new/metrics.json", "not found"),
    case("a result in the place of the samples", None, "score", "--output samples.npz", "samples.npz is the input samples.npz"),
    case("class tokens from nowhere", None, "score", TOKENS, NO_TOKENS),
    case("class tokens of an npy", npy("x.npz", np.zeros((8, 32))), "score", TOKENS, NO_TOKENS),
    case("class tokens of words", npz("x.npz", class_tokens=np.array([["a"] * 32] * 8), labels=np.zeros(8)), "score", TOKENS, NO_TOKENS),
    case("class tokens of other samples", npz("x.npz", class_tokens=np.zeros((7, 32)), labels=np.zeros(7)), "score", TOKENS, "8 images"),
    case("class tokens of another width", npz("x.npz", class_tokens=np.zeros((8, 3)), labels=np.zeros(8)), "score", TOKENS, "3 numbers"),
    case("class tokens of no encoder", write("x.npz"), "score", "--class-tokens x.npz", "name it with --enc-type"),
    case("class tokens beside a list", write("settings.json", "[1]"), "score", "--class-tokens x.npz", "settings.json is no object"),
    case("an encoder without class tokens", None, "score", "--enc-type dinov2-vit-b", "came without --class-tokens"),

    case("statistics of damaged images", flip(SAMPLE), "stats", "samples.npz x.npz", "samples.npz is damaged"),
    case("statistics of statistics", npz("mu.npz", mu=np.zeros(3), sigma=np.eye(3)), "stats", "mu.npz x.npz", "holds statistics and no"),
    case("statistics to another kind of file", None, "stats", "samples.npz x.json", "give it a name that ends in .npz"),
    case("statistics below a file", write("mine", "mine"), "stats", "samples.npz mine/x.npz", "mine/x.npz cannot be written"),
    case("statistics in the place of the images", None, "stats", "samples.npz samples.npz", "samples.npz is the input samples.npz"),
    case("statistics that keep too few", None, "stats", "samples.npz x.npz --keep 2", "--keep is 2: give 0, or at least 4"),
    case("statistics of no pixels", None, "stats", "samples.npz x.npz --adm-crop 0", "--adm-crop is 0"),
    case("statistics of mixed sizes", picture("made/z.png", size=(32, 33)), "stats", "made x.npz", "bring all images to one size"),
    case("statistics of a strip", picture("made/z.png", size=(1, 60_000)), "stats", "made x.npz --adm-crop 64", "would be enlarged"),
]


@pytest.fixture(scope="module")
def scored(encoder_folder, tmp_path_factory) -> Path:
    """What the cases on scores begin with: two npz files, a folder of images, a feature network."""
    place = tmp_path_factory.mktemp("scored")
    shutil.copytree(encoder_folder, place / "encoder")
    np.savez(place / REF, random_images(9, 32, 32, 1))
    np.savez(place / SAMPLE, random_images(8, 32, 32, 2))
    (place / "made").mkdir()
    for pixels, name in zip(random_images(3, 32, 32), "abc", strict=True):
        Image.fromarray(pixels).save(place / "made" / f"{name}.png")
    return place


@pytest.mark.parametrize(("damage", "program", "flags", "sentence", "leaves"), SCORE)
def test_faults_of_scores(scored, tmp_path, refused, damage, program, flags, sentence, leaves):
    refused(shutil.copytree(scored, tmp_path / "place"), damage, program, flags, sentence, leaves)


# ---- the machine

@pytest.mark.parametrize(("damage", "program", "flags", "sentence", "leaves"), [
    case("samples", None, "generate", "", "GiB more in"),
    case("samples elsewhere", None, "generate", "--sample-dir new/x --no-png", "or choose another --sample-dir"),
    case("a zip of moments", None, "encode", "--dest out.zip", "out.zip needs", "out.zip.partial*"),
    case("a zip of images", None, "convert", "--dest out.zip", "out.zip needs", "out.zip.partial*"),
])
def test_a_disk_that_is_too_small(trained, tmp_path, monkeypatch, refused, damage, program, flags, sentence, leaves):
    place = shutil.copytree(trained, tmp_path / "place")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(2**30, 2**30 - 1000, 1000))
    refused(place, damage, program, flags, sentence, leaves)


@contextmanager
def limited(what: int, size: int):
    """Gives a function that limits this process; the limit is gone afterwards."""
    soft, hard = resource.getrlimit(what)
    try:
        yield lambda: resource.setrlimit(what, (size, hard))
    finally:
        resource.setrlimit(what, (soft, hard))


@pytest.mark.parametrize(("size", "program", "flags", "sentence", "leaves"), [
    case("checkpoint", 100_000, "train", "", "cannot write exps/new/checkpoints/0000003.pt", "exps/new", "exps/new/.lock",
         "exps/new/args.json", "exps/new/metrics.jsonl", "exps/new/checkpoints"),
    case("settings", 100, "train", "", "cannot write exps/new/args.json", "exps/new", "exps/new/.lock"),
    case("weights to share", 100_000, "export", "exps/run x.safetensors", "cannot write x.safetensors"),
    case("block of samples", 5_000, "generate", "", "cannot write exps/run/samples/", "exps/run/samples*"),
    case("moments", 1_000, "encode", "", "cannot write out/00000/img-mean-std-00000000.npy", *BEGUN, "out/.tmp/*"),
    case("images", 1_000, "convert", "", "cannot write out/00000/img00000000.png", *BEGUN, "out/.tmp/*"),
    case("picture of a check", 1_000, "check", "", "cannot write check.png"),
])
def test_a_disk_that_is_full(trained, tmp_path, refused, size, program, flags, sentence, leaves):
    """No file can grow beyond `size` bytes."""
    place = shutil.copytree(trained, tmp_path / "place")
    with limited(resource.RLIMIT_FSIZE, size) as limit:
        refused(place, limit, program, f"{NEW} {flags}" if program == "train" else flags, sentence, leaves)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory is taken")
def test_images_without_end(scored, tmp_path, refused):
    """The header of an npz file says more images than any memory has room for; the program may take 1 GiB."""
    place = shutil.copytree(scored, tmp_path / "place")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, used + 2**30) as limit:
        refused(place, all_of(says_shape(SAMPLE, (10**13, 16, 16, 3)), limit), "score", "", "arr_0 ends before the 10000000000000 images")


# ---- through the shell, as a user types it

@pytest.mark.parametrize(("damage", "command", "environment", "sentence", "leaves"), [
    pytest.param(cut(image(5)), "bash train.sh toy --max-train-steps 3 --sampling-steps 0 --batch-size 4 --num-workers 2",
                 {"DATA_DIR": "{place}/data", "OUTPUT_DIR": "{place}/exps", "NUM_GPUS": "1"}, f"{image(5)} is not a readable image",
                 tuple(name.replace("exps/run", "exps/reg-toy") for name in STARTED), id="a worker of train.sh meets a truncated png"),
    pytest.param(None, "bash eval.sh {place}/exps/run --steps 1,7", {"REF_BATCH": ""}, "--steps names '7'", (),
                 id="eval.sh is asked for steps that are not there"),
])
def test_faults_through_the_shell(trained, tmp_path, monkeypatch, damage, command, environment, sentence, leaves):
    place = shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(place)
    if damage is not None:
        damage()
    before = snapshot(place)
    environment = {name: value.format(place=place) for name, value in environment.items()}
    done = shell(*command.format(place=place).split(), ok=False, **environment)
    assert done.returncode == 2
    one_sentence(done.stderr, sentence)
    same_but(place, before, leaves)
