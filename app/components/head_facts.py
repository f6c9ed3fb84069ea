"""One head among all: every metric with its rank, and the roles with their reasons."""

from __future__ import annotations

import numpy as np
from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.role_legend import role_badge
from headscope.app.format import number
from headscope.app.metrics import describe
from headscope.app.ranks import descending_ranks
from headscope.app.runs import Run
from headscope.app.urls import run_url


def head_roles(run: Run, layer: int, head: int) -> Component:
    """The head's roles and why it has them."""
    why = run.reasons[layer, head]
    if not why:
        return html.P("No role: this head reached no role's threshold.", className="muted")
    return html.Ul(
        [html.Li([role_badge(run, role), html.Span(reason, className="reason")]) for role, reason in why.items()], className="roles-why"
    )


def metric_ranks(run: Run, layer: int, head: int) -> list[tuple[str, float, float, int]]:
    """(metric, value, rank from the largest, heads that have a value) for every metric of the run."""
    out = []
    place = run.layers.index(layer), head
    for name in run.metrics:
        values = run.grid(name)
        ranks = descending_ranks(values)
        out.append((name, float(values[place]), float(ranks[place]), int(np.isfinite(ranks).sum())))
    return out


def head_metrics(run: Run, layer: int, head: int) -> Component:
    """Metrics as rows: label, value, a bar of the rank, `3 of 270`; the label leads to the grid of that metric."""
    rows = []
    for name, value, rank, total in metric_ranks(run, layer, head):
        metric = describe(run.card, name)
        known = np.isfinite(rank)
        share = (total - rank + 1) / total if known and total else 0.0
        rows.append(
            html.Tr(
                [
                    html.Th(dcc.Link(metric.label, href=run_url(run.id, metric=name), title=metric.meaning or None), scope="row"),
                    html.Td(number(value), className="num"),
                    html.Td(html.Div(html.I(style={"width": f"{100 * share:.1f}%"}), className="rank-bar")),
                    html.Td(f"{rank:.0f}" if known else "", className="num rank"),
                ]
            )
        )
    head_row = html.Tr([html.Th("Metric"), html.Th("Value", className="num"), html.Th(f"Rank of {len(run.reasons):,}", colSpan=2)])
    return html.Table([html.Thead(head_row), html.Tbody(rows)], className="metrics")
