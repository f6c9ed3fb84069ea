"""Names and version of what a run directory holds.

    card.json                the run card; lists every other file with its checksum and size
    heads.parquet            one row per head
    statistics.safetensors   row/<name> and column/<name> [L, H, N] of the shown text
    tokens.json              the shown text, its ids and one piece of text per token
    maps.zarr                zarr v3: block_mass/<level> and block_max/<level> [L, H, n, n], in tiles
    tables/<name>.parquet    what active probes found that is no number per head
    pictures.json, .safetensors  attention over a picture by frame, see `headscope.store.pictures`
    qk.zarr                  zarr v3: <layer>/q [H, N, D], <layer>/k [Hkv, N, D], <layer>/lse [H, N] of the layers that were kept

A reader that meets a newer schema_version stops; it does not read what it thinks it knows. Older versions are read by this module's
successors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headscope.errors import RunError, refusal

SCHEMA_VERSION = 1

CARD = "card.json"
HEADS = "heads.parquet"
STATISTICS = "statistics.safetensors"
TOKENS = "tokens.json"
MAPS = "maps.zarr"
KEPT = "qk.zarr"
TABLES = "tables"
PICTURES = ("pictures.json", "pictures.safetensors")


def check_version(found: Any, where: Path) -> None:
    """Raises RunError unless `found` is a schema version that this code reads."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise refusal(RunError, str(where), f"its schema_version is {found!r}", "write the run again with `headscope profile`")
    if found > SCHEMA_VERSION:
        raise refusal(
            RunError,
            str(where),
            f"it was written with schema {found} and this headscope reads up to {SCHEMA_VERSION}",
            "update headscope to read it",
        )


def one_line(error: BaseException) -> str:
    """An error of another library as one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
