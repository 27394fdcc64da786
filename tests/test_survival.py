"""Runs that survive: lost output, failed reads, killed workers, other processes, full disks, trackers that fail."""

import ctypes
import errno
import itertools
import multiprocessing
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

import generate
import train
from dataset import GlobalBatchSampler
from evaluations import evaluator
from models import checkpoint
from preprocessing import dataset_tools
from runtime import files
from runtime import run as disk
from runtime.files import lock, read_patiently, write_whole
from runtime.log import Log, read_lines, start_tracker, write_line
from runtime.messages import MayPass, UserError, without_traceback
from runtime.stopping import STOPPED, StopRequest
from tests import forks
from tests.stress.kills import children, same
from tests.stress.races import outcome

ROOT = Path(__file__).parents[1]
MANY = ["--max-train-steps", "100", "--checkpointing-steps", "100"]


def ended(main, argv, capsys) -> tuple[int, str]:
    """The exit status of a program and its last line on stderr."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, argv)])
    return stopped.value.code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]


# ---- output that is lost

PRINTING = """
import sys, warnings
from tqdm import tqdm
from runtime.messages import UserError, notice, say, without_traceback

@without_traceback
def main():
    say("one \u00b7 \u4e00 \u00e9")
    notice("two \u4e00")
    for _ in tqdm(range(3), desc="bar \u4e00"):
        print("three " * 3000)
    warnings.warn("four")
    if len(sys.argv) > 1:
        raise UserError("a sentence \u4e00")

main()
"""


def printing(*argv, **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", PRINTING, *argv], cwd=ROOT, timeout=60, **options)


@pytest.fixture(params=["full", "pipe", "terminal"])
def lost(request):
    """A file descriptor that cannot be written: a full disk, a pipe without reader, a terminal that is gone."""
    if request.param == "full":
        handle = os.open("/dev/full", os.O_WRONLY)
    else:
        other, handle = os.pipe() if request.param == "pipe" else pty.openpty()
        os.close(other)
    yield handle
    os.close(handle)


@pytest.mark.parametrize("which", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_nothing_that_is_printed_ends_a_program(lost, which):
    assert printing(**dict.fromkeys(which, lost)).returncode == 0
    assert printing("fail", **dict.fromkeys(which, lost)).returncode == 2


def test_closed_output_does_not_end_a_program():
    command = [sys.executable, "-c", PRINTING]
    assert subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "-", *command], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "gb2312", "euc-jp"])
def test_unknown_characters_are_replaced(encoding):
    done = printing("fail", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 2 and done.stdout.startswith(b"one ") and b"error: a sentence " in done.stderr


@pytest.mark.parametrize("program", ["train", "convert", "encode", "generate", "evaluator"])
def test_programs_work_without_output(program, train_flags, data_dir, trained, vae_folder, encoder_folder, tmp_path,
                                      monkeypatch):
    images, tools = data_dir / "images", dataset_tools.main
    main, argv, made = {
        "train": (train.main, [*train_flags, "--max-train-steps", "1"], "run/checkpoints/0000001.pt"),
        "convert": (tools, ["convert", "--source", images, "--dest", tmp_path / "x", "--resolution=32x32",
                            "--workers=1"], "x/dataset.json"),
        "encode": (tools, ["encode", "--source", images, "--dest", tmp_path / "x.zip", f"--model-url={vae_folder}"],
                   "x.zip"),
        "generate": (generate.main, ["--ckpt", trained, "--num-fid-samples=2", "--num-steps=2", f"--vae={vae_folder}",
                                     "--sample-dir", tmp_path / "s"], "s/*/samples.npz"),
        "evaluator": (evaluator.main, ["--ref-batch", images, "--sample-batch", images, "--metrics=fd",
                                       f"--features=local-dir:{encoder_folder}", "--output", tmp_path / "x.json"],
                      "x.json")}[program]
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w"))  # noqa: SIM115  (for the test)
    main([*map(str, argv)])
    assert list(tmp_path.glob(made))


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nMore")


@pytest.mark.parametrize("fail", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60),
                                  raise_out_of_memory])
def test_too_little_memory_is_a_sentence(capsys, fail):
    """PyTorch's own errors are RuntimeErrors; others keep their traceback."""
    code, last = ended(without_traceback(lambda argv: fail()), [], capsys)
    assert code == 2 and last.startswith("error: not enough memory (")
    with pytest.raises(RuntimeError, match="a defect"):
        without_traceback(lambda: (_ for _ in ()).throw(RuntimeError("a defect")))()


# ---- signals

def test_a_closed_terminal_stops_a_run_but_not_under_nohup():
    def hung_up(ignored: bool) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os._exit(stop.agreed())

    processes = [multiprocessing.get_context("fork").Process(target=hung_up, args=(one,)) for one in (False, True)]
    for process in processes:
        process.start()
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 0]


# ---- failed reads

@pytest.fixture
def third(data_dir, tmp_path):
    """A copy of the data, and a file of it that is needed in the third step only."""
    folder = shutil.copytree(data_dir, tmp_path / "data")
    for kind in ("images", "vae-sd"):
        (folder / kind / "catalogue.npz").unlink(missing_ok=True)
    batch = next(itertools.islice(GlobalBatchSampler(12, 4, seed=0), 2, None))
    return folder, sorted((folder / "vae-sd").rglob("*.npy"))[batch[0]]


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def make_unreadable(file: Path) -> None:
    """Reading it gives EIO, as of a network disk."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(("fail", "status"), [(damage, 2), (make_unreadable, STOPPED)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_ends_a_run_that_is_saved(train_flags, third, tmp_path, capsys, monkeypatch, fail,
                                                             status, workers):
    """With the file, the same command goes on to the bits of a run that was not disturbed."""
    monkeypatch.setattr(files, "READ_PAUSES", (0.01, 0.01))
    data, file = third
    good = file.read_bytes()
    fail(file)
    flags = [*train_flags, "--data-dir", data, "--num-workers", workers, "--gradient-accumulation-steps", "2"]
    code, last = ended(train.main, [*flags, *MANY], capsys)
    assert code == status and last.startswith("error: ") and str(file) in last
    assert list(disk.saved(tmp_path / "run")) == [2] and [line["step"] for line in log(tmp_path)] == [1, 2]
    if workers == 0 and fail == damage:
        file.write_bytes(good)
        for name in ("run", "straight"):
            AcceleratorState._reset_state(reset_partial_state=True)
            train.main([*map(str, flags), "--max-train-steps", "4", "--exp-name", name])
        resumed, straight = (checkpoint.read(tmp_path / name) for name in ("run", "straight"))
        assert all(same(resumed[part], straight[part]) for part in ("model", "ema", "opt", "steps"))


@pytest.mark.parametrize("place", ["vae-sd", "vae-sd/dataset.json"])
def test_a_failed_read_before_the_first_step_does_not_say_try_again(train_flags, third, tmp_path, capsys, monkeypatch,
                                                                    place):
    """Status 75 would requeue a job for ever; at the first batch, and before."""
    monkeypatch.setattr(files, "READ_PAUSES", (0.01, 0.01))
    data, _ = third
    for file in (data / place).rglob("*.npy") if place == "vae-sd" else [data / place]:
        make_unreadable(file)
    code, last = ended(train.main, [*train_flags, "--data-dir", data, *MANY], capsys)
    assert code == 2 and last.startswith("error: ") and "cannot be read" in last
    assert not disk.saved(tmp_path / "run")


def log(folder: Path) -> list[dict]:
    return read_lines(folder / "run" / "metrics.jsonl")


def train_to_the_end(rank: int, flags: list, folder: Path) -> None:
    try:
        train.main([*map(str, flags)])
    except SystemExit as stopped:
        (folder / f"status{rank}").write_text(str(stopped.code))


def test_all_ranks_stop_where_one_cannot_read(train_flags, third, tmp_path):
    data, file = third
    damage(file)
    forks.two_ranks(train_to_the_end, [*train_flags, "--data-dir", data, *MANY], tmp_path)
    assert [(tmp_path / f"status{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert list(disk.saved(tmp_path / "run")) == [2]


def test_a_killed_loader_worker_ends_a_run_that_is_saved(train_flags, tmp_path, capsys):
    def kill_worker() -> None:
        while not log(tmp_path):
            time.sleep(0.01)
        worker, = set(children(os.getpid())) - before
        os.kill(worker, signal.SIGKILL)

    before = set(children(os.getpid()))
    killer = threading.Thread(target=kill_worker)
    killer.start()
    code, last = ended(train.main, [*train_flags, "--num-workers", 1, "--max-train-steps", 10**6], capsys)
    killer.join()
    assert code == STOPPED and "worker was killed" in last
    (step, _), = disk.saved(tmp_path / "run").items()
    assert log(tmp_path)[-1]["step"] == step


@pytest.mark.parametrize(("number", "passes_at", "count", "error"), [
    (errno.EIO, 3, 3, None), (errno.ESTALE, 9, 3, MayPass), (errno.ENOENT, 3, 1, UserError)])
def test_a_read_is_tried_three_times(monkeypatch, number, passes_at, count, error):
    tries = []

    def read() -> bytes:
        tries.append(0)
        if len(tries) < passes_at:
            raise OSError(number, "failed")
        return b"data"

    monkeypatch.setattr(files, "READ_PAUSES", (0.01, 0.01))
    if error is None:
        assert read_patiently(read, "x") == b"data"
    else:
        with pytest.raises(error, match="x: cannot be read"):
            read_patiently(read, "x")
    assert len(tries) == count


# ---- shared memory, TMPDIR, read-only disks

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18


def mounted(function, *mounts) -> int:
    """The exit status of `function()` in a forked process with other mounts: (source, place, kind, flags, data)."""

    def child() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        for source, place, kind, flags, data in mounts:
            failed = failed or libc.mount(source, os.fsencode(place), kind, ctypes.c_ulong(flags), data)
        if failed:
            os._exit(99)
        function()

    process = forks.start(child)
    status = process.wait(300)
    if status == 99:
        pytest.skip("mounting is not permitted here")
    return status


@pytest.mark.parametrize("size", ["4k", "40k", "200k"])
def test_too_little_shared_memory_is_named(train_flags, size, capfd):
    flags = [*train_flags, "--num-workers", "2", "--batch-size", "12", *MANY]
    status = mounted(lambda: train.main(flags), (b"tmpfs", "/dev/shm", b"tmpfs", 0, f"size={size}".encode()))
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and "/dev/shm" in last and "--shm-size" in last


@pytest.mark.parametrize("name", ["read-only", "read-only/run"])
def test_a_read_only_experiment_is_a_sentence(train_flags, trained, tmp_path, capfd, name):
    folder = tmp_path / "read-only"
    shutil.copytree(trained, folder / "run")
    flags = [*train_flags, "--output-dir", str(folder), "--max-train-steps", "9"]
    place = str(tmp_path / name)
    status = mounted(lambda: train.main(flags), (os.fsencode(place), place, None, MS_BIND, None),
                     (None, place, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None))
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and "Read-only" in last


def test_a_tmpdir_that_is_too_long_for_sockets_is_refused(train_flags, tmp_path, capsys, monkeypatch):
    folder = tmp_path / ("x" * 76)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))         # as TMPDIR sets it
    code, last = ended(train.main, [*train_flags, "--num-workers", 1, "--max-train-steps", 1], capsys)
    assert code == 2 and "TMPDIR" in last and not (tmp_path / "run").exists()


# ---- two processes at once

def test_two_writers_of_one_file(tmp_path):
    """The one that ends last wins, and both files were whole."""
    def slow(partial: Path) -> None:
        with open(partial, "wb") as file:
            file.write(b"a" * 100_000)
            file.flush()
            write_whole(tmp_path / "x", lambda other: other.write_bytes(b"b" * 10))
            file.write(b"a" * 100_000)

    write_whole(tmp_path / "x", slow)
    assert (tmp_path / "x").read_bytes() == b"a" * 200_000 and len(list(tmp_path.iterdir())) == 1


def test_old_temporary_files_of_killed_writers_are_removed(tmp_path):
    for name, age in ((".[x].0.partial", 2 * files.DAY), (".[x].1.partial", 0), (".y.0.partial", 2 * files.DAY)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_whole(tmp_path / "[x]", Path.touch)
    assert {path.name for path in tmp_path.iterdir()} == {"[x]", ".[x].1.partial", ".y.0.partial"}


@pytest.mark.parametrize(("program", "place", "inside"), [
    ("train", "run", ""), ("generate", "s/*", ""), ("encode", "x", ".tmp"), ("encode", "x.zip.partial", ".tmp"),
    ("convert", "x", ".tmp")])
def test_what_another_process_writes_is_refused(train_flags, data_dir, trained, vae_folder, tmp_path, capsys,
                                                monkeypatch, program, place, inside):
    """And is written once that has ended."""
    source, dest = ["--source", data_dir / "images"], ["--dest", tmp_path / place.removesuffix(".partial")]
    main, argv = {
        "train": (train.main, [*train_flags, "--max-train-steps", "1"]),
        "generate": (generate.main, ["--ckpt", trained, "--num-fid-samples=2", "--num-steps=2", "--sample-dir",
                                     tmp_path / "s", f"--vae={vae_folder}"]),
        "encode": (dataset_tools.main, ["encode", *source, *dest, f"--model-url={vae_folder}"]),
        "convert": (dataset_tools.main, ["convert", *source, *dest, "--resolution=32", "--workers=0"])}[program]
    if program == "generate":                                     # its folder has a long name: make it
        main([*map(str, argv)])
        folder, = tmp_path.glob(place)
        (folder / "samples.npz").unlink()
    else:
        folder = tmp_path / place
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    holder = forks.start(hold, folder, inside, tmp_path / "held")
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    code, last = ended(main, argv, capsys)
    holder.kill()
    holder.wait()
    assert code == 2 and "another process" in last
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*map(str, argv)])
    assert not list(tmp_path.rglob("*.partial"))


def hold(folder: Path, inside: str, sign: Path) -> None:
    held = lock(folder, "", inside)
    sign.touch()
    time.sleep(100)
    held.lock.release()


@pytest.mark.parametrize("name", ["x", "x.zip"])
def test_two_encoders_of_one_destination(data_dir, vae_folder, tmp_path, monkeypatch, name):
    """Either both agree, or one is refused; the result is whole."""
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    argv = ["encode", "--source", str(data_dir / "images"), f"--model-url={vae_folder}", "--dest"]
    two = [forks.start(dataset_tools.main, [*argv, str(tmp_path / "raced" / name)]) for _ in range(2)]
    assert sorted(process.wait(120) for process in two) in ([0, 0], [0, 2])
    dataset_tools.main([*argv, str(tmp_path / "alone" / name)])
    assert outcome(tmp_path / "raced") == outcome(tmp_path / "alone")


# ---- weights that are not finite

@pytest.mark.parametrize(("rate", "word"), [("1e38", "weights are not finite"), ("1e20", "updates in a row")])
def test_a_rate_that_blows_up_keeps_the_last_good_checkpoint(train_flags, tmp_path, capsys, monkeypatch, rate, word):
    """Weights that are not finite are not written; while updates are skipped, nothing older is removed."""
    monkeypatch.setattr(train, "share", float)                    # the flag's type refuses such rates
    flags = [*train_flags, "--keep-last", "1", "--checkpointing-steps", "2"]
    train.main([*flags, "--max-train-steps", "2"])
    good = disk.checkpoint_path(tmp_path / "run", 2)
    before = good.read_bytes()
    code, last = ended(train.main, [*flags, "--max-train-steps", "9", "--learning-rate", rate,
                                    "--max-skipped-updates", "3"], capsys)
    assert code == 2 and word in last and "--learning-rate" in last and good.read_bytes() == before
    for path in disk.saved(tmp_path / "run").values():
        state = checkpoint.read(path)
        assert all(weight.isfinite().all() for part in ("model", "ema") for weight in state[part].values())


# ---- trackers

class Failing(GeneralTracker):
    """A tracker whose disk is full."""

    name, requires_logging_directory, tracker, main_process_only = "failing", False, None, False

    def log(self, values, step=None, **_):
        raise OSError(28, "No space left on device")

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass


def test_a_tracker_that_fails_is_left_out(tmp_path, capsys):
    accelerator = Accelerator(cpu=True, log_with=[Failing()])
    start_tracker(accelerator, tmp_path, "none", {})
    for step in (1, 2):
        write_line(Log(tmp_path / "metrics.jsonl", step), accelerator, {"step": step, "loss": 1.0}, [])
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().err.count("tracker") == 1


def test_a_tracker_that_cannot_start_does_not_end_the_run(train_flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "REG").touch()                            # where TensorBoard wants a folder
    train.main([*train_flags, "--max-train-steps", "1", "--report-to", "tensorboard"])
    assert "tracker" in capsys.readouterr().err and len(log(tmp_path)) == 1


def test_a_grid_that_cannot_be_written_does_not_end_the_run(train_flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "grids").touch()
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([*train_flags, "--max-train-steps", "2", "--sampling-steps", "1"])
    assert capsys.readouterr().err.count("0000001.png") == 1 and list(disk.saved(tmp_path / "run")) == [2]


@pytest.mark.parametrize("due", [["--sampling-steps", "3"], ["--eval-steps", "3", "--eval-samples", "4"]])
def test_samples_that_are_not_finite_end_the_run_with_its_steps_saved(train_flags, trained, data_dir, encoder_folder,
                                                                      due, tmp_path, capsys):
    """With weights that are finite; a grid or a score."""
    folder = shutil.copytree(trained, tmp_path / "run")
    state = checkpoint.read(folder, mmap=False)
    state["ema"]["final_layer.linear.bias"][0] = 3e38
    disk.save(folder, state)
    AcceleratorState._reset_state(reset_partial_state=True)
    scored = ["--ref-batch", str(data_dir / "images"), "--features", f"local-dir:{encoder_folder}"]
    with pytest.raises(SystemExit) as ended:
        train.main([*train_flags, "--max-train-steps", "9", *due, *(scored if "--eval-steps" in due else [])])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "step 3: the samples are not finite" in said and f"{due[0]} 0" in said
    assert list(disk.saved(folder)) == [2, 3]


def test_a_score_that_fails_ends_the_run_with_its_steps_saved(train_flags, data_dir, encoder_folder, tmp_path, capsys):
    """The reference is read at the first score only."""
    damaged = shutil.copytree(data_dir / "images", tmp_path / "reference")
    picture = next(damaged.rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(SystemExit) as ended:
        train.main([*train_flags, "--max-train-steps", "9", "--eval-steps", "3", "--eval-samples", "4", "--ref-batch",
                    str(damaged), "--features", f"local-dir:{encoder_folder}"])
    assert ended.value.code == 2 and picture.name in capsys.readouterr().err
    assert list(disk.saved(tmp_path / "run")) == [3]


def test_a_copied_experiment_is_another_run_of_wandb(tmp_path):
    def wandb_id(name: str) -> str:
        start_tracker(Accelerator(cpu=True), tmp_path / name, "wandb", {})
        return (tmp_path / name / "wandb_id.txt").read_text().split()[0]

    first = wandb_id("a")
    assert wandb_id("a") == first
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert wandb_id("b") != first and wandb_id("b") == wandb_id("b")
    (tmp_path / "a" / "wandb_id.txt").write_text("0123")          # without a name, as it was written once
    assert wandb_id("a") == "0123"
