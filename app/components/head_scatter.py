"""Every head on two metrics: which heads are strong in both, and which of one kind are not of the other. Drawing a box picks heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from headscope.app import theme
from headscope.app.figures import empty, typed
from headscope.app.finder import Head
from headscope.app.metrics import describe
from headscope.app.ranks import rank_correlation
from headscope.app.runs import Run

HEIGHT = 380
RING = {"light": "#d55e00", "dark": "#ff9d3d"}


def other_metric(run: Run, first: str) -> str:
    """What the y axis opens with: the metric that says most beside the first, which is the one least rank-correlated with it."""
    if first not in run.partners:
        run.partners[first] = _least_alike(run, first)
    return run.partners[first]


def _least_alike(run: Run, first: str) -> str:
    others = [name for name in run.metrics if name != first]
    known = [name for name in others if np.isfinite(run.grid(name)).sum() > 2 and np.nanstd(run.grid(name)) > 0]
    if not known:
        return others[0] if others else first
    return min(known, key=lambda name: abs(rank_correlation(run.grid(first), run.grid(name))))


def scatter_figure(
    run: Run, x: str, y: str, roles: list[str], picked: list[Head], pins: list[Head], scheme: theme.Scheme
) -> dict[str, Any]:
    """Trace 0 is every head with a value of both (customdata [layer, head]); then the chosen roles, the picked heads, the pinned ones."""
    palette = theme.PALETTES[scheme]
    base = theme.layout(scheme, margin={"l": 60, "r": 12, "t": 10, "b": 44}, height=HEIGHT, dragmode="select", uirevision=f"{run.id}{x}{y}")
    across, up = run.grid(x), run.grid(y)
    rows, heads = np.nonzero(np.isfinite(across) & np.isfinite(up))
    if not rows.size:
        return empty(f"No head has both {describe(run.card, x).label} and {describe(run.card, y).label}.", base)
    names = [(run.layers[row], int(head)) for row, head in zip(rows, heads, strict=True)]
    place = {name: index for index, name in enumerate(names)}
    xs, ys = across[rows, heads].astype(np.float32), up[rows, heads].astype(np.float32)
    quiet = bool(roles or picked)
    labels = describe(run.card, x).label, describe(run.card, y).label
    traces: list[dict[str, Any]] = [
        {
            "type": "scattergl" if len(names) > 4000 else "scatter",
            "mode": "markers",
            "x": typed(xs),
            "y": typed(ys),
            "customdata": [list(name) for name in names],
            "hovertemplate": "<b>Layer %{customdata[0]} · Head %{customdata[1]}</b><br>"
            f"{labels[0]} <b>%{{x:.3~g}}</b><br>{labels[1]} <b>%{{y:.3~g}}</b><extra></extra>",
            "marker": {
                "size": 6,
                "color": palette.muted if quiet else palette.accent,
                "opacity": 0.35 if quiet else 0.65,
                "line": {"width": 0},
            },
            "selected": {"marker": {"opacity": 0.8}},
            "unselected": {"marker": {"opacity": 0.35}},
        }
    ]
    for role in roles:
        index = run.role_index(role)
        mine = [place[name] for name in run.roles.get(role, []) if name in place]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": role,
                "x": [float(xs[at]) for at in mine],
                "y": [float(ys[at]) for at in mine],
                "hoverinfo": "skip",
                "marker": {
                    "symbol": theme.role_symbol(index),
                    "color": theme.role_colour(index),
                    "size": round(9 * theme.role_size(index), 1),
                    "line": {"width": 1, "color": palette.marker_edge},
                },
            }
        )
    for what, chosen, size, symbol in (("picked", picked, 9, "circle-open"), ("pinned", pins, 13, "square-open")):
        mine = [place[name] for name in chosen if name in place]
        named = what == "pinned" or len(mine) <= 12
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text" if named else "markers",
                "name": what,
                "x": [float(xs[at]) for at in mine],
                "y": [float(ys[at]) for at in mine],
                "text": [f"{names[at][0]}.{names[at][1]}" for at in mine],
                "textposition": "top center",
                "textfont": {"size": 10.5, "color": palette.text},
                "hoverinfo": "skip",
                "marker": {"symbol": symbol, "size": size, "color": RING[scheme], "line": {"width": 2, "color": RING[scheme]}},
            }
        )
    base |= {
        "xaxis": theme.axis(scheme, title=labels[0], showgrid=True, gridcolor=palette.line, tickformat="~g"),
        "yaxis": theme.axis(scheme, title=labels[1], showgrid=True, gridcolor=palette.line, tickformat="~g"),
        "hovermode": "closest",
        "selectdirection": "any",
        "newselection": {"line": {"color": RING[scheme], "width": 1.5}},
    }
    return {"data": traces, "layout": base}
