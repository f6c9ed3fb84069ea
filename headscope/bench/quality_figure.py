"""The figure and the tables of `headscope bench quality`: one column per phase, one row per model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOURS = (
    *("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b"),
    *("#7f7f7f", "#bcbd22", "#9467bd", "#17becf", "#aa3377", "#4477aa", "#228833", "#ccbb44"),
)
"""Colours that stay apart for colour-blind readers as far as they go; symbols change with them."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
X = {
    "prefill": ("density", "share of the entries that the prefill computes"),
    "decode": ("read", "share of the keys that a decode step reads"),
}


def value(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    """What a row is judged by: the share of right answers, or the perplexity of its phase's tokens."""
    if "reason" in row:
        return None
    if "accuracy" in row:
        return float(row["accuracy"])
    return math.exp(row[f"nll_{row['phase']}"])


def tables(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One table per model: what was asked for, what was kept, how good the model was."""
    out = []
    for one in result["results"]:
        needle = any("accuracy" in row for row in one["rows"])
        measured = ["code", "entry", "accuracy"] if needle else ["perplexity"]
        columns = ["method", "phase", "asked", "computed", "read", "cached", *measured, "why not"]
        rows = []
        for row in one["rows"]:
            kept = [_text(row.get(name)) for name in ("density", "read", "cache")]
            found = [_text(row.get(name)) for name in measured] if needle else [_text(value(row, one), 2)]
            rows.append([row["method"], row["phase"], f"{row['target']:g}", *kept, *found, str(row.get("reason", ""))[:80]])
        out.append(
            {"title": f"{one['model']}: {one['task']}, {one['count']} of each kind, {one['device']}", "columns": columns, "rows": rows}
        )
    return out


def draw(result: dict[str, Any], methods: Sequence[str] | None = None) -> go.Figure:
    """Quality against what was kept, a line per method; the dashed line is dense attention."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    results = result["results"]
    present = [phase for phase in X if any(row["phase"] == phase for one in results for row in one["rows"])]
    names = list(dict.fromkeys(row["method"] for one in results for row in one["rows"] if row["method"] != "dense"))
    names = [name for name in names if methods is None or name in methods]
    titles = [f"{one['task']}: {phase}" for one in results for phase in present]
    figure = make_subplots(len(results), len(present), subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.12)
    shown: set[str] = set()
    for line, one in enumerate(results, start=1):
        for column, phase in enumerate(present, start=1):
            rows = [row for row in one["rows"] if row["phase"] == phase]
            for number, name in enumerate(names):
                points = sorted((row[X[phase][0]], at) for row in rows if row["method"] == name and (at := value(row, one)) is not None)
                if not points:
                    continue
                figure.add_trace(
                    go.Scatter(
                        x=[x for x, _ in points],
                        y=[y for _, y in points],
                        name=name,
                        legendgroup=name,
                        showlegend=name not in shown,
                        mode="lines+markers",
                        line={"color": COLOURS[number % len(COLOURS)], "width": 3 if name == "allocate" else 1.5},
                        marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
                    ),
                    row=line,
                    col=column,
                )
                shown.add(name)
            for row in rows:
                if row["method"] == "dense" and (at := value(row, one)) is not None:
                    figure.add_hline(y=at, line={"dash": "dash", "color": "#555"}, row=line, col=column)
            figure.update_xaxes(title=X[phase][1], tickformat=".0%", row=line, col=column)
            label = "whole answers right" if any("accuracy" in row for row in rows) else "perplexity"
            figure.update_yaxes(title=label, row=line, col=column)
            if label == "perplexity":
                figure.update_yaxes(type="log", row=line, col=column)
    figure.update_layout(template="plotly_white", width=1100, height=420 * len(results) + 60, legend={"title": "planner"})
    return figure


def _text(number: Any, digits: int = 3) -> str:
    return "" if number is None else f"{float(number):.{digits}f}"
