"""`/run/<run>/pictures`: every head of a model on one picture, for one word of the answer or one denoising step."""

from __future__ import annotations

import dash
import dash_mantine_components as dmc
from dash import ClientsideFunction, Input, Output, dcc, html
from dash.development.base_component import Component

from headscope.app import context
from headscope.app.components.panel import control, panel
from headscope.app.components.picture_panel import about, picture_facts
from headscope.app.components.shell import crumbs
from headscope.app.components.states import failure
from headscope.app.urls import api_url, choice, home_url, run_url
from headscope.errors import RunError

TITLE = "Pictures · headscope"
MARKS = 24


def layout(run: str = "", **query: object) -> Component:
    """The page; the query may hold frame and scale."""
    try:
        opened = context.open_run(run)
        found = opened.pictures
    except RunError as error:
        return failure("This run cannot be shown", str(error))
    if found is None:
        return failure("This run has no picture", "Runs of language models on text have none; make one with headscope.profile.pictures.")
    facts = picture_facts(opened, found, query) | {
        "all": api_url(opened.id, "pictures/"),
        "layers": opened.layers,
        "heads": opened.heads,
        "head": run_url(opened.id) + "/head/",
    }
    labels = found.facts.labels
    word = "Word" if found.facts.kind == "answer" else "Step"
    options = [{"value": str(frame), "label": f"{frame + 1}: {label.strip() or '␣'}"} for frame, label in enumerate(labels)]
    frames: Component = (
        dmc.SegmentedControl(id="picture-frame", value=str(facts["frame"]), data=options, size="xs")
        if len(labels) <= MARKS
        else dmc.Select(id="picture-frame", value=str(facts["frame"]), data=options, allowDeselect=False, size="xs", searchable=True)
    )
    scales = [{"value": "head", "label": "each head"}, {"value": "shared", "label": "all heads"}]
    scale = dmc.SegmentedControl(id="picture-scale", value=choice(query, "scale", ("head", "shared"), "head"), data=scales, size="xs")
    return html.Div(
        [
            html.Div(
                [
                    crumbs(("Runs", home_url()), (opened.id, run_url(opened.id)), ("pictures", None)),
                    html.H1(str(opened.card.get("model", {}).get("name") or opened.id)),
                ],
                className="page-title",
            ),
            panel(
                "Every head on the picture",
                *about(found),
                html.Div([control(word, frames), control("Full colour is the largest of", scale)], className="toolbar toolbar-tight"),
                html.Div(id="pictures-all", className="pictures-all", lang=""),
                html.P("Layers run down, heads across. Click a head to open it.", className="hint"),
                dcc.Store(id="all-facts", data=facts),
            ),
        ]
    )


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    app.clientside_callback(
        ClientsideFunction("headscope", "picture_all"),
        Output("pictures-all", "lang"),
        Input("all-facts", "data"),
        Input("picture-frame", "value"),
        Input("picture-scale", "value"),
    )
