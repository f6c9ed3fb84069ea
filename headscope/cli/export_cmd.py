"""`headscope export RUN|plan.json --format F --out PATH`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.console import emit_json, out, say


def export(
    source: Annotated[Path, typer.Argument(help="Run directory (scores, or an imported plan), or a plan.json.")],
    format: Annotated[str, typer.Option("--format", "-f", help="Format by name; `headscope formats` lists them.")],
    target: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    lossy: Annotated[bool, typer.Option("--lossy", help="Round what the target cannot express, and report what that loses.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    length: Annotated[int | None, typer.Option(help="Tokens, for targets whose tables are made for a length.")] = None,
    metric: Annotated[str | None, typer.Option(help="Which scores of a run to write.")] = None,
    run: Annotated[Path | None, typer.Option(help="Beside a plan.json: the run whose maps say what rounding loses.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the loss report as JSON.")] = False,
) -> None:
    """Write a plan or a run's scores as the files that another engine reads, with a report of what it cannot hold."""
    import headscope as hs
    from headscope.export import find

    form = find(format)
    thing: hs.SparsePlan | hs.HeadProfile = hs.HeadProfile.load(source) if source.is_dir() else hs.SparsePlan.load(source)
    beside = None if run is None else hs.HeadProfile.load(run)
    report = form.write(thing, target, lossy=lossy, force=force, length=length, metric=metric, profile=beside)
    say(f"wrote {target / report.files[0]}")
    if as_json:
        emit_json({"out": str(target), **report.to_dict()})
        return
    out.print(report.text(), markup=False, soft_wrap=True)
    out.print(f"Load it, from {target}:\n{report.load}", markup=False, soft_wrap=True)
