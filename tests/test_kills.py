"""Training that is killed at random moments ends with the bits of an undisturbed run; `tests.stress.kills` does it more often."""

from tests.stress.kills import kill_training

# 12 images in batches of 4: kills and checkpoints fall into the middle of epochs and around their ends.
FLAGS = ["--gradient-accumulation-steps", "2", "--checkpointing-steps", "3", "--keep-last", "2"]


def test_one_process(train_flags, tmp_path):
    kill_training([*train_flags, *FLAGS, "--num-workers", "1", "--sampling-steps", "20", "--max-train-steps", "60"], tmp_path,
                  processes=1, kills=5, seed=0, most=9)


def test_two_processes(train_flags, tmp_path):
    kill_training([*train_flags, *FLAGS, "--logging-steps", "2", "--max-train-steps", "24"], tmp_path, processes=2, kills=2, seed=1, most=4)
