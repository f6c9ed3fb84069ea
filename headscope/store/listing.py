"""The runs in a folder, damaged ones included: a page that lists runs must say which cannot be read, and why."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headscope.errors import RunError, refusal
from headscope.store.atomic import interrupted, restore_interrupted
from headscope.store.read import open_run
from headscope.store.schema import CARD


@dataclass(frozen=True, slots=True)
class RunEntry:
    """One run of a folder: its card as plain data, or the reason why it cannot be read."""

    path: Path
    card: dict[str, Any] | None
    error: str | None = None

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name


def list_runs(folder: str | Path) -> list[RunEntry]:
    """The runs in a folder, newest first; a folder that is itself a run gives that one. Hidden directories (unfinished writes) are not
    runs.

    RunError when the folder does not exist.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise refusal(RunError, str(folder), "there is no such directory", "pass a run directory or a folder of them")
    for lost in interrupted(folder):
        with contextlib.suppress(RunError):  # a folder that may not be written: the others are listed all the same
            restore_interrupted(lost)
    places = [folder] if (folder / CARD).exists() else sorted(entry for entry in folder.iterdir() if _may_be_run(entry))
    entries = []
    for place in places:
        try:
            entries.append(RunEntry(place, open_run(place).card.to_dict()))
        except RunError as error:
            entries.append(RunEntry(place, None, str(error)))
    return sorted(entries, key=lambda entry: str((entry.card or {}).get("created", "")), reverse=True)


def _may_be_run(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".") and ((entry / CARD).exists() or (entry / "heads.parquet").exists())
