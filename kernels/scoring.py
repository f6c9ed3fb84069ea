"""Scores to weights for one tile, in strips of a few heads that stay in the cache from the product to the sums.

One strip of scores is written by a matrix product, reduced to its maxima, shifted, cut, exponentiated into the tile, and overwritten by its
product with the weights for the entropy.
"""

from __future__ import annotations

import threading
from copy import copy
from typing import TYPE_CHECKING

import torch

from headscope.kernels import geometry as tuning
from headscope.kernels.counts import eligible_rows
from headscope.kernels.hiding import Hiding
from headscope.kernels.strips import weigh_strips
from headscope.kernels.tile import Tile

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.blocked_rows import RowSums
    from headscope.kernels.geometry import Geometry, Span
    from headscope.statistics.request import StatisticsRequest

FLOOR = {torch.float32: -70.0, torch.float64: -700.0}
"""Smallest score - row maximum that is told apart: its exponential, times a normaliser, is still a normal number."""

_kept = threading.local()


def _workspace(like: Tensor) -> tuple[Tensor, Tensor]:
    """This thread's buffers of the last call if they fit `like` in dtype and device, else empty ones. They are taken: none is shared."""
    kept: tuple[Tensor, Tensor] = getattr(_kept, "buffers", (like, like))
    _kept.buffers = (like, like)
    return kept if kept[0].dtype == like.dtype and kept[0].device == like.device else (like, like)


class Scoring:
    """Makes tiles. Holds the queries (scaled, in tiles), the keys in the dtype of the sums, and the memory that tiles reuse."""

    rows: RowSums
    _store: Tensor
    _strip: Tensor

    def __init__(self, call: AttentionCall, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.call, self.hiding = call, Hiding(call, geometry)
        self.q = g.queries(call, call.scale if call.softcap is None else call.scale / call.softcap)
        k = call.k.to(g.dtype)
        k = k if k.stride(-1) == 1 else k.contiguous()
        self.k = [k[s // g.kv_heads, s % g.kv_heads].t() for s in range(g.streams)]
        eligible = eligible_rows(call, request)
        counting = torch.zeros(g.batch, g.padded_rows, dtype=torch.bool, device=g.device)
        counting[:, g.lead : g.lead + g.rows] = True if eligible is None else eligible
        self.whole: list[list[bool]] = counting.view(g.batch, g.tiles, g.tile_rows).all(-1).tolist()
        self.counting = g.per_head(counting.to(g.dtype))
        mask = call.mask
        self.hides = mask.key_valid is not None or mask.query_segments is not None or mask.allowed is not None or mask.bias is not None
        self.nothing = torch.empty(0, dtype=g.dtype, device=g.device)

    def part(self, rows: RowSums) -> Scoring:
        """The same queries and keys, with memory of its own, for the tiles whose sums go to `rows`."""
        mine = copy(self)
        mine.rows = rows
        mine._store, mine._strip = _workspace(self.nothing)
        return mine

    def leave(self) -> None:
        """Keep the memory for this thread's next call: fresh pages cost about as much as filling them."""
        _kept.buffers = (self._store, self._strip)

    def tile(self, number: int, heads: slice, b: int | None, first_key: int, n: int, span: Span, left: int, right: int) -> Tile:
        """A tile of the given heads (of B * Hq), row tile, and keys, with its weights, maxima and row sums."""
        g, rows = self.geometry, self.rows
        size, stride, count = g.tile_rows, left + n + right, heads.stop - heads.start
        if self._store.numel() < count * size * stride:
            self._store = torch.empty(count * size * stride, dtype=g.dtype, device=g.device)
        store = self._store[: count * size * stride].view(count * size, stride)
        if left:
            store[:, :left].zero_()
        if right:
            store[:, left + n :].zero_()
        e = store.view(count, size, stride)[..., left : left + n]
        at = slice(number * size, (number + 1) * size)
        of_batch = slice(heads.start % g.heads, heads.start % g.heads + count)
        patches = self.hiding.patches(number, first_key, n, span, b or 0, of_batch)
        maxima = torch.empty(count, size, n // g.unit, dtype=g.dtype, device=g.device)
        m = torch.empty(count, size, 1, dtype=g.dtype, device=g.device)
        masses = torch.empty_like(maxima)
        strips = self._strips(count, size * n)
        strip = max(last - first for first, last in strips) * size * n
        if self._strip.numel() < strip:
            self._strip = torch.empty(strip, dtype=g.dtype, device=g.device)
        streams = range(heads.start // g.group, heads.stop // g.group)
        es = self.nothing if rows.es is None else rows.es[heads, at]
        bias, bias_rows = self._bias(number, span, b or 0, of_batch)
        weigh_strips(
            [self.q[s, number] for s in streams],
            [self.k[s][:, span.begin : span.end] for s in streams],
            strips,
            [(patch.top, patch.bottom, patch.begin, patch.end) for patch in patches],
            [patch.hide for patch in patches],
            [patch.keep for patch in patches],
            bias,
            bias_rows,
            self._strip,
            e,
            maxima,
            m,
            masses,
            es,
            g.k0 + span.begin - first_key,
            g.group,
            g.unit,
            self.call.softcap or 0.0,
            FLOOR[g.dtype],
            torch.finfo(g.dtype).min / 2,
        )
        tile = Tile(heads, b, at, g.tile_start(number), first_key, n, left, right, store, e, maxima, m, m, m)
        tile.f = rows.add(tile, masses, self._sees_something(number, span))
        whole = self.whole[b][number] if b is not None else all(row[number] for row in self.whole)
        tile.w = tile.f if whole else tile.f * self.counting[heads, at]
        return tile

    def _bias(self, number: int, span: Span, b: int, of_batch: slice) -> tuple[Tensor, tuple[int, int]]:
        """The bias of a tile's own rows [1 or heads, rows, visible keys], empty if there is none, and those rows."""
        g = self.geometry
        top, bottom = g.own_rows(number)
        if self.call.mask.bias is None:
            return self.nothing, (top, bottom)
        row = g.tile_start(number) + top - g.q0
        return self.hiding.of_heads(self.call.mask.bias, b, of_batch)[:, row : row + bottom - top, span.begin : span.end], (top, bottom)

    def _strips(self, count: int, per_head: int) -> list[tuple[int, int]]:
        """Heads [first, last) of a tile that are scored together: some of one stream, or some whole streams."""
        group = self.geometry.group
        many = max(tuning.STRIP_ENTRIES // per_head, 1)
        if many >= group:
            step = many // group * group
            return [(first, min(first + step, count)) for first in range(0, count, step)]
        return [(s + g, min(s + g + many, s + group)) for s in range(0, count, group) for g in range(0, group, many)]

    def _sees_something(self, number: int, span: Span) -> bool:
        """True when every row of the tile is sure to see a key, by position alone."""
        g = self.geometry
        top, bottom = g.own_rows(number)
        if self.hides or bottom - top != g.tile_rows:
            return False
        start = g.tile_start(number)
        sees_itself = g.k0 + span.begin <= start and g.k0 + span.end >= start + g.tile_rows
        return sees_itself if g.causal else g.window is None
