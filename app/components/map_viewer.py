"""The attention map's panel: what the viewer in the browser is told, its controls, and what a plan drops.

The cells are drawn in the browser from tiles (assets/viewer); nothing of the map is in the page itself.
"""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component

from headscope.app import api, context, overlay, theme, tiles
from headscope.app.components.head_state import HeadState
from headscope.app.components.panel import control, icon, panel, tag
from headscope.app.format import number
from headscope.app.runs import Run
from headscope.app.urls import api_url
from headscope.errors import HeadscopeError, RunError

SINK_TOKENS = 4
DROP = {"light": "#d55e00", "dark": "#ff9d3d"}
HINT = (
    "Wheel zooms, drag pans, shift and drag zooms to a box, double-click shows all; a click chooses a query and a key. "
    "With the map in focus: arrows, + and \u2212, 0 for all, E for exact cells."
)
ABOUT = {
    "mass": "Block mass is per query, so a full row adds up to 1.",
    "max": "Block max is the largest single weight in the block.",
}


def viewer_facts(run: Run, layer: int, head: int, window: list[int] | None = None) -> dict[str, Any]:
    """What the viewer must know of a head. RunError for a run without maps."""
    shape = tiles.geometry(run, layer)
    kept = layer in run.kept_layers
    model = str(run.card.get("model", {}).get("name") or run.id)
    return {
        "run": run.id,
        "base": api_url(run.id, str(layer), str(head)),
        "words": api_url(run.id, "tokens/"),
        "page": api.TOKENS_A_PAGE,
        "version": run.version,
        "name": f"{run.id}-{layer}-{head}",
        "title": f"{model}, layer {layer}, head {head}",
        "tokens": shape.tokens,
        "tile": shape.tile,
        "causal": shape.causal,
        "exact": list(shape.exact),
        "stored": list(shape.stored),
        "sink": SINK_TOKENS,
        "window": window or [],
        "unkept": "" if kept else f"no finer: q and k were not kept (profile with --keep {layer})",
        "palettes": {
            scheme: {
                "sequential": list(colours.sequential),
                "muted": colours.muted,
                "text": colours.text,
                "line": colours.line,
                "panel": colours.panel,
                "accent": colours.accent,
                "drop": DROP[scheme],
            }
            for scheme, colours in theme.PALETTES.items()
        },
    }


def viewer_host(name: str = "viewer", badge: str = "map-badge", label: str = "Attention map") -> Component:
    """The element that the viewer fills; `badge`: id of the element that says what a cell is."""
    return html.Div(
        id=name,
        className="viewer",
        tabIndex=0,
        role="application",
        lang="",
        **{"aria-label": f"{label}. Arrows pan, plus and minus zoom.", "data-badge": badge},
    )


def map_panel(run: Run, place: list[int], state: HeadState) -> Component:
    """The map with its controls and its badge; a run without maps says so."""
    try:
        facts = viewer_facts(run, place[0], place[1], list(state.window or ()))
    except RunError as error:
        return panel("Attention map", html.P(str(error), className="muted"), *_silent(state), className="area-map")
    plans = context.index().plans.fitting(run)
    choices = [{"value": name, "label": name} for name in plans]
    if state.plan and state.plan not in plans:
        choices.append({"value": state.plan, "label": state.plan})
    controls = html.Div(
        [
            control("Cell shows", _segments("plane", state.plane, {"mass": "mass", "max": "max"})),
            control("Scale", _segments("map-scale", state.scale, {"log": "log", "linear": "linear", "row": "per row"})),
            dmc.Switch(id="hide-sink", checked=state.hide_sink, label="Hide first keys", size="xs"),
            html.Div(
                control(
                    "Plan",
                    dmc.Select(id="plan", value=state.plan or None, data=choices, clearable=True, size="xs", w=170, placeholder="none"),
                ),
                style={} if choices else {"display": "none"},
            ),
        ],
        className="toolbar toolbar-tight",
    )
    return panel(
        "Attention map",
        controls,
        html.Div(id="map-badge", className="tags map-badge", role="status"),
        html.Div(id="plan-note", className="plan-note"),
        html.Div(viewer_host(), className="map-frame"),
        html.P([html.Span(ABOUT["mass"] + " " + ABOUT["max"] + " "), HINT], className="hint"),
        dcc.Store(id="viewer-facts", data=facts),
        aside=_buttons(facts),
        className="area-map",
    )


def plan_note(run: Run, layer: int, head: int, name: str) -> Component | None:
    """What a plan's pattern for the head is, how much it keeps and what mass goes; why not, where that cannot be said."""
    if not name:
        return None
    try:
        plan = context.index().plans.open(name)
        if (layer, head) not in plan.patterns:
            return html.P(f"Plan {name} is for another model: it has no head {layer}.{head}.", className="warning-line")
        shape, exact = tiles.geometry(run, layer), api.exact_head(run, layer, head)
        pattern = overlay.static_pattern(plan, layer, head, exact, shape)
        coarse = next(block for block in shape.stored if shape.cells(block) <= shape.tile)
        with api.served().exact.working:
            lost = overlay.loss(pattern, shape, exact, coarse, tiles.cells(run, shape, None, layer, head, "mass", coarse, 0, 0))
    except HeadscopeError as error:
        return html.P(str(error), className="warning-line", role="alert")
    kept = plan[layer, head].density(shape.tokens)
    how = f"{lost.queries} queries, exact" if lost.exact else f"block map, cells of {coarse} tokens"
    return html.Div(
        [
            tag(f"{plan.method}: {plan[layer, head]}"),
            tag(f"keeps {kept:.1%} of the entries"),
            tag(f"loses {number(100 * lost.mean)} % of the mass ({how})", className="tag-strong"),
            tag(f"worst query {lost.at:,}: {number(100 * lost.worst)} %"),
        ],
        className="tags",
    )


def _segments(name: str, value: str, options: dict[str, str]) -> Component:
    return dmc.SegmentedControl(id=name, value=value, data=[{"value": key, "label": text} for key, text in options.items()], size="xs")


def _buttons(facts: dict[str, Any]) -> Component:
    def button(does: str, label: object, title: str) -> Component:
        return html.Button(label, type="button", className="small-button", title=title, **{"data-viewer": does, "aria-label": title})

    zoom = [button("in", "+", "Zoom in"), button("out", "\u2212", "Zoom out"), button("all", "All", "Show the whole map (0)")]
    if facts["exact"]:
        zoom.append(button("exact", "Exact", "Zoom to exact cells, recomputed from q and k (E)"))
    files = [button(kind, kind.upper(), f"Save what is in sight as {kind.upper()}") for kind in ("svg", "png", "json")]
    return html.Div(
        [html.Div(zoom, className="button-row"), html.Div([icon("save"), *files], className="button-row")], className="button-rows"
    )


def _silent(state: HeadState) -> list[Component]:
    """The controls' values without a map, so that the rest of the view keeps its address."""
    return [
        html.Div(
            [
                _segments("plane", state.plane, {"mass": "mass", "max": "max"}),
                _segments("map-scale", state.scale, {"log": "log", "linear": "linear", "row": "per row"}),
                dmc.Switch(id="hide-sink", checked=state.hide_sink),
                dmc.Select(id="plan", value=state.plan or None, data=[]),
                html.Div(id="plan-note"),
                dcc.Store(id="viewer-facts", data={}),
            ],
            style={"display": "none"},
        )
    ]
