"""What a run is on disk: whole, readable without running code, and honest about what does not fit."""

import argparse
import pickle
import resource
import threading

import pytest
import torch
from safetensors.torch import save_file

from models import checkpoint
from models.checkpoint import build_for_sampling, load_weights
from models.sit import SiT_models
from models.vae import LatentSpace
from runtime import run as runs
from runtime.messages import UserError
from tests.test_sit import inputs, randomised, small


def content(model, ema, step=7) -> dict:
    optimizer = torch.optim.AdamW(model.parameters())
    return checkpoint.capture(model=model, ema=ema, optimizer=optimizer, scaler=None, args={"seed": 1, "resume": "auto"}, step=step,
                              draws=9, latent_space=LatentSpace().to_record(), data="", processes=1, log={})


def saved(folder, model, ema, step=7):
    return runs.save(folder, content(model, ema, step))


def released(model) -> dict:
    """A file as the released programs write it: their names, an argparse.Namespace."""
    names = {"cls_embedder.": "cls_projectors2.", "cls_norm.": "wg_norm."}
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = value
    return {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(path_type="cosine", cfg_prob=0.1), "steps": 400_000}


def same(a, b) -> bool:
    return all((value == b.state_dict()[name]).all() for name, value in a.state_dict().items())


def test_names_and_keys(tmp_path):
    model = small()
    path = saved(tmp_path, model, model)
    assert path == tmp_path / "checkpoints" / "0000007.pt"
    state = torch.load(path, weights_only=True)
    assert {"model", "ema", "opt", "args", "steps"} <= state.keys()
    assert state["args"] == {"seed": 1, "resume": "auto"} and (state["steps"], state["draws"]) == (7, 9)
    assert [p.name for p in path.parent.iterdir()] == ["0000007.pt"]               # no partial file stays


def test_newest_is_the_highest_step(tmp_path):
    assert runs.newest(tmp_path) is None
    for step in (900_000, 50_000, 12_000_000):
        saved(tmp_path, small(), small(), step)
    (tmp_path / "checkpoints" / "99999999.pt.partial").touch()
    assert runs.newest(tmp_path).name == "12000000.pt"
    assert runs.find(tmp_path).name == "12000000.pt"


def test_rebuilds_the_model_from_the_file_alone(tmp_path):
    model, ema = small(qk_norm=True), randomised(small(qk_norm=True))
    state = checkpoint.read(saved(tmp_path, model, ema))
    rebuilt = build_for_sampling(state)
    assert not len(rebuilt.projectors) and not rebuilt.training
    torch.testing.assert_close(rebuilt(*inputs(rebuilt))[0], ema.eval()(*inputs(ema))[0])
    assert same(build_for_sampling(state, which="model"), small(qk_norm=True))


@pytest.mark.parametrize("cls_token_dim", [None, 48])
def test_released_files(tmp_path, cls_token_dim):
    size = "SiT-T/2"
    model = randomised(SiT_models[size](input_size=8, in_channels=4, num_classes=11, cls_token_dim=cls_token_dim, z_dims=(48,),
                                        projector_dim=16))
    torch.save(released(model), tmp_path / "0400000.pt")
    state = checkpoint.read(tmp_path / "0400000.pt")
    assert state["args"]["path_type"] == "cosine"
    rebuilt = build_for_sampling(state, size)
    torch.testing.assert_close(rebuilt(*inputs(rebuilt))[0], model.eval()(*inputs(model))[0])
    with pytest.raises(UserError, match="add --model"):
        build_for_sampling(state)
    with pytest.raises(UserError, match="SiT-B/2 has width 768"):
        build_for_sampling(state, "SiT-B/2")


def test_weights_come_as_file_content_or_bare_state_dict(tmp_path):
    source = randomised(small())
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    for given in (tmp_path / "bare.pth", source.state_dict(), released(source), saved(tmp_path, small(), source),
                  {f"module.{name}": value for name, value in source.state_dict().items()}):
        model = small()
        load_weights(model, given)
        assert same(model, source)


def test_projectors_are_dropped_only_when_the_model_has_none():
    load_weights(small(z_dims=()), small().state_dict())
    with pytest.raises(UserError, match=r"projectors\.1\.0\.bias is absent"):
        load_weights(small(z_dims=(12, 12)), small().state_dict())


@pytest.mark.parametrize(("change", "key", "cause"), [
    (dict(cls_token_dim=None), "cls_embedder.bias is absent", "class-token slot"),
    (dict(cls_token_dim=16), "cls_embedder.weight is of shape", "class-token slot"),
    (dict(input_size=16), "pos_embed is of shape", "resolution"),
    (dict(num_classes=9), "y_embedder.embedding_table.weight is of shape", "--num-classes"),
    (dict(in_channels=16), "final_layer.linear.bias is of shape", "latent channels"),
    (dict(qk_norm=True), "blocks.0.attn.k_norm.bias is of shape", "--qk-norm"),
    (dict(depth=4), "blocks.3.adaLN_modulation.1.bias is of shape", "size"),
    (dict(projector_dim=20), "projectors.0.0.bias is of shape", "--projector-dim"),
])
def test_what_does_not_fit_is_named_with_its_likely_cause(change, key, cause):
    with pytest.raises(UserError) as error:
        load_weights(small(), small(**change).state_dict())
    assert key in str(error.value) and cause in str(error.value) and "\n" not in str(error.value)


class Harmful:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({"ema": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""


def test_files_in_the_format_before_zip_are_read(tmp_path):
    torch.save({"ema": small().state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load_weights(small(), tmp_path / "old.pt")


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    path = saved(tmp_path, small(), small())
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("text.pt", "cut.pt", "tensor.pt", "nowhere.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.read(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint below"):
        runs.find(tmp_path / "empty")
    with pytest.raises(UserError, match="no 'ema' weights"):
        load_weights(small(), {"weights": {}, "epoch": 3})
    with pytest.raises(UserError, match="not a SiT"):
        build_for_sampling({"ema": {"conv.weight": torch.zeros(1)}}, "SiT-T/2")


# ---- whole or absent

@pytest.fixture
def three(tmp_path):
    """An experiment with checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        saved(tmp_path, small(), small(), step)
    return tmp_path


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[:len(data) // 2]
    elif how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "text":
        data = b"hello"
    else:
        data = b""
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped", "text", "empty"])
def test_a_damaged_newest_one_gives_way_to_the_one_before(three, how, capsys):
    paths = [runs.checkpoint_path(three, step) for step in (1, 2, 3)]
    damage(paths[2], how)
    for mmap in (False, True):
        with pytest.raises(UserError, match="0000003.pt cannot be read"):
            checkpoint.read(paths[2], mmap=mmap)
    path, state = runs.resumable(three, "auto", checkpoint.read)
    assert path == paths[1] and state["steps"] == 2
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and str(paths[2]) in warning and str(paths[1]) in warning
    damage(paths[0], how)
    damage(paths[1], how)
    with pytest.raises(UserError, match="none of the checkpoints can be read"):
        runs.resumable(three, "auto", checkpoint.read)
    assert len(runs.saved(three)) == 3


def test_none_starts_afresh_only_where_nothing_is(three, tmp_path):
    assert runs.resumable(tmp_path / "new", "none", checkpoint.read) is None and runs.resumable(tmp_path / "new", "auto") is None
    with pytest.raises(UserError, match="holds 3 checkpoints up to step 3"):
        runs.resumable(three, "none", checkpoint.read)


def test_a_run_goes_back_to_a_file_once(three, tmp_path, capsys):
    first = runs.checkpoint_path(three, 1)
    path, state = runs.resumable(three, str(first), checkpoint.read)
    assert path == first
    runs.set_aside(three, state["steps"])
    assert sorted(p.name for p in first.parent.iterdir()) == ["0000001.pt", "0000002.pt.aside", "0000003.pt.aside"]
    assert capsys.readouterr().err.count("the run goes on at step 1") == 2
    since = content(small(), small(), step=2)
    since["args"]["resume"] = str(first)                                          # what the run that went back saves
    runs.save(three, since)
    assert runs.resumable(three, str(first), checkpoint.read)[0].name == "0000002.pt"


def test_another_experiments_file_begins_a_new_run_only(three, tmp_path):
    other = saved(tmp_path / "other", small(), small(), 9)
    assert runs.resumable(tmp_path / "new", str(other), checkpoint.read)[0] == other
    with pytest.raises(UserError, match="holds checkpoints of its own"):
        runs.resumable(three, str(other), checkpoint.read)


@pytest.mark.parametrize(("last", "every", "left"), [
    (0, 0, [1, 2, 3, 4, 5, 6]), (1, 0, [6]), (2, 0, [5, 6]), (1, 2, [2, 4, 6]), (2, 3, [3, 5, 6]), (9, 0, [1, 2, 3, 4, 5, 6])])
def test_what_is_kept(tmp_path, last, every, left):
    saver = runs.Saver(tmp_path, last, every)
    for step in range(1, 7):
        saver.start(content(small(), small(), step))
    saver.wait()
    assert list(runs.saved(tmp_path)) == left and saver.failure is None


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The state is a copy: what changes after `capture` is not in the file."""
    model = small()
    began, may_end = threading.Event(), threading.Event()
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda *a: (began.set(), may_end.wait(300), original(*a)))
    saver = runs.Saver(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saver.start(content(model, model))
    assert began.wait(300) and runs.newest(tmp_path) is None                 # nothing looks whole before it is
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    may_end.set()
    saver.wait()
    state = checkpoint.read(runs.newest(tmp_path))
    assert all(torch.equal(state["model"][name], value) for name, value in before.items())


def test_a_full_disk_leaves_the_older_ones_and_is_tried_again(three, capsys):
    before = {path: path.read_bytes() for path in runs.saved(three).values()}
    saver = runs.Saver(three, keep_last=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))                    # a file may not grow beyond
    try:
        saver.start(content(small(), small(), 4))
        saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "0000004.pt" in str(saver.failure) and "full disk" in str(saver.failure)
    assert capsys.readouterr().err.count("tries again") == 1
    assert before == {path: path.read_bytes() for path in (three / "checkpoints").iterdir()}
    saver.start(content(small(), small(), 4))
    saver.wait()
    assert saver.failure is None and list(runs.saved(three)) == [4]


def test_what_a_killed_run_was_writing_is_removed(three):
    partial = three / "checkpoints" / ".0000004.pt.partial"
    partial.write_bytes(b"half")
    runs.Saver(three)
    assert not partial.exists() and len(runs.saved(three)) == 3


# ---- weights to share

def test_exported_weights_are_a_checkpoint_for_sampling(tmp_path, capsys):
    ema = randomised(small())
    path = saved(tmp_path, small(), ema)
    out = tmp_path / "shared.safetensors"
    checkpoint.main(["export", str(path), str(out)])
    assert str(out) in capsys.readouterr().out
    state, original = checkpoint.read(out), checkpoint.read(path)
    assert same(build_for_sampling(state), build_for_sampling(original)) and "opt" not in state
    assert (state["latent_space"], state["args"], state["steps"]) == (original["latent_space"], {"seed": 1}, 7)      # paths are private
    with pytest.raises(UserError, match="no 'model' weights but ema: change --weights"):
        build_for_sampling(state, which="model")
    checkpoint.main(["export", str(path), str(tmp_path / "last.safetensors"), "--weights", "model"])
    last = checkpoint.read(tmp_path / "last.safetensors")
    assert same(build_for_sampling(last, which="model"), build_for_sampling(original, which="model"))


def test_a_released_file_is_exported_with_its_model_named(tmp_path):
    model = randomised(SiT_models["SiT-T/2"](input_size=8, in_channels=4, num_classes=11, cls_token_dim=48, z_dims=(48,), projector_dim=16))
    torch.save(released(model), tmp_path / "0400000.pt")
    checkpoint.export(tmp_path / "0400000.pt", tmp_path / "out.safetensors", model_name="SiT-T/2")
    state = checkpoint.read(tmp_path / "out.safetensors")
    assert state["args"]["path_type"] == "cosine" and "latent_space" not in state
    rebuilt = build_for_sampling(state)
    torch.testing.assert_close(rebuilt(*inputs(rebuilt))[0], model.eval()(*inputs(model))[0])


@pytest.mark.parametrize(("out", "sentence"), [("weights.pt", "does not end in .safetensors"), ("there.safetensors", "is there already")])
def test_export_overwrites_nothing(tmp_path, out, sentence, capsys):
    path = saved(tmp_path, small(), small())
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        checkpoint.main(["export", str(path), str(tmp_path / out)])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err and (tmp_path / "there.safetensors").read_text() == "mine"


def test_foreign_safetensors_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("foreign", "text"):
        with pytest.raises(UserError, match="expected a file that"):
            checkpoint.read(tmp_path / f"{name}.safetensors")
