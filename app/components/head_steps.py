"""Steps to the neighbouring heads: links that the arrow keys press, carrying the view along."""

from __future__ import annotations

from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.panel import icon
from headscope.app.runs import Run
from headscope.app.urls import head_url

WAYS = {"left": "previous layer", "right": "next layer", "up": "previous head", "down": "next head"}


def neighbours(run: Run, layer: int, head: int) -> dict[str, tuple[int, int] | None]:
    """The heads one step left and right (layers) and up and down (heads); None at the border and where a layer has no such head."""
    place = run.layers.index(layer)
    before = run.layers[place - 1] if place else None
    after = run.layers[place + 1] if place + 1 < len(run.layers) else None
    wanted = {"left": (before, head), "right": (after, head), "up": (layer, head - 1), "down": (layer, head + 1)}
    return {way: (to[0], to[1]) if to[0] is not None and run.has(to[0], to[1]) else None for way, to in wanted.items()}


def head_steps(run: Run, layer: int, head: int, state: dict[str, str]) -> Component:
    """Four links, ids step-left, step-right, step-up, step-down; at a border the link is there but leads nowhere new."""
    links = []
    for way, to in neighbours(run, layer, head).items():
        target = to or (layer, head)
        href = head_url(run.id, target[0], target[1], **state)
        title = f"{WAYS[way].capitalize()} (arrow {way})" if to else f"There is no {WAYS[way]}"
        link = dcc.Link(icon(way), id=f"step-{way}", href=href, title=title, className="step-link")
        links.append(html.Span(link, className=f"step step-{way}" + ("" if to else " step-none")))
    lines = ("arrow keys:", "left, right for layers", "up, down for heads")
    keys = html.Div([html.Span(line) for line in lines], className="steps-hint")
    return html.Div([keys, html.Div(links, className="steps")], className="steps-frame")
