"""`headscope import PATH --format F --out RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headscope.cli.console import emit_json, say
from headscope.cli.show_cmd import print_profile, summary
from headscope.errors import RunError, refusal

if TYPE_CHECKING:
    from headscope.export.imported import Like


def import_file(
    path: Annotated[Path, typer.Argument(help="A published file, or a directory that `headscope export` or the engine wrote.")],
    format: Annotated[str, typer.Option("--format", "-f", help="Format by name; `headscope formats` lists them.")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    like: Annotated[str | None, typer.Option(help="Model, run or plan.json that says what the file does not: key heads, head_dim.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens that shares in the file refer to.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Also write the file's plan as plan.json.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Open another engine's file as a run: to show, to compare, to export again."""
    from headscope.export import find

    form = find(format)
    if out.exists() and not overwrite:
        raise refusal(RunError, f"--out {out}", "it exists already", "choose another path, or pass --overwrite")
    if plan is not None and plan.exists() and not overwrite:
        raise refusal(RunError, f"--plan {plan}", "it exists already", "choose another path, or pass --overwrite")
    found = form.read(path, like=None if like is None else _shape(like), length=length)
    if plan is not None and found.plan_found is None:
        raise refusal(
            RunError, f"--plan {plan}", "the file holds scores and no plan", "make one: headscope plan RUN --method duo --out plan.json"
        )
    found.save(out, overwrite=overwrite)
    if plan is not None and found.plan_found is not None:
        found.plan_found.save(plan, overwrite=overwrite)
        say(f"wrote {plan}")
    say(f"wrote {out}")
    if as_json:
        emit_json({"run": str(out), "plan": None if found.plan_found is None else found.plan_found.counts(), **summary(found, 10)})
    else:
        print_profile(found, 10)


def _shape(like: str) -> Like:
    """A run, a plan, or a model by its name."""
    import headscope as hs

    place = Path(like)
    if place.is_dir() and (place / "card.json").is_file():
        return hs.HeadProfile.load(place)
    if place.is_file() and place.suffix == ".json":
        return hs.SparsePlan.load(place)
    return hs.load(like)
