"""Two runs in figures: their grids and the difference, every head of one against the same head of the other, and curves over depth for
runs whose heads cannot be matched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headscope.app import theme
from headscope.app.components.head_grid import colour_range, grid_height
from headscope.app.components.head_scatter import RING
from headscope.app.figures import empty, typed
from headscope.app.finder import Head
from headscope.app.metrics import Metric
from headscope.app.runs import Run

COLOURS = {"light": ("#0f6f8f", "#d55e00"), "dark": ("#5cc3d8", "#ff9d3d")}
"""The first run and the second, everywhere on the page."""
WAYS = ("solid", "dash")


def grids(first: Run, second: Run, metric: Metric, chosen: Head | None, scheme: theme.Scheme) -> dict[str, dict[str, Any]]:
    """Figures grid-a, grid-b (one colour range) and difference (b - a, centred): trace 0 is the heat map with z [heads, layers]."""
    a, b = first.grid(metric.name).T, second.grid(metric.name).T
    both = np.concatenate([a.ravel(), b.ravel()])
    low, high, signed = colour_range(both)
    change = b - a
    known = change[np.isfinite(change)]
    bound = float(np.abs(known).max()) if known.size and np.abs(known).max() > 0 else 1.0
    return {
        "grid-a": _grid(first, a, (low, high), signed, metric.label, chosen, scheme),
        "grid-b": _grid(first, b, (low, high), signed, metric.label, chosen, scheme),
        "difference": _grid(first, change, (-bound, bound), True, f"change of {metric.label}", chosen, scheme),
    }


def _grid(
    run: Run, values: np.ndarray, bounds: tuple[float, float], signed: bool, label: str, chosen: Head | None, scheme: theme.Scheme
) -> dict[str, Any]:
    gap = 1 if values.size <= 1200 else 0
    heat = {
        "type": "heatmap",
        "z": typed(values.astype(np.float32)),
        "x": run.layers,
        "y": list(range(run.heads)),
        "zmin": bounds[0],
        "zmax": bounds[1],
        "colorscale": theme.colourscale(scheme, signed=signed),
        "xgap": gap,
        "ygap": gap,
        "hoverongaps": False,
        "hovertemplate": f"<b>Layer %{{x}} · Head %{{y}}</b><br>{label} <b>%{{z:.3~g}}</b><extra></extra>",
        "colorbar": theme.colourbar(scheme, tickformat="~g", nticks=5),
    }
    traces: list[dict[str, Any]] = [heat]
    if chosen is not None:
        ring = {"symbol": "square-open", "size": 13, "color": RING[scheme], "line": {"width": 2, "color": RING[scheme]}}
        traces.append({"type": "scatter", "mode": "markers", "x": [chosen[0]], "y": [chosen[1]], "hoverinfo": "skip", "marker": ring})
    layout = theme.layout(
        scheme,
        margin={"l": 40, "r": 6, "t": 6, "b": 38},
        xaxis=theme.axis(scheme, title="layer", range=[run.layers[0] - 0.5, run.layers[-1] + 0.5], ticks="", nticks=12),
        yaxis=theme.axis(scheme, title="head", range=[run.heads - 0.5, -0.5], ticks="", nticks=10),
        height=compare_height(run),
        hoverdistance=1,
    )
    return {"data": traces, "layout": layout}


def compare_height(run: Run) -> int:
    """Pixels of a grid beside two others."""
    return min(max(int(grid_height(run) * 0.72), 170), 430)


def pairs_figure(first: Run, second: Run, metric: Metric, chosen: Head | None, scheme: theme.Scheme) -> dict[str, Any]:
    """Trace 0: every head that has a value in both (x first run, y second, customdata [layer, head]); then the line of no change."""
    palette = theme.PALETTES[scheme]
    a, b = first.grid(metric.name), second.grid(metric.name)
    base = theme.layout(scheme, margin={"l": 60, "r": 12, "t": 8, "b": 44}, height=360, hovermode="closest", dragmode="pan")
    rows, heads = np.nonzero(np.isfinite(a) & np.isfinite(b))
    if not rows.size:
        return empty("No head has a value in both runs.", base)
    x, y = a[rows, heads].astype(np.float32), b[rows, heads].astype(np.float32)
    names = [[first.layers[row], int(head)] for row, head in zip(rows, heads, strict=True)]
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    traces: list[dict[str, Any]] = [
        {
            "type": "scattergl" if rows.size > 4000 else "scatter",
            "mode": "markers",
            "x": typed(x),
            "y": typed(y),
            "customdata": names,
            "marker": {"size": 6, "color": palette.accent, "opacity": 0.6},
            "hovertemplate": "<b>Layer %{customdata[0]} · Head %{customdata[1]}</b><br>first <b>%{x:.3~g}</b>, "
            "second <b>%{y:.3~g}</b><extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "x": [low, high],
            "y": [low, high],
            "hoverinfo": "skip",
            "line": {"width": 1, "dash": "dot", "color": palette.muted},
        },
    ]
    if chosen is not None and list(chosen) in names:
        at = names.index(list(chosen))
        ring = {"symbol": "square-open", "size": 13, "color": RING[scheme], "line": {"width": 2, "color": RING[scheme]}}
        traces.append({"type": "scatter", "mode": "markers", "x": [float(x[at])], "y": [float(y[at])], "hoverinfo": "skip", "marker": ring})
    base |= {
        "xaxis": theme.axis(scheme, title=f"{metric.label}, first run", showgrid=True, gridcolor=palette.line, tickformat="~g"),
        "yaxis": theme.axis(scheme, title=f"{metric.label}, second run", showgrid=True, gridcolor=palette.line, tickformat="~g"),
    }
    return {"data": traces, "layout": base}


def depth_figure(first: Run, second: Run, metric: Metric, scheme: theme.Scheme) -> dict[str, Any]:
    """Two plots for any two runs: the mean and the largest head of each layer over relative depth, and all heads in order of the metric.

    Traces 0 and 1: means of the first and the second run; 2 and 3: heads by rank.
    """
    palette = theme.PALETTES[scheme]
    traces: list[dict[str, Any]] = []
    for number, run in enumerate((first, second)):
        values = run.grid(metric.name)
        depth = np.array([0.0]) if len(run.layers) == 1 else np.linspace(0, 1, len(run.layers))
        with np.errstate(invalid="ignore"):
            counted = np.isfinite(values).sum(1)
            mean = np.where(counted > 0, np.nansum(values, axis=1) / np.maximum(counted, 1), np.nan)
        line = {"width": 1.8, "color": COLOURS[scheme][number], "dash": WAYS[number]}
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(run.layers) < 60 else "lines",
                "name": ("first", "second")[number],
                "x": typed(depth.astype(np.float32)),
                "y": typed(mean.astype(np.float32)),
                "customdata": run.layers,
                "line": line,
                "marker": {"size": 5, "symbol": ("circle", "diamond")[number]},
                "hovertemplate": f"{('first', 'second')[number]} run, layer %{{customdata}}<br>mean %{{y:.3~g}}<extra></extra>",
            }
        )
    for number, run in enumerate((first, second)):
        values = run.grid(metric.name)
        ordered = np.sort(values[np.isfinite(values)])[::-1]
        share = (np.arange(ordered.size) + 1) / max(ordered.size, 1)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": typed(share.astype(np.float32)),
                "y": typed(ordered.astype(np.float32)),
                "xaxis": "x2",
                "yaxis": "y2",
                "line": {"width": 1.8, "color": COLOURS[scheme][number], "dash": WAYS[number]},
                "hovertemplate": f"{('first', 'second')[number]} run<br>%{{x:.0%}} of the heads have %{{y:.3~g}} or more<extra></extra>",
            }
        )
    quiet = {"showgrid": True, "gridcolor": palette.line, "tickformat": "~g"}
    layout = theme.layout(
        scheme,
        margin={"l": 52, "r": 10, "t": 8, "b": 44},
        height=280,
        hovermode="closest",
        xaxis=theme.axis(scheme, title="depth, first layer to last", domain=[0, 0.46], **quiet),
        yaxis=theme.axis(scheme, title=f"{metric.label}, mean of a layer", **quiet),
        xaxis2=theme.axis(
            scheme, title="share of the heads, strongest first", domain=[0.56, 1], anchor="y2", **{**quiet, "tickformat": ".0%"}
        ),
        yaxis2=theme.axis(scheme, title=metric.label, anchor="x2", **quiet),
    )
    return {"data": traces, "layout": layout}
