"""Write docs/quickstart.ipynb from docs/quickstart.py: `python -m tests.notebook`."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT, NOTEBOOK = DOCS / "quickstart.py", DOCS / "quickstart.ipynb"


def cells_of(script: str) -> list[dict]:
    """The cells behind the lines `# %%` and `# %% [markdown]`, in nbformat 4.5."""
    cells = []
    for number, text in enumerate(re.split(r"^# %%", script, flags=re.MULTILINE)[1:]):
        head, _, body = text.partition("\n")
        markdown = "markdown" in head
        if markdown:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cell = {"cell_type": "markdown" if markdown else "code", "id": f"cell-{number}", "metadata": {},
                "source": body.strip().splitlines(keepends=True)}
        cells.append(cell if markdown else cell | {"execution_count": None, "outputs": []})
    return cells


def notebook_of(script: str) -> str:
    """The content of the .ipynb file."""
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells_of(script), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook_of(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
