"""Every head by rank of one metric: shows where the few strong heads end, and which roles they have."""

from __future__ import annotations

from typing import Any

import numpy as np

from headscope.app import theme
from headscope.app.figures import typed
from headscope.app.metrics import Metric
from headscope.app.runs import Run


def sorted_figure(run: Run, metric: Metric, roles: list[str], scheme: theme.Scheme) -> dict[str, Any]:
    """Trace 0 holds every head (x = rank from 1, y = value, customdata = [layer, head]); one more trace per chosen role."""
    values = run.grid(metric.name)
    layers, heads = np.nonzero(np.isfinite(values))
    order = np.argsort(-values[layers, heads], kind="stable")
    layers, heads = layers[order], heads[order]
    height = values[layers, heads]
    names = [(run.layers[layer], int(head)) for layer, head in zip(layers, heads, strict=True)]
    position = {name: rank for rank, name in enumerate(names, start=1)}
    palette = theme.PALETTES[scheme]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": typed(np.arange(1, len(names) + 1)),
            "y": typed(height.astype(np.float32)),
            "customdata": [list(name) for name in names],
            "hovertemplate": "<b>Layer %{customdata[0]} · Head %{customdata[1]}</b><br>"
            f"{metric.label} <b>%{{y:.3~g}}</b> · rank %{{x}}<extra></extra>",
            "line": {"width": 1, "color": palette.line},
            "marker": {"size": 4, "color": palette.muted if roles else palette.accent, "opacity": 0.45 if roles else 0.9},
        }
    ]
    for role in roles:
        index = run.role_index(role)
        found = [name for name in run.roles[role] if name in position]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": role,
                "x": [position[name] for name in found],
                "y": [float(height[position[name] - 1]) for name in found],
                "hoverinfo": "skip",
                "marker": {
                    "symbol": theme.role_symbol(index),
                    "color": theme.role_colour(index),
                    "size": round(8 * theme.role_size(index), 1),
                    "line": {"width": 1, "color": palette.marker_edge},
                },
            }
        )
    figure_layout = theme.layout(
        scheme,
        margin={"l": 44, "r": 12, "t": 4, "b": 36},
        xaxis=theme.axis(scheme, title="heads, strongest first", range=[-len(names) * 0.01, len(names) * 1.01 + 1]),
        yaxis=theme.axis(scheme, nticks=4, showgrid=True, gridcolor=palette.line, tickformat="~g"),
        height=138,
        hovermode="closest",
        uirevision=run.id,
    )
    return {"data": traces, "layout": figure_layout}
