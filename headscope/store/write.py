"""Writing a run directory.

The card is written last and lists every other file with its size and checksum, so a directory without a card is not a run, and a file that
was cut short by a full disk or a broken copy is noticed before a number is read from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.store import files
from headscope.store.atomic import atomic_directory
from headscope.store.pyramid import write_maps
from headscope.store.schema import CARD, HEADS, MAPS, SCHEMA_VERSION, STATISTICS, TOKENS

if TYPE_CHECKING:
    import pandas as pd

    from headscope.store.content import RunContent


def write_run(
    path: str | Path, card: dict[str, Any], heads: pd.DataFrame, content: RunContent | None = None, *, overwrite: bool = False
) -> Path:
    """Writes a run directory and returns its absolute path.

    `card`: the run card as plain data (`files` and `schema_version` are filled in here). `heads`: one row per head. RunError when the path
    exists and `overwrite` is false, or cannot be written; then nothing is left behind.
    """
    target = Path(path).absolute()
    with atomic_directory(target, overwrite=overwrite) as folder:
        files.write_heads(folder / HEADS, heads)
        if content is not None:
            if content.arrays:
                files.write_statistics(folder / STATISTICS, content.arrays)
            if content.tokens is not None:
                files.write_tokens(folder / TOKENS, content.tokens)
            if content.maps is not None:
                write_maps(folder / MAPS, content.pyramids, content.maps)
        listed = {
            entry.relative_to(folder).as_posix(): {"sha256": files.sha256_of(entry), "bytes": entry.stat().st_size}
            for entry in sorted(folder.rglob("*"))
            if entry.is_file()
        }
        whole = {**card, "schema_version": SCHEMA_VERSION, "files": listed}
        (folder / CARD).write_text(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return target
