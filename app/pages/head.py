"""`/run/<run>/head/<layer>/<head>`: one head: its map, its statistics along the text, the text, its metrics and roles."""

from __future__ import annotations

from typing import Any

import dash
from dash import ClientsideFunction, Input, Output, State, dcc, html
from dash.development.base_component import Component

from headscope.app import context, theme
from headscope.app.components import block_map, token_series
from headscope.app.components.head_panels import Place, draw_map, draw_strip, facts_panel, map_panel, series_panel, text_panel
from headscope.app.components.head_state import HeadState, usual
from headscope.app.components.head_steps import WAYS, head_steps
from headscope.app.components.role_legend import role_badge
from headscope.app.components.shell import crumbs
from headscope.app.components.states import failure
from headscope.app.components.token_facts import token_facts
from headscope.app.runs import Run
from headscope.app.urls import home_url, run_url
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
        return _page(opened, place, state, theme.scheme_of())
    except RunError as error:
        return failure("This head cannot be shown", str(error))


def _page(run: Run, place: Place, state: HeadState, scheme: theme.Scheme) -> Component:
    layer, head = place
    return html.Div(
        [
            dcc.Store(id="run-id", data=run.id),
            dcc.Store(id="place", data=place),
            dcc.Store(id="token", data=NO_TOKEN if state.token is None else state.token),
            dcc.Store(id="map-window", data=WHOLE if state.window is None else list(state.window)),
            dcc.Store(id="token-picked", data=""),
            dcc.Store(id="map-zoomed", data=""),
            dcc.Store(id="usual", data=usual(run)),
            html.Div(
                [
                    html.Div(
                        [
                            crumbs(("Runs", home_url()), (run.id, run_url(run.id)), (f"layer {layer}, head {head}", None)),
                            html.Div(
                                [html.H1(f"Layer {layer} · Head {head}"), *[role_badge(run, role) for role in run.reasons[layer, head]]],
                                className="title-row",
                            ),
                        ]
                    ),
                    head_steps(run, layer, head, state.query(run)),
                ],
                className="page-title page-title-split",
            ),
            html.Div(
                [
                    map_panel(run, place, state, scheme),
                    facts_panel(run, place),
                    series_panel(run, place, state, scheme),
                    text_panel(run, place, state),
                ],
                className="head-layout",
            ),
        ]
    )


def update_map(
    plane: str, scale: str, hide_sink: bool, window: list[int] | None, token: int | None, scheme: str | None, run: str, place: Place
) -> tuple[dict[str, Any], list[Component]]:
    """Callback: the map after a choice, a zoom, a chosen token or a change of scheme."""
    opened = context.open_run(run)
    state = HeadState.checked(opened, plane=plane, scale=scale, hide_sink=hide_sink, window=window, token=token)
    return draw_map(opened, place, state, theme.scheme_of(scheme))


def zoom(relayout: dict[str, Any] | None, window: list[int] | None, run: str) -> Any:
    """The window that a zoom or a pan asks for, [] for all; no update where nothing about the axes changed."""
    opened = context.open_run(run)
    try:
        new = block_map.window_of(relayout, opened.maps.tokens if opened.maps else 0)
    except (KeyError, TypeError, ValueError):
        return dash.no_update
    found = WHOLE if new is None else list(new)
    return dash.no_update if found == (window or WHOLE) else found


def follow_zoom(relayout: dict[str, Any] | None, window: list[int] | None, run: str) -> Any:
    """Callback: hands a new window to the map. `map-window` is set, not returned: an output counts as changed when a page opens, and the
    map would be drawn twice.
    """
    new = zoom(relayout, window, run)
    if new is not dash.no_update:
        dash.set_props("map-window", {"data": new})
    return dash.no_update


def update_series(names: list[str] | None, token: int | None, scheme: str | None, run: str, place: Place) -> dict[str, Any]:
    """Callback: the plots along the text."""
    opened = context.open_run(run)
    state = HeadState.checked(opened, series=names, token=token)
    return token_series.series_figure(opened, place[0], place[1], state.series, theme.scheme_of(scheme), state.token)


def update_strip(colour: str, page: int, run: str, place: Place) -> tuple[dict[str, Any], Component]:
    """Callback: the text's shades."""
    opened = context.open_run(run)
    state = HeadState.checked(opened, colour=colour, page=page - 1)
    return draw_strip(opened, place, state.colour, state.page)


def update_token(token: int | None, run: str, place: Place) -> Component:
    """Callback: the chosen token's numbers."""
    return token_facts(context.open_run(run), place[0], place[1], token)


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    run, place = State("run-id", "data"), State("place", "data")
    scheme, token = Input("scheme-now", "data"), Input("token", "data")
    window = Input("map-window", "data")
    once = {"prevent_initial_call": True}
    app.callback(
        Output("map", "figure"),
        Output("map-badge", "children"),
        Input("plane", "value"),
        Input("map-scale", "value"),
        Input("hide-sink", "checked"),
        window,
        token,
        scheme,
        run,
        place,
        **once,
    )(update_map)
    app.callback(Output("map-zoomed", "data"), Input("map", "relayoutData"), State("map-window", "data"), run, **once)(follow_zoom)
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
        ClientsideFunction("headscope", "map_tip"),
        Output("map-tip", "show"),
        Output("map-tip", "bbox"),
        Output("map-tip", "children"),
        Input("map", "hoverData"),
        State("map", "figure"),
        **once,
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
        State("usual", "data"),
        *[State(f"step-{way}", "href") for way in WAYS],
        **once,
    )
