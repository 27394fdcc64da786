"""Cached features: stored as the encoder gave them up to a bounded rounding, priced before they are made, and only used where they fit."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from preprocessing.encode_features import encode_features
from preprocessing.work import Destination
from safetensors.torch import load_file, save_file

import train
from dataset import LatentDataset, features_path, read_image
from models.cached_features import (
    FeaturesRecord,
    UnfitFeatures,
    disk_cost,
    features_folder,
    file_size,
    gigabytes,
    pack,
    to_npy,
    unpack,
)
from models.encoders import CachedEncoder, load_encoder, require_made_by, sha256_of_named, sha256_of_parameters
from preprocessing.convert import convert
from preprocessing.dataset_tools import main
from preprocessing.encode import encode
from runtime.messages import UserError
from runtime.stores import open_store
from tests.conftest import tf32_and_autocast
from tests.stress.kills import same
from tests.test_preprocessing import Interrupted, contents, interrupt_after, run_program
from tests.test_train import lines, run
from toy.draw import draw

ROOT = Path(__file__).parents[1]
NETWORKS = ROOT / "toy" / "networks"
TOY = f"local-dir:{NETWORKS / 'encoder'}"                         # 32 px, 4x4 tokens, E = 128
SIDE, COUNT, TOKENS, WIDTH = 32, 10, 16, 128
IMAGENET = 1_281_167
HALF, TINY = 2.0**-11, 2.0**-25                                   # float16: relative error, and absolute error below 2^-14


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Ten drawn images with their moments and float16 features."""
    from PIL import Image

    data = tmp_path_factory.mktemp("prepared")
    for i in range(COUNT):
        drawing = draw(0, i)
        (data / "raw" / f"{drawing.label % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawing.image).save(data / "raw" / f"{drawing.label % 2}" / f"{i:03d}.png")
    convert(str(data / "raw"), str(data / "images"), f"{SIDE}x{SIDE}", "none", workers=0)
    encode(str(data / "images"), str(data / "vae-sd"), str(NETWORKS / "vae"), 4, "float32", 0)
    make(data)
    return data


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(prepared, tmp_path / "data")


def make(data: Path, enc_type: str = TOY, dtype: str = "float16", zipped: bool = False, **settings) -> Path:
    dest = data / (features_folder(enc_type) + ".zip" * zipped)
    encode_features(str(data / "images"), str(dest), enc_type, settings.get("weights"), settings.get("batch_size", 4), dtype, 0)
    return dest


def the_features(data: Path) -> Path:
    return data / features_folder(TOY)


def images_of(data: Path) -> torch.Tensor:
    store = open_store(data / "images")
    return torch.stack([torch.from_numpy(read_image(store, name)) for name in store.names() if name.endswith(b".png")])


def flags(data: Path, out: Path, *more) -> list[str]:
    return ["--data-dir", str(data), "--enc-type", TOY, "--output-dir", str(out), "--exp-name", "run", "--model", "SiT-T/2",
            "--projector-dim", "32", "--batch-size", "4", "--num-workers", "0", "--sampling-steps", "0", "--logging-steps", "1",
            *map(str, more)]


def opened(data: Path, *more) -> tuple:
    """What train.py opens with these flags, and its settings."""
    args = train.resolve(train.parse_args(flags(data, data / "exps", *more)))
    return *train.open_data(args), args


# ---- the form on disk

def test_the_folder_is_named_after_the_encoder():
    assert features_folder("dinov2-vit-b") == "features-dinov2-vit-b"
    assert features_folder("local-dir:toy/networks/encoder") == "features-local-dir-toy-networks-encoder"
    assert features_folder("local-dir:./toy//networks/encoder/") == features_folder("local-dir:toy/networks/encoder")
    assert "/" not in features_folder("local-dir:/a b/ü\n")


def test_an_encoders_features_are_found_in_a_folder_or_a_zip(tmp_path):
    assert features_path(tmp_path, "clip-vit-L") is None
    (tmp_path / "features-clip-vit-L.zip").touch()
    assert features_path(tmp_path, "clip-vit-L") == tmp_path / "features-clip-vit-L.zip"
    assert features_path(tmp_path, f"local-dir:{'n' * 300}") is None                      # no file can be called so


def tokens(seed: int = 0) -> torch.Tensor:
    """Patch tokens (4, 50, 16) of all sizes, with a token of zeros and one of a single number."""
    g = torch.Generator().manual_seed(seed)
    patches = torch.randn(4, 50, 16, generator=g) * 10 ** torch.empty(4, 50, 1).uniform_(-4, 3, generator=g)
    patches[0, 0] = 0
    patches[0, 1] = torch.eye(16)[3] * -7
    return patches


def tensors(stored: np.ndarray) -> dict[str, torch.Tensor]:
    return {part: torch.from_numpy(stored[part].copy()) for part in stored.dtype.names}


def test_eight_bits_are_off_by_half_a_scale_at_most():
    patches = tokens()
    stored = tensors(pack(None, patches, "int8"))
    assert stored["patches"].dtype == torch.int8 and stored["scales"].dtype == torch.float32
    torch.testing.assert_close(stored["scales"][1:], patches[1:].abs().amax(dim=2) / 127)
    _, restored = unpack(stored)
    # Beyond half a scale only the float32 roundings of |x| / scale <= 127 and of the product: 2^-24 of 127 scales each.
    bound = stored["scales"][..., None].double() * (0.5 + 2 * 127 * 2.0**-24)
    error = (restored.double() - patches.double()).abs()
    assert (error <= bound).all() and (error > 0.4 * bound).any()
    assert (stored["scales"] > 0).all()                                                   # nothing is divided by 0
    assert (restored[0, 0] == 0).all() and restored[0, 1, 3] == -7


def test_float16_is_off_by_half_a_unit_at_most_and_the_class_token_not_at_all():
    class_token, patches = torch.randn(4, 16) * 1e6, tokens()                             # beyond float16
    stored = tensors(pack(class_token, patches, "float16"))
    assert stored["patches"].dtype == torch.float16
    restored_class_token, restored = unpack(stored)
    assert torch.equal(restored_class_token, class_token) and restored.dtype == torch.float32
    error = (restored - patches).abs()
    assert (error <= HALF * patches.abs() + TINY).all() and error.max() > 0


@pytest.mark.parametrize(("dtype", "class_token", "numbers"), [
    ("float16", True, 4 * 128 + 2 * 16 * 128), ("float16", False, 2 * 16 * 128), ("int8", True, 4 * 128 + 4 * 16 + 16 * 128)])
def test_the_price_is_what_the_files_take(tmp_path, dtype, class_token, numbers):
    stored = pack(torch.zeros(1, 128) if class_token else None, torch.zeros(1, 16, 128), dtype)[0]
    np.save(tmp_path / "one.npy", stored)
    record = replace(FeaturesRecord.from_record(RECORD), width=128, grid=4, class_token=class_token, dtype=dtype)
    size = (tmp_path / "one.npy").stat().st_size
    assert file_size(record.layout()) == size and numbers < size <= numbers + 256 and np.load(tmp_path / "one.npy").dtype == record.layout()
    assert disk_cost(1000, record) == 1000 * -(-size // 4096) * 4096


RECORD = dict(enc_type="dinov2-vit-b", timm_name="vit_base_patch14_dinov2.lvd142m", weights="ab", weights_file=None, resolution=256,
              grid=16, width=768, class_token=True, dtype="float16")


def test_the_price_of_imagenet():
    """257 tokens of 768 numbers: two bytes each are 505.7 GB; the class token's other two, the header and whole blocks come on top."""
    record = FeaturesRecord.from_record(RECORD)
    plain = IMAGENET * 257 * 768 * 2
    assert gigabytes(plain) == "505.7 GB" and plain < disk_cost(IMAGENET, record) <= plain + IMAGENET * (768 * 2 + 256 + 4096)
    eight = disk_cost(IMAGENET, replace(record, dtype="int8"))
    assert IMAGENET * (256 * 768 + 256 * 4 + 768 * 4) < eight < disk_cost(IMAGENET, record) * 0.52
    assert gigabytes(2_097_152) == "2.1 MB" and gigabytes(1_234_567_890_123) == "1,234.6 GB"


@pytest.mark.parametrize("change", [
    {"grid": True}, {"grid": 0}, {"grid": 10**6}, {"width": -1}, {"width": 10**9}, {"dtype": "float64"}, {"class_token": 1},
    {"enc_type": None}, {"weights_file": 3}, {"resolution": "256"}, {"resolution": 0}])
def test_a_record_that_cannot_be_is_not_believed(change):
    assert FeaturesRecord.from_record(RECORD).to_record() == RECORD
    with pytest.raises(UnfitFeatures, match=f"{next(iter(change))}.* cannot be: encode again"):
        FeaturesRecord.from_record({**RECORD, **change})
    for nothing in (None, [], {}):
        with pytest.raises(UnfitFeatures):
            FeaturesRecord.from_record(nothing)


# ---- encode

@pytest.mark.parametrize(("dtype", "zipped"), [("float16", False), ("float16", True), ("int8", False)])
def test_the_encoders_output_is_stored_under_the_same_keys(data, dtype, zipped):
    shutil.rmtree(the_features(data))
    make(data, dtype=dtype, zipped=zipped)
    entries, _, _ = opened(data)
    encoder = load_encoder(TOY, "cpu", SIDE)
    class_token, patches = encoder.tokens(images_of(data))                                # (10, E), (10, 16, E)
    assert len(entries) == COUNT and entries.features[0].record == FeaturesRecord(
        TOY, TOY, sha256_of_parameters(encoder.model), sha256_of_named(TOY, None), SIDE, 4, WIDTH, True, dtype)
    for i in range(COUNT):
        image, moments, label, features = entries[i]
        assert image.shape == (0,) and moments.shape == (8, 8, 8) and label == entries.labels[i]
        noise = 1e-5                                                                      # of another batch size
        torch.testing.assert_close(features["class_token"], class_token[i], rtol=noise, atol=noise)
        _, restored = unpack(features)
        bound = HALF * patches[i].abs() + TINY if dtype == "float16" else features["scales"][:, None] * 0.501
        assert ((restored - patches[i]).abs() <= bound + noise).all()
        assert features["patches"].dtype == getattr(torch, dtype)                         # until it is on the device


def test_the_price_is_said_before_the_work(prepared, tmp_path, capsys):
    shutil.copytree(prepared / "images", tmp_path / "images")
    make(tmp_path)
    first, last = capsys.readouterr().out.strip().splitlines()
    size = next(file for file in the_features(tmp_path).rglob("*.npy")).stat().st_size
    blocks = COUNT * -(-size // 4096) * 4096
    assert f"features of {COUNT} images by {TOY} take {gigabytes(blocks)} ({size:,} bytes each); " in first and "are free" in first
    assert last.endswith(f"features of {COUNT} images by {TOY}, float16")


def test_the_price_of_a_zip_is_said_to_be_twice_that_for_a_while(prepared, tmp_path, capsys):
    shutil.copytree(prepared / "images", tmp_path / "images")
    make(tmp_path, zipped=True)
    assert "bytes each), and as much again while the zip is written; " in capsys.readouterr().out


def test_auto_says_that_there_are_only_features_of_others(prepared, monkeypatch, capsys):
    """An encoder's folder that is typed in another way has features of another name."""
    _, _, args = opened(prepared, "--enc-type", f"{TOY}/")
    assert args.cached_features == "require" and "but none of" not in capsys.readouterr().err
    monkeypatch.chdir(ROOT)
    _, _, args = opened(prepared, "--enc-type", f"local-dir:{NETWORKS.relative_to(ROOT) / 'encoder'}")
    assert args.cached_features == "off" and f"holds {the_features(prepared).name}, but none of local-dir:" in capsys.readouterr().err


@pytest.mark.parametrize(("zipped", "factor"), [(False, 1), (True, 2)])               # a zip is collected in a folder
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(prepared, tmp_path, monkeypatch, zipped, factor):
    usage = namedtuple("usage", "total used free")
    need = factor * COUNT * 2 * 4096                                                      # 4,736 bytes are two blocks
    shutil.copytree(prepared / "images", tmp_path / "images")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    with pytest.raises(UserError, match=rf"needs {need / 1e6:.1f} MB more.* and {(need - 1) / 1e6:.1f} MB are free: make room"):
        make(tmp_path, zipped=zipped)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))
    make(tmp_path, zipped=zipped)


def test_what_is_there_already_needs_no_room(data, monkeypatch):
    usage = namedtuple("usage", "total used free")
    (the_features(data) / "00000/img00000004.npy").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * 4096))
    make(data)
    assert (the_features(data) / "00000/img00000004.npy").exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_interrupted_work_continues(prepared, tmp_path, capsys, monkeypatch, zipped):
    shutil.copytree(prepared / "images", tmp_path / "images")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Interrupted):
            make(tmp_path, zipped=zipped)
    with pytest.raises(UserError, match="was made with dtype float16, now dtype int8"):
        make(tmp_path, dtype="int8", zipped=zipped)
    dest = make(tmp_path, zipped=zipped)
    assert contents(dest) == contents(the_features(prepared))
    assert {path.name for path in tmp_path.iterdir()} == {"images", dest.name}
    monkeypatch.setattr(Destination, "write", None)
    make(tmp_path, zipped=zipped)
    assert "is finished already" in capsys.readouterr().out


def test_two_processes_write_what_one_writes(prepared, tmp_path):
    dest = tmp_path / features_folder(TOY)
    run_program(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "preprocessing.dataset_tools", "encode",
                 f"--source={prepared / 'images'}", f"--dest={dest}", f"--enc-type={TOY}", "--batch-size=4", "--workers=0"],
                ACCELERATE_USE_CPU="true")
    one, two = contents(the_features(prepared)), contents(dest)
    assert one.keys() == two.keys() and one["dataset.json"] == two["dataset.json"]


def test_the_forward_pass_is_plain_float32(data, lax, monkeypatch):
    from models.encoders import Encoder

    seen, tokens_of = [], Encoder.tokens
    monkeypatch.setattr(Encoder, "tokens", lambda self, images: (seen.append(tf32_and_autocast()), tokens_of(self, images))[1])
    before = contents(the_features(data))
    shutil.rmtree(the_features(data))
    make(data)
    assert len(seen) == 4                                                                 # the first one on meta, to know the shapes
    assert set(seen[1:]) <= {("ieee", "ieee", torch.float32), (False, False, torch.float32)}
    assert tf32_and_autocast() == lax
    assert contents(the_features(data)).keys() == before.keys()


@pytest.mark.parametrize(("more", "sentence"), [
    (["--dtype=float32"], "stored as float16 or int8"), (["--model-url=ema"], "give one"), (["--precision=bf16"], "leave it out"),
    (["--batch-size=0"], "at least 1"),
    (["--enc-type=dinov2-vit-b"], "features-dinov2-vit-b"), (["--enc-type=dinov2-vit-b,dinov2-vit-s"], "one at a time"),
    (["--encoder-weights=nowhere.pth"], "no encoder weights at nowhere.pth"),
    (["--enc-type=dino", "--dest={}/features-dino"], "unknown encoder"),
    (["--no-compile"], "--no-compile came with --enc-type"), (["--compile"], "--compile came with --enc-type"),
])
def test_mistakes_get_a_sentence_and_nothing_is_written(prepared, tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit) as ended:
        main(["encode", f"--source={prepared / 'images'}", f"--dest={tmp_path / features_folder(TOY)}", f"--enc-type={TOY}", "--workers=0",
              *(flag.format(tmp_path) for flag in more)])
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(said) == 1 and sentence in said[0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "sentence"), [(["--dtype=int8"], "moments are stored as"), (["--encoder-weights=x"], "--enc-type")])
def test_flags_of_features_are_not_for_moments(prepared, tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit):
        main(["encode", f"--source={prepared / 'images'}", f"--dest={tmp_path / 'vae-sd'}", *more])
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_features_beyond_float16_are_refused(data, monkeypatch):
    from models.encoders import Encoder

    shutil.rmtree(the_features(data))
    tokens_of = Encoder.tokens
    monkeypatch.setattr(Encoder, "tokens", lambda self, images: tuple(1e6 * part for part in tokens_of(self, images)))
    with pytest.raises(UserError, match="img00000000.png are not finite in float16: use --dtype int8"):
        make(data)


# ---- training

def losses(data: Path, out: Path, *more) -> list[dict]:
    run(flags(data, out, "--learning-rate", 0, *more), steps=3)
    return lines(out)


@pytest.mark.parametrize("method", ["reg", "repa"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_losses_are_those_of_the_encoder_up_to_the_rounding(data, tmp_path, monkeypatch, method, dtype):
    """At fixed weights, over three draws. Float noise of another batch size aside, the class token is the same, and with it its loss and
    that of the latents. A patch token z is off by r |z|: r = 2^-11 in float16, and in int8 by sqrt(E) scale / 2 <= sqrt(E) / 254 * |z|,
    as 127 scales are its largest number. Its direction, and so each cosine, then moves by r (1 + r) at most.
    """
    r = HALF if dtype == "float16" else WIDTH**0.5 / 254
    online = losses(data, tmp_path / "off", "--method", method, "--cached-features", "off")
    if dtype == "int8":
        shutil.rmtree(the_features(data))
        make(data, dtype=dtype)
    shutil.rmtree(data / "images")                                                        # nothing looks at a picture any more
    monkeypatch.setattr(train, "load_encoders", lambda *_: pytest.fail("an encoder was loaded"))
    cached = losses(data, tmp_path / "on", "--method", method, "--cached-features", "require")
    assert [line["draws"] for line in cached] == [1, 2, 3]
    for a, b in zip(online, cached, strict=True):
        assert ("cls_loss" in a) == (method == "reg") and a.keys() == b.keys()
        for name in {"denoising_loss", "cls_loss"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-5)
        assert abs(b["proj_loss"] - a["proj_loss"]) <= r * (1 + r) + 1e-5
    assert any(a["proj_loss"] != b["proj_loss"] for a, b in zip(online, cached, strict=True))


def test_compiled_training_reads_features_too(data, tmp_path):
    """There is no encoder to compile; the losses are the online run's up to the rounding."""
    cached = losses(data, tmp_path / "on", "--cached-features", "require", "--compile")
    online = losses(data, tmp_path / "off", "--cached-features", "off")
    assert [line["denoising_loss"] for line in cached] == pytest.approx([line["denoising_loss"] for line in online], rel=1e-4)


def test_targets_are_the_encoders_token_by_token(data):
    """What SILoss is given: REG's (B, 1+N, E) with the class token first, REPA's (B, N, E), both on the grid of SiT."""
    from accelerate import Accelerator

    images = images_of(data)[:4]
    for method, grid, more in (("reg", 4, ()), ("repa", 4, ("--method", "repa")), ("reg", 2, ("--model", "SiT-B/4"))):
        entries, space, args = opened(data, *more)
        (cached,) = train.open_encoders(args, space, "cpu", features=entries.features)
        encoder = load_encoder(TOY, "cpu", SIDE, grid=grid)
        assert isinstance(cached, CachedEncoder) and cached.embed_dim == encoder.embed_dim == WIDTH and cached.grid == grid
        given = torch.utils.data.default_collate([entries[i] for i in range(4)])
        batch = train.prepare_batch(*given[:3], space, [cached], args, Accelerator(cpu=True), features=given[3:])
        class_token, target = encoder.features(images, with_class_token=method == "reg")
        (zs,) = batch["zs"]
        assert method == "repa" or torch.equal(zs[:, 0], batch["cls_token"])
        assert zs.shape == target.shape == (4, grid**2 + (method == "reg"), WIDTH) and zs.dtype == torch.float32
        bound = HALF * (target.abs().max() if grid == 2 else target.abs())                # the mean of four is off as its largest may be
        assert ((zs - target).abs() <= bound + 1e-5).all()
        assert batch["cls_token"] is None if method == "repa" else torch.allclose(batch["cls_token"], class_token, atol=1e-5)


def test_a_run_on_cached_features_resumes_to_the_bit(prepared, tmp_path):
    straight = run(flags(prepared, tmp_path / "straight"), steps=4)
    run(flags(prepared, tmp_path), steps=2)
    resumed = run(flags(prepared, tmp_path, "--num-workers", 1), steps=4)
    assert all(same(straight[part], resumed[part]) for part in straight.keys() - {"args"})


def test_a_change_between_cached_and_online_is_said(prepared, tmp_path, capsys):
    run(flags(prepared, tmp_path, "--cached-features", "off"), steps=1)
    state = run(flags(prepared, tmp_path), steps=2)                                       # auto finds them
    said = capsys.readouterr()
    assert "cached_features off -> require" in said.err and state["steps"] == 2 and state["args"]["cached_features"] == "require"
    assert f"is not run: its features (float16, weights {sha256_of_parameters(load_encoder(TOY, 'cpu', SIDE).model)[:12]}" in said.out
    run(flags(prepared, tmp_path, "--cached-features", "off"), steps=3)
    assert "cached_features require -> off" in capsys.readouterr().err


def test_each_of_several_encoders_has_its_own(data, tmp_path):
    second = other_weights(tmp_path)
    pair = f"{TOY},{second}"
    _, _, args = opened(data, "--enc-type", pair)
    assert args.cached_features == "off"                                                  # all or none
    make(data, enc_type=second)
    entries, space, args = opened(data, "--enc-type", pair)
    assert args.cached_features == "require" and len(entries[0]) == 5 and len(entries.features) == 2
    encoders = [load_encoder(name, "cpu", SIDE) for name in (TOY, second)]
    for encoder, features in zip(encoders, entries[3][3:], strict=True):
        torch.testing.assert_close(features["class_token"], encoder.tokens(images_of(data)[3:4])[0][0], rtol=1e-5, atol=1e-5)
    state = run(flags(data, tmp_path / "out", "--enc-type", pair, "--cached-features", "require"), steps=1)
    assert state["architecture"]["z_dims"] == (WIDTH, WIDTH)


def other_weights(tmp_path: Path) -> str:
    folder = shutil.copytree(NETWORKS / "encoder", tmp_path / "second")
    state = load_file(folder / "model.safetensors")
    save_file({name: value * 1.5 if name == "norm.weight" else value for name, value in state.items()}, folder / "model.safetensors")
    return f"local-dir:{folder}"


def spoil_the_record(**change):
    def spoil(data: Path) -> None:
        file = the_features(data) / "dataset.json"
        content = json.loads(file.read_text())
        content["features"].update(change)
        file.write_text(json.dumps(content))
    return spoil


def of_other_images(data: Path) -> None:
    """As many images under the same keys and with the same labels, and the moments made of them, but not the features."""
    file = data / "images/dataset.json"
    content = json.loads(file.read_text())
    content["made_with"]["source"] = "elsewhere"
    file.write_text(json.dumps(content))
    shutil.rmtree(data / "vae-sd")
    encode(str(data / "images"), str(data / "vae-sd"), str(NETWORKS / "vae"), 4, "float32", 0)


UNFIT = {
    "missing": (lambda data: shutil.rmtree(the_features(data)), "holds no features-"),
    "unfinished": (lambda data: (the_features(data) / "dataset.json").rename(the_features(data) / ".unfinished.json"), "is not finished"),
    "no JSON": (lambda data: (the_features(data) / "dataset.json").write_text("{"), "is not JSON"),
    "no record": (lambda data: (the_features(data) / "dataset.json").write_text("{}"), "cannot be: encode again"),
    "a key short": (lambda data: (the_features(data) / "00000/img00000003.npy").unlink(), "of 1 of 10 images (00000/00000003)"),
    "other size": (spoil_the_record(resolution=64), "of images of 64 px, and 32 px"),
    "other weights": (spoil_the_record(weights_file="0"), "was made with other weights than the files of"),
    "other images": (of_other_images, "were encoded from different images"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_or_said_and_left(data, capsys, case):
    spoil, sentence = UNFIT[case]
    spoil(data)
    capsys.readouterr()
    entries, _, args = opened(data)
    said = capsys.readouterr().err.strip().splitlines()
    assert args.cached_features == "off" and not entries.features and entries[0][0].shape == (3, SIDE, SIDE) and len(entries[0]) == 3
    assert len(said) == (case != "missing")
    assert not said or said[0].startswith("warning: cached features are not used: ") and sentence in said[0]
    with pytest.raises(UserError) as refused:
        opened(data, "--cached-features", "require")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_features_of_more_images_pair_by_key(data):
    before = opened(data)[0]
    shutil.copy(the_features(data) / "00000/img00000009.npy", the_features(data) / "00000/img-first.npy")
    after = opened(data, "--cached-features", "require")[0]
    for i in range(COUNT):
        assert torch.equal(after[i][3]["patches"], before[i][3]["patches"])


def test_off_looks_at_nothing(data):
    (the_features(data) / "dataset.json").write_text("{")
    entries, _, args = opened(data, "--cached-features", "off")
    assert args.cached_features == "off" and len(entries[0]) == 3


def test_require_without_an_encoder_is_a_contradiction(prepared):
    for more in (("--method", "sit"), ("--method", "repa", "--proj-coeff", "0")):
        with pytest.raises(UserError, match="needs no features: leave it out"):
            opened(prepared, "--cached-features", "require", *more)
        entries, _, args = opened(prepared, *more)
        assert args.cached_features == "off" and not entries.features


def test_reg_refuses_features_without_a_class_token(data):
    spoil_the_record(class_token=False)(data)
    for file in the_features(data).rglob("*.npy"):
        stored = np.load(file)
        np.save(file, pack(None, torch.from_numpy(stored["patches"][None].astype(np.float32)), "float16")[0])
    entries, space, args = opened(data)
    with pytest.raises(UserError, match="has no class token, which REG noises"):
        train.open_encoders(args, space, "cpu", features=entries.features)
    entries, space, args = opened(data, "--method", "repa")
    (encoder,) = train.open_encoders(args, space, "cpu", features=entries.features)
    class_token, target = encoder.features(torch.utils.data.default_collate([entries[0][3]]), with_class_token=False)
    assert class_token is None and target.shape == (1, TOKENS, WIDTH)


def test_weights_are_compared_where_they_are_named(tmp_path):
    """By the file, and where that is another one by the numbers in it."""
    name = "mocov3-vit-s"
    model = load_encoder(name, "cpu", 32, pretrained=False).model
    torch.save(model.state_dict(), tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "same.safetensors")
    torch.save({key: value + 1 for key, value in model.state_dict().items()}, tmp_path / "b.pth")
    record = replace(FeaturesRecord.from_record(RECORD), enc_type=name, resolution=32, weights=sha256_of_parameters(model),
                     weights_file=sha256_of_named(name, tmp_path / "a.pth"))
    for weights in (tmp_path / "a.pth", tmp_path / "same.safetensors"):
        require_made_by(record, Path("x"), name, weights)
    require_made_by(replace(record, weights_file=None), Path("x"), name, None)            # the hub's, both times
    with pytest.raises(UnfitFeatures, match="x was made with a file of weights, and none was named"):
        require_made_by(record, Path("x"), name, None)
    with pytest.raises(UnfitFeatures, match="x was made with other weights than .*b.pth"):
        require_made_by(record, Path("x"), name, tmp_path / "b.pth")
    with pytest.raises(UnfitFeatures, match="holds the features of mocov3-vit-s, and those of mocov3-vit-b"):
        require_made_by(record, Path("x"), "mocov3-vit-b", None)


def test_a_local_encoder_is_known_by_its_files_wherever_they_lie(data, tmp_path):
    folder = shutil.copytree(NETWORKS / "encoder", tmp_path / "moved")
    moved = f"local-dir:{folder}"
    os.rename(the_features(data), data / features_folder(moved))
    assert opened(data, "--enc-type", moved)[2].cached_features == "require"
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.4, 0.4, 0.4]                                    # the same weights see other pixels
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(data, "--enc-type", moved)[2].cached_features == "off"


# ---- damaged files

def test_a_damaged_file_ends_the_run_by_name_or_is_passed_over(data, tmp_path, capsys):
    name = "img00000006.npy"
    stored = np.load(the_features(data) / "00000" / name)
    np.save(the_features(data) / "00000" / name, stored["patches"])                       # a whole file, laid out otherwise
    with pytest.raises(SystemExit) as ended:
        run(flags(data, tmp_path), steps=3)
    assert ended.value.code == 2 and f"{name} does not hold the features that its dataset.json describes" in capsys.readouterr().err
    (the_features(data) / "00000" / name).write_bytes(b"cut")
    state = run(flags(data, tmp_path / "b", "--skip-bad-samples", 1), steps=3)
    assert state["steps"] == 3 and f"{name} is not a readable npy file" in capsys.readouterr().err


def test_check_reads_features_too(data, tmp_path, capsys):
    picture = f"--output={tmp_path / 'look.png'}"
    main(["check", f"--source={data}", picture, "--workers=0"])
    assert f"features of {TOY}, all readable" in capsys.readouterr().out
    file = the_features(data) / "00000/img00000002.npy"
    whole = np.load(file)
    whole["class_token"][5] = np.nan
    for content, sentence in ((to_npy(whole), "the features of 00000/00000002 are not finite"),
                              (b"", "img00000002.npy is not a readable npy file")):
        file.write_bytes(content)
        with pytest.raises(SystemExit):
            main(["check", f"--source={data}", picture, "--workers=0"])
        assert "1 of 10 entries are at fault" in (said := capsys.readouterr().err) and sentence in said
    file.unlink()
    with pytest.raises(SystemExit):
        main(["check", f"--source={data}", picture, "--workers=0"])
    assert "lacks the features of 1 of 10 images" in capsys.readouterr().err


def test_without_features_an_entry_is_what_it_was(prepared):
    image, moments, label = LatentDataset(prepared)[0]
    assert image.shape == (3, SIDE, SIDE) and moments.shape == (8, 8, 8) and isinstance(label, int)
