"""The heat map of a metric: depth runs to the right, heads downwards, one square cell per head.

Layers are on the horizontal axis because models are much deeper than a layer has heads, and a notebook is wider than it is high. Thin lines
separate the groups that share a key head. The scale is viridis, which is read alike with and without full colour vision, and starts and
ends where the metric does (0 and 1 for probabilities), so that two figures can be laid side by side.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from headscope.errors import ProbeError, refusal

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from headscope.profile.head_profile import HeadProfile

SCALE = "Viridis"
INK, FAINT, MARK = "#1f2430", "#5b6472", "#e4572e"
WORDS = {"natural": "natural text", "repeated_random": "random tokens, repeated", "repeated_token": "one token, repeated"}


def heat_map(profile: HeadProfile, metric: str | None = None, *, mark: str | None = None) -> go.Figure:
    """Plotly figure of a metric, [heads] x [layers]; `mark`: outline the heads of this role. ProbeError for an unknown metric or role."""
    import plotly.graph_objects as go

    if metric is None:
        metric = "induction" if "induction" in profile.metrics else profile.metrics[0]
    values = profile.matrix(metric).T
    heads, layers = values.shape
    low, high = scale_range(profile, metric, values)
    cell = max(14, min(28, 860 // layers))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[str(layer) for layer in profile.layers],
            y=[str(head) for head in range(heads)],
            customdata=hover(profile, values.shape),
            hovertemplate="<b>%{customdata[0]}</b>  " + f"{metric} " + "%{z:.4g}<br>%{customdata[1]}<extra></extra>",
            colorscale=SCALE,
            zmin=low,
            zmax=high,
            xgap=1,
            ygap=1,
            colorbar={"thickness": 12, "outlinewidth": 0, "title": {"text": unit(profile, metric), "side": "right"}},
        )
    )
    for line in group_lines(profile, heads):
        figure.add_shape(type="line", x0=-0.5, x1=layers - 0.5, y0=line, y1=line, line={"color": FAINT, "width": 1, "dash": "dot"})
    title = metric if mark is None else f"{metric}, {mark} heads outlined"
    if mark is not None:
        if mark not in profile.roles:
            raise refusal(ProbeError, f"mark={mark!r}", "this profile has no such role", f"use one of {', '.join(profile.roles)}")
        index = {layer: place for place, layer in enumerate(profile.layers)}
        for layer, head in profile.top(mark, profile.heads):
            x = index[layer]
            box = {"x0": x - 0.5, "x1": x + 0.5, "y0": head - 0.5, "y1": head + 0.5}
            figure.add_shape(type="rect", **box, line={"color": MARK, "width": 2})
    step = max(1, math.ceil(layers / 32))
    figure.update_xaxes(
        title="layer", side="bottom", constrain="domain", showgrid=False, zeroline=False, dtick=step, ticks="", type="category"
    )
    figure.update_yaxes(
        title="head", autorange="reversed", scaleanchor="x", constrain="domain", showgrid=False, zeroline=False, ticks="", type="category"
    )
    figure.update_layout(
        title={
            "text": f"<b>{html.escape(title)}</b><br><span style='font-size:12px;color:{FAINT}'>{subtitle(profile, metric)}</span>",
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 14},
        },
        width=layers * cell + 180,
        height=heads * cell + 170,
        margin={"l": 60, "r": 20, "t": 90, "b": 50},
        paper_bgcolor="white",
        plot_bgcolor="white",
        modebar_remove=["sendDataToCloud", "sendChartToCloud"],  # the figure stays on this machine
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "color": INK, "size": 12},
    )
    return figure


def scale_range(profile: HeadProfile, metric: str, values: np.ndarray) -> tuple[float, float]:
    """Ends of the colour scale: the metric's own bounds, and the largest value where it has none."""
    bounds = profile.card.metrics.get(metric, {}).get("range", [None, None])
    finite = values[np.isfinite(values)]
    largest = float(finite.max()) if finite.size else 1.0
    low = 0.0 if bounds[0] is None else float(bounds[0])
    high = largest if bounds[1] is None else float(bounds[1])
    return low, high if high > low else low + 1.0


def unit(profile: HeadProfile, metric: str) -> str:
    """The metric's unit, for the colour bar."""
    return str(profile.card.metrics.get(metric, {}).get("unit", ""))


def subtitle(profile: HeadProfile, metric: str) -> str:
    """What was measured, on what, with which kernels, as HTML."""
    card = profile.card
    facts = card.metrics.get(metric, {})
    parts = [html.escape(f"high: {facts['higher_is']}")] if facts.get("higher_is") else []
    row = next((row for row in card.data if row["kind"] == facts.get("data")), None)
    where = html.escape(str(card.model["name"]))
    if row is not None:
        where += f", {WORDS.get(row['kind'], row['kind'])}, {row['sequences']} x {row['tokens']:,} tokens"
    kernels = html.escape(", ".join(card.attention_kernels) or "unknown")
    parts.append(f"{where}, {card.model['dtype']}, kernel {kernels}")
    return "<br>".join(parts)


def hover(profile: HeadProfile, shape: tuple[int, ...]) -> np.ndarray:
    """[heads, layers, 2] strings: the head's name, and its roles."""
    out = np.full((*shape, 2), "", dtype=object)
    index = {layer: place for place, layer in enumerate(profile.layers)}
    for layer, head, group, roles in zip(
        profile.table["layer"], profile.table["head"], profile.table["kv_head"], profile.table["roles"], strict=True
    ):
        out[head, index[layer], 0] = f"{layer}.{head}"
        out[head, index[layer], 1] = f"key head {group}<br>" + (", ".join(roles) if roles else "no role")
    return out


def group_lines(profile: HeadProfile, heads: int) -> list[float]:
    """Where the key head changes between two heads, the same in every layer; nothing when each head has its own."""
    groups: dict[int, set[int]] = {}
    for head, group in zip(profile.table["head"], profile.table["kv_head"], strict=True):
        groups.setdefault(int(head), set()).add(int(group))
    if any(len(found) > 1 for found in groups.values()):
        return []
    names = [min(groups[head]) for head in range(heads)]
    if len(set(names)) in (1, heads):
        return []
    return [head - 0.5 for head in range(1, heads) if names[head] != names[head - 1]]
