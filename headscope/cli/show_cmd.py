"""`headscope show RUN`, and how a profile is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.cli.console import emit_json, out, table
from headscope.errors import ProbeError, refusal

if TYPE_CHECKING:
    from headscope.profile import HeadProfile


def show(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    top: Annotated[int, typer.Option(help="Heads per role.")] = 10,
    metric: Annotated[str | None, typer.Option(help="Rank by this metric instead of by roles.")] = None,
    kinds: Annotated[bool, typer.Option("--kinds", help="One kind per head, by the trained classifier, instead of roles.")] = False,
    clusters: Annotated[bool, typer.Option("--clusters", help="Groups of heads that are alike, instead of roles.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print what a run found: its card, and the top heads of each role or of one metric."""
    import headscope as hs

    check_top(top)
    asked = [name for name, given in (("--metric", metric is not None), ("--kinds", kinds), ("--clusters", clusters)) if given]
    if len(asked) > 1:
        raise refusal(ProbeError, " and ".join(asked), "each is a view of its own", "pass one of them")
    profile = hs.HeadProfile.load(run)
    if kinds or clusters:
        _sorts(profile, run, top, clusters, as_json)
        return
    if metric is not None:
        ranked = profile.rank(metric, top)
        rows = [{"layer": layer, "head": head, metric: profile.value(layer, head, metric)} for layer, head in ranked]
        if as_json:
            emit_json({"run": str(run), "metric": metric, "top": rows})
        else:
            print_card(profile)
            table(f"top {len(rows)} by {metric}", ["head", metric], [(f"{r['layer']}.{r['head']}", r[metric]) for r in rows], [metric])
        return
    if as_json:
        emit_json({"run": str(run), **summary(profile, top)})
    else:
        print_profile(profile, top)


def _sorts(profile: HeadProfile, run: Path, top: int, clusters: bool, as_json: bool) -> None:
    """Kinds by the classifier, or clusters."""
    if clusters:
        found = profile.clusters()
        rows = [
            {"cluster": int(row.cluster), "heads": int(row.heads), "nearest": list(row.nearest), "why": str(row.why)}
            for row in found.table.itertuples()
        ]
        if as_json:
            emit_json({"run": str(run), "silhouette": found.silhouette, "grouped": found.grouped, "clusters": rows})
            return
        print_card(profile)
        words = "" if found.grouped else ", no clear groups"
        cells = [(row.cluster, row.heads, f"{row.nearest[0]}.{row.nearest[1]}", row.why) for row in found.table.itertuples()]
        table(
            f"clusters (silhouette {found.silhouette:.2f}{words})",
            ["cluster", "heads", "most typical", "far from the mean in"],
            cells,
            ["heads"],
        )
        return
    frame = profile.kinds().sort_values("probability", ascending=False, kind="stable")
    groups = dict(sorted(((str(kind), part) for kind, part in frame.groupby("kind")), key=lambda one: -len(one[1])))
    if as_json:
        emit_json({"run": str(run), "kinds": {kind: part.to_dict("records") for kind, part in groups.items()}})
        return
    print_card(profile)
    cells = [
        (kind, len(part), ", ".join(f"{row.layer}.{row.head}" for row in part.head(top).itertuples()), str(part["why"].iloc[0]))
        for kind, part in groups.items()
    ]
    table("heads by kind (classifier, surest first)", ["kind", "heads", f"top {top}", "why the first"], cells, ["heads"])


def check_top(top: int) -> None:
    """Refuses a count of heads below 1 before any work is done for it."""
    if top < 1:
        raise refusal(ProbeError, f"--top {top}", "it counts heads and must be at least 1", "pass --top 10")


def summary(profile: HeadProfile, top: int) -> dict[str, Any]:
    """A profile as plain data: its card, the top heads of each role with why, and each metric's mean and range."""
    roles: dict[str, Any] = {}
    for role in profile.roles:
        heads = profile.top(role, top)
        roles[role] = {
            "count": profile.count(role),
            "top": [{"layer": layer, "head": head, "why": profile.why(layer, head, role)} for layer, head in heads],
        }
    metrics = {
        name: {"mean": float(profile.table[name].mean()), "min": float(profile.table[name].min()), "max": float(profile.table[name].max())}
        for name in profile.metrics
    }
    return {"card": profile.card.to_dict(), "roles": roles, "metrics": metrics}


def print_profile(profile: HeadProfile, top: int) -> None:
    """Card and roles as tables on stdout."""
    print_card(profile)
    rows = []
    for role in profile.roles:
        heads = profile.top(role, top)
        names = ", ".join(f"{layer}.{head}" for layer, head in heads) or "none"
        why = profile.why(*heads[0], role) if heads else ""
        rows.append((role, profile.count(role), names, why))
    if not any(count for _, count, *_ in rows):
        out.print(
            f"no head has a role; metrics of this run: {', '.join(profile.metrics)} (`headscope show RUN --metric NAME` ranks by one)"
        )
        return
    table("heads by role (layer.head, strongest first)", ["role", "heads", f"top {top}", "why the first"], rows, ["heads"])


def print_card(profile: HeadProfile) -> None:
    """The lines that say what the numbers are about."""
    for line in profile.card.lines():
        out.print(line, markup=False, soft_wrap=True)
