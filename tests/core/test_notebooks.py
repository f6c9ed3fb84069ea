"""Every notebook runs from top to bottom, and keeps no output in the repository."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS[0].name == "01_heads_in_ten_minutes.ipynb"


def ten_minutes(printed: str) -> None:
    line = next(line for line in printed.splitlines() if line.startswith("loss on the second copy"))
    base, without_induction, without_others = (float(number) for number in re.findall(r"\d+\.\d+", line))
    assert without_induction > base + 1.0
    assert without_others < base + 0.5


def published_heads(printed: str) -> None:
    """Without published files it reads its own examples, whose numbers are known."""
    assert "1 score files, 2 pattern files, 1 gate files, 1 window files" in printed
    assert "retrieval heads 3.12%" in printed
    assert "uniform over 64 heads, 64 x vertical_slash vertical 512, slash 2048, A-shaped 0" in printed
    assert "2 patterns over 64 heads, 56 x vertical_slash vertical 512, slash 2048, A-shaped 8" in printed
    assert "gates above a half 50.0%" in printed
    assert "it would become dense" in printed


CHECKS = {"01_heads_in_ten_minutes": ten_minutes, "published_heads": published_heads}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, smollm2):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "strip the outputs before committing"
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    if path.stem in CHECKS:
        CHECKS[path.stem](printed)
