"""A cache entry is whole or absent: after a kill, a full disk, a failing converter, two processes at once, and silent damage."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headscope.errors import DownloadError, ModelError
from headscope.models import cache

FACTS = {"name": "test:thing"}


def good(out: Path, workspace: Path) -> None:
    (out / "part").mkdir()
    (out / "weights").write_bytes(bytes(range(256)) * 64)
    (out / "part" / "config").write_text("{}")


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) if folder.exists() else []


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "own"))
    assert cache.cache_root() == tmp_path / "own"
    monkeypatch.delenv("HEADSCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.models_root() == tmp_path / "xdg" / "headscope" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "headscope"


def test_built_once_then_used(tmp_path: Path) -> None:
    entry = tmp_path / "models" / "thing-1"
    assert cache.ensure(entry, good, FACTS) == entry
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["name"] == "test:thing"
    assert manifest["files"]["weights"]["bytes"] == 16384
    assert set(manifest["files"]) == {"weights", "part/config"}
    assert left_behind(entry.parent) == ["thing-1"]

    def never(out: Path, workspace: Path) -> None:
        raise AssertionError("built twice")

    cache.ensure(entry, never, FACTS)
    assert cache.damage(entry, full=True) == ""


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda entry: (entry / "weights").unlink(), "weights cannot be read"),
        (lambda entry: os.truncate(entry / "weights", 100), "weights has 100 bytes instead of 16384"),
        (lambda entry: (entry / "weights").write_bytes(b"\x01" + (entry / "weights").read_bytes()[1:]), "weights has changed"),
        (lambda entry: (entry / "part" / "config").write_text("[]"), "part/config has changed"),
        (lambda entry: (entry / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda entry: (entry / "manifest.json").write_text('{"schema_version": 1, "files"'), "manifest.json cannot be read"),
        (lambda entry: (entry / "manifest.json").write_text('{"schema_version": 9, "files": {}}'), "schema_version 9"),
        (lambda entry: (entry / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
    ids=["missing", "truncated", "flipped", "same-size", "no-manifest", "cut-manifest", "newer-manifest", "not-a-manifest"],
)
def test_damage_is_named_and_repaired(spoil, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    entry = cache.ensure(tmp_path / "thing-1", good, FACTS)
    time.sleep(0.01)  # file systems with coarse times would otherwise hide the change
    spoil(entry)
    assert says in cache.damage(entry)
    cache.ensure(entry, good, FACTS)
    said = capfd.readouterr()
    assert "is damaged" in said.err
    assert says in said.err
    assert said.out == ""
    assert cache.damage(entry, full=True) == ""
    assert left_behind(tmp_path) == ["thing-1"]


def test_bytes_that_change_behind_the_clock_are_found_by_a_full_check(tmp_path: Path) -> None:
    """Bit rot keeps size and time. Only the full check reads the bytes then, which is why there is one."""
    entry = cache.ensure(tmp_path / "thing-1", good, FACTS)
    weights = entry / "weights"
    before = weights.stat()
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.damage(entry) == ""
    assert "weights has changed" in cache.damage(entry, full=True)


def test_a_new_time_alone_is_verified_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache.ensure(tmp_path / "thing-1", good, FACTS)
    os.utime(entry / "weights", ns=(1, 1))
    sums: list[Path] = []
    real = cache.sha256_file
    monkeypatch.setattr(cache, "sha256_file", lambda path: sums.append(path) or real(path))
    assert cache.damage(entry) == ""
    assert cache.damage(entry) == ""
    assert sums == [entry / "weights"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (DownloadError("the index is away"), DownloadError),
        (ModelError("not a Llama"), ModelError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ModelError),
    ],
    ids=["download", "model", "ctrl-c", "disk-full"],
)
def test_a_failure_leaves_nothing(error: BaseException, raised: type[BaseException], tmp_path: Path) -> None:
    def bad(out: Path, workspace: Path) -> None:
        good(out, workspace)
        raise error

    with pytest.raises(raised) as caught:
        cache.ensure(tmp_path / "thing-1", bad, FACTS)
    assert left_behind(tmp_path) == []
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert "HEADSCOPE_CACHE" in str(caught.value)


def test_a_failed_repair_keeps_what_there_was(tmp_path: Path) -> None:
    entry = cache.ensure(tmp_path / "thing-1", good, FACTS)
    os.truncate(entry / "weights", 100)

    def bad(out: Path, workspace: Path) -> None:
        raise DownloadError("the index is away")

    with pytest.raises(DownloadError):
        cache.ensure(entry, bad, FACTS)
    assert "has 100 bytes" in cache.damage(entry)
    assert left_behind(tmp_path) == ["thing-1"]


def test_too_little_space_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="MiB are needed"):
        cache.ensure(tmp_path / "thing-1", good, FACTS, needs_bytes=1 << 62)
    assert left_behind(tmp_path) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="set HEADSCOPE_CACHE to a directory that can be written"):
        cache.ensure(tmp_path / "file" / "models" / "thing-1", good, FACTS)


SLOW = """
import sys, time
from pathlib import Path
from headscope.models import cache

entry, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def make(out, workspace):
    with log.open("a") as sink:
        sink.write("built\\n")
    (out / "weights").write_bytes(b"x" * 1000)
    time.sleep(seconds)

cache.ensure(entry, make, {"name": "test:thing"})
print("ready")
"""


def start(entry: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(entry), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited 30 s for {what}")


def test_two_processes_do_the_work_once(tmp_path: Path) -> None:
    entry, log = tmp_path / "thing-1", tmp_path / "log"
    both = [start(entry, log, 1.0), start(entry, log, 1.0)]
    said = [child.communicate(timeout=60) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert log.read_text() == "built\n"
    assert [out for out, _ in said] == ["ready\n", "ready\n"]
    assert sum("another process is preparing" in err for _, err in said) <= 1
    assert cache.damage(entry, full=True) == ""


def test_kill_9_leaves_no_lock_and_no_half_model(tmp_path: Path) -> None:
    entry, log = tmp_path / "models" / "thing-1", tmp_path / "log"
    victim = start(entry, log, 60)
    wait_for(log.exists, "the build to begin")
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    assert [name.startswith("thing-1.tmp-") for name in left_behind(entry.parent)] == [True]
    assert cache.damage(entry) == "it is not there"
    again = start(entry, log, 0)
    out, err = again.communicate(timeout=60)
    assert (again.returncode, out) == (0, "ready\n"), err
    assert left_behind(entry.parent) == ["thing-1"]
    assert cache.damage(entry, full=True) == ""
