"""train.py: methods and flags do what they say, gradients do not depend on how a batch is cut, runs resume, mistakes get a sentence."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import generate
import train
from evaluations.features import load_extractor
from evaluations.scoring import evaluate
from loss import SILoss
from models import checkpoint
from runtime import run as runs
from runtime.messages import UserError
from tests.stress.kills import log_of, same
from tests.test_sit import inputs, randomised, small

ROOT = Path(__file__).parents[1]


def run(flags, *more, steps=2) -> dict:
    """Train for some steps; returns the last checkpoint's content."""
    flags = [*flags, "--max-train-steps", str(steps), *map(str, more)]
    AcceleratorState._reset_state(reset_partial_state=True)            # as in a new process: precision may differ
    train.main(flags)
    args = train.parse_args(flags)
    return checkpoint.read(runs.checkpoint_path(Path(args.output_dir) / args.exp_name, steps))


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- methods

def test_reg_has_a_slot_and_a_projector(train_flags, tmp_path):
    state = run(train_flags)
    assert state["architecture"]["cls_token_dim"] == 32 and state["architecture"]["z_dims"] == (32,)
    assert state["architecture"]["num_classes"] == 3 and state["latent_space"]["scale"] == 0.5
    assert state["args"]["align"] == "all" and isinstance(state["args"], dict)
    last = lines(tmp_path)[-1]
    assert last["loss"] == pytest.approx(last["denoising_loss"] + 0.03 * last["cls_loss"] + 0.5 * last["proj_loss"], rel=1e-5)
    assert last["align_cosine"] == -last["proj_loss"]
    assert {"grad_norm", "lr", "images_per_second", "data_wait", "denoising_loss_t1of4", "draws"} <= last.keys()
    assert json.loads((tmp_path / "run" / "args.json").read_text()) == state["args"]


def test_repa_aligns_patches_without_a_slot(train_flags, tmp_path):
    state = run(train_flags, "--method", "repa")
    assert state["architecture"]["cls_token_dim"] is None and state["architecture"]["z_dims"] == (32,)
    assert state["args"]["align"] == "patches" and "cls_loss" not in lines(tmp_path)[-1]


def test_sit_loads_no_encoder(train_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_encoders", lambda *_: pytest.fail("an encoder was loaded"))
    state = run(train_flags, "--method", "sit", "--enc-type", "nothing")
    assert state["architecture"]["cls_token_dim"] is None and state["architecture"]["z_dims"] == ()
    assert {"cls_loss", "proj_loss"}.isdisjoint(lines(tmp_path)[-1])


def test_without_alignment_no_projector_is_built(train_flags, tmp_path):
    state = run(train_flags, "--proj-coeff", 0)
    assert state["architecture"]["z_dims"] == () and state["architecture"]["cls_token_dim"] == 32
    assert "proj_loss" not in lines(tmp_path)[-1]


def test_two_encoders_give_two_targets(train_flags):
    name = train_flags[train_flags.index("--enc-type") + 1]
    assert run(train_flags, "--enc-type", f"{name},{name}")["architecture"]["z_dims"] == (32, 32)


@pytest.mark.parametrize("change", [
    ("--cls", "5"), ("--proj-coeff", "5"), ("--align", "patches"), ("--align", "class"), ("--path-type", "cosine"),
    ("--weighting", "lognormal"),
    ("--cfg-prob", "1"), ("--learning-rate", "1e-2"), ("--adam-beta1", "0.1"), ("--adam-beta2", "0.1"), ("--adam-epsilon", "1"),
    ("--adam-weight-decay", "0.5"), ("--max-grad-norm", "0.01"), ("--seed", "1"), ("--encoder-depth", "2"),
    ("--gradient-accumulation-steps", "2"), ("--mixed-precision", "bf16")])
def test_every_flag_of_the_objective_and_optimiser_changes_the_weights(train_flags, tmp_path, change):
    """From weights with open gates, so that every part of the model sees a gradient."""
    architecture = run(train_flags, steps=1)["architecture"]
    torch.save(randomised(checkpoint.SiT(**architecture)).state_dict(), tmp_path / "init.pth")
    flags = [*train_flags, "--init-weights", str(tmp_path / "init.pth")]
    plain, changed = ({**run([*flags, "--output-dir", str(tmp_path / where)], *more, steps=2)["model"]}
                      for where, more in (("plain", ()), ("changed", change)))
    assert not equal(plain, changed)


def test_ema_follows_with_its_decay(train_flags, tmp_path):
    first = run(train_flags, "--ema-decay", 0.75, steps=1)
    flags = [*train_flags, "--output-dir", str(tmp_path / "b"), "--init-weights", str(tmp_path / "run/checkpoints/0000001.pt")]
    run(flags, "--ema-decay", 0.75, steps=1)
    second = checkpoint.read(tmp_path / "b/run/checkpoints/0000001.pt")
    for name, weight in second["model"].items():
        torch.testing.assert_close(second["ema"][name], 0.75 * first["ema"][name] + 0.25 * weight)


def test_init_weights_start_a_new_run(train_flags, tmp_path):
    source = run(train_flags, steps=2)
    state = run([*train_flags, "--output-dir", str(tmp_path / "b")], "--init-weights", tmp_path / "run/checkpoints/0000002.pt",
                "--learning-rate", 0, steps=1)
    assert state["steps"] == 1 and equal(state["model"], source["ema"])


# ---- cutting a batch

@pytest.fixture
def objective_and_batch():
    model = randomised(small(class_dropout_prob=0.0)).train()
    x, t, y, c = inputs(model, batch=8)
    g = torch.Generator().manual_seed(5)
    return model, dict(images=x, time_input=t, model_kwargs=dict(y=y), cls_token=c, noises=torch.randn(x.shape, generator=g),
                       cls_noises=torch.randn(c.shape, generator=g), zs=[torch.randn(8, 17, 12, generator=g)])


def piece(batch: dict, rows: slice) -> dict:
    return {**{name: value[rows] for name, value in batch.items() if isinstance(value, torch.Tensor)},
            "model_kwargs": dict(y=batch["model_kwargs"]["y"][rows]), "zs": [batch["zs"][0][rows]]}


def gradient(model, batches: list[dict], accelerator) -> torch.Tensor:
    args = train.parse_args(["--gradient-accumulation-steps", str(len(batches))])
    for batch in batches:
        train.backward(accelerator, model, SILoss(), batch, args, last=batch is batches[-1])
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_accumulated_gradient_is_the_large_batchs(objective_and_batch):
    model, batch = objective_and_batch
    accelerator = Accelerator(cpu=True)
    whole = gradient(model, [batch], accelerator)
    model.zero_grad()
    cut = gradient(model, [piece(batch, slice(i, i + 2)) for i in (0, 2, 4, 6)], accelerator)
    assert (cut - whole).norm() / whole.norm() < 1e-6


def test_gradient_of_two_processes_is_the_large_batchs(objective_and_batch, tmp_path):
    model, batch = objective_and_batch
    whole = gradient(model, [batch], Accelerator(cpu=True))
    torch.save(dict(model=model.state_dict(), batch=batch), tmp_path / "in.pt")
    program = f"""
import torch
from accelerate import Accelerator
from tests.test_train import gradient, piece
from tests.test_sit import small
given = torch.load({str(tmp_path / 'in.pt')!r}, weights_only=True)
model = small(class_dropout_prob=0.0).train()
model.load_state_dict(given["model"])
accelerator = Accelerator()
rank = accelerator.process_index
model = accelerator.prepare(model)
rows = [slice(4 * micro + 2 * rank, 4 * micro + 2 * rank + 2) for micro in (0, 1)]
torch.save(gradient(model, [piece(given["batch"], r) for r in rows], accelerator), {str(tmp_path)!r} + f"/out{{rank}}.pt")
accelerator.end_training()
"""
    (tmp_path / "program.py").write_text(program)
    two_processes(str(tmp_path / "program.py"))
    for rank in (0, 1):
        cut = torch.load(tmp_path / f"out{rank}.pt")
        assert (cut - whole).norm() / whole.norm() < 1e-6


def two_processes(*command, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command],
                          cwd=ROOT, env=env, check=True, capture_output=True, text=True)


# ---- counters and resuming

def test_the_same_command_resumes(train_flags, tmp_path):
    """N + N steps are 2N to the bit, from the middle of an epoch of three draws across its end, with accumulation."""
    flags = [*train_flags, "--gradient-accumulation-steps", "2"]
    straight = run([*flags, "--output-dir", str(tmp_path / "straight")], steps=4)
    run(flags, steps=2)
    resumed = run(flags, steps=4)
    assert (resumed["steps"], resumed["draws"]) == (4, 4)
    assert all(same(straight[part], resumed[part]) for part in straight.keys() - {"args"})      # weights, EMA, optimiser, counters
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert log_of(tmp_path / "run") == log_of(tmp_path / "straight" / "run")                      # losses


def test_a_log_line_counts_what_came_before_the_stop(train_flags, tmp_path, monkeypatch):
    """Lines of three steps, with a skipped update before a stop after two."""
    flags = [*train_flags, "--logging-steps", "3"]
    spoil(monkeypatch, 1)
    run([*flags, "--output-dir", str(tmp_path / "straight")], "--checkpointing-steps", 2, steps=6)
    monkeypatch.undo()
    spoil(monkeypatch, 1)
    run([*flags, "--output-dir", str(tmp_path / "other")], "--checkpointing-steps", 2, steps=5)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "other/run/checkpoints/0000002.pt", tmp_path / "run/checkpoints/0000002.pt")
    monkeypatch.undo()
    run(flags, steps=6)
    whole, resumed = log_of(tmp_path / "straight" / "run"), log_of(tmp_path / "run")
    assert [line["step"] for line in whole] == [3, 6] and whole == resumed and whole[0]["skipped_updates"] == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_number_of_ranks_takes_over_all_sums(ranks):
    class Ranks:
        device, num_processes, process_index = torch.device("cpu"), ranks, 0

        def reduce(self, table, _):
            return table

        def gather(self, table):
            return torch.cat([table, 10 * table])                 # as if a second rank had added ten times as much

    meter, resumed = train.Meter(), train.Meter()
    meter.add("loss", torch.tensor([1.0, 3.0]))
    resumed.resume(meter.state(Ranks()), Ranks())
    resumed.add("loss", torch.tensor(5.0))
    assert resumed.sums["loss"] == (9 if ranks == 2 else 4 + 40 + 5) and resumed.counts["loss"] == (3 if ranks == 2 else 2 + 20 + 1)


def test_the_scalers_state_is_resumed(train_flags, tmp_path, monkeypatch):
    """fp16 needs a GPU; its scaler does not."""
    scalers = []

    class Scaled(Accelerator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
            scalers.append(self.scaler)

    monkeypatch.setattr(train, "Accelerator", Scaled)
    straight = run([*train_flags, "--output-dir", str(tmp_path / "straight")], steps=5)
    run(train_flags, steps=2)
    resumed = run(train_flags, steps=5)
    assert straight["scaler"] == resumed["scaler"] == scalers[0].state_dict() == scalers[2].state_dict()
    assert straight["scaler"]["scale"] == 2.0**21 and straight["scaler"]["_growth_tracker"] == 2  # grown after three, across the stop
    assert equal(straight["model"], resumed["model"])


def test_a_run_goes_back_to_an_older_checkpoint_once(train_flags, tmp_path, capsys):
    run(train_flags, "--checkpointing-steps", 1, steps=3)
    flags = [*train_flags, "--checkpointing-steps", "2", "--resume-step", "1", "--learning-rate", "0.01"]
    run(flags, steps=2)
    assert "resumed " in (said := capsys.readouterr()).out and "0000001.pt at step 1" in said.out
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["0000001.pt", "0000002.pt", "0000002.pt.aside",
                                                                               "0000003.pt.aside"]
    assert run(flags, steps=4)["steps"] == 4
    assert "0000002.pt at step 2" in capsys.readouterr().out and [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    path = tmp_path / "run/checkpoints/0000001.pt"
    other = run([*train_flags, "--exp-name", "other"], "--resume", path, steps=2)                # another experiment's begins a new one
    assert other["steps"] == 2 and path.exists() and list(runs.saved(tmp_path / "other")) == [2]


@pytest.mark.parametrize(("flags", "sentence"), [
    (("--resume", "none"), "holds 1 checkpoints up to step 1"),
    (("--resume", "nowhere.pt"), "no checkpoint at nowhere.pt"),
    (("--resume-step", "7"), "0000007.pt"),
    (("--resume-step", "1", "--resume", "none"), "give one of them"),
    (("--enc-type", "dinov2-vit-s"), "--enc-type local-dir:"),
    (("--encoder-depth", "2"), "--encoder-depth 4, now 2"),
    (("--path-type", "cosine"), "--path-type linear, now cosine"),
    (("--qk-norm",), "--qk-norm False, now True"),
])
def test_what_would_make_resuming_meaningless_is_refused(train_flags, tmp_path, capsys, flags, sentence):
    run(train_flags, steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        run(train_flags, *flags, steps=2)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_harmless_changes_are_said_and_the_flags_count(train_flags, tmp_path, capsys):
    run(train_flags, steps=1)
    state = run(train_flags, "--num-workers", 1, "--logging-steps", 2, "--learning-rate", 0, "--adam-beta1", 0.5, steps=3)
    said = capsys.readouterr().err
    for change in ("num_workers 0 -> 1", "logging_steps 1 -> 2", "learning_rate 0.0001 -> 0", "adam_beta1 0.9 -> 0.5"):
        assert change in said
    group, = state["opt"]["param_groups"]
    assert (group["lr"], group["betas"]) == (0, (0.5, 0.999))
    assert equal(state["model"], checkpoint.read(tmp_path / "run/checkpoints/0000001.pt")["model"])


def test_checkpoints_that_are_kept(train_flags, tmp_path):
    run(train_flags, "--checkpointing-steps", 1, "--keep-last", 2, "--keep-every", 3, steps=7)
    assert list(runs.saved(tmp_path / "run")) == [3, 6, 7]


@pytest.mark.parametrize("recovers", [True, False])
def test_a_checkpoint_that_cannot_be_written_is_tried_again(train_flags, tmp_path, monkeypatch, capsys, recovers):
    original, tries = runs.save, []

    def save(experiment, state):
        tries.append(state["steps"])
        if len(tries) < 3 or not recovers:
            raise UserError("cannot write it: make room")
        return original(experiment, state)

    monkeypatch.setattr(checkpoint, "save", save)
    start = runs.Saver.start
    monkeypatch.setattr(runs.Saver, "start", lambda self, state: (start(self, state), self.wait()))  # no race
    if recovers:
        run(train_flags, "--checkpointing-steps", 2, steps=5)
        assert tries == [2, 3, 4, 5] and list(runs.saved(tmp_path / "run")) == [4, 5]
    else:
        with pytest.raises(SystemExit) as ended:
            run(train_flags, "--checkpointing-steps", 2, steps=3)
        assert ended.value.code == 2 and tries == [2, 3, 3]
        assert capsys.readouterr().err.splitlines()[-1] == "error: cannot write it: make room"
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 6 if recovers else 4))


def test_a_full_disk_does_not_end_a_run(train_flags, tmp_path, capsys):
    """What cannot be written is warned of; log lines wait, and are there when there is room again."""
    import builtins
    import errno

    updates, update, open_before, draw = [], train.update, builtins.open, train.to_pil_image

    def require_room(path=""):
        if len(updates) <= 2 and not str(path).endswith(("args.json", ".lock")):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_with_room(path, mode="r", *args, **kwargs):
        if "a" in mode:
            require_room(path)
        return open_before(path, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_with_room)
        patch.setattr(train, "to_pil_image", lambda grid: require_room() or draw(grid))
        patch.setattr(train, "update", lambda *args: updates.append(1) or update(*args))
        run(train_flags, "--sampling-steps", 2, steps=4)
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl (No space left on device): its lines wait") == 2 and said.count("cannot write") == 3
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "run/grids").iterdir()] == ["0000004.png"]


def test_a_log_line_is_whole_or_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.log.notice", lambda _: None)    # what is captured would meet the limit, too
    log = train.Log(tmp_path / "metrics.jsonl", 0)
    log.append({"step": 1, "loss": float("inf")})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))         # room for half of the second line
    try:
        log.append({"step": 2, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_text() == '{"step": 1, "loss": null}\n'
    log.append({"step": 3, "loss": 0.25})
    assert [line["step"] for line in train.Log(log.path, 3).lines] == [1, 2, 3]


def test_a_run_that_went_back_goes_on_though_its_start_is_no_longer_kept(train_flags, tmp_path):
    run(train_flags, steps=1)
    flags = [*train_flags, "--resume-step", "1", "--keep-last", "1"]
    run(flags, steps=3)
    assert list(runs.saved(tmp_path / "run")) == [3]
    assert run(flags, steps=4)["steps"] == 4


def test_two_runs_do_not_train_one_experiment(train_flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    program = (f"from models.checkpoint import Saver; from pathlib import Path; saver = Saver(Path({str(tmp_path / 'run')!r}))\n"
               "print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(SystemExit) as ended:
        run(train_flags, steps=1)
    assert ended.value.code == 2 and "another process is training" in capsys.readouterr().err
    other.kill()                                                  # the lock ends with its process, whatever ends that
    other.wait()
    assert run(train_flags, steps=1)["steps"] == 1


def test_what_was_owed_at_the_last_step_is_made_by_the_same_command(train_flags, tmp_path, monkeypatch):
    """Killed between the last checkpoint and its grid."""
    def killed(experiment, *_):
        while not runs.saved(experiment):
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_grid", killed)
        with pytest.raises(SystemExit):
            run(train_flags, "--sampling-steps", 2, steps=2)
    assert list(runs.saved(tmp_path / "run")) == [2] and not (tmp_path / "run/grids").exists()
    run(train_flags, "--sampling-steps", 2, steps=2)
    first = (tmp_path / "run/grids/0000002.png").stat().st_mtime_ns
    run(train_flags, "--sampling-steps", 2, steps=2)
    assert (tmp_path / "run/grids/0000002.png").stat().st_mtime_ns == first              # and not again


def test_wandb_goes_on_with_the_same_run(train_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "require_tracker", lambda _: None)
    given = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config, init_kwargs: given.append(init_kwargs["wandb"]))
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    for steps in (1, 2):
        run(train_flags, "--report-to", "wandb", steps=steps)
    run(train_flags, "--report-to", "wandb", "--exp-name", "other", steps=1)
    first, second, other = given
    assert first == second and first["id"] and first["resume"] == "allow" and other["id"] != first["id"]


def test_a_resumed_run_writes_the_lines_after_its_checkpoint_again(train_flags, tmp_path):
    run(train_flags, "--checkpointing-steps", 2, steps=3)
    runs.checkpoint_path(tmp_path / "run", 3).unlink()
    run(train_flags, steps=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def snapshot(model, ema, optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in [*model.parameters(), *ema.parameters(), *moments]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fp16", [False, True])
def test_an_update_with_non_finite_gradients_changes_nothing(bad, fp16):
    """Weights, EMA, AdamW's moments and count keep their bits; the fp16 scaler halves its scale, and both go on with the next one."""
    model = randomised(small())
    ema, args = deepcopy(model), train.parse_args(["--learning-rate", "0.1", "--ema-decay", "0.5"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if fp16 else None

    def one_update(value):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.x_embedder.proj.bias.grad[0] = value
        if scaler is not None:
            scaler.scale(torch.zeros(()))                         # as a loss does: the scaler begins with the first one
        return train.update(model, ema, optimizer, scaler, args)

    one_update(1.0)
    before = snapshot(model, ema, optimizer)
    assert not one_update(bad).isfinite()
    assert all(map(torch.equal, before, snapshot(model, ema, optimizer)))
    assert scaler is None or scaler.get_scale() == 512
    assert one_update(1.0).isfinite()
    assert not any(map(torch.equal, before, snapshot(model, ema, optimizer)))


def spoil(monkeypatch, *draws):
    """The class token's loss is not a number at these draws."""
    original, counter = train.SILoss.__call__, iter(range(10**6))

    def call(self, *args, **kwargs):
        terms = original(self, *args, **kwargs)
        return terms._replace(cls=terms.cls * float("nan")) if next(counter) in draws else terms

    monkeypatch.setattr(train.SILoss, "__call__", call)


@pytest.mark.parametrize("logging", [1, 2])
def test_a_non_finite_loss_advances_draws_alone_and_is_named(train_flags, tmp_path, monkeypatch, capsys, logging):
    spoil(monkeypatch, 1, 2)
    state = run(train_flags, "--logging-steps", logging, "--checkpointing-steps", 2, steps=4)
    assert (state["steps"], state["draws"]) == (4, 6)
    assert all(weight.isfinite().all() for part in ("model", "ema") for weight in state[part].values())
    records = lines(tmp_path)
    assert [(record["step"], record["draws"], record["skipped_updates"]) for record in records] == (
        [(1, 1, 0), (2, 4, 2), (3, 5, 0), (4, 6, 0)] if logging == 1 else [(2, 4, 2), (4, 6, 0)])
    events = [{"draw": draw, "step": 1, "terms": ["cls_loss", "grad_norm"]} for draw in (1, 2)]
    assert [record["skipped"] for record in records if "skipped" in record] == [events]
    assert all(record["cls_loss"] > 0 for record in records)                              # means are over what is finite
    assert "skipped the update after step 1 (draw 2), not finite: cls_loss, grad_norm" in capsys.readouterr().err
    assert checkpoint.read(tmp_path / "run/checkpoints/0000002.pt")["draws"] == 4


def test_a_skipped_draw_is_not_repeated_when_resumed(train_flags, tmp_path, monkeypatch):
    """Straight and resumed runs agree to the bit around skipped updates."""
    spoil(monkeypatch, 1)
    straight = run([*train_flags, "--output-dir", str(tmp_path / "straight")], steps=3)
    monkeypatch.undo()
    spoil(monkeypatch, 1)
    run(train_flags, steps=2)
    monkeypatch.undo()
    resumed = run(train_flags, steps=3)
    assert (resumed["draws"], straight["draws"]) == (4, 4)
    assert equal(straight["model"], resumed["model"]) and equal(straight["ema"], resumed["ema"])


def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(train_flags, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 0, *range(2, 100))
    with pytest.raises(SystemExit) as ended:
        run(train_flags, "--max-skipped-updates", 3, "--checkpointing-steps", 1, steps=9)
    assert ended.value.code == 2 and "3 updates in a row were skipped for non-finite numbers, after step 1" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000001.pt"]
    assert checkpoint.read(tmp_path / "run/checkpoints/0000001.pt")["draws"] == 2         # one in between, and the count begins anew


def test_a_resumed_run_goes_on_at_its_draws(train_flags, tmp_path, monkeypatch):
    """Draws and steps differ after a skipped update: the data position follows draws."""
    starts = []
    run(train_flags, steps=1)
    path = runs.checkpoint_path(tmp_path / "run", 1)
    torch.save({**checkpoint.read(path, mmap=False), "draws": 5}, path)
    original = train.GlobalBatchSampler.__iter__
    monkeypatch.setattr(train.GlobalBatchSampler, "__iter__", lambda self: starts.append(self.start) or original(self))
    assert run(train_flags, steps=2)["draws"] == 6 and starts == [5]


def test_ranks_and_micro_batches_have_noise_of_their_own(train_flags, tmp_path):
    """Two ranks, two micro-batches, two draws: each seeds its own noise with (seed, draws, micro-batch, rank)."""
    program = f"""
import os, train
original, keys = train.reseed, open({str(tmp_path)!r} + "/keys" + os.environ["RANK"], "w")
train.reseed = lambda *key: print(*key, file=keys, flush=True) or original(*key)
train.main({[*train_flags, "--gradient-accumulation-steps", "2", "--seed", "9", "--max-train-steps", "2"]!r})
"""
    (tmp_path / "program.py").write_text(program)
    two_processes(str(tmp_path / "program.py"))
    keys = sorted(tuple(map(int, line.split())) for rank in "01" for line in (tmp_path / f"keys{rank}").read_text().splitlines())
    assert keys == [(9,), (9,), *((9, draws, micro, rank) for draws in (0, 1) for micro in (0, 1) for rank in (0, 1))]


def test_latents_are_sampled_anew_from_the_posterior(train_flags, data_dir):
    args = train.resolve(train.parse_args([*train_flags, "--method", "sit"]))
    data, space = train.open_data(args)
    moments = torch.stack([data[i][1] for i in range(4)])
    draws = [train.prepare_batch(None, moments, torch.zeros(4), space, [], args, Accelerator(cpu=True))["images"] for _ in range(200)]
    mean, std = moments.chunk(2, dim=1)
    sampled = (torch.stack(draws) / space.scale + space.shift - mean) / std                # standard normal
    assert abs(sampled.mean()) < 5 / sampled.numel() ** 0.5 and abs(sampled.var() - 1) < 5 * (2 / sampled.numel()) ** 0.5


@pytest.mark.parametrize("rest", ['{"step": 2, "lo', '{"step": 2, "skipped": [{"draw": 1}', "\0" * 64, "{}"])
def test_a_log_line_cut_off_with_the_run_does_not_stop_the_next(train_flags, tmp_path, rest):
    run(train_flags, steps=1)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(rest)
    run(train_flags, steps=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_randomness_depends_on_every_part_of_its_key():
    def draw(*key):
        train.reseed(*key)
        return torch.randn(3)

    assert torch.equal(draw(0, 1, 2, 3), draw(0, 1, 2, 3))
    draws = [draw(*key) for key in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))]
    assert len({tuple(d.tolist()) for d in draws}) == 5


def test_logging_reads_no_number_from_the_device_between_lines():
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function), "a number was read from the device"
            return function(*args, **(kwargs or {}))

    model = randomised(small()).eval()
    x, t, y, c = inputs(model)
    terms = SILoss()(model, x, dict(y=y), cls_token=c, time_input=torch.tensor([0.1, 1.0]))
    meter = train.Meter()
    with NoReading():
        for _ in range(3):
            train.add_terms(meter, terms, terms.denoising.mean())
            meter.add("grad_norm", torch.tensor(2.0))
    read = meter.read(Accelerator(cpu=True), images=6)
    assert read["denoising_loss"] == pytest.approx(terms.denoising.mean().item())
    assert read["denoising_loss_t1of4"] == pytest.approx(terms.denoising[0].item())
    assert read["denoising_loss_t4of4"] == pytest.approx(terms.denoising[1].item())
    assert read["denoising_loss_t2of4"] != read["denoising_loss_t2of4"] and read["grad_norm"] == 2.0


# ---- what else a run writes

def test_grids_and_tensorboard(train_flags, tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(train_flags, "--sampling-steps", 2, "--report-to", "tensorboard", steps=2)
    assert Image.open(tmp_path / "run" / "grids" / "0000002.png").size == (4 * 34 + 2,) * 2
    events = EventAccumulator(str(tmp_path / "run" / "REG")).Reload()
    assert "loss" in events.Tags()["scalars"] and "samples" in events.Tags()["images"]


def test_dry_run_describes_and_stops(train_flags, tmp_path, capsys):
    train.main([*train_flags, "--dry-run"])
    out = capsys.readouterr().out
    assert '"encoder_depth": 4' in out and '"num_classes": 3' in out and "M parameters" in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("resolution", ["4", "100"])
def test_dry_run_refuses_what_cannot_be_cut(capsys, resolution):
    with pytest.raises(SystemExit) as ended:
        train.main(["--model", "SiT-B/2", "--data-dir", "nowhere", "--dry-run", "--resolution", resolution])
    assert ended.value.code == 2 and "give a multiple of 16" in capsys.readouterr().err


def test_dry_run_knows_the_papers_cost(capsys):
    train.main(["--model", "SiT-B/2", "--data-dir", "nowhere", "--dry-run"])
    assert "139.028M parameters (131.684M without projectors), 49.97 GFLOPs forward for one image (24.98 GMAC)" in capsys.readouterr().out


# ---- mistakes

@pytest.mark.parametrize(("flags", "sentence"), [
    (("--data-dir", "nowhere"), "nowhere"),
    (("--num-classes", "2"), "label"),
    (("--resolution", "64"), "64"),
    (("--batch-size", "3", "--gradient-accumulation-steps", "2"), "multiple of 2"),
    (("--batch-size", "0"), "--batch-size is 0"),
    (("--encoder-depth", "7"), "SiT-T/2 has 6 blocks"),
    (("--enc-type", "nothing"), "unknown encoder 'nothing'"),
    (("--enc-type", "dinov2-vit-s", "--encoder-weights", "nowhere"), "no encoder weights at nowhere"),
    (("--vae", "nowhere", "--sampling-steps", "1"), "no VAE at nowhere"),
    (("--method", "repa", "--align", "class"), "--align class"),
    (("--model", "SiT-T/8", "--mixed-precision", "fp16"), "fp16 needs a CUDA device"),
    (("--cfg-prob", "1.5"), "--cfg-prob is 1.5"),
    (("--learning-rate", "-1"), "--learning-rate is -1"),
    (("--learning-rate", "nan"), "--learning-rate is nan"),
    (("--adam-beta1", "1"), "--adam-beta1 is 1"),
    (("--max-grad-norm", "0"), "--max-grad-norm is 0"),
    (("--ema-decay", "2"), "--ema-decay is 2"),
    (("--seed", "-1"), "--seed is -1"),
    (("--num-workers", "-1"), "--num-workers is -1"),
    (("--projector-dim", "0"), "--projector-dim is 0"),
    (("--encoder-depth", "0"), "--encoder-depth 0 came"),
    (("--proj-coeff", "-1"), "--proj-coeff is -1"),
    (("--proj-coeff", "0", "--align", "class"), "aligns nothing"),
    (("--output-dir", "README.md/x"), "cannot create the folder README.md/x/run"),
    (("--init-weights", "nowhere.pt"), "no checkpoint at nowhere.pt"),
])
def test_mistakes_end_with_one_sentence(train_flags, tmp_path, capsys, flags, sentence):
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("CUDA has fp16")
    with pytest.raises(SystemExit) as ended:
        train.main([*train_flags, "--max-train-steps", "1", *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and sentence in error
    assert not (tmp_path / "run").exists()


def test_unknown_model(train_flags, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([*train_flags, "--model", "SiT-M/2"])
    assert ended.value.code == 2 and "SiT-M/2" in capsys.readouterr().err


def test_encoder_without_class_token(train_flags, tmp_path, capsys):
    """Weights are not looked for: the reason is the same with them."""
    import timm
    from safetensors.torch import save_file

    model_args = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool="avg", fc_norm=False)
    folder = tmp_path / "pooled"
    folder.mkdir()
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **model_args).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": model_args, "num_classes": 0,
                                                   "pretrained_cfg": {}}))
    flags = [*train_flags, "--enc-type", f"local-dir:{folder}"]
    for enc_type in (f"local-dir:{folder}", f"{train_flags[3]},siglip2-vit-b"):
        with pytest.raises(SystemExit):
            run(flags, "--enc-type", enc_type, steps=1)
        assert "has no class token" in capsys.readouterr().err
    assert run(flags, "--method", "repa", steps=1)["architecture"]["z_dims"] == (32,)


def test_a_run_of_another_architecture_is_not_resumed(train_flags, capsys):
    run(train_flags, steps=1)
    with pytest.raises(SystemExit):
        run(train_flags, "--model", "SiT-T/4", steps=2)
    assert "was trained with --model SiT-T/2, now SiT-T/4 came" in capsys.readouterr().err


def test_a_run_on_another_latent_space_is_not_resumed(train_flags, data_dir, tmp_path, capsys):
    run(train_flags, steps=1)
    shutil.copytree(data_dir, tmp_path / "data")
    record = tmp_path / "data" / "vae-sd" / "dataset.json"
    record.write_text(record.read_text().replace('"scale": 0.5', '"scale": 0.75'))
    with pytest.raises(SystemExit):
        run(train_flags, "--data-dir", tmp_path / "data", steps=2)
    assert "has latent scale 0.5" in capsys.readouterr().err


def test_a_run_is_resumed_only_on_its_own_data_and_order(train_flags, data_dir, tmp_path, capsys):
    run(train_flags, steps=1)
    shutil.copytree(data_dir, tmp_path / "data")
    for path in (tmp_path / "data").rglob("dataset.json"):
        record = json.loads(path.read_text())
        record["labels"][0][1] = 2
        path.write_text(json.dumps(record))
    refusals = {("--data-dir", tmp_path / "data"): "was trained on other data", ("--batch-size", 2): "--batch-size 4, now 2",
                ("--seed", 1): "--seed 0, now 1", ("--method", "sit"): "--method reg, now sit"}
    for change, sentence in refusals.items():
        with pytest.raises(SystemExit):
            run(train_flags, *change, steps=2)
        assert sentence in capsys.readouterr().err
    run(train_flags, "--learning-rate", 0.5, steps=2)
    assert "changed settings: " in (said := capsys.readouterr().err) and "learning_rate 0.0001 -> 0.5" in said


def test_a_released_checkpoint_is_not_resumed_but_starts_a_run(train_flags, tmp_path, capsys):
    path = runs.checkpoint_path(tmp_path / "run", 1)
    state = run(train_flags, steps=1)
    torch.save({name: state[name] for name in ("model", "ema", "opt", "args", "steps")}, tmp_path / "theirs.pt")
    path.write_bytes((tmp_path / "theirs.pt").read_bytes())
    with pytest.raises(SystemExit):
        run(train_flags, steps=2)
    assert "lacks data, draws, latent_space, scaler, without which it cannot be resumed" in capsys.readouterr().err
    assert run(train_flags, "--init-weights", path, "--exp-name", "new", steps=1)["steps"] == 1


def test_a_finished_run_says_so_and_keeps_its_record(train_flags, tmp_path, capsys):
    run(train_flags, steps=2)
    before = (tmp_path / "run" / "args.json").read_text()
    train.main([*train_flags, "--max-train-steps", "1"])
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "run" / "args.json").read_text() == before


def test_data_without_a_record_counts_as_the_sd_vaes(train_flags, data_dir, tmp_path, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    record = tmp_path / "data" / "vae-sd" / "dataset.json"
    record.write_text(json.dumps({"labels": json.loads(record.read_text())["labels"]}))
    with pytest.raises(SystemExit):                                    # its 32 px images have 8x8 latents: another VAE's
        run(train_flags, "--data-dir", tmp_path / "data", steps=1)
    assert "moments of shape (8, 8, 8), but images of 32 px give (8, 4, 4) with stabilityai/sd-vae-ft-mse" in capsys.readouterr().err
    for path in (tmp_path / "data" / "vae-sd").rglob("*.npy"):
        np.save(path, np.load(path)[:, ::2, ::2])
    state = run(train_flags, "--data-dir", tmp_path / "data", steps=1)
    assert (state["latent_space"]["scale"], state["latent_space"]["shift"]) == (0.18215, 0.0)
    assert capsys.readouterr().err.count("does not say which VAE wrote it") == 1
    shutil.rmtree(tmp_path / "data" / "images")                        # SiT needs none, and 4x4 latents of that VAE are 32 px
    assert run(train_flags, "--data-dir", tmp_path / "data", "--method", "sit", "--exp-name", "sit", steps=1)["args"]["resolution"] == 32


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_file_is_named_when_it_is_read(train_flags, data_dir, tmp_path, capsys, workers):
    shutil.copytree(data_dir, tmp_path / "data")
    damaged = tmp_path / "data" / "images" / "00000" / "img00000005.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(SystemExit) as ended:
        run(train_flags, "--data-dir", tmp_path / "data", "--num-workers", workers, steps=5)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and str(damaged) in error


def damaged_data(data_dir, folder, *numbers) -> Path:
    shutil.copytree(data_dir, folder)
    for number in numbers:
        path = folder / "images" / "00000" / f"img{number:08d}.png"
        path.write_bytes(path.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_files_may_be_passed_over(train_flags, data_dir, tmp_path, capsys, workers):
    """Each is named once; its neighbour stands in, the same one after resuming."""
    data = damaged_data(data_dir, tmp_path / "data", 5, 8)
    flags = [*train_flags, "--data-dir", str(data), "--num-workers", workers, "--skip-bad-samples", "2"]
    straight = run([*flags, "--output-dir", str(tmp_path / "straight")], steps=6)                # two epochs
    said = capsys.readouterr().err
    assert said.count("passed over, ") == 2 and "1 of at most 2: " in said and "2 of at most 2: " in said
    assert all(said.count(f"img{number:08d}.png is not a readable image") == 1 for number in (5, 8))
    run(flags, steps=3)
    assert equal(run(flags, steps=6)["model"], straight["model"])
    with pytest.raises(SystemExit) as ended:
        run(flags, "--exp-name", "fewer", "--skip-bad-samples", "1", steps=6)
    assert ended.value.code == 2 and "2 entries cannot be read, more than --skip-bad-samples 1" in capsys.readouterr().err


def test_a_worker_that_is_killed_names_what_it_was_reading(train_flags, data_dir, tmp_path, monkeypatch, capfd):
    """As by the system when memory runs out."""
    original = train.LatentDataset.__getitem__

    def read(self, i):
        if self.key(i).endswith("00000007"):
            os.kill(os.getpid(), 9)
        return original(self, i)

    monkeypatch.setattr(train.LatentDataset, "__getitem__", read)
    with pytest.raises(SystemExit) as ended:
        run(train_flags, "--num-workers", 2, steps=3)
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and "a data loader worker was killed while it was reading 00000/00000007 in " in error


def test_another_decoder_is_refused(train_flags, vae_folder, tmp_path, capsys):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.register_to_config(scaling_factor=0.25)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        run(train_flags, "--vae", tmp_path / "other", "--sampling-steps", 1, steps=1)
    assert "the data set has latent scale 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(("installed", "environment", "sentence"), [
    (False, {}, "wandb is not installed"),
    (True, {}, "nobody is logged in"),
    (True, {"WANDB_MODE": "offline"}, None),
    (True, {"WANDB_API_KEY": "x"}, None)])
def test_wandb_is_asked_for(monkeypatch, tmp_path, installed, environment, sentence):
    monkeypatch.setattr(train, "find_spec", lambda name: object() if installed else None)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if sentence is None:
        train.require_tracker("wandb")
    else:
        with pytest.raises(UserError, match=sentence):
            train.require_tracker("wandb")


def test_processes_that_do_not_see_each_other_are_refused(train_flags, monkeypatch, capsys):
    """What plain torchrun on a CPU starts: WORLD_SIZE says 2, accelerate sees one process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run(train_flags, steps=1)
    assert "the launcher started 2 processes, but accelerate sees 1" in capsys.readouterr().err


def test_scores_while_training_are_those_of_the_checkpoints_samples(train_flags, data_dir, encoder_folder, tmp_path, capsys):
    """One line per --eval-steps and one at the end, named by feature network and count, and equal to what eval.sh's programs give."""
    reference = tmp_path / "reference.npz"
    np.savez(reference, np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    scoring = ["--eval-steps", "2", "--eval-samples", "5", "--ref-batch", str(reference), "--features", f"local-dir:{encoder_folder}"]
    plain = run(train_flags, steps=3)
    scored = run([*train_flags, "--exp-name", "scored"], *scoring, steps=3)
    assert equal(plain["model"], scored["model"]) and equal(plain["ema"], scored["ema"])          # scoring disturbs nothing
    records = [json.loads(line) for line in (tmp_path / "scored" / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["fd_encoder_5"] for record in records if "fd_encoder_5" in record}
    assert sorted(scores) == [2, 3]
    assert "fd_encoder_5" in capsys.readouterr().out

    generate.main(["--ckpt", str(tmp_path / "scored"), "--sample-dir", str(tmp_path), "--num-fid-samples", "5", "--mode", "ode",
                   "--num-steps", "50", "--cfg-scale", "1", "--per-proc-batch-size", "64"])
    npz = capsys.readouterr().out.splitlines()[-1]
    result = evaluate(reference, npz, load_extractor(f"local-dir:{encoder_folder}"))
    assert scores[3] == pytest.approx(result["fd_encoder"], rel=1e-4)  # threads may move a pixel by one level


def test_a_score_says_of_how_many_samples():
    assert train.score_name("fid", 10_000) == "fid_10k" and train.score_name("fid", 50_000) == "fid_50k"
    assert train.score_name("fd_net", 2500) == "fd_net_2500"


def test_fid_while_training_is_inceptions(train_flags, tmp_path, tiny_inception, tiny_weights):
    np.savez(tmp_path / "reference.npz", np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    run(train_flags, "--eval-steps", 2, "--eval-samples", 4, "--ref-batch", tmp_path / "reference.npz", "--inception-weights", tiny_weights)
    assert lines(tmp_path)[-1].keys() == {"step", "fid_4"}


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--eval-steps", "2"], "without a reference"),
    (["--ref-batch", "x.npz"], "--eval-steps is 0"),
    (["--eval-steps", "2", "--ref-batch", "nowhere.npz"], "not found"),
    (["--eval-steps", "2", "--ref-batch", "nowhere.npz", "--eval-samples", "1"], "--eval-samples is 1"),
])
def test_scoring_mistakes_are_said_before_the_first_step(train_flags, tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        train.main([*train_flags, *flags])
    assert end.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
