"""Checkpoints, export, and an experiment on disk: whole files, no code in them, and what does not fit is named."""

import argparse
import datetime
import json
import pickle
import re
import resource
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import checkpoint
from models.checkpoint import build_for_sampling, load_weights
from models.sit import SiT_models
from models.vae import LatentSpace
from runtime import run as disk
from runtime.log import Log, Meter, read_lines, require_tracker, start_tracker
from runtime.messages import UserError
from runtime.stopping import StopRequest
from tests.stress.kills import same
from tests.test_sit import inputs, randomised, small


def content(model, ema, step=7, **args) -> dict:
    about = {"args": {"seed": 1, "resume": "auto", **args}, "latent_space": LatentSpace().to_record(), "data": "",
             "processes": 1}
    return checkpoint.content(model, ema, torch.optim.AdamW(model.parameters()), None, about, step)


def save(folder, model, ema, step=7):
    return disk.save(folder, content(model, ema, step))


def released(model) -> dict:
    """A file of the released programs: their names, an argparse.Namespace."""
    weights = {name.replace("cls_embedder.", "cls_projectors2.").replace("cls_norm.", "wg_norm."): value
               for name, value in model.state_dict().items()}
    args = argparse.Namespace(path_type="cosine", cfg_prob=0.1)
    return {"model": weights, "ema": weights, "opt": {}, "args": args, "steps": 400_000}


@contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- content

def test_names_and_keys(tmp_path):
    path = save(tmp_path, small(), small())
    assert path == tmp_path / "checkpoints" / "0000007.pt" and [p.name for p in path.parent.iterdir()] == [path.name]
    state = torch.load(path, weights_only=True)
    assert {"model", "ema", "opt", "args", "steps"} <= state.keys() and state.keys() >= checkpoint.RESUMED
    assert state["args"] == {"seed": 1, "resume": "auto"} and state["steps"] == 7


def test_everything_is_restored_but_the_optimisers_settings(tmp_path):
    """Also the fp16 scaler, which needs no GPU."""
    model, scaler = randomised(small()), torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.update()
    about = {"args": {}, "latent_space": LatentSpace().to_record(), "data": "", "processes": 1}
    state = checkpoint.content(model, small(), optimizer, scaler, about, 7)
    path = disk.save(tmp_path, state)

    again, ema, other = small(), randomised(small()), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.5, betas=(0.1, 0.2))
    assert checkpoint.restore(path, checkpoint.read(path, mmap=False), again, ema, optimizer, other) == 7
    back = checkpoint.content(again, ema, optimizer, other, about, 7)
    assert all(same(state[part], back[part]) for part in state.keys() - {"opt", "scaler"})
    assert same(state["opt"]["state"], back["opt"]["state"]) and back["opt"]["param_groups"][0]["lr"] == 0.5
    assert back["scaler"]["scale"] == 2.0**9 and back["scaler"]["_growth_tracker"] == 1
    with pytest.raises(UserError, match="another optimiser"):
        checkpoint.restore(path, {**state, "opt": {"state": {}, "param_groups": []}}, again, ema, optimizer, None)


def weights(model) -> dict:
    """Without projectors."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("projectors.")}


def test_rebuilds_the_model_from_the_file_alone(tmp_path):
    model, ema = small(qk_norm=True), randomised(small(qk_norm=True))
    state = checkpoint.read(save(tmp_path, model, ema))
    rebuilt = build_for_sampling(state)
    assert not len(rebuilt.projectors) and not rebuilt.training
    torch.testing.assert_close(rebuilt(*inputs(rebuilt))[0], ema.eval()(*inputs(ema))[0])
    assert same(weights(build_for_sampling(state, which="model")), weights(model))


@pytest.mark.parametrize("cls_token_dim", [None, 48])
def test_released_files(tmp_path, cls_token_dim):
    size = "SiT-T/2"
    model = randomised(SiT_models[size](input_size=8, in_channels=4, num_classes=11, cls_token_dim=cls_token_dim,
                                        z_dims=(48,), projector_dim=16))
    torch.save(released(model), tmp_path / "0400000.pt")
    state = checkpoint.read(tmp_path / "0400000.pt")
    assert state["args"]["path_type"] == "cosine"
    rebuilt = build_for_sampling(state, size)
    torch.testing.assert_close(rebuilt(*inputs(rebuilt))[0], model.eval()(*inputs(model))[0])
    with pytest.raises(UserError, match="--model"):
        build_for_sampling(state)
    with pytest.raises(UserError, match="width 128"):
        build_for_sampling(state, "SiT-B/2")

    checkpoint.export(tmp_path / "0400000.pt", tmp_path / "out.safetensors", model_name=size)
    exported = checkpoint.read(tmp_path / "out.safetensors")
    assert exported["args"]["path_type"] == "cosine" and "latent_space" not in exported
    assert same(weights(build_for_sampling(exported)), weights(model))


def test_weights_from_a_file_its_content_or_a_bare_state_dict(tmp_path):
    source = randomised(small())
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    torch.save({"ema": source.state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    parallel = {f"module.{name}": value for name, value in source.state_dict().items()}
    path = save(tmp_path, small(), source)
    for given in (tmp_path / "bare.pth", tmp_path / "old.pt", source.state_dict(), released(source), path, parallel):
        model = small()
        load_weights(model, given)
        assert same(model.state_dict(), source.state_dict())


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


@pytest.mark.parametrize("wrap", [
    lambda name: f"module.{name}", lambda name: f"_orig_mod.{name}", lambda name: f"module._orig_mod.{name}",
    lambda name: f"_orig_mod.module.{name}", lambda name: f"module.module.{name}",
    lambda name: re.sub(r"(blocks\.\d+|x_embedder)\.", r"\1._orig_mod.", name),
    lambda name: re.sub(r"(blocks\.\d+)\.", r"_orig_mod.\1.module._orig_mod.", name)])
def test_prefixes_of_parallel_and_compiled_networks(wrap):
    source, model = randomised(small()), small()
    load_weights(model, {"ema": {wrap(name): value for name, value in source.state_dict().items()}})
    assert same(model.state_dict(), source.state_dict())
    twice = {**source.state_dict(), "module.pos_embed": torch.zeros(1, 17, 32)}
    with pytest.raises(UserError, match="one name"):
        load_weights(model, twice)


def test_settings_of_many_types_are_read_and_written(tmp_path):
    """Those of the family's programs; what is nested or of an unknown kind becomes the name of its type."""
    settings = {"path_type": "cosine", "device": torch.device("cuda:1"), "dtype": torch.bfloat16, "lr": np.float64(0.5),
                "steps": np.int64(3), "flag": np.bool_(True), "half": np.float16(0.5), "folder": tmp_path,
                "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
                "took": datetime.timedelta(1), "factory": defaultdict(list, a=[1]), "none": None, "size": (1, 2),
                "inner": argparse.Namespace(a=argparse.Namespace(b=1)), 7: "seven"}
    expected = {"path_type": "cosine", "device": "cuda:1", "dtype": "torch.bfloat16", "lr": 0.5, "steps": 3,
                "flag": True, "half": 0.5, "folder": str(tmp_path), "when": "2024-01-02 00:00:00+00:00",
                "took": "1 day, 0:00:00", "factory": "dict", "none": None, "size": "tuple", "inner": "Namespace",
                "7": "seven"}
    args = argparse.Namespace()
    vars(args).update(settings)
    for given in (settings, args):
        torch.save({"ema": small().state_dict(), "args": given}, tmp_path / "x.pt")
        state = checkpoint.read(tmp_path / "x.pt")
        assert state["args"] == expected and json.loads(json.dumps(state["args"])) == expected


def test_old_heads_and_learned_variances_are_named():
    """An early REPA's blocks, and SiT's own release, whose last layer has twice the outputs."""
    state = small().state_dict()
    with pytest.raises(UserError, match="decoder_blocks.0.*early REPA"):
        load_weights(small(), {**state, "decoder_blocks.0.mlp.fc1.bias": torch.zeros(2)})
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = torch.cat([state[name]] * 2)
    with pytest.raises(UserError, match=r"final_layer.linear.bias is of shape \(24,\).*\(12,\).*learn_sigma"):
        load_weights(small(), state)


def edited(**changes):
    def edit(state):
        state["architecture"].update(changes)
    return edit


def weight(value):
    def edit(state):
        state["ema"]["final_layer.linear.bias"] = value
    return edit


def entry(**changes):
    def edit(state):
        state.update(changes)
    return edit


def space(**changes):
    def edit(state):
        state["latent_space"].update(changes)
    return edit


@pytest.mark.parametrize(("edit", "word"), [
    (edited(num_heads=0), "num_heads"), (edited(num_heads=-1), "num_heads"), (edited(num_heads=10**9), "num_heads"),
    (edited(num_heads=7), "cannot be built"), (edited(patch_size=0), "patch_size"), (edited(depth=10**9), "depth"),
    (edited(depth=2**19), "depth"), (edited(depth="3"), "depth"), (edited(hidden_size=2**19), "hidden_size"),
    (edited(input_size=2**19), "input_size"), (edited(num_classes=2**19), "num_classes"),
    (edited(mlp_ratio=float("nan")), "mlp_ratio"), (edited(mlp_ratio=2.0**19), "mlp"), (edited(mlp_ratio="4"), "mlp"),
    (edited(z_dims=3), "z_dims"), (edited(qk_norm=1), "qk_norm"), (edited(more=1), "arguments of SiT"),
    (edited(class_dropout_prob=[]), "class_dropout_prob"), (edited(in_channels=None), "in_channels"),
    (space(downsampling=10**9), "downsampling"), (space(downsampling=-8), "downsampling"),
    (space(vae="x" * 300), "vae"), (space(vae="a\0b"), "vae"), (space(scale=0.0), "scale"),
    (space(scale=float("inf")), "scale"),
    (entry(latent_space=[]), "vae"), (entry(steps=-1), "steps"), (entry(steps=10**30), "steps"),
    (entry(encoders=[3]), "encoders"), (entry(classes=["a" * 10**6]), "classes"), (entry(classes=[[]]), "classes"),
    (space(vae=[[]]), "vae"), (weight(torch.full((16,), torch.nan)), "finite"),
    (entry(args=[]), "args"), (entry(opt=[]), "opt"), (entry(ema={1: torch.zeros(1)}), "ema"),
    (weight(torch.zeros(16).to_sparse()), "final_layer.linear.bias"),
    (weight(torch.zeros(16, device="meta")), "final_layer.linear.bias"),
    (weight(torch.zeros(16, dtype=torch.complex64)), "final_layer.linear.bias"), (weight(3), "ema"),
    (weight(torch.zeros(0)), "final_layer.linear.bias"), (weight(torch.zeros(16, 1)), "final_layer.linear.bias"),
])
def test_edited_checkpoints(tmp_path, edit, word):
    """One sentence, without building what the numbers ask for."""
    state = content(small(), small())
    edit(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=word) as refused:
        build_for_sampling(checkpoint.read(tmp_path / "x.pt"))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("change", [
    lambda moments: moments.update(exp_avg=torch.zeros(3)), lambda moments: moments.update(exp_avg=None),
    lambda moments: moments.update(exp_avg_sq=moments["exp_avg_sq"].to_sparse())])
def test_an_edited_optimiser_is_refused(tmp_path, change):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(*inputs(model))[0].sum().backward()
    optimizer.step()
    state = {**content(model, small()), "opt": optimizer.state_dict()}
    change(next(iter(state["opt"]["state"].values())))
    with pytest.raises(UserError, match="another optimiser"):
        checkpoint.restore(tmp_path, state, small(), small(), torch.optim.AdamW(small().parameters()), None)


class Harmful:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({"ema": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(disk.Damaged, match="more than weights"):
        checkpoint.read(tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps([1], protocol=2))
    (tmp_path / "folder").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({**content(small(), small()), "steps": "7"}, tmp_path / "kind.pt")
    for name in ("text.pt", "text.safetensors", "pickle.pt", "folder", "foreign.safetensors", "tensor.pt", "kind.pt",
                 "nowhere.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.read(tmp_path / name)
    with pytest.raises(UserError, match="--weights ema"):
        load_weights(small(), {"weights": {}, "epoch": 3})
    with pytest.raises(UserError, match="x_embedder.proj.weight"):
        build_for_sampling({"ema": {"conv.weight": torch.zeros(1)}}, "SiT-T/2")


# ---- weights to share

def test_exported_weights_are_a_checkpoint_for_sampling(tmp_path, capsys):
    path, out = save(tmp_path, small(), randomised(small())), tmp_path / "shared.safetensors"
    checkpoint.main(["export", str(path), str(out)])
    assert str(out) in capsys.readouterr().out
    state, original = checkpoint.read(out), checkpoint.read(path)
    assert same(build_for_sampling(state).state_dict(), build_for_sampling(original).state_dict())
    assert state["latent_space"] == original["latent_space"] and state["steps"] == 7 and "opt" not in state
    assert "args" not in state                                    # a seed and paths
    with pytest.raises(UserError, match="--weights model"):
        build_for_sampling(state, which="model")
    checkpoint.main(["export", str(path), str(tmp_path / "last.safetensors"), "--weights", "model"])
    last = build_for_sampling(checkpoint.read(tmp_path / "last.safetensors"), which="model")
    assert same(weights(last), weights(build_for_sampling(original, which="model")))


@pytest.mark.parametrize("name", ["weights.pt", "there.safetensors"])
def test_export_overwrites_nothing(tmp_path, name, capsys):
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        checkpoint.main(["export", str(save(tmp_path, small(), small())), str(tmp_path / name)])
    assert ended.value.code == 2 and name in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_text() == "mine"


# ---- an experiment on disk

@pytest.fixture
def three(tmp_path):
    """An experiment with checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, small(), small(), step)
    return tmp_path


def resumable(experiment, resume="auto"):
    return disk.resumable(experiment, str(resume), checkpoint.read)


def test_newest_is_the_highest_step(tmp_path):
    assert disk.newest(tmp_path) is None and resumable(tmp_path) is None
    for step in (900_000, 50_000, 12_000_000):
        save(tmp_path, small(), small(), step)
    (tmp_path / "checkpoints" / "99999999.pt.partial").touch()
    assert disk.find(tmp_path).name == disk.newest(tmp_path).name == "12000000.pt"


def damage(path, how):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:len(data) // 2], "flipped": data, "text": b"hello", "empty": b""}[how])


@pytest.mark.parametrize("how", ["cut", "flipped", "text", "empty"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(three, how, capsys):
    paths = [disk.checkpoint_path(three, step) for step in (1, 2, 3)]
    damage(paths[2], how)
    for mmap in (False, True):
        with pytest.raises(disk.Damaged, match="0000003.pt"):
            checkpoint.read(paths[2], mmap=mmap)
    path, state = resumable(three)
    assert path == paths[1] and state["steps"] == 2
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and str(paths[2]) in warning and str(paths[1]) in warning
    damage(paths[0], how)
    damage(paths[1], how)
    with pytest.raises(disk.Damaged, match="no checkpoint can be read"):
        resumable(three)
    assert len(disk.saved(three)) == 3


def test_none_starts_a_new_run_only_where_there_are_no_checkpoints(three, tmp_path):
    assert resumable(tmp_path / "new", "none") is None
    with pytest.raises(UserError, match="--resume none"):
        resumable(three, "none")


def test_a_run_goes_back_to_a_file_once(three, capsys):
    first = disk.checkpoint_path(three, 1)
    assert resumable(three, first)[0] == first
    disk.set_aside(three, 1)
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == ["0000001.pt", "0000002.pt.aside", "0000003.pt.aside"] and "0000002.pt" in capsys.readouterr().err
    disk.save(three, content(small(), small(), 2, resume=str(first)))
    assert resumable(three, first)[0].name == "0000002.pt"
    disk.set_aside(three, 1)
    assert (first.parent / "0000002.pt.aside1").exists()


def test_a_file_of_another_experiment_starts_a_new_run_only(three, tmp_path):
    other = save(tmp_path / "other", small(), small(), 9)
    assert resumable(tmp_path / "new", other)[0] == other
    with pytest.raises(UserError, match="checkpoints of its own"):
        resumable(three, other)


@pytest.mark.parametrize(("last", "every", "left"), [
    (0, 0, [1, 2, 3, 4, 5, 6]), (1, 0, [6]), (2, 0, [5, 6]), (1, 2, [2, 4, 6]), (2, 3, [3, 5, 6])])
def test_what_is_kept(tmp_path, last, every, left):
    for step in range(1, 7):
        disk.checkpoint_path(tmp_path, step).parent.mkdir(exist_ok=True)
        disk.checkpoint_path(tmp_path, step).touch()
        disk.prune(tmp_path, last, every)
    assert list(disk.saved(tmp_path)) == left


def test_a_full_disk_leaves_the_older_checkpoints(three):
    before = {path: path.read_bytes() for path in disk.saved(three).values()}
    with full_disk(100_000), pytest.raises(UserError, match="0000004.pt.*full"):
        save(three, small(), small(), 4)
    assert before == {path: path.read_bytes() for path in (three / "checkpoints").iterdir()}


def test_what_is_due_after_a_step():
    """Every n steps and after the last one, in the order of the table; 0 is never; a signal ends the steps early."""
    stop, done = StopRequest(), []
    run = disk.Run(2, 7, stop)
    run.every((2, 3), lambda step: done.append(("log", step)))
    run.every((4,), lambda step: done.append(("save", step)))
    run.every((0,), lambda step: done.append(("never", step)))
    for step in run.steps():
        run.after(step)
    assert done == [("log", 3), ("log", 4), ("save", 4), ("log", 6), ("log", 7), ("save", 7)] and not run.interrupted
    stop.asked = "a signal"
    interrupted = disk.Run(2, 7, stop)
    assert list(interrupted.steps()) == [] and interrupted.interrupted


# ---- the log

def test_means_count_what_is_finite():
    meter = Meter()
    meter.add("loss", torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, False, True]))
    meter.add("loss", torch.tensor(4.0))
    meter.add("quarter", torch.ones(2), torch.zeros(2, dtype=torch.bool))
    for finite in (False, True, False, False):
        meter.add_update(torch.tensor(3.0 if finite else torch.inf), torch.tensor(finite))
    means, bad, in_a_row = meter.read(lambda rows: 2 * rows, images_per_update=8)         # two ranks with equal numbers
    assert (means["loss"], means["grad_norm"], means["skipped_updates"]) == (2.5, 3.0, 3) and means["quarter"] != 0
    assert bad == ["loss", "grad_norm"] and in_a_row == 2 and means["images_per_second"] > 0
    meter.add_update(torch.tensor(torch.inf), torch.tensor(False))
    assert meter.read(lambda rows: rows, 8)[1:] == (["grad_norm"], 3)                     # counted across lines


def test_a_log_line_is_whole_or_waits(tmp_path, capsys):
    log = Log(tmp_path / "metrics.jsonl", 0)
    log.append({"step": 1, "loss": float("inf")})
    with full_disk(40):                                           # room for half of the second line
        log.append({"step": 2, "loss": 0.5})
    assert "metrics.jsonl" in capsys.readouterr().err
    assert log.path.read_text() == '{"step": 1, "loss": null}\n'
    log.append({"step": 3, "loss": 0.25})
    assert [line["step"] for line in read_lines(log.path)] == [1, 2, 3]


@pytest.mark.parametrize("rest", ['{"step": 3, "a": ' + "[" * 10**5,
                                  '{"step": 3, "lo', '{"step": "3"}', "\0" * 64, "{}", '{"step": 3}\n'])
def test_later_and_half_lines_are_cut_off(tmp_path, rest):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + rest)
    Log(tmp_path / "metrics.jsonl", 2).append({"step": 3, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'


def test_wandb_continues_the_experiments_run(tmp_path):
    given = []
    tracked = SimpleNamespace(is_main_process=True, init_trackers=lambda *_, **settings: given.append(settings))
    for experiment in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        start_tracker(tracked, experiment, "wandb", {"seed": 1})
    first, again, other = (settings["init_kwargs"]["wandb"] for settings in given)
    assert first == again and first["id"] and first["resume"] == "allow" and other["id"] != first["id"]
    with pytest.raises(UserError, match="not installed"):
        require_tracker("no_such_tracker")
