"""`/run/<run>`: every head of a model: the grid of a metric, two metrics against each other, the finder, the roles, the table, the card.

Heads that are picked (by the finder, or by a box in the scatter plot) are the same everywhere: ringed in the grid and the plot, alone in
the table. Pinned heads stay, and travel in the address.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import ClientsideFunction, Input, Output, State, dcc, html
from dash.development.base_component import Component

from headscope.app import context, theme
from headscope.app.components.head_grid import SCALES, UNCOMMON, grid_figure
from headscope.app.components.head_pins import finder, found_note, pin_list
from headscope.app.components.head_scatter import HEIGHT, other_metric, scatter_figure
from headscope.app.components.head_table import head_table, table_columns, table_metrics, table_note, table_rows
from headscope.app.components.metric_note import metric_note
from headscope.app.components.panel import control, panel, tag
from headscope.app.components.role_leaders import role_leaders
from headscope.app.components.role_legend import role_legend
from headscope.app.components.run_card import card_facts, change_tags, measured_tokens, shape_line
from headscope.app.components.shell import crumbs
from headscope.app.components.sorted_heads import sorted_figure
from headscope.app.components.states import failure
from headscope.app.finder import Head, find, heads_of, names_of
from headscope.app.format import count
from headscope.app.metrics import default_metric, describe, grouped
from headscope.app.ranks import rank_correlation
from headscope.app.runs import Run
from headscope.app.urls import choice, choices, home_url, pictures_url, plan_url
from headscope.errors import RunError

TITLE = "Heads · headscope"
HINT = (
    "Click a head to open it; hover to read why it has its roles. Choose roles to fade all other heads; until then the symbols "
    f"are those of roles that at most {UNCOMMON:.0%} of the heads have."
)


def layout(run: str = "", **query: object) -> Component:
    """The page of a run; the query may hold metric, scale, roles, x and y, find, picked and pins."""
    try:
        opened = context.open_run(run)
    except RunError as error:
        return failure("This run cannot be shown", str(error))
    view = HeadsView.read(query, opened)
    scheme = theme.scheme_of()
    grid, ordered, note = draw(opened, view, scheme)
    return html.Div(
        [
            dcc.Store(id="run-id", data=opened.id),
            dcc.Store(id="heads-url", data=""),
            dcc.Store(id="picked", data=names_of(view.picked)),
            dcc.Store(id="pins", data=names_of(view.pins)),
            dcc.Store(id="heads-usual", data={"x": view.usual_x, "y": other_metric(opened, view.usual_x)}),
            _title(opened),
            html.Div(
                [
                    html.Div(
                        [
                            _grid_panel(opened, view, grid, ordered, note),
                            html.Div([_scatter_panel(opened, view, scheme), _table_panel(opened)], className="pair"),
                        ],
                        className="column",
                    ),
                    html.Div(
                        [
                            panel("Pinned heads", html.Div(show_pins(opened.id, names_of(view.pins), view.metric), id="pin-list")),
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


@dataclass(frozen=True, slots=True)
class HeadsView:
    """What the page shows of a run, as its address says it; whatever the run lacks is the default."""

    metric: str
    scale: str
    roles: list[str]
    x: str
    y: str
    text: str
    picked: list[Head]
    pins: list[Head]
    usual_x: str

    @classmethod
    def read(cls, query: Mapping[str, object], run: Run) -> HeadsView:
        """The view of an address."""
        usual = default_metric(run.metrics)
        x = choice(query, "x", run.metrics, usual)
        text = query.get("find")
        text = text if isinstance(text, str) else ""
        picked = heads_of(query.get("picked"), run)
        if text and not picked:
            with contextlib.suppress(RunError):  # the finder says what is wrong with it when the text is touched
                picked = find(run, text)
        return cls(
            metric=choice(query, "metric", run.metrics, usual),
            scale=choice(query, "scale", SCALES, "value"),
            roles=choices(query, "roles", run.roles, []),
            x=x,
            y=choice(query, "y", run.metrics, other_metric(run, x)),
            text=text,
            picked=picked,
            pins=heads_of(query.get("pins"), run),
            usual_x=usual,
        )


def draw(run: Run, view: HeadsView, scheme: theme.Scheme) -> tuple[dict[str, Any], dict[str, Any], Component]:
    """The grid, the ordered heads and the note about the metric."""
    described = describe(run.card, view.metric)
    grid = grid_figure(run, described, view.scale, view.roles, scheme, view.picked, view.pins)
    return grid, sorted_figure(run, described, view.roles, scheme), metric_note(run, described)


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
                    *change_tags(run.card),
                    tag(" on ".join(str(model[key]) for key in ("dtype", "device") if model.get(key))),
                    dcc.Link("All heads on the picture", href=pictures_url(run.id), className="tag tag-strong") if run.pictures else None,
                    dcc.Link("Sparse plan and export", href=plan_url(run.id), className="tag tag-strong", id="to-plan"),
                ],
                className="tags",
            ),
        ],
        className="page-title",
    )


def _grid_panel(run: Run, view: HeadsView, grid: dict[str, Any], ordered: dict[str, Any], note: Component) -> Component:
    metrics = dmc.Select(
        id="metric",
        value=view.metric,
        data=grouped(run.card, run.metrics),
        searchable=True,
        allowDeselect=False,
        maxDropdownHeight=420,
        size="sm",
        w=260,
        **{"aria-label": "Metric"},
    )
    scales = dmc.SegmentedControl(
        id="scale", value=view.scale, data=[{"value": "value", "label": "value"}, {"value": "rank", "label": "rank"}], size="xs"
    )
    return panel(
        "Heads",
        html.Div([control("Metric", metrics), html.Div(note, id="metric-note", className="metric-note")], className="toolbar"),
        finder(view.text),
        html.Div(found_note(run, view.picked, view.text), id="picked-note", className="find-note"),
        role_legend(run, view.roles),
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


def _scatter_panel(run: Run, view: HeadsView, scheme: theme.Scheme) -> Component:
    def select(name: str, value: str, label: str) -> Component:
        choices_ = grouped(run.card, run.metrics)
        return dmc.Select(
            id=name, value=value, data=choices_, searchable=True, allowDeselect=False, size="xs", w=190, **{"aria-label": label}
        )

    config = theme.graph_config(f"{run.id}-two-metrics")
    config["modeBarButtonsToRemove"] = ["autoScale2d", "zoomIn2d", "zoomOut2d"]
    return panel(
        "Two metrics",
        html.Div(
            [control("Across", select("scatter-x", view.x, "Metric across")), control("Up", select("scatter-y", view.y, "Metric up"))],
            className="toolbar toolbar-tight",
        ),
        dcc.Graph(id="scatter", figure=_blank(scheme), config=config, className="graph clickable", style={"height": HEIGHT}),
        html.P("Draw a box (or a lasso, from the plot's bar) to pick heads; click one to open it.", className="hint"),
        html.Div(_agreement(run, view.x, view.y), id="scatter-note", className="hint"),
    )


def _blank(scheme: theme.Scheme) -> dict[str, Any]:
    return {"data": [], "layout": theme.layout(scheme, height=HEIGHT, xaxis={"visible": False}, yaxis={"visible": False})}


def _table_panel(run: Run) -> Component:
    pin = html.Button("Pin ticked", id="pin-rows", type="button", className="small-button", disabled=True)
    return panel(
        "Table", head_table(), aside=html.Div([html.Span(id="table-note", className="muted"), pin], className="found"), id="table-panel"
    )


def update(
    run: str, metric: str, scale: str, roles: list[str] | None, scheme: str | None, picked: str = "", pins: str = ""
) -> tuple[dict[str, Any], dict[str, Any], Component]:
    """Callback: redraws after a choice or a change of scheme."""
    opened = context.open_run(run)
    query: dict[str, object] = {"metric": metric, "scale": scale, "roles": ",".join(roles or []), "picked": picked, "pins": pins}
    return draw(opened, HeadsView.read(query, opened), theme.scheme_of(scheme))


def update_scatter(
    run: str, x: str, y: str, roles: list[str] | None, scheme: str | None, picked: str = "", pins: str = ""
) -> tuple[dict[str, Any], str]:
    """Callback: two metrics, and how far they agree in their ranks."""
    opened = context.open_run(run)
    view = HeadsView.read({"x": x, "y": y, "roles": ",".join(roles or []), "picked": picked, "pins": pins}, opened)
    figure = scatter_figure(opened, view.x, view.y, view.roles, view.picked, view.pins, theme.scheme_of(scheme))
    return figure, _agreement(opened, view.x, view.y)


def _agreement(run: Run, x: str, y: str) -> str:
    rho = rank_correlation(run.grid(x), run.grid(y))
    return "" if math.isnan(rho) else f"Spearman's rank correlation over all heads: {rho:.2f}"


def find_heads(run: str, text: str | None) -> tuple[Any, Any]:
    """Callback: (picked heads, what is wrong with the text). An empty text leaves what is picked."""
    if not text or not text.strip():
        return dash.no_update, ""
    try:
        return names_of(find(context.open_run(run), text)), ""
    except RunError as error:
        return dash.no_update, html.Span(str(error), className="warning-line", role="alert")


def show_picked(run: str, picked: str, text: str | None) -> tuple[Component, bool, bool]:
    """Callback: the picked heads in words, and whether there are any to pin or to clear."""
    opened = context.open_run(run)
    heads = heads_of(picked, opened, most=len(opened.table))
    return found_note(opened, heads, text or ""), not heads, not heads


def show_pins(run: str, pins: str, metric: str) -> Component:
    """Callback: the list of pinned heads with the chosen metric."""
    opened = context.open_run(run)
    metric = choice({"metric": metric}, "metric", opened.metrics, default_metric(opened.metrics))
    return pin_list(opened, heads_of(pins, opened), metric, describe(opened.card, metric).label)


def fill_table(run: str, metric: str, picked: str = "") -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Callback: the table's rows, columns and note, after the first paint and when the metric or the picked heads change."""
    opened = context.open_run(run)
    first = choice({"metric": metric}, "metric", opened.metrics, default_metric(opened.metrics))
    metrics = table_metrics(opened, first)
    heads = heads_of(picked, opened, most=len(opened.table))
    return table_rows(opened, metrics, heads), table_columns(opened, metrics), table_note(opened, metrics, heads)


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
        Input("picked", "data"),
        Input("pins", "data"),
        prevent_initial_call=True,
    )(update)
    app.callback(
        Output("scatter", "figure"),
        Output("scatter-note", "children"),
        State("run-id", "data"),
        Input("scatter-x", "value"),
        Input("scatter-y", "value"),
        Input("roles", "value"),
        Input("scheme-now", "data"),
        Input("picked", "data"),
        Input("pins", "data"),
    )(update_scatter)
    app.callback(
        Output("picked", "data"),
        Output("find-note", "children"),
        State("run-id", "data"),
        Input("find", "value"),
        prevent_initial_call=True,
    )(find_heads)
    app.callback(
        Output("picked-note", "children"),
        Output("pin-picked", "disabled"),
        Output("clear-picked", "disabled"),
        State("run-id", "data"),
        Input("picked", "data"),
        State("find", "value"),
    )(show_picked)
    app.callback(Output("pin-list", "children"), State("run-id", "data"), Input("pins", "data"), Input("metric", "value"))(show_pins)
    app.callback(
        Output("table", "rowData"),
        Output("table", "columnDefs"),
        Output("table-note", "children"),
        Input("run-id", "data"),
        Input("metric", "value"),
        Input("picked", "data"),
    )(fill_table)
    app.clientside_callback(
        ClientsideFunction("headscope", "heads_url"),
        Output("heads-url", "data"),
        Input("metric", "value"),
        Input("scale", "value"),
        Input("roles", "value"),
        Input("scatter-x", "value"),
        Input("scatter-y", "value"),
        Input("find", "value"),
        Input("picked", "data"),
        Input("pins", "data"),
        State("heads-usual", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "pick_box"),
        Output("scatter", "className"),
        Input("scatter", "selectedData"),
        State("picked", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "pin"),
        Output("pin-rows", "disabled"),
        Input("pin-rows", "n_clicks"),
        Input("table", "selectedRows"),
        Input("pin-picked", "n_clicks"),
        Input("clear-picked", "n_clicks"),
        State("picked", "data"),
        State("pins", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "open_head"),
        Output("nav", "href"),
        Input("grid", "clickData"),
        Input("ordered", "clickData"),
        Input("scatter", "clickData"),
        Input("table", "cellClicked"),
        State("run-id", "data"),
        State("table", "virtualRowData"),
        prevent_initial_call=True,
    )
