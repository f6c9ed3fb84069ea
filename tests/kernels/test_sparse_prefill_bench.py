"""The prefill benchmark away from its device: what it counts, what it calls met, and its refusal."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from headscope.bench import prefill
from headscope.cli.main import app
from headscope.errors import UnavailableError
from headscope.plans import Lines


def row(plan: str, tokens: int, **values: object) -> dict[str, object]:
    """One line of the sparse table."""
    base = {"plan": plan, "tokens": tokens, "density": None, "rate": 0.0, "over_flex": 0.0, "ratio": 9.0, "runs": "gluon"}
    return {**base, **values}


def test_targets_are_met_by_their_limits() -> None:
    rows = [
        row("random tiles, 10%", 32768, density=0.1, rate=0.9, over_flex=1.19),
        row("random tiles, 5%", 32768, density=0.05, rate=0.1, over_flex=0.1),
        row("random tiles, 10%", 8192, density=0.1, rate=0.1, over_flex=0.1),
        row("random tiles, 85%", 8192, density=0.85, ratio=0.99),
        row("half streaming (128, 1024)", 32768, ratio=0.56),
        row("half streaming (128, 1024)", 2048, ratio=1.2, runs="dense: too short"),
    ]
    building = [{"plan": "pooled", "tokens": 131072, "ratio": 0.05}, {"plan": "pooled", "tokens": 32768, "ratio": 0.5}]
    found = [(one["target"], one["tokens"], one["met"]) for one in prefill.targets(rows, building)]
    assert found == [
        ("S1", 32768, "met"), ("S1", 32768, "missed"), ("S3", 8192, "met"), ("S2", 32768, "missed"), ("S2", 2048, "met"),
        ("S4", 131072, "met"),
    ]  # fmt: skip


def test_flops_of_a_dense_call() -> None:
    assert prefill.work(8192) == pytest.approx(4 * 8192**2 / 2 * 32 * 128)


def test_vertical_lines_are_columns_a_window_and_bands() -> None:
    lines = prefill.vertical_lines(4096, 3)
    assert isinstance(lines, Lines)
    assert len(lines.columns) == 32
    assert lines.diagonals[:1024] == tuple(range(1024))
    assert lines.diagonals[-1] < 4096
    assert lines != prefill.vertical_lines(4096, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(UnavailableError, match="there is none here"):
        prefill.run(quick=True)
    result = CliRunner().invoke(app, ["bench", "prefill", "--quick"])
    assert isinstance(result.exception, UnavailableError)
