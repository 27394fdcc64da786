"""`import-latents`: latents in the forms of LightningDiT, REPA-E and SiT as moments, checked against a latent space."""

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train
from dataset import LatentDataset
from models.vae import load_codec
from preprocessing.dataset_tools import main
from tests import test_preprocessing
from tests.test_preprocessing import contents, fill, record

refused = test_preprocessing.refused                              # a fixture

COUNT, CHANNELS, SIDE = 7, 4, 8
LABELS = np.array([0, 2, 1, 1, 0, 2, 0])


@pytest.fixture(scope="module")
def vae(vae_folder, tmp_path_factory) -> Path:
    """A VAE with scale 0.18 and shift 0.1."""
    folder = tmp_path_factory.mktemp("vae") / "vae"
    shutil.copytree(vae_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.18}))
    return folder


@pytest.fixture
def space(vae):
    return load_codec(str(vae)).space


@pytest.fixture
def raw(space) -> np.ndarray:
    """Raw latents, (N, C, H, W), whose normalised form has mean 0 and std 1."""
    noise = np.random.default_rng(0).standard_normal((COUNT, CHANNELS, SIDE, SIDE)).astype(np.float32)
    return noise / np.float32(space.scale) + np.float32(space.shift)


def import_latents(source: Path, dest: Path, form: str, vae: Path, *flags: str) -> None:
    main(["import-latents", f"--source={source}", f"--dest={dest}", f"--format={form}", f"--vae={vae}", "--workers=0",
          *flags])


def lightningdit(path: Path, raw: np.ndarray, labels: np.ndarray = LABELS, dtype: torch.dtype = torch.float32) -> Path:
    """Shards of four, with statistics beside them."""
    path.mkdir()
    for i in range(0, len(raw), 4):
        latents = torch.from_numpy(raw[i:i + 4]).to(dtype).contiguous()
        save_file({"latents": latents, "latents_flip": latents.flip(-1).contiguous(),
                   "labels": torch.from_numpy(labels[i:i + 4]).to(dtype if labels.dtype == float else torch.int64)},
                  path / f"latents_rank00_shard{i // 4:03d}.safetensors")
    torch.save({"mean": torch.zeros(1, CHANNELS, 1, 1), "std": torch.ones(1, CHANNELS, 1, 1)}, path / "stats.pt")
    return path


def hdf5(path: Path, raw: np.ndarray, labels: np.ndarray = LABELS) -> Path:
    path.mkdir()
    with h5py.File(path / "a.h5", "w") as file:
        file["latents"], file["labels"] = raw, labels
    return path / "a.h5"


def hdf5_by_name(path: Path, raw: np.ndarray) -> Path:
    """An array for each image, called as its file was; labels beside it."""
    path.mkdir()
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(len(raw))]
    with h5py.File(path / "latents.h5", "w") as file:
        for name, one in zip(names, raw, strict=True):
            file[name] = one
    labels = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    (path / "dataset.json").write_text(json.dumps({"labels": labels, "classes": ["a", "b", "c"]}))
    return path


def sit_npy(path: Path, raw: np.ndarray, labels: np.ndarray = LABELS) -> Path:
    """A file for each image, (1, C, H, W), and one for each label."""
    for kind, values in (("imagenet256_features", raw), ("imagenet256_labels", labels)):
        (path / kind).mkdir(parents=True)
        for i in range(len(values)):
            np.save(path / kind / f"{i}.npy", values[i:i + 1])
    return path


def one_npy(path: Path, raw: np.ndarray) -> Path:
    path.mkdir()
    np.save(path / "latents.npy", raw)
    np.save(path / "labels.npy", LABELS)
    return path


WRITERS = {"safetensors": ("lightningdit", lightningdit), "HDF5": ("repa-e", hdf5),
           "HDF5 by name": ("repa-e", hdf5_by_name), "an npy": ("sit-npy", one_npy), "npy files": ("sit-npy", sit_npy)}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("kind", ["samples", "normalised", "moments"])
def test_moments_and_labels_are_those_of_the_writer(form, kind, raw, space, vae, tmp_path, capsys):
    name, write = WRITERS[form]
    std = np.random.default_rng(1).random(raw.shape, np.float32)
    stored = {"samples": raw, "normalised": (raw - space.shift) * space.scale,
              "moments": np.concatenate([raw, std], axis=1)}[kind].astype(np.float32)
    flags = ["--normalised"] * (kind == "normalised") + ["--workers=2"] * (kind == "samples")
    import_latents(write(tmp_path / "source", stored), tmp_path / "data/vae-sd", name, vae, *flags)
    samples = kind != "moments"
    assert capsys.readouterr().out.count("std is 0") == samples == record(tmp_path / "data/vae-sd")["samples"]
    entries = LatentDataset(tmp_path / "data", with_images=False)
    assert entries.vae_record == space.to_record() and len(entries) == COUNT
    moments = torch.stack([entries[i][1] for i in range(COUNT)]).numpy()
    np.testing.assert_allclose(moments[:, :CHANNELS], raw, atol=1e-6)
    np.testing.assert_array_equal(moments[:, CHANNELS:], std if kind == "moments" else 0)
    assert entries.labels.tolist() == LABELS.tolist()
    assert record(tmp_path / "data/vae-sd")["classes"] == (["a", "b", "c"] if form == "HDF5 by name" else None)
    if form == "HDF5 by name":                                    # keys pair them with images
        assert entries.keys[3] == b"00000/00000003"


def test_flips_are_further_entries(raw, vae, tmp_path, capsys):
    source = lightningdit(tmp_path / "source", raw, dtype=torch.bfloat16)
    import_latents(source, tmp_path / "one/vae-sd", "lightningdit", vae)
    assert f"{COUNT} latents of flipped" in capsys.readouterr().err
    import_latents(source, tmp_path / "two/vae-sd", "lightningdit", vae, "--flips")
    assert "flipped" not in capsys.readouterr().err
    one, two = (LatentDataset(tmp_path / name, with_images=False) for name in ("one", "two"))
    found = {two.key(i): two[i] for i in range(len(two))}
    assert len(one) == COUNT and len(two) == 2 * COUNT
    for i in range(COUNT):
        folder, row = one.key(i).split("/")
        _, moments, label = found[f"{folder}/latents_flip/{row}"]
        assert torch.equal(moments, one[i][1].flip(-1)) and label == one[i][2] == LABELS[i]


def test_latents_without_labels_are_said_to_have_none(raw, vae, tmp_path, capsys):
    import_latents(sit_npy(tmp_path / "source", raw, LABELS[:0]), tmp_path / "vae-sd", "sit-npy", vae)
    assert "no labels" in capsys.readouterr().out and record(tmp_path / "vae-sd")["labels"] is None
    import_latents(one_npy(tmp_path / "labelled", raw), tmp_path / "other", "sit-npy", vae)
    assert "no labels" not in capsys.readouterr().out


def test_an_interrupted_import_continues(raw, vae, tmp_path, capsys, refused):
    source = lightningdit(tmp_path / "source", raw)
    for dest in ("whole", "begun"):
        import_latents(source, tmp_path / dest, "lightningdit", vae)
    whole = contents(tmp_path / "whole")
    (tmp_path / "begun/dataset.json").rename(tmp_path / "begun/.unfinished.json")
    (tmp_path / "begun/.unfinished.json").write_text(json.dumps(record(tmp_path / "whole")["made_with"]))
    for name in [name for name in whole if name.endswith(".npy")][::2]:
        (tmp_path / "begun" / name).unlink()
    import_latents(source, tmp_path / "begun", "lightningdit", vae)
    assert {n: d for n, d in contents(tmp_path / "begun").items() if "catalogue" not in n} == {
        n: d for n, d in whole.items() if "catalogue" not in n}
    import_latents(source, tmp_path / "begun", "lightningdit", vae)
    assert "finished already" in capsys.readouterr().out
    other = lightningdit(tmp_path / "other", -raw)
    assert "source" in refused(import_latents, other, tmp_path / "begun", "lightningdit", vae)


def test_sit_trains_on_moments_alone(raw, vae, tmp_path):
    import_latents(sit_npy(tmp_path / "source", raw), tmp_path / "data/vae-sd", "sit-npy", vae)
    train.main(["--data-dir", str(tmp_path / "data"), "--vae", str(vae), "--output-dir", str(tmp_path),
                "--exp-name", "run", "--model", "SiT-T/2", "--method", "sit", "--batch-size", "4", "--num-workers", "0",
                "--sampling-steps", "0", "--max-train-steps", "2"])
    assert list((tmp_path / "run/checkpoints").iterdir())


def changed(raw: np.ndarray, value: float) -> np.ndarray:
    """A number of the sixth entry, row 1 of the second shard, is replaced."""
    raw = raw.copy()
    raw[5, 0, 0, 0] = value
    return raw


def tensors(path: Path, arrays: dict) -> Path:
    path.mkdir()
    save_file({name: torch.tensor(one) for name, one in arrays.items()}, path / "a.safetensors")
    return path


def npz_as_npy(path: Path, raw: np.ndarray) -> Path:
    path.mkdir()
    with open(path / "a.npy", "wb") as file:
        np.savez(file, raw)
    return path


def one_h5(path: Path, write) -> Path:
    path.mkdir()
    with h5py.File(path / "a.h5", "w") as file:
        write(file)
    return path


REFUSED = {
    "another space": ("lightningdit", lambda path, raw: lightningdit(path, raw[:, :3]), [], ["(3, 8, 8)", "none"]),
    "more channels": ("sit-npy", lambda path, raw: one_npy(path, np.tile(raw, (1, 8, 1, 1))), [], ["va-vae"]),
    "not square": ("sit-npy", lambda path, raw: one_npy(path, raw[:, :, :4]), [], ["(4, 4, 8)"]),
    "normalised already": ("sit-npy", lambda path, raw: one_npy(path, raw * 0.18), [], ["add --normalised"]),
    "not normalised": ("sit-npy", one_npy, ["--normalised"], ["leave out"]),
    "not finite": ("lightningdit", lambda path, raw: lightningdit(path, changed(raw, np.inf)), [], ["1 of 7 latents"]),
    "log variances": ("repa-e", lambda path, raw: hdf5(path, np.concatenate([raw, -raw], 1)), [], ["deviation"]),
    "too few labels": ("repa-e", lambda path, raw: hdf5(path, raw, LABELS[:5]), [], ["5 labels for 7"]),
    "negative label": ("repa-e", lambda path, raw: hdf5(path, raw, LABELS - 1), [], ["row 0", "label -1"]),
    "labels of some": ("sit-npy", lambda path, raw: sit_npy(path, raw, LABELS[:5]), [], ["5.npy", "label None"]),
    "no arrays": ("sit-npy", lambda path, raw: sit_npy(path, raw[:0]), [], ["holds no arrays"]),
    "another form": ("repa-e", lightningdit, [], ["holds no arrays"]),
    "labels of floats": ("lightningdit", lambda path, raw: lightningdit(path, raw, LABELS / 1, torch.bfloat16),
                         [], ["label 0.0"]),
    "NUL in a name": ("lightningdit", lambda path, raw: tensors(path, {"a\0": raw[0]}), [], ["name of one file"]),
    "a single number": ("lightningdit", lambda path, raw: tensors(path, {"latents_flip": np.float32(0)}), [],
                        ["holds no arrays"]),
    "npz called npy": ("sit-npy", lambda path, raw: npz_as_npy(path, raw), [], ["a.npy", "cannot be read"]),
    "no numbers stored": ("repa-e", lambda path, raw: one_h5(path, lambda file: file.create_dataset(
        "latents", (10**5, 4, 8, 8), "f4", chunks=(1, 4, 8, 8))), [], ["a.h5", "the limit is"]),
    "other file": ("repa-e", lambda path, raw: one_h5(path, lambda file: file.create_dataset(
        "latents", (1, 4, 8, 8), "f4", external=[(__file__, 0, 1024)])), [], ["a.h5", "another file"]),
    "virtual": ("repa-e", lambda path, raw: one_h5(path, lambda file: file.create_virtual_dataset(
        "latents", h5py.VirtualLayout((2, 4, 8, 8), "f4"))), [], ["a.h5", "another file"]),
    "no size": ("sit-npy", lambda path, raw: one_npy(path, np.zeros((10**12, 4, 0, 0))), [], ["holds no arrays"]),
    "damaged": ("lightningdit", lambda path, raw: fill(path, {"a.safetensors": b"junk"}), [], ["cannot be read"]),
    "pickled": ("sit-npy", lambda path, raw: path.mkdir() or np.save(path / "a.npy", np.array([{}])) or path, [],
                ["a.npy", "cannot be read"]),
}


@pytest.mark.parametrize(("form", "write", "flags", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(form, write, flags, words, raw, vae, tmp_path, refused):
    line = refused(import_latents, write(tmp_path / "source", raw), tmp_path / "vae-sd", form, vae, *flags)
    assert all(word in line for word in words), line
    assert not (tmp_path / "vae-sd/dataset.json").exists()


def test_a_bad_row_is_named(raw, vae, tmp_path, capsys):
    source = lightningdit(tmp_path / "source", changed(raw, np.nan))
    with pytest.raises(SystemExit):
        import_latents(source, tmp_path / "vae-sd", "lightningdit", vae)
    errors = capsys.readouterr().err
    assert "latents_rank00_shard001.safetensors: latents, row 1: not finite" in errors
    assert "latents:" in errors and "convert: " not in errors             # the progress bar


def test_hdf5_without_h5py(raw, vae, tmp_path, refused, monkeypatch):
    source = hdf5(tmp_path / "hdf5", raw)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install h5py" in refused(import_latents, source, tmp_path / "vae-sd", "repa-e", vae)
    import_latents(lightningdit(tmp_path / "source", raw), tmp_path / "vae-sd", "lightningdit", vae)
