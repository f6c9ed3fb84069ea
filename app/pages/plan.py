"""`/run/<run>/plan`: choose a method and a budget, see what it costs and keeps head by head, export it to an engine.

Planning reads the run and never the model, so a slider answers at once; what is exported is what is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dash
import dash_mantine_components as dmc
from dash import ClientsideFunction, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from headscope.app import context, theme
from headscope.app.components.panel import control, icon, panel
from headscope.app.components.plan_facts import plan_facts
from headscope.app.components.plan_figure import plan_figure
from headscope.app.components.shell import crumbs
from headscope.app.components.states import failure
from headscope.app.plan_files import FOLDER
from headscope.app.planning.archive import export_zip
from headscope.app.planning.make import LENGTHS, PREFERRED, keep, make
from headscope.app.planning.methods import Method, methods_for
from headscope.app.runs import Run
from headscope.app.urls import choice, home_url, run_url
from headscope.errors import HeadscopeError, PlanError, RunError, refusal

if TYPE_CHECKING:
    from headscope.export.base import Format
    from headscope.plans.mass import KeptMass
    from headscope.plans.plan import SparsePlan

TITLE = "Plan · headscope"
BOUNDS = {"density": "compute", "cache": "KV cache"}
ROUND = "Round what the engine cannot express"


def first(run: str = "", **_query: object) -> Component:
    """The first paint: a plan takes a second to make, and its page's name need not wait for it."""
    try:
        return html.Div([_title(context.open_run(run)), html.P("Making the plan …", className="muted", role="status")])
    except RunError as error:
        return failure("This run cannot be shown", str(error))


def _title(run: Run) -> Component:
    return html.Div(
        [
            crumbs(("Runs", home_url()), (run.id, run_url(run.id)), ("Plan", None)),
            html.H1(["Sparse plan of ", str(run.card.get("model", {}).get("name") or run.id)]),
        ],
        className="page-title",
    )


def layout(run: str = "", **query: object) -> Component:
    """The page of a run's plans; the query may hold method, bound, share, length and format."""
    try:
        opened = context.open_run(run)
        listed = methods_for(opened.profile())
    except RunError as error:
        return failure("This run cannot be shown", str(error))
    ready = [one for one in listed if not one.lacks]
    method = choice(
        query,
        "method",
        [one.name for one in ready],
        PREFERRED if any(one.name == PREFERRED for one in ready) else ready[0].name if ready else "",
    )
    bounds = _bounds(listed, method)
    bound = choice(query, "bound", bounds, bounds[0])
    lengths = lengths_of(opened)
    length = choice(query, "length", [str(one) for one in lengths], str(lengths[-1]))
    share = percent(query)
    figure, told = draw(opened, method, bound, share, int(length), theme.scheme_of())
    return html.Div(
        [
            dcc.Store(id="plan-run", data=opened.id),
            dcc.Store(id="plan-url", data=""),
            dcc.Store(id="plan-kept", data=""),
            dcc.Download(id="plan-download"),
            _title(opened),
            html.Div(
                [
                    html.Div(
                        [
                            panel("Method and budget", _form(listed, method, bounds, bound, share, lengths, length)),
                            panel(
                                "What each head computes",
                                dcc.Graph(
                                    id="plan-grid",
                                    figure=figure,
                                    config=theme.graph_config(f"{opened.id}-plan"),
                                    className="graph clickable",
                                    style={"height": figure["layout"].get("height", 320)},
                                ),
                                html.P("Click a head to open it. Hover to read its pattern and what it keeps.", className="hint"),
                                html.Div(
                                    [
                                        html.Button("Keep this plan", id="plan-keep", className="button-plain"),
                                        html.Span(
                                            "to lay it over the maps of heads, and to run it", id="plan-kept-note", className="muted"
                                        ),
                                    ],
                                    className="plan-keep",
                                ),
                            ),
                        ],
                        className="column",
                    ),
                    html.Div(
                        [panel("Cost and what is kept", html.Div(told, id="plan-facts")), panel("Export", _export(query))],
                        className="column",
                    ),
                ],
                className="plan-layout",
            ),
        ]
    )


def _form(listed: list[Method], method: str, bounds: list[str], bound: str, share: int, lengths: list[int], length: str) -> Component:
    about = next((one for one in listed if one.name == method), None)
    return html.Div(
        [
            html.Div(
                [
                    control(
                        "Method",
                        dmc.Select(
                            id="plan-method",
                            value=method or None,
                            data=[
                                {
                                    "value": one.name,
                                    "label": f"{one.name} (needs {one.lacks})" if one.lacks else one.name,
                                    "disabled": bool(one.lacks),
                                }
                                for one in listed
                            ],
                            allowDeselect=False,
                            searchable=True,
                            size="sm",
                            w=300,
                            **{"aria-label": "Method"},
                        ),
                    ),
                    control(
                        "At",
                        dmc.Select(
                            id="plan-length",
                            value=length,
                            data=[{"value": str(one), "label": f"{one:,} tokens"} for one in lengths],
                            allowDeselect=False,
                            size="sm",
                            w=150,
                            **{"aria-label": "Length"},
                        ),
                    ),
                ],
                className="toolbar toolbar-tight",
            ),
            html.P(about_line(about), id="plan-about", className="muted plan-about"),
            html.Div(
                [
                    control(
                        "At most",
                        dmc.SegmentedControl(
                            id="plan-bound", value=bound, data=[{"value": one, "label": BOUNDS[one]} for one in bounds], size="xs"
                        ),
                    ),
                    dmc.Slider(
                        id="plan-share",
                        value=share,
                        min=1,
                        max=100,
                        step=1,
                        updatemode="mouseup",
                        marks=[{"value": one, "label": f"{one} %"} for one in (10, 25, 50, 75, 100)],
                        labelAlwaysOn=False,
                        className="plan-slider",
                        **{"aria-label": "Budget in percent of dense"},
                    ),
                ],
                className="toolbar toolbar-tight plan-budget",
            ),
        ]
    )


def formats() -> dict[str, Format]:
    """The formats; they and torch are loaded when the page is first asked for."""
    from headscope.export.registry import FORMATS

    return FORMATS


def _export(query: dict[str, object]) -> Component:
    known = formats()
    name = choice(query, "format", known, next(iter(known)))
    return html.Div(
        [
            html.Div(
                [
                    dmc.Select(
                        id="plan-format",
                        value=name,
                        data=[{"value": one, "label": f"{one}: {made.title}"} for one, made in known.items() if made.plans],
                        searchable=True,
                        allowDeselect=False,
                        size="sm",
                        className="plan-format",
                        **{"aria-label": "Format"},
                    ),
                    dmc.Button("Export", id="plan-export", size="sm"),
                ],
                className="plan-export-row",
            ),
            dmc.Checkbox(id="plan-lossy", label=ROUND, checked=False, size="sm"),
            html.Div(format_facts(name), id="plan-format-facts"),
            html.Div(id="plan-report"),
        ],
        className="plan-export",
    )


def draw(run: Run, method: str, bound: str, share: int, length: int, scheme: theme.Scheme) -> tuple[dict[str, Any], Component]:
    """The grid and the facts; a plan that cannot be made says why in place of the facts."""
    from headscope.app.figures import empty

    try:
        if not method:
            raise PlanError(
                "This run has no measurement that a planner stands on. Profile it with --probes duo_surrogate, streaming or minference."
            )
        made = make(run, method, bound, share / 100, length)
    except HeadscopeError as error:
        blank = theme.layout(scheme, height=320)
        return empty("no plan", blank), html.Div([icon("warning"), html.P(str(error))], className="live-failed", role="alert")
    kept, why = mass_of(run, made, length)
    return plan_figure(run, made, length, scheme, None if kept is None else kept.value), plan_facts(made, length, kept, why)


def mass_of(run: Run, plan: SparsePlan, length: int) -> tuple[KeptMass | None, str]:
    """The attention that a plan keeps, or why that is not known."""
    try:
        return plan.kept_mass(run.profile(), length), ""
    except HeadscopeError as error:
        return None, str(error)


def lengths_of(run: Run) -> list[int]:
    """The lengths to choose from: up to what the model was made for, where the card says so."""
    limit = run.card.get("model", {}).get("max_length")
    found = [one for one in LENGTHS if not limit or one <= int(limit)]
    return found or [int(limit or LENGTHS[0])]


def percent(query: dict[str, object]) -> int:
    """The share of the address, 1 to 100."""
    value = query.get("share")
    return min(max(int(value), 1), 100) if isinstance(value, str) and value.isdecimal() and len(value) < 4 else 50


def about_line(method: Method | None) -> str:
    """A method's first sentence and where it comes from."""
    return "" if method is None else f"{method.title} ({method.source})"


def format_facts(name: str) -> Component:
    """What a format holds and what it cannot."""
    known = formats()
    if not isinstance(name, str) or name not in known:
        return html.Div("Choose a format.", className="plan-format-facts")
    made = known[name]
    return html.Div(
        [
            html.P([html.B("Holds: "), "; ".join(made.holds)]),
            html.P([html.B("Cannot hold: "), "; ".join(made.lacks)]) if made.lacks else None,
        ],
        className="plan-format-facts",
    )


def update(
    run: str, method: str | None, bound: str, share: int | None, length: str, scheme: str | None
) -> tuple[dict[str, Any], Component, str, Any, Any]:
    """Callback: the plan again after a choice."""
    opened = context.open_run(run)
    listed = methods_for(opened.profile())
    known = next((one for one in listed if one.name == method and not one.lacks), None)
    name = known.name if known else ""
    bounds = _bounds(listed, name)
    chosen = bound if bound in bounds else bounds[0]
    tokens = int(length) if isinstance(length, str) and length in {str(one) for one in lengths_of(opened)} else lengths_of(opened)[-1]
    figure, told = draw(opened, name, chosen, share if isinstance(share, int) else 50, tokens, theme.scheme_of(scheme))
    choices = [{"value": one, "label": BOUNDS[one]} for one in bounds]
    return figure, told, about_line(known), choices, chosen if chosen != bound else no_update


def export(
    _: int | None, run: str, method: str | None, bound: str, share: int | None, length: str, name: str, lossy: bool
) -> tuple[Any, Component]:
    """Callback: the archive and its report, or why it was refused."""
    from headscope.export.base import LOSSY

    opened = context.open_run(run)
    try:
        tokens = int(length) if isinstance(length, str) and length.isdecimal() and len(length) < 10 else lengths_of(opened)[-1]
        plan = make(opened, str(method), bound, (share if isinstance(share, int) else 50) / 100, tokens)
        content, report = export_zip(plan, opened, name, lossy=bool(lossy), length=tokens)
    except HeadscopeError as error:
        told = str(error).replace(LOSSY, f'"{ROUND}" ticked').replace(" (headscope formats)", "")
        return no_update, html.Div([icon("warning"), html.P(told)], className="live-failed", role="alert")
    changed = len(report.changed)
    line = "Every head is written as planned." if not changed else f"{changed} of {len(report.heads)} heads were rounded."
    return (
        dcc.send_bytes(content, f"{opened.id}-{name}.zip"),
        html.Div([html.P(line), html.Pre(report.text(), className="plan-loss")], role="status"),
    )


def keep_plan(_: int | None, run: str, method: str | None, bound: str, share: int | None, length: str) -> tuple[Any, Component]:
    """Callback: the plan as a file beside the runs."""
    opened = context.open_run(run)
    index = context.index()
    try:
        if index.single is not None:
            why = "the dashboard was opened on one run and has no folder for plans"
            raise refusal(RunError, "a plan to keep", why, "open it on a directory of runs, or export the plan")
        tokens = int(length) if length in {str(one) for one in lengths_of(opened)} else lengths_of(opened)[-1]
        made = make(opened, str(method), bound, (share if isinstance(share, int) else 50) / 100, tokens)
        name = keep(opened, made, index.root)
    except HeadscopeError as error:
        return "", html.Span(str(error), className="live-failed", role="alert")
    return name, html.Span(["kept as ", html.Code(f"{FOLDER}/{name}.json"), "; heads now open with it"], role="status")


def _bounds(listed: list[Method], method: str) -> list[str]:
    found = next((one for one in listed if one.name == method), None)
    return [one for one in BOUNDS if found is None or one in found.bounds] or list(BOUNDS)


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    app.callback(
        Output("plan-grid", "figure"),
        Output("plan-facts", "children"),
        Output("plan-about", "children"),
        Output("plan-bound", "data"),
        Output("plan-bound", "value"),
        State("plan-run", "data"),
        Input("plan-method", "value"),
        Input("plan-bound", "value"),
        Input("plan-share", "value"),
        Input("plan-length", "value"),
        Input("scheme-now", "data"),
        prevent_initial_call=True,
    )(update)
    app.callback(
        Output("plan-format-facts", "children"),
        Input("plan-format", "value"),
        prevent_initial_call=True,
    )(format_facts)
    app.callback(
        Output("plan-download", "data"),
        Output("plan-report", "children"),
        Input("plan-export", "n_clicks"),
        State("plan-run", "data"),
        State("plan-method", "value"),
        State("plan-bound", "value"),
        State("plan-share", "value"),
        State("plan-length", "value"),
        State("plan-format", "value"),
        State("plan-lossy", "checked"),
        prevent_initial_call=True,
    )(export)
    app.callback(
        Output("plan-kept", "data"),
        Output("plan-kept-note", "children"),
        Input("plan-keep", "n_clicks"),
        State("plan-run", "data"),
        State("plan-method", "value"),
        State("plan-bound", "value"),
        State("plan-share", "value"),
        State("plan-length", "value"),
        prevent_initial_call=True,
    )(keep_plan)
    app.clientside_callback(
        ClientsideFunction("headscope_plan", "url"),
        Output("plan-url", "data"),
        Input("plan-method", "value"),
        Input("plan-bound", "value"),
        Input("plan-share", "value"),
        Input("plan-length", "value"),
        Input("plan-format", "value"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("headscope_plan", "open_head"),
        Output("nav", "href", allow_duplicate=True),
        Input("plan-grid", "clickData"),
        State("plan-run", "data"),
        State("plan-kept", "data"),
        prevent_initial_call=True,
    )
