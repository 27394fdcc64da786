"""generate.py: from a checkpoint alone to images, the same ones for any number of processes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from models import checkpoint
from models.conditioning import ClassLabels
from models.sit import SiT_models
from models.vae import load_codec
from runtime.files import require_room, sha256
from runtime.messages import UserError
from runtime.run import find
from runtime.samples import SampleFolder
from samplers import Sampling
from tests import forks

FEW = ["--num-fid-samples", "8", "--per-proc-batch-size", "3", "--num-steps", "2"]        # blocks 0-2, 3-5, 6-7


@pytest.fixture
def experiment(trained, tmp_path):
    """A copy of the session's run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def sample(trained, tmp_path, capsys):
    """Flags -> the folder that generate.py prints; below tmp_path/samples unless they say otherwise."""
    def run(*flags, ckpt=trained) -> Path:
        generate.main(["--ckpt", str(ckpt), *FEW, "--sample-dir", str(tmp_path / "samples"), *map(str, flags)])
        npz = Path(capsys.readouterr().out.strip().splitlines()[-1])
        assert npz.name == "samples.npz"
        return npz.parent

    return run


def images_of(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


def test_from_the_checkpoint_alone(experiment, sample):
    generate.main(["--ckpt", str(experiment), *FEW, "--save-cls-tokens"])                 # by default in the experiment
    folder, = (experiment / "samples").iterdir()
    names = ["class_tokens.npz", "grid.png", "images", "samples.npz", "settings.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    npz, tokens = np.load(folder / "samples.npz"), np.load(folder / "class_tokens.npz")
    assert npz["arr_0"].shape == (8, 32, 32, 3) and npz["arr_0"].dtype == np.uint8 and npz["arr_1"].shape == (8,)
    assert tokens["class_tokens"].shape == (8, 32) and (tokens["labels"] == npz["arr_1"]).all()
    pngs = sorted((folder / "images").iterdir())
    assert [path.name for path in pngs] == [f"{i:06d}.png" for i in range(8)]
    assert (np.stack([np.asarray(Image.open(path)) for path in pngs]) == npz["arr_0"]).all()
    assert len({image.tobytes() for image in npz["arr_0"]}) == 8
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["checkpoint_sha256"] == sha256(find(experiment)) and settings["step"] == 2
    assert settings["sampling"]["cfg_scale"] == 2.3 and settings["training"]["model"] == "SiT-T/2"
    assert settings["compiled"] is False and settings["versions"]["torch"]


def test_two_processes_give_the_bits_of_one(trained, sample, tmp_path):
    one = sample("--save-cls-tokens")
    forks.two_ranks(forks.run_main, generate.main, ["--ckpt", trained, *FEW, "--save-cls-tokens", "--sample-dir",
                                                    tmp_path / "two"])
    two, = (tmp_path / "two").iterdir()
    assert one.name == two.name
    files = [path.relative_to(one) for path in one.rglob("*.*") if path.is_file()]
    assert len(files) == 12 and all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_the_files_that_are_missing_are_made(sample, capsys):
    """PNG files of samples made without them; no file that exists is written again, scores among them."""
    folder = sample("--no-png", "--save-cls-tokens")
    names = ["class_tokens.npz", "grid.png", "samples.npz", "settings.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    (folder / "metrics.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sample("--save-cls-tokens") == folder
    pngs = [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]
    assert (np.stack(pngs) == images_of(folder)).all()
    assert sample("--no-png") == folder
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_without_guidance_there_is_no_interval(sample):
    folder = sample("--cfg-scale", "1")
    before = (folder / "samples.npz").stat().st_mtime_ns
    assert sample("--cfg-scale", "1", "--guidance-high", "0.5") == folder
    assert (folder / "samples.npz").stat().st_mtime_ns == before


def test_whole_blocks_are_kept(sample):
    """The second of three blocks is left from an interrupted run, with pixels of its own to be recognised by."""
    whole = sample()
    images = images_of(whole)
    (whole / "samples.npz").unlink()
    (whole / "blocks").mkdir()
    np.save(whole / "blocks" / "00000003.npy", 255 - images[3:6])
    (whole / "images" / "000000.png").write_bytes(b"cut off")                             # by an older program
    assert sample() == whole
    images[3:6] = 255 - images[3:6]
    assert (images_of(whole) == images).all()
    pngs = [np.asarray(Image.open(path)) for path in sorted((whole / "images").iterdir())]
    assert (np.stack(pngs) == images).all() and not (whole / "blocks").exists()


def test_another_checkpoint_of_the_same_name_replaces_the_samples(experiment, sample):
    folder = sample("--save-cls-tokens", ckpt=experiment)
    old = images_of(folder)
    (folder / "metrics.json").write_text("{}")
    path = find(experiment)
    state = torch.load(path)
    state["ema"]["final_layer.linear.bias"] += 0.1
    torch.save(state, path)
    assert sample("--no-png", ckpt=experiment) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "samples.npz", "settings.json"]
    assert (images_of(folder) != old).any()
    assert json.loads((folder / "settings.json").read_text())["checkpoint_sha256"] == sha256(path)


# ------------------------------------------------------------------------------------------------------------- settings

CHANGES = {
    "weights": "model", "vae": "mse", "num_fid_samples": "3", "mode": "ode", "num_steps": "3", "cfg_scale": "1",
    "cls_cfg_scale": "0", "guidance_low": "0.5", "guidance_high": "0.5", "labels": "balanced", "classes": "2,1",
    "global_seed": "1", "per_proc_batch_size": "4", "precision": "bf16", "vae_precision": "bf16", "compile": None,
    "path_type": "cosine", "time_shift": "2"}
# Heun needs ode: tested below. Others only repeat what the checkpoint says, or are of captions.
ELSEWHERE = {"ckpt", "model", "sample_dir", "save_cls_tokens", "no_png", "heun", "encoder_depth", "resolution",
             "num_classes", "cls", "projector_embed_dims", "qk_norm", "fused_attn", "prompt", "prompts", "layout",
             "captions_from", "captions", "samples_per_prompt", "text_encoder"}


def folder_and_settings(path, *flags) -> tuple[str, dict]:
    args = generate.parse_args(["--ckpt", str(path), *FEW, *flags])
    settings = generate.settings_of(args, path, {}, "hash", bool(args.compile), generate.conditions_of(args, {}))
    return generate.folder_of(None, settings).name, settings


def test_every_flag_that_changes_an_image_changes_the_folder():
    path = Path("exps/run/checkpoints/0000002.pt")
    assert CHANGES.keys() | ELSEWHERE == vars(generate.parse_args(["--ckpt", "x"])).keys()
    plain, settings = folder_and_settings(path)
    assert plain == "run-0000002-sde-steps2-cfg2.3-t0-0.85-random-seed0-fp32-vae-sd-vae-ft-ema-089f01-batch3-n8"
    seen = {plain, folder_and_settings(path, "--mode", "ode", "--heun")[0]}
    for name, value in CHANGES.items():
        flags = [f"--{name.replace('_', '-')}", *([] if value is None else [value])]
        changed, other = folder_and_settings(path, *flags)
        assert changed not in seen and not generate.is_same(json.loads(json.dumps(settings)), other), name
        seen.add(changed)


def test_a_long_name_ends_in_a_hash_of_the_whole():
    """An ImageNet-100 list, whose classes are in settings.json in full; another list has another folder."""
    path, lists = Path("exps/run/checkpoints/0000002.pt"), [list(range(0, 1000, 10)), list(range(0, 990, 10)) + [999]]
    names = [folder_and_settings(path, "--classes", ",".join(map(str, classes)))[0] for classes in lists]
    assert names[0] != names[1] and all(150 < len(name) < 240 for name in names)
    assert all(name.startswith("run-0000002-sde-steps2-") for name in names)
    assert len(folder_and_settings(Path("checkpoints/" + "é" * 120 + ".pt"))[0].encode()) < 240


def test_a_disk_that_is_too_small_is_told_by_how_much(tmp_path):
    """Two sizes that look alike, as 1.0 GB and 1.0 GB, or 0.00 GiB twice, would say nothing."""
    with pytest.raises(UserError, match="[1-9][0-9.]* [GM]B more than are free"):
        require_room(tmp_path, shutil.disk_usage(tmp_path).free + 10**9, "free some")


def test_samples_of_a_long_list_of_classes(sample):
    classes = ",".join(["0", "1", "2"] * 60)
    folder = sample("--classes", classes, "--no-png")
    assert sample("--classes", classes, "--no-png") == folder
    assert json.loads((folder / "settings.json").read_text())["sampling"]["classes"] == [0, 1, 2] * 60


def test_settings_of_an_older_edition_still_fit():
    settings = json.loads(json.dumps(folder_and_settings(Path("a.pt"))[1]))
    del settings["sampling"]["seen"]
    assert generate.is_same(settings, folder_and_settings(Path("a.pt"))[1])


def test_two_vae_folders_of_one_name_do_not_share_samples(tmp_path):
    names = [folder_and_settings(Path("a.pt"), "--vae", str(tmp_path / place / "vae"))[0] for place in ("one", "two")]
    assert names[0] != names[1] and all(name.startswith("a-sde-") and "-vae-vae-" in name for name in names)


def test_labels_and_classes(sample):
    in_turn = np.load(sample("--classes", "2,1", "--mode", "ode", "--heun") / "samples.npz")["arr_1"]
    balanced = np.load(sample("--labels", "balanced", "--mode", "ode") / "samples.npz")["arr_1"]
    assert in_turn.tolist() == 4 * [2, 1] and balanced.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_decoding_in_bf16_moves_pixels_a_little(sample):
    exact, rounded = (images_of(sample("--vae-precision", precision)).astype(int) for precision in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rounded).max() <= 8 and np.abs(exact - rounded).mean() < 1


def test_rounding_the_weights_once_gives_the_bits_of_autocast(trained):
    torch.manual_seed(0)
    model = checkpoint.build_for_sampling(checkpoint.read(find(trained)), which="model")
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 3]), torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        velocity, _, cls_velocity = model(*inputs)
        assert generate.make_ready(model, torch.device("cpu"), "bf16", compiled=False) is False
        assert {p.dtype for p in model.blocks.parameters()} == {torch.bfloat16}
        assert model.pos_embed.dtype == torch.float32
        again, _, cls_again = model(*inputs)
    assert (again == velocity).all() and (cls_again == cls_velocity).all()


def test_compiled_networks_see_one_batch_size(trained, vae_folder, tmp_path, sample):
    """A smaller last block is sampled as a whole one, which changes no image by more than a level."""
    model = checkpoint.build_for_sampling(checkpoint.read(find(trained)))
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    folder = SampleFolder(tmp_path, 8, 3, {"images": np.dtype((np.uint8, (32, 32, 3)))}, png=False)
    folder.begin({}, keep=False)
    how = Sampling(num_steps=2)
    generate.make_blocks(folder, folder.blocks, model, load_codec(str(vae_folder)), how,
                         ClassLabels(model.num_classes), compiled=True, show=False)
    images = np.concatenate([np.load(folder.block_file("images", block)) for block in folder.blocks])
    assert set(sizes) == {3, 6}                                                           # 6: with null labels
    assert images.shape == (8, 32, 32, 3) and np.abs(images.astype(int) - images_of(sample())).max() <= 1


@pytest.fixture
def released(tmp_path):
    """A file like REPA's, which has weights alone, of a model without a class token."""
    model = SiT_models["SiT-T/2"](input_size=8, in_channels=4, num_classes=5, z_dims=(), cls_token_dim=None)
    torch.save({"ema": model.state_dict()}, tmp_path / "released.pt")
    return tmp_path / "released.pt"


def test_a_released_file_with_its_model_named(released, tmp_path, sample):
    """It decodes with a VAE like Stable Diffusion's: scale 0.18215, four channels, downsampling 8."""
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(4, 4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
                  up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4).save_pretrained(tmp_path / "sd")
    folder = sample("--model", "SiT-T/2", "--vae", tmp_path / "sd", ckpt=released)
    assert images_of(folder).shape == (8, 64, 64, 3) and folder.name.startswith("released-sde-")


# ------------------------------------------------------------------------------------------------------------- refusals

def refused(capsys, ckpt, flags, word):
    with pytest.raises(SystemExit) as ended:
        generate.main(["--ckpt", str(ckpt), *FEW, *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and word in error


@pytest.mark.parametrize(("flags", "word"), [
    ("--cfg-scale 0.5", "--cfg-scale 0.5"), ("--cfg-scale nan", "finite"), ("--cls-cfg-scale inf", "finite"),
    ("--num-fid-samples 1000000000000", "needs"), (f"--sample-dir {'x' * 300}", "too long"),
    ("--guidance-high 1.5", "--guidance-high"),
    ("--guidance-low 0.9 --guidance-high 0.1", "--guidance-low 0.9"), ("--heun", "--mode ode"),
    ("--classes 1,5", "classes 0 to 2"), ("--classes dog", "--classes"), ("--classes -1", "--classes"),
    ("--classes 1 --labels balanced", "--labels"), ("--num-fid-samples 0", "--num-fid-samples"),
    ("--num-steps 0", "--num-steps"), ("--per-proc-batch-size 0", "--per-proc"), ("--global-seed -1", "--global-seed"),
    ("--sample-dir README.md/x", "README.md/x"), ("--precision tf32", "CUDA"), ("--model SiT-B/2", "SiT-B/2"),
    ("--vae nowhere", "nowhere")])
def test_a_wrong_flag_is_refused_before_anything_is_written(trained, capsys, flags, word):
    refused(capsys, trained, flags.split(), word)
    assert not (trained / "samples").exists()


@pytest.mark.parametrize(("flags", "word"), [
    ("", "--model"), ("--model SiT-T/2", "downsampling"), ("--model SiT-T/2 --cls-cfg-scale 2", "class token"),
    ("--model SiT-T/2 --save-cls-tokens", "class token")])
def test_what_a_released_file_cannot_do(released, vae_folder, tmp_path, capsys, flags, word):
    refused(capsys, released, [*flags.split(), "--vae", str(vae_folder), "--sample-dir", str(tmp_path / "out")], word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "word"), [
    (lambda state: state["architecture"].update(class_dropout_prob=0.0), "--cfg-prob 0"),
    (lambda state: state["args"].update(path_type="curved"), "curved")])
def test_checkpoints_that_cannot_be_sampled_so(experiment, capsys, change, word):
    state = torch.load(find(experiment))
    change(state)
    torch.save(state, find(experiment))
    refused(capsys, experiment, [], word)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "bias holds"), (3e38, "of 3 (guidance scale 2,")])
@pytest.mark.parametrize("head", ["linear", "linear_cls"])
def test_weights_or_samples_that_are_not_finite_give_an_error_and_no_images(experiment, capsys, head, value, word):
    state = torch.load(find(experiment))
    state["ema"][f"final_layer.{head}.bias"][0] = value
    torch.save(state, find(experiment))
    refused(capsys, experiment, ["--cfg-scale", "2", "--num-steps", "3"], word)
    assert not [path for path in (experiment / "samples").rglob("*") if path.suffix in (".npy", ".npz", ".png")]


@pytest.mark.parametrize("name", ["nowhere.pt", ""])
def test_a_missing_checkpoint(tmp_path, capsys, name):
    refused(capsys, tmp_path / name, [], str(tmp_path / name))
