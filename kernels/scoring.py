"""Scores to weights for one tile, in strips of a few heads that stay in the cache from the product to the sums.

One strip of scores is written by a matrix product, reduced to its maxima, shifted, cut, exponentiated into the tile, and overwritten by its
product with the weights for the entropy.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import torch

from headscope.kernels import geometry as tuning
from headscope.kernels.counts import eligible_rows
from headscope.kernels.hiding import Hiding
from headscope.kernels.tile import Tile

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.blocked_rows import RowSums
    from headscope.kernels.geometry import Geometry, Span
    from headscope.statistics.request import StatisticsRequest

FLOOR = {torch.float32: -70.0, torch.float64: -700.0}
"""Smallest score - row maximum that is told apart: its exponential, times a normaliser, is still a normal number."""


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
        self.floor = FLOOR[g.dtype]
    def part(self, rows: RowSums) -> Scoring:
        """The same queries and keys, with memory of its own, for the tiles whose sums go to `rows`."""
        mine = copy(self)
        mine.rows = rows
        mine._store = mine._strip = torch.empty(0, dtype=self.geometry.dtype, device=self.geometry.device)
        return mine

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
        tile = Tile(heads, b, at, g.tile_start(number), first_key, n, span, left, right, patches, store, e, maxima, m, m, m)
        masses = torch.empty_like(maxima)
        bounded = self._sees_something(number, span)
        for first, last in self._strips(count, size * n):
            self._weigh(tile, masses[first:last], number, first, last, of_batch, bounded)
        tile.f = rows.add(tile, masses, bounded)
        whole = self.whole[b][number] if b is not None else all(row[number] for row in self.whole)
        tile.w = tile.f if whole else tile.f * self.counting[heads, at]
        return tile

    def _strips(self, count: int, per_head: int) -> list[tuple[int, int]]:
        """Heads [first, last) of a tile that are scored together: some of one stream, or some whole streams."""
        group = self.geometry.group
        many = max(tuning.STRIP_ENTRIES // per_head, 1)
        if many >= group:
            step = many // group * group
            return [(first, min(first + step, count)) for first in range(0, count, step)]
        return [(s + g, min(s + g + many, s + group)) for s in range(0, count, group) for g in range(0, group, many)]

    def _weigh(self, tile: Tile, masses: Tensor, number: int, first: int, last: int, of_batch: slice, bounded: bool) -> None:
        """One strip: scores, maxima, weights, and the two sums over keys."""
        g, rows = self.geometry, self.rows
        size, n, count = g.tile_rows, tile.n, last - first
        if self._strip.numel() < count * size * n:
            self._strip = torch.empty(count * size * n, dtype=g.dtype, device=g.device)
        x = self._strip[: count * size * n].view(count, size, n)
        self._score(tile, number, x, first, of_batch)
        for patch in tile.patches:
            patch.hide_scores(x, first)
        maxima, m, e = tile.maxima[first:last], tile.m[first:last], tile.e[first:last]
        torch.amax(x.view(count, size, -1, g.unit), -1, out=maxima)
        torch.amax(maxima, -1, keepdim=True, out=m)
        at = (slice(tile.heads.start + first, tile.heads.start + last), tile.rows)
        if not bounded:
            rows.m[at] = m.squeeze(-1)
            m.clamp_(min=torch.finfo(g.dtype).min / 2)
        x.sub_(m).clamp_(min=self.floor)
        torch.exp(x, out=e)
        for patch in tile.patches:
            patch.hide_weights(e, first)
        if rows.es is not None:
            torch.sum(x.mul_(e), -1, out=rows.es[at])
        torch.sum(e.unflatten(-1, (-1, g.unit)), -1, out=masses)

    def _score(self, tile: Tile, number: int, x: Tensor, first: int, of_batch: slice) -> None:
        """q k^T of a strip, soft-capped and biased; columns outside of the tile's span are left as they are."""
        g = self.geometry
        begin, end = tile.span
        column = g.k0 + begin - tile.first_key
        count, size, group = x.shape[0], g.tile_rows, g.group
        scores = x.view(count * size, -1)[:, column : column + end - begin]
        head = tile.heads.start + first
        if count < group:
            inside = head % group * size
            torch.mm(self.q[head // group, number, inside : inside + count * size], self.k[head // group][:, begin:end], out=scores)
        else:
            for i, s in enumerate(range(head // group, (head + count) // group)):
                torch.mm(self.q[s, number], self.k[s][:, begin:end], out=scores[i * group * size : (i + 1) * group * size])
        if self.call.softcap is not None:
            scores.tanh_().mul_(self.call.softcap)
        if self.call.mask.bias is not None:
            top, bottom = g.own_rows(number)
            row = tile.start + top - g.q0
            bias = self.hiding.of_heads(self.call.mask.bias, tile.b or 0, of_batch)[:, row : row + bottom - top, begin:end]
            x[:, top:bottom, column : column + end - begin].add_(bias if bias.shape[0] == 1 else bias[first : first + count])

    def _sees_something(self, number: int, span: Span) -> bool:
        """True when every row of the tile is sure to see a key, by position alone."""
        g = self.geometry
        top, bottom = g.own_rows(number)
        if self.hides or bottom - top != g.tile_rows:
            return False
        start = g.tile_start(number)
        sees_itself = g.k0 + span.begin <= start and g.k0 + span.end >= start + g.tile_rows
        return sees_itself if g.causal else g.window is None
