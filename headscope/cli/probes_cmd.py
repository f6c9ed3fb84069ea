"""`headscope probes`."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope.cli.console import emit_json, table


def probes(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the probes: what each measures, what it needs, where it comes from."""
    import headscope as hs

    rows = [probe.describe() for probe in hs.probes.REGISTRY.values()]
    if as_json:
        emit_json({"probes": rows})
        return
    table(
        "probes",
        ["name", "metrics", "text", "source"],
        [(row["name"], ", ".join(metric["name"] for metric in row["metrics"]), row["data"], row["source"]) for row in rows],
    )
