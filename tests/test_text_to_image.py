"""Captions from data to images: training, exact resume, sampling by any number of processes, refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from models import checkpoint
from models.mmdit import MMDiT, MMDiT_models
from runtime.run import find

ROOT = Path(__file__).parents[1]
FEW = ["--num-fid-samples", "8", "--per-proc-batch-size", "3", "--num-steps", "2"]        # blocks 0-2, 3-5, 6-7


@pytest.fixture(scope="module")
def captioned(data_dir, tmp_path_factory):
    """The session's data set with one to three captions for each image, and without labels."""
    folder = Path(shutil.copytree(data_dir, tmp_path_factory.mktemp("captioned") / "data"))
    for store in ("images", "vae-sd"):
        path = folder / store / "dataset.json"
        record = json.loads(path.read_text())
        names = [name for name, _ in record.pop("labels")]
        record["captions"] = {name: ["a red disc", f"large square {i}", "the upper left"][:1 + i % 3]
                              for i, name in enumerate(names)}
        path.write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def flags(captioned, encoder_folder, vae_folder, tiny_clip):
    """Flags of a training run on captions that takes seconds."""
    return ["--data-dir", str(captioned), "--enc-type", f"local-dir:{encoder_folder}", "--vae", str(vae_folder),
            "--model", "MMDiT-T/2", "--text-encoder", str(tiny_clip), "--projector-dim", "32", "--batch-size", "4",
            "--num-workers", "0", "--sampling-steps", "0", "--logging-steps", "1", "--mixed-precision", "no"]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    """An experiment of three steps with a grid, saved at each."""
    output = tmp_path_factory.mktemp("trained")
    train.main([*flags, "--output-dir", str(output), "--exp-name", "run", "--max-train-steps", "3",
                "--checkpointing-steps", "1", "--sampling-steps", "3"])
    return output / "run"


@pytest.fixture
def sample(run, tmp_path, capsys):
    """Flags -> the folder that generate.py prints."""
    def sampled(*flags, ckpt=run, few=FEW) -> Path:
        generate.main(["--ckpt", str(ckpt), *few, "--sample-dir", str(tmp_path / "samples"), *map(str, flags)])
        return Path(capsys.readouterr().out.strip().splitlines()[-1]).parent

    return sampled


def images_of(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


def captions_of(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    return [line["caption"] for line in lines]


# ------------------------------------------------------------------------------------------------------------- training

def test_parameters_of_the_published_sizes():
    """REPA's: 512.4M with projector, 505.1M without; with the class token 513.6M and 506.3M."""
    for slot, z_dims, millions in ((None, (768,), 512.6), (None, (), 505.3), (768, (768,), 513.8), (768, (), 506.5)):
        with torch.device("meta"):
            model = MMDiT_models["MMDiT/2"](input_size=32, in_channels=4, context_dim=768, z_dims=z_dims,
                                            cls_token_dim=slot)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_a_checkpoint_describes_its_text_encoder(run, tiny_clip):
    state = checkpoint.read(find(run))
    text = state["text"]
    assert (text["encoder"], text["length"], text["width"]) == (str(tiny_clip), 16, 32)
    assert text["null"].shape == (16, 32) and "classes" not in state
    model = checkpoint.build_for_sampling(state)
    assert isinstance(model, MMDiT) and model.config["context_dim"] == 32 and not len(model.projectors)
    width, height = Image.open(run / "grids" / "0000003.png").size
    assert height > width                                                                 # room for captions


def test_resuming_is_exact(run, flags, tmp_path):
    """Which caption is shown and which are dropped follow from (seed, step), as all else does."""
    shutil.copytree(run, tmp_path / "run")
    for step in (2, 3):
        (tmp_path / "run" / "checkpoints" / f"000000{step}.pt").unlink()
    train.main([*flags, "--output-dir", str(tmp_path), "--exp-name", "run", "--max-train-steps", "3"])
    straight, resumed = (torch.load(find(folder), weights_only=True) for folder in (run, tmp_path / "run"))
    for part in ("model", "ema"):
        assert all(torch.equal(straight[part][name], weight) for name, weight in resumed[part].items())


@pytest.mark.parametrize("method", [["--method", "repa"], ["--method", "sit"], ["--proj-coeff", "0"],
                                    ["--activation-checkpointing", "--gradient-accumulation-steps", "2", "--qk-norm"]])
def test_every_method_trains_and_samples(method, flags, tmp_path, sample):
    train.main([*flags, *method, "--output-dir", str(tmp_path), "--exp-name", "run", "--max-train-steps", "1"])
    assert images_of(sample("--prompt", "a red disc", ckpt=tmp_path / "run")).shape == (8, 32, 32, 3)


def test_captions_matter_to_the_loss(flags, captioned, tmp_path):
    """Other captions, all else equal: another run."""
    other = Path(shutil.copytree(captioned, tmp_path / "data"))
    for store in ("images", "vae-sd"):
        path = other / store / "dataset.json"
        path.write_text(path.read_text().replace("red", "blue"))
    losses = []
    for name, data in (("one", captioned), ("two", other)):
        train.main([*flags, "--data-dir", str(data), "--output-dir", str(tmp_path), "--exp-name", name,
                    "--max-train-steps", "2"])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("given", "word"), [
    (["--num-classes", "3"], "captions"), (["--no-fused-attn"], "captions"), (["--text-length", "17"], "positions"),
    (["--text-encoder", "nowhere"], "loaded"), (["--model", "SiT-T/2"], "class labels"),
])
def test_flags_that_cannot_be_followed(given, word, flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        train.main([*flags, *given, "--output-dir", str(tmp_path), "--max-train-steps", "1"])
    assert refused.value.code and word in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_data_without_captions_is_refused(flags, data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*flags, "--data-dir", str(data_dir), "--output-dir", str(tmp_path), "--max-train-steps", "1"])
    assert "no captions" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_another_text_encoder_is_refused_when_resuming(run, flags, tiny_clip, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(SystemExit):
        train.main([*flags, "--text-length", "9", "--output-dir", str(tmp_path), "--exp-name", "run",
                    "--max-train-steps", "4"])
    assert "9 states" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- sampling

def test_prompts_of_the_command_line(sample):
    folder = sample("--prompt", "a red  disc", "--prompt", "large square", few=FEW[2:])
    assert captions_of(folder) == ["a red disc", "large square"] and len(images_of(folder)) == 2
    assert "arr_1" not in np.load(folder / "samples.npz")
    assert sample("--prompt", "a red disc", "--prompt", "large square", few=FEW[2:]) == folder
    assert sample("--prompt", "a red disc", "--prompt", "large disc", few=FEW[2:]) != folder


def test_prompts_decide_the_image_and_not_its_noise(sample):
    """Without guidance and prompt the network would give one image: the same noise for each list."""
    one, two = (images_of(sample("--prompt", prompt)) for prompt in ("a red disc", "large blue square"))
    again = images_of(sample("--prompt", "large blue square", "--prompt", "a red disc"))
    assert (one != two).any() and (again[1::2] == one[1::2]).all() and (again[::2] == two[::2]).all()


def test_prompt_files(sample, tmp_path):
    (tmp_path / "plain.txt").write_text("a red disc\n\n  large square \n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a red disc", "tag": "x"}\n{"prompt": "large square"}\n')
    plain, lines = (sample("--prompts", tmp_path / name, few=FEW[2:]) for name in ("plain.txt", "lines.jsonl"))
    assert captions_of(plain) == captions_of(lines) == ["a red disc", "large square"]


def test_captions_of_the_training_data_and_of_another_set(sample, captioned, tmp_path):
    folder = sample()
    first = captions_of(folder)
    assert len(first) == 8 and first[0] == "a red disc" and first[1] in ("a red disc", "large square 1")
    drawn = captions_of(sample("--captions", "random"))
    assert drawn != first
    shutil.copytree(captioned / "images", tmp_path / "val" / "images")
    assert captions_of(sample("--captions-from", tmp_path / "val")) == first


def test_any_number_of_processes_and_a_restart_give_the_same_images(run, sample, tmp_path):
    whole = sample("--captions", "random", "--save-cls-tokens", "--samples-per-prompt", "2")
    images, text = images_of(whole), (whole / "captions.jsonl").read_text()
    command = ["--ckpt", str(run), *FEW, "--captions", "random", "--save-cls-tokens", "--samples-per-prompt", "2"]
    done = subprocess.run([sys.executable, "-m", "runtime.launch", "generate.py", *command, "--sample-dir",
                           str(tmp_path / "two")], cwd=ROOT, env={**os.environ, "NUM_GPUS": "2"}, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = Path(done.stdout.strip().splitlines()[-1]).parent
    assert (images_of(two) == images).all() and (two / "captions.jsonl").read_text() == text
    (whole / "samples.npz").unlink()
    assert sample("--captions", "random", "--save-cls-tokens", "--samples-per-prompt", "2") == whole
    assert (images_of(whole) == images).all()


def test_the_layout_of_geneval(sample, tmp_path):
    lines = ['{"tag": "single_object", "prompt": "a red disc"}', '{"tag": "counting", "prompt": "large square"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    folder = sample("--prompts", tmp_path / "metadata.jsonl", "--layout", "geneval", "--samples-per-prompt", "4",
                    few=FEW[2:])
    pixels = images_of(folder)
    assert len(pixels) == 8 and captions_of(folder)[3:5] == ["a red disc", "large square"]
    for number, line in enumerate(lines):
        place = folder / "geneval" / f"{number:05d}"
        assert (place / "metadata.jsonl").read_text() == line
        found = [np.asarray(Image.open(path)) for path in sorted((place / "samples").iterdir())]
        assert (np.stack(found) == pixels[4 * number:4 * number + 4]).all()


def test_sampling_needs_only_the_encoders_files(run, tiny_clip, sample, tmp_path, capsys):
    """An exported file, the encoder in another folder; an encoder of another length is refused."""
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    checkpoint.main(["export", str(run), str(tmp_path / "shared.safetensors")])
    capsys.readouterr()
    shared = sample("--prompt", "a red disc", "--text-encoder", moved, ckpt=tmp_path / "shared.safetensors")
    assert (images_of(shared) == images_of(sample("--prompt", "a red disc"))).all()


@pytest.mark.parametrize(("given", "word"), [
    (["--classes", "1"], "captions"), (["--labels", "balanced"], "captions"),
    (["--prompts", "nowhere.txt"], "read"), (["--prompt", "x", "--prompts", "y"], "contradicts"),
    (["--layout", "geneval", "--prompt", "x"], "--prompts"), (["--text-encoder", "nowhere", "--prompt", "x"], "loaded"),
    (["--captions-from", "nowhere"], "captions"),
])
def test_sampling_flags_that_cannot_be_followed(given, word, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        generate.main(["--ckpt", str(run), *FEW, "--sample-dir", str(tmp_path / "samples"), *given])
    assert refused.value.code and word in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--prompt", "x"], ["--captions", "random"], ["--captions-from", "x"]])
def test_prompts_with_a_class_checkpoint_are_refused(given, trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--ckpt", str(trained), *FEW, "--sample-dir", str(tmp_path / "samples"), *given])
    assert "class labels" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_long_prompt_is_cut_and_kept_whole_in_the_record(sample):
    folder = sample("--prompt", "a red disc " * 9, "--prompt", "a red disc " * 10)
    assert captions_of(folder)[0] == ("a red disc " * 9).strip()
