"""train.py: the loop runs, resumes, and says what a user got wrong."""

import train


def test_smoke(train_flags, tmp_path):
    train.main([*train_flags, "--max-train-steps", "2"])
    assert (tmp_path / "run" / "checkpoints" / "0000002.pt").is_file()
