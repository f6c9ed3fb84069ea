"""The chosen token: what this head does there as a query, and what it receives as a key."""

from __future__ import annotations

from dash import html
from dash.development.base_component import Component

from headscope.app.components.panel import facts
from headscope.app.components.token_series import label, values_of
from headscope.app.format import number, visible_token
from headscope.app.runs import Run


def token_facts(run: Run, layer: int, head: int, token: int | None) -> Component:
    """Position, piece, where its largest weight goes, and every per-token statistic; how to choose one when none is chosen."""
    if token is None or not 0 <= token < len(run.tokens):
        return html.P("Click a token, or a point of a plot, to read all its numbers here.", className="hint")
    parts: list[tuple[str, object]] = []
    if "argmax" in run.statistics("row"):
        key = int(run.series("row", "argmax", layer, head)[token])
        if 0 <= key < len(run.tokens):
            where = "itself" if key == token else f"{abs(token - key):,} {'back' if key < token else 'ahead'}"
            parts.append(("Looks most at", [html.Code(visible_token(run.tokens[key])), f" #{key:,}, {where}"]))
    names = [name for name in run.statistics("row") if name != "argmax"] + run.statistics("column")
    parts += [(label(name), number(float(values_of(run, name, layer, head)[token]), 4)) for name in names]
    title = html.Div(
        [html.Code(visible_token(run.tokens[token]), className="token-name"), html.Span(f"token {token:,}", className="muted")]
    )
    return html.Div([title, facts(*parts)], className="token-facts")
