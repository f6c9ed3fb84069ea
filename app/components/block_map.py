"""A head's attention map from the run's pyramid: the finest level that fits the screen, never interpolated, always labelled.

A cell is a block of queries by a block of keys. `block_mass` is shown per query row of the block (each full row of the map then adds
up to one), `block_max` as it is. Which of the two, the block size and the number of cells stand in the badge; a map of blocks must
never be taken for the exact matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from headscope.app import theme
from headscope.app.figures import typed
from headscope.app.format import MINUS, TIMES, visible_token
from headscope.app.runs import Level, Run
from headscope.errors import RunError, refusal

PLANES = {"mass": "block_mass", "max": "block_max"}
SCALES = ("log", "linear")
BUDGET = 512  # cells a side: a heat map of 512 x 512 with hover is 1.4 MB and draws in 0.25 s
DECADES = 5

Window = tuple[int, int, int, int]
"""First and last-plus-one query, first and last-plus-one key, in tokens."""


@dataclass(frozen=True, slots=True)
class MapView:
    """What part of a map is drawn: the cells of `window`, on axes that show `shown`."""

    level: Level
    tokens: int
    window: Window
    shown: Window
    values: np.ndarray  # [query blocks, key blocks], NaN where no query sees a key and where the sink is hidden


def pick_level(levels: list[Level], window: Window, budget: int = BUDGET) -> Level:
    """The finest level whose cells inside the window are at most `budget` a side; the coarsest where none is."""
    q0, q1, k0, k1 = window
    for level in levels:
        if max(_cells(q0, q1, level.block), _cells(k0, k1, level.block)) <= budget:
            return level
    return levels[-1]


def map_view(run: Run, layer: int, head: int, plane: str, hide_sink: bool, window: Window | None = None) -> MapView:
    """The cells of a window (None: all) at the level that fits; all cells where even the finest level fits whole, so that panning needs no
    new ones.
    """
    info = run.maps
    if info is None:
        raise refusal(RunError, f"the maps of {run.id}", "this run was made without them", "profile again with maps=True")
    tokens = info.tokens
    whole = (0, tokens, 0, tokens)
    shown = window or whole
    fits = pick_level(run.levels, whole).index == 0
    level = pick_level(run.levels, shown)
    q0, q1, k0, k1 = whole if fits else shown
    rows = slice(q0 // level.block, min(-(-q1 // level.block), level.cells))
    columns = slice(k0 // level.block, min(-(-k1 // level.block), level.cells))
    values = run.map(PLANES[plane], level.index, layer, head)[rows, columns].astype(np.float32)
    first_query = np.arange(rows.start, rows.stop) * level.block
    first_key = np.arange(columns.start, columns.stop) * level.block
    if plane == "mass":
        values /= np.minimum(level.block, tokens - first_query)[:, None].astype(np.float32)
    if info.causal:
        last_query = np.minimum(first_query + level.block, tokens) - 1
        values[first_key[None, :] > last_query[:, None]] = np.nan
    if hide_sink:
        values[:, first_key == 0] = np.nan
    region = (
        rows.start * level.block,
        min(rows.stop * level.block, tokens),
        columns.start * level.block,
        min(columns.stop * level.block, tokens),
    )
    return MapView(level, tokens, region, shown, values)


def map_figure(run: Run, view: MapView, plane: str, scale: str, scheme: theme.Scheme, token: int | None = None) -> dict[str, Any]:
    """The figure: trace 0 is the heat map with z [query blocks, key blocks] (log scale: log10), positions in tokens."""
    block, (q0, q1, k0, k1) = view.level.block, view.window
    known = view.values[np.isfinite(view.values)]
    high = float(known.max()) if known.size and known.max() > 0 else 1.0
    z = view.values
    bounds = {"zmin": 0.0, "zmax": high}
    bar: dict[str, Any] = {"tickformat": "~g"}
    if scale == "log":
        top = float(np.log10(high))
        z = np.log10(np.maximum(view.values, np.float32(high * 10.0**-DECADES)))
        bounds = {"zmin": top - DECADES, "zmax": top}
        bar = _decades(top)
    meta = {
        "block": block,
        "q0": q0,
        "k0": k0,
        "tokens": view.tokens,
        "log": scale == "log",
        "plane": plane,
        "rows": _snippets(run, q0, q1, block),
        "columns": _snippets(run, k0, k1, block),
    }
    heat = {
        "type": "heatmap",
        "z": typed(z.astype(np.float32)),
        "x0": k0 + block / 2,
        "dx": block,
        "y0": q0 + block / 2,
        "dy": block,
        "zsmooth": False,
        "colorscale": theme.colourscale(scheme),
        "hoverinfo": "none",
        "hoverongaps": False,
        "colorbar": theme.colourbar(scheme, **bar),
        **bounds,
    }
    spike = {
        "showspikes": True,
        "spikemode": "across",
        "spikethickness": 1,
        "spikedash": "solid",
        "spikecolor": theme.PALETTES[scheme].muted,
    }
    figure_layout = theme.layout(
        scheme,
        margin={"l": 56, "r": 8, "t": 26, "b": 44},
        xaxis=theme.axis(
            scheme, title="key position", range=list(view.shown[2:]), constrain="domain", minallowed=0, maxallowed=view.tokens, **spike
        ),
        yaxis=theme.axis(
            scheme,
            title="query position",
            range=[view.shown[1], view.shown[0]],
            scaleanchor="x",
            constrain="domain",
            constraintoward="top",
            minallowed=0,
            maxallowed=view.tokens,
            **spike,
        ),
        meta=meta,
        hoverdistance=1,
        shapes=token_lines(token, theme.PALETTES[scheme].accent),
    )
    return {"data": [heat], "layout": figure_layout}


def token_lines(token: int | None, colour: str) -> list[dict[str, Any]]:
    """The chosen token as a query (across) and as a key (down)."""
    if token is None:
        return []
    line = {"color": colour, "width": 1, "dash": "dot"}
    across = {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": token + 0.5, "y1": token + 0.5, "line": line}
    down = {"type": "line", "yref": "y domain", "y0": 0, "y1": 1, "x0": token + 0.5, "x1": token + 0.5, "line": line}
    return [across, down]


def badge(view: MapView, plane: str, levels: int, hide_sink: bool) -> list[str]:
    """What is on the screen, in words: kind of cell, block size, level, cells, and what is hidden."""
    block = view.level.block
    rows, columns = view.values.shape
    words = [
        f"block {plane}",
        f"{block} {TIMES} {block} tokens a cell",
        f"level {view.level.index + 1} of {levels}",
        f"{rows} {TIMES} {columns} cells",
    ]
    return [*words, f"keys 0 to {block - 1} hidden"] if hide_sink else words


def window_of(relayout: dict[str, Any] | None, tokens: int) -> Window | None:
    """The token window of a zoom; None when the axes were reset. Raises KeyError when the event says nothing about the axes."""
    data = relayout or {}
    if any(key.endswith("autorange") for key in data):
        return None
    ranges = []
    for axis in ("yaxis", "xaxis"):
        if f"{axis}.range[0]" in data:
            ends = (float(data[f"{axis}.range[0]"]), float(data[f"{axis}.range[1]"]))
        else:
            first, last = data[f"{axis}.range"]
            ends = (float(first), float(last))
        low, high = max(int(min(ends)), 0), min(int(-(-max(ends) // 1)), tokens)
        ranges += [low, max(high, low + 1)]
    return ranges[0], ranges[1], ranges[2], ranges[3]


def _cells(first: int, last: int, block: int) -> int:
    return -(-last // block) - first // block


def _snippets(run: Run, first: int, last: int, block: int) -> list[str]:
    tokens = run.tokens
    return [visible_token("".join(tokens[start : min(start + block, start + 12)])) for start in range(first, last, block)]


def _decades(top: float) -> dict[str, Any]:
    powers = range(int(np.ceil(top - DECADES)), int(np.floor(top)) + 1)
    return {"tickvals": list(powers), "ticktext": ["1" if power == 0 else f"10<sup>{power}</sup>".replace("-", MINUS) for power in powers]}
