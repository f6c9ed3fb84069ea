"""The panels of a head's page beside its map."""

from __future__ import annotations

from typing import Annotated, Any

import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component
from pydantic import Field

from headscope.app import theme
from headscope.app.components import token_series, token_strip
from headscope.app.components.head_facts import head_metrics, head_roles
from headscope.app.components.head_state import HeadState
from headscope.app.components.line_panel import line_panel
from headscope.app.components.panel import control, panel
from headscope.app.components.token_facts import token_facts
from headscope.app.runs import Run

Place = Annotated[list[int], Field(min_length=2, max_length=2)]
"""[layer, head]."""
HIDDEN = {"visible": False}


def draw_strip(run: Run, place: Place, colour: str, page: int) -> tuple[dict[str, Any], Component]:
    """The strip's data and its legend."""
    data = token_strip.strip_data(run, place[0], place[1], colour, page)
    return data, token_strip.strip_legend(data, colour)


def lines_panel(run: Run, place: Place, state: HeadState, scheme: theme.Scheme) -> Component:
    """The chosen query and key."""
    shown = line_panel(run, place[0], place[1], state.token, state.key, scheme)
    return panel("Chosen query and key", html.Div(shown, id="lines-of-cell"), className="area-lines")


def facts_panel(run: Run, place: Place) -> Component:
    """Roles with reasons, metrics with ranks."""
    layer, head = place
    row = run.table[(run.table["layer"] == layer) & (run.table["head"] == head)].iloc[0]
    return panel(
        "Roles",
        head_roles(run, layer, head),
        html.H2("Metrics", className="second"),
        html.Div(head_metrics(run, layer, head), className="metrics-scroll"),
        html.P([html.Code(str(row["module"])), f" · KV head {int(row['kv_head'])}"], className="hint"),
        className="area-facts",
    )


def series_panel(run: Run, state: HeadState) -> Component:
    """The plots along the text. The graph comes when the page is there and nobody is moving the map (`series_graph`): the script that draws
    it takes the browser half a second to read.
    """
    select = dmc.MultiSelect(
        id="series",
        value=state.series,
        data=[{"value": name, "label": token_series.label(name)} for name in token_series.available(run)],
        size="xs",
        searchable=True,
        hidePickedOptions=True,
        comboboxProps={"shadow": "md"},
        className="series-select",
        **{"aria-label": "Statistics to plot"},
    )
    return panel(
        "Along the text",
        select,
        html.Div(id="lines-frame", style={"minHeight": token_series.figure_height(len(state.series))}),
        dcc.Store(id="lines-wanted", data=False),
        className="area-series",
    )


def series_graph(run: Run, place: Place, plots: int, scheme: theme.Scheme) -> Component:
    """The graph of `plots` statistics, empty: what it shows comes in an answer of its own."""
    figure = {"data": [], "layout": theme.layout(scheme, height=token_series.figure_height(plots), xaxis=HIDDEN, yaxis=HIDDEN)}
    config = theme.graph_config(f"{run.id}-{place[0]}-{place[1]}-text")
    return dcc.Graph(id="lines", figure=figure, config=config, className="graph clickable")


def text_panel(run: Run, place: Place, state: HeadState) -> Component:
    """The text, shaded, and the chosen token."""
    data, legend = draw_strip(run, place, state.colour, state.page)
    select = dmc.Select(
        id="colour",
        value=state.colour,
        data=[{"value": name, "label": token_series.label(name)} for name in token_series.available(run)],
        size="xs",
        allowDeselect=False,
        w=190,
        **{"aria-label": "Colour the text by"},
    )
    pages = dmc.Pagination(
        id="strip-page", total=data["pages"], value=state.page + 1, size="xs", display="none" if data["pages"] == 1 else "block"
    )
    return panel(
        "Text",
        html.Div(legend, id="strip-legend"),
        html.Div(
            [
                html.Div(id="strip", className="strip", tabIndex=0, lang=""),
                html.Div(token_facts(run, place[0], place[1], state.token), id="token-facts", className="token-side"),
            ],
            className="strip-frame",
        ),
        dcc.Store(id="strip-data", data=data),
        pages,
        aside=control("Colour by", select),
        className="area-text",
    )
