"""Patterns as people read them, and whether two of them keep the same keys."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from headscope.plans.dynamic import TopBlocks, VerticalSlash
from headscope.plans.patterns import Blocks, Dense, Lines, Pattern, Span, Streaming

EVERYTHING = 1 << 24
"""Verticals that are every column of any text: how engines without dense heads are told one."""


def word(pattern: Pattern) -> str:
    """A pattern in a few words: "sink 4 + window 256", "dense", "vertical_slash vertical 1000, slash 6096"."""
    if isinstance(pattern, Dense):
        return "dense"
    if isinstance(pattern, Streaming):
        return f"sink {pattern.sink} + window {pattern.window}{' + compensation' if pattern.compensate else ''}"
    if isinstance(pattern, Span):
        return f"sink {pattern.sink} + window {pattern.alpha:g} + {pattern.beta:g} N, {pattern.floor} at least"
    if isinstance(pattern, Lines):
        return f"{len(pattern.columns)} columns + {len(pattern.diagonals)} diagonals"
    if isinstance(pattern, Blocks):
        return f"{sum(map(len, pattern.kept_blocks))} tiles of {pattern.block} listed for {len(pattern.kept_blocks)} rows of tiles"
    said = ", ".join(
        f"{item.name} {value(getattr(pattern, item.name))}" for item in fields(pattern) if item.default != getattr(pattern, item.name)
    )
    return f"{pattern.kind} {said}".strip()


def value(given: Any) -> str:
    """A parameter in a word."""
    return f"{given:g}" if isinstance(given, float) else str(given)


def canonical(pattern: Pattern) -> Pattern:
    """The plainest pattern with the same effect: sizes that a rule raises anyway are raised, and what keeps everything is dense."""
    if isinstance(pattern, Span):
        if pattern.beta == 0:
            return Streaming(pattern.sink, max(pattern.floor, int(pattern.alpha)), pattern.compensate)
        whole = pattern.beta == 1 and pattern.alpha + pattern.sink >= 0
        return Dense() if whole else pattern
    if isinstance(pattern, VerticalSlash):
        return replace(pattern, vertical=max(pattern.vertical, pattern.sink), slash=max(pattern.slash, pattern.window))
    if isinstance(pattern, TopBlocks):
        if pattern.share == 1 or (pattern.mass == 1 and pattern.rule != "anchor"):
            return Dense()
        return replace(pattern, expected=None, stride=pattern.stride if pattern.rule == "antidiagonal" else 16)
    return pattern


def same(first: Pattern, second: Pattern) -> bool:
    """True when two patterns keep the same keys, numbers compared to 1e-9."""
    a, b = canonical(first), canonical(second)
    if a == b:
        return True
    if type(a) is not type(b) or isinstance(a, Lines | Blocks):
        return False
    for item in fields(a):
        one, two = getattr(a, item.name), getattr(b, item.name)
        if one != two and not (
            isinstance(one, float | int) and isinstance(two, float | int) and abs(one - two) <= 1e-9 * max(1.0, abs(one))
        ):
            return False
    return True
