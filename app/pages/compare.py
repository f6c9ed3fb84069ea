"""`/compare?a=<run>&b=<run>`: two runs head by head: prompts, models, before and after an intervention.

Heads are matched by layer and number, which means something only where both runs have the same layers and heads. Where they have not, the
page says so and shows what can still be compared: roles, whole-model numbers, and each metric over depth and over all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import dash
import dash_mantine_components as dmc
from dash import ClientsideFunction, Input, Output, State, dcc, html
from dash.development.base_component import Component
from pydantic import Field

from headscope.app import context, theme
from headscope.app.components import compare_figures as figures
from headscope.app.components import compare_tables as tables
from headscope.app.components.map_viewer import viewer_facts, viewer_host
from headscope.app.components.panel import control, panel, tag
from headscope.app.components.shell import crumbs
from headscope.app.components.states import failure
from headscope.app.finder import Head, heads_of
from headscope.app.metrics import default_metric, describe, grouped
from headscope.app.runs import Run
from headscope.app.urls import choice, compare_url, home_url, run_url
from headscope.errors import HeadscopeError, RunError

if TYPE_CHECKING:
    from headscope.profile.comparison import Comparison

TITLE = "Compare · headscope"
Two = Annotated[list[str], Field(min_length=2, max_length=2)]
"""The ids of both runs."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs and how they compare; `found` is None where their heads cannot be matched, and `why` says why."""

    first: Run
    second: Run
    found: Comparison | None
    why: str

    @classmethod
    def open(cls, first: str, second: str) -> Pair:
        """Opens both. RunError for an id that is not listed."""
        from headscope.profile.comparison import compare

        a, b = context.open_run(first), context.open_run(second)
        try:
            return cls(a, b, compare(a.profile(), b.profile()), "")
        except HeadscopeError as error:
            return cls(a, b, None, str(error))

    @property
    def metrics(self) -> list[str]:
        """Metrics that both have."""
        return [name for name in self.first.metrics if name in self.second.metrics]

    def head(self, given: object, metric: str) -> Head | None:
        """The head whose maps are shown: the one asked for, else the one that changed most."""
        asked = heads_of(given, self.first)
        if asked and self.second.has(*asked[0]):
            return asked[0]
        changed = self.found.changed(metric, 1) if self.found is not None and metric in self.found.metrics else []
        return (changed[0][0], changed[0][1]) if changed else None


def layout(a: str = "", b: str = "", **query: object) -> Component:
    """The page; the query may also hold metric and head."""
    entries = [entry for entry in context.index().entries() if entry.card is not None]
    a, b = str(a), str(b)  # a repeated query key arrives as a list
    if not a or not b:
        return html.Div([_title(None), _choose(entries, a, b), html.P(_CHOOSE, className="muted")])
    try:
        pair = Pair.open(a, b)
    except RunError as error:
        return failure("These runs cannot be compared", str(error))
    head_line = [_title(pair), _choose(entries, a, b)]
    if not pair.metrics:
        why = "They have no metric in common: profile both with the same probes."
        return html.Div(
            [*head_line, html.P(why, className="warning-line", role="alert"), panel("Cards", tables.card_table(pair.first, pair.second))]
        )
    metric = choice(query, "metric", pair.metrics, default_metric(pair.metrics))
    chosen = pair.head(query.get("head"), metric)
    return html.Div(
        [
            *head_line,
            dcc.Store(id="compare-runs", data=[a, b]),
            dcc.Store(id="compare-head", data="" if chosen is None else f"{chosen[0]}.{chosen[1]}"),
            *_notes(pair),
            _body(pair, metric, chosen, theme.scheme_of()),
        ]
    )


_CHOOSE = "Choose two runs: the same model on two prompts, two models of the same shape, or a model before and after an intervention."


def _title(pair: Pair | None) -> Component:
    names = [] if pair is None else [pair.first.id, pair.second.id]
    return html.Div(
        [crumbs(("Runs", home_url()), ("Compare", None)), html.H1("Compare" if pair is None else f"{names[0]} and {names[1]}")],
        className="page-title",
    )


def _choose(entries: list[Any], a: str, b: str) -> Component:
    options = [{"value": entry.id, "label": entry.id} for entry in entries]

    def select(name: str, value: str, label: str) -> Component:
        return control(
            label,
            dmc.Select(id=name, value=value or None, data=options, searchable=True, size="sm", w=270, **{"aria-label": f"{label} run"}),
        )

    swap = dcc.Link("Swap", href=compare_url(b, a), className="small-button swap") if a and b else None
    return html.Div([select("compare-a", a, "First"), select("compare-b", b, "Second"), swap], className="toolbar toolbar-tight")


def _notes(pair: Pair) -> list[Component]:
    notes = []
    if pair.first.id == pair.second.id:
        notes.append(html.P("Both are the same run: every difference is zero.", className="warning-line"))
    if pair.found is None:
        notes.append(
            html.P(
                [html.B("Heads cannot be matched. "), pair.why, ". Below is what can still be compared."],
                className="warning-line",
                role="alert",
            )
        )
    elif pair.found.notes:
        notes.append(html.Div([tag(note, className="tag-warning") for note in pair.found.notes], className="tags compare-notes"))
    return notes


def _body(pair: Pair, metric: str, chosen: Head | None, scheme: theme.Scheme) -> Component:
    first, second = pair.first, pair.second
    described = describe(first.card, metric)
    select = dmc.Select(
        id="compare-metric",
        value=metric,
        data=grouped(first.card, pair.metrics),
        searchable=True,
        allowDeselect=False,
        size="sm",
        w=260,
        maxDropdownHeight=420,
        **{"aria-label": "Metric"},
    )
    roles = panel("Roles", tables.role_table(first, second), *_more(tables.number_table(first, second)))
    cards = panel("Cards", tables.card_table(first, second))
    depth = panel(
        f"{described.label} over depth",
        html.Div([_key(first, 0, scheme), _key(second, 1, scheme)], className="tags"),
        _graph("compare-depth", figures.depth_figure(first, second, described, scheme), f"{first.id}-{second.id}-depth"),
    )
    if pair.found is None:
        return html.Div(
            [
                html.Div(control("Metric", select), className="toolbar"),
                html.Div([html.Div([depth, cards], className="column"), roles], className="compare-pair"),
            ]
        )
    drawn = figures.grids(first, second, described, chosen, scheme)
    titles = {"grid-a": f"First: {first.id}", "grid-b": f"Second: {second.id}", "difference": "Second less first"}
    three = html.Div(
        [html.Div([html.H3(titles[name]), _graph(f"compare-{name}", drawn[name], f"{first.id}-{second.id}-{name}")]) for name in titles],
        className="three",
    )
    pairs = _graph("compare-pairs", figures.pairs_figure(first, second, described, chosen, scheme), f"{first.id}-{second.id}-pairs")
    hint = "Click a head in any figure to see both of its maps."
    return html.Div(
        [
            panel("Heads", html.Div(control("Metric", select), className="toolbar"), three, html.P(hint, className="hint")),
            html.Div(
                [
                    panel("Every head in both runs", pairs),
                    panel(f"Changed most in {described.label}", tables.changed_heads(first, second, pair.found, metric)),
                ],
                className="compare-pair",
            ),
            panel("Both maps", html.Div(pair_view(pair, chosen), id="pair-view"), className="pair-panel"),
            panel("Metrics", tables.metric_table(first, second, pair.found, metric)),
            html.Div([html.Div([depth, cards], className="column"), roles], className="compare-pair"),
        ],
        className="column",
    )


def pair_view(pair: Pair, chosen: Head | None) -> Component:
    """The maps of one head in both runs, side by side; they move together where the texts have the same length."""
    if chosen is None:
        return html.P("No head has this metric in both runs.", className="muted")
    facts: dict[str, Any] = {"linked": False}
    boxes = []
    for side, run in (("a", pair.first), ("b", pair.second)):
        label = html.Div(
            [html.B(("First: " if side == "a" else "Second: ") + run.id), html.Span(id=f"badge-{side}", className="tags")],
            className="line-title",
        )
        try:
            facts[side] = viewer_facts(run, *chosen)
            boxes.append(
                html.Div([label, html.Div(viewer_host(f"viewer-{side}", f"badge-{side}", f"Map of {run.id}"), className="map-frame")])
            )
        except RunError as error:
            boxes.append(html.Div([label, html.P(str(error), className="muted")]))
    if "a" in facts and "b" in facts:
        facts["linked"] = facts["a"]["tokens"] == facts["b"]["tokens"]
    note = "They move together." if facts["linked"] else "The texts differ in length, so each moves by itself."
    controls = html.Div(
        [
            html.B(f"Layer {chosen[0]} · Head {chosen[1]}"),
            control("Cell shows", _segments("pair-plane", {"mass": "mass", "max": "max"})),
            control("Scale", _segments("pair-scale", {"log": "log", "linear": "linear", "row": "per row"})),
            dmc.Switch(id="pair-sink", checked=False, label="Hide first keys", size="xs"),
        ],
        className="toolbar toolbar-tight",
    )
    return html.Div(
        [
            controls,
            html.Div(boxes, className="pair-maps"),
            html.P(f"{note} Wheel zooms, drag pans, double-click shows all.", className="hint"),
            dcc.Store(id="pair-facts", data=facts),
        ]
    )


def update(runs: Two, metric: str, head: str, scheme: str | None) -> tuple[Any, ...]:
    """Callback: the figures after a change of scheme or of the chosen head."""
    pair = Pair.open(*runs)
    metric = choice({"metric": metric}, "metric", pair.metrics, default_metric(pair.metrics))
    described, drawn_in = describe(pair.first.card, metric), theme.scheme_of(scheme)
    chosen = pair.head(head, metric)
    drawn = figures.grids(pair.first, pair.second, described, chosen, drawn_in)
    return (*drawn.values(), figures.pairs_figure(pair.first, pair.second, described, chosen, drawn_in))


def update_depth(scheme: str | None, runs: Two, metric: str) -> dict[str, Any]:
    """Callback: the curves after a change of scheme."""
    pair = Pair.open(*runs)
    metric = choice({"metric": metric}, "metric", pair.metrics, default_metric(pair.metrics))
    return figures.depth_figure(pair.first, pair.second, describe(pair.first.card, metric), theme.scheme_of(scheme))


def update_pair(head: str, runs: Two, metric: str) -> Component:
    """Callback: the maps of another head."""
    pair = Pair.open(*runs)
    return pair_view(pair, pair.head(head, metric))


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    once = {"prevent_initial_call": True}
    runs, metric, head = State("compare-runs", "data"), State("compare-metric", "value"), Input("compare-head", "data")
    outputs = [Output(f"compare-{name}", "figure") for name in ("grid-a", "grid-b", "difference", "pairs")]
    app.callback(*outputs, runs, metric, head, Input("scheme-now", "data"), **once)(update)
    app.callback(Output("compare-depth", "figure"), Input("scheme-now", "data"), runs, metric, **once)(update_depth)
    app.callback(Output("pair-view", "children"), head, runs, metric, **once)(update_pair)
    app.clientside_callback(
        ClientsideFunction("headscope", "compare_url"),
        Output("nav", "href", allow_duplicate=True),
        Input("compare-a", "value"),
        Input("compare-b", "value"),
        **once,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "compare_metric"),
        Output("nav", "href", allow_duplicate=True),
        Input("compare-metric", "value"),
        runs,
        **once,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "compare_head"),
        Output("compare-head", "data"),
        *[Input(f"compare-{name}", "clickData") for name in ("grid-a", "grid-b", "difference", "pairs")],
        **once,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "pair"),
        Output("pair-sink", "className"),
        Input("pair-facts", "data"),
        Input("pair-plane", "value"),
        Input("pair-scale", "value"),
        Input("pair-sink", "checked"),
        State("compare-head", "data"),
    )


def _graph(name: str, figure: dict[str, Any], file: str) -> Component:
    return dcc.Graph(
        id=name, figure=figure, config=theme.graph_config(file), className="graph clickable", style={"height": figure["layout"]["height"]}
    )


def _key(run: Run, number: int, scheme: theme.Scheme) -> Component:
    style = {"borderTop": f"3px {('solid', 'dashed')[number]} {figures.COLOURS[scheme][number]}"}
    return html.Span(
        [html.I(className="line-key", style=style), dcc.Link(f"{('First', 'Second')[number]}: {run.id}", href=run_url(run.id))],
        className="tag",
    )


def _segments(name: str, options: dict[str, str]) -> Component:
    first = next(iter(options))
    return dmc.SegmentedControl(id=name, value=first, data=[{"value": key, "label": text} for key, text in options.items()], size="xs")


def _more(component: Component | None) -> list[Component]:
    return [] if component is None else [html.Div(component, className="second")]
