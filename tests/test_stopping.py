"""Signals: each finishes the step and saves, a second ends at once, ranks stop together, none outlives the launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models import checkpoint
from runtime import launch as processes
from runtime import run as runs
from runtime.stopping import STOPPED, SUPERVISED, StopRequest
from tests.test_train import ROOT, run

PATIENCE = 300  # seconds after which a test gives up; none is measured


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; what only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- one process

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.asked == number and stop.agreed()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("environment", "status"), [({}, 128 + signal.SIGUSR1), ({SUPERVISED: "1"}, 0)])
def test_a_second_signal_ends_at_once_unless_the_launcher_counts(environment, status):
    program = ("import os, signal, time; from runtime.stopping import StopRequest\n"
               "with StopRequest() as stop: os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); "
               "time.sleep(1); os.kill(os.getpid(), signal.SIGUSR1)")
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **environment}).returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_training_finishes_its_step_saves_and_says_so(train_flags, tmp_path, monkeypatch, capsys, number):
    """And the same command ends where an undisturbed run does, to the bit."""
    import train

    straight = run([*train_flags, "--output-dir", str(tmp_path / "straight")], steps=4)
    original = train.update

    def interrupted(*args):
        os.kill(os.getpid(), number)                              # in the middle of the first step
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", interrupted)
        with pytest.raises(SystemExit) as ended:
            run(train_flags, steps=4)
    assert ended.value.code == STOPPED
    assert f"stopped by {number.name} after step 1: give the same command again" in capsys.readouterr().err
    assert list(runs.saved(tmp_path / "run")) == [1]
    resumed = run(train_flags, steps=4)
    assert all((resumed[part][name] == value).all() for part in ("model", "ema") for name, value in straight[part].items())


def test_training_saves_though_nobody_reads_its_output(train_flags, tmp_path):
    """As with `| tee log`, which Ctrl-C ends first."""
    program = f"""
import os, signal, train
original = train.update
def update(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return original(*args)
train.update = update
train.main({train_flags!r})
"""
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(PATIENCE) == STOPPED and list(runs.saved(tmp_path / "run")) == [1]


def test_a_signal_before_the_first_step_leaves_nothing(train_flags, tmp_path, monkeypatch):
    import train

    original = train.build_model
    monkeypatch.setattr(train, "build_model", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a))
    with pytest.raises(SystemExit) as ended:
        run(train_flags, steps=4)
    assert ended.value.code == STOPPED and runs.saved(tmp_path / "run") == {}


@pytest.mark.parametrize("steps", [1, 3])
def test_scoring_is_given_up_and_made_when_the_run_goes_on(train_flags, encoder_folder, tmp_path, monkeypatch, steps):
    """Ten thousand samples would take longer than the queue waits."""
    import numpy as np

    import train

    np.savez(tmp_path / "reference.npz", np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    drawn, original = [], train.sample_images

    def sample(*args):
        drawn.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train, "sample_images", sample)
    with pytest.raises(SystemExit) as ended:
        run(train_flags, "--eval-steps", 1, "--eval-samples", 64 * 3, "--ref-batch", tmp_path / "reference.npz",
            "--features", f"local-dir:{encoder_folder}", steps=steps)
    assert ended.value.code == STOPPED and len(drawn) == 1 and list(runs.saved(tmp_path / "run")) == [1]
    monkeypatch.setattr(train, "sample_images", original)
    flags = ["--ref-batch", tmp_path / "reference.npz", "--features", f"local-dir:{encoder_folder}"]
    # What is owed is made first, also at the last step.
    run(train_flags, "--eval-steps", 1, "--eval-samples", 64 * 3, *flags, steps=steps)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fd_encoder_192" in line] == list(range(1, steps + 1))


# ---- the launcher, on programs that start quickly

WAITING = "import os, sys, time; print(os.getpid(), flush=True); "


def start(program: str, ranks: int, tmp_path, **environment) -> tuple[subprocess.Popen, list[int]]:
    """A launcher of so many ranks of the program; and the ranks' process ids, when all have printed theirs."""
    launch = (f"import sys; from runtime import launch as processes; processes.GRACE = 0.5\n"
              f"sys.exit(processes.supervise([sys.executable, '-c', {program!r}], [dict(RANK=str(i)) for i in range({ranks})])[0])")
    with open(tmp_path / "printed", "w") as printed:
        launcher = subprocess.Popen([sys.executable, "-c", launch], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT,
                                    env={**os.environ, **environment})
    wait_for(lambda: len((tmp_path / "printed").read_text().split()) >= ranks, launcher)
    return launcher, [int(pid) for pid in (tmp_path / "printed").read_text().split()[:ranks]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_launcher_forwards_a_signal_once_and_ends_with_the_ranks_status(tmp_path, number):
    program = (f"import signal; got = []; signal.signal({int(number)}, lambda *_: got.append(1)); {WAITING}\n"
               f"while not got: time.sleep(0.01)\ntime.sleep(0.3); assert len(got) == 1; sys.exit({STOPPED})")
    launcher, ranks = start(program, 2, tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(PATIENCE) == STOPPED and not any(map(alive, ranks))


def test_a_second_signal_kills_the_ranks(tmp_path):
    program = f"import signal; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)]; {WAITING} time.sleep(600)"
    launcher, ranks = start(program, 2, tmp_path)
    launcher.send_signal(signal.SIGTERM)
    launcher.send_signal(signal.SIGINT)                           # at once: as from another side (two equal ones would be one)
    time.sleep(1)
    assert all(map(alive, ranks))
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(PATIENCE) == 128 + signal.SIGUSR1
    wait_for(lambda: not any(map(alive, ranks)))


@pytest.mark.parametrize(("end", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("raise ValueError('its message')", 1)])
def test_a_rank_that_fails_ends_the_others(tmp_path, end, status):
    program = f"{WAITING}\ntime.sleep(0.5)\nif os.environ['RANK'] == '1': {end}\ntime.sleep(600)"
    launcher, ranks = start(program, 2, tmp_path)
    assert launcher.wait(PATIENCE) == status
    wait_for(lambda: not any(map(alive, ranks)))
    assert ("its message" in (tmp_path / "printed").read_text()) == ("message" in end)


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    """Nor do the workers that a rank left."""
    launcher, ranks = start(f"{WAITING} time.sleep(600)", 2, tmp_path)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(alive, ranks)))
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)"
    launcher, workers = start(child, 1, tmp_path)
    assert launcher.wait(PATIENCE) == 0
    wait_for(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize(("environment", "sentence"), [
    ({"SLURM_JOB_ID": "42"}, "requeued Slurm job 42"),
    ({"SLURM_JOB_ID": "42", "NNODES": "2", "NODE_RANK": "1"}, None),              # the first node does it
    ({"SLURM_JOB_ID": "13"}, "Slurm did not requeue job 13: job is held"),
    ({"SLURM_JOB_ID": "42", "PATH": "nowhere"}, "Slurm did not requeue job 42: "),
    ({}, "this is no Slurm job"),
])
def test_a_stopped_job_goes_back_to_the_queue(tmp_path, monkeypatch, capsys, environment, sentence):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nif [ $2 = 13 ]; then echo job is held >&2; exit 1; fi\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", environment.get("PATH", f"{tmp_path}:{os.environ['PATH']}"))
    processes.requeue(environment)
    said = capsys.readouterr().err
    assert (sentence in said) if sentence else said == ""
    asked = tmp_path / "asked"
    assert asked.exists() == ("SLURM_JOB_ID" in environment and not {"NNODES", "PATH"} & environment.keys())


@pytest.mark.parametrize(("status", "signals", "asked"), [(75, [15], True), (75, [], True), (143, [15], True),
                                                        (0, [15], False), (2, [], False), (75, [2], False), (138, [15, 10], False)])
def test_only_a_run_that_a_signal_ended_is_requeued(monkeypatch, status, signals, asked):
    requeued = []
    monkeypatch.setenv("REQUEUE", "1")
    monkeypatch.setattr(processes, "supervise", lambda *_: (status, signals))
    monkeypatch.setattr(processes, "requeue", lambda _: requeued.append(1))
    with pytest.raises(SystemExit) as ended:
        processes.main(["train.py"])
    assert ended.value.code == status and bool(requeued) == asked


# ---- the whole way: train.sh, two ranks with loader workers

def ranks_of(launcher: int) -> dict[int, list[int]]:
    """The launcher's children and their children."""
    def children(pid):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    return {rank: children(rank) for rank in children(launcher)}


def test_train_sh_stops_all_ranks_at_one_step_and_resumes(train_flags, data_dir, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "NUM_GPUS": "2", "OMP_NUM_THREADS": "1", "DATA_DIR": str(data_dir)}
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "REQUEUE": "1"}
    command = ["bash", "train.sh", "toy", *train_flags, "--num-workers", "1"]
    experiment = tmp_path / "run"
    log = open(tmp_path / "log", "w")  # noqa: SIM115  (the process writes on)
    shell = subprocess.Popen([*command, "--max-train-steps", "100000"], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    wait_for(lambda: (experiment / "metrics.jsonl").exists() and (experiment / "metrics.jsonl").read_text().count("\n") > 2, shell)
    family = ranks_of(shell.pid)
    assert len(family) == 2 and all(len(workers) == 1 for workers in family.values())
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(PATIENCE) == STOPPED, (tmp_path / "log").read_text()
    wait_for(lambda: not any(alive(pid) for rank, workers in family.items() for pid in (rank, *workers)))
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    (step, path), = runs.saved(experiment).items()
    state = checkpoint.read(path)
    assert state["steps"] == state["draws"] == step > 2 and state["processes"] == 2
    assert re.search(rf"stopped by SIGUSR1 after step {step}: ", (tmp_path / "log").read_text())

    done = subprocess.run([*command, "--max-train-steps", str(step + 1)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"resumed {path} at step {step}" in done.stdout
    steps = [json.loads(line)["step"] for line in (experiment / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 2))


def test_a_rank_that_raises_ends_train_sh_with_its_message(train_flags, data_dir, tmp_path):
    """Rank 0 waits for the gradients of rank 1 and does not hang."""
    program = f"""
import os, train
if os.environ["RANK"] == "1":
    def fail(*_):
        raise train.UserError("rank 1 has met something")
    train.update = fail
train.main({[*train_flags, "--num-workers", "1", "--max-train-steps", "100000"]!r})
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "NUM_GPUS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "runtime.launch", str(tmp_path / "program.py")], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1] == "error: rank 1 has met something"


def test_a_failure_ends_a_process_that_has_loader_workers(train_flags, tmp_path):
    """Workers that are shielded from signals do not keep it."""
    program = f"""
import train
def fail(*_):
    raise train.UserError("something")
train.update = fail
train.main({[*train_flags, "--num-workers", "2"]!r})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1] == "error: something"
