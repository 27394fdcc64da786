"""docs/quickstart.ipynb: it is what its script says, and runs on a small checkpoint."""

import re

import numpy as np
import pytest
import torch

from runtime.run import newest, read_file
from tests.conftest import random_images
from tests.notebook import DOCS, NOTEBOOK, SCRIPT, notebook_of

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def test_the_notebook_is_made_from_its_script():
    assert NOTEBOOK.read_text(encoding="utf-8") == notebook_of(SCRIPT.read_text(encoding="utf-8")), \
        "run python -m tests.notebook"


def test_the_notebook_runs(trained, encoder_folder, tmp_path):
    """Load, sample, look at the pair, guide, score: each ends in a picture or a number."""
    reference, checkpoint = tmp_path / "ref.npz", tmp_path / "0000002.pt"
    np.savez(reference, arr_0=random_images(12, 32, 32))
    state = read_file(newest(trained), mmap=False)
    for weight in state["ema"].values():                          # after two steps no label has an effect yet
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / 20
    torch.save(state, checkpoint)
    text = SCRIPT.read_text(encoding="utf-8")
    for usual, small in (('"exps/reg-toy"', f'"{checkpoint}"'), ('"data/toy/reference.npz"', f'"{reference}"'),
                         ('"local-dir:toy/networks/features"', f'"local-dir:{encoder_folder}"'),
                         ("num_steps=25", "num_steps=2"), ("range(256)", "range(12)")):
        assert usual in text
        text = text.replace(usual, small)
    notebook = nbformat.reads(notebook_of(text), as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(DOCS)}}).execute()
    results = ["".join(str(one.get("data", one.get("text", ""))) for one in cell.outputs)
               for cell in notebook.cells if cell.cell_type == "code"]
    assert len(results) == 6 and "reg SiT-T/2 step 2" in results[1]
    assert all("image/png" in results[i] for i in (2, 3, 4))
    cosines = re.search(r"cosine of the pair: \[(.*?)\]", results[3], re.DOTALL)[1].replace("\\n", " ").split()
    assert len(cosines) == 16 and all(abs(float(one)) <= 1 for one in cosines)
    scores = re.findall(r"(1\.0|2\.3|5\.0): (\d+\.\d+)", results[5])
    assert len(scores) == 3 and len({score for _, score in scores}) == 3
