"""What every program does with damaged files: one sentence, exit status 2, no code of a file run, all files unchanged.

Each case damages something in a folder of its own, runs a program there with relative paths, and compares the folder
before and after. Files that a fault may leave, so that the same command continues, are listed with the case.
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

# Flags that let each program finish in a second if nothing is wrong; a case's own flags follow and win.
PROGRAMS = {
    "train": (train.main, "--data-dir data --enc-type local-dir:encoder --vae vae --output-dir exps --exp-name run "
                          "--model SiT-T/2 --projector-dim 32 --batch-size 4 --num-workers 0 --sampling-steps 0 "
                          "--logging-steps 1 --max-train-steps 3"),
    "convert": (dataset_tools.main, "convert --source photos --dest out --resolution 32x32 --workers 0 "
                "--transform=center-crop-dhariwal"),
    "encode": (dataset_tools.main, "encode --source data/images --dest out --model-url vae --batch-size 4 --workers 0"),
    "check": (dataset_tools.main, "check --source data --output check.png --model-url vae --workers 0"),
    "generate": (generate.main, "--ckpt exps/run --vae vae --num-fid-samples 3 --num-steps 1 --per-proc-batch-size 2"),
    "export": (checkpoint.main, "export"),
    "score": (evaluator.main, "--ref-batch reference.npz --sample-batch samples.npz --features local-dir:encoder "
                              "--output metrics.json"),
    "sweep": (sweep.main, ""),
}
STARTED = ("exps", "exps/run", "exps/run/args.json", "exps/run/metrics.jsonl", "exps/run/.lock",
           "exps/run/checkpoints", "exps/run/checkpoints/*")      # by train, which saves where a file cannot be read
BEGUN = ("out", "out/.unfinished.json", "out/.tmp", "out/.tmp/.lock", "out/00000", "out/00000/*")  # convert, encode
CHECKED = ("data/*/catalogue.npz", "data/*.catalogue.npz")


class Harmful:
    """Prints when it is read by pickle."""

    SAID = "code in a file was run"

    def __reduce__(self):
        return print, (self.SAID,)


def snapshot(place: Path) -> dict[str, str | None]:
    """Every name below a folder, hidden or not, with the hash of its content; None for folders and links."""
    return {str(path.relative_to(place)): None if path.is_dir() or path.is_symlink() else
            hashlib.sha256(path.read_bytes()).hexdigest() for path in place.rglob("*")}


def run_refused(place: Path, damage: Callable | None, program: str, flags: str, word: str, leaves, monkeypatch,
                capfd) -> None:
    monkeypatch.chdir(place)
    if damage is not None:
        damage()
    before = snapshot(place)
    main, always = PROGRAMS[program]
    AcceleratorState._reset_state(reset_partial_state=True)       # as in a new process
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*always.split(), *flags.split()])
    printed = capfd.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("error: ") and word in printed.err, printed.err
    assert printed.err.count("error: ") == 1 and "Traceback" not in printed.err and Harmful.SAID not in printed.out
    after = snapshot(place)
    assert {name: after.get(name, "gone") for name in before} == before
    assert not [name for name in after.keys() - before.keys() if not any(fnmatch(name, left) for left in leaves)]


# ---- damages: made with names, called in the case's folder -----------------------------------------------------------

def write(name: str, content: bytes | str = b"") -> Callable:
    def damage():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str) -> Callable:
    return lambda: os.truncate(name, os.path.getsize(name) // 2)


def flip(name: str) -> Callable:
    """One bit in the middle of the file."""
    def damage():
        data = bytearray(Path(name).read_bytes())
        data[len(data) // 2] ^= 1
        Path(name).write_bytes(data)

    return damage


def remove(name: str) -> Callable:
    return lambda: shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)


def all_of(*damages: Callable) -> Callable:
    return lambda: [damage() for damage in damages]


def picture(name: str, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Callable:
    return lambda: Image.new(mode, size).save(name)


def bomb(name: str) -> Callable:
    """A PNG of 69 bytes whose header claims 60,000 x 60,000 px."""
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


def claims_shape(name: str, shape: tuple[int, ...]) -> Callable:
    """An npz file whose images have this shape by their header, and 1,000 bytes."""
    def damage():
        with zipfile.ZipFile(name, "w") as archive, archive.open("arr_0.npy", "w") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(1000))

    return damage


def edit(name: str, change: Callable) -> Callable:
    """A JSON file after `change(content)`."""
    def damage():
        content = json.loads(Path(name).read_text())
        change(content)
        Path(name).write_text(json.dumps(content))

    return damage


def zipped(more: str | None = None) -> Callable:
    """images/ as images.zip, with one more entry."""
    def damage():
        folder, data = Path("data/images"), io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, file.relative_to(folder))
            if more is not None:
                archive.writestr(more, b"more")
        shutil.rmtree(folder)
        Path("data/images.zip").write_bytes(data.getvalue())

    return damage


def pt(value, name: str) -> Callable:
    return lambda: torch.save(value, name)


def state(change: Callable) -> Callable:
    """The checkpoint after `change(content)`; what that returns, if anything, replaces it."""
    def damage():
        content = torch.load(SAVED, weights_only=True)
        torch.save(change(content) or content, SAVED)

    return damage


def without(*names: str) -> Callable:
    return lambda content: {name: value for name, value in content.items() if name not in names}


def image(i: int) -> str:
    return f"data/images/00000/img{i:08d}.png"


def moments(i: int) -> str:
    return f"data/vae-sd/00000/img-mean-std-{i:08d}.npy"


LABELS, RECORD = "data/images/dataset.json", "data/vae-sd/dataset.json"
CONFIG, NETWORK = "encoder/config.json", "encoder/model.safetensors"
VAE, DECODER = "vae/config.json", "vae/diffusion_pytorch_model.safetensors"
SAVED, REF, SAMPLE = "exps/run/checkpoints/0000001.pt", "reference.npz", "samples.npz"
NAN = np.full((8, 8, 8), np.nan, np.float32)
INCEPTION = "--features inception --inception-weights x.pt"

# damage, program, flags, a word of the sentence, what may be left
DATA = [
    (all_of(cut(image(5)), write(moments(6)), picture(image(7), "L")), "check", "", "3 of 12", CHECKED),
    (bomb(image(5)), "check", "", "134217728 pixels", CHECKED),
    (npy(moments(5), np.array([Harmful()])), "check", "", moments(5), CHECKED),
    (npy(moments(5), NAN), "check", "", "not finite", CHECKED),
    (None, "check", "--output nowhere/check.png", "nowhere", CHECKED),
    (edit(VAE, lambda c: c.update(scaling_factor=2.0)), "check", "", "scale", CHECKED),

    (cut(image(5)), "train", "", image(5), STARTED),
    (cut(image(5)), "train", "--num-workers 1", image(5), STARTED),
    (cut(image(0)), "train", "", image(0), ()),
    (all_of(*(npy(moments(i), NAN) for i in range(12))), "train", "--max-skipped-updates 2", "skip",
     (*STARTED, "exps/run/checkpoints*")),
    (remove(moments(5)), "train", "", "no partner", ()),
    (write(LABELS, "[" * 100_000), "train", "", "not JSON", ()),
    (edit(LABELS, lambda c: c["labels"].pop(5)), "train", "", "no label", ()),
    (edit(RECORD, lambda c: c.update(vae=3)), "train", "", RECORD, ()),
    (edit(RECORD, lambda c: c["vae"].pop("scale")), "train", "", "scale", ()),
    (lambda: os.rename(RECORD, "data/vae-sd/.unfinished.json"), "train", "", "not finished", ()),
    (remove("data"), "train", "", "data", ()),
    (None, "train", "--num-classes 2", "label 2", ()),
    (None, "train", "--resolution 64", "32 px", ()),
    (None, "train", "--gradient-accumulation-steps 3", "multiple of 3", ()),
    (all_of(zipped(), flip("data/images.zip")), "train", "", "damaged", STARTED),
    (zipped(more="../out.png"), "train", "", "../out.png", ()),
    (all_of(zipped(), cut("data/images.zip")), "train", "", "not a readable zip", ()),

    (None, "train", "--enc-type local-dir:nowhere", "nowhere", ()),
    (cut(CONFIG), "train", "", CONFIG, ()),
    (edit(CONFIG, lambda c: c["model_args"].update(num_heads=3)), "train", "", "cannot build", ()),
    (cut(NETWORK), "train", "", "damaged", ()),
    (pt({"cls_token": Harmful()}, "x.pt"), "train", "--encoder-weights x.pt", "x.pt", ()),
    (write("exps", "mine"), "train", "", "exps/run", ()),
    (write("exps/run/checkpoints", "mine"), "train", "", "exps/run/checkpoints", STARTED),
    (None, "train", "--resume nowhere.pt", "nowhere.pt", ()),
    (write("x.npz", "hello"), "train", "--eval-steps 1 --ref-batch x.npz", "x.npz", ()),

    (remove("vae"), "encode", "", "vae", ()),
    (cut(VAE), "encode", "", "vae", ()),
    (cut(DECODER), "encode", "", "vae", ()),
    (cut(image(5)), "encode", "", image(5), BEGUN),
    (None, "encode", "--dest data", "other files", ()),
    (None, "encode", "--dest data/vae-sd", "data/vae-sd", ()),
    (write("out.zip", "mine"), "encode", "--dest out.zip", "out.zip", ()),

    (cut("photos/cat/a.png"), "convert", "", "photos/cat/a.png", BEGUN),
    (bomb("photos/dog/d.png"), "convert", "", "photos/dog/d.png", BEGUN),
    (picture("photos/dog/e.tif", "F"), "convert", "", "floating-point", BEGUN),
    (picture("photos/e.png"), "convert", "", "e.png", ()),
    (write("photos/dataset.json", "{"), "convert", "", "photos/dataset.json", ()),
    (None, "convert", "--dest photos/out", "photos", ()),
]
RUN = [
    (cut(SAVED), "train", "", SAVED, ()),
    (flip(SAVED), "train", "", SAVED, ()),
    (write(SAVED, pickle.dumps({"ema": Harmful()})), "train", "", SAVED, ()),
    (pt({"ema": Harmful()}, SAVED), "train", "", SAVED, ()),
    (pt({}, SAVED), "train", "", SAVED, ()),
    (state(without("ema")), "train", "", "ema", ()),
    (state(lambda c: c.update(model=without("pos_embed")(c["model"]))), "train", "", "pos_embed", STARTED),
    (state(lambda c: c.update(opt={"state": {}, "param_groups": []})), "train", "", SAVED, STARTED),
    (None, "train", "--model SiT-T/4", "SiT-T/2", ()),
    (all_of(remove(image(5)), remove(moments(5))), "train", "", "other files or labels", ()),
    (edit(CONFIG, lambda c: c.update(changed=True)), "train", "", "other files of local-dir:encoder", ()),
    (lambda: shutil.copytree("encoder", "moved") and os.truncate("moved/model.safetensors", 1000), "train",
     "--enc-type local-dir:moved", "was trained with local-dir:encoder", ()),
    (state(lambda c: c["architecture"].update(num_heads=0)), "train", "", SAVED, ()),
    (None, "train", "--resume none", "exps/run", ()),
    (write("x.pt", "hello"), "train", "--exp-name new --init-weights x.pt", "x.pt", ("exps/new*",)),

    (cut(SAVED), "generate", "", SAVED, ()),
    (write(SAVED, pickle.dumps(Harmful())), "generate", "", SAVED, ()),
    (pt(torch.zeros(3), SAVED), "generate", "", "Tensor", ()),
    (lambda: save_file({"a": torch.zeros(1)}, "x.safetensors"), "generate", "--ckpt x.safetensors", "x.safe", ()),
    (state(without("architecture")), "generate", "", "--model", ()),
    (state(lambda c: c["architecture"].update(num_heads=7)), "generate", "", "architecture", ()),
    (edit(VAE, lambda c: c.update(scaling_factor=2.0)), "generate", "", "scale", ()),
    (state(lambda c: c["architecture"].update(depth=10**9)), "generate", "", "depth", ()),
    (state(lambda c: c["architecture"].update(num_heads=-1)), "generate", "", "num_heads", ()),
    (state(lambda c: c["latent_space"].update(downsampling=10**9)), "generate", "", "downsampling", ()),
    (state(lambda c: c["latent_space"].update(vae="x" * 300)), "generate", "", "vae", ()),
    (state(lambda c: c["args"].update(path_type=["linear"])), "generate", "", "path", ()),
    (state(lambda c: c.update(ema={i: torch.zeros(1) for i in range(9)})), "generate", "", "ema", ()),
    (None, "generate", "--classes 0,3", "--classes", ()),
    (write("mine", "mine"), "generate", "--sample-dir mine/x", "mine/x", ()),

    (write("x.safetensors", "mine"), "export", "exps/run x.safetensors", "x.safetensors", ()),
    (cut(SAVED), "export", "exps/run x.safetensors", SAVED, ()),
    (None, "sweep", "nowhere --cfg-scale 1", "nowhere", ()),
    (None, "sweep", "exps/run --steps 1,7", "7", ()),
]
SCORE = [
    (remove(REF), "score", "", REF, ()),
    (cut(SAMPLE), "score", "", SAMPLE, ()),
    (flip(SAMPLE), "score", "", SAMPLE, ()),
    (write(SAMPLE, pickle.dumps(Harmful())), "score", "", SAMPLE, ()),
    (npz(SAMPLE, np.array([Harmful()] * 4)), "score", "", SAMPLE, ()),
    (claims_shape(SAMPLE, (100, 16, 16, 3)), "score", "", "arr_0", ()),
    (npz(REF, mu=np.zeros(32), sigma=np.eye(31)), "score", "", REF, ()),
    (cut("made/b.png"), "score", "--sample-batch made", "made/b.png", ()),
    (bomb("made/a.png"), "score", "--sample-batch made", "made/a.png", ()),
    (None, "score", "--metrics lpips", "lpips", ()),
    (cut(NETWORK), "score", "", "encoder", ()),
    (pt({"a": Harmful()}, "x.pt"), "score", INCEPTION, "x.pt", ()),
    (write("mine", "mine"), "score", "--output mine/metrics.json", "mine", ()),
    (None, "score", "--output samples.npz", SAMPLE, ()),
    (npz("x.npz", class_tokens=np.zeros((7, 32)), labels=np.zeros(7)), "score",
     "--class-tokens x.npz --enc-type local-dir:encoder", "x.npz", ()),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, data_dir, encoder_folder, vae_folder) -> Path:
    """Data, encoder and VAE, four photos in two classes, and images to score."""
    place = tmp_path_factory.mktemp("prepared") / "place"
    for name, source in (("data", data_dir), ("encoder", encoder_folder), ("vae", vae_folder)):
        shutil.copytree(source, place / name)
    names = ("photos/cat/a", "photos/cat/b", "photos/dog/c", "photos/dog/d", "made/a", "made/b", "made/c")
    for photo, name in zip(random_images(7, 40, 50), names, strict=True):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(place / f"{name}.png")
    np.savez(place / REF, random_images(9, 32, 32, 1))
    np.savez(place / SAMPLE, random_images(8, 32, 32, 2))
    return place


@pytest.fixture(scope="module")
def experiment(prepared, tmp_path_factory) -> Path:
    """`prepared` with a run of one step in exps/run."""
    place = shutil.copytree(prepared, tmp_path_factory.mktemp("experiment") / "place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main([*PROGRAMS["train"][1].split(), "--max-train-steps", "1"])
    return place


def number(cases: list) -> list:
    return [pytest.param(*case, id=f"{case[1]}-{i}-{case[3].rpartition('/')[2]}") for i, case in enumerate(cases)]


@pytest.mark.parametrize(("damage", "program", "flags", "word", "leaves"), number([*DATA, *SCORE]))
def test_faults_of_data_networks_and_samples(prepared, tmp_path, monkeypatch, capfd, damage, program, flags, word,
                                             leaves):
    place = shutil.copytree(prepared, tmp_path / "place")
    run_refused(place, damage, program, flags, word, leaves, monkeypatch, capfd)


@pytest.mark.parametrize(("damage", "program", "flags", "word", "leaves"), number(RUN))
def test_faults_of_experiments(experiment, tmp_path, monkeypatch, capfd, damage, program, flags, word, leaves):
    place = shutil.copytree(experiment, tmp_path / "place")
    run_refused(place, damage, program, flags, word, leaves, monkeypatch, capfd)


@pytest.mark.parametrize("known", [True, False], ids=["known by content", "checkpoint of before"])
def test_the_same_encoder_elsewhere_resumes(experiment, tmp_path, monkeypatch, capfd, known):
    place = shutil.copytree(experiment, tmp_path / "place")
    monkeypatch.chdir(place)
    flags = PROGRAMS["train"][1]
    if known:
        shutil.move("encoder", "moved")
        flags = flags.replace("local-dir:encoder", "local-dir:moved")
    else:
        state(without("encoders"))()
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(flags.split())
    assert "resumed exps/run/checkpoints/0000001.pt" in capfd.readouterr().out
    again = torch.load("exps/run/checkpoints/0000003.pt", weights_only=True)["encoders"]
    assert again == torch.load(experiment / SAVED, weights_only=True)["encoders"]


@contextmanager
def limited(what: int, size: int):
    """Yields a function that limits this process; the limit is removed afterwards."""
    soft, hard = resource.getrlimit(what)
    try:
        yield lambda: resource.setrlimit(what, (size, hard))
    finally:
        resource.setrlimit(what, (soft, hard))


@pytest.mark.parametrize(("size", "program", "flags", "word", "leaves"), [
    (100_000, "train", "--exp-name new", "exps/new/checkpoints", ("exps/new*",)),
    (100_000, "export", "exps/run x.safetensors", "x.safetensors", ()),
    (5_000, "generate", "", "exps/run/samples", ("exps/run/samples*",)),
    (1_000, "encode", "", "out/00000/img-mean-std-00000000.npy", (*BEGUN, "out/.tmp/*")),
    (1_000, "convert", "", "out/00000/img00000000.png", (*BEGUN, "out/.tmp/*")),
])
def test_a_full_disk(experiment, tmp_path, monkeypatch, capfd, size, program, flags, word, leaves):
    """No file can grow beyond `size` bytes; what was whole stays."""
    place = shutil.copytree(experiment, tmp_path / "place")
    with limited(resource.RLIMIT_FSIZE, size) as limit:
        run_refused(place, limit, program, flags, word, leaves, monkeypatch, capfd)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell how much memory is used")
def test_images_without_end(prepared, tmp_path, monkeypatch, capfd):
    """The header of an npz file claims more images than any memory holds; the program may take 1 GiB."""
    place = shutil.copytree(prepared, tmp_path / "place")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, used + 2**30) as limit:
        run_refused(place, all_of(claims_shape(SAMPLE, (10**13, 16, 16, 3)), limit), "score", "", "arr_0", (),
                    monkeypatch, capfd)
