"""The layer x head grid of one metric: layers run left to right, the way the data goes.

Colours show values, or ranks where a few large values would leave the rest in one colour. Roles are drawn as symbols in the cells;
choosing roles fades every head that has none of them. Nothing is faded into a value: the fade is a layer of its own, so hovering
always reads the true number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headscope.app import theme
from headscope.app.components.head_scatter import RING
from headscope.app.figures import typed
from headscope.app.finder import Head
from headscope.app.format import number, words
from headscope.app.metrics import Metric
from headscope.app.ranks import descending_ranks, rank_share
from headscope.app.runs import Run

SCALES = ("value", "rank")
UNCOMMON = 0.15  # share of all heads
REASONS_UP_TO = 2048  # heads; beyond that the hover text keeps to role names, so that the figure stays small


def grid_figure(
    run: Run,
    metric: Metric,
    scale: str,
    roles: list[str],
    scheme: theme.Scheme,
    picked: list[Head] | None = None,
    pins: list[Head] | None = None,
) -> dict[str, Any]:
    """The figure: trace 0 is the heat map (z [heads, layers]), then the fade if roles are chosen, then one trace of symbols per role, then
    rings around the picked heads and squares around the pinned ones.
    """
    values = run.grid(metric.name).T  # [H, L]
    shown = rank_share(values) if scale == "rank" else values
    palette = theme.PALETTES[scheme]
    gap = 2 if values.size <= 600 else 1 if values.size <= 2400 else 0
    low, high, signed = colour_range(shown)
    heat = {
        "type": "heatmap",
        "z": typed(shown.astype(np.float32)),
        "x": run.layers,
        "y": list(range(run.heads)),
        "zmin": low,
        "zmax": high,
        "colorscale": theme.colourscale(scheme, signed=signed and scale != "rank"),
        "xgap": gap,
        "ygap": gap,
        "hoverinfo": "text",
        "hovertext": _hover(run, metric, values),
        "hoverongaps": False,
        "colorbar": theme.colourbar(scheme, **_ticks(scale)),
    }
    traces: list[dict[str, Any]] = [heat]
    if roles:
        traces.append(_fade(run, roles, palette))
    traces += _symbols(run, [role for role in run.roles if role in (roles or uncommon(run))], palette)
    traces += _marked(run, picked or [], pins or [], scheme)
    figure_layout = theme.layout(
        scheme,
        margin={"l": 44, "r": 8, "t": 26, "b": 40},
        xaxis=theme.axis(scheme, title="layer", range=[run.layers[0] - 0.5, run.layers[-1] + 0.5], dtick=_tick(len(run.layers)), ticks=""),
        yaxis=theme.axis(scheme, title="head", range=[run.heads - 0.5, -0.5], dtick=_tick(run.heads), ticks=""),
        height=grid_height(run),
        hoverdistance=1,
        uirevision=run.id,
    )
    return {"data": traces, "layout": figure_layout}


def uncommon(run: Run) -> list[str]:
    """The roles that are drawn when none is chosen: those of few heads, since a symbol in every other cell says nothing."""
    return [role for role, heads in run.roles.items() if len(heads) <= UNCOMMON * len(run.reasons)]


def grid_height(run: Run) -> int:
    """Height in pixels: cells near 28 px for small models, never more than a screen for large ones."""
    return int(min(max(run.heads * 28, 120), 560)) + 66


def colour_range(values: np.ndarray) -> tuple[float, float, bool]:
    """(low, high, signed) of the colours: symmetric around zero for values of both signs, from zero for shares, else the data's range."""
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0, False
    low, high = float(known.min()), float(known.max())
    if low < 0 < high and min(-low, high) > 0.02 * max(-low, high):
        bound = max(-low, high)
        return -bound, bound, True
    if low >= 0 and high <= 1:
        low = 0.0
    return low, high if high > low else low + 1.0, False


def _hover(run: Run, metric: Metric, values: np.ndarray) -> list[list[str]]:
    ranks = descending_ranks(values)
    total = int(np.isfinite(ranks).sum())
    detailed = values.size <= REASONS_UP_TO
    rows = []
    for head in range(run.heads):
        row = []
        for index, layer in enumerate(run.layers):
            if not run.has(layer, head):
                row.append("")
                continue
            value = values[head, index]
            name = f"Layer {layer} · Head {head}" if detailed else f"{layer}.{head}"
            line = f"<b>{name}</b><br>{metric.label} <b>{number(value)}</b>"
            if np.isfinite(value):
                line += f" · rank {ranks[head, index]:.0f} of {total}"
            why = run.reasons[layer, head]
            if why:
                lines = [f"<b>{words(role)}</b>  {reason}" for role, reason in why.items()] if detailed else [", ".join(why)]
                line += "<br><br>" + "<br>".join(lines)
            row.append(line)
        rows.append(row)
    return rows


def _fade(run: Run, roles: list[str], palette: theme.Palette) -> dict[str, Any]:
    kept = {key for role in roles for key in run.roles.get(role, [])}
    z = [[None if (layer, head) in kept else 1 for layer in run.layers] for head in range(run.heads)]
    return {
        "type": "heatmap",
        "z": z,
        "x": run.layers,
        "y": list(range(run.heads)),
        "colorscale": [[0, palette.panel], [1, palette.panel]],
        "opacity": 0.82,
        "showscale": False,
        "hoverinfo": "skip",
    }


def _symbols(run: Run, roles: list[str], palette: theme.Palette) -> list[dict[str, Any]]:
    """One trace per role; the symbols of a cell stand side by side around its middle, two rows when there are more than three."""
    places: dict[str, list[tuple[float, float]]] = {role: [] for role in roles}
    for (layer, head), why in run.reasons.items():
        mine = [role for role in roles if role in why]
        columns = len(mine) if len(mine) <= 3 else -(-len(mine) // 2)
        for position, role in enumerate(mine):
            row, column = divmod(position, columns)
            width = min(columns, len(mine) - row * columns)
            dy = 0.0 if len(mine) == columns else (row - 0.5) * 0.42
            places[role].append((layer + (column - (width - 1) / 2) * (0.36 if columns < 3 else 0.3), head + dy))
    cells = run.heads * len(run.layers)
    size = 8 if cells <= 600 else 5 if cells <= 2400 else 4
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": role,
            "x": [x for x, _ in places[role]],
            "y": [y for _, y in places[role]],
            "marker": {
                "symbol": theme.role_symbol(run.role_index(role)),
                "color": theme.role_colour(run.role_index(role)),
                "size": round(size * theme.role_size(run.role_index(role)), 1),
                "line": {"width": 1, "color": palette.marker_edge},
            },
            "hoverinfo": "skip",
        }
        for role in roles
    ]


def _marked(run: Run, picked: list[Head], pins: list[Head], scheme: theme.Scheme) -> list[dict[str, Any]]:
    cells = run.heads * len(run.layers)
    size = 13 if cells <= 600 else 9 if cells <= 2400 else 6
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [layer for layer, _ in heads],
            "y": [head for _, head in heads],
            "hoverinfo": "skip",
            "marker": {"symbol": symbol, "size": size + extra, "color": RING[scheme], "line": {"width": 2, "color": RING[scheme]}},
        }
        for name, heads, symbol, extra in (("picked", picked, "circle-open", 0), ("pinned", pins, "square-open", 4))
        if heads
    ]


def _ticks(scale: str) -> dict[str, Any]:
    if scale != "rank":
        return {}
    return {"tickvals": [0.005, 0.25, 0.5, 0.75, 1], "ticktext": ["lowest", "25 %", "median", "75 %", "highest"]}


def _tick(size: int) -> int:
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if size / step <= 34)
