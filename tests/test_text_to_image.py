"""Captions from data to images: training, exact resume, sampling by any number of processes, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import train
from models import checkpoint
from models.mmdit import MMDiT, MMDiT_models
from models.text import TextEncoder
from runtime.messages import UserError
from runtime.run import find
from tests import forks

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
    """REPA's has 512.4M with projector and 505.1M without; its position table of 0.2M is no parameter there."""
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


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_is_exact(processes, flags, tmp_path):
    """Which caption is shown and which are dropped follow from (seed, step), as all else does."""
    found = []
    for _ in range(2):                                            # straight; then again from step 2
        command = [*flags, "--cfg-prob", "0.5", "--output-dir", str(tmp_path), "--exp-name", "run",
                   "--max-train-steps", "4", "--checkpointing-steps", "2"]
        if processes == 1:
            train.main(command)
        else:
            forks.two_ranks(forks.run_main, train.main, command)
        found.append(torch.load(find(tmp_path / "run"), weights_only=True))
        (tmp_path / "run" / "checkpoints" / "0000004.pt").unlink()
    straight, resumed = found
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


@pytest.fixture
def altered(tiny_clip, tmp_path):
    """The text encoder with another vector for one word: the empty caption has the same states."""
    folder = shutil.copytree(tiny_clip, tmp_path / "altered")
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.token_embedding.weight"][5] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_another_text_encoder_is_refused_when_resuming(run, flags, altered, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    for given, word in ((["--text-length", "9"], "--text-length"), (["--text-encoder", str(altered)], "other weights")):
        with pytest.raises(SystemExit):
            train.main([*flags, *given, "--output-dir", str(tmp_path), "--exp-name", "run", "--max-train-steps", "4"])
        assert word in capsys.readouterr().err


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
    forks.two_ranks(forks.run_main, generate.main, [*command, "--sample-dir", tmp_path / "two"])
    two, = (tmp_path / "two").iterdir()
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


def test_sampling_needs_only_the_encoders_files(run, tiny_clip, vae_folder, sample, tmp_path, capsys):
    """An exported file, which names no folder of this machine, the VAE, and the encoder in another folder."""
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    checkpoint.main(["export", str(run), str(tmp_path / "shared.safetensors")])
    capsys.readouterr()
    assert str(tiny_clip.parent) not in (tmp_path / "shared.safetensors").read_bytes().decode(errors="replace")
    shared = sample("--prompt", "a red disc", "--text-encoder", moved, "--vae", vae_folder,
                    ckpt=tmp_path / "shared.safetensors")
    assert (images_of(shared) == images_of(sample("--prompt", "a red disc"))).all()


@pytest.mark.parametrize(("given", "word"), [
    (["--classes", "1"], "captions"), (["--labels", "balanced"], "captions"),
    (["--prompts", "nowhere.txt"], "read"), (["--prompt", "x", "--prompts", "y"], "not allowed"),
    (["--layout", "geneval", "--prompt", "x"], "--prompts"), (["--layout", "geneval", "--prompts", __file__], "JSON"),
    (["--layout", "geneval", "--prompts", "x", "--captions", "random"], "in order"),
    (["--text-encoder", "nowhere", "--prompt", "x"], "loaded"),
    (["--captions-from", "nowhere"], "captions"),
])
def test_sampling_flags_that_cannot_be_followed(given, word, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        generate.main(["--ckpt", str(run), *FEW[2:], "--sample-dir", str(tmp_path / "samples"), *given])
    assert refused.value.code and word in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_sampling_with_an_altered_text_encoder_is_refused(run, altered, sample, capsys):
    with pytest.raises(SystemExit):
        sample("--prompt", "x", "--text-encoder", altered)
    assert "other weights" in capsys.readouterr().err


def test_a_checkpoint_of_captions_describes_its_text_encoder(run, tmp_path):
    state = torch.load(find(run), weights_only=True)
    del state["text"]
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(UserError, match="describe its text encoder"):
        checkpoint.read(tmp_path / "edited.pt")


@pytest.mark.parametrize("edit", [
    lambda state: state["text"].update(width=64, null=torch.zeros(16, 64)),
    lambda state: state["text"].update(length="16"), lambda state: state["text"].update(encoder=None),
    lambda state: state["text"].update(null=torch.full((16, 32), torch.nan)),
    lambda state: state["architecture"].update(num_heads=3), lambda state: state["architecture"].update(num_heads=200),
    lambda state: state["ema"].update({"joint_blocks.foo": torch.zeros(1)}),
    lambda state: state["ema"].update({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(2, 2)}),
])
def test_edited_checkpoints_of_captions_are_refused(edit, run, tmp_path, capsys):
    state = torch.load(find(run), weights_only=True)
    edit(state)
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(SystemExit) as refused:
        generate.main(["--ckpt", str(tmp_path / "edited.pt"), *FEW, "--prompt", "x",
                       "--sample-dir", str(tmp_path / "s")])
    assert refused.value.code and capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "s").exists()


def test_an_edited_data_set_is_refused_where_its_captions_are_needed(run, tmp_path, capsys):
    state = torch.load(find(run), weights_only=True)
    state["args"]["data_dir"] = 5
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(SystemExit) as refused:
        generate.main(["--ckpt", str(tmp_path / "edited.pt"), *FEW, "--sample-dir", str(tmp_path / "s")])
    assert refused.value.code == 2 and "5: no captions" in capsys.readouterr().err


def test_a_released_file_takes_an_encoder_of_its_width(run, tiny_clip, tmp_path, capsys, sample):
    """Weights alone tell the width of the states, and not the encoder."""
    state = torch.load(find(run), weights_only=True)
    torch.save({"ema": state["ema"], "latent_space": state["latent_space"]}, tmp_path / "released.pt")
    given = ["--model", "MMDiT-T/2", "--prompt", "a red disc", "--path-type", "linear"]
    folder = sample(*given, "--text-encoder", tiny_clip, ckpt=tmp_path / "released.pt")
    assert (images_of(folder) == images_of(sample("--prompt", "a red disc"))).all()
    config = transformers.CLIPTextConfig(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=8, max_position_embeddings=16)
    transformers.CLIPTextModel(config).save_pretrained(tmp_path / "wide")
    transformers.AutoTokenizer.from_pretrained(tiny_clip).save_pretrained(tmp_path / "wide")
    with pytest.raises(SystemExit):
        sample(*given, "--text-encoder", tmp_path / "wide", ckpt=tmp_path / "released.pt")
    assert "width 64" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--prompt", "x"], ["--captions", "random"], ["--captions-from", "x"],
                                   ["--samples-per-prompt", "4"]])
def test_prompts_with_a_class_checkpoint_are_refused(given, trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--ckpt", str(trained), *FEW, "--sample-dir", str(tmp_path / "samples"), *given])
    assert "class labels" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_long_prompt_is_cut_as_the_tokenizer_does_and_named_once(tiny_clip, capsys):
    encoder = TextEncoder(str(tiny_clip))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_clip)
    for _ in range(2):
        prompts = ["a red disc " * 9, "a red disc", ""]
        tokens = tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        torch.testing.assert_close(encoder.states(prompts), encoder.network(input_ids=tokens).last_hidden_state)
    assert capsys.readouterr().err.count("cut") == 1


def test_t5_masks_padding_inside(tmp_path):
    """Longer padding changes no state of a word."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "disc": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(tmp_path)
    config = transformers.T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    short, long = (TextEncoder(str(tmp_path), length=length).states(["a red disc", "a"]) for length in (4, 9))
    assert short.shape == (2, 4, 16) and long.shape == (2, 9, 16)
    torch.testing.assert_close(short[0], long[0, :4])
    torch.testing.assert_close(short[1, :2], long[1, :2])
    assert TextEncoder(str(tmp_path)).length == 128


def test_states_do_not_depend_on_autocast(tiny_clip):
    """Training draws under autocast, sampling without: one text encoder."""
    encoder = TextEncoder(str(tiny_clip))
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder.states(["a red disc"])
    assert torch.equal(inside, encoder.states(["a red disc"]))


@pytest.mark.parametrize(("content", "prompts"), [
    (b'\xef\xbb\xbf{"prompt": "a red disc"}', ["a red disc"]), ("a\u2028red\ndisc".encode(), ["a red", "disc"])])
def test_prompt_files_of_other_systems(content, prompts, tmp_path):
    (tmp_path / "prompts").write_bytes(content)
    assert generate.read_prompts(str(tmp_path / "prompts"))[0] == prompts
