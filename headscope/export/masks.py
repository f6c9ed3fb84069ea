"""Static patterns as three tables, from which any of them can be looked up: key columns, distances, and pairs of tiles.

A key s is visible to row t when `columns[s]`, or `diagonals[t - s]`, or `tiles[t // side, s // side]`. Every static pattern of headscope is
the union of such tables at a length, exactly; so a mask function that has them needs to know nothing of patterns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headscope.errors import ExportError, refusal
from headscope.plans.patterns import BLOCK, Blocks, Dense, Lines, Pattern, Power, Span, Streaming, Strided

CELLS = 1 << 28
"""Entries of one table of tiles, at most."""


@dataclass(frozen=True)
class Tables:
    """`columns` [N] bool, `diagonals` [N] bool, `tiles` [n, n] bool (empty [0, 0] where a pattern has none), `side` of a tile."""

    columns: np.ndarray
    diagonals: np.ndarray
    tiles: np.ndarray
    side: int = BLOCK

    def visible(self, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """[R, K] bool, causal."""
        back = rows[:, None] - keys[None, :]
        seen = self.columns[keys][None, :] | self.diagonals[np.maximum(back, 0)]
        if self.tiles.size:
            seen = seen | self.tiles[rows[:, None] // self.side, keys[None, :] // self.side]
        return seen & (back >= 0)


def tables(pattern: Pattern, length: int) -> Tables | None:
    """The tables of a pattern at a length; None for one whose keys are chosen per input, or that compensates for dropped keys."""
    at = np.arange(length)
    none = np.zeros(length, dtype=bool)
    empty = np.zeros((0, 0), dtype=bool)
    if isinstance(pattern, Dense):
        return Tables(none, np.ones(length, dtype=bool), empty)
    if isinstance(pattern, Span):
        return tables(pattern.at(length), length)
    if isinstance(pattern, Streaming):
        return None if pattern.compensate else Tables(at < pattern.sink, at < pattern.window, empty)
    if isinstance(pattern, Strided):
        return Tables((at < pattern.sink) | ((at // pattern.block) % pattern.stride == pattern.offset), at < pattern.window, empty)
    if isinstance(pattern, Lines):
        columns, diagonals = none.copy(), none.copy()
        columns[[one for one in pattern.columns if one < length]] = True
        diagonals[[0, *(one for one in pattern.diagonals if one < length)]] = True
        return Tables(columns, diagonals, empty)
    if isinstance(pattern, Power | Blocks):
        count = -(-length // pattern.block)
        if count * count > CELLS:
            raise refusal(
                ExportError, f"tiles of {pattern.block} at {length:,} tokens", "their table would be too large", "pass a smaller length"
            )
        if isinstance(pattern, Power):
            gap = np.arange(count)[:, None] - np.arange(count)
            tiles = (gap > 0) & ((gap & (gap - 1)) == 0)
            return Tables(at < pattern.sink, at < pattern.window, tiles, pattern.block)
        tiles = np.zeros((count, count), dtype=bool)
        for row in range(count):
            tiles[row, list(pattern.row(row))] = True
        return Tables(none, at < 1, tiles, pattern.block)
    return None


def refine(one: Tables, side: int) -> np.ndarray:
    """[n, n] tiles of a smaller side that divides its own."""
    if not one.tiles.size:
        return one.tiles
    factor = one.side // side
    count = -(-len(one.columns) // side)
    return one.tiles.repeat(factor, 0).repeat(factor, 1)[:count, :count]


def common_side(found: list[Tables]) -> int:
    """The largest side that all tables of tiles can be cut into."""
    return math.gcd(*(one.side for one in found if one.tiles.size)) or BLOCK


def pattern_of(columns: np.ndarray, diagonals: np.ndarray, tiles: np.ndarray, side: int) -> Pattern:
    """The plainest pattern with the mask of these tables at their length."""
    length = len(columns)
    diagonals = diagonals.copy()
    diagonals[0] = True
    if not tiles.any():
        if diagonals.all():
            return Dense()
        window, sink = _prefix(diagonals), _prefix(columns)
        if diagonals.sum() == window and columns.sum() == sink:
            return Streaming(sink, window)
        return Lines(tuple(np.flatnonzero(columns).tolist()), tuple(np.flatnonzero(diagonals).tolist()))
    one = Tables(columns, diagonals, tiles, side)
    own = not columns.any() and diagonals.sum() == 1 and all(tiles.diagonal())
    if not own:
        window, sink = _prefix(diagonals), _prefix(columns)
        power = Power(max(window, 1), side, sink)
        expected = tables(power, length)
        if expected is not None and all(
            np.array_equal(*pair) for pair in ((columns, expected.columns), (diagonals, expected.diagonals), (tiles, expected.tiles))
        ):
            return power
        return Blocks(_exact_tiles(one), 1)
    lower = np.tril(tiles)
    return Blocks(tuple(tuple(np.flatnonzero(row).tolist()) for row in lower), side)


def _exact_tiles(one: Tables) -> tuple[tuple[int, ...], ...]:
    length = len(one.columns)
    if length * length > CELLS // 16:
        raise refusal(
            ExportError,
            f"a mask of {length:,} tokens",
            "no pattern has this mask, and token by token it is too large",
            "import a shorter one",
        )
    at = np.arange(length)
    seen = one.visible(at, at)
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in seen)


def _prefix(flags: np.ndarray) -> int:
    return len(flags) if flags.all() else int(np.argmin(flags))
