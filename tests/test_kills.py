"""Training killed at random moments ends with the bits of an undisturbed run; more often: tests.stress.kills."""

import random

import train
from tests import forks
from tests.stress.kills import assert_same_run, kill, log_written, program

# 12 images in batches of 4: kills and checkpoints fall into the middle of epochs and around their ends.
FLAGS = ["--gradient-accumulation-steps", "2", "--checkpointing-steps", "3", "--keep-last", "2", "--output-dir"]


def test_one_process(train_flags, tmp_path):
    """Its loader worker ends, too."""
    flags = [*train_flags, "--num-workers", "1", "--max-train-steps", "15", *FLAGS]
    kill(lambda: forks.start(train.main, [*flags, str(tmp_path / "killed")]), log_written(tmp_path / "killed" / "run"),
         victims=[0, 0], rng=random.Random(0), most=5)
    for name in ("killed", "undisturbed"):
        assert forks.start(train.main, [*flags, str(tmp_path / name)]).wait() == 0
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "undisturbed" / "run")


def test_the_launcher_and_a_rank(train_flags, tmp_path):
    """Two ranks; the last and the undisturbed run need no launcher."""
    flags = [*train_flags, "--logging-steps", "2", "--max-train-steps", "12", *FLAGS]
    start = program("-m", "runtime.launch", "train.py", *flags, tmp_path / "killed", NUM_GPUS="2")
    kill(start, log_written(tmp_path / "killed" / "run"), victims=[0, 2], rng=random.Random(1), most=2)
    for name in ("killed", "undisturbed"):
        forks.two_ranks(forks.run_main, train.main, [*flags, str(tmp_path / name)])
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "undisturbed" / "run")
