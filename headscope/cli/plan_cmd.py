"""`headscope plan RUN --method M --out plan.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.cli.console import emit_json, out, say, size, table
from headscope.errors import PlanError, refusal

if TYPE_CHECKING:
    from headscope.plans import SparsePlan
    from headscope.plans.mass import KeptMass


def plan(
    run: Annotated[Path | None, typer.Argument(help="Run directory that `headscope profile` wrote.")] = None,
    method: Annotated[str | None, typer.Option(help="Planner; `headscope plan --list` names them.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Plan file to write.")] = None,
    density: Annotated[float | None, typer.Option(help="Most that may be kept: a share of the causal entries of a prefill.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="A parameter of the method, name=value; repeatable.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens that density, FLOPs and bytes are stated at.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The live model, beside the run or in its place; what is missing is then measured.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the planners and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plan file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Make a sparse plan from a run, and say what it keeps and costs."""
    from headscope.plans.planners import PLANNERS, planner

    if listed:
        _list(as_json)
        return
    if method is None or to is None:
        raise refusal(PlanError, "no method or file", "a plan is made by one and kept in the other", "pass --method M --out plan.json")
    if run is None and model is None:
        raise refusal(PlanError, "neither a run nor a model", "a plan is made from one of them", "pass RUN, or --model MODEL, or both")
    if to.is_dir():
        raise refusal(PlanError, f"--out {to}", "it is a folder", "pass the plan's own file, e.g. --out plan.json")
    if to.exists() and not overwrite:
        raise refusal(PlanError, f"--out {to}", "it exists already", "choose another path, or pass --overwrite")
    options = options_of(option or [])
    for name, value in (("density", density), ("length", length)):
        if value is None:
            continue
        if name in options:
            raise refusal(PlanError, f"--{name} {value} beside --option {name}={options[name]}", "they say the same", "pass one of them")
        options[name] = value
    chosen = planner(method, **options)
    import headscope as hs

    scope = None if model is None else hs.load(model)
    source: Any = hs.HeadProfile.load(run) if run is not None else scope
    made = chosen.plan(source, scope)
    made.save(to, overwrite=overwrite)
    say(f"wrote {to}")
    at = int(made.parameters["length"])
    mass, why = _mass(made, source, at)
    if as_json:
        emit_json({"plan": str(to), "planners": len(PLANNERS), **summary(made, at, mass), **({"kept_mass_missing": why} if why else {})})
        return
    out.print(repr(made), markup=False, soft_wrap=True)
    for note in made.notes:
        out.print(f"note    {note}", markup=False, soft_wrap=True)
    if why:
        out.print(f"note    {why}", markup=False, soft_wrap=True)
    facts = summary(made, at, mass)
    rows = [
        (f"density at {at:,} tokens", f"{facts['density']:.1%}"),
        ("attention mass kept", _words(facts["kept_mass"])),
        ("FLOPs of QK and AV", f"{facts['flops']:.3g} ({facts['flops_share']:.1%} of dense)"),
        ("KV cache", f"{size(facts['kv_bytes'])} ({facts['kv_share']:.1%} of dense)"),
        *((f"{kind} heads", str(count)) for kind, count in facts["heads"].items()),
    ]
    table(f"{made.method} for {made.model.name}", ["what", "value"], rows, ["value"])


def summary(made: SparsePlan, length: int, mass: KeptMass | None) -> dict[str, Any]:
    """What a plan keeps and costs at a length, as plain data."""
    from headscope.plans import Dense, SparsePlan

    whole = SparsePlan.uniform(made.model, Dense())
    kept = None if mass is None else {"mean": mass.mean, "least": mass.least, "basis": mass.basis, "by_head": mass.value}
    return {
        "method": made.method,
        "parameters": dict(made.parameters),
        "notes": list(made.notes),
        "model": made.model.name,
        "length": length,
        "density": made.density(length),
        "kept_mass": kept,
        "flops": made.flops(length),
        "flops_share": made.flops(length) / whole.flops(length),
        "kv_bytes": made.kv_bytes(length),
        "kv_share": made.kv_share(length),
        "heads": made.counts(),
        "expected": made.dynamic,
    }


def options_of(given: list[str]) -> dict[str, Any]:
    """name=value pairs; values as JSON where they are, else as text."""
    found: dict[str, Any] = {}
    for one in given:
        name, equals, text = one.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise refusal(PlanError, f"--option {one}", "it is no name=value", "pass e.g. --option sink=64")
        if name in found:
            raise refusal(PlanError, f"--option {one}", f"{name} was given before", "pass it once")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _mass(made: SparsePlan, source: Any, length: int) -> tuple[KeptMass | None, str]:
    """The kept mass from what the source knows, or why it is not known."""
    from headscope.profile import HeadProfile

    if not isinstance(source, HeadProfile):
        return None, "kept mass is printed for runs with block maps; SparsePlan.kept_mass(scope) measures it"
    try:
        return made.kept_mass(source, length), ""
    except PlanError as error:
        return None, f"kept mass unknown: {error}"


def _words(kept: dict[str, Any] | None) -> str:
    return "unknown" if kept is None else f"{kept['mean']:.1%} (least of a head {kept['least']:.1%}; {kept['basis']})"


def _list(as_json: bool) -> None:
    from headscope.plans.planners import PLANNERS

    described = [cls.describe() for cls in PLANNERS.values()]
    if as_json:
        emit_json({"planners": described})
        return
    rows = []
    for one in described:
        needs = one["requires"]
        words = [" or ".join(" and ".join(group) for group in needs["metrics"]), *needs["tables"], *needs["statistics"]]
        words += ["a live model"] if needs["scope"] else []
        need = ", ".join(word for word in words if word) or "nothing"
        rows.append((one["name"], f"{one['title']}\nneeds {need}; {one['source']}"))
    table("planners", ["name", "what it does, what it needs, where it is from"], rows)
