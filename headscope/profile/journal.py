"""Journal: finished units of a long measurement, kept so that a run that was killed goes on where it stopped.

A unit's file is named by a digest of its key, and the key says everything that the result depends on: probe, parameters, model fingerprint,
data, seed. So a unit of other settings is never taken for this one, two processes on one journal at worst compute a unit twice, and nothing
needs to be locked. A file is written under another name and renamed: a killed writer leaves no half of a unit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.errors import RunError, refusal

MARK = "journal.json"
VERSION = 1


class Journal:
    """Units by key. `path`: the folder; None keeps nothing on disk, and units are remembered while the object lives.

    A unit is a dict of tensors (any shape and dtype) and plain JSON values. Raises RunError for a path that holds something else, or that
    cannot be written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._known: dict[str, dict[str, Any]] = {}
        self.restored = 0
        """How many units came from the disk."""
        if self.path is not None:
            self._open(self.path)

    def _open(self, path: Path) -> None:
        mark = path / MARK
        if path.exists() and not mark.exists() and (not path.is_dir() or any(path.iterdir())):
            raise refusal(RunError, str(path), "it exists and is no journal", "choose another path for the journal")
        if mark.exists():
            try:
                version = json.loads(mark.read_text())["journal"]
            except (ValueError, KeyError, TypeError) as error:
                raise refusal(RunError, str(mark), f"it cannot be read ({error})", "delete the journal and start again") from None
            if version != VERSION:
                raise refusal(RunError, f"a journal of version {version}", f"this headscope writes {VERSION}", "use another path")
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._write(mark, json.dumps({"journal": VERSION}).encode())
        except OSError as error:
            raise refusal(RunError, str(path), f"it cannot be written ({error.strerror})", "choose another path") from None

    def unit(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under `key`: kept, or computed now and kept."""
        if key in self._known:
            return self._known[key]
        found = self._read(key)
        if found is None:
            found = compute()
            self._keep(key, found)
        else:
            self.restored += 1
        self._known[key] = found
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._known or (self.path is not None and self._place(key).exists())

    @property
    def empty(self) -> bool:
        """Whether no unit is on the disk."""
        return self.path is None or not any(self.path.glob("*.safetensors"))

    def remove(self) -> None:
        """Deletes the folder; for when the result is safe elsewhere."""
        if self.path is not None and (self.path / MARK).exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def _place(self, key: str) -> Path:
        return (self.path or Path()) / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"

    def _read(self, key: str) -> dict[str, Any] | None:
        if self.path is None or not self._place(key).exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._place(key)), framework="pt") as file:
                facts = json.loads(file.metadata()["unit"])
                return {**facts["values"], **{name: file.get_tensor(f"t.{name}") for name in facts["tensors"]}}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):  # a damaged unit, or one just removed, is computed again
            return None

    def _keep(self, key: str, found: dict[str, Any]) -> None:
        if self.path is None:
            return
        from safetensors.torch import save

        tensors = {name: value.detach().cpu().contiguous() for name, value in found.items() if isinstance(value, torch.Tensor)}
        values = {name: value for name, value in found.items() if name not in tensors}
        facts = json.dumps({"key": key, "values": values, "tensors": sorted(tensors)})
        blob = save({f"t.{name}": value for name, value in tensors.items()} or {"none": torch.zeros(1)}, {"unit": facts})
        try:
            self.path.mkdir(parents=True, exist_ok=True)  # another run of the same name may have ended and cleared it away
            if not (self.path / MARK).exists():
                self._write(self.path / MARK, json.dumps({"journal": VERSION}).encode())
            self._write(self._place(key), blob)
        except OSError as error:
            raise refusal(
                RunError, str(self.path), f"a finished unit cannot be kept ({error.strerror})", "free space; what is kept stays"
            ) from None

    def _write(self, place: Path, blob: bytes) -> None:
        partial = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(3)}")
        try:
            partial.write_bytes(blob)
            os.replace(partial, place)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    def __repr__(self) -> str:
        return f"Journal({str(self.path) if self.path else None!r}, {len(self._known)} units, {self.restored} from disk)"


def digest(value: Any) -> str:
    """16 hex digits of plain data, dataclasses, tensors and arrays, by content. TypeError for what has no content to go by."""
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()[:16]


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        whole = value.detach().cpu().contiguous()
        hasher.update(f"tensor{tuple(whole.shape)}{whole.dtype}".encode())
        hasher.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
    elif isinstance(value, np.ndarray):
        hasher.update(f"array{value.shape}{value.dtype}".encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(hasher, [type(value).__qualname__, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}])
    elif isinstance(value, Mapping):
        hasher.update(b"{")
        for key in sorted(value, key=str):
            _feed(hasher, [str(key), value[key]])
        hasher.update(b"}")
    elif isinstance(value, (list, tuple, set, frozenset)):
        listed = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        hasher.update(b"[")
        for one in listed:
            _feed(hasher, one)
            hasher.update(b",")
        hasher.update(b"]")
    elif value is None or isinstance(value, (bool, int, float, str, bytes, Path, torch.dtype, torch.device)):
        hasher.update(f"{type(value).__name__}:{value!r}".encode())
    elif hasattr(value, "tobytes"):  # pictures
        hasher.update(f"{type(value).__name__}{getattr(value, 'size', '')}".encode() + value.tobytes())
    else:
        raise TypeError(f"a {type(value).__name__} has no content that a digest could be made of")
