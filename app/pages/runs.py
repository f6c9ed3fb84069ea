"""`/`: the runs found: open one, compare two, take in another."""

from __future__ import annotations

import dash
import dash_mantine_components as dmc
from dash import ClientsideFunction, Input, Output, html
from dash.development.base_component import Component

from headscope.app import context, uploads
from headscope.app.components.panel import control
from headscope.app.components.run_card import entry_card
from headscope.app.components.states import no_runs
from headscope.app.format import count
from headscope.app.urls import compare_url

TITLE = "Runs · headscope"


def layout(**_query: object) -> Component:
    """A card per run, or how to make the first."""
    index = context.index()
    entries = index.entries()
    if not entries:
        return html.Div([no_runs(f"{index.root.name}/"), html.Div(upload_box(), className="upload-alone")])
    whole = [entry.id for entry in entries if entry.card is not None]
    return html.Div(
        [
            html.Div(
                [
                    html.Div(
                        [html.H1("Runs"), html.P([count(len(entries), "run"), " in ", html.Code(f"{index.root.name}/")], className="muted")]
                    ),
                    html.Div([_compare(whole) if len(whole) > 1 else None, upload_box()], className="runs-tools"),
                ],
                className="page-title page-title-split",
            ),
            html.Div([entry_card(entry) for entry in entries], className="run-list"),
        ]
    )


def _compare(runs: list[str]) -> Component:
    """Two selects and a link; the link follows the selects."""

    def select(name: str, value: str, label: str) -> Component:
        return dmc.Select(id=name, value=value, data=runs, searchable=True, allowDeselect=False, size="xs", w=180, **{"aria-label": label})

    return html.Div(
        [
            control("Compare", select("pick-a", runs[0], "First run")),
            control("with", select("pick-b", runs[1], "Second run")),
            html.A("Compare", id="pick-go", href=compare_url(runs[0], runs[1]), className="small-button swap"),
        ],
        className="toolbar toolbar-tight pick",
    )


def upload_box() -> Component:
    """A button that takes a zip of a run directory; assets/upload.js sends it and says how it went."""
    limit = uploads.MOST_BYTES // 2**20
    return html.Div(
        [
            html.Button(
                "Upload a run",
                type="button",
                id="upload-button",
                className="small-button",
                title=f"A zip of one run directory, at most {limit} MiB",
            ),
            html.Span(id="upload-note", className="find-note", role="status"),
        ],
        id="upload",
        className="upload",
        **{"data-limit": str(uploads.MOST_BYTES), "data-url": dash.get_relative_path("/api/upload")},
    )


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    app.clientside_callback(
        ClientsideFunction("headscope", "pick_runs"), Output("pick-go", "href"), Input("pick-a", "value"), Input("pick-b", "value")
    )
