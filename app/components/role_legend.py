"""Roles as chips: the legend of the symbols, and the filter that fades every other head."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash import html
from dash.development.base_component import Component

from headscope.app import theme
from headscope.app.format import words
from headscope.app.runs import Run

_GLYPHS = {
    "circle": "●",
    "diamond": "◆",
    "square": "■",
    "triangle-up": "▲",
    "cross": "✚",
    "star": "★",
    "triangle-down": "▼",
    "hexagon": "⬢",
    "x": "✖",
    "pentagon": "⬟",
    "triangle-right": "▶",
    "triangle-left": "◀",
    "star-diamond": "✦",
}


def role_glyph(run: Run, role: str) -> Component:
    """The symbol of a role as text."""
    index = run.role_index(role)
    return html.Span(
        _GLYPHS[theme.role_symbol(index)], className="glyph", style={"color": theme.role_colour(index)}, **{"aria-hidden": "true"}
    )


def role_legend(run: Run, chosen: list[str]) -> Component:
    """A chip per role with the number of its heads and its rule as a title; id `roles`, its value is the list of chosen roles."""
    chips = [
        html.Span(
            dmc.Chip(
                [role_glyph(run, name), words(name), html.Span(f"{len(heads)}", className="chip-count")],
                value=name,
                size="xs",
                variant="outline",
            ),
            title=run.rule(name) or None,
        )
        for name, heads in run.roles.items()
    ]
    none = None if chips else html.P("No head reached a role's threshold in this run.", className="muted")
    return html.Div([dmc.ChipGroup(chips, id="roles", multiple=True, value=chosen), none], className="role-legend")


def role_badge(run: Run, role: str) -> Component:
    """A role's symbol and name."""
    return html.Span([role_glyph(run, role), words(role)], className="role-badge", title=run.rule(role) or None)
