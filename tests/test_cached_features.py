"""Stored encoder outputs: bounded rounding, the losses of the encoder itself, and refusal where they do not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import train
from dataset import LatentDataset, read_image
from models.cached_features import (
    Features,
    FeaturesRecord,
    feature_stores,
    features_folder,
    features_path,
    file_size,
    pack,
    unpack,
)
from models.encoders import CachedEncoder, load_encoder, require_class_tokens, require_made_by, sha256_of_named
from preprocessing import dataset_tools
from runtime.messages import UserError
from runtime.stores import open_store
from tests.conftest import SIDE
from tests.stress.kills import same

TOKENS, WIDTH = 16, 32                                            # of conftest's encoder, on a 4x4 grid
HALF, TINY = 2.0**-11, 2.0**-25                                   # float16: relative error, and absolute below 2^-14
RECORD = dict(enc_type="dinov2-vit-b", timm_name="vit_base_patch14_dinov2.lvd142m", weights_file=None, resolution=256,
              grid=16, width=768, class_token=True, dtype="float16")


def encode(data: Path, enc_type: str, *flags: str, suffix: str = "") -> Path:
    dest = data / f"{features_folder(enc_type)}{suffix}"
    AcceleratorState._reset_state(reset_partial_state=True)
    dataset_tools.main(["encode", f"--source={data / 'images'}", f"--dest={dest}", f"--enc-type={enc_type}",
                        "--batch-size=4", "--workers=0", *flags])
    return dest


@pytest.fixture(scope="module")
def local(encoder_folder) -> str:
    return f"local-dir:{encoder_folder}"


@pytest.fixture(scope="module")
def prepared(data_dir, local, tmp_path_factory) -> Path:
    """The data set with float16 features."""
    data = shutil.copytree(data_dir, tmp_path_factory.mktemp("prepared") / "data")
    encode(data, local)
    return data


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture
def flags(local, tmp_path) -> list[str]:
    return ["--enc-type", local, "--output-dir", str(tmp_path), "--exp-name", "run", "--model", "SiT-T/2",
            "--projector-dim", "32", "--batch-size", "4", "--num-workers", "0", "--sampling-steps", "0",
            "--logging-steps", "1"]


def steps(data: Path, flags: list[str], count: int, *more: object) -> list[dict]:
    """Train; returns the log."""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--data-dir", str(data), *flags, "--max-train-steps", str(count), *map(str, more)]
    args = train.parse_args(argv)
    train.main(argv)
    log = Path(args.output_dir, args.exp_name, "metrics.jsonl").read_text()
    return [line for line in map(json.loads, log.splitlines()) if "loss" in line]


def opened(data: Path, *flags: str) -> LatentDataset:
    """What train.py opens with these flags."""
    return train.open_data(train.resolve(train.parse_args(["--data-dir", str(data), *flags])))[0]


# ---- the form on disk ------------------------------------------------------------------------------------------------

def test_the_folder_is_named_after_the_encoder(tmp_path):
    assert features_folder("dinov2-vit-b") == "features-dinov2-vit-b"
    assert features_folder("local-dir:./toy//encoder/") == features_folder("local-dir:toy/encoder")
    assert "/" not in features_folder("local-dir:/a b/ü\n")
    assert features_path(tmp_path, "clip-vit-L") is None
    (tmp_path / "features-clip-vit-L.zip").touch()
    (tmp_path / "features-clip-vit-L.zip.catalogue.npz").touch()
    (tmp_path / "features-x.zip.partial").mkdir()
    assert features_path(tmp_path, "clip-vit-L") == tmp_path / "features-clip-vit-L.zip"
    assert feature_stores(tmp_path) == [tmp_path / "features-clip-vit-L.zip"]


def patches_of_all_sizes() -> torch.Tensor:
    """Patch tokens (4, 50, 16), among them a token of zeros and one of a single number."""
    g = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 50, 16, generator=g) * 10 ** torch.empty(4, 50, 1).uniform_(-4, 3, generator=g)
    patches[0, 0] = 0
    patches[0, 1] = torch.eye(16)[3] * -7
    return patches


def tensors(stored: np.ndarray) -> dict[str, torch.Tensor]:
    return {part: torch.from_numpy(stored[part].copy()) for part in stored.dtype.names}


def test_eight_bits_are_off_by_half_a_scale_at_most():
    patches = patches_of_all_sizes()
    stored = tensors(pack(None, patches, "int8"))
    assert stored["patches"].dtype == torch.int8 and (stored["scales"] > 0).all()          # nothing is divided by 0
    torch.testing.assert_close(stored["scales"][1:], patches[1:].abs().amax(dim=2) / 127)
    _, restored = unpack(stored)
    # Beyond half a scale only the float32 roundings of |x| / scale <= 127 and of the product.
    bound = stored["scales"][..., None].double() * (0.5 + 2 * 127 * 2.0**-24)
    error = (restored.double() - patches.double()).abs()
    assert (error <= bound).all() and (error > 0.4 * bound).any()
    assert (restored[0, 0] == 0).all() and restored[0, 1, 3] == -7


def test_float16_is_off_by_half_a_unit_at_most_and_the_class_token_exact():
    class_token, patches = torch.randn(4, 16) * 1e6, patches_of_all_sizes()                # beyond float16
    stored = tensors(pack(class_token, patches, "float16"))
    restored_class_token, restored = unpack(stored)
    assert stored["patches"].dtype == torch.float16 and restored.dtype == torch.float32
    assert torch.equal(restored_class_token, class_token)
    error = (restored - patches).abs()
    assert (error <= HALF * patches.abs() + TINY).all() and error.max() > 0


@pytest.mark.parametrize(("dtype", "class_token", "numbers"), [
    ("float16", True, 4 * 128 + 2 * 16 * 128), ("float16", False, 2 * 16 * 128),
    ("int8", True, 4 * 128 + 4 * 16 + 16 * 128)])
def test_the_size_of_a_file(tmp_path, dtype, class_token, numbers):
    record = replace(FeaturesRecord.from_record(RECORD), width=128, grid=4, class_token=class_token, dtype=dtype)
    np.save(tmp_path / "one.npy", pack(torch.zeros(1, 128) if class_token else None, torch.zeros(1, 16, 128), dtype)[0])
    size = (tmp_path / "one.npy").stat().st_size
    assert file_size(record.layout()) == size and numbers < size <= numbers + 256          # numpy's header
    assert np.load(tmp_path / "one.npy").dtype == record.layout()


def test_records_of_older_data_sets_are_read():
    """They hold a hash of the parameters, which is ignored."""
    record = FeaturesRecord.from_record(RECORD)
    assert record.to_record() == RECORD and FeaturesRecord.from_record({**RECORD, "weights": "ab"}) == record


@pytest.mark.parametrize("change", [
    {"grid": True}, {"grid": 0}, {"grid": 10**6}, {"width": -1}, {"width": 10**9}, {"dtype": "float64"},
    {"class_token": 1}, {"enc_type": None}, {"weights_file": 3}, {"resolution": "256"}, {"resolution": 0}])
def test_an_impossible_record_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        FeaturesRecord.from_record({**RECORD, **change})


# ---- encode, then the data set ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("dtype", "suffix"), [("float16", ""), ("float16", ".zip"), ("int8", "")])
def test_entries_hold_the_encoders_output(data, local, dtype, suffix):
    shutil.rmtree(data / features_folder(local))
    encode(data, local, f"--dtype={dtype}", suffix=suffix)
    store = open_store(data / "images")
    images = [torch.from_numpy(read_image(store, name)) for name in store.names() if name.endswith(b".png")]
    encoder = load_encoder(local, "cpu", SIDE)
    class_token, patches = encoder.tokens(torch.stack(images))    # (12, E), (12, 16, E)
    entries = opened(data, "--enc-type", local)
    assert entries.features[0].record == FeaturesRecord(local, local, sha256_of_named(local, None), SIDE, 4, WIDTH,
                                                        True, dtype)
    assert len(entries) == len(images) and entries.resolution == SIDE
    for i, noise in enumerate([1e-5] * len(images)):              # of another batch size
        image, moments, label, features = entries[i]
        assert image.shape == (0,) and moments.shape == (8, 8, 8) and label == entries.labels[i]
        torch.testing.assert_close(features["class_token"], class_token[i], rtol=noise, atol=noise)
        _, restored = unpack(features)
        bound = HALF * patches[i].abs() + TINY if dtype == "float16" else features["scales"][:, None] * 0.501
        assert ((restored - patches[i]).abs() <= bound + noise).all()


def test_features_of_more_images_pair_by_key(data, local):
    before, folder = opened(data, "--enc-type", local), data / features_folder(local)
    shutil.copy(folder / "00000/img00000009.npy", folder / "00000/img-first.npy")
    (folder / "catalogue.npz").unlink(missing_ok=True)
    after = opened(data, "--enc-type", local)
    assert len(after.features[0].keys) == len(before) + 1
    for i in range(len(before)):
        assert torch.equal(after[i][3]["patches"], before[i][3]["patches"])


def test_a_damaged_file_is_named(data, local):
    file = data / features_folder(local) / "00000/img00000006.npy"
    whole = np.load(file)
    for content in (np.save, lambda path, _: path.write_bytes(b"cut")):
        content(file, whole["patches"])                           # a whole file of another layout; no npy file
        with pytest.raises(UserError, match="img00000006.npy"):
            opened(data, "--enc-type", local)[6]


# ---- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "dtype"), [("reg", "float16"), ("repa", "float16"), ("reg", "int8")])
def test_losses_are_those_of_the_encoder_up_to_the_rounding(data, local, flags, method, dtype):
    """At fixed weights, over two steps.

    The class token is exact, and with it its loss and that of the latents. A patch token z is off by r |z|: r = 2^-11
    in float16, and in int8 by sqrt(E) scale / 2 <= sqrt(E) / 254 * |z|, as 127 scales are its largest number. Its
    direction, and so each cosine, moves by r (1 + r) at most.
    """
    r = HALF if dtype == "float16" else WIDTH**0.5 / 254
    fixed = ("--learning-rate", 0, "--method", method)
    online = steps(data, flags, 2, *fixed, "--cached-features", "off", "--exp-name", "online")
    if dtype == "int8":
        shutil.rmtree(data / features_folder(local))
        encode(data, local, "--dtype=int8")
    shutil.rmtree(data / "images")                                # no picture is read any more
    cached = steps(data, flags, 2, *fixed, "--cached-features", "require")
    assert len(cached) == 2
    for a, b in zip(online, cached, strict=True):
        for name in {"denoising_loss", "cls_loss"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-5)
        assert abs(b["proj_loss"] - a["proj_loss"]) <= r * (1 + r) + 1e-5
    assert any(a["proj_loss"] != b["proj_loss"] for a, b in zip(online, cached, strict=True))


@pytest.mark.parametrize(("with_class_token", "grid"), [(True, 4), (False, 4), (True, 2)])
def test_targets_are_the_encoders(prepared, local, with_class_token, grid):
    """(B, 1+N, E) with the class token first, or (B, N, E), on the grid of SiT."""
    store = open_store(prepared / "images")
    names = [name for name in store.names() if name.endswith(b".png")][:4]
    images = torch.stack([torch.from_numpy(read_image(store, name)) for name in names])
    entries, encoder = opened(prepared, "--enc-type", local), load_encoder(local, "cpu", SIDE, grid=grid)
    cached = CachedEncoder(entries.features[0].record, grid)
    stored = torch.utils.data.default_collate([entries[i][3] for i in range(4)])
    (class_token, target), (expected_token, expected) = (
        cached.features(stored, with_class_token), encoder.features(images, with_class_token))
    assert target.shape == expected.shape == (4, grid**2 + with_class_token, WIDTH) and target.dtype == torch.float32
    assert cached.embed_dim == encoder.embed_dim == WIDTH
    torch.testing.assert_close(class_token, expected_token, rtol=1e-5, atol=1e-5)
    bound = HALF * (expected.abs().max() if grid == 2 else expected.abs())        # a mean is off as its largest
    assert ((target - expected).abs() <= bound + 1e-5).all()


def test_a_run_resumes_to_the_bit_and_reports_a_change(prepared, flags, tmp_path, capfd):
    steps(prepared, flags, 3, "--exp-name", "straight")
    steps(prepared, flags, 2)
    steps(prepared, flags, 3, "--num-workers", 1)
    one, two = (torch.load(tmp_path / name / "checkpoints/0000003.pt", weights_only=True)
                for name in ("straight", "run"))
    assert all(same(one[part], two[part]) for part in one.keys() - {"args"})
    capfd.readouterr()
    steps(prepared, flags, 4, "--cached-features", "off")
    assert "cached_features require -> off" in capfd.readouterr().err


def test_each_of_several_encoders_has_its_own(data, local, flags, encoder_folder, tmp_path):
    second = shutil.copytree(encoder_folder, tmp_path / "second")
    state = load_file(second / "model.safetensors")
    save_file({name: value * 1.5 if name == "norm.weight" else value for name, value in state.items()},
              second / "model.safetensors")
    pair = ("--enc-type", f"{local},local-dir:{second}")
    assert not opened(data, *pair).features                       # auto: all or none
    with pytest.raises(UserError, match=features_folder(f"local-dir:{second}")):
        opened(data, *pair, "--cached-features", "require")
    encode(data, f"local-dir:{second}")
    entries = opened(data, *pair)
    ours, theirs = entries[3][3:]
    assert ours["patches"].shape == theirs["patches"].shape and not torch.equal(ours["patches"], theirs["patches"])
    steps(data, flags, 1, *pair, "--cached-features", "require")


# ---- what does not fit -----------------------------------------------------------------------------------------------

def record(**change):
    def spoil(data: Path, folder: Path) -> None:
        content = json.loads((folder / "dataset.json").read_text())
        content["features"].update(change)
        (folder / "dataset.json").write_text(json.dumps(content))
    return spoil


def made_from_others(data: Path, folder: Path) -> None:
    content = json.loads((data / "vae-sd/dataset.json").read_text())
    (data / "vae-sd/dataset.json").write_text(json.dumps({**content, "made_with": {"source_contents": "others"}}))


@pytest.mark.parametrize(("spoil", "word"), [
    (lambda data, folder: (folder / "dataset.json").rename(folder / ".unfinished.json"), "not finished"),
    (lambda data, folder: (folder / "dataset.json").write_text("{"), "not JSON"),
    (lambda data, folder: (folder / "dataset.json").write_text("{}"), "enc_type"),
    (lambda data, folder: (folder / "00000/img00000003.npy").unlink(), "no features of 1 of 12 images"),
    (record(resolution=64), "64 px"), (record(weights_file="0"), "other weights"),
    (record(enc_type="dinov2-vit-b"), "dinov2-vit-b"), (made_from_others, "other images"),
], ids=["unfinished", "no JSON", "no record", "a key short", "size", "weights", "encoder", "images"])
def test_unfit_features_are_refused(data, local, spoil, word):
    """Also with `auto`, which runs the encoders only if features are missing; `off` opens none."""
    spoil(data, data / features_folder(local))
    for mode in ("auto", "require"):
        with pytest.raises(UserError, match=word):
            opened(data, "--enc-type", local, "--cached-features", mode, "--resolution", str(SIDE))
    assert not opened(data, "--enc-type", local, "--cached-features", "off").features


def test_reg_refuses_features_without_a_class_token():
    cached = CachedEncoder(replace(FeaturesRecord.from_record(RECORD), class_token=False), 4)
    with pytest.raises(UserError, match="no class token"):
        require_class_tokens([cached])
    stored = tensors(pack(None, torch.randn(2, TOKENS, WIDTH), "float16"))
    class_token, target = cached.features(stored, with_class_token=False)
    assert class_token is None and target.shape == (2, TOKENS, WIDTH)


def test_weights_are_compared_by_their_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    file = tmp_path / "a"
    made = replace(FeaturesRecord.from_record(RECORD), enc_type="mocov3-vit-s",
                   weights_file=sha256_of_named("mocov3-vit-s", file))
    require_made_by(made, Path("x"), "mocov3-vit-s", file)
    require_made_by(replace(made, weights_file=None), Path("x"), "mocov3-vit-s", None)     # both from the hub
    for name, weights, word in (("mocov3-vit-s", None, "other weights"),
                                ("mocov3-vit-s", tmp_path / "b", "other weights"),
                                ("mocov3-vit-b", file, "features of mocov3-vit-s")):
        with pytest.raises(UserError, match=word):
            require_made_by(made, Path("x"), name, weights)


def test_a_local_encoder_is_known_by_its_files_wherever_they_are(prepared, local, encoder_folder, tmp_path):
    moved = shutil.copytree(encoder_folder, tmp_path / "moved")
    made = Features(prepared / features_folder(local)).record
    require_made_by(made, Path("x"), f"local-dir:{moved}", None)
    config = json.loads((moved / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.4, 0.4, 0.4]            # the same weights see other pixels
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="other weights"):
        require_made_by(made, Path("x"), f"local-dir:{moved}", None)
