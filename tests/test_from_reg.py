"""A user of the released REG programs gives the commands that are published: they run, or one sentence says why not."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from models import checkpoint
from models.conditioning import ClassLabels
from models.sit import SiT_models
from models.vae import LatentSpace
from preprocessing import dataset_tools
from preprocessing.crop import TRANSFORMS, center_crop, to_square
from runtime.messages import UserError
from runtime.run import find

ROOT = Path(__file__).parents[1]
TRAIN = ("--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v "
         "--weighting=uniform --model=SiT-B/2 --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=4 "
         "--output-dir=exps --exp-name=linear-dinov2-b-enc4 --batch-size=256 --data-dir=data --cls=0.03")
EVAL = ("--model SiT-XL/2 --num-fid-samples 50000 --ckpt 4000000.pt --path-type=linear --encoder-depth=8 "
        "--projector-embed-dims=768 --per-proc-batch-size=64 --mode=sde --num-steps=250 --cfg-scale=2.3 "
        "--cls-cfg-scale=2.3 --guidance-high=0.85 --sample-dir samples --cls=768")


def replaced(command: str, **values) -> list[str]:
    """The command with other values of some of its flags."""
    words = command.replace(" ", "\n").replace("\n--", " --").replace("\n", "=").split()
    changed = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    assert changed.keys() <= {word.partition("=")[0] for word in words}
    return [f"{flag}={changed.get(flag, value)}" if equal else flag for flag, equal, value in (
        word.partition("=") for word in words)]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, **environment}, text=True,
                          capture_output=True, timeout=300)


@pytest.fixture
def small(data_dir, encoder_folder, tmp_path) -> list[str]:
    """The published training command on the toy's data, sizes and precision."""
    tracker = "wandb" if find_spec("wandb") else "tensorboard"
    return replaced(TRAIN, data_dir=data_dir, enc_type=f"local-dir:{encoder_folder}", model="SiT-T/2", batch_size=4,
                    mixed_precision="no", output_dir=tmp_path, report_to=tracker)


# ------------------------------------------------------------------------------------------------------------- training

def test_the_published_training_command_is_taken_as_it_is():
    args = train.parse_args(TRAIN.split())
    assert (args.method, args.cls, args.proj_coeff, args.mixed_precision) == ("reg", 0.03, 0.5, "fp16")
    assert "prediction" not in args


@pytest.mark.parametrize("launcher", [
    ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ["-m", "torch.distributed.run", "--nproc_per_node", "2"]])
def test_the_published_training_command_runs(small, tmp_path, launcher):
    short = ["--max-train-steps=2", "--sampling-steps=0", "--num-workers=0"]              # else hours on a CPU
    done = run(*launcher, "train.py", *small, *short, ACCELERATE_USE_CPU="true", WANDB_MODE="offline", WANDB_DIR=str(
        tmp_path))
    assert done.returncode == 0, done.stderr
    state = checkpoint.read(find(tmp_path / "linear-dinov2-b-enc4"))
    assert (state["steps"], state["processes"], state["args"]["cls"]) == (2, 2, 0.03)


@pytest.mark.parametrize(("flag", "word"), [
    ("--epochs=1400", "--max-train-steps"), ("--epochs 1400", "--max-train-steps"), ("--legacy", "--cfg-prob"),
    ("--no-legacy", "leave it out"), ("--ops-head 16", "--model"), ("--logging-dir logs", "EXP_NAME"),
    ("--prediction x", "--prediction"), ("--prediction", "--prediction"),
    ("--learning-rate inf", "--learning-rate"), ("--learning-rate 1e9", "--learning-rate"),
    ("--cls inf", "float32"), ("--cls 1e39", "float32"), ("--proj-coeff inf", "float32"), ("--proj-coeff nan", "nan"),
    ("--adam-epsilon 0", "above 0"), ("--adam-epsilon 1e-60", "float32"), ("--adam-epsilon 1e38", "up to 1"),
    ("--ema-decay 1", "below 1"),
    ("--projector-dim 10000000000", "at most"), ("--num-classes 90000000", "at most"),
    ("--batch-size 1000000000000", "at most"), ("--eval-samples 1000000000000", "at most"),
    ("--num-workers 100000", "at most"), ("--resolution 1000000000", "at most")])
def test_training_flags_that_are_refused_in_one_sentence(capsys, flag, word):
    with pytest.raises(SystemExit) as ended:
        train.parse_args(flag.split())
    error, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and error.startswith(f"error: {flag.split()[0].split('=')[0]}") and word in error


@pytest.mark.parametrize("flags", [("--projector-dim", "1000000000"),
                                   ("--num-classes", "9000000", "--model", "SiT-XL/2")])
def test_networks_beyond_the_memory_are_refused_before_they_are_built(train_flags, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        train.main([*train_flags, *flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "needs more" in error and flags[1] in error and " 0.0" not in error


def test_batches_beyond_the_memory_are_refused_before_they_are_read():
    """Ten million images of 1,024 px for each of the two processes."""
    args = train.resolve(train.parse_args(["--method", "sit", "--model", "SiT-T/2", "--batch-size", "10000000"]))
    with pytest.raises(UserError, match="--batch-size 10000000"):
        train.open_networks(args, LatentSpace(), 1024, ClassLabels(3), [], torch.device("cpu"), processes=2)


def test_an_over_long_name_is_a_sentence(train_flags, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([*train_flags, "--exp-name", "x" * 300])
    assert ended.value.code == 2 and "too long" in capsys.readouterr().err.splitlines()[-1]


def test_classes_without_images_travel_in_the_checkpoint_and_are_not_sampled(train_flags, tmp_path, capsys, vae_folder):
    train.main([*train_flags, "--num-classes", "50", "--max-train-steps", "1"])
    state = checkpoint.read(find(tmp_path / "run"))
    assert state["classes"] == [0, 1, 2] and state["architecture"]["num_classes"] == 50
    flags = ["--ckpt", str(tmp_path / "run"), "--num-fid-samples", "12", "--num-steps", "1", "--no-png"]
    for labels in ("random", "balanced"):
        generate.main([*flags, "--labels", labels])
        printed = capsys.readouterr()
        assert "3 of 50" in printed.err
        assert set(np.load(printed.out.splitlines()[-1])["arr_1"]) <= {0, 1, 2}
    with pytest.raises(SystemExit):
        generate.main([*flags, "--classes", "1,7"])
    assert "--classes 7" in capsys.readouterr().err
    checkpoint.export(tmp_path / "run", tmp_path / "out.safetensors")
    assert checkpoint.read(tmp_path / "out.safetensors")["classes"] == [0, 1, 2]


def test_a_checkpoint_whose_classes_have_images_says_nothing_of_them(trained):
    assert "classes" not in checkpoint.read(find(trained))


# ------------------------------------------------------------------------------------------------------------- sampling

def test_the_published_sampling_command_is_taken_as_it_is():
    args = generate.parse_args([*EVAL.split(), "--local-rank=3"])
    assert (args.cls, args.projector_embed_dims, args.cls_cfg_scale) == (768, (768,), 2.3) and "local_rank" not in args


def test_the_published_sampling_command_runs(trained, tmp_path):
    """As in the released eval.sh, which starts it by torch.distributed.launch: that adds --local-rank."""
    words = replaced(EVAL, model="SiT-T/2", num_fid_samples=4, ckpt=find(trained), encoder_depth=4,
                     projector_embed_dims=32, per_proc_batch_size=2, num_steps=1, sample_dir=tmp_path, cls=32)
    done = run("-m", "torch.distributed.launch", "--nproc_per_node=2", "generate.py", *words, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert np.load(done.stdout.splitlines()[-1])["arr_0"].shape == (4, 32, 32, 3)


RIGHT = ("--path-type linear --encoder-depth 4 --projector-embed-dims 32 --cls 32 --resolution 32 --num-classes 3 "
         "--no-qk-norm --fused-attn --cfg-scale 1 --cls-cfg-scale 2")
FEW = ["--num-fid-samples", "2", "--num-steps", "1", "--no-png"]


def test_what_the_checkpoint_answers_may_be_repeated(trained, tmp_path, capsys):
    """The class token's scale beside --cfg-scale 1 is said once, and the samples are those without it."""
    flags = ["--ckpt", str(trained), *FEW, "--sample-dir", str(tmp_path)]
    generate.main([*flags, *RIGHT.split()])
    assert capsys.readouterr().err.count("--cls-cfg-scale") == 1
    generate.main([*flags, "--cfg-scale", "1"])
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--path-type cosine", "--encoder-depth 8", "--projector-embed-dims 32,64", "--cls 0",
                                   "--cls 768", "--resolution 256", "--num-classes 1000", "--qk-norm",
                                   "--no-fused-attn"])
def test_what_contradicts_the_checkpoint_is_refused(trained, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        generate.main(["--ckpt", str(trained), *FEW, *flags.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "the checkpoint has" in error and error.startswith(
        "error: " + flags.split()[0].replace("--no-", "--"))


@pytest.mark.parametrize(("flag", "word"), [
    ("--tf32", "--precision tf32"), ("--no-tf32", "--precision"), ("--no-heun", "leave it out"),
    ("--legacy", "decoder_blocks"), ("--cfg-scale 1e30", "100"), ("--num-steps 1000000000000", "at most"),
    ("--per-proc-batch-size 1000000000", "at most")])
def test_sampling_flags_that_are_refused_in_one_sentence(capsys, flag, word):
    with pytest.raises(SystemExit) as ended:
        generate.parse_args(["--ckpt", "x", *flag.split()])
    error, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and error.startswith(f"error: {flag.split()[0]}") and word in error


def test_weights_alone_are_sampled_on_the_path_that_is_named(tmp_path, trained):
    """They do not tell it. The two paths' samples do not share a folder."""
    torch.save(checkpoint.read(find(trained))["ema"], tmp_path / "bare.pt")
    state, found = checkpoint.read(tmp_path / "bare.pt"), {}
    for path in ("linear", "cosine", None):
        args = generate.parse_args(["--ckpt", "bare.pt", *(["--path-type", path] if path else [])])
        settings = generate.settings_of(args, tmp_path / "bare.pt", state, "hash", False,
                                        generate.conditions_of(args, state))
        found[path] = settings["sampling"]["path_type"], generate.folder_of(None, settings).name
    assert found["cosine"][0] == "cosine" and found[None] == found["linear"] and found[None][0] == "linear"
    assert found["cosine"][1] != found["linear"][1]


# -------------------------------------------------------------------------------------------------------------- scoring

def test_the_evaluator_runs_as_a_script():
    done = run("./evaluations/evaluator.py", "--ref_batch", "nowhere.npz", "--sample_batch", "nowhere.npz")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "nowhere.npz" in done.stderr


def test_a_released_file_takes_the_class_token_flag_of_its_model(tmp_path, capsys):
    """A file of REPA has no class token: --cls 768, which names one, is refused."""
    model = SiT_models["SiT-T/2"](input_size=4, in_channels=4, num_classes=5, z_dims=(7,), cls_token_dim=None)
    torch.save({"ema": model.state_dict(), "args": {"path_type": "linear"}}, tmp_path / "released.pt")
    for flags, word in ((["--cls", "768"], "--cls 768"), (["--projector-embed-dims", "768"], "(7,)")):
        with pytest.raises(SystemExit):
            generate.main(["--ckpt", str(tmp_path / "released.pt"), "--model", "SiT-T/2", *FEW, *flags])
        assert word in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------- data

def convert(source, dest, *flags):
    dataset_tools.main(["convert", f"--source={source}", f"--dest={dest}", "--resolution=8x8", "--workers=0", *flags])


def picture(*size) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def lanczos(array: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.array(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS))


def test_convert_without_transform_takes_square_pictures_only(tmp_path, capsys):
    """The released program stretches them. Square ones are those of the transform that made the published numbers."""
    (tmp_path / "a").mkdir()
    picture(20, 20).save(tmp_path / "a/0.png")
    picture(20, 21).save(tmp_path / "a/1.png")
    with pytest.raises(SystemExit) as ended:
        convert(tmp_path / "a", tmp_path / "b")
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "1.png: 20x21" in error and all(name in error for name in TRANSFORMS)
    (tmp_path / "a/1.png").unlink()
    convert(tmp_path / "a", tmp_path / "c")
    convert(tmp_path / "a", tmp_path / "c", f"--transform={TRANSFORMS[0]}")
    assert "finished already" in capsys.readouterr().out
    made = np.array(Image.open(tmp_path / "c/00000/img00000000.png"))
    assert (made == np.array(center_crop(picture(20, 20), 8))).all()


@pytest.mark.parametrize("size", [(21, 16), (16, 21), (16, 16), (64, 3), (5, 6)])
def test_center_crop_is_the_central_square_resized_with_lanczos(size):
    array, side = np.array(picture(*size)), min(size)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    expected = lanczos(array[top:top + side, left:left + side], 8, 8)
    assert (np.array(to_square(picture(*size), 8, "center-crop")) == expected).all()


def test_center_crop_wide_keeps_the_width_on_black():
    array = np.array(picture(32, 16))
    made = np.array(to_square(picture(32, 16), 8, "center-crop-wide"))
    assert (made[2:6] == lanczos(array, 8, 4)).all() and not made[:2].any() and not made[6:].any()
    tall = (np.array(to_square(picture(16, 21), 8, name)) for name in ("center-crop", "center-crop-wide"))
    assert (next(tall) == next(tall)).all()


@pytest.mark.parametrize(("flags", "resolution", "said"), [
    ([], 256, 1), (["--num-classes", "1000"], 256, 0), ([], 32, 0)])
def test_a_subset_of_imagenet_hears_of_1000_classes(capsys, flags, resolution, said):
    args = train.resolve(train.parse_args(["--method", "sit", "--model", "SiT-T/2", *flags]))
    train.open_networks(args, LatentSpace(), resolution, ClassLabels(args.num_classes or 3), [], torch.device("cpu"))
    assert capsys.readouterr().err.count("--num-classes 1000") == said
