"""generate.py: from a checkpoint alone to images, the same ones for any number of processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from evaluations import sample_folder
from models import checkpoint
from models.sit import SiT_models
from models.vae import load_codec
from runtime import run as runs
from runtime.files import sha256
from tests.test_checkpoint import released
from tests.test_sit import randomised
from tests.test_train import ROOT, two_processes


@pytest.fixture
def experiment(tmp_path, vae_folder):
    """A REG experiment with random weights away from their zero heads; class token of width 32."""
    model = randomised(SiT_models["SiT-T/2"](input_size=8, in_channels=4, num_classes=5, cls_token_dim=32, z_dims=(32,), projector_dim=16))
    state = checkpoint.capture(model=model, ema=model, optimizer=torch.optim.AdamW(model.parameters()), scaler=None,
                               args={"path_type": "linear", "lr": 1}, step=3, draws=3,
                               latent_space=load_codec(str(vae_folder)).space.to_record(), data="", processes=1, log={})
    runs.save(tmp_path / "run", state)
    return tmp_path / "run"


FEW = ["--num-fid-samples", "7", "--per-proc-batch-size", "2", "--num-steps", "2"]


def sample(experiment, capsys, *flags):
    """Run it; returns the folder that it wrote."""
    generate.main(["--ckpt", str(experiment), *FEW, *map(str, flags)])
    npz = capsys.readouterr().out.strip().splitlines()[-1]
    assert npz.endswith("samples.npz")
    return Path(npz).parent


def test_from_the_checkpoint_alone(experiment, capsys):
    folder = sample(experiment, capsys, "--save-cls-tokens")
    assert folder.parent == experiment / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["class_tokens.npz", "grid.png", "images", "samples.npz", "settings.json"]
    npz = np.load(folder / "samples.npz")
    assert npz["arr_0"].shape == (7, 32, 32, 3) and npz["arr_0"].dtype == np.uint8 and npz["arr_1"].shape == (7,)
    for i in range(7):
        assert (np.asarray(Image.open(folder / "images" / f"{i:06d}.png")) == npz["arr_0"][i]).all()
    tokens = np.load(folder / "class_tokens.npz")
    assert tokens["class_tokens"].shape == (7, 32) and (tokens["labels"] == npz["arr_1"]).all()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["checkpoint_sha256"] == sha256(experiment / "checkpoints" / "0000003.pt")
    assert settings["sampling"]["cfg_scale"] == 2.3 and settings["training"]["lr"] == 1 and settings["versions"]["torch"]


def test_two_processes_give_the_same_bits(experiment, capsys, tmp_path):
    one = sample(experiment, capsys, "--save-cls-tokens")
    done = two_processes("generate.py", "--ckpt", str(experiment), *FEW, "--save-cls-tokens", "--no-png",
                         "--sample-dir", str(tmp_path / "two"))
    two, = (tmp_path / "two").iterdir()
    assert one.name == two.name and done.stdout.splitlines() == [str(two / "samples.npz")]
    for name in ("samples.npz", "class_tokens.npz"):
        a, b = np.load(one / name), np.load(two / name)
        assert all((a[key] == b[key]).all() for key in a.files)


def test_without_png_the_same_arrays(experiment, capsys, tmp_path):
    png = sample(experiment, capsys, "--save-cls-tokens")
    bare = sample(experiment, capsys, "--save-cls-tokens", "--no-png", "--sample-dir", tmp_path / "bare")
    assert bare.name == png.name
    assert sorted(p.name for p in bare.iterdir()) == ["class_tokens.npz", "grid.png", "samples.npz", "settings.json"]
    assert (bare / "grid.png").read_bytes() == (png / "grid.png").read_bytes()
    for name in ("samples.npz", "class_tokens.npz"):
        a, b = np.load(png / name), np.load(bare / name)
        assert a.files == b.files and all((a[key] == b[key]).all() and a[key].dtype == b[key].dtype for key in a.files)


def test_the_grid_shows_the_first_64_images(experiment, capsys):
    """Blocks of 40: the grid takes one and a half of them."""
    flags = ("--num-fid-samples", "70", "--per-proc-batch-size", "40", "--num-steps", "1", "--cfg-scale", "1")
    folder = sample(experiment, capsys, *flags, "--no-png")
    grid, images = np.asarray(Image.open(folder / "grid.png")), np.load(folder / "samples.npz")["arr_0"]
    assert grid.shape == (8 * 34 + 2, 8 * 34 + 2, 3) and (grid[-34:-2, -34:-2] == images[63]).all()


def no_sampling(*_):
    raise AssertionError("it sampled")


@pytest.mark.parametrize(("first", "second"), [
    ((), ()), ((), ("--no-png",)), (("--save-cls-tokens",), ()), (("--classes", "4,2"), ("--classes", "4,2")),
    (("--cfg-scale", "1"), ("--cfg-scale", "1", "--guidance-high", "0.5"))])            # unguided, there is no interval
def test_the_same_command_makes_nothing_again(experiment, capsys, monkeypatch, first, second):
    folder = sample(experiment, capsys, *first)
    (folder / "metrics.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for name in ("sample_images", "load_codec"):
        monkeypatch.setattr(generate, name, no_sampling)
    generate.main(["--ckpt", str(experiment), *FEW, *second])
    said = capsys.readouterr()
    assert said.out == f"{folder / 'samples.npz'}\n" and said.err.startswith("already there: 7 images") and said.err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_png_files_are_unpacked_from_samples_made_without(experiment, capsys, monkeypatch):
    bare = sample(experiment, capsys, "--no-png")
    monkeypatch.setattr(generate, "sample_images", no_sampling)
    assert sample(experiment, capsys) == bare
    images = np.stack([np.asarray(Image.open(path)) for path in sorted((bare / "images").iterdir())])
    assert (images == np.load(bare / "samples.npz")["arr_0"]).all() and len(images) == 7


def remove_samples(folder, experiment):
    (folder / "samples.npz").unlink()


def train_on(folder, experiment):
    path = experiment / "checkpoints" / "0000003.pt"
    state = torch.load(path)
    state["ema"]["final_layer.linear.bias"] += 0.1
    torch.save(state, path)


def another_setting(folder, experiment):
    """As of a program that had named the folder otherwise."""
    settings = json.loads((folder / "settings.json").read_text())
    settings["sampling"]["num_steps"] = 250
    (folder / "settings.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(("change", "first", "second"), [
    (remove_samples, (), ()), (train_on, (), ()), (another_setting, (), ()), (None, (), ("--save-cls-tokens",)),
    (train_on, ("--save-cls-tokens",), ("--no-png",))])
def test_what_is_not_there_is_made_again_and_nothing_stale_stays(experiment, capsys, change, first, second):
    folder = sample(experiment, capsys, *first)
    old = np.load(folder / "samples.npz")["arr_0"]
    (folder / "metrics.json").write_text("{}")
    if change is not None:
        change(folder, experiment)
    assert sample(experiment, capsys, *second) == folder
    assert (np.load(folder / "samples.npz")["arr_0"] == old).all() == (change is not train_on)
    wanted = {"grid.png", "samples.npz", "settings.json", *(["class_tokens.npz"] if "--save-cls-tokens" in second else []),
              *([] if "--no-png" in second else ["images"])}
    assert {path.name for path in folder.iterdir()} == wanted
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["checkpoint_sha256"] == sha256(experiment / "checkpoints" / "0000003.pt") and settings["sampling"]["num_steps"] == 2


@pytest.mark.parametrize("flags", [
    ("--mode", "ode"), ("--mode", "ode", "--heun"), ("--num-steps", "3"), ("--cfg-scale", "1"), ("--cfg-scale", "1.5"),
    ("--cls-cfg-scale", "0"), ("--guidance-low", "0.5"), ("--guidance-high", "0.5"), ("--labels", "balanced"), ("--classes", "4,2"),
    ("--global-seed", "1"),
    ("--precision", "bf16"), ("--vae-precision", "bf16"), ("--compile",),
    ("--per-proc-batch-size", "3"), ("--num-fid-samples", "3"), ("--weights", "model")])
def test_every_setting_is_in_the_folders_name(experiment, vae_folder, flags):
    args = [generate.parse_args(["--ckpt", str(experiment), *FEW, *more]) for more in ((), flags)]
    model = checkpoint.build_for_sampling(checkpoint.read(experiment))
    path = runs.find(experiment)
    plain, changed = (generate.folder_name(path, generate.sampling_of(a, model, "linear"), a, str(vae_folder)) for a in args)
    assert plain != changed and plain.startswith("run-0000003-")


def test_settings_that_only_the_machine_has(experiment, capsys, monkeypatch):
    """settings.json and the name say what was done, not what was asked for."""
    plain = sample(experiment, capsys)
    assert json.loads((plain / "settings.json").read_text())["compiled"] is False
    with monkeypatch.context() as patch:
        patch.setattr(generate, "compile_parts", lambda _: False)  # where the compiler does not work
        assert sample(experiment, capsys, "--compile") == plain
    faster = sample(experiment, capsys, "--vae-precision", "bf16")
    assert faster != plain and json.loads((faster / "settings.json").read_text())["vae_precision"] == "bf16"
    assert (np.load(plain / "samples.npz")["arr_0"] != np.load(faster / "samples.npz")["arr_0"]).any()


@pytest.mark.parametrize(("flags", "compiled"), [
    (("--compile",), ["SiT"]), (("--compile", "--vae-precision", "bf16"), ["SiT", "AutoencoderKL"]), (("--vae-precision", "bf16"), [])])
def test_which_networks_are_compiled(experiment, capsys, monkeypatch, flags, compiled):
    found = []
    monkeypatch.setattr(generate, "compile_parts", lambda network: found.append(type(network).__name__) or True)
    sample(experiment, capsys, *flags)
    assert found == compiled


def test_processes_that_cannot_all_compile(experiment, capsys, monkeypatch):
    from accelerate import utils

    monkeypatch.setattr(utils, "gather_object", lambda mine: [*mine, not mine[0]])
    refused(capsys, ["--ckpt", str(experiment), *FEW], "add --no-compile")
    assert not (experiment / "samples").exists()


def test_rounding_the_weights_once_gives_the_bits_of_autocast(experiment):
    torch.manual_seed(0)
    model = checkpoint.build_for_sampling(checkpoint.read(experiment))
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 5]), torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        velocity, _, cls_velocity = model(*inputs)
        assert generate.make_ready(model, torch.device("cpu"), "bf16", compiled=False) is False
        assert {p.dtype for p in model.blocks.parameters()} == {torch.bfloat16} and model.pos_embed.dtype == torch.float32
        again, _, cls_again = model(*inputs)
    assert (again == velocity).all() and (cls_again == cls_velocity).all()


def test_compiled_images(experiment, capsys, tmp_path):
    """Within a level of eager ones, of two shapes though the last block is smaller, and the same for any number of processes."""
    eager = np.load(sample(experiment, capsys) / "samples.npz")["arr_0"].astype(int)
    compiled, batches = experiment.parent / "compiled", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "compile_parts", lambda model: [
            block.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]))) for block in model.blocks[:1]] and True)
        padded = np.load(sample(experiment, capsys, "--compile", "--sample-dir", tmp_path / "padded") / "samples.npz")["arr_0"]
    assert set(batches) == {2, 4} and abs(padded - eager).max() <= 1
    images = np.load(sample(experiment, capsys, "--compile", "--sample-dir", compiled) / "samples.npz")["arr_0"]
    assert images.shape == eager.shape and abs(images - eager).max() <= 1
    two_processes("generate.py", "--ckpt", str(experiment), *FEW, "--compile", "--no-png", "--sample-dir", str(tmp_path / "two"))
    two, = (tmp_path / "two").iterdir()
    assert (np.load(two / "samples.npz")["arr_0"] == images).all()


def test_labels_and_classes(experiment, capsys):
    assert np.load(sample(experiment, capsys, "--classes", "4,2") / "samples.npz")["arr_1"].tolist() == [4, 2, 4, 2, 4, 2, 4]
    assert np.load(sample(experiment, capsys, "--labels", "balanced") / "samples.npz")["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("slot", [True, False])
def test_released_file_with_its_model_named(tmp_path, vae_folder, capsys, slot):
    model = randomised(SiT_models["SiT-T/2"](input_size=8, in_channels=4, num_classes=5, cls_token_dim=24 if slot else None, z_dims=()))
    torch.save(released(model), tmp_path / "released.pt")
    flags = ["--ckpt", str(tmp_path / "released.pt"), *FEW, "--model", "SiT-T/2", "--sample-dir", str(tmp_path / "out"),
             "--vae", str(vae_folder)]
    refused(capsys, flags, "latent scale 0.18215")                      # released files decode with the SD VAE; this is another
    sd_like = vae_like_sd(vae_folder, tmp_path / "sd")
    generate.main([*flags, "--vae", sd_like])
    assert np.load(capsys.readouterr().out.strip())["arr_0"].shape == (7, 64, 64, 3)


def vae_like_sd(vae_folder, folder) -> str:
    """A tiny VAE with the latent space of Stable Diffusion's: scale 0.18215, four channels, downsampling 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4, 4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                  layers_per_block=1, norm_num_groups=4, latent_channels=4).save_pretrained(folder)
    return str(folder)


def refused(capsys, flags, sentence):
    with pytest.raises(SystemExit) as ended:
        generate.main(flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and sentence in error


@pytest.mark.parametrize(("flags", "sentence"), [
    (("--cfg-scale", "0.5"), "--cfg-scale is 0.5"),
    (("--cfg-scale", "nan"), "--cfg-scale is nan"),
    (("--cfg-scale", "1", "--cls-cfg-scale", "2"), "nothing is guided"),
    (("--guidance-low", "0.9", "--guidance-high", "0.1"), "guidance interval is [0.9, 0.1]"),
    (("--heun",), "--mode ode"),
    (("--classes", "1,5"), "classes 0 to 4"),
    (("--classes", "dog"), "whole numbers"),
    (("--num-fid-samples", "0"), "--num-fid-samples is 0"),
    (("--global-seed", "-1"), "--global-seed is -1"),
    (("--classes", "1", "--labels", "balanced"), "leave --labels out"),
    (("--sample-dir", "README.md/x"), "cannot create the folder README.md/x/"),
    (("--precision", "tf32"), "needs a CUDA device"),
    (("--model", "SiT-B/2"), "contradicts the checkpoint"),
    (("--vae", "nowhere"), "no VAE at nowhere"),
])
def test_mistakes_end_with_one_sentence(experiment, capsys, flags, sentence):
    if "tf32" in flags and torch.cuda.is_available():
        pytest.skip("CUDA has TF32")
    refused(capsys, ["--ckpt", str(experiment), *FEW, *flags], sentence)
    assert not (experiment / "samples").exists()


def test_missing_checkpoint(tmp_path, capsys):
    refused(capsys, ["--ckpt", str(tmp_path / "nowhere.pt")], "nowhere.pt")
    refused(capsys, ["--ckpt", str(tmp_path)], "no checkpoint below")


# ---- going on after an interruption: FEW is four blocks, 0-1 2-3 4-5 6

def contents(folder) -> dict[str, bytes]:
    """Every file below a folder, temporary ones too; settings.json is the same only in the same place and is left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "settings.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Killed(BaseException):
    """Nothing catches it."""


def interrupted(experiment, capsys, *flags, blocks=2) -> Path:
    """Run it and end it when so many blocks are there; returns the folder."""
    def dies(model, codec, indices, how):
        if indices.start == 2 * blocks:
            raise Killed
        return sample_images(model, codec, indices, how)

    sample_images = generate.sample_images
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(generate, "sample_images", dies)
        generate.main(["--ckpt", str(experiment), *FEW, *map(str, flags)])
    assert "goes on" not in capsys.readouterr().err
    folder, = (experiment / "samples").iterdir()
    return folder


def sampled_by(experiment, *flags) -> list[int]:
    """Run it; returns the first index of each block that it sampled."""
    def noted(model, codec, indices, how):
        starts.append(indices.start)
        return sample_images(model, codec, indices, how)

    starts, sample_images = [], generate.sample_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "sample_images", noted)
        generate.main(["--ckpt", str(experiment), *FEW, *map(str, flags)])
    return starts


@pytest.fixture
def undisturbed(experiment, capsys, tmp_path):
    """flags -> contents of a run without interruption, of the checkpoint as it then is."""
    def run(*flags):
        return contents(sample(experiment, capsys, *flags, "--sample-dir", tmp_path / "undisturbed"))

    return run


@pytest.mark.parametrize("flags", [(), ("--save-cls-tokens",), ("--no-png",)])
def test_the_same_command_goes_on_where_it_stopped(experiment, capsys, undisturbed, flags):
    whole = undisturbed(*flags)
    folder = interrupted(experiment, capsys, *flags)
    settings = (folder / "settings.json").read_bytes()
    for partial in (".samples.npz.partial", ".class_tokens.npz.partial", "blocks/.00000004.npy.partial"):   # as SIGKILL leaves them
        (folder / partial).write_bytes(b"part")
    assert sampled_by(experiment, *flags) == [4, 6]
    assert capsys.readouterr().err.count("goes on: 2 of 4 blocks are there\n") == 1
    assert contents(folder) == whole and (folder / "settings.json").read_bytes() == settings


def npy(shape, dtype):
    return lambda path: np.save(path, np.zeros(shape, dtype))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("part", ["blocks", "class_tokens"])
@pytest.mark.parametrize("damage", [
    cut, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(bytes(6272)),
    lambda path: path.write_bytes(path.read_bytes()[:50]), npy((1, 32, 32, 3), np.uint8), npy((2, 32, 32, 3), np.int8),
    npy((2, 32), np.float64), npy((2, 16), np.float32)])
def test_a_block_that_is_not_whole_is_made_again(experiment, capsys, undisturbed, part, damage):
    whole = undisturbed("--save-cls-tokens")
    folder = interrupted(experiment, capsys, "--save-cls-tokens")
    damage(folder / part / "00000000.npy")
    assert sampled_by(experiment, "--save-cls-tokens") == [0, 4, 6]
    assert contents(folder) == whole


@pytest.mark.parametrize("last", ["class_tokens.npz", "samples.npz"])
def test_all_blocks_and_no_npz(experiment, capsys, monkeypatch, undisturbed, last):
    whole = undisturbed("--save-cls-tokens")
    write_npz = sample_folder.write_npz

    def until(path, *arguments, **arrays):
        if path.name == last:
            raise Killed
        write_npz(path, *arguments, **arrays)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sample_folder, "write_npz", until)
        sample(experiment, capsys, "--save-cls-tokens")
    assert sampled_by(experiment, "--save-cls-tokens") == []
    assert contents(*(experiment / "samples").iterdir()) == whole


@pytest.mark.parametrize("call", range(1, 12))
def test_ended_at_any_change_of_the_folder(experiment, capsys, monkeypatch, undisturbed, call):
    """Two blocks: eight files are renamed into place, then two folders are removed; the eleventh change does not come."""
    flags = ("--save-cls-tokens", "--num-fid-samples", "4")
    whole = undisturbed(*flags)
    changes = []

    def counted(change):
        def until(*arguments, **options):
            changes.append(arguments)
            if len(changes) == call:
                raise Killed
            return change(*arguments, **options)
        return until

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        if call == 11:
            sample(experiment, capsys, *flags)
        else:
            with pytest.raises(Killed):
                sample(experiment, capsys, *flags)
    assert len(changes) == min(call, 10)
    assert contents(sample(experiment, capsys, *flags)) == whole


PNG_DAMAGES = [Path.unlink, lambda path: path.write_bytes(b""), cut, lambda path: path.write_bytes(path.read_bytes()[1:])]


@pytest.mark.parametrize("finished", [True, False])
def test_png_files_that_are_not_whole_are_made_again(experiment, capsys, undisturbed, finished):
    whole = undisturbed()
    folder = sample(experiment, capsys) if finished else interrupted(experiment, capsys)
    for index, damage in enumerate(PNG_DAMAGES):
        damage(folder / "images" / f"{index:06d}.png")
    assert sampled_by(experiment) == ([] if finished else [4, 6])
    assert "4 PNG files are not there or cut off" in capsys.readouterr().err
    assert contents(folder) == whole


def test_without_png_files_these_are_not_looked_at(experiment, capsys):
    folder = sample(experiment, capsys)
    cut(folder / "images" / "000000.png")
    before = contents(folder)
    assert sampled_by(experiment, "--no-png") == [] and contents(folder) == before


def test_png_files_of_blocks_that_were_made_without(experiment, capsys, undisturbed):
    whole = undisturbed()
    folder = interrupted(experiment, capsys, "--no-png")
    assert sampled_by(experiment) == [4, 6] and contents(folder) == whole


@pytest.mark.parametrize(("first", "second", "made"), [
    ((), ("--save-cls-tokens",), [0, 2, 4, 6]), (("--save-cls-tokens",), (), [4, 6]), ((), ("--no-png",), [4, 6])])
def test_an_unfinished_run_goes_on_with_other_outputs(experiment, capsys, undisturbed, first, second, made):
    whole = undisturbed(*second)
    folder = interrupted(experiment, capsys, *first)
    assert sampled_by(experiment, *second) == made and contents(folder) == whole


@pytest.mark.parametrize("tears", [None, "rmtree", "write_whole"])
def test_two_settings_are_never_mixed(experiment, capsys, monkeypatch, undisturbed, tears):
    """Another checkpoint under the same name; also where the change to it was itself interrupted."""
    folder = interrupted(experiment, capsys, blocks=3)
    train_on(folder, experiment)
    whole = undisturbed()

    def dies(*_):
        raise Killed

    if tears is not None:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(shutil if tears == "rmtree" else sample_folder, tears, dies)
            sample(experiment, capsys)
    assert sampled_by(experiment) == [0, 2, 4, 6]
    assert contents(folder) == whole and "goes on" not in capsys.readouterr().err
    assert json.loads((folder / "settings.json").read_text())["checkpoint_sha256"] == sha256(experiment / "checkpoints" / "0000003.pt")


@pytest.mark.parametrize("text", [b"", b'{"checkpoint', b"[]", b"null", b"{}", b'{"sampling": 1}', b'{"sampling": {}}', b"\xff"])
def test_damaged_settings_start_afresh(experiment, capsys, undisturbed, text):
    whole = undisturbed()
    folder = interrupted(experiment, capsys)
    (folder / "settings.json").write_bytes(text)
    assert sampled_by(experiment) == [0, 2, 4, 6] and contents(folder) == whole
    assert json.loads((folder / "settings.json").read_text())["num_images"] == 7


@pytest.mark.parametrize("name", ["samples.npz", "class_tokens.npz"])
@pytest.mark.parametrize("damage", [
    cut, lambda path: path.write_bytes(b""), lambda path: np.savez(path, arr_0=np.zeros((6, 32, 32, 3), np.uint8)),
    lambda path: np.savez(path, arr_0=np.zeros((7, 16, 16, 3), np.uint8)), lambda path: np.savez(path, mu=np.zeros(2), sigma=np.eye(2))])
def test_damaged_results_are_made_again(experiment, capsys, name, damage):
    folder = sample(experiment, capsys, "--save-cls-tokens")
    whole = contents(folder)
    damage(folder / name)
    (folder / "metrics.json").write_text("{}")
    assert sampled_by(experiment, "--save-cls-tokens") == [0, 2, 4, 6] and contents(folder) == whole


def test_a_single_image(experiment, capsys):
    """Which no score could be computed of."""
    folder = sample(experiment, capsys, "--num-fid-samples", "1", "--no-png")
    assert sampled_by(experiment, "--num-fid-samples", "1") == []
    assert (np.asarray(Image.open(folder / "images" / "000000.png")) == np.load(folder / "samples.npz")["arr_0"][0]).all()


def disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))


PIXELS, TOKEN, PNG = 32 * 32 * 3, 32 * 4, 32 * 32 * 3 + sample_folder.PNG_MORE


@pytest.mark.parametrize(("flags", "needed"), [((), 2 * PIXELS + PNG), (("--no-png",), 2 * PIXELS),
                                               (("--no-png", "--save-cls-tokens"), 2 * PIXELS + 2 * TOKEN)])
def test_a_disk_that_is_too_small(experiment, capsys, monkeypatch, flags, needed):
    disk(monkeypatch, 7 * needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "load_codec", no_sampling)
        folder = experiment / "samples" / "run-0000003"
        refused(capsys, ["--ckpt", str(experiment), *FEW, *flags], f"up to {7 * needed / 2**30:.3g} GiB more in {folder}")
        refused(capsys, ["--ckpt", str(experiment), *FEW, *flags], f"{(7 * needed - 1) / 2**30:.3g} GiB are free: make room, ")
        refused(capsys, ["--ckpt", str(experiment), *FEW, *flags],
                "or choose another --sample-dir" if "--no-png" in flags else "choose another --sample-dir, or add --no-png")
    assert not (experiment / "samples").exists()
    disk(monkeypatch, 7 * needed)
    sample(experiment, capsys, *flags)
    disk(monkeypatch, 0)
    sample(experiment, capsys, *flags)                            # what is finished needs nothing


def test_room_is_needed_for_what_is_not_there(experiment, capsys, monkeypatch):
    folder = interrupted(experiment, capsys)
    before = contents(folder)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    disk(monkeypatch, 7 * (2 * PIXELS + PNG) - there - 1)
    refused(capsys, ["--ckpt", str(experiment), *FEW], "make room")
    assert contents(folder) == before
    disk(monkeypatch, 7 * (2 * PIXELS + PNG) - there)
    sample(experiment, capsys)
    for index in (2, 3):
        (folder / "images" / f"{index:06d}.png").unlink()
    disk(monkeypatch, 2 * PNG - 1)
    refused(capsys, ["--ckpt", str(experiment), *FEW], "add --no-png")
    disk(monkeypatch, 2 * PNG)
    assert len(list((sample(experiment, capsys) / "images").iterdir())) == 7


@pytest.mark.parametrize("finished", [True, False])
def test_a_disk_that_is_full_while_png_files_are_written(experiment, capsys, monkeypatch, undisturbed, finished):
    def full(image, file, *_):
        if Path(file).name == "000003.png":
            raise OSError(28, "No space left on device")
        save(image, file, *_)

    whole = undisturbed()
    if finished:
        sample(experiment, capsys, "--no-png")
    save = Image.Image.save
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        refused(capsys, ["--ckpt", str(experiment), *FEW], "000003.png (No space left on device): make room")
    assert sampled_by(experiment) == ([] if finished else [2, 4, 6])
    assert contents(*(experiment / "samples").iterdir()) == whole


def test_two_processes_finish_what_one_began(experiment, capsys, undisturbed):
    whole = undisturbed("--save-cls-tokens")
    folder = interrupted(experiment, capsys, "--save-cls-tokens", blocks=1)
    done = two_processes("generate.py", "--ckpt", str(experiment), *FEW, "--save-cls-tokens")
    assert done.stdout.splitlines() == [str(folder / "samples.npz")] and done.stderr.count("goes on: 1 of 4 blocks are there") == 1
    assert contents(folder) == whole


def test_kills(experiment, capsys, tmp_path):
    """SIGKILL at moments that are counted in files, so that each falls into the sampling on any machine."""
    flags = ["--num-fid-samples", "24", "--per-proc-batch-size", "1", "--num-steps", "8", "--save-cls-tokens"]
    whole = contents(sample(experiment, capsys, *flags, "--sample-dir", tmp_path / "undisturbed"))
    command = [sys.executable, "generate.py", "--ckpt", str(experiment), *FEW, *flags]
    rng = random.Random(0)

    def files() -> int:
        return sum(path.is_file() for path in (experiment / "samples").rglob("*"))

    for _ in range(3):                                            # a block is three files: of 72, at most 60 are there after the last kill
        wanted = files() + rng.randint(3, 20)
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        try:
            while files() < wanted and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.random() / 50)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL and files() < 72
    folder = sample(experiment, capsys, *flags)
    assert contents(folder) == whole
