"""`/run/<run>`: every head of a model: the grid of a metric, the roles, the table, the run card."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import ClientsideFunction, Input, Output, State, dcc, html
from dash.development.base_component import Component

from headscope.app import context, theme
from headscope.app.components.head_grid import SCALES, UNCOMMON, grid_figure
from headscope.app.components.head_table import head_table, table_columns, table_metrics, table_note, table_rows
from headscope.app.components.metric_note import metric_note
from headscope.app.components.panel import control, panel, tag
from headscope.app.components.role_leaders import role_leaders
from headscope.app.components.role_legend import role_legend
from headscope.app.components.run_card import card_facts, measured_tokens, shape_line
from headscope.app.components.shell import crumbs
from headscope.app.components.sorted_heads import sorted_figure
from headscope.app.components.states import failure
from headscope.app.format import count
from headscope.app.metrics import default_metric, describe, grouped
from headscope.app.runs import Run
from headscope.app.urls import choice, choices, home_url
from headscope.errors import RunError

TITLE = "Heads · headscope"
HINT = (
    "Click a head to open it; hover to read why it has its roles. Choose roles to fade all other heads; until then the symbols "
    f"are those of roles that at most {UNCOMMON:.0%} of the heads have."
)


def layout(run: str = "", **query: object) -> Component:
    """The page of a run; the query may hold metric, scale and roles."""
    try:
        opened = context.open_run(run)
    except RunError as error:
        return failure("This run cannot be shown", str(error))
    metric = choice(query, "metric", opened.metrics, default_metric(opened.metrics))
    scale = choice(query, "scale", SCALES, "value")
    roles = choices(query, "roles", opened.roles, [])
    grid, ordered, note = draw(opened, metric, scale, roles, theme.scheme_of())
    return html.Div(
        [
            dcc.Store(id="run-id", data=opened.id),
            dcc.Store(id="heads-url", data=""),
            _title(opened),
            html.Div(
                [
                    html.Div([_grid_panel(opened, metric, scale, roles, grid, ordered, note), _table_panel(opened)], className="column"),
                    html.Div(
                        [
                            panel("Strongest heads by role", role_leaders(opened)),
                            panel("Run card", card_facts(opened.card)),
                        ],
                        className="column",
                    ),
                ],
                className="heads-layout",
            ),
        ]
    )


def draw(run: Run, metric: str, scale: str, roles: list[str], scheme: theme.Scheme) -> tuple[dict[str, Any], dict[str, Any], Component]:
    """The grid, the ordered heads and the note about the metric."""
    described = describe(run.card, metric)
    return grid_figure(run, described, scale, roles, scheme), sorted_figure(run, described, roles, scheme), metric_note(run, described)


def _title(run: Run) -> Component:
    model = run.card.get("model", {})
    return html.Div(
        [
            crumbs(("Runs", home_url()), (run.id, None)),
            html.H1(model.get("name") or run.id),
            html.Div(
                [
                    tag(shape_line(run.card)),
                    tag(count(measured_tokens(run.card), "token")),
                    *[tag(f"attention: {name}") for name in run.card.get("attention_kernels", [])],
                    tag(" on ".join(str(model[key]) for key in ("dtype", "device") if model.get(key))),
                ],
                className="tags",
            ),
        ],
        className="page-title",
    )


def _grid_panel(
    run: Run, metric: str, scale: str, roles: list[str], grid: dict[str, Any], ordered: dict[str, Any], note: Component
) -> Component:
    metrics = dmc.Select(
        id="metric",
        value=metric,
        data=grouped(run.card, run.metrics),
        searchable=True,
        allowDeselect=False,
        maxDropdownHeight=420,
        size="sm",
        w=260,
        **{"aria-label": "Metric"},
    )
    scales = dmc.SegmentedControl(
        id="scale", value=scale, data=[{"value": "value", "label": "value"}, {"value": "rank", "label": "rank"}], size="xs"
    )
    return panel(
        "Heads",
        html.Div([control("Metric", metrics), html.Div(note, id="metric-note", className="metric-note")], className="toolbar"),
        role_legend(run, roles),
        dcc.Graph(
            id="grid",
            figure=grid,
            config=theme.graph_config(f"{run.id}-heads"),
            className="graph clickable",
            style={"height": grid["layout"]["height"]},
        ),
        dcc.Graph(
            id="ordered", figure=ordered, config=theme.graph_config(f"{run.id}-ordered"), className="graph clickable", style={"height": 138}
        ),
        html.P(HINT, className="hint"),
        aside=control("Colour by", scales),
    )


def _table_panel(run: Run) -> Component:
    return panel("Table", head_table(), aside=html.Span(id="table-note", className="muted"), id="table-panel")


def update(
    run: str, metric: str, scale: str, roles: list[str] | None, scheme: str | None
) -> tuple[dict[str, Any], dict[str, Any], Component]:
    """Callback: redraws after a choice or a change of scheme."""
    opened = context.open_run(run)
    state: dict[str, object] = {"metric": metric, "scale": scale}
    known = [role for role in roles or [] if role in opened.roles]
    return draw(
        opened,
        choice(state, "metric", opened.metrics, default_metric(opened.metrics)),
        choice(state, "scale", SCALES, "value"),
        known,
        theme.scheme_of(scheme),
    )


def fill_table(run: str, metric: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Callback: the table's rows, columns and note, after the first paint and when the metric changes."""
    opened = context.open_run(run)
    first = choice({"metric": metric}, "metric", opened.metrics, default_metric(opened.metrics))
    metrics = table_metrics(opened, first)
    return table_rows(opened, metrics), table_columns(opened, metrics), table_note(opened, metrics)


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    app.callback(
        Output("grid", "figure"),
        Output("ordered", "figure"),
        Output("metric-note", "children"),
        State("run-id", "data"),
        Input("metric", "value"),
        Input("scale", "value"),
        Input("roles", "value"),
        Input("scheme-now", "data"),
        prevent_initial_call=True,
    )(update)
    app.callback(
        Output("table", "rowData"),
        Output("table", "columnDefs"),
        Output("table-note", "children"),
        Input("run-id", "data"),
        Input("metric", "value"),
    )(fill_table)
    app.clientside_callback(
        ClientsideFunction("headscope", "heads_url"),
        Output("heads-url", "data"),
        Input("metric", "value"),
        Input("scale", "value"),
        Input("roles", "value"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "open_head"),
        Output("nav", "href"),
        Input("grid", "clickData"),
        Input("ordered", "clickData"),
        Input("table", "cellClicked"),
        State("run-id", "data"),
        State("table", "virtualRowData"),
        prevent_initial_call=True,
    )
