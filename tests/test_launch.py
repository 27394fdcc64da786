"""The launcher: what it starts, how it ends, what it forwards, when it requeues; train.sh on two ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime import run as disk
from runtime.launch import Plan, blocks, is_first_node, launch, launch_plan, requeue, require_joined
from runtime.messages import UserError
from runtime.stopping import STOPPED

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds after which a test gives up
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "passive"}
SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[0-1]"}


def wait_for(condition) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    return [int(child) for one in Path(f"/proc/{pid}/task").glob("*/children") for child in one.read_text().split()]


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that appends its arguments to the file returned here, and holds job 13."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
                       '[ "$2" != 13 ] || { echo job is held >&2; exit 1; }\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return tmp_path / "asked"


# ---- the plan

@pytest.mark.parametrize(("environment", "gpus", "plan"), [
    ({}, 1, Plan(1, {})),
    ({}, 8, Plan(8, {"OMP_NUM_THREADS": "1"})),
    ({"NUM_GPUS": "2", "OMP_NUM_THREADS": "3"}, 8, Plan(2, {})),              # the user's own value stays
    ({}, 0, Plan(1, {**CPU, "OMP_NUM_THREADS": "9"})),
    ({"NUM_GPUS": "2"}, 0, Plan(2, {**CPU, "OMP_NUM_THREADS": "4"})),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}, 1, Plan(1, {}, 2, 1, "a", 7)),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, 1, Plan(1, {}, 2, 1, "node0", 29500)),
    ({**SLURM, "SLURM_STEP_NODELIST": "rack[07-09,12]-n[3,5],big1"}, 1, Plan(1, {}, 2, 1, "rack07-n3", 29500)),
    ({**SLURM, "SLURM_JOB_NODELIST": "big1,node[0-1]"}, 1, Plan(1, {}, 2, 1, "big1", 29500)),
])
def test_a_plan_follows_the_machine_and_the_environment(environment, gpus, plan):
    assert launch_plan(environment, gpus, cores=9) == plan


@pytest.mark.parametrize(("environment", "word"), [
    ({"NUM_GPUS": "5"}, "NUM_GPUS=5"),
    ({"NUM_GPUS": "0"}, "NUM_GPUS=0"),
    ({"NUM_GPUS": "two"}, "NUM_GPUS=two"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
    ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK=2"),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, "--ntasks-per-node=1"),
    ({**SLURM, "SLURM_JOB_ID": "42"}, "srun"),                                # the batch script: no other node runs it
])
def test_an_impossible_plan_is_refused(environment, word):
    with pytest.raises(UserError, match=word):
        launch_plan(environment, gpus=4, cores=64)


def test_one_node_is_the_first():
    assert is_first_node({}) and is_first_node({"NODE_RANK": "1"})            # without NNODES a rank means nothing
    for nodes, rank in (("NNODES", "NODE_RANK"), ("SLURM_NNODES", "SLURM_NODEID")):
        assert [is_first_node({nodes: "2", rank: place}) for place in "01"] == [True, False]


def test_processes_that_did_not_join_are_refused(monkeypatch):
    require_joined(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_joined(2)
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU"):
        require_joined(1)


def test_blocks_cover_all_indices_in_order():
    assert blocks(7, 3) == [range(3), range(3, 6), range(6, 7)] and blocks(0, 3) == []


@pytest.mark.parametrize(("status", "signalled", "environment", "word"), [
    (75, signal.SIGTERM, {}, "requeued Slurm job 42"),
    (75, None, {}, "requeued Slurm job 42"),                                  # Slurm has signalled the ranks alone
    (143, signal.SIGTERM, {}, "requeued Slurm job 42"),                       # before the program listens to signals
    (75, signal.SIGINT, {}, None),
    (0, signal.SIGUSR1, {}, None),
    (2, None, {}, None),
    (75, signal.SIGUSR1, {"REQUEUE": "0"}, None),
    (75, signal.SIGUSR1, {"NNODES": "2", "NODE_RANK": "1"}, None),            # the first node does it
    (75, signal.SIGUSR1, {"SLURM_JOB_ID": "13"}, "job 13: job is held"),
    (75, signal.SIGUSR1, {"SLURM_JOB_ID": None}, "no Slurm job"),
])
def test_a_job_is_requeued_after_a_stop(scontrol, capsys, status, signalled, environment, word):
    requeue({"REQUEUE": "1", "SLURM_JOB_ID": "42"} | environment, status, signalled)
    printed = capsys.readouterr().err
    assert word in printed if word else printed == ""
    assert scontrol.exists() == bool(word and "job" in word and "no Slurm" not in word)


# ---- launching, in this process; the ranks are programs that import nothing heavy

@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    """`two_ranks(text)` launches a program on two CPU processes and returns the exit status."""
    for name in ("LAUNCHER_PID", "OMP_NUM_THREADS", *CPU):                    # restored afterwards
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("NUM_GPUS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(text: str) -> int:
        (tmp_path / "program.py").write_text(f"import os, signal, sys, time\nfrom runtime.messages import *\n{text}")
        return launch([str(tmp_path / "program.py"), "--flag"])

    return run


def test_ranks_know_their_place_and_print_to_the_terminal(two_ranks, capfd):
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_WAIT_POLICY"
    assert two_ranks(f"print(*(os.environ[name] for name in {names}), sys.argv[1:])") == 0
    printed = sorted(capfd.readouterr().out.splitlines())
    assert printed == ["0 0 2 2 passive ['--flag']", "1 1 2 2 passive ['--flag']"]


def test_a_single_process_joins_nobody(two_ranks, monkeypatch):
    monkeypatch.setenv("NUM_GPUS", "1")
    assert two_ranks("sys.exit(3 if {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} & os.environ.keys() else 0)") == 0


@pytest.mark.parametrize(("end", "status", "word"), [
    ("sys.exit(7)", 7, None),
    ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed by SIGKILL"),
    ("raise ValueError('some message')", 1, "ValueError: some message"),
    ("without_traceback(lambda: (_ for _ in ()).throw(UserError('a sentence')))()", 2, "error: a sentence"),
])
def test_a_rank_that_fails_ends_the_others(two_ranks, capfd, end, status, word):
    """Its message is the last line, though rank 0 prints as it ends."""
    rank_0 = "signal.signal(15, lambda *_: 1 / 0); time.sleep(600)"
    assert two_ranks(f"if os.environ['RANK'] == '0': {rank_0}\ntime.sleep(0.5); {end}") == status
    printed = capfd.readouterr().err.strip().splitlines()
    assert "elastic" not in "".join(printed)
    assert word is None or word in (printed if status == 1 else printed[-1])


def test_the_first_signal_is_forwarded_once(two_ranks, tmp_path):
    """Two signals at once are one: Slurm may send it to several processes of a job."""
    def send():
        wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert two_ranks(f"got = []; [signal.signal(n, lambda n, _: got.append(n)) for n in (10, 15)]\n"
                     f"open({str(tmp_path / 'ready')!r} + os.environ['RANK'], 'w')\n"
                     f"while not got: time.sleep(0.01)\n"
                     f"time.sleep(0.3); sys.exit({STOPPED} if len(got) == 1 else 1)") == STOPPED


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGKILL,)])
def test_no_rank_outlives_the_launcher(tmp_path, signals):
    """It ends by a second signal, or is killed; the ranks ignore what can be ignored."""
    program = tmp_path / "program.py"
    program.write_text("import os, signal, time\n[signal.signal(n, signal.SIG_IGN) for n in (10, 15)]\n"
                       "os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)")
    launcher = subprocess.Popen([sys.executable, "-m", "runtime.launch", str(program)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, env={**os.environ, "NUM_GPUS": "2"})
    ranks = [int(launcher.stdout.readline()) for _ in range(2)]
    for number in signals:
        assert all(map(alive, ranks))
        launcher.send_signal(number)
        time.sleep(0.7 if number != signals[-1] else 0)
    status = launcher.wait(PATIENCE)
    assert status == (-signal.SIGKILL if signal.SIGKILL in signals else 128 + signals[1])
    wait_for(lambda: not any(map(alive, ranks)))


def test_a_node_says_that_it_waits_for_others_and_a_signal_ends_it():
    environment = {**os.environ, "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    launcher = subprocess.Popen([sys.executable, "-m", "runtime.launch", "train.py"], cwd=ROOT, text=True,
                                stderr=subprocess.PIPE, env=environment)
    assert "127.0.0.1:29517" in launcher.stderr.readline()
    launcher.terminate()
    assert launcher.wait(PATIENCE) == 128 + signal.SIGTERM


# ---- train.sh

@pytest.mark.parametrize("script", ["train.sh", "eval.sh"])
def test_a_script_works_as_slurm_s_copy_and_with_sh(tmp_path, script):
    """`sbatch train.sh` runs a copy in a spool folder. Both end at the first check: recipe, experiment."""
    copy = tmp_path / "slurm_script"
    copy.write_bytes((ROOT / script).read_bytes())
    elsewhere = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)}
    for command, environment, word in ((["bash", copy], {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT)}, "[flags of"),
                                       (["bash", copy], elsewhere, "its own folder"),
                                       (["sh", script], os.environ, "[flags of")):
        ended = subprocess.run(command, cwd=tmp_path if command[1] is copy else ROOT, env=environment, text=True,
                               capture_output=True)
        assert ended.returncode == 2 and word in ended.stderr and ended.stderr.count("\n") == 1


def test_train_sh_stops_two_ranks_at_one_step_and_resumes(train_flags, data_dir, tmp_path, scontrol):
    """With loader workers, which are signalled too."""
    command = ["bash", "train.sh", "toy", *train_flags, "--num-workers", "1", "--max-train-steps"]
    environment = {**os.environ, "PYTHON": sys.executable, "NUM_GPUS": "2", "OMP_NUM_THREADS": "1",
                   "DATA_DIR": str(data_dir), "SLURM_JOB_ID": "42", "REQUEUE": "1"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen([*command, "100000"], cwd=ROOT, env=environment, stdout=log, stderr=log)
    wait_for(lambda: launcher.poll() is not None or metrics.exists() and metrics.read_text().count("\n") >= 2)
    assert launcher.poll() is None, (tmp_path / "log").read_text()
    ranks = {rank: children(rank) for rank in children(launcher.pid)}
    assert len(ranks) == 2 and all(ranks.values())
    for pid in (launcher.pid, *ranks, *sum(ranks.values(), [])):
        os.kill(pid, signal.SIGUSR1)
    assert launcher.wait(PATIENCE) == STOPPED and scontrol.read_text() == "requeue 42\n"
    ((step, path),) = disk.saved(tmp_path / "run").items()
    assert re.search(rf"stopped by SIGUSR1 after step {step}\b", (tmp_path / "log").read_text())

    done = subprocess.run([*command, str(step + 1)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"resumed {path} at step {step}" in done.stdout
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, step + 2))
