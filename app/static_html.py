"""A page's components as plain HTML, for the first paint: what a visitor sees and can use before the application's scripts are there.

It is the page's own layout, with the same words and numbers, so it cannot say anything else than the application that takes its place. Ids
are written as `data-id`: both are in the document for a moment, and an id that is there twice finds the wrong one. Everything is escaped;
what has no form without its script (a graph, a table) becomes an empty box of its size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from html import escape
from typing import Any

from dash.development.base_component import Component

from headscope.app import stand_ins
from headscope.app.stand_ins import tag

_SKIPPED = {"children", "id", "style", "className", "n_clicks", "disable_n_clicks", "key", "loading_state", "persistence"}
_NAMES = {
    "htmlFor": "for",
    "tabIndex": "tabindex",
    "colSpan": "colspan",
    "rowSpan": "rowspan",
    "className": "class",
    "spellCheck": "spellcheck",
}
_NUMBERS = {"opacity", "zIndex", "lineHeight", "flex", "flexGrow", "flexShrink", "fontWeight", "order"}
"""Style numbers that are no pixels."""


def static_html(node: Any) -> str:
    """A component, a list of them, or text, as HTML."""
    if node is None or isinstance(node, bool):
        return ""
    if isinstance(node, list | tuple):
        return "".join(static_html(one) for one in node)
    if not isinstance(node, Component):
        return escape(str(node))
    found = node.to_plotly_json()
    props, space = found["props"], found["namespace"]
    if space == "dash_html_components":
        return tag(found["type"].lower(), attributes(props), static_html(props.get("children")))
    draw = _DRAWN.get((space, found["type"]))
    return "" if draw is None else draw(props)


def attributes(props: Mapping[str, Any]) -> dict[str, str | bool]:
    """A component's properties as attributes: class, style, data-id, and every plain value."""
    out: dict[str, str | bool] = {}
    if props.get("className"):
        out["class"] = str(props["className"])
    if isinstance(props.get("id"), str):
        out["data-id"] = props["id"]
    if props.get("style"):
        out["style"] = style_text(props["style"])
    for name, value in props.items():
        if name not in _SKIPPED and isinstance(value, str | int | float):
            out[_NAMES.get(name, name.lower())] = value if isinstance(value, bool) else str(value)
    return out


def style_text(style: Mapping[str, Any]) -> str:
    """A style as CSS text."""
    parts = []
    for name, value in style.items():
        text = f"{value}px" if isinstance(value, int | float) and value and name not in _NUMBERS else str(value)
        parts.append(f"{name if name.startswith('--') else re.sub('[A-Z]', lambda found: '-' + found[0].lower(), name)}:{text}")
    return ";".join(parts)


def values_of(node: Any, names: Collection[str]) -> dict[str, Any]:
    """What the stores and controls of a page hold, of those named: id -> value, whether it is ticked, or data."""
    out: dict[str, Any] = {}
    stack = [node]
    while stack:
        one = stack.pop()
        if isinstance(one, list | tuple):
            stack.extend(one)
        elif isinstance(one, Component):
            name = getattr(one, "id", None)
            if isinstance(name, str) and name in names:
                out[name] = next((getattr(one, prop) for prop in ("value", "checked", "data") if hasattr(one, prop)), None)
            stack.append(getattr(one, "children", None))
    return out


def _link(props: Mapping[str, Any]) -> str:
    return tag("a", attributes(props), static_html(props.get("children")))


def _box(props: Mapping[str, Any]) -> str:
    """The place of a graph: as high as the graph will be."""
    style = dict(props.get("style") or {})
    figure = props.get("figure")
    height = figure.get("layout", {}).get("height") if isinstance(figure, dict) else None
    if "height" not in style and height:
        style["height"] = height
    return tag("div", {"class": str(props.get("className", "")), "style": style_text(style)}, "")


def _inside(props: Mapping[str, Any]) -> str:
    return static_html(props.get("children"))


def _drawn(draw: Callable[[Mapping[str, Any], Callable[[Any], str]], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda props: draw(props, static_html)


_DRAWN: dict[tuple[str, str], Callable[[Mapping[str, Any]], str]] = {
    ("dash_core_components", "Link"): _link,
    ("dash_core_components", "Graph"): _box,
    ("dash_ag_grid", "AgGrid"): _box,
    ("dash_mantine_components", "MantineProvider"): _inside,
    **{("dash_mantine_components", name): _drawn(draw) for name, draw in stand_ins.DRAWN.items()},
}
