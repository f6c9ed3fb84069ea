"""Colours, fonts and figure defaults, in one place for both schemes.

Figures are drawn by the server in the scheme that the page says it shows (a cookie written before the first request, `scheme_of`), so
nothing flashes and an exported figure looks like the one on the screen. The sequential scale starts near the panel's own colour and
only gets darker (light scheme) or lighter (dark scheme), so it reads the same in grey and for colour-blind eyes; a test holds it to
that. Roles are told apart by symbol as well as by colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flask

Scheme = Literal["light", "dark"]
COOKIE = "headscope-scheme"
SANS = "Inter, ui-sans-serif, system-ui, 'Segoe UI', sans-serif"
MONO = "'JetBrains Mono', ui-monospace, 'SF Mono', Menlo, Consolas, monospace"

# From almost the panel's colour to its opposite through blue-green: lightness changes monotonically, hue only helps.
_LIGHT_SCALE = ("#f0f6f4", "#d3efe3", "#9bdcc3", "#5cc3ae", "#3aa3a6", "#35829f", "#386196", "#3b4179", "#2f274f", "#1a1428")
_DARK_SCALE = ("#1f2532", "#2e2a55", "#363b74", "#355b92", "#327d9e", "#36a0a6", "#58c1ae", "#97dcc2", "#cdeee0", "#f4fbf9")
_LIGHT_SIGNED = ("#0b4f8a", "#4d93c6", "#b5d5ea", "#f7f7f5", "#f6c79a", "#dd7f33", "#8f3f06")
_DARK_SIGNED = ("#8ec6f5", "#4186bf", "#1f4263", "#191d26", "#61401d", "#c0752b", "#ffc188")


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of one scheme."""

    panel: str
    text: str
    muted: str
    line: str
    accent: str
    marker_edge: str
    sequential: tuple[str, ...]
    signed: tuple[str, ...]


PALETTES: dict[Scheme, Palette] = {
    "light": Palette("#ffffff", "#1b2330", "#5d6878", "#e6e9ee", "#0f6f8f", "#ffffff", _LIGHT_SCALE, _LIGHT_SIGNED),
    "dark": Palette("#171c26", "#e8ecf2", "#9aa5b5", "#2a313d", "#5cc3d8", "#10141b", _DARK_SCALE, _DARK_SIGNED),
}

# Okabe and Ito's palette, without its yellow, black and dark blue, which vanish on one of the two grounds.
ROLE_COLOURS = ("#E69F00", "#D55E00", "#56B4E9", "#CC79A7", "#009E73", "#5B7FFF", "#B59B00", "#8C6BB1", "#7F7F7F", "#A65628")
# 13 symbols and 10 colours: no two of the first 130 roles share both.
ROLE_SYMBOLS = (
    *("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down", "hexagon", "x", "pentagon"),
    *("triangle-right", "triangle-left", "star-diamond"),
)


def scheme_of(given: str | None = None) -> Scheme:
    """The colour scheme to draw in: the one given, else the request's cookie, else light."""
    if not given and flask.has_request_context():
        given = flask.request.cookies.get(COOKIE)
    return "dark" if given == "dark" else "light"


def colourscale(scheme: Scheme, *, signed: bool = False) -> list[list[Any]]:
    """A plotly colour scale: sequential, or diverging around its middle for values of both signs."""
    palette = PALETTES[scheme]
    colours = palette.signed if signed else palette.sequential
    return [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]


def role_colour(index: int) -> str:
    """Colour of the index-th role."""
    return ROLE_COLOURS[index % len(ROLE_COLOURS)]


def role_size(index: int) -> float:
    """Relative size of the index-th role's symbol, so that all of them look equally large."""
    return {"circle": 1.0, "square": 0.95, "star": 1.2, "x": 1.0}.get(role_symbol(index), 1.15)


def role_symbol(index: int) -> str:
    """Plotly marker symbol of the index-th role."""
    return ROLE_SYMBOLS[index % len(ROLE_SYMBOLS)]


def layout(scheme: Scheme, **more: Any) -> dict[str, Any]:
    """Figure layout shared by every figure: transparent ground, the page's font, quiet axes; `more` is added on top."""
    palette = PALETTES[scheme]
    base: dict[str, Any] = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": SANS, "size": 12, "color": palette.muted},
        "hoverlabel": {
            "bgcolor": palette.panel,
            "bordercolor": palette.line,
            "font": {"family": SANS, "size": 12, "color": palette.text},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": palette.muted, "activecolor": palette.accent},
        "margin": {"l": 48, "r": 12, "t": 8, "b": 40},
        "showlegend": False,
        "dragmode": "zoom",
    }
    base.update(more)
    return base


def axis(scheme: Scheme, **more: Any) -> dict[str, Any]:
    """A quiet axis; `more` is added on top."""
    palette = PALETTES[scheme]
    base: dict[str, Any] = {
        "showgrid": False,
        "zeroline": False,
        "linecolor": palette.line,
        "tickcolor": palette.line,
        "tickfont": {"size": 11, "color": palette.muted},
        "title": {"font": {"size": 12, "color": palette.muted}, "standoff": 8},
    }
    title = more.pop("title", None)
    base.update(more)
    if title is not None:
        base["title"] = {**base["title"], "text": title}
    return base


def colourbar(scheme: Scheme, **more: Any) -> dict[str, Any]:
    """A thin colour bar; `more` is added on top."""
    palette = PALETTES[scheme]
    base: dict[str, Any] = {
        "thickness": 10,
        "outlinewidth": 0,
        "len": 1,
        "y": 0.5,
        "xpad": 6,
        "tickfont": {"size": 11, "color": palette.muted},
        "ticks": "outside",
        "ticklen": 3,
        "tickcolor": palette.line,
    }
    base.update(more)
    return base


def graph_config(name: str) -> dict[str, Any]:
    """Configuration of every graph: scroll left to the page, a camera that saves `name`.svg for a paper, and no button that sends the
    figure to a service (plotly shows one by default).
    """
    return {
        "displaylogo": False,
        "showTips": False,
        "showSendToCloud": False,
        "plotlyServerURL": "",
        "displayModeBar": "hover",
        "scrollZoom": False,
        "doubleClick": "reset",
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
        "toImageButtonOptions": {"format": "svg", "filename": name},
        "responsive": True,
    }
