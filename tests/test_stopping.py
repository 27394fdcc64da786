"""Signals: the first finishes the step and saves, a second ends at once."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

import train
from runtime import run as disk
from runtime.stopping import STOPPED, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    outside = signal.signal(number, signal.default_int_handler)   # the suite may run under nohup
    with StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.asked == number and stop.agreed()
    assert signal.signal(number, outside) is signal.default_int_handler


@pytest.mark.parametrize(("launched", "status"), [(False, 128 + signal.SIGUSR1), (True, 0)])
def test_a_second_signal_ends_at_once_except_under_the_launcher(monkeypatch, launched, status):
    def signalled() -> None:
        with StopRequest():
            for number, pause in ((signal.SIGTERM, 0), (signal.SIGTERM, 0.7), (signal.SIGUSR1, 0)):
                os.kill(os.getpid(), number)
                time.sleep(pause)

    monkeypatch.setenv("LAUNCHER_PID", str(os.getpid()) if launched else "")
    process = multiprocessing.get_context("fork").Process(target=signalled)
    process.start()
    process.join(60)
    assert process.exitcode == status


# ---- training

def train_and_signal(flags: list[str], when) -> None:
    """Train for many steps; send SIGUSR1 as soon as `when()`; expect the exit status of a stop."""
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set() and not when():
            time.sleep(0.002)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags, "--max-train-steps", "100000"])
        assert stopped.value.code == STOPPED
    finally:
        ended.set()
        sender.join()


def test_training_saves_at_a_signal_and_resumes_to_the_bit(train_flags, tmp_path, capsys):
    metrics = tmp_path / "run" / "metrics.jsonl"
    train_and_signal(train_flags, lambda: metrics.exists() and metrics.read_text())
    ((step, _),) = disk.saved(tmp_path / "run").items()
    assert f"stopped by SIGUSR1 after step {step}" in capsys.readouterr().err

    train.main([*train_flags, "--max-train-steps", str(step + 1)])
    train.main([*train_flags, "--max-train-steps", str(step + 1), "--exp-name", "straight"])
    resumed, straight = (torch.load(disk.checkpoint_path(tmp_path / name, step + 1), weights_only=True)
                         for name in ("run", "straight"))
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][name], value) for name, value in straight[part].items())


def test_a_signal_before_the_first_step_saves_nothing(train_flags, tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    train_and_signal(train_flags, lambda: signal.getsignal(signal.SIGUSR1) != before)
    assert disk.saved(tmp_path / "run") == {}


def test_shielded_loader_workers_end_with_a_failure(train_flags, data_dir, tmp_path, capsys):
    """A worker's UserError is one sentence, and no worker that ignores signals keeps the process."""
    broken = tmp_path / "data"
    broken.mkdir()
    (broken / "images").symlink_to(data_dir / "images")
    (broken / "vae-sd" / "00000").mkdir(parents=True)
    for path in (data_dir / "vae-sd").rglob("*.*"):
        (broken / path.relative_to(data_dir)).write_bytes(path.read_bytes())
    bad = max((broken / "vae-sd").rglob("*.npy"))
    bad.write_bytes(b"nothing")
    with pytest.raises(SystemExit) as ended:
        train.main([*train_flags, "--data-dir", str(broken), "--num-workers", "2", "--max-train-steps", "9"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and bad.name in last
    for worker in multiprocessing.active_children():              # as the interpreter does when it ends
        worker.terminate()
        worker.join(60)
        assert worker.exitcode is not None
