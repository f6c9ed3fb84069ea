"""Agreement: do two methods that claim to find the same heads rank them the same way?

Spearman's rank correlation between metrics, over all heads of a profile. Ranks, because the methods' units have nothing to do with one
another. Heads where either metric is NaN are left out of that pair, and a metric that is the same for all heads correlates with nothing
(NaN), rather than with everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from headscope.errors import ProbeError, refusal, unknown_name

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from headscope.profile.head_profile import HeadProfile


def agreement(profile: HeadProfile, metrics: Iterable[str] | None = None) -> pd.DataFrame:
    """[metrics, metrics] float64, Spearman's correlation of every two metrics over the heads; `metrics` None takes all.

    Raises ProbeError for a metric that is not there, and for fewer than two.
    """
    names = list(profile.metrics if metrics is None else metrics)
    for name in names:
        if name not in profile.metrics:
            raise unknown_name(ProbeError, "metric", name, profile.metrics)
    if len(names) < 2:
        raise refusal(ProbeError, f"metrics={names}", "an agreement is between two", "name at least two metrics")
    return profile.table[names].corr(method="spearman")


def plot_agreement(profile: HeadProfile, metrics: Iterable[str] | None = None) -> go.Figure:
    """The matrix of `agreement` as a heat map, like metrics side by side (average-linkage clustering of 1 - |correlation|)."""
    import plotly.graph_objects as go
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    matrix = agreement(profile, metrics)
    values = matrix.to_numpy()
    apart = np.clip(1 - np.abs(np.nan_to_num(values, nan=0.0)), 0, None)
    np.fill_diagonal(apart, 0.0)
    order = leaves_list(linkage(squareform((apart + apart.T) / 2, checks=False), "average")) if len(matrix) > 2 else np.arange(len(matrix))
    names = [matrix.columns[at] for at in order]
    shown = matrix.loc[names, names]
    size = max(420, 26 * len(names) + 200)
    figure = go.Figure(
        go.Heatmap(
            z=shown.to_numpy(),
            x=names,
            y=names,
            zmin=-1,
            zmax=1,
            colorscale="RdBu",
            reversescale=True,
            colorbar={"title": "rank<br>correlation"},
            hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
            text=np.where(np.isnan(shown.to_numpy()), "", np.char.mod("%.1f", np.nan_to_num(shown.to_numpy()).round(1) + 0.0)),
            texttemplate="%{text}",
            textfont={"size": 9},
        )
    )
    figure.update_layout(
        title=f"Which methods agree on {profile.card.model['name']}: Spearman over {profile.heads} heads",
        width=size,
        height=size,
        xaxis={"tickangle": -60, "constrain": "domain"},
        yaxis={"autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure
