"""The listing of runs: what is shown, what is refused, and that no id leads out of the directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from headscope.app.runs import RunIndex
from headscope.errors import RunError


def test_a_directory_lists_its_runs_and_says_what_is_wrong_with_the_damaged_ones(damaged: Path) -> None:
    index = RunIndex(damaged)
    assert index.single is None
    entries = {entry.id: entry for entry in index.entries()}
    assert next(iter(entries)) == "whole"
    assert set(entries) == {"whole", "short", "bare"}
    assert entries["whole"].card is not None
    assert entries["whole"].card["model"]["name"] == "Synthetic-1B"
    assert "statistics.safetensors" in entries["short"].error
    assert "cut short (100 bytes" in entries["short"].error
    assert "card.json" in entries["bare"].error


def test_a_link_that_leads_out_of_the_directory_is_not_a_run(damaged: Path) -> None:
    assert (damaged / "link" / "card.json").exists()
    assert "link" not in RunIndex(damaged).paths()


@pytest.mark.parametrize("name", ["../outside", "..", "", "/etc", "whole/../../outside", "link", ".unfinished", "notes", "whole\0", "wh"])
def test_an_id_is_a_key_and_never_a_path(damaged: Path, name: str) -> None:
    with pytest.raises(RunError, match="not among the runs"):
        RunIndex(damaged).open(name)


def test_newest_first(damaged: Path, synthetic) -> None:
    shutil.copytree(synthetic.path, damaged / "newer")
    card = json.loads((damaged / "newer" / "card.json").read_text())
    card["created"] = "2026-05-01T00:00:00+00:00"
    (damaged / "newer" / "card.json").write_text(json.dumps(card))
    assert [entry.id for entry in RunIndex(damaged).entries()][:2] == ["newer", "whole"]


def test_a_run_itself_is_the_only_run(synthetic) -> None:
    index = RunIndex(synthetic.path)
    assert index.single == "tiny"
    assert list(index.paths()) == ["tiny"]
    assert index.open("tiny").layers == [0, 1, 2]


def test_a_directory_that_is_not_there_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no such directory; make a run with `headscope profile"):
        RunIndex(tmp_path / "nowhere")


def test_a_run_that_was_written_again_is_read_again(damaged: Path) -> None:
    index = RunIndex(damaged)
    first = index.open("whole")
    assert index.open("whole") is first
    card = damaged / "whole" / "card.json"
    os.utime(card, ns=(card.stat().st_atime_ns, card.stat().st_mtime_ns + 10**9))
    assert index.open("whole") is not first


def test_the_grid_is_the_table(run, synthetic) -> None:
    for metric in ("sink", "distance", "induction", "receiver"):
        expected = synthetic.table[metric].to_numpy().reshape(3, 4)
        np.testing.assert_array_equal(run.grid(metric), expected)
    assert run.metrics == ["sink", "distance", "induction", "receiver"]


def test_roles_hold_their_heads_strongest_first(run, synthetic) -> None:
    table = synthetic.table
    for role, heads in run.roles.items():
        rows = table[[role in roles for roles in table["roles"]]]
        assert set(heads) == set(zip(rows["layer"], rows["head"], strict=True))
    induction = [run.grid("induction")[place] for place in run.roles["induction"]]
    assert induction == sorted(induction, reverse=True)
    assert min(induction) > 0.4
    nearest = [run.grid("distance")[place] for place in run.roles["local"]]
    assert nearest == sorted(nearest)
    assert "2410.10781" in run.rule("sink")


def test_statistics_and_maps_are_those_of_the_head(run, synthetic) -> None:
    attention = synthetic.attention[2, 1]
    np.testing.assert_allclose(run.series("column", "column_sum", 2, 1), attention.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(run.series("row", "argmax", 2, 1), attention.argmax(1))
    assert [(level.block, level.cells) for level in run.levels] == [(16, 13), (32, 7)]
    assert run.map("block_mass", 1, 2, 1).sum() == pytest.approx(200, rel=1e-5)
