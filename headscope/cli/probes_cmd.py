"""`headscope probes`."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope.cli.console import emit_json, out, table
from headscope.errors import ProbeError, unknown_name


def probes(
    name: Annotated[str | None, typer.Argument(help="One probe: its page, parameters and metrics.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the probes: what each measures, what it needs, where it comes from."""
    import headscope as hs

    if name is not None:
        _page(name, as_json)
        return
    rows = [probe.describe() for probe in hs.probes.REGISTRY.values()]
    if as_json:
        emit_json({"probes": rows})
        return
    table(
        "probes",
        ["name", "metrics", "reads", "requires", "cost", "source"],
        [
            (
                row["name"],
                ", ".join(metric["name"] for metric in row["metrics"]),
                row["data"].replace("_", " "),
                ", ".join(row["requires"]),
                row["cost"],
                row["source"],
            )
            for row in rows
        ],
    )


def _page(name: str, as_json: bool) -> None:
    """Everything that a probe says of itself."""
    import headscope as hs

    if name not in hs.probes.REGISTRY:
        raise unknown_name(ProbeError, "probe", name, hs.probes.REGISTRY)
    row = hs.probes.REGISTRY[name].describe()
    if as_json:
        emit_json(row)
        return
    out.print(f"{row['name']}\n\n{row['page']}\n", markup=False, soft_wrap=True)
    for key in ("data", "requires", "cost", "source"):
        value = row[key] if isinstance(row[key], str) else ", ".join(row[key])
        out.print(f"{key:<9} {value}", markup=False, soft_wrap=True)
    settings = ", ".join(f"{key}={value!r}" for key, value in row["parameters"].items())
    out.print(f"settings  {settings or 'none'}", markup=False, soft_wrap=True)
    table(
        "metrics",
        ["name", "unit", "per", "a large value means"],
        [(one["name"], one["unit"], one["per"].replace("_", " "), one["higher_is"]) for one in row["metrics"]],
    )
