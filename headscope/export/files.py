"""Files of other engines, read with suspicion and written whole or not at all.

An imported file is somebody else's: it may be cut short, be another format, hold NaN where JSON has none, or be a program. Everything here
turns what goes wrong into one ExportError that names the file; nothing is ever unpickled or executed, and Python modules are read as syntax
trees of constants.

An export is a directory that appears with a rename. With `force` an older export in its place is moved aside first and put back if the new
one cannot be put there; a directory that is no export is never replaced.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from headscope.errors import ExportError, refusal

LIMIT = 256 * 2**20
"""Bytes of one imported text file, at most. The largest that is published has 3 MiB."""
SIDECAR = "headscope.json"
"""The report beside every export; a directory that holds it may be replaced by another export."""


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """A file's bytes. ExportError when it is missing, no file, or larger than `limit`."""
    try:
        if not path.is_file():
            raise refusal(ExportError, str(path), "it is a directory" if path.is_dir() else "there is no such file", "check the path")
        size = path.stat().st_size
        if size > limit:
            raise refusal(
                ExportError, str(path), f"it has {size / 2**20:,.0f} MiB, and no such file is that large", "check that it is the right file"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise refusal(
            ExportError, str(path), f"it cannot be read ({getattr(error, 'strerror', None) or error})", "check the path"
        ) from None


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise refusal(ExportError, str(path), "it is no UTF-8 text", "check that it is the right file") from None


def parse_json(text: str, path: Path) -> Any:
    """Strict JSON: no NaN, no infinity, no key twice."""

    def constant(name: str) -> NoReturn:
        raise refusal(ExportError, str(path), f"it holds {name}, which is no JSON and no score", "write the file again")

    def pairs(listed: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(listed)
        if len(found) != len(listed):
            twice = next(key for number, (key, _) in enumerate(listed) if key in dict(listed[:number]))
            raise refusal(ExportError, str(path), f"it has {twice!r} twice", "write the file again")
        return found

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except (json.JSONDecodeError, RecursionError) as error:
        raise refusal(ExportError, str(path), f"it is damaged or no JSON ({error})", "copy it again, or name its format") from None


def read_json(path: Path) -> Any:
    """A strict JSON file."""
    return parse_json(read_text(path), path)


def python_constants(path: Path) -> dict[str, Any]:
    """NAME = constant of a Python module's top level and of its classes' bodies, read as a syntax tree; the module is not run."""
    try:
        tree = ast.parse(read_text(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise refusal(ExportError, str(path), f"it is no Python module ({error})", "check that it is the right file") from None
    found: dict[str, Any] = {}
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) and node.value else []
        for target in targets:
            if isinstance(target, ast.Name):
                assert isinstance(node, ast.Assign | ast.AnnAssign)
                assert node.value is not None
                with contextlib.suppress(ValueError, RecursionError):
                    found[target.id] = ast.literal_eval(node.value)
    return found


def dump(value: Any, indent: int | None = None) -> bytes:
    """JSON bytes with a newline; the same value gives the same bytes."""
    return (json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()


def check_target(path: Path, force: bool) -> None:
    """ExportError when an export may not be put at `path`."""
    try:
        if not (path.exists() or path.is_symlink()):
            return
        if not force:
            raise refusal(ExportError, str(path), "it exists already", "choose another path, or replace it with force=True (--force)")
        if path.is_symlink() or not path.is_dir():
            raise refusal(ExportError, str(path), "it is no directory, and an export is one", "choose another path")
        if any(path.iterdir()) and not (path / SIDECAR).is_file():
            raise refusal(ExportError, str(path), f"it holds other files and no {SIDECAR}, so it is no export", "choose another path")
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None


def write_folder(path: Path, content: Mapping[str, bytes], force: bool) -> None:
    """Writes files by name into a new directory, whole or not at all. ExportError when that cannot be, and then nothing has changed."""
    check_target(path, force)
    mark = secrets.token_hex(4)
    partial, aside = (path.with_name(f".{path.name}.{mark}.{kind}") for kind in ("partial", "replaced"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for name, data in content.items():
            with (partial / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if path.exists():
            os.rename(path, aside)
        try:
            os.rename(partial, path)
        except OSError:
            if aside.exists():
                os.rename(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(path: Path, error: Exception) -> ExportError:
    return refusal(
        ExportError,
        repr(str(path)),
        f"it cannot be written ({getattr(error, 'strerror', None) or error})",
        "nothing was kept; choose another path",
    )
