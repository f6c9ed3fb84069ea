"""The journal: units come back as they were, damaged ones are computed again, other settings never meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.errors import RunError
from headscope.profile.journal import MARK, Journal, digest


def unit(value: float) -> dict[str, object]:
    return {"scores": torch.full((2, 3), value, dtype=torch.float64), "ids": torch.arange(4), "text": "ä", "accepted": True, "n": [1, 2]}


def never() -> dict[str, object]:
    raise AssertionError("this unit was kept and must not be computed again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int32])
def test_a_unit_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    Journal(tmp_path / "j").unit("a", lambda: {**unit(0.25), "x": values})
    again = Journal(tmp_path / "j")
    found = again.unit("a", never)
    assert again.restored == 1
    assert torch.equal(found["scores"], torch.full((2, 3), 0.25, dtype=torch.float64))
    assert found["x"].dtype == dtype
    assert torch.equal(found["x"], values)
    assert (found["text"], found["accepted"], found["n"]) == ("ä", True, [1, 2])


def test_without_a_path_units_live_as_long_as_the_object() -> None:
    journal = Journal()
    journal.unit("a", lambda: unit(1))
    assert journal.unit("a", never)["text"] == "ä"
    assert "a" in journal
    assert "b" not in journal


def test_a_damaged_unit_is_computed_again(tmp_path: Path) -> None:
    Journal(tmp_path).unit("a", lambda: unit(1))
    (place,) = tmp_path.glob("*.safetensors")
    place.write_bytes(place.read_bytes()[:40])
    journal = Journal(tmp_path)
    assert float(journal.unit("a", lambda: unit(2))["scores"][0, 0]) == 2
    assert journal.restored == 0
    assert Journal(tmp_path).unit("a", never)["scores"][0, 0] == 2


def test_a_journal_that_another_run_clears_away_does_not_end_this_one(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    assert journal.empty
    journal.unit("a", lambda: unit(1))
    other.remove()
    journal.unit("b", lambda: unit(2))
    assert not journal.empty
    assert Journal(tmp_path / "j").unit("b", never)["scores"][0, 0] == 2


def test_a_unit_that_fails_keeps_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.unit("a", lambda: unit(1))
    with pytest.raises(AssertionError):
        journal.unit("b", never)
    assert "b" not in Journal(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_writer_that_was_killed_leaves_whole_units(tmp_path: Path) -> None:
    code = (
        "import os, torch\nfrom headscope.profile.journal import Journal\n"
        f"j = Journal({str(tmp_path / 'j')!r})\n"
        "j.unit('a', lambda: {'x': torch.ones(3)})\nj.unit('b', lambda: os.kill(os.getpid(), 9))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONSAFEPATH": "1"}, timeout=120, check=False)
    assert done.returncode == -9
    journal = Journal(tmp_path / "j")
    assert torch.equal(journal.unit("a", never)["x"], torch.ones(3))
    assert "b" not in journal


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="is no journal"):
        Journal(tmp_path)
    with pytest.raises(RunError, match="is no journal"):
        Journal(tmp_path / "mine.txt")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / MARK).write_text('{"journal": 99}')
    with pytest.raises(RunError, match="version 99"):
        Journal(tmp_path / "new")
    (tmp_path / "new" / MARK).write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Journal(tmp_path / "new")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_remove_takes_only_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.unit("a", lambda: unit(1))
    journal.remove()
    assert not (tmp_path / "j").exists()


def test_digest_goes_by_content() -> None:
    assert digest({"a": 1, "b": [2.0, "x"]}) == digest({"b": [2.0, "x"], "a": 1})
    assert digest(torch.arange(3)) != digest(torch.arange(3).int())
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))
    assert digest(np.zeros(3)) != digest(np.ones(3))
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(1) != digest("1")
    assert digest(None) != digest(0)
    with pytest.raises(TypeError, match="no content"):
        digest(object())
