"""Density per head of a plan, layer x head like every other grid, with the pattern in words under the pointer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.app import theme
from headscope.app.components.head_grid import grid_height
from headscope.app.figures import typed
from headscope.app.runs import Run

if TYPE_CHECKING:
    from headscope.plans.plan import SparsePlan


def plan_figure(run: Run, plan: SparsePlan, length: int, scheme: theme.Scheme, kept: np.ndarray | None = None) -> dict[str, Any]:
    """The figure: z [heads, layers] float32, the share of entries that a head computes. `kept` [L, H]: its attention mass kept."""
    values = plan.densities(length).T
    gap = 2 if values.size <= 600 else 1 if values.size <= 2400 else 0
    layers = list(plan.model.layers)
    hover = []
    for head in range(values.shape[0]):
        row = []
        for at, layer in enumerate(layers):
            if (layer, head) not in plan.patterns:
                row.append("")
                continue
            text = f"<b>Layer {layer} · Head {head}</b><br>{plan.patterns[layer, head]}<br>computes <b>{values[head, at]:.1%}</b>"
            if kept is not None and np.isfinite(kept[at, head]):
                text += f"<br>keeps <b>{kept[at, head]:.1%}</b> of its attention"
            row.append(text)
        hover.append(row)
    heat = {
        "type": "heatmap",
        "z": typed(values.astype(np.float32)),
        "x": layers,
        "y": list(range(values.shape[0])),
        "zmin": 0,
        "zmax": 1,
        "colorscale": theme.colourscale(scheme, signed=False),
        "xgap": gap,
        "ygap": gap,
        "hoverinfo": "text",
        "hovertext": hover,
        "hoverongaps": False,
        "colorbar": theme.colourbar(scheme, tickvals=[0, 0.25, 0.5, 0.75, 1], ticktext=["0 %", "25 %", "50 %", "75 %", "100 %"]),
    }
    layout = theme.layout(
        scheme,
        margin={"l": 44, "r": 8, "t": 14, "b": 40},
        xaxis=theme.axis(scheme, title="layer", range=[layers[0] - 0.5, layers[-1] + 0.5], dtick=_tick(len(layers)), ticks=""),
        yaxis=theme.axis(scheme, title="head", range=[values.shape[0] - 0.5, -0.5], dtick=_tick(values.shape[0]), ticks=""),
        height=grid_height(run),
        hoverdistance=1,
        uirevision=run.id,
    )
    return {"data": [heat], "layout": layout}


def _tick(size: int) -> int:
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if size / step <= 34)
