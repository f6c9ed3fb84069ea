"""Numbers as people read them: four significant digits, thousands separated, no trailing noise."""

from __future__ import annotations

import math

TIMES, MINUS = "\u00d7", "\u2212"


def number(value: float, digits: int = 3) -> str:
    """A value in `digits` significant digits; 'n/a' for NaN.

    >>> number(0.88413), number(12345.6), number(0.00001234), number(float("nan"))
    ('0.884', '12,346', '1.23e-05', 'n/a')
    """
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 10**digits:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.{digits - 1}e}"
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{value:.{decimals}f}"


def count(value: int, noun: str, plural: str | None = None) -> str:
    """`1 head`, `270 heads`, `2,048 tokens`."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


_ABBREVIATIONS = {"waad": "WAAD", "fai": "FAI", "kv": "KV"}


def words(name: str) -> str:
    """A name of the code as words: `fai_band` as `FAI band`, `previous_token` as `Previous token`."""
    parts = [_ABBREVIATIONS.get(part, part) for part in name.split("_")]
    return " ".join([parts[0][:1].upper() + parts[0][1:], *parts[1:]])


def visible_token(token: str) -> str:
    """A token piece with its white space made visible, for hover text and labels."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shown if len(shown) <= 24 else shown[:23] + "…"
