"""What every command prints with: results on stdout, progress and words on stderr, errors as one line.

The rule is that `headscope ... --json > file` gives a file that parses, whatever else is said on the way. An error is one line on
stderr (and, with --json, also an object with an "error" key on stdout), and the exit code is 0 only when the command did its work.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PIPED = 160
"""Columns of a table that goes to a file or a pipe, where no terminal has a width."""

out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A word to the person, on stderr: wrapped on a terminal, one line in a file."""
    err.print(text, markup=False, soft_wrap=not err.is_terminal)


def plain(value: Any) -> Any:
    """A value that JSON can hold: numpy and torch scalars unwrapped, NaN and infinities as null, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def emit_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Iterable[str] = ()) -> None:
    """A table on stdout; columns named in `numeric` are right-aligned."""
    right = set(numeric)
    view = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        view.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(cell(value) for value in row))
    out.print(view)


def cell(value: Any) -> str:
    """How a value is written in a table: floats with three significant digits after the point, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def size(number: float) -> str:
    """Bytes for people: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")
