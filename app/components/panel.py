"""Panels, icons, headings and small labels."""

from __future__ import annotations

from typing import Any

from dash import html
from dash.development.base_component import Component

Children = Any


def panel(title: Children, *children: Children, aside: Children = None, className: str = "", **props: Any) -> Component:
    """A titled card; `aside` sits at the right of its title."""
    heading = html.Div(
        [html.H2(title), html.Div(aside, className="panel-aside")] if aside is not None else html.H2(title), className="panel-head"
    )
    return html.Section([heading, *children], className=f"panel {className}".strip(), **props)


def icon(name: str, className: str = "") -> Component:
    """An icon of assets/icons, in the colour of the text around it."""
    return html.Span(className=f"hs-icon icon-{name} {className}".strip(), **{"aria-hidden": "true"})


def facts(*pairs: tuple[str, Children]) -> Component:
    """A list of labelled facts; pairs whose value is empty are left out."""
    rows: list[Component] = []
    for label, value in pairs:
        if value not in (None, "", []):
            rows += [html.Dt(label), html.Dd(value)]
    return html.Dl(rows, className="facts")


def tag(*children: Children, className: str = "", **props: Any) -> Component:
    """A small rounded label."""
    return html.Span(list(children), className=f"tag {className}".strip(), **props)


def control(label: str, component: Component) -> Component:
    """A small label above a control."""
    return html.Div([html.Span(label, className="control-label"), component], className="control")
