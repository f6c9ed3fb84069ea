"""`/run/<run>/head/<layer>/<head>`: one head: its map, its statistics along the text, the text, its metrics and roles."""

from __future__ import annotations

from typing import Any

import dash
from dash import ClientsideFunction, Input, Output, State, dcc, html
from dash.development.base_component import Component

from headscope.app import api, context, theme
from headscope.app.components import token_series
from headscope.app.components.head_panels import (
    Place,
    draw_strip,
    facts_panel,
    lines_panel,
    series_graph,
    series_panel,
    text_panel,
)
from headscope.app.components.head_state import HeadState, usual
from headscope.app.components.head_steps import WAYS, head_steps
from headscope.app.components.line_panel import line_panel
from headscope.app.components.map_viewer import map_panel, plan_note
from headscope.app.components.picture_panel import picture_panel
from headscope.app.components.role_legend import role_badge
from headscope.app.components.run_card import change_tags
from headscope.app.components.shell import crumbs
from headscope.app.components.states import failure
from headscope.app.components.token_facts import token_facts
from headscope.app.finder import heads_of, names_of
from headscope.app.runs import Run
from headscope.app.urls import head_url, home_url, run_url
from headscope.errors import RunError

TITLE = "Head · headscope"
# Stores never hold null: Dash writes a null store once more when it appears, which counts as a change and draws everything twice.
NO_TOKEN = -1
WHOLE: list[int] = []


def layout(run: str = "", layer: str = "", head: str = "", **query: object) -> Component:
    """The page of a head; the query may hold the whole view (see HeadState)."""
    layer, head = str(layer), str(head)  # a repeated query key arrives as a list
    try:
        opened = context.open_run(run)
    except RunError as error:
        return failure("This run cannot be shown", str(error))
    if not (layer.isdecimal() and head.isdecimal() and len(layer) < 7 and len(head) < 7 and opened.has(int(layer), int(head))):
        span = f"layers {opened.layers[0]} to {opened.layers[-1]}, heads 0 to {opened.heads - 1}"
        return failure("There is no such head", f"{opened.id} has {span}; pick one in the grid.")
    place = [int(layer), int(head)]
    try:
        state = HeadState.read(query, opened)
        return _page(opened, place, state, theme.scheme_of(), picture_panel(opened, place, query))
    except RunError as error:
        return failure("This head cannot be shown", str(error))


def _page(run: Run, place: Place, state: HeadState, scheme: theme.Scheme, picture: Component | None) -> Component:
    layer, head = place
    return html.Div(
        [
            dcc.Store(id="run-id", data=run.id),
            dcc.Store(id="place", data=place),
            dcc.Store(id="token", data=NO_TOKEN if state.token is None else state.token),
            dcc.Store(id="key", data=NO_TOKEN if state.key is None else state.key),
            dcc.Store(id="map-window", data=WHOLE if state.window is None else list(state.window)),
            dcc.Store(id="token-picked", data=""),
            dcc.Store(id="usual", data=usual(run)),
            dcc.Store(id="pins", data=state.pins),
            dcc.Store(id="this-head", data=f"{layer}.{head}"),
            html.Div(
                [
                    html.Div(
                        [
                            crumbs(("Runs", home_url()), (run.id, run_url(run.id, pins=state.pins)), (f"layer {layer}, head {head}", None)),
                            html.Div(
                                [
                                    html.H1(f"Layer {layer} · Head {head}"),
                                    *[role_badge(run, role) for role in run.reasons[layer, head]],
                                    *change_tags(run.card),
                                    pin_button(),
                                ],
                                className="title-row",
                            ),
                        ]
                    ),
                    head_steps(run, layer, head, state.query(run)),
                ],
                className="page-title page-title-split",
            ),
            picture,
            html.Div(
                [
                    map_panel(run, place, state),
                    facts_panel(run, place),
                    lines_panel(run, place, state, scheme),
                    series_panel(run, state),
                    text_panel(run, place, state),
                ],
                className="head-layout",
            ),
        ]
    )


def update_lines(token: int, key: int, scheme: str | None, run: str, place: Place) -> Component:
    """Callback: the rows and columns of the chosen cell."""
    opened = api.opened(run, *place)
    state = HeadState.checked(opened, token=token, key=key)
    return line_panel(opened, place[0], place[1], state.token, state.key, theme.scheme_of(scheme))


def pin_button() -> Component:
    """Pins this head or lets it go; the pinned heads beside it."""
    pin = html.Button("Pin", id="pin-here", type="button", className="small-button", title="Keep this head in the address, or let it go")
    return html.Span([pin, html.Span(id="pinned-here", className="found")], className="pin-here")


def show_pinned(pins: str, run: str, place: Place) -> list[Component]:
    """Callback: the pinned heads as links, this one marked."""
    opened = api.opened(run, *place)
    heads = heads_of(pins, opened)
    links: list[Component] = []
    for layer, head in heads[:10]:
        here = [layer, head] == place
        links.append(
            html.B(f"{layer}.{head}", className="head-link head-here", title="This head is pinned")
            if here
            else dcc.Link(f"{layer}.{head}", href=head_url(opened.id, layer, head, pins=names_of(heads)), className="head-link")
        )
    return links


def update_plan(name: str | None, run: str, place: Place) -> Component | None:
    """Callback: what the chosen plan drops of this head."""
    return plan_note(api.opened(run, *place), place[0], place[1], name or "")


def show_graph(wanted: bool, scheme: str | None, names: list[str] | None, run: str, place: Place) -> Component | None:
    """Callback: the graph along the text, once."""
    opened = api.opened(run, *place)
    return series_graph(opened, place, len(HeadState.checked(opened, series=names).series), theme.scheme_of(scheme)) if wanted else None


def update_series(names: list[str] | None, token: int | None, scheme: str | None, run: str, place: Place) -> dict[str, Any]:
    """Callback: the plots along the text."""
    opened = api.opened(run, *place)
    state = HeadState.checked(opened, series=names, token=token)
    return token_series.series_figure(opened, place[0], place[1], state.series, theme.scheme_of(scheme), state.token)


def update_strip(colour: str, page: int, run: str, place: Place) -> tuple[dict[str, Any], Component]:
    """Callback: the text's shades."""
    opened = api.opened(run, *place)
    state = HeadState.checked(opened, colour=colour, page=page - 1)
    return draw_strip(opened, place, state.colour, state.page)


def update_token(token: int | None, run: str, place: Place) -> Component:
    """Callback: the chosen token's numbers."""
    return token_facts(api.opened(run, *place), place[0], place[1], token)


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    run, place = State("run-id", "data"), State("place", "data")
    scheme, token = Input("scheme-now", "data"), Input("token", "data")
    window, key, plan = Input("map-window", "data"), Input("key", "data"), Input("plan", "value")
    once = {"prevent_initial_call": True}
    app.callback(Output("lines-of-cell", "children"), token, key, scheme, run, place, **once)(update_lines)
    app.callback(Output("pinned-here", "children"), Input("pins", "data"), run, place)(show_pinned)
    app.clientside_callback(
        ClientsideFunction("headscope", "pin_here"),
        Output("pin-here", "lang"),
        Input("pin-here", "n_clicks"),
        State("this-head", "data"),
        State("pins", "data"),
        **once,
    )
    app.clientside_callback(ClientsideFunction("headscope", "picture_head"), Output("pictures", "lang"), Input("picture-facts", "data"))
    app.callback(Output("plan-note", "children"), plan, run, place)(update_plan)
    app.clientside_callback(
        ClientsideFunction("headscope", "viewer"),
        Output("viewer", "lang"),
        Input("viewer-facts", "data"),
        Input("plane", "value"),
        Input("map-scale", "value"),
        Input("hide-sink", "checked"),
        plan,
        token,
        key,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "lines_soon"), Output("lines-wanted", "data"), Input("place", "data"), State("lines-wanted", "data")
    )
    app.callback(
        Output("lines-frame", "children"),
        Input("lines-wanted", "data"),
        State("scheme-now", "data"),
        State("series", "value"),
        run,
        place,
        **once,
    )(show_graph)
    app.callback(Output("lines", "figure"), Input("series", "value"), token, scheme, run, place)(update_series)
    app.callback(
        Output("strip-data", "data"),
        Output("strip-legend", "children"),
        Input("colour", "value"),
        Input("strip-page", "value"),
        run,
        place,
        **once,
    )(update_strip)
    app.callback(Output("token-facts", "children"), token, run, place, **once)(update_token)
    app.clientside_callback(ClientsideFunction("headscope", "strip"), Output("strip", "lang"), Input("strip-data", "data"), token)
    app.clientside_callback(
        ClientsideFunction("headscope", "pick_token"), Output("token-picked", "data"), Input("lines", "clickData"), **once
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "head_url"),
        *[Output(f"step-{way}", "href") for way in WAYS],
        Input("plane", "value"),
        Input("map-scale", "value"),
        Input("hide-sink", "checked"),
        window,
        Input("series", "value"),
        Input("colour", "value"),
        token,
        key,
        plan,
        Input("pins", "data"),
        State("usual", "data"),
        *[State(f"step-{way}", "href") for way in WAYS],
        **once,
    )
