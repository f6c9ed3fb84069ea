"""A profile as static HTML: no script, nothing from a network, so that it survives nbconvert and e-mail."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headscope.profile.head_profile import HeadProfile

COLOURS = {
    "induction": "#d1495b",
    "duplicate_token": "#8d6b94",
    "previous_token": "#2e86ab",
    "uniform": "#66a182",
    "receiver": "#00798c",
    "sink": "#30475e",
    "retrieval_like": "#edae49",
    "local": "#9bb1c8",
    "streaming": "#c3cbd6",
    "global": "#6c757d",
}
"""A colour per role, the more specific role first and quotas late: a head is drawn in the first one that it has."""

NONE = "#eef0f3"


def colour_of(roles: list[str]) -> tuple[str, str]:
    """(role, colour) that a head is drawn in."""
    for role, colour in COLOURS.items():
        if role in roles:
            return role, colour
    return "no role", NONE


def profile_html(profile: HeadProfile) -> str:
    """Card, a map of the heads by role, and the strongest heads of each role."""
    lines = "<br>".join(html.escape(line) for line in profile.card.lines())
    rows = []
    for role in profile.roles:
        best = profile.top(role, 5)
        names = ", ".join(f"{layer}.{head}" for layer, head in best) or "none"
        why = profile.why(*best[0], role) if best else ""
        dot = f"<span style='display:inline-block;width:10px;height:10px;border-radius:2px;background:{COLOURS.get(role, NONE)}'></span>"
        cells = (f"{dot} {html.escape(role)}", str(profile.count(role)), html.escape(names), html.escape(why))
        rows.append("<tr>" + "".join(f"<td style='text-align:left;padding:2px 10px'>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th style='text-align:left;padding:2px 10px'>{name}</th>" for name in ("role", "heads", "strongest", "why the first"))
    table = f"<table style='border-collapse:collapse;font-size:13px'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        "<div style='font-family:system-ui,sans-serif;font-size:13px'>"
        f"<p style='margin:0 0 6px'><b>{html.escape(repr(profile))}</b></p>"
        f"<p style='margin:0 0 8px;font-family:ui-monospace,monospace;font-size:12px'>{lines}</p>{role_map(profile)}{table}</div>"
    )


def role_map(profile: HeadProfile, cell: int = 14) -> str:
    """Inline SVG: layers to the right, heads downwards, each in the colour of its most specific role; the title of a cell names all."""
    index = {layer: place for place, layer in enumerate(profile.layers)}
    heads = int(profile.table["head"].max()) + 1
    squares = []
    for layer, head, roles in zip(profile.table["layer"], profile.table["head"], profile.table["roles"], strict=True):
        _, colour = colour_of(roles)
        title = html.escape(f"{layer}.{head}: {', '.join(roles) or 'no role'}")
        x, y = index[layer] * cell, head * cell
        squares.append(f"<rect x='{x}' y='{y}' width='{cell - 2}' height='{cell - 2}' rx='2' fill='{colour}'><title>{title}</title></rect>")
    width, height = len(index) * cell, heads * cell
    words = f"layer 0 to {max(index)}, left to right; heads 0 to {heads - 1}, downwards"
    note = f"<text x='0' y='{height + 12}' font-size='11' fill='#5b6472'>{words}</text>"
    box = f"<svg width='{max(width, 320)}' height='{height + 18}' xmlns='http://www.w3.org/2000/svg'>"
    return f"{box}{''.join(squares)}{note}</svg>"
