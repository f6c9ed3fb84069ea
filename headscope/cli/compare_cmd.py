"""`headscope compare RUN RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.console import emit_json, table


def compare(
    first: Annotated[Path, typer.Argument(help="Run directory.")],
    second: Annotated[Path, typer.Argument(help="Run directory of a model with the same layers and heads.")],
    top: Annotated[int, typer.Option(help="k of the top-k overlap.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare two runs head by head: rank correlation and top-k overlap of every metric that both have."""
    import headscope as hs

    result = hs.compare(hs.HeadProfile.load(first), hs.HeadProfile.load(second), top=top)
    if as_json:
        emit_json({"first": str(first), "second": str(second), **result.to_dict()})
        return
    rows = [(row["metric"], row["spearman"], row["pearson"], row["overlap"], row["most_changed"]) for row in result.rows()]
    columns = ["metric", "spearman", "pearson", f"top-{top} shared", "changed most"]
    table(f"{first} and {second}", columns, rows, columns[1:4])
