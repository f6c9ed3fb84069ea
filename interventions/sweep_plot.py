"""The figure of a sweep: depth to the right and heads downwards, as in a profile's heat map; settings as lines.

Colours are centred on the baseline when values lie on both sides of it, so that "no change" has one colour in every figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headscope.errors import InterventionError, refusal

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headscope.sweeps import Sweep

INK = "#1f2430"


def sweep_figure(sweep: Sweep) -> go.Figure:
    """Heat map [heads] x [layers], or [setting 2] x [setting 1]; a line over one setting, one per head where heads were swept too."""
    import plotly.graph_objects as go

    table = sweep.table
    if "head" in table.columns and not sweep.settings:
        figure = go.Figure(_heat(sweep, sweep.matrix().T, [str(one) for one in dict.fromkeys(table["layer"])]))
        figure.update_xaxes(title="layer", type="category")
        figure.update_yaxes(title="head", autorange="reversed", dtick=1)
    elif len(sweep.settings) == 1:
        setting = sweep.settings[0]
        figure = go.Figure()
        groups = table.groupby(["layer", "head"], sort=False) if "head" in table.columns else [(None, table)]
        for key, part in groups:
            label = sweep.metric if key is None else f"{key[0]}.{key[1]}"
            figure.add_scatter(x=part[setting], y=part["value"], mode="lines+markers", name=label)
        figure.add_hline(y=sweep.baseline, line={"dash": "dot", "color": INK, "width": 1}, annotation_text="no intervention")
        figure.update_xaxes(title=setting)
        figure.update_yaxes(title=sweep.metric)
    elif len(sweep.settings) == 2 and "head" not in table.columns:
        first, second = sweep.settings
        grid = table.pivot_table(index=second, columns=first, values="value", sort=False)
        figure = go.Figure(_heat(sweep, grid.to_numpy(), [str(one) for one in grid.columns], [str(one) for one in grid.index]))
        figure.update_xaxes(title=first, type="category")
        figure.update_yaxes(title=second, type="category")
    else:
        raise refusal(
            InterventionError,
            f"a sweep over {', '.join(('heads', *sweep.settings))}",
            "it has too many axes for one figure",
            "read its table",
        )
    figure.update_layout(title=f"{sweep.metric} (without intervention: {sweep.baseline:.4g})", template="plotly_white")
    return figure


def _heat(sweep: Sweep, z: np.ndarray, x: list[str], y: list[str] | None = None) -> go.Heatmap:
    import plotly.graph_objects as go

    low, high, middle = float(np.nanmin(z)), float(np.nanmax(z)), sweep.baseline
    if low < middle < high:
        reach = max(middle - low, high - middle)
        scale = {"colorscale": "RdBu", "zmin": middle - reach, "zmax": middle + reach}
    else:
        scale = {"colorscale": "Viridis", "zmin": low, "zmax": high}
    return go.Heatmap(
        z=z, x=x, y=y, xgap=1, ygap=1, hovertemplate="%{x}, %{y}: %{z:.4g}<extra></extra>", colorbar={"thickness": 12}, **scale
    )


__all__ = ["sweep_figure"]
