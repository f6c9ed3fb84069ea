"""`/`: the runs found."""

from __future__ import annotations

from dash import html
from dash.development.base_component import Component

from headscope.app import context
from headscope.app.components.run_card import entry_card
from headscope.app.components.states import no_runs
from headscope.app.format import count

TITLE = "Runs · headscope"


def layout(**_query: object) -> Component:
    """A card per run, or how to make the first."""
    index = context.index()
    entries = index.entries()
    if not entries:
        return no_runs(f"{index.root.name}/")
    return html.Div(
        [
            html.Div(
                [html.H1("Runs"), html.P([count(len(entries), "run"), " in ", html.Code(f"{index.root.name}/")], className="muted")],
                className="page-title",
            ),
            html.Div([entry_card(entry) for entry in entries], className="run-list"),
        ]
    )
