"""Per-token statistics over the text, one small plot each with its own scale, on a shared position axis.

Long texts are thinned to the smallest and largest value of each stretch, so that no peak disappears; the hover text then belongs to
the token that was kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headscope.app import theme
from headscope.app.figures import empty, typed
from headscope.app.format import number, visible_token
from headscope.app.runs import Run
from headscope.statistics import DEFINITIONS

POINTS = 2048  # a plot is about 1,000 pixels wide, and each stretch keeps two
HEADING = 20  # pixels above each plot for its title, which would lie on the curve inside it
PLOT_HEIGHT = 84
_COLOURS = {"light": "#2c7a96", "dark": "#5cc3d8"}


def available(run: Run) -> list[str]:
    """Statistics that can be plotted: rows, then columns, without `argmax` (a position, not a size)."""
    return [name for name in run.statistics("row") if name != "argmax"] + run.statistics("column")


def default_series(run: Run) -> list[str]:
    """What the page opens with."""
    wanted = ("entropy", "row_max", "distance", "waad", "sink_mass", "column_sum")
    names = available(run)
    return [name for name in wanted if name in names] or names[:4]


def label(name: str) -> str:
    """A statistic's name for people."""
    return {"lse": "Log-sum-exp", "waad": "WAAD", "fai": "FAI", "row_max": "Largest weight", "column_sum": "Attention received"}.get(
        name, name.replace("_sq", " squared").replace("_", " ").capitalize()
    )


def meaning(name: str) -> str:
    """A statistic's meaning and unit, from the table of definitions."""
    found = DEFINITIONS.get(name)
    return f"{found.meaning} ({found.unit})" if found else ""


def values_of(run: Run, name: str, layer: int, head: int) -> np.ndarray:
    """One head's statistic over the text [N], float32."""
    kind = "row" if name in run.statistics("row") else "column"
    return run.series(kind, name, layer, head).astype(np.float32)


def thin(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Positions to draw: all of them, or the smallest and the largest of each of points / 2 stretches, in order."""
    if values.size <= points:
        return np.arange(values.size)
    kept = []
    for stretch in np.array_split(np.arange(values.size), points // 2):
        part = np.where(np.isnan(values[stretch]), -np.inf, values[stretch])
        low = np.where(np.isnan(values[stretch]), np.inf, values[stretch])
        kept += sorted({int(stretch[low.argmin()]), int(stretch[part.argmax()])})
    return np.asarray(kept)


def series_figure(run: Run, layer: int, head: int, names: list[str], scheme: theme.Scheme, token: int | None = None) -> dict[str, Any]:
    """Trace i is statistic i: x positions, y values; the plots share the x axis."""
    base = theme.layout(scheme, margin={"l": 56, "r": 10, "t": 24, "b": 38}, hovermode="x", uirevision=f"{run.id}")
    if not names:
        why = (
            "Choose a statistic to plot."
            if available(run)
            else "This run keeps no statistics along a text: profile again with keep_statistics=True."
        )
        return empty(why, {**base, "height": 120})
    palette = theme.PALETTES[scheme]
    gap = HEADING / (len(names) * PLOT_HEIGHT)
    share = (1 - gap * (len(names) - 1)) / len(names)
    traces: list[dict[str, Any]] = []
    figure_layout: dict[str, Any] = {**base, "height": figure_height(len(names)), "annotations": []}
    figure_layout["margin"] = {**base.get("margin", {}), "t": HEADING}
    length = 0
    for index, name in enumerate(names):
        values = values_of(run, name, layer, head)
        length = values.size
        top = 1 - index * (share + gap)
        suffix = "" if index == 0 else str(index + 1)
        traces.append(_line(run, name, values, scheme) | {"yaxis": f"y{suffix}"})
        ceiling = plot_ceiling(values)
        figure_layout[f"yaxis{suffix}"] = theme.axis(
            scheme,
            domain=[max(top - share, 0), top],
            nticks=3,
            showgrid=True,
            gridcolor=palette.line,
            tickformat="~g",
            fixedrange=True,
            **({} if ceiling is None else {"range": [0, ceiling]}),
        )
        figure_layout["annotations"].append(_heading(name, values, ceiling, top, palette))
    figure_layout["xaxis"] = theme.axis(
        scheme,
        title="token position",
        range=[0, length],
        anchor="y" if len(names) == 1 else f"y{len(names)}",
        minallowed=0,
        maxallowed=length,
        showspikes=True,
        spikemode="across",
        spikethickness=1,
        spikedash="solid",
        spikecolor=palette.muted,
        spikesnap="hovered data",
    )
    figure_layout["shapes"] = chosen_token(token, palette.accent)
    return {"data": traces, "layout": figure_layout}


def _line(run: Run, name: str, values: np.ndarray, scheme: theme.Scheme) -> dict[str, Any]:
    kept, tokens = thin(values), run.tokens
    return {
        "type": "scatter",
        "mode": "lines",
        "name": label(name),
        "x": typed(kept.astype(np.int32)),
        "y": typed(values[kept]),
        "text": [visible_token(tokens[position]) if tokens else "" for position in kept],
        "hovertemplate": "%{y:.4~g}   <b>%{text}</b>  #%{x}<extra></extra>",
        "line": {"width": 1.1, "color": _COLOURS[scheme]},
        "connectgaps": False,
    }


def _heading(name: str, values: np.ndarray, ceiling: float | None, top: float, palette: theme.Palette) -> dict[str, Any]:
    text = f"<b>{label(name)}</b>"
    if ceiling is not None:
        text += f"   {number(float(np.nanmax(values)))} at #{int(np.nanargmax(values)):,}, above the axis"
    return {
        "text": text,
        "x": 0.004,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11.5, "color": palette.text},
        "bgcolor": _shade(palette.panel),
        "borderpad": 2,
    }


def plot_ceiling(values: np.ndarray) -> float | None:
    """Where the axis ends when a few values dwarf all others (a sink token receives as much as all the rest): a little above the 99.5th
    percentile. None where everything fits.
    """
    known = values[np.isfinite(values)]
    if not known.size or known.min() < 0:
        return None
    usual = float(np.percentile(known, 99.5))
    return 1.2 * usual if usual > 0 and float(known.max()) > 6 * usual else None


def figure_height(plots: int) -> int:
    """Pixels for so many plots."""
    return max(plots, 1) * PLOT_HEIGHT + 54 + HEADING


def chosen_token(token: int | None, colour: str) -> list[dict[str, Any]]:
    """A line at the chosen token through all plots."""
    if token is None:
        return []
    return [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": token, "x1": token, "line": {"color": colour, "width": 1, "dash": "dot"}}
    ]


def _shade(colour: str) -> str:
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.75)"
