"""What a job gave: its state while it runs, the two texts side by side, or the way to the new run."""

from __future__ import annotations

import math

import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.panel import facts, icon, tag
from headscope.app.format import MINUS, number, visible_token
from headscope.app.live.compare import Comparison
from headscope.app.live.owner import Job
from headscope.app.urls import run_url


def waiting(job: Job, before: int) -> Component:
    """State and progress of a job that is not over."""
    words = f"waits for {before} other{'s' if before > 1 else ''}" if job.state == "waiting" and before else job.state
    return html.Div(
        [
            html.Div(
                [html.B(job.title), html.Span(words, className="muted"), html.Span(job.note, className="muted")], className="live-state"
            ),
            dmc.Progress(value=100 * (job.share or 0.0), size="sm", **{"aria-label": "Progress"}),
        ],
        role="status",
    )


def ended(job: Job) -> Component:
    """The result of a job that is over."""
    if job.state == "failed":
        return html.Div([icon("warning"), html.P(job.error)], className="live-failed", role="alert")
    if job.state == "cancelled":
        return html.P("Cancelled. The model is as it was.", className="muted", role="status")
    if isinstance(job.result, Comparison):
        return comparison(job.result, job.seconds)
    return html.Div(
        [
            html.P(["Captured in ", number(job.seconds), " s: ", html.Code(str(job.result))]),
            dcc.Link("Open the run", href=run_url(str(job.result)), className="button"),
        ],
        role="status",
    )


def comparison(found: Comparison, seconds: float) -> Component:
    """The two texts, what differs first, and the numbers."""
    same = found.first is None
    where = "nothing differs" if same else f"differs from new token {(found.first or 0) + 1}"
    lost = found.log_p[0] - found.log_p[1]
    return html.Div(
        [
            html.P(found.explanation, className="live-explained"),
            html.Div(
                [_text("Without", found.plain, found.first), _text("With", found.changed, found.first)],
                className="live-texts",
            ),
            html.Div(
                [
                    tag(where, className="" if same else "tag-strong"),
                    tag(f"KL of the first new token {number(found.kl)} nats"),
                    tag(f"the unchanged text: {_signed(-lost)} nats a token when changed"),
                    tag(f"{number(seconds)} s"),
                ],
                className="tags",
            ),
            html.H3("First new token", className="second"),
            _candidates(found),
            facts(
                ("Mean log p, without", number(found.log_p[0])),
                ("Mean log p, with", number(found.log_p[1])),
                ("Prompt", f"{len(found.prompt)} tokens"),
            ),
        ]
    )


def _text(title: str, pieces: tuple[str, ...], first: int | None) -> Component:
    at = len(pieces) if first is None else first
    rest = "".join(pieces[at:])
    return html.Div(
        [
            html.H3(title),
            html.P(
                ["".join(pieces[:at]), html.Mark(rest) if rest else ("" if first is None else html.Mark("(ends here)"))],
                className="live-text",
            ),
        ]
    )


def _candidates(found: Comparison) -> Component:
    most = max([one.plain for one in found.candidates] + [one.changed for one in found.candidates] + [1e-9])
    rows = []
    for one in found.candidates:
        rows.append(
            html.Tr(
                [
                    html.Td(html.Code(visible_token(one.piece) or "(empty)")),
                    *[
                        cell
                        for value in (one.plain, one.changed)
                        for cell in (html.Td(number(value), className="num"), html.Td(_bar(value / most)))
                    ],
                    html.Td(_signed(math.log(max(one.changed, 1e-30) / max(one.plain, 1e-30))), className="num"),
                ]
            )
        )
    head = html.Tr([html.Th("token"), html.Th("without", colSpan=2), html.Th("with", colSpan=2), html.Th("log ratio", className="num")])
    return html.Table([html.Thead(head), html.Tbody(rows)], className="metrics live-candidates")


def _bar(share: float) -> Component:
    return html.Div(html.I(style={"width": f"{100 * share:.1f}%"}), className="rank-bar")


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else MINUS}{number(abs(value))}"
