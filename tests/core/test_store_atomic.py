"""A run directory appears whole or not at all, and an overwrite happened or did not, whenever the process is killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headscope.errors import RunError
from headscope.profile import HeadProfile
from headscope.store import list_runs, open_run
from headscope.store.atomic import atomic_directory

from .test_store_run import a_profile, card, reading_environment, run_copy, saved, table

__all__ = ["run_copy", "saved"]  # fixtures


def test_an_existing_path_is_refused_unless_asked(run_copy: Path, tmp_path: Path) -> None:
    profile = HeadProfile(table(), card())
    with pytest.raises(RunError, match="exists already"):
        profile.save(run_copy)
    assert (run_copy / "maps.zarr").is_dir()
    profile.save(run_copy, overwrite=True)
    assert not (run_copy / "maps.zarr").exists()
    open_run(run_copy).verify()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a run directory"):
        profile.save(other, overwrite=True)
    assert (other / "chapter.txt").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import headscope.store.write as write

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.files, "write_tokens", full_disk)
    with pytest.raises(RunError, match="No space left"):
        a_profile().save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        HeadProfile(table(), card()).save(tmp_path / "file" / "run")


KILLED = """
import os, signal, sys
import pandas as pd
import headscope.store.write as write
from headscope.store import RunContent, Tokens

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

write.files.write_tokens = kill
heads = pd.DataFrame({"layer": [0], "head": [0], "kv_head": [0], "module": ["m"], "kind": ["full"], "roles": [[]], "reasons": [{}]})
write.write_run(sys.argv[1], {"created": ""}, heads, RunContent((0,), Tokens("a", (1,), ("a",))))
"""


def test_a_killed_writer_leaves_no_run_and_the_next_one_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "run"
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(target)], env=reading_environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = list(tmp_path.iterdir())
    assert [entry.name.startswith(".run.") for entry in left] == [True]
    assert (left[0] / "heads.parquet").exists()
    assert list_runs(tmp_path) == []
    HeadProfile(table(), card()).save(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_sibling_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "run") as folder:
        with atomic_directory(tmp_path / "run") as other:
            (other / "card.json").write_text("{}")
        assert folder.is_dir()
        shutil.rmtree(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


def test_a_run_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "run") as folder:
            (folder / "card.json").write_text("second")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "card.json").write_text("first")

    with pytest.raises(RunError, match="exists already"):
        write()
    assert (tmp_path / "run" / "card.json").read_text() == "first"


# ---- killed in the middle of an overwrite ------------------------------------------------------------------------------

KILLED_BETWEEN = """
import os, signal, sys
import headscope.store.atomic as atomic

rename = os.rename
def killed(source, target):
    if atomic.ASIDE in str(target):
        rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

atomic.os.rename = killed
with atomic.atomic_directory(atomic.Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "card.json").write_text("the new run")
"""


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """Where a run was, that a process was replacing when it was killed between the two renames."""
    target = HeadProfile(table(), card()).save(tmp_path / "runs" / "run")
    done = subprocess.run(
        [sys.executable, "-P", "-c", KILLED_BETWEEN, str(target)], env=reading_environment(), capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == 2  # the old run and the new one, both hidden
    return target


def test_the_old_run_is_there_for_whoever_opens_it(interrupted: Path) -> None:
    open_run(interrupted).verify()
    assert len(HeadProfile.load(interrupted).table) == len(table())


def test_the_old_run_is_listed(interrupted: Path) -> None:
    assert [(entry.name, entry.error) for entry in list_runs(interrupted.parent)] == [("run", None)]


def test_the_old_run_is_not_written_over_unasked(interrupted: Path) -> None:
    with pytest.raises(RunError, match="exists already"):
        a_profile().save(interrupted)
    assert open_run(interrupted).maps is None


def test_the_next_overwrite_clears_up(interrupted: Path) -> None:
    a_profile().save(interrupted, overwrite=True)
    assert open_run(interrupted).maps is not None
    assert [entry.name for entry in interrupted.parent.iterdir()] == ["run"]


def test_what_is_in_the_place_by_now_is_left_alone(interrupted: Path) -> None:
    interrupted.mkdir()
    (interrupted / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run directory"):
        open_run(interrupted)
    list_runs(interrupted.parent)
    assert (interrupted / "notes.txt").read_text() == "mine"


def test_of_a_living_writer_nothing_is_restored(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.store.atomic._alive", lambda pid: True)
    with pytest.raises(RunError, match="no such directory"):
        open_run(interrupted)
    assert list_runs(interrupted.parent) == []


def test_a_run_that_cannot_be_put_back_says_where_it_is(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("headscope.store.atomic.os.rename", read_only)
    with pytest.raises(RunError, match=r"killed while it replaced it.*rename \.run\..*\.replaced to run"):
        open_run(interrupted)
    assert list_runs(interrupted.parent) == []


def test_an_overwrite_killed_after_both_renames_leaves_the_new_run(tmp_path: Path) -> None:
    target = HeadProfile(table(), card()).save(tmp_path / "run")
    code = KILLED_BETWEEN.replace("if atomic.ASIDE in str(target):", "if atomic.PARTIAL in str(source):")
    done = subprocess.run([sys.executable, "-P", "-c", code, str(target)], env=reading_environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (target / "card.json").read_text() == "the new run"
    list_runs(tmp_path)
    assert (target / "card.json").read_text() == "the new run"
    a_profile().save(target, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
