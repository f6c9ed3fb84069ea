"""The figure of `headscope bench quality` as an SVG file: small panels on white, every line with its name beside it.

Written out rather than drawn by a browser, so that the same rows give the same file on every machine. Labels stand where they cover least:
each method's candidates are the places around its own points, and the one that meets fewest other labels, points and lines is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

from headscope.bench.quality_figure import FAMILIES, X, colour, dense_row, names_of, points_of

WIDE, HIGH, LEFT, TOP, GAP_X, GAP_Y = 430.0, 300.0, 66.0, 64.0, 84.0, 92.0
"""Pixels: of a panel, and around it."""
TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
RIGHT = 0.78
"""Largest share on the x axis."""
RATIOS = (1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
MOST = 1.8
"""Largest perplexity, dense = 1, that is drawn in its place; larger ones stand at the upper edge, with an arrow."""
FONT = "font-family='Helvetica, Arial, sans-serif'"
HALO = "stroke='#ffffff' stroke-width='3' stroke-linejoin='round' paint-order='stroke'"
SHAPES = ("circle", "square", "diamond", "up", "down", "left", "right")
OURS = "allocate"


@dataclass(eq=False)
class Panel:
    """One phase of one model. `lines`: method -> (x, y, low, high) of its points, in the figure's pixels."""

    title: str
    left: float
    top: float
    needle: bool
    floor: float
    xlabel: str
    ceiling: float = 1.0
    lines: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    over: set[tuple[float, float]] = field(default_factory=set)

    def x(self, share: float) -> float:
        """Pixel of a share."""
        return self.left + WIDE * share / RIGHT

    def y(self, value: float) -> float:
        """Pixel of a value, inside the panel."""
        if self.needle:
            part = (value - self.floor) / (1.03 - self.floor)
        else:
            part = math.log(max(value, 1e-9) / self.floor) / math.log(self.ceiling / self.floor)
        return self.top + HIGH * (1 - min(1.0, max(0.0, part)))

    def add(self, method: str, points: Sequence[tuple[float, float, float, float]]) -> None:
        """A method's points."""
        self.lines[method] = [(self.x(x), self.y(y), self.y(low), self.y(high)) for x, y, low, high in points]
        if not self.needle:
            self.over |= {(self.x(x), self.y(y)) for x, y, *_ in points if y > self.ceiling}


def svg(result: Mapping[str, Any], methods: Sequence[str] | None = None) -> str:
    """The figure as text. Rows without a point (a reason instead) are left out."""
    panels = panels_of(result, methods)
    columns = max(1, len({panel.left for panel in panels}))
    lines = len({panel.top for panel in panels})
    width = LEFT + columns * WIDE + (columns - 1) * GAP_X + 30
    height = TOP + lines * HIGH + (lines - 1) * GAP_Y + 62
    out = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}' {FONT}>",
        f"<rect width='{width:.0f}' height='{height:.0f}' fill='#ffffff'/>",
        *_legend(names_of(result["results"])),
    ]
    for panel in panels:
        out += _panel(panel)
    return "\n".join([*out, "</svg>"]) + "\n"


def panels_of(result: Mapping[str, Any], methods: Sequence[str] | None = None) -> list[Panel]:
    """The panels with their points, a row of them per model."""
    results = result["results"]
    phases = [phase for phase in X if any(row["phase"] == phase for one in results for row in one["rows"])]
    panels = []
    for line, one in enumerate(results):
        for column, phase in enumerate(phases):
            rows = [row for row in one["rows"] if row["phase"] == phase]
            base = dense_row(rows, phase)
            needle = any("accuracy" in row for row in rows)
            found = {name: points_of(rows, base, name, phase) for name in names_of(results) if methods is None or name in methods}
            found = {name: points for name, points in found.items() if points}
            values = [y for points in found.values() for _, y, *_ in points]
            floor = 0.0 if needle else min(0.985, *(max(0.9, value) * 0.995 for value in values or [1.0]))
            ceiling = 1.0 if needle else min(MOST, max(1.05, *(values or [1.0])) * 1.03)
            left, top = LEFT + column * (WIDE + GAP_X), TOP + line * (HIGH + GAP_Y)
            panel = Panel(f"{one.get('title') or one['task']}: {phase}", left, top, needle, floor, X[phase][1], ceiling)
            for name in sorted(found, key=lambda name: name == OURS):  # ours on top
                panel.add(name, found[name])
            panels.append(panel)
    return panels


def _legend(names: Sequence[str]) -> list[str]:
    out, x = [], LEFT
    for family, (shade, members) in FAMILIES.items():
        if not any(name in members for name in names):
            continue
        out.append(
            f"<line x1='{x:.0f}' x2='{x + 22:.0f}' y1='20' y2='20' stroke='{shade}' stroke-width='{3.4 if OURS in members else 1.8}'/>"
        )
        out.append(f"<text x='{x + 28:.0f}' y='24' font-size='12.5' fill='#222'>{escape(family)}</text>")
        x += 44 + 6.9 * len(family)
    out.append(f"<line x1='{x:.0f}' x2='{x + 22:.0f}' y1='20' y2='20' stroke='#222' stroke-dasharray='5 4'/>")
    out.append(f"<text x='{x + 28:.0f}' y='24' font-size='12.5' fill='#222'>dense; bars: 1 standard error</text>")
    return out


def _panel(panel: Panel) -> list[str]:
    left, top, right, bottom = panel.left, panel.top, panel.left + WIDE, panel.top + HIGH
    out = [f"<text x='{left:.0f}' y='{top - 12:.0f}' font-size='14' font-weight='bold' fill='#111'>{escape(panel.title)}</text>"]
    for share in TICKS:
        x = panel.x(share)
        out.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top:.1f}' y2='{bottom:.1f}' stroke='#eeeeee'/>")
        out.append(f"<text x='{x:.1f}' y='{bottom + 17:.1f}' font-size='11.5' text-anchor='middle' fill='#333'>{share:.0%}</text>")
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] if panel.needle else [one for one in RATIOS if panel.floor <= one <= panel.ceiling]
    for value in ticks:
        y = panel.y(value)
        told = f"{value:.0%}" if panel.needle else f"{value:g}"
        out.append(f"<line x1='{left:.1f}' x2='{right:.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='#eeeeee'/>")
        out.append(f"<text x='{left - 7:.1f}' y='{y + 4:.1f}' font-size='11.5' text-anchor='end' fill='#333'>{told}</text>")
    out.append(f"<path d='M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}' fill='none' stroke='#333'/>")
    base = panel.y(1.0)
    out.append(f"<line x1='{left:.1f}' x2='{right:.1f}' y1='{base:.1f}' y2='{base:.1f}' stroke='#222' stroke-dasharray='5 4'/>")
    told = "whole answers right" if panel.needle else "perplexity, dense = 1"
    turned = f"translate({left - 46:.1f} {(top + bottom) / 2:.1f}) rotate(-90)"
    out.append(f"<text transform='{turned}' font-size='12' text-anchor='middle' fill='#222'>{told}</text>")
    below = f"x='{(left + right) / 2:.1f}' y='{bottom + 36:.1f}'"
    out.append(f"<text {below} font-size='12' text-anchor='middle' fill='#222'>{escape(panel.xlabel)}</text>")
    for name, points in panel.lines.items():
        out += _line(panel, name, points)
    for name, (x, y) in places_of(panel).items():
        style = f"font-size='11.5' font-weight='{'bold' if name == OURS else 'normal'}' fill='{colour(name)}' {HALO}"
        out.append(f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(name)}</text>")
    return out


def _line(panel: Panel, name: str, points: Sequence[tuple[float, float, float, float]]) -> list[str]:
    shade, width, radius = colour(name), 3.2 if name == OURS else 1.5, 4.4 if name == OURS else 3.0
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points)
    out = [f"<polyline points='{path}' fill='none' stroke='{shade}' stroke-width='{width}' stroke-linejoin='round'/>"]
    for x, y, low, high in points:
        if abs(low - high) > 1:
            out.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{low:.1f}' y2='{high:.1f}' stroke='{shade}' stroke-width='1'/>")
        if (x, y) in panel.over:
            out.append(f"<path d='M{x - 4:.1f} {y + 7:.1f}L{x:.1f} {y:.1f}L{x + 4:.1f} {y + 7:.1f}Z' fill='{shade}'/>")
        else:
            out.append(_mark(shape(name), x, y, radius, shade))
    return out


def shape(method: str) -> str:
    """Members of a family have one colour and different marks."""
    members = next((members for _, members in FAMILIES.values() if method in members), (method,))
    return SHAPES[members.index(method) % len(SHAPES)]


def _mark(kind: str, x: float, y: float, radius: float, shade: str) -> str:
    paint = f"class='point' fill='{shade}' stroke='#ffffff' stroke-width='0.8'"
    if kind == "circle":
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' {paint}/>"
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "up": ((0, -1.4), (1.25, 1), (-1.25, 1)),
        "down": ((0, 1.4), (1.25, -1), (-1.25, -1)),
        "left": ((-1.4, 0), (1, -1.25), (1, 1.25)),
        "right": ((1.4, 0), (-1, -1.25), (-1, 1.25)),
    }[kind]
    return f"<polygon points='{' '.join(f'{x + a * radius:.1f},{y + b * radius:.1f}' for a, b in corners)}' {paint}/>"


Box = tuple[float, float, float, float]
"""(left, top, right, bottom)."""


def places_of(panel: Panel) -> dict[str, tuple[float, float]]:
    """Where each method's name begins, on its baseline. The names move in turn until none can do better, a few rounds at most."""
    options = {name: _options(panel, name, points) for name, points in panel.lines.items()}
    fixed = {name: [_cost_of_lines(panel, name, box) for _, _, box in listed] for name, listed in options.items()}
    chosen = {name: costs.index(min(costs)) for name, costs in fixed.items()}
    for _ in range(6):
        for name, listed in options.items():
            others = [options[other][chosen[other]][2] for other in options if other != name]

            def cost(at: int, name: str = name, listed: list[tuple[float, float, Box]] = listed, others: list[Box] = others) -> float:
                return fixed[name][at] + 60 * sum(_shared(listed[at][2], box) for box in others)

            chosen[name] = min(range(len(listed)), key=cost)
    return {name: options[name][at][:2] for name, at in chosen.items()}


def _options(panel: Panel, name: str, points: Sequence[tuple[float, float, float, float]]) -> list[tuple[float, float, Box]]:
    wide, high = 6.3 * len(name) + 2, 12.0
    out = []
    for x, y, *_ in points:
        for dx, dy in ((7, 4), (-wide - 7, 4), (4, -7), (4, 15), (-wide - 4, -7), (-wide - 4, 15), (-wide / 2, -9), (-wide / 2, 18)):
            left, base = x + dx, y + dy
            if left > panel.left + 3 and left + wide < panel.left + WIDE + 26 and panel.top + 8 < base < panel.top + HIGH - 3:
                out.append((left, base, (left, base - high + 2, left + wide, base + 2)))
    x, y, *_ = points[0]
    return out or [(x, y, (x, y - high, x + wide, y))]


def _cost_of_lines(panel: Panel, name: str, box: Box) -> float:
    """How much a label there covers: points of others most, lines less, its own line least."""
    total = 0.0
    for other, points in panel.lines.items():
        weight = 0.5 if other == name else 1.0
        total += 4 * weight * sum(box[0] - 4 < x < box[2] + 4 and box[1] - 4 < y < box[3] + 4 for x, y, *_ in points)
        for (x0, y0, *_), (x1, y1, *_) in pairwise(points):
            steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 4))
            inside = sum(
                box[0] < x0 + (x1 - x0) * at / steps < box[2] and box[1] < y0 + (y1 - y0) * at / steps < box[3] for at in range(steps + 1)
            )
            total += 0.5 * weight * inside
    return total


def _shared(one: Box, other: Box) -> float:
    """Overlap of two boxes, in tenths of a label's height squared."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, down) / 120
