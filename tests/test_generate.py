"""generate.py: from a checkpoint alone to images, the same ones for any number of processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from models import checkpoint
from models.files import sha256
from models.sit import SiT_models
from models.vae import load_codec
from tests.test_checkpoint import released
from tests.test_sit import randomised
from tests.test_train import two_processes


@pytest.fixture
def experiment(tmp_path, vae_folder):
    """A REG experiment with random weights away from their zero heads; class token of width 32."""
    model = randomised(SiT_models["SiT-T/2"](input_size=8, in_channels=4, num_classes=5, cls_token_dim=32, z_dims=(32,), projector_dim=16))
    checkpoint.save(tmp_path / "run", model=model, ema=model, optimizer=torch.optim.AdamW(model.parameters()), scaler=None,
                    args={"path_type": "linear", "lr": 1}, step=3, draws=3, latent_space=load_codec(str(vae_folder)).space.to_record(),
                    data="")
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
    ("--precision", "bf16"), ("--per-proc-batch-size", "3"), ("--num-fid-samples", "3"), ("--weights", "model")])
def test_every_setting_is_in_the_folders_name(experiment, vae_folder, flags):
    args = [generate.parse_args(["--ckpt", str(experiment), *FEW, *more]) for more in ((), flags)]
    model = checkpoint.build_for_sampling(checkpoint.read(experiment))
    path = checkpoint.find(experiment)
    plain, changed = (generate.folder_name(path, generate.sampling_of(a, model, "linear"), a, str(vae_folder)) for a in args)
    assert plain != changed and plain.startswith("run-0000003-")


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
