"""The finder and the pinned heads: a list that travels in the address from page to page."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.role_legend import role_glyph
from headscope.app.finder import Head, names_of
from headscope.app.format import TIMES, count
from headscope.app.runs import Run
from headscope.app.urls import head_url


def finder(text: str) -> Component:
    """The field, its answer, and what to do with the heads it found."""
    return html.Div(
        [
            dmc.TextInput(
                id="find",
                value=text,
                placeholder="Find heads: 18.6 · induction · sink > 0.5 · top 5 distance and layer > 3",
                debounce=350,
                size="sm",
                className="finder-field",
                **{"aria-label": "Find heads"},
            ),
            html.Button(
                "Pin them", id="pin-picked", type="button", className="small-button", title="Keep these heads in the address", disabled=True
            ),
            html.Button("Clear", id="clear-picked", type="button", className="small-button", title="Pick no head", disabled=True),
            html.Div(id="find-note", className="find-note", role="status"),
        ],
        className="finder",
    )


def found_note(run: Run, picked: list[Head], text: str) -> Component:
    """How many heads are picked, the first of them as links."""
    if not picked:
        return html.Span("No head is that." if text else "", className="muted")
    links: list[Component] = [
        dcc.Link(f"{layer}.{head}", href=head_url(run.id, layer, head), className="head-link", title=", ".join(run.reasons[layer, head]))
        for layer, head in picked[:14]
    ]
    more = f" and {len(picked) - 14:,} more" if len(picked) > 14 else ""
    return html.Span([html.B(count(len(picked), "head")), *links, html.Span(more, className="muted")], className="found")


def pin_list(run: Run, pins: list[Head], metric: str, label: str, picked: str = "") -> Component:
    """A row per pinned head: link, roles, the metric, a button that lets it go."""
    if not pins:
        return html.P("None yet. Find or pick heads and pin them, or pin a head on its page.", className="muted")
    values = run.grid(metric)
    carried = {"pins": names_of(pins)}
    rows = []
    for layer, head in pins:
        value = values[run.layers.index(layer), head]
        rows.append(
            html.Li(
                [
                    dcc.Link(f"{layer}.{head}", href=head_url(run.id, layer, head, **carried), className="head-link"),
                    html.Span([role_glyph(run, role) for role in run.reasons[layer, head]], title=", ".join(run.reasons[layer, head])),
                    html.Span(f"{value:.3g}", className="num pin-value", title=label),
                    html.Button(
                        TIMES,
                        type="button",
                        className="unpin",
                        title="Unpin",
                        **{"data-unpin": f"{layer}.{head}", "aria-label": f"Unpin {layer}.{head}"},
                    ),
                ]
            )
        )
    return html.Ul(rows, className="pins")
