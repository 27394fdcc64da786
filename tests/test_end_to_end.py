"""The whole story through the programs a user runs: draw, convert, encode, check, train.sh, resume on two processes, eval.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}

# Read by every Python that starts: a rank that ends in order has parted from the others, whose threads could abort it otherwise.
AT_THE_END = """
import atexit, os, sys

@atexit.register
def parted():
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        print(sys.argv, "ends within a process group", file=sys.stderr, flush=True)
        os._exit(70)
"""


@pytest.fixture(scope="module", autouse=True)
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(AT_THE_END)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "PYTHONPATH", str(folder))
        yield


def shell(*command, ok: bool = True, **environment) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """A trained experiment in exps/reg-toy: two steps on one process, then resumed to four on two."""
    folder = tmp_path_factory.mktemp("story")
    data = folder / "data"
    tools = (sys.executable, "-m", "preprocessing.dataset_tools")
    shell(sys.executable, "-m", "toy.draw", "--dest", data / "raw", "--num-images", "32", "--seed", "0")
    shell(sys.executable, "-m", "toy.draw", "--npz", folder / "reference.npz", "--num-images", "32", "--seed", "1")
    shell(*tools, "convert", "--source", data / "raw", "--dest", data / "images", "--resolution=32x32", "--transform=center-crop-dhariwal")
    shell(sys.executable, "-m", "runtime.launch", *tools[1:], "encode", "--source", data / "images", "--dest", data / "vae-sd",
          "--model-url", "toy/networks/vae", "--workers", "0", NUM_GPUS="2")
    shell(*tools, "check", "--source", data, "--output", folder / "check.png", "--workers", "0")

    command = ("bash", "train.sh", "toy", "--batch-size", "8", "--num-workers", "0", "--logging-steps", "1", "--sampling-steps", "4")
    where = dict(DATA_DIR=str(data), OUTPUT_DIR=str(folder / "exps"), NUM_GPUS="1")
    shell(*command, "--max-train-steps", "2", **where)
    scoring = ("--eval-steps", "4", "--eval-samples", "6", "--ref-batch", folder / "reference.npz", "--features",
               "local-dir:toy/networks/features")
    resumed = shell(*command, "--max-train-steps", "4", *scoring, **{**where, "NUM_GPUS": "2"})
    assert "at step 2" in resumed.stdout and "2 process(es)" in resumed.stdout
    return folder


def test_preparation_leaves_a_picture_to_look_at(story):
    assert Image.open(story / "check.png").width > 32


def test_training_leaves_checkpoints_a_log_and_a_grid(story):
    experiment = story / "exps" / "reg-toy"
    assert sorted(p.name for p in (experiment / "checkpoints").iterdir()) == ["0000002.pt", "0000004.pt"]
    lines = [json.loads(line) for line in (experiment / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4] and lines[-1]["fd_features_6"] > 0    # the score has a line of its own
    assert json.loads((experiment / "args.json").read_text())["num_classes"] == 16
    assert (experiment / "grids" / "0000004.png").exists()


def test_eval_samples_and_scores_a_sweep(story):
    flags = ("--num-fid-samples", "12", "--per-proc-batch-size", "4", "--num-steps", "3")
    where = dict(REF_BATCH=str(story / "reference.npz"), FEATURES="local-dir:toy/networks/features", NUM_GPUS="1")
    samples = story / "exps" / "reg-toy" / "samples"
    done = shell("bash", "eval.sh", story / "exps" / "reg-toy", *flags, "--cfg-scale", "1,2.3", **where)
    assert f"table: {samples}/sweep.csv\nplot: {samples}/sweep.png\n" in done.stdout
    unguided, guided = json.loads((samples / "sweep.json").read_text())
    assert (unguided["cfg_scale"], unguided["guidance_high"], guided["cfg_scale"], guided["guidance_high"]) == (1, None, 2.3, 0.85)
    assert unguided["best"] + guided["best"] == 1 and Image.open(samples / "sweep.png").width > 500

    # One of its settings again, on two processes: not sampled again, and scored for what was not asked before.
    folder = samples / guided["folder"]
    written = (folder / "samples.npz").stat().st_mtime_ns
    again = shell("bash", "eval.sh", story / "exps" / "reg-toy", *flags, "--metrics", "fd,kid", **{**where, "NUM_GPUS": "2"})
    assert f"grid: {folder}/grid.png\nmetrics: {folder}/metrics.json\n" in again.stdout and again.stderr.count("already there") == 1
    assert written == (folder / "samples.npz").stat().st_mtime_ns
    rows = [row for row in json.loads((samples / "sweep.json").read_text()) if row["folder"] == folder.name]
    assert ["kid_features" in row for row in rows] == [False, True]                       # the earlier score is kept beside it
    assert rows[1]["fd_features"] == pytest.approx(guided["fd_features"], rel=1e-6)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["fd_features"] > 0 and "fid" not in metrics
    assert metrics["num_samples"] == 12 and metrics["num_reference"] == 32
    assert metrics["settings"]["sampling"]["num_steps"] == 3 and metrics["settings"]["step"] == 4
    assert len(metrics["settings"]["checkpoint_sha256"]) == 64 and metrics["settings"]["training"]["method"] == "reg"
    assert np.load(folder / "samples.npz")["arr_0"].shape == (12, 32, 32, 3)
    agreement = shell(sys.executable, "-m", "toy.agreement", folder / "samples.npz")
    assert "chance" in agreement.stdout


def test_without_a_reference_samples_are_made_and_scoring_is_refused(story, tmp_path):
    flags = ("--num-fid-samples", "2", "--num-steps", "1", "--sample-dir", tmp_path)
    refused = shell("bash", "eval.sh", story / "exps" / "reg-toy", *flags, ok=False)
    assert "cannot be scored without a reference: set REF_BATCH" in refused.stderr.splitlines()[-1]
    folder, = tmp_path.iterdir()
    assert (folder / "samples.npz").exists() and not (folder / "metrics.json").exists()


@pytest.mark.parametrize(("command", "environment", "sentence"), [
    (("train.sh", "xxl"), {}, "unknown recipe 'xxl'"),
    (("train.sh", "toy"), {"DATA_DIR": "nowhere"}, "nowhere"),
    (("train.sh", "toy"), {"DATA_DIR": "nowhere", "NUM_GPUS": "2"}, "nowhere"),
    (("train.sh", "toy"), {"PYTHON": "nowhere"}, "nowhere lacks torch"),
    (("train.sh", "toy"), {"NNODES": "2"}, "NODE_RANK or MASTER_ADDR is not set"),
    (("train.sh", "toy", "--method", "repa"), {}, "set METHOD=reg|repa|sit"),
    (("eval.sh",), {}, "no experiment named"),
    (("eval.sh", "--cfg-scale", "1"), {}, "no experiment named"),
    (("eval.sh", "nowhere"), {}, "no checkpoint at nowhere"),
    (("eval.sh", "nowhere", "--cfg-scale", "1,x"), {}, "--cfg-scale is '1,x'"),
    # Any file passes for a checkpoint until it is read, and scoring is checked before.
    (("eval.sh", "README.md"), {"REF_BATCH": "nowhere.npz"}, "nowhere.npz not found"),
    (("eval.sh", "README.md"), {"REF_BATCH": "tests/data/reg_forward.npz"}, "arr_0"),
    (("eval.sh", "README.md"), {"REF_BATCH": "tests", "FEATURES": "local-dir:nowhere"}, "tests holds 0 images"),
])
def test_mistakes_end_the_scripts_with_one_sentence(command, environment, sentence):
    done = shell("bash", *command, ok=False, **environment)
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and sentence in error[0]


def test_plain_torchrun_on_a_cpu_is_refused(story):
    """It would start two independent runs that overwrite each other."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA processes join by themselves")
    environment = {"ACCELERATE_USE_CPU": "false"}
    flags = ("--data-dir", story / "data", "--method", "sit", "--sampling-steps", "0", "--output-dir", story / "torchrun")
    done = shell(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *flags, ok=False,
                 **environment)
    assert "the launcher started 2 processes, but accelerate sees 1" in done.stderr and not (story / "torchrun").exists()
