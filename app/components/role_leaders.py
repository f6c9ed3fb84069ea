"""The strongest heads of every role, each a link to its page with the reason as its title."""

from __future__ import annotations

from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.role_legend import role_glyph
from headscope.app.format import words
from headscope.app.runs import Run
from headscope.app.urls import head_url


def role_leaders(run: Run, n: int = 5) -> Component:
    """One row per role: symbol, name, how many heads, the first n."""
    rows = []
    for role, heads in run.roles.items():
        links = [
            dcc.Link(f"{layer}.{head}", href=head_url(run.id, layer, head), className="head-link", title=_why(run, layer, head, role))
            for layer, head in heads[:n]
        ]
        name = html.Div(
            [role_glyph(run, role), html.Span(words(role), className="leader-name"), html.Span(str(len(heads)), className="leader-count")],
            title=run.rule(role) or None,
        )
        rule = html.P(run.rule(role), className="leader-rule") if run.rule(role) else None
        rows.append(html.Div([name, html.Div(links, className="leader-heads"), rule], className="leader"))
    if not rows:
        return html.P("No head reached a role's threshold in this run; the grid shows every metric.", className="muted")
    return html.Div(rows, className="leaders")


def _why(run: Run, layer: int, head: int, role: str) -> str:
    return f"Layer {layer}, head {head}: {run.reasons[layer, head].get(role, role)}"
