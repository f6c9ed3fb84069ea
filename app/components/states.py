"""What a page shows when there is nothing to show, or something is wrong: always what happened and what to do."""

from __future__ import annotations

from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.panel import icon
from headscope.app.urls import home_url


def no_runs(where: str) -> Component:
    """The runs directory is empty."""
    return html.Div(
        [
            icon("folder", "state-icon"),
            html.H1("No runs yet"),
            html.P(["There is no run directory in ", html.Code(where), ". Make one, then reload this page:"]),
            html.Pre("headscope demo\nheadscope profile MODEL --out " + where.rstrip("/") + "/NAME"),
            html.P(
                "The first profiles a small language model that is fetched for you; the second takes any model headscope can load.",
                className="muted",
            ),
        ],
        className="state",
    )


def failure(title: str, message: str, *, home: bool = True) -> Component:
    """A run or a head that cannot be shown, with the error's own text."""
    return html.Div(
        [
            icon("warning", "state-icon state-warning"),
            html.H1(title),
            html.P(message, className="state-message"),
            dcc.Link("See the runs", href=home_url(), className="button") if home else None,
        ],
        className="state",
        role="alert",
    )
