"""A head on a picture: what the browser is told, and the frame around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

from headscope.app.components.panel import panel
from headscope.app.runs import Run
from headscope.app.urls import api_url, pictures_url, position
from headscope.store.pictures import PictureReader

TITLES = {"answer": "On the picture, word by word", "step": "On the picture, step by step"}


def picture_facts(run: Run, found: PictureReader, query: Mapping[str, object]) -> dict[str, Any]:
    """What both views need: kind, labels, grid, addresses, and the frame and patch that the address asks for."""
    facts = found.facts
    patch = position(query, "patch", facts.patches)
    return {
        "kind": facts.kind,
        "labels": list(facts.labels),
        "grid": list(facts.grid),
        "pictures": int(found.picture.shape[0]),
        "picture": api_url(run.id, "picture/"),
        "version": run.version,
        "between": found.has_between,
        "frame": position(query, "frame", len(facts.labels)) or 0,
        "patch": -1 if patch is None else patch,
    }


def about(found: PictureReader) -> list[Component]:
    """Question and answer, or what the steps are."""
    facts = found.facts
    parts: list[Component] = []
    if facts.question:
        parts.append(html.P([html.Span("Question ", className="muted"), facts.question]))
    if facts.answer:
        parts.append(html.P([html.Span("Answer ", className="muted"), html.B(facts.answer)]))
    if facts.note:
        parts.append(html.P(facts.note, className="muted"))
    return parts


def picture_panel(run: Run, place: list[int], query: Mapping[str, object]) -> Component | None:
    """The panel of a head's page; None for a run without pictures."""
    found = run.pictures
    if found is None:
        return None
    facts = picture_facts(run, found, query) | {"weights": api_url(run.id, str(place[0]), str(place[1]), "pictures")}
    how = "Choose a word to see where it looks." if found.facts.kind == "answer" else "Choose a step; click a patch to see where it looks."
    return panel(
        TITLES[found.facts.kind],
        *about(found),
        html.Div(id="pictures", className="pictures", lang=""),
        html.P(
            f"{how} Full colour is the largest weight in sight. Arrow keys step through with the picture in focus.",
            className="hint",
        ),
        dcc.Store(id="picture-facts", data=facts),
        aside=dcc.Link("All heads", href=pictures_url(run.id)),
        className="area-picture",
    )
