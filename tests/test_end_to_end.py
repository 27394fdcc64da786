"""The whole path of a user: draw, convert, encode, check, train.sh, eval.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from preprocessing import dataset_tools
from toy import agreement, draw

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NUM_GPUS": "1"}


def shell(*command, ok: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run a command in the root of the project; it must end with status 0, or with `ok=False` with another one."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env={**ENVIRONMENT, **environment},
                          capture_output=True, text=True)
    assert (done.returncode == 0) == ok, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """A data set in data/, a reference, and an experiment of two steps in exps/reg-toy."""
    folder = tmp_path_factory.mktemp("story")
    data = folder / "data"
    draw.main(["--dest", str(data / "raw"), "--num-images", "32", "--seed", "0"])
    draw.main(["--npz", str(folder / "reference.npz"), "--num-images", "32", "--seed", "1"])
    workers = ["--workers", "0"]
    dataset_tools.main(["convert", "--source", str(data / "raw"), "--dest", str(data / "images"),
                        "--resolution", "32x32", "--transform", "center-crop-dhariwal", *workers])
    dataset_tools.main(["encode", "--source", str(data / "images"), "--dest", str(data / "vae-sd"),
                        "--model-url", "toy/networks/vae", *workers])
    dataset_tools.main(["check", "--source", str(data), "--output", str(folder / "check.png"), *workers])
    shell("bash", "train.sh", "toy", "--batch-size", "8", "--num-workers", "0", "--logging-steps", "1",
          "--sampling-steps", "2", "--max-train-steps", "2", DATA_DIR=str(data), OUTPUT_DIR=str(folder / "exps"))
    return folder


def test_check_draws_a_picture(story):
    assert Image.open(story / "check.png").width > 32


def test_train_sh_leaves_a_checkpoint_a_log_and_a_grid(story):
    experiment = story / "exps" / "reg-toy"
    lines = [json.loads(line) for line in (experiment / "metrics.jsonl").read_text().splitlines()]
    args = json.loads((experiment / "args.json").read_text())
    assert [line["step"] for line in lines] == [1, 2] and args["num_classes"] == 16 and args["learning_rate"] == 1e-3
    assert (experiment / "checkpoints" / "0000002.pt").exists() and (experiment / "grids" / "0000002.png").exists()


def test_eval_sh_samples_and_scores(story, capsys):
    shell("bash", "eval.sh", story / "exps" / "reg-toy", "--num-fid-samples", "12", "--per-proc-batch-size", "4",
          "--num-steps", "3", REF_BATCH=str(story / "reference.npz"), FEATURES="local-dir:toy/networks/features")
    samples = story / "exps" / "reg-toy" / "samples"
    row, = json.loads((samples / "sweep.json").read_text())
    assert (row["cfg_scale"], row["guidance_high"], row["num_steps"]) == (2.3, 0.85, 3)           # a later flag wins
    metrics = json.loads((samples / row["folder"] / "metrics.json").read_text())
    assert metrics["fd_features"] > 0 and "fid" not in metrics
    assert (metrics["num_samples"], metrics["num_reference"]) == (12, 32)
    npz = samples / row["folder"] / "samples.npz"
    assert np.load(npz)["arr_0"].shape == (12, 32, 32, 3)
    agreement.main([str(npz)])
    assert "chance" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "environment", "word"), [
    (("train.sh",), {}, "unknown recipe"),
    (("train.sh", "xxl"), {}, "'xxl'"),
    (("train.sh", "toy", "--method", "repa"), {}, "METHOD=reg|repa|sit"),
    (("train.sh", "toy"), {"PYTHON": "nowhere"}, "nowhere lacks torch"),
    (("eval.sh",), {}, "no experiment named"),
    (("eval.sh", "--cfg-scale", "1"), {}, "no experiment named"),
])
def test_mistakes_end_the_scripts_with_one_line(command, environment, word):
    done = shell("bash", *command, ok=False, **environment)
    error, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and error.startswith("error: ") and word in error


@pytest.mark.parametrize("script", ["train.sh", "eval.sh"])
def test_scripts_explain_themselves(script):
    assert "Environment:" in shell("bash", script, "--help").stdout


def test_512_px_with_patch_1_and_a_shifted_time(tmp_path, encoder_folder, capsys):
    """A VAE of factor 16 and 16 channels: 32x32 latents, 1,024 tokens, S = sqrt(16 * 32 * 32 / 4096) = 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4,) * 5, down_block_types=("DownEncoderBlock2D",) * 5, norm_num_groups=2,
                  up_block_types=("UpDecoderBlock2D",) * 5, latent_channels=16).save_pretrained(tmp_path / "vae")
    data = tmp_path / "data"
    draw.main(["--dest", str(tmp_path / "raw"), "--num-images", "2", "--seed", "0"])
    dataset_tools.main(["convert", f"--source={tmp_path / 'raw'}", f"--dest={data / 'images'}",
                        "--resolution=512x512", "--workers=0"])
    dataset_tools.main(["encode", f"--source={data / 'images'}", f"--dest={data / 'vae-sd'}",
                        f"--vae={tmp_path / 'vae'}", "--workers=0"])
    flags = ["--data-dir", str(data), "--enc-type", f"local-dir:{encoder_folder}", "--model", "SiT-T/1", "--batch-size",
             "2", "--projector-dim", "32", "--num-workers", "0", "--output-dir", str(tmp_path), "--exp-name", "run"]
    train.main([*flags, "--time-shift", "auto", "--max-train-steps", "1", "--sampling-steps", "0"])
    assert json.loads((tmp_path / "run/args.json").read_text())["time_shift"] == 2.0
    generate.main(["--ckpt", str(tmp_path / "run"), "--num-fid-samples", "1", "--num-steps", "2", "--cfg-scale", "1",
                   "--sample-dir", str(tmp_path / "samples")])
    folder, = (tmp_path / "samples").iterdir()
    assert Image.open(next(folder.glob("images/*.png"))).size == (512, 512)
    assert json.loads((folder / "settings.json").read_text())["sampling"]["time_shift"] == 2.0
    with pytest.raises(SystemExit):                               # without the flag it would be another run
        train.main([*flags, "--max-train-steps", "2", "--sampling-steps", "0"])
    assert "time-shift" in capsys.readouterr().err
