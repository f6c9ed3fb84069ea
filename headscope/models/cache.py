"""The model cache: a directory is there whole and checked, or it is not there.

Everything is built inside a temporary directory next to its final place and renamed into it as the last step, so a process that is
killed, or a disk that fills up, leaves nothing that a later run could take for a model. A lock that the kernel drops with its process
makes two processes at once do the work once; whoever holds it also sweeps what killed processes left behind.

Each entry carries `manifest.json` with the size and SHA-256 of its files. Sizes are compared at every load, the (slow) checksums only for
files whose size or modification time is not the one last verified (`verified.json`), or when asked for. The silent failure this avoids: a
truncated or bit-flipped checkpoint that still loads, and gives head scores of a model that does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headscope.errors import ModelError, refusal
from headscope.models.checksum import sha256_file
from headscope.models.progress import say

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STAMP = "verified.json"


def cache_root() -> Path:
    """$HEADSCOPE_CACHE, or headscope's folder in the user's cache directory ($XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("HEADSCOPE_CACHE")
    if own:
        return Path(own).expanduser().absolute()  # pip is run from another directory
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser().absolute() if shared else Path.home() / ".cache") / "headscope"


def models_root() -> Path:
    """Where converted models are kept."""
    return cache_root() / "models"


def damage(entry: Path, *, full: bool = False) -> str:
    """Why an entry cannot be used, "" when it is intact. `full` computes every checksum anew."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema_version"] != SCHEMA_VERSION:
            return f"its manifest has schema_version {manifest['schema_version']}, this headscope reads {SCHEMA_VERSION}"
        files = {str(name): (int(row["bytes"]), str(row["sha256"])) for name, row in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}" if entry.is_dir() else "it is not there"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    known = {} if full else _read_stamp(entry)
    seen: dict[str, list[int]] = {}
    for name, (size, digest) in files.items():
        path = entry / name
        try:
            stat = path.stat()
            if stat.st_size != size:
                return f"{name} has {stat.st_size} bytes instead of {size}"
            seen[name] = [stat.st_size, stat.st_mtime_ns]
            if known.get(name) != seen[name] and sha256_file(path) != digest:
                return f"{name} has changed: its SHA-256 is not the recorded one"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    if seen != known:
        _write_stamp(entry, seen)
    return ""


def ensure(entry: Path, make: Callable[[Path, Path], None], facts: Mapping[str, Any], *, needs_bytes: int = 0) -> Path:
    """The entry, built by `make(out, workspace)` when it is missing or damaged.

    `make` fills the empty directory `out`; `workspace` is scratch that goes away. `facts` are written into the manifest, `needs_bytes`
    is the free disk space to insist on before any work. Raises ModelError when the cache cannot be written; what `make` raises passes
    through.
    """
    if not damage(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry):
            reason = damage(entry)
            if not reason:
                return entry
            if entry.exists():
                say(f"the cached model {entry} is damaged: {reason}; building it again")
            _sweep(entry)
            _check_space(entry.parent, needs_bytes)
            workspace = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
            try:
                out = workspace / "out"
                out.mkdir()
                make(out, workspace)
                _write_manifest(out, facts)
                _publish(out, entry, workspace)
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(entry, error) from error
    return entry


def _cannot_write(entry: Path, error: OSError) -> ModelError:
    why = error.strerror or str(error)
    instead = "set HEADSCOPE_CACHE to a directory that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        instead = "free some space there, or set HEADSCOPE_CACHE to a directory on a larger disk"
    return refusal(ModelError, f"model cache {entry.parent}", f"{why}; nothing was kept", instead)


def _check_space(folder: Path, needs_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needs_bytes:
        raise OSError(errno.ENOSPC, f"{free / 2**20:.0f} MiB are free, {needs_bytes / 2**20:.0f} MiB are needed")


@contextlib.contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """One process at a time. The lock is the kernel's (flock), so it ends with its holder, also after kill -9."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(entry.parent / f"{entry.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is preparing {entry.name}; waiting for it")
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _sweep(entry: Path) -> None:
    """Removes workspaces of processes that died. Only the holder of the lock makes or removes them."""
    for stale in entry.parent.glob(f"{entry.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _write_manifest(out: Path, facts: Mapping[str, Any]) -> None:
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    files = {path.relative_to(out).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths}
    manifest = {"schema_version": SCHEMA_VERSION, **facts, "files": files}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shared = (out / MANIFEST).stat().st_mode
    for path in paths:
        path.chmod(shared)  # safetensors makes its files private, whatever the umask says
    _write_stamp(out, {name: [(out / name).stat().st_size, (out / name).stat().st_mtime_ns] for name in files})
    for path in out.rglob("*"):
        _sync(path)


def _publish(out: Path, entry: Path, workspace: Path) -> None:
    """Renames `out` to its place; a damaged entry that is in the way is moved out first and goes with the workspace."""
    if entry.exists():
        entry.rename(workspace / "damaged")
    out.rename(entry)
    _sync(entry.parent)


def _sync(path: Path) -> None:
    """Asks the system to put a file or directory on the disk, where it can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_stamp(entry: Path) -> dict[str, list[int]]:
    try:
        stamp = json.loads((entry / STAMP).read_text(encoding="utf-8"))
        return {str(name): [int(value) for value in values] for name, values in stamp.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def forget(entry: Path) -> None:
    """Drops what is known of an entry's checksums, so that the next load computes them: a changed file may have kept its size and time."""
    with contextlib.suppress(OSError):
        (entry / STAMP).unlink()


def _write_stamp(entry: Path, seen: Mapping[str, list[int]]) -> None:
    """Best effort: without the stamp (a read-only cache) the checksums are computed at every load."""
    temporary = entry / f"{STAMP}.{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(seen) + "\n", encoding="utf-8")
        temporary.replace(entry / STAMP)
