"""A directory that appears whole or not at all.

Everything is written into a hidden sibling, flushed to the disk, and renamed into place at the end; a rename within one directory is
atomic. A process that is killed leaves at most the hidden sibling, which no reader looks at and which the next writer to the same place
clears away, once the process that owned it is gone.

Replacing a directory takes two renames: the old one aside, the new one in. A process killed between them leaves nothing in the place, and
the old one under a name of its own; whoever next reads, lists or writes there puts it back (`restore_interrupted`), so an overwrite either
happened or did not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from headscope.errors import RunError, refusal
from headscope.store.schema import CARD, HEADS, KEPT, MAPS, PICTURES, STATISTICS, TABLES, TOKENS

PARTIAL = ".partial"
ASIDE = ".replaced"
CONTENT = {CARD, HEADS, STATISTICS, TOKENS, MAPS, KEPT, TABLES, *PICTURES}
"""What a run directory holds; anything else in one is somebody's, and is not deleted with it."""
_HOST = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:24] or "host"


@contextlib.contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty directory to write into, which becomes `target` when the block ends without an exception.

    RunError when `target` exists and `overwrite` is false, when it exists and is no run directory (overwriting would destroy something
    else), and when it cannot be written.
    """
    target = Path(os.path.abspath(target))
    try:
        restore_interrupted(target)
        _refuse_existing(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_orphans(target)
        partial = _hidden(target, PARTIAL)
        partial.mkdir()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        why = getattr(error, "strerror", None) or str(error)
        raise refusal(RunError, str(target), f"its folder cannot be written ({why})", "choose another path") from error
    try:
        yield partial
        _flush(partial)
        _move_into_place(partial, target, overwrite)
    except OSError as error:
        raise refusal(
            RunError,
            str(target),
            f"it could not be written ({error.strerror or error})",
            "nothing was kept; free space or choose another path",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    """Raises RunError when `target` may not be (re)placed. An objection is looked at again: another writer may just be replacing it."""
    for wait in (0.01, 0.05, 0.0):
        objection = _objection(target, overwrite)
        if objection is None:
            return
        if not overwrite or not wait:
            raise objection
        time.sleep(wait)


def _objection(target: Path, overwrite: bool) -> RunError | None:
    if not target.exists() and not target.is_symlink():
        return None
    if not overwrite:
        return refusal(RunError, str(target), "it exists already", "choose another path, or overwrite it: overwrite=True (--overwrite)")
    try:
        names = {entry.name for entry in target.iterdir()} if target.is_dir() and not target.is_symlink() else None
    except FileNotFoundError:  # gone since a moment ago
        return None
    if names is None or (names and CARD not in names):
        return refusal(RunError, str(target), "it is not a run directory and will not be replaced", "choose another path")
    foreign = sorted(name for name in names - CONTENT if not name.startswith("."))
    if foreign:
        listed = ", ".join(foreign[:3])
        return refusal(RunError, str(target), f"it also holds {listed}, which would be lost", "move that away, or choose another path")
    return None


def _move_into_place(partial: Path, target: Path, overwrite: bool) -> None:
    for attempt in range(20):  # another process may be putting its own run here: the last one stays
        try:
            _refuse_existing(target, overwrite)
            _swap(partial, target)
            break
        except OSError as error:
            if attempt == 19 or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not partial.is_dir():
                raise
            time.sleep(0.01)
    _flush_folder(target.parent)


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
        return
    aside = _hidden(target, ASIDE)
    os.rename(target, aside)
    try:
        os.rename(partial, target)
    except OSError:
        if not target.exists():
            os.rename(aside, target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [folder, *(entry for entry in folder.rglob("*") if entry.is_dir())]:
        _flush_folder(path)


def _flush_folder(folder: Path) -> None:
    """Not every file system can flush a directory; the rename is atomic all the same."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _hidden(target: Path, kind: str) -> Path:
    """A name beside the target that no reader looks at and that says whose it is."""
    return target.parent / f".{target.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}{kind}"


def _left_behind(target: Path, kind: str) -> list[Path]:
    """What killed writers of this target left on this host, oldest first."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_HOST}\.(\d+)\.[0-9a-f]{{8}}{re.escape(kind)}")
    found = []
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            found.append(entry)
    return sorted(found, key=lambda entry: entry.stat().st_mtime)


def _clear_orphans(target: Path) -> None:
    for kind in (PARTIAL, ASIDE):
        for entry in _left_behind(target, kind):
            shutil.rmtree(entry, ignore_errors=True)


def restore_interrupted(target: Path) -> None:
    """Puts back a directory whose replacement was cut off between its two renames; does nothing when something is in the place.

    RunError when it is there and cannot be put back (a folder that may not be written).
    """
    target = Path(os.path.abspath(target))
    try:
        if target.exists() or target.is_symlink() or not target.parent.is_dir():
            return
        left = _left_behind(target, ASIDE)
    except (OSError, ValueError):  # a name that no directory can have, a folder that may not be read: whoever opens it says so
        return
    for entry in left[-1:]:
        try:
            os.rename(entry, target)
        except OSError as error:
            if target.exists():  # another process was quicker
                return
            why = f"a process was killed while it replaced it, and the old one cannot be put back ({error.strerror or error})"
            raise refusal(RunError, str(target), why, f"rename {entry.name} to {target.name}") from error


def interrupted(folder: Path) -> list[Path]:
    """The targets in a folder whose replacement was cut off."""
    pattern = re.compile(rf"\.(.+)\.{_HOST}\.\d+\.[0-9a-f]{{8}}{re.escape(ASIDE)}")
    names = {match[1] for entry in folder.iterdir() if (match := pattern.fullmatch(entry.name))}
    return [folder / name for name in sorted(names) if not (folder / name).exists()]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
