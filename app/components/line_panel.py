"""The chosen query and key: where the query looks most, which queries look most at the key, and all of their weights as profiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import dcc, html
from dash.development.base_component import Component

from headscope.app import api, theme
from headscope.app.components.panel import tag
from headscope.app.figures import typed
from headscope.app.format import number, visible_token
from headscope.app.runs import Run

SHOWN = 12
HINT = "Click the map, or a token, to see where that query looks most and who looks at that key."


def line_panel(run: Run, layer: int, head: int, query: int | None, key: int | None, scheme: theme.Scheme) -> Component:
    """Both lines of the chosen cell; how to choose one where none is."""
    if run.maps is None:
        return html.P("This run was made without maps, so there is no row to read.", className="muted")
    parts = []
    if query is not None:
        parts.append(_line(run, layer, head, "row", query, scheme))
    if key is not None:
        parts.append(_line(run, layer, head, "column", key, scheme))
    return html.Div(parts, className="line-columns") if parts else html.P(HINT, className="hint")


def _line(run: Run, layer: int, head: int, kind: str, position: int, scheme: theme.Scheme) -> Component:
    found = api.line(run, layer, head, kind, position)
    piece = visible_token(run.tokens[position]) if position < len(run.tokens) else ""
    name, other = ("Query", "key") if kind == "row" else ("Key", "query")
    sum_label = "weights add up to" if kind == "row" else "receives"
    exact = found["kind"] == "exact"
    unit = "exact" if exact else f"block mass, {found['block']} tokens"
    heading = html.Div(
        [
            html.B(f"{name} {position:,}"),
            html.Code(piece) if piece else None,
            tag(unit, className="tag-strong"),
            tag(f"{sum_label} {number(found['total'], 4)}"),
        ],
        className="line-title",
    )
    rows = []
    highest = found["top"][0]["weight"] if found["top"] else 1.0
    for row in found["top"][:SHOWN]:
        at, size = row["position"], found["block"]
        place = f"{at:,}" if size == 1 else f"{at:,} to {at + size - 1:,}"
        target = f"{position}.{at}" if kind == "row" else f"{at}.{position}"
        rows.append(
            html.Tr(
                [
                    html.Td(
                        html.Button(place, type="button", className="link-button", title="Show it in the map", **{"data-goto": target}),
                        className="num",
                    ),
                    html.Td(html.Code(visible_token(row["token"])) if row["token"] else ""),
                    html.Td(row["text"], className="num"),
                    html.Td(html.Div(html.I(style={"width": f"{100 * row['weight'] / highest:.1f}%"}), className="rank-bar")),
                ]
            )
        )
    head_row = html.Tr(
        [
            html.Th(other.capitalize(), className="num"),
            html.Th(""),
            html.Th("Weight", className="num"),
            html.Th(""),
        ]
    )
    graph = dcc.Graph(
        figure=profile_figure(found, other, scheme),
        config={**theme.graph_config(f"{run.id}-{layer}-{head}-{kind}-{position}"), "displayModeBar": False},
        className="graph",
        style={"height": 110},
    )
    table = (
        html.Table([html.Thead(head_row), html.Tbody(rows)], className="metrics lines-table")
        if rows
        else html.P("No weight above zero.", className="muted")
    )
    return html.Div([heading, graph, table], className="line-part")


def profile_figure(found: dict[str, Any], other: str, scheme: theme.Scheme) -> dict[str, Any]:
    """The whole line in at most 1,024 stretches: trace 0 sums, trace 1 the largest weight of each stretch."""
    width, first = found["width"], found["first"]
    x = first + np.arange(len(found["sums"])) * width
    palette = theme.PALETTES[scheme]
    shape = {"type": "scatter", "mode": "lines", "x": typed(x.astype(np.int32)), "line": {"shape": "hv", "width": 1}}
    stretch = "" if width == 1 else f" of {width} tokens"
    traces = [
        {
            **shape,
            "name": "sum",
            "y": typed(np.asarray(found["sums"], dtype=np.float32)),
            "line": {"shape": "hv", "width": 1.2, "color": palette.accent},
        },
    ]
    traces[0]["hovertemplate"] = f"{other} %{{x}}<br>sum{stretch} %{{y:.3~g}}<extra></extra>"
    layout = theme.layout(
        scheme,
        margin={"l": 44, "r": 8, "t": 4, "b": 22},
        xaxis=theme.axis(scheme),
        yaxis=theme.axis(
            scheme, type="log", nticks=4, exponentformat="power", showgrid=True, gridcolor=palette.line, range=_decades(found["sums"])
        ),
        height=110,
        hovermode="closest",
    )
    return {"data": traces, "layout": layout}


def _decades(values: list[float]) -> list[float]:
    highest = max(values, default=0.0)
    top = float(np.log10(highest)) if highest > 0 else 0.0
    return [top - 5, top + 0.3]
