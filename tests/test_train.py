"""train.py: methods and flags, gradients of a batch that is cut, resuming, skipped updates, refusals."""

import json
import shutil
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import generate
import train
from dataset import GlobalBatchSampler
from evaluations.features import load_extractor
from evaluations.scoring import evaluate
from loss import SILoss
from models import checkpoint
from models.conditioning import ClassLabels
from models.vae import LatentSpace
from runtime import run as disk
from runtime.stopping import StopRequest
from tests.forks import run_main, two_ranks
from tests.stress.kills import log_of, same
from tests.test_sit import inputs, randomised, small

ROOT = Path(__file__).parents[1]


def run(flags, *more, steps=2) -> dict:
    """Train up to `steps`; return the content of the last checkpoint."""
    flags = [*flags, "--max-train-steps", str(steps), *map(str, more)]
    AcceleratorState._reset_state(reset_partial_state=True)       # as in a new process
    train.main(flags)
    args = train.parse_args(flags)
    return checkpoint.read(disk.checkpoint_path(Path(args.output_dir) / args.exp_name, steps))


def refused(capsys, flags, *more) -> str:
    """Run train.py; return the one line with which it refuses the flags."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as ended:
        train.main([*flags, *map(str, more)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ")
    return error


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def resumed(trained, train_flags, tmp_path):
    """Flags of an experiment of two steps, a copy of `trained`, which may be changed."""
    shutil.copytree(trained, tmp_path / "run")
    return train_flags


# ---- methods and flags

def test_a_reg_run_describes_itself(trained):
    state, (line,) = checkpoint.read(trained), lines(trained.parent)
    assert state["architecture"]["cls_token_dim"] == 32 and state["architecture"]["z_dims"] == (32,)
    assert state["architecture"]["num_classes"] == 3 and state["latent_space"]["scale"] == 0.5
    assert state["args"]["align"] == "all" and json.loads((trained / "args.json").read_text()) == state["args"]
    total = line["denoising_loss"] + 0.03 * line["cls_loss"] + 0.5 * line["proj_loss"]
    assert line["loss"] == pytest.approx(total, rel=1e-5) and line["align_cosine"] == -line["proj_loss"]
    assert {"step", "grad_norm", "lr", "images_per_second", "data_wait", "denoising_loss_t1of4"} <= line.keys()


@pytest.mark.parametrize(("flags", "slot", "z_dims", "align", "logged"), [
    (["--method", "repa"], None, (32,), "patches", {"proj_loss"}),
    (["--method", "sit", "--enc-type", "no-encoder-is-loaded"], None, (), None, set()),
    (["--proj-coeff", "0"], 32, (), None, {"cls_loss"}),
    (["--enc-type", "twice"], 32, (32, 32), "all", {"cls_loss", "proj_loss"})])
def test_methods(train_flags, encoder_folder, tmp_path, flags, slot, z_dims, align, logged):
    flags = [f"local-dir:{encoder_folder},local-dir:{encoder_folder}" if flag == "twice" else flag for flag in flags]
    state = run(train_flags, *flags, steps=1)
    assert (state["architecture"]["cls_token_dim"], state["architecture"]["z_dims"]) == (slot, z_dims)
    assert state["args"]["align"] == align and {"cls_loss", "proj_loss"} & lines(tmp_path)[-1].keys() == logged


@pytest.fixture(scope="module")
def open_gates(trained, data_dir, encoder_folder, tmp_path_factory):
    """Flags of runs that start from random weights, so that every part has a gradient; and a plain run of two steps."""
    folder = tmp_path_factory.mktemp("flags")
    model = randomised(checkpoint.SiT(**checkpoint.read(trained)["architecture"]))
    torch.save(model.state_dict(), folder / "init.pth")
    flags = ["--data-dir", str(data_dir), "--enc-type", f"local-dir:{encoder_folder}", "--model", "SiT-T/2",
             "--projector-dim", "32", "--batch-size", "4", "--num-workers", "0", "--sampling-steps", "0",
             "--init-weights", str(folder / "init.pth"), "--ema-decay", "0.75", "--exp-name", "run"]
    run([*flags, "--output-dir", str(folder)], "--checkpointing-steps", 1, steps=2)
    return flags, {step: checkpoint.read(path) for step, path in disk.saved(folder / "run").items()}


@pytest.mark.parametrize("change", [
    ("--cls", "5"), ("--proj-coeff", "5"), ("--align", "patches"), ("--align", "class"), ("--path-type", "cosine"),
    ("--weighting", "lognormal"), ("--cfg-prob", "1"), ("--learning-rate", "1e-2"), ("--adam-beta1", "0.1"),
    ("--adam-beta2", "0.1"), ("--adam-epsilon", "1"), ("--adam-weight-decay", "0.5"), ("--max-grad-norm", "0.01"),
    ("--seed", "1"), ("--encoder-depth", "2"), ("--gradient-accumulation-steps", "2"), ("--mixed-precision", "bf16")])
def test_every_flag_of_objective_and_optimiser_changes_the_weights(open_gates, tmp_path, change):
    flags, plain = open_gates
    steps = 2 if "beta" in change[0] else 1                       # Adam's first step does not depend on its betas
    changed = run([*flags, "--output-dir", str(tmp_path)], *change, steps=steps)
    assert not same(plain[steps]["model"], changed["model"])


def test_ema_follows_with_its_decay(open_gates):
    _, states = open_gates
    for name, weight in states[2]["model"].items():
        torch.testing.assert_close(states[2]["ema"][name], 0.75 * states[1]["ema"][name] + 0.25 * weight)


def test_released_checkpoints_start_a_run_but_are_not_resumed(resumed, trained, tmp_path, capsys):
    path, state = disk.newest(tmp_path / "run"), checkpoint.read(disk.newest(trained))
    torch.save({name: state[name] for name in ("model", "ema", "opt", "args", "steps")}, path)
    assert "--init-weights" in refused(capsys, resumed)
    new = run(resumed, "--exp-name", "new", "--init-weights", path, "--learning-rate", 0, steps=1)
    assert new["steps"] == 1 and same(new["model"], state["ema"])


# ---- one batch in pieces

class FromLatents(SILoss):
    """The objective with times and noise that depend on the sample alone, so that a batch may be cut; notes a draw."""

    def __call__(self, model, images, model_kwargs, zs, cls_token):
        self.draws.append(torch.rand(()).item())
        times = images.flatten(1).mean(dim=1).sigmoid()
        return super().__call__(model, images, model_kwargs, zs, cls_token, times, images.flip(-1), cls_token.flip(-1))


class Recorder(torch.optim.SGD):
    def step(self) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None])


class Encoded:
    """In an encoder's place: `seen` is its outcome."""

    @staticmethod
    def features(seen, with_class_token):
        return seen["class_token"], seen["targets"]


def two_steps(micros: int, rank: int = 0, ranks: int = 1) -> tuple[torch.Tensor, list[float]]:
    """Two steps of `train.train` on a batch of eight in pieces: the gradient, and a random number per micro-batch."""
    model = randomised(small(class_dropout_prob=0.0))
    x, _, y, c = inputs(model, batch=8)
    moments = torch.cat([x, torch.zeros_like(x)], dim=1)                                  # (8, 2C, H, W), std 0
    targets = torch.randn(8, 17, 12, generator=torch.Generator().manual_seed(5))
    size = 8 // micros // ranks
    pieces = [slice(size * i, size * (i + 1)) for i in range(rank, micros * ranks, ranks)]
    batches = [([{"class_token": c[p], "targets": targets[p]}], moments[p], y[p]) for p in pieces]
    args = train.parse_args(["--gradient-accumulation-steps", str(micros), "--max-grad-norm", "1e9"])
    objective, optimizer = FromLatents(), Recorder(model.parameters(), lr=0.0)
    objective.draws = []
    train.train(args, disk.Run(0, 2, StopRequest()), iter(2 * batches), LatentSpace(scale=1.0), [Encoded],
                ClassLabels(5), model,
                deepcopy(model), objective, optimizer, Accelerator(cpu=True))
    return optimizer.gradient, objective.draws


def save_two_steps(rank: int, folder: Path) -> None:
    torch.save(two_steps(micros=2, rank=rank, ranks=2), folder / f"{rank}.pt")


def test_gradient_of_pieces_is_the_large_batchs(tmp_path):
    """Four micro-batches, and two of each of two ranks; and each draws numbers of its own."""
    whole, _ = two_steps(micros=1)
    two_ranks(save_two_steps, tmp_path)
    found = [two_steps(micros=4), *(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))]
    for gradient, _ in found:
        assert (gradient - whole).norm() / whole.norm() < 1e-6
    assert len({draw for _, draws in found[1:] for draw in draws}) == 8                  # 2 ranks, steps, micro-batches


def test_randomness_depends_on_every_part_of_its_key():
    def draw(*key) -> tuple:
        train.reseed(*key)
        return tuple(torch.randn(3).tolist())

    assert draw(0, 1, 2, 3) == draw(0, 1, 2, 3)
    assert len({draw(*key) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}) == 5


# ---- resuming

@pytest.mark.parametrize("ranks", [1, 2])
def test_n_and_n_steps_are_two_n_to_the_bit(train_flags, tmp_path, ranks):
    """With accumulation, from the middle of an epoch of three steps across its end; a checkpoint closes a log line."""
    for name, steps in (("straight", 4), ("run", 2), ("run", 4)):
        flags = [*train_flags, "--gradient-accumulation-steps", "2", "--exp-name", name, "--logging-steps", "3",
                 "--checkpointing-steps", "2"]
        if ranks == 2:
            two_ranks(run_main, train.main, [*flags, "--max-train-steps", str(steps)])
        else:
            run(flags, steps=steps)
    straight, resumed = (checkpoint.read(tmp_path / name) for name in ("straight", "run"))
    assert resumed["steps"] == 4 and resumed["processes"] == ranks
    assert all(same(straight[part], resumed[part]) for part in straight.keys() - {"args"})
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4]
    assert log_of(tmp_path / "run") == log_of(tmp_path / "straight")


def test_a_damaged_newest_checkpoint_gives_way_and_its_steps_are_done_again(resumed, tmp_path, capsys):
    straight = run(resumed, "--checkpointing-steps", 3, steps=4)
    for path in (disk.checkpoint_path(tmp_path / "run", step) for step in (3, 4)):
        path.write_bytes(path.read_bytes()[:-1000])
    capsys.readouterr()
    again = run(resumed, steps=4)
    assert "0000004.pt, " in (warning := capsys.readouterr().err) and "0000003.pt cannot be read" in warning
    assert same(straight["model"], again["model"]) and [line["step"] for line in lines(tmp_path)] == [2, 3, 4]


def test_a_run_goes_back_to_an_older_checkpoint_once(train_flags, tmp_path, capsys):
    """Later checkpoints are set aside; the same command again goes on, though --keep-last has removed its start."""
    run(train_flags, "--checkpointing-steps", 1, steps=2)
    flags = [*train_flags, "--resume-step", "1", "--keep-last", "1"]
    run(flags, steps=2)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["0000002.pt", "0000002.pt.aside"]
    assert "0000001.pt at step 1" in capsys.readouterr().out
    run(flags, steps=3)
    assert "0000002.pt at step 2" in capsys.readouterr().out and [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_an_older_checkpoint_is_resumed_at_its_batches(resumed, tmp_path, capsys):
    """Checkpoints once counted `steps` without skipped updates, and `draws` with them."""
    path = disk.newest(tmp_path / "run")
    torch.save({**checkpoint.read(path, mmap=False), "draws": 5, "log": {}}, path)
    state = run(resumed, steps=6)
    assert [line["step"] for line in lines(tmp_path)] == [2, 6] and "draws" not in state
    assert capsys.readouterr().err.count("at step 5") == 1


def test_changed_settings_are_printed_and_count(resumed, trained, capsys):
    state = run(resumed, "--learning-rate", 0, "--adam-beta1", 0.5, steps=3)
    printed = capsys.readouterr().err
    assert "logging_steps 100 -> 1" in printed and "learning_rate 0.0001 -> 0" in printed
    group, = state["opt"]["param_groups"]
    assert (group["lr"], group["betas"]) == (0, (0.5, 0.999))
    assert same(state["model"], checkpoint.read(trained)["model"])


@pytest.mark.parametrize(("flags", "word"), [
    (["--resume", "none"], "--resume none"),
    (["--resume", "nowhere.pt"], "nowhere.pt"),
    (["--resume-step", "7"], "0000007.pt"),
    (["--enc-type", "dinov2-vit-s"], "--enc-type"),
    (["--encoder-depth", "2"], "--encoder-depth"),
    (["--path-type", "cosine"], "--path-type"),
    (["--weighting", "lognormal"], "--weighting"),
    (["--qk-norm"], "--qk-norm"),
    (["--projector-dim", "16"], "--projector-dim"),
    (["--align", "class"], "--align"),
    (["--model", "SiT-T/4"], "--model"),
    (["--method", "sit"], "--method"),
    (["--batch-size", "2"], "--batch-size"),
    (["--seed", "1"], "--seed"),
    (["--proj-coeff", "0"], "--align"),
    (["--init-weights", "x.pt"], "--init-weights"),
    (["--data-dir", "RELABELLED"], "other files or labels"),
    (["--data-dir", "RESCALED"], "latent scale"),
])
def test_another_run_is_not_resumed(train_flags, trained, data_dir, tmp_path, capsys, flags, word):
    """Nothing in the experiment's folder changes."""
    if "--data-dir" in flags:
        shutil.copytree(data_dir, tmp_path / "data")
        for path in (tmp_path / "data").rglob("dataset.json"):
            record = json.loads(path.read_text())
            if flags[1] == "RESCALED" and "vae" in record:
                record["vae"]["scale"] = 0.75
            elif flags[1] == "RELABELLED":
                record["labels"][0][1] = 2
            path.write_text(json.dumps(record))
        flags = ["--data-dir", tmp_path / "data"]
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert word in refused(capsys, train_flags, "--output-dir", trained.parent, *flags)
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_a_finished_run_keeps_its_record(resumed, tmp_path, capsys):
    before = (tmp_path / "run" / "args.json").read_text()
    train.main([*resumed, "--max-train-steps", "1"])
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "run" / "args.json").read_text() == before


# ---- updates that are not finite

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fp16", [False, True])
def test_an_update_with_non_finite_gradients_changes_nothing(bad, fp16):
    """Weights, EMA and AdamW's state keep their bits; the fp16 scaler halves its scale; the next update counts."""
    model = randomised(small())
    ema, optimizer = deepcopy(model), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if fp16 else None

    def update(value: float) -> dict:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.x_embedder.proj.bias.grad[0] = value
        if scaler is not None:
            scaler.scale(torch.zeros(()))                         # the scaler starts with the first loss
            scaler.unscale_(optimizer)
        finite = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
        train.step_if(finite, optimizer, scaler)
        train.update_ema(ema, model, 0.5, finite)
        return deepcopy([*model.parameters(), *ema.parameters(), optimizer.state_dict()["state"]])

    before, skipped, after = update(1.0), update(bad), update(1.0)
    assert same(before, skipped) and not any(map(same, skipped, after))
    assert scaler is None or scaler.get_scale() == 512


@pytest.fixture
def overflowing(data_dir, tmp_path):
    """The data set with an image in the second batch whose latents' squares are too large for float32."""
    folder = shutil.copytree(data_dir, tmp_path / "data")
    second = next(islice(GlobalBatchSampler(12, 4, seed=0), 1, None))
    path = sorted((folder / "vae-sd").rglob("*.npy"))[second[0]]
    np.save(path, np.full_like(np.load(path), 1e30))
    return folder


def test_a_non_finite_update_is_skipped_counted_and_named(train_flags, overflowing, tmp_path, capsys):
    """The step counter, the data and the log go on, and the run resumes to the bit."""
    flags = [*train_flags, "--data-dir", str(overflowing), "--checkpointing-steps", "1"]
    run(flags, steps=3)
    assert "1 update(s) skipped up to step 2" in capsys.readouterr().err
    first, second, third = (checkpoint.read(path, mmap=False) for path in disk.saved(tmp_path / "run").values())
    for part in ("model", "ema", "opt"):
        assert same(first[part], second[part]) and not same(second[part], third[part])
    log = lines(tmp_path)
    assert [(line["step"], line["skipped_updates"]) for line in log] == [(1, 0), (2, 1), (3, 0)]
    assert {"denoising_loss", "grad_norm"} <= set(log[1]["not_finite"]) and "not_finite" not in log[2]
    disk.checkpoint_path(tmp_path / "run", 3).unlink()
    assert same(run(flags, steps=3)["model"], third["model"])


def test_too_many_skipped_updates_in_a_row_end_the_run(train_flags, overflowing, tmp_path, capsys):
    flags = ["--data-dir", overflowing, "--batch-size", 12, "--max-skipped-updates", 2, "--max-train-steps", 9]
    assert "2 updates in a row" in refused(capsys, train_flags, *flags)
    assert list(disk.saved(tmp_path / "run")) == [2] and len(lines(tmp_path)) == 2


# ---- what else a run writes

@pytest.fixture(scope="module")
def scored(trained, data_dir, encoder_folder, vae_folder, tmp_path_factory):
    """`trained` once more with a grid, scores and tensorboard, keeping one checkpoint."""
    folder = tmp_path_factory.mktemp("scored")
    np.savez(folder / "reference.npz", np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    run(["--data-dir", str(data_dir), "--enc-type", f"local-dir:{encoder_folder}", "--vae", str(vae_folder),
         "--output-dir", str(folder), "--exp-name", "run", "--model", "SiT-T/2", "--projector-dim", "32",
         "--batch-size", "4", "--num-workers", "1", "--sampling-steps", "2", "--report-to", "tensorboard",
         "--checkpointing-steps", "1", "--keep-last", "1", "--eval-steps", "2", "--eval-samples", "5",
         "--ref-batch", str(folder / "reference.npz"), "--features", f"local-dir:{encoder_folder}"])
    return folder


def test_grids_scores_trackers_and_workers_do_not_change_training(scored, trained):
    assert list(disk.saved(scored / "run")) == [2]                # --keep-last 1
    first, second = checkpoint.read(scored / "run"), checkpoint.read(trained)
    assert all(same(first[part], second[part]) for part in ("model", "ema", "opt"))


def test_grid_and_tensorboard(scored):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [path.name for path in (scored / "run" / "grids").iterdir()] == ["0000002.png"]
    assert Image.open(scored / "run" / "grids" / "0000002.png").size == (4 * 34 + 2,) * 2
    events = EventAccumulator(str(scored / "run" / "REG")).Reload().Tags()
    assert "loss" in events["scalars"] and "fd_encoder_5" in events["scalars"] and "samples" in events["images"]


def test_scores_while_training_are_those_of_the_checkpoints_samples(scored, encoder_folder, tmp_path):
    generate.main(["--ckpt", str(scored / "run"), "--sample-dir", str(tmp_path), "--num-fid-samples", "5",
                   "--mode", "ode", "--num-steps", "50", "--cfg-scale", "1", "--per-proc-batch-size", "64"])
    samples, = tmp_path.rglob("samples.npz")
    result = evaluate(scored / "reference.npz", samples, load_extractor(f"local-dir:{encoder_folder}"))
    score, = (line["fd_encoder_5"] for line in lines(scored) if "fd_encoder_5" in line)
    assert score == pytest.approx(result["fd_encoder"], rel=1e-4)        # kernels may move a pixel by one level


def test_a_score_tells_its_number_of_samples():
    assert train.score_name("fid", 10_000) == "fid_10k" and train.score_name("fd_net", 2500) == "fd_net_2500"


def test_dry_run_writes_nothing(train_flags, tmp_path, capsys):
    train.main([*train_flags, "--dry-run"])
    out = capsys.readouterr().out
    assert '"encoder_depth": 4' in out and '"num_classes": 3' in out and not (tmp_path / "run").exists()


def test_dry_run_knows_the_published_figures(capsys):
    train.main(["--data-dir", "nowhere", "--dry-run"])
    assert "685.017M parameters (676.886M without projectors), " in capsys.readouterr().out


# ---- refusals

def test_a_damaged_file_is_named_by_its_loader_worker(train_flags, data_dir, tmp_path, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    damaged = tmp_path / "data" / "images" / "00000" / "img00000005.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert str(damaged) in refused(capsys, train_flags, "--data-dir", tmp_path / "data", "--num-workers", 1)


def test_another_decoder_is_refused(train_flags, vae_folder, tmp_path, capsys):
    shutil.copytree(vae_folder, tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.25'))
    assert "latent scale" in refused(capsys, train_flags, "--vae", tmp_path / "vae", "--sampling-steps", 1)


def test_encoders_without_class_token_serve_repa_only(train_flags, encoder_folder, tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    folder = shutil.copytree(encoder_folder, tmp_path / "pooled")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= dict(class_token=False, global_pool="avg", fc_norm=False)
    (folder / "config.json").write_text(json.dumps(config))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **config["model_args"])
    save_file(model.state_dict(), folder / "model.safetensors")
    flags = [*train_flags, "--enc-type", f"local-dir:{folder}"]
    assert "class token" in refused(capsys, flags)
    assert run(flags, "--method", "repa", steps=1)["architecture"]["z_dims"] == (32,)


def test_processes_that_are_not_joined_are_refused(train_flags, monkeypatch, capsys):
    """Plain torchrun on a CPU: WORLD_SIZE is 2, but accelerate sees one process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes" in refused(capsys, train_flags)


@pytest.mark.parametrize(("flags", "word"), [
    (["--data-dir", "nowhere"], "nowhere"),
    (["--num-classes", "2"], "label"),
    (["--resolution", "64"], "64"),
    (["--batch-size", "3", "--gradient-accumulation-steps", "2"], "multiple of 2"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--model", "SiT-M/2"], "SiT-M/2"),
    (["--encoder-depth", "7"], "6 blocks"),
    (["--enc-type", "nothing"], "--enc-type nothing"),
    (["--enc-type", "dinov2-vit-s", "--encoder-weights", "nowhere"], "nowhere"),
    (["--vae", "nowhere", "--sampling-steps", "1"], "nowhere"),
    (["--method", "repa", "--align", "class"], "--align class"),
    (["--proj-coeff", "0", "--align", "class"], "--align class"),
    (["--mixed-precision", "fp16"], "CUDA"),
    (["--cfg-prob", "1.5"], "--cfg-prob 1.5"),
    (["--learning-rate", "nan"], "--learning-rate nan"),
    (["--adam-beta1", "1"], "--adam-beta1 1"),
    (["--max-grad-norm", "0"], "--max-grad-norm 0"),
    (["--num-workers", "-1"], "--num-workers -1"),
    (["--output-dir", "README.md/x"], "README.md/x"),
    (["--init-weights", "nowhere.pt"], "nowhere.pt"),
    (["--resume-step", "1", "--resume", "none"], "--resume none"),
    (["--cached-features", "require"], "--cached-features require"),
    (["--cached-features", "require", "--method", "sit"], "--method sit"),
    (["--eval-steps", "2"], "--ref-batch"),
    (["--ref-batch", "x.npz"], "--eval-steps"),
    (["--eval-steps", "2", "--ref-batch", "nowhere.npz"], "nowhere.npz"),
    (["--eval-samples", "1"], "--eval-samples 1"),
    (["--dry-run", "--data-dir", "nowhere", "--resolution", "100"], "multiple of 16"),
])
def test_mistakes_end_with_one_line_before_the_first_step(train_flags, tmp_path, capsys, flags, word):
    assert word in refused(capsys, train_flags, *flags)
    assert not (tmp_path / "run").exists()
