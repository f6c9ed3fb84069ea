"""The text itself, each token shaded by a statistic of the head.

The server sends the pieces, one shade (0 .. 9) and one number a token; the browser draws them as text nodes (never as HTML: a text may
hold anything). A single sink token would leave the rest blank, so the shades end at the 98th percentile, and the legend says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import html
from dash.development.base_component import Component

from headscope.app.components.token_series import label, meaning, values_of
from headscope.app.format import number
from headscope.app.runs import Run

SHADES = 10
PAGE = 4096


def shades(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(shade per token, low, high): shade 0 at low and below, 9 at high and above, -1 for NaN; high is the 98th percentile."""
    known = values[np.isfinite(values)]
    out = np.full(values.shape, -1, dtype=np.int16)
    if not known.size:
        return out, float("nan"), float("nan")
    low = 0.0 if known.min() >= 0 and known.min() < 0.25 * known.max() else float(np.percentile(known, 2))
    high = float(np.percentile(known, 98))
    if high <= low:
        high = float(known.max())
    span = high - low
    scaled = (values[np.isfinite(values)] - low) / span if span > 0 else np.zeros(known.size)
    out[np.isfinite(values)] = np.clip(np.floor(scaled * SHADES), 0, SHADES - 1).astype(np.int16)
    return out, low, high


def strip_data(run: Run, layer: int, head: int, name: str, page: int = 0) -> dict[str, Any]:
    """What the browser draws: pieces, shades and numbers of one page of the text, and the legend."""
    tokens = run.tokens
    if not tokens:
        return {"start": 0, "tokens": [], "shades": [], "numbers": [], "label": "", "pages": 1}
    values = values_of(run, name, layer, head) if name else np.full(len(tokens), np.nan, dtype=np.float32)
    shade, low, high = shades(values)
    pages = max(-(-len(tokens) // PAGE), 1)
    start = min(max(page, 0), pages - 1) * PAGE
    stop = min(start + PAGE, len(tokens))
    return {
        "start": start,
        "tokens": tokens[start:stop],
        "shades": shade[start:stop].tolist(),
        "numbers": [number(float(value)) for value in values[start:stop]],
        "label": label(name),
        "low": number(low),
        "high": number(high),
        "clipped": bool(np.isfinite(values).any() and np.nanmax(values) > high),
        "pages": pages,
    }


def strip_legend(data: dict[str, Any], name: str) -> Component:
    """The shades and what they stand for; a run without a text says so."""
    if not data["tokens"]:
        return html.P("This run keeps no text: profile again with keep_statistics=True.", className="muted")
    end = f"{data['high']} and above" if data["clipped"] else data["high"]
    return html.Div(
        [
            html.Span(data["low"]),
            html.Span([html.I(className=f"shade s{shade}") for shade in range(SHADES)], className="shades"),
            html.Span(end),
            html.Span(meaning(name), className="muted"),
        ],
        className="strip-legend",
    )
