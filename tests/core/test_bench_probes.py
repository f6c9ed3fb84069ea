"""The benchmark of probes: every row is one probe's own run, a refusal is a row, and a second run goes on after the last row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headscope.bench import probes as bench
from headscope.errors import ProbeError
from headscope.profile import runner


def test_rows_refusals_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cost.json"
    asked = []
    real = runner.profile

    def counted(scope, names, **options):
        asked.append(names)
        return real(scope, names, **options)

    monkeypatch.setattr(runner, "profile", counted)
    found = bench.run("bundled:induction", ["entropy", "vision_mass"], tokens=128, device="cpu", out=out)
    rows = {row["probe"]: row for row in found["tables"][0]["rows"]}
    assert list(rows) == ["entropy", "vision_mass"]
    assert rows["entropy"]["said"] == ""
    assert rows["vision_mass"]["said"].startswith("refused")
    assert "images" in rows["vision_mass"]["said"]
    for row in rows.values():  # each number is rounded by itself: what it may stand for is an interval
        seconds, unit = row["seconds"], row["one forward, s"]
        low, high = max(0.0, seconds - 5e-4) / (unit + 5e-5), (seconds + 5e-4) / max(unit - 5e-5, 1e-9)
        assert low - 5e-3 <= row["forward passes"] <= high + 5e-3
    assert json.loads(out.read_text())["tables"] == found["tables"]
    again = bench.run("bundled:induction", ["entropy", "vision_mass", "locality"], tokens=128, device="cpu", out=out)
    assert asked == [["entropy"], ["vision_mass"], ["locality"]]
    assert [row["probe"] for row in again["tables"][0]["rows"]] == ["entropy", "vision_mass", "locality"]
    assert again["tables"][0]["rows"][:2] == found["tables"][0]["rows"]


def test_an_unknown_probe_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="entropi"):
        bench.run("bundled:induction", ["entropi"], out=tmp_path / "cost.json")
    assert not (tmp_path / "cost.json").exists()
