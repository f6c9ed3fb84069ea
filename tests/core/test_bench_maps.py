"""The benchmark of maps: what it checks holds, and what it counts is what is on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from headscope.bench.maps import run
from headscope.errors import DataError
from headscope.store import open_run


def test_a_small_run_of_the_benchmark(tmp_path: Path) -> None:
    found = run(tmp_path / "run", tokens=4096, layers=1, device="cpu", keep=(0,))
    assert len(found["checks"]) == 3
    assert all(0 <= value < 1e-5 for value in found["checks"].values()), found["checks"]
    assert all(value > 0 for value in found["reads"].values())
    sizes = {row["part"]: row["mib"] for row in found["tables"][1]["rows"]}
    opened = open_run(tmp_path / "run")
    opened.verify()
    total = sum(entry.stat().st_size for entry in (tmp_path / "run").rglob("*") if entry.is_file()) / 2**20
    assert sizes["all"] == pytest.approx(total, abs=0.4)
    assert sizes["qk.zarr"] == pytest.approx(4096 * 32 * 4 * 6 / 2**20, rel=0.05)  # 4 query heads and 2 key heads of width 32, float32
    assert opened.maps.block == 32
    seconds = {row["step"]: row["seconds"] for row in found["tables"][0]["rows"]}
    assert seconds["whole profile, written and flushed"] >= seconds["natural"]


def test_sizes_that_are_none(tmp_path: Path) -> None:
    for sizes in ({"tokens": 100, "layers": 1}, {"tokens": 4096, "layers": 0}):
        with pytest.raises(DataError, match="nothing to measure"):
            run(tmp_path / "run", device="cpu", **sizes)
