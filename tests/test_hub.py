"""Networks as folders, hub repositories and pipelines of diffusers: the same bits, and refusals in one sentence."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import train
from models import checkpoint, hub
from models.mmdit import MMDiT
from models.pipeline import REGPipeline
from models.sit import SiT
from models.vae import LatentSpace, load_codec
from runtime.files import sha256, write_whole
from runtime.messages import UserError
from runtime.run import find
from samplers import image_rng
from tests.stress.kills import same
from tests.test_files_of_others import FIRED, as_pickle, as_zip
from tests.test_sit import randomised, small

FEW = ["--num-fid-samples", "8", "--per-proc-batch-size", "3", "--num-steps", "2", "--no-png"]


def captioned() -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=12,
                 encoder_depth=1, z_dims=(), cls_token_dim=None)


def of_captions(folder: Path, clip: Path, vae: Path) -> Path:
    """A checkpoint of an MMDiT with the text encoder `clip`, as training writes it."""
    from models.text import TextEncoder

    torch.manual_seed(0)
    model = MMDiT(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, context_dim=32,
                  encoder_depth=1, z_dims=(), cls_token_dim=12)
    encoder = TextEncoder(str(clip))
    text = {"encoder": str(clip), "sha256": encoder.sha256, "length": encoder.length, "width": encoder.width,
            "null": encoder.states([""])[0]}
    torch.save({"ema": model.state_dict(), "architecture": model.config, "text": text, "steps": 3,
                "latent_space": load_codec(str(vae)).space.to_record(), "args": {"method": "reg"}}, folder / "t2i.pt")
    return folder / "t2i.pt"


def in_cache(folder: Path, name: str) -> None:
    """Put a folder into the hub's cache as a download of `name`."""
    place = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40), dirs_exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text("0" * 40)


# ----------------------------------------------------------------------------------------------------------- the folder

@pytest.mark.parametrize("build", [lambda: randomised(small(qk_norm=True)), captioned])
def test_a_network_is_the_same_after_a_folder_and_the_hub(build, tmp_path):
    """Also what a checkpoint records beside the weights, and it can be saved again."""
    model = build()
    model.record = {"latent_space": LatentSpace().to_record(), "steps": 7, "weights": "model",
                    "args": {"method": "reg", "path_type": "cosine", "time_shift": 2.0}}
    if isinstance(model, MMDiT):
        model.record["text"] = {"encoder": "x/y", "sha256": "0", "length": 3, "width": 12, "null": torch.randn(3, 12)}
    else:
        model.record["classes"] = [0, 3]
    assert isinstance(model, PyTorchModelHubMixin)
    model.save_pretrained(tmp_path / "one")
    type(model).from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    in_cache(tmp_path / "two", "someone/tiny")
    names = {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    for place in (tmp_path / "one", str(tmp_path / "two"), "someone/tiny"):
        again = type(model).from_pretrained(place)
        assert not again.training and again.config == model.config
        assert same(again.state_dict(), model.state_dict()) and same(again.record, model.record)


def test_a_network_without_a_record(tmp_path):
    randomised(small()).save_pretrained(tmp_path)
    assert SiT.from_pretrained(tmp_path).record == {"weights": "ema"}
    assert checkpoint.read(tmp_path).keys() == {"architecture", "ema"}


def test_an_id_offline_or_a_wrong_name_is_one_sentence(tmp_path):
    for name, word in (("someone/nothing", "offline"), ("nowhere", "nowhere"), (tmp_path, "checkpoint"),
                       ("exps/0000001.pt", "no such checkpoint")):
        for read in (SiT.from_pretrained, REGPipeline.from_pretrained, checkpoint.read):
            with pytest.raises(UserError, match=word) as refused:
                read(name)
            assert "\n" not in str(refused.value)


def config(**changes):
    def edit(folder):
        path = folder / "config.json"
        found = json.loads(path.read_text())
        found["architecture"] |= {name: value for name, value in changes.items() if name in found["architecture"]}
        path.write_text(json.dumps(found | {name: value for name, value in changes.items()
                                            if name not in found["architecture"]}))
    return edit


def weights(change):
    def edit(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return edit


@pytest.mark.parametrize(("edit", "word"), [
    (config(depth=10**9), "depth"), (config(depth=2**19), "depth"), (config(num_heads=-1), "num_heads"),
    (config(num_heads=7), "cannot be built"), (config(input_size=2**19), "input_size"),
    (config(z_dims=[4] * 9), "projectors"), (config(architecture=[]), "architecture"),
    (config(architecture=None), "config.json"), (config(steps=-1), "steps"), (config(latent_space={}), "vae"),
    (config(args=[]), "args"), (config(classes=["a"]), "classes"),
    (config(text={}), "text encoder"), (config(weights=[]), "safetensors"), (config(weights="opt"), "SiT"),
    (lambda folder: (folder / "config.json").write_text("[" * 10**5), "safetensors"),
    (lambda folder: (folder / "config.json").write_text("[]"), "safetensors"),
    (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "safetensors"),
    (weights(lambda state: state.pop("pos_embed")), "pos_embed"),
    (weights(lambda state: state.update(more=torch.zeros(1))), "more"),
    (weights(lambda state: state["final_layer.linear.bias"].fill_(torch.nan)), "finite"),
    (lambda folder: as_zip(folder / "model.safetensors"), "safetensors"),
    (lambda folder: as_pickle(folder / "model.safetensors"), "safetensors"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "model.safetensors")])
def test_edited_folders(edit, word, tmp_path):
    """One sentence, without code that is run and without building what the numbers ask for."""
    small().save_pretrained(tmp_path)
    edit(tmp_path)
    FIRED.clear()
    with pytest.raises(UserError, match=word) as refused:
        SiT.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    with contextlib.suppress(UserError):                          # it builds no projectors
        checkpoint.build_for_sampling(checkpoint.read(tmp_path))
    assert not FIRED


def test_a_folder_of_the_other_kind(tmp_path):
    captioned().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="arguments of SiT"):
        SiT.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------------- export

@pytest.fixture
def experiment(trained, tmp_path):
    """A copy of the session's run with two files of scores: of its checkpoint, and of another one."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    for name, digest, scale in (("a", sha256(find(folder)), 1.75), ("b", "0" * 64, 9.5)):
        (folder / "samples" / name).mkdir(parents=True)
        result = {"fid": 12.25, "features": "inception", "num_samples": 50, "ref_batch": "ref.npz",
                  "settings": {"checkpoint_sha256": digest, "weights": "ema", "vae": "my/vae",
                               "sampling": {"mode": "sde", "num_steps": 250, "cfg_scale": scale}}}
        (folder / "samples" / name / "metrics.json").write_text(json.dumps(result))
    return folder


def export(*argv) -> None:
    checkpoint.main(["export", *map(str, argv)])


def test_an_exported_folder_has_a_card_with_the_scores_of_its_checkpoint(experiment, tmp_path, capsys):
    export(experiment, tmp_path / "out", "--licence", "cc-by-4.0")
    assert str(tmp_path / "out") in capsys.readouterr().out
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("cc-by-4.0", "unconditional-image-generation")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]
    score, = [row for row in rows if row[0] == "fid"]
    assert score[:5] == ["fid", "12.25", "50", "inception", "ref.npz"] and "cfg_scale 1.75" in score[5]
    said = dict(row for row in rows if len(row) == 2)
    assert "2507.01467" in said["method"] and said["steps"].startswith("2 of 4") and "scale 0.5" in said["latent space"]
    assert said["data"] and "cc-by-4.0" in said["licence"] and "9.5" not in card.text
    command, = [line for line in card.text.splitlines() if line.startswith("python generate.py")]
    generate.parse_args(command.split()[2:])


SECRET = "/home/secret/atlas"


def test_an_export_holds_no_place_of_the_machine(trained, vae_folder, tmp_path, monkeypatch):
    """In no form, and in no score: of a path only its last part."""
    monkeypatch.chdir(tmp_path)                                   # where generate.py puts samples of a single file
    state = checkpoint.read(trained)
    flags = ("vae", "features", "captions", "new_flag", "method", "model")
    state["args"] |= {name: f"{SECRET}/{name}" for name in flags}
    state["args"]["enc_type"] = f"dinov2-vit-b,local-dir:{SECRET}/encoder,../secret/atlas/other"
    torch.save(state, "x.pt")
    settings = {"checkpoint_sha256": sha256(Path("x.pt")), "weights": "ema", "vae": f"{SECRET}/vae",
                "sampling": {"mode": "sde", "captions": f"{SECRET}/captions"}}
    scores = {"fid": 1.5, "features": f"local-dir:{SECRET}/features", "ref_batch": f"{SECRET}/ref.npz",
              "settings": settings, "references": [{}, {"name": f"{SECRET}/two.npz", "fid": 2.5}]}
    Path("samples/a").mkdir(parents=True)
    Path("samples/a/metrics.json").write_text(json.dumps(scores))
    export("x.pt", "folder")
    export("x.pt", "single.safetensors")
    model = SiT.from_pretrained("folder")
    model.record |= {"args": state["args"],
                     "latent_space": state["latent_space"] | {"vae": "secret/atlas/vae/"}}
    model.save_pretrained("saved")
    moved = shutil.copytree(vae_folder, "home/secret/atlas/vae")
    REGPipeline(model, load_codec(str(moved)).vae).save_pretrained("pipe")
    export("pipe", "again")
    files = [path for name in ("folder", "saved", "pipe", "again") for path in Path(name).rglob("*") if path.is_file()]
    for path in (*files, Path("single.safetensors")):
        assert b"secret" not in path.read_bytes() and b"atlas" not in path.read_bytes(), path
    card = Path("folder/README.md").read_text()
    for kept in ("dinov2-vit-b,local-dir:encoder,other", "local-dir:features", "| ref.npz", "| two.npz", "VAE vae",
                 "captions captions", "--vae"):
        assert kept in card


def test_a_card_without_scores_says_so(trained, tmp_path):
    export(trained, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No scores" in card and "not stated" in card
    small().save_pretrained(tmp_path / "plain")
    assert "No scores" in (tmp_path / "plain" / "README.md").read_text()


def test_a_folder_is_written_again_for_the_same_network_only(experiment, tmp_path, capsys):
    for form in ([], ["--diffusers"]):
        (experiment / "samples" / "a" / "metrics.json").write_text("{}")
        out = tmp_path / f"out{len(form)}"
        export(experiment, out, *form)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".md"}
        next(out.rglob("*.safetensors")).unlink()                 # as an interruption leaves it
        (experiment / "samples" / "a" / "metrics.json").write_text("no scores any more")
        export(experiment, out, *form)
        assert all(path.read_bytes() == data for path, data in before.items())
        assert "No scores" in (out / "README.md").read_text()
        for argv in (["--weights", "model", *form], [] if form else ["--diffusers"]):
            with pytest.raises(SystemExit):
                export(experiment, out, *argv)
            assert "another" in capsys.readouterr().err
        assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("argv", [["x.pt"], ["x.safetensors", "--diffusers"], ["file"], ["mine"]])
def test_export_overwrites_nothing(trained, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        export(trained, *argv)
    assert ended.value.code == 2 and argv[0] in capsys.readouterr().err
    assert {str(path) for path in Path().rglob("*")} == {"file", "mine", "mine/notes.txt"}


@pytest.fixture
def uploads(monkeypatch):
    """What is uploaded, without a hub."""
    found = {}
    created = SimpleNamespace(repo_id="me/reg-xl")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **settings: created)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, repo_id, folder_path, **settings:
                        found.update({path.name: path.read_bytes() for path in Path(folder_path).rglob("*")
                                      if path.is_file()} | {"": repo_id.encode()}))
    return found


@pytest.mark.parametrize("form", [[], ["--diffusers"]])
def test_a_card_travels_with_the_weights(experiment, uploads, form, tmp_path):
    """Scores, licence and the data's name: through a folder, a pipeline, the hub and another export."""
    export(experiment, tmp_path / "out", "--licence", "cc-by-4.0", *form)
    export(tmp_path / "out", tmp_path / "again", *form)
    network = (REGPipeline if form else SiT).from_pretrained(tmp_path / "again")
    network.save_pretrained(tmp_path / "saved")
    network.push_to_hub("reg-xl")
    assert uploads[""] == b"me/reg-xl" and "model.safetensors" in uploads
    in_cache(tmp_path / "saved", f"someone/carried{len(form)}")
    export(f"someone/carried{len(form)}", tmp_path / "from-hub", *form)
    load = huggingface_hub.ModelCard.load
    first = load(tmp_path / "out" / "README.md").text
    assert "| 12.25 |" in first and "| data | not recorded |" not in first
    for name in ("again", "saved", "from-hub"):
        card = load(tmp_path / name / "README.md")
        assert card.data.license == "cc-by-4.0" and card.text == first.replace("# out", f"# {name}").replace(
            "ckpt out", f"ckpt {name}").replace("'out'", f"'{name}'")
    pushed = uploads["README.md"].decode()
    assert "# me/reg-xl" in pushed and "--ckpt me/reg-xl" in pushed and "('me/reg-xl'" in pushed and "12.25" in pushed


def test_a_licence_stays_and_a_single_file_has_the_scores(experiment, tmp_path):
    export(experiment, tmp_path / "out", "--licence", "mit")
    export(experiment, tmp_path / "out")
    export(experiment, tmp_path / "one.safetensors")
    export(tmp_path / "one.safetensors", tmp_path / "two")
    cards = [huggingface_hub.ModelCard.load(tmp_path / name / "README.md") for name in ("out", "two")]
    assert cards[0].data.license == "mit" and all("| 12.25 |" in card.text for card in cards)


def test_a_vae_that_has_moved_is_named(experiment, vae_folder, tmp_path, capsys):
    """For the pipeline of a checkpoint, and of an exported network."""
    state = checkpoint.read(experiment, mmap=False)
    state["latent_space"]["vae"] = "vae-of-another-place"
    torch.save(state, tmp_path / "x.pt")
    for flags, word in (([], "another-place"), (["--vae", str(vae_folder)], "--diffusers")):
        with pytest.raises(SystemExit):
            export(tmp_path / "x.pt", tmp_path / "out", *(["--diffusers"] if not flags else []), *flags)
        assert word in capsys.readouterr().err
    export(tmp_path / "x.pt", tmp_path / "out", "--diffusers", "--vae", vae_folder)
    export(tmp_path / "x.pt", tmp_path / "plain")
    read = REGPipeline.from_pretrained
    one, two = (pipe(0, num_inference_steps=2, generator=[image_rng(0, 0)], output_type="np").images
                for pipe in (read(tmp_path / "out"), read(tmp_path / "plain", vae=vae_folder)))
    assert (one == two).all()
    saved = tmp_path / "out" / "vae"
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1        # all as readable as the first


def test_a_checkpoint_of_training_is_exported_first(trained):
    for read in (SiT.from_pretrained, REGPipeline.from_pretrained):
        with pytest.raises(UserError, match="export it first"):
            read(trained)


def test_an_upload_is_never_silently_left_out(pipe, tmp_path):
    for one in (pipe, pipe.transformer):
        with pytest.raises(TypeError, match="push_to_hub"):
            one.save_pretrained(tmp_path / "pipe", push_to_hub=True)


@pytest.mark.parametrize("keyword", ["strict", "map_location", "torch_dtype"])
def test_keywords_that_mean_nothing_here(exported, keyword):
    for read, name in ((SiT, "reg-tiny"), (REGPipeline, "pipe")):
        for place in (exported / name, "someone/nothing"):
            with pytest.raises(TypeError, match=keyword):
                read.from_pretrained(pretrained_model_name_or_path=place, **{keyword: True})


def test_saving_over_another_network(tmp_path, monkeypatch):
    """Its card is the new one's; and a kill between the files leaves nothing that can be loaded."""
    for steps in (5, 6):
        model = randomised(small())
        model.record = {"steps": steps, "weights": "ema"}
        model.save_pretrained(tmp_path)
    assert "| steps | 6 |" in (tmp_path / "README.md").read_text()
    for last in ("config.json", "model.safetensors"):
        def full(path, write, last=last):
            if path.name == last:
                raise UserError("killed")
            write_whole(path, write)
        monkeypatch.setattr(hub, "write_whole", full)
        monkeypatch.setattr("runtime.files.write_whole", full)
        with pytest.raises(UserError, match="killed"):
            small().save_pretrained(tmp_path)
        with pytest.raises(UserError):
            SiT.from_pretrained(tmp_path)
        assert not (tmp_path / "README.md").exists()
        monkeypatch.undo()
        model.save_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------ sampling and training

def sample(ckpt, folder, *flags) -> Path:
    generate.main(["--ckpt", str(ckpt), *FEW, "--sample-dir", str(folder), *flags])
    return max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The session's run in both forms."""
    folder = tmp_path_factory.mktemp("exported")
    export(trained, folder / "reg-tiny")
    export(trained, folder / "pipe", "--diffusers")
    return folder


def test_sampling_a_folder_and_an_id(trained, exported, vae_folder, tmp_path):
    wanted = np.load(sample(trained, tmp_path / "a", "--save-cls-tokens") / "samples.npz")["arr_0"]
    in_cache(exported / "reg-tiny", "someone/reg")
    vae = ["--vae", str(vae_folder)]
    forms = ((exported / "reg-tiny", "reg-tiny-", vae), ("someone/reg", "someone--reg-", vae),
             (exported / "pipe", "pipe-", []))
    for i, (name, called, given) in enumerate(forms):
        folder = sample(name, tmp_path / str(i), "--save-cls-tokens", *given)
        assert folder.name.startswith(called) and (np.load(folder / "samples.npz")["arr_0"] == wanted).all()


def test_samples_of_an_edited_description_are_made_again(exported, tmp_path):
    """But for scores, which an export after scoring adds."""
    copy = Path(shutil.copytree(exported / "pipe", tmp_path / "copy"))
    folder = sample(copy, tmp_path / "samples")
    before = (folder / "samples.npz").stat().st_mtime_ns
    config(scores=[["fid", "1", "50", "inception", "ref.npz", "mode sde"]])(copy / "transformer")
    assert sample(copy, tmp_path / "samples") == folder and (folder / "samples.npz").stat().st_mtime_ns == before
    config(steps=3)(copy / "transformer")
    assert sample(copy, tmp_path / "samples") == folder and (folder / "samples.npz").stat().st_mtime_ns > before


def test_training_starts_from_a_folder_or_an_id(exported, train_flags, tmp_path, capsys):
    """The exported weights have no projectors: those of the new run start anew."""
    in_cache(exported / "reg-tiny", "someone/start")
    wanted = SiT.from_pretrained(exported / "reg-tiny").state_dict()
    for name in (str(exported / "reg-tiny"), "someone/start"):
        train.main([*train_flags, "--exp-name", Path(name).name, "--init-weights", name, "--learning-rate", "0",
                    "--max-train-steps", "1"])
        assert "projectors" in capsys.readouterr().err
        state = checkpoint.read(tmp_path / Path(name).name)
        for part in ("model", "ema"):
            kept = {name: value for name, value in state[part].items() if not name.startswith("projectors.")}
            assert same(kept, wanted) and len(state[part]) > len(wanted)


# ------------------------------------------------------------------------------------------------------------- pipeline

@pytest.fixture
def pipe(exported):
    return REGPipeline.from_pretrained(exported / "pipe")


def test_images_of_the_pipeline_are_those_of_generate(trained, exported, pipe, tmp_path):
    """After a folder, after another one, and with the VAE put to a network."""
    folder = sample(trained, tmp_path / "a", "--save-cls-tokens", "--global-seed", "5")
    npz, tokens = np.load(folder / "samples.npz"), np.load(folder / "class_tokens.npz")["class_tokens"]
    pipe.save_pretrained(tmp_path / "again")
    for one in (pipe, REGPipeline.from_pretrained(tmp_path / "again"),
                REGPipeline(SiT.from_pretrained(exported / "reg-tiny"), pipe.vae)):
        for block in (range(3), range(3, 6)):
            made = one(class_labels=npz["arr_1"][block.start:block.stop], num_inference_steps=2,
                       generator=[image_rng(5, i) for i in block])
            assert (np.stack([np.asarray(image) for image in made.images]) == npz["arr_0"][list(block)]).all()
            assert (made.class_tokens.numpy() == tokens[list(block)]).all()


@pytest.fixture(scope="module")
def random_weights(trained, tmp_path_factory):
    """A checkpoint whose every part has an effect, of another path and time shift; and its pipeline."""
    folder, state = tmp_path_factory.mktemp("random"), checkpoint.read(trained)
    state["ema"] = randomised(SiT(**state["architecture"])).state_dict()
    state["args"] |= {"path_type": "cosine", "time_shift": 2.0}
    torch.save(state, folder / "random.pt")
    export(folder / "random.pt", folder / "pipe", "--diffusers")
    return folder / "random.pt", REGPipeline.from_pretrained(folder / "pipe")


SETTINGS = {"guidance_scale": 3.0, "class_token_guidance_scale": 0.0, "guidance_interval": (0.1, 0.9)}


@pytest.mark.parametrize("without", [None, *SETTINGS])
def test_settings_of_the_pipeline_are_those_of_generate(random_weights, without, tmp_path):
    """To the bit; and each of them matters, as do the path and the time shift of training."""
    path, pipe = random_weights
    folder = sample(path, tmp_path / "a", "--cfg-scale", "3", "--cls-cfg-scale", "0", "--guidance-low", "0.1",
                    "--guidance-high", "0.9", "--num-steps", "4", "--classes", "2,1,0", "--save-cls-tokens")
    given = {name: value for name, value in SETTINGS.items() if name != without}
    made = pipe([2, 1, 0], num_inference_steps=4, generator=[image_rng(0, i) for i in range(3)], **given)
    wanted, tokens = (np.load(folder / name)[part][:3] for name, part in
                      (("samples.npz", "arr_0"), ("class_tokens.npz", "class_tokens")))
    assert (made.class_tokens.numpy() == tokens).all() == (without is None)
    if without is None:
        assert (np.stack([np.asarray(image) for image in made.images]) == wanted).all()
        for name in ("path_type", "time_shift"):
            args = {key: value for key, value in pipe.transformer.record["args"].items() if key != name}
            other = REGPipeline(SiT.from_pretrained(path.parent / "pipe"), pipe.vae)
            other.transformer.record["args"] = args
            again = other([2, 1, 0], num_inference_steps=4, generator=[image_rng(0, i) for i in range(3)], **given)
            assert not torch.equal(again.class_tokens, made.class_tokens)


def test_captions_in_a_pipeline(tiny_clip, vae_folder, tmp_path):
    """A private folder of the text encoder is not named in the export, so the user names it."""
    path = of_captions(tmp_path, tiny_clip, vae_folder)
    prompts = ["a red disc", "large square", ""]
    folder = sample(path, tmp_path / "samples", "--num-fid-samples", "3", *(f"--prompt={text}" for text in prompts))
    export(path, tmp_path / "pipe", "--diffusers")
    assert str(tiny_clip.parent) not in (tmp_path / "pipe" / "transformer" / "config.json").read_text()
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert "text-to-image" in card and "--prompt" in card and tiny_clip.name in card
    pipe = REGPipeline.from_pretrained(tmp_path / "pipe", text_encoder=str(tiny_clip))
    made = pipe(prompt=prompts, num_inference_steps=2, generator=[image_rng(0, i) for i in range(3)])
    wanted = np.load(folder / "samples.npz")["arr_0"]
    assert (np.stack([np.asarray(image) for image in made.images]) == wanted).all()
    assert made.class_tokens.shape == (3, 12)
    for given, word in (({"class_labels": 0}, "captions"), ({}, "prompt")):
        with pytest.raises(UserError, match=word):
            pipe(**given)
    with pytest.raises(UserError, match="text-encoder"):
        REGPipeline.from_pretrained(tmp_path / "pipe")(prompt="a")


def test_generators_of_pytorch(pipe):
    """A seed decides the images; a generator goes on, as everywhere in diffusers; one for each image, or for all."""
    def made(generator, labels=(0, 1)):
        return pipe(labels, num_inference_steps=2, generator=generator, output_type="pt").images

    one = torch.Generator().manual_seed(1)
    first, second = made(one), made(one)
    assert (first != second).any() and torch.equal(first, made(torch.Generator().manual_seed(1)))
    each = made([torch.Generator().manual_seed(seed) for seed in (3, 4)])
    assert torch.equal(each[1:], made([torch.Generator().manual_seed(4)], labels=(1,)))
    torch.manual_seed(7)
    drawn = made(None)
    torch.manual_seed(7)
    assert torch.equal(drawn, made(None)) and (drawn[0] != drawn[1]).any()


def test_output_types(pipe):
    made = {kind: pipe(1, num_inference_steps=2, generator=image_rng(0, 0), output_type=kind).images
            for kind in ("pil", "np", "pt")}
    image = np.asarray(made["pil"][0])
    assert image.shape == (32, 32, 3) and made["np"].shape == (1, 32, 32, 3) and made["pt"].shape == (1, 3, 32, 32)
    assert (np.rint(made["np"][0] * 255) == image).all() and made["np"].dtype == np.float32
    assert (made["pt"][0].permute(1, 2, 0).numpy() == made["np"][0]).all()


@pytest.mark.parametrize(("given", "word"), [
    ({}, "class_labels"), ({"prompt": "a"}, "class labels"), ({"class_labels": 0, "prompt": "a"}, "alone"),
    ({"class_labels": 3}, "class_labels"), ({"class_labels": [0, -1]}, "class_labels"), ({"class_labels": []}, "class"),
    ({"class_labels": 0, "guidance_scale": 0.5}, "guidance_scale"),
    ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance_scale"),
    ({"class_labels": "a cat"}, "class_labels"), ({"class_labels": 1.7}, "class_labels"),
    ({"class_labels": 0, "num_inference_steps": 2.5}, "num_inference_steps"),
    ({"class_labels": 0, "generator": 42}, "generator"),
    ({"class_labels": 0, "guidance_interval": (0.9, 0.1)}, "guidance_interval"),
    ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps"),
    ({"class_labels": 0, "output_type": "latent"}, "output_type"),
    ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "generator")])
def test_what_a_pipeline_cannot_do(pipe, given, word):
    with pytest.raises(UserError, match=word):
        pipe(**given)


def test_classes_without_images_and_weights_without_guidance(pipe):
    pipe.transformer.record = {**pipe.transformer.record, "classes": [0, 2]}
    with pytest.raises(UserError, match="class_labels"):
        pipe(1)
    for name, value, word in (("cfg_prob", 0, "guidance_scale"), ("time_shift", "x", "time shift"),
                              ("time_shift", 1001, "time shift"), ("time_shift", 1e-4, "time shift")):
        before = pipe.transformer.record["args"]
        pipe.transformer.record["args"] = before | {name: value}
        with pytest.raises(UserError, match=word):
            pipe(0)
        pipe.transformer.record["args"] = before
    pipe.transformer.record["args"]["cfg_prob"] = 0
    assert len(pipe(0, num_inference_steps=2, guidance_scale=1.0).images) == 1


def test_a_pipelines_folder_names_no_code_and_nothing_elsewhere(exported, tmp_path, monkeypatch):
    """diffusers' loader would import the module that model_index.json names."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(exported / "pipe", "pipe"))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "REGPipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["antigravity", "AutoencoderKL"]}))
    assert REGPipeline.from_pretrained(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    as_pickle(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="vae"):
        REGPipeline.from_pretrained(folder)
    assert not FIRED
    shutil.rmtree(folder / "vae")
    in_cache(exported / "pipe" / "vae", "pipe/vae")               # another's repository of this name
    with pytest.raises(UserError, match="existing folder"):
        REGPipeline.from_pretrained(folder)


def test_a_pipeline_saved_halfway_is_no_mix(pipe, tmp_path, monkeypatch):
    def killed(*args, **settings):
        raise KeyboardInterrupt

    pipe.save_pretrained(tmp_path)
    monkeypatch.setattr(type(pipe.vae), "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vae"):
        REGPipeline.from_pretrained(tmp_path)


def test_the_pipelines_vae_is_that_of_the_latent_space(exported, pipe, vae_folder):
    """Of another size it is refused."""
    assert same(pipe.vae.state_dict(), load_codec(str(vae_folder)).vae.state_dict())
    pipe.transformer.record["latent_space"]["downsampling"] = 8
    with pytest.raises(UserError, match="downsampling"):
        pipe(0)
    assert hub.find(exported / "pipe").parent.name == "transformer"


def test_the_lines_of_the_readme(exported, tmp_path, monkeypatch):
    """As they are, but for fewer steps and the classes that a small network has."""
    readme = Path(__file__).parents[1] / "README.md"
    lines = re.search("```python\n(.*?REGPipeline.*?)```", readme.read_text(), re.DOTALL)[1]
    shutil.copytree(exported / "pipe", tmp_path / "reg-toy")
    monkeypatch.chdir(tmp_path)
    fewer = lines.replace("num_inference_steps=100", "num_inference_steps=1").replace("[0, 5, 10, 15]", "[0, 1, 0, 1]")
    exec(fewer, {})
    assert Image.open("sample.png").mode == "RGB"
