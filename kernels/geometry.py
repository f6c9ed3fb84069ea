"""Geometry of the blocked kernel: which rows and keys a tile holds, and how large it may be.

A tile is R query rows (of every query head of some key heads) against all keys that any of them can see, so a row is whole within one tile
and needs no online softmax. Rows start at multiples of R and keys at multiples of `unit`, both counted from absolute position 0, so that
the cells of a map never straddle two tiles and a chunk of a long prefill falls on the same grid as the whole prefill. A tile is scored in
strips of a few heads, small enough for a core's second-level cache: passes over memory that spills out of it cost twice as much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest

ENTRIES = 1 << 22
"""Entries of A per tile that are aimed at: 16 MiB of weights in float32. Larger tiles mean fewer steps, and steps hold the interpreter
lock; smaller ones gain nothing, since what a tile's weights are read for streams through them."""
STRIP_ENTRIES = 1 << 17
"""Entries per strip, the heads of a tile that are scored together: the scores then stay in a core's second-level cache."""
MOST_ENTRIES = 1 << 21
"""Entries per tile of one stream at which the number of rows is halved."""
ROWS = 128
UNIT = 128


class Span(NamedTuple):
    """Keys that some row of a tile can see: indices [begin, end) into the call's keys."""

    begin: int
    end: int


class Geometry:
    """Shapes, dtypes and tiling of one call. A stream is one (batch element, key head) with its group of query heads."""

    def __init__(self, call: AttentionCall, request: StatisticsRequest) -> None:
        self.batch, self.heads, self.rows, self.width = call.q.shape
        self.kv_heads, self.keys = call.k.shape[1], call.k.shape[2]
        self.group = call.group
        self.streams = self.batch * self.kv_heads
        self.dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        self.device = call.q.device
        self.causal, self.window = call.mask.causal, call.mask.window
        self.q0, self.k0 = call.query_offset, call.key_offset
        self.unit = min(request.block, UNIT) if request.needs("block_mass", "block_max") else UNIT
        reach = self.keys if self.window is None else min(self.keys, self.window * (1 if self.causal else 2) + ROWS)
        size = 1
        while size < min(self.rows, ROWS):
            size *= 2
        while size > 16 and self.group * size * reach > MOST_ENTRIES:
            size //= 2
        self.tile_rows = size
        self.first_row = self.q0 // size * size
        self.lead = self.q0 - self.first_row
        self.tiles = -(-(self.lead + self.rows) // size)
        self.padded_rows = self.tiles * size
        self.first_key = self.k0 // self.unit * self.unit
        self.end_key = -(-(self.k0 + self.keys) // self.unit) * self.unit

    def tile_start(self, tile: int) -> int:
        """Absolute position of a tile's first row."""
        return self.first_row + tile * self.tile_rows

    def own_rows(self, tile: int) -> tuple[int, int]:
        """Rows of the tile that exist in the call, as [begin, end) within the tile."""
        start = self.tile_start(tile)
        return max(self.q0 - start, 0), min(self.q0 + self.rows - start, self.tile_rows)

    def span(self, tile: int, valid: Span) -> Span:
        """Keys that the tile's own rows can see by position, cut to those of `valid`."""
        begin, end = self.own_rows(tile)
        first, last = self.tile_start(tile) + begin, self.tile_start(tile) + end - 1
        low, high = valid
        if self.window is not None:
            low = max(low, first - self.window + 1 - self.k0)
            if not self.causal:
                high = min(high, last + self.window - self.k0)
        if self.causal:
            high = min(high, last + 1 - self.k0)
        return Span(low, max(low, high))

    def queries(self, call: AttentionCall, factor: float) -> Tensor:
        """factor * q, padded to whole tiles, [B * Hkv, tiles, G * R, D] contiguous; rows that are padding or not there are zero."""
        q = call.q.to(self.dtype)
        if call.mask.query_valid is not None:
            q = q.masked_fill(~call.mask.query_valid[:, None, :, None], 0.0)
        if self.padded_rows != self.rows:
            q = torch.nn.functional.pad(q, (0, 0, self.lead, self.padded_rows - self.lead - self.rows))
        q = q.unflatten(1, (self.kv_heads, self.group)).unflatten(3, (self.tiles, self.tile_rows)).permute(0, 1, 3, 2, 4, 5)
        out = torch.empty(q.shape, dtype=self.dtype, device=self.device)
        torch.mul(q, factor, out=out)
        return out.view(self.streams, self.tiles, self.group * self.tile_rows, self.width)

    def per_head(self, rows: Tensor) -> Tensor:
        """[B, rows] -> [B * Hq, rows]."""
        return rows.repeat_interleave(self.heads, 0)

    def by_head(self, rows: Tensor) -> Tensor:
        """[B * Hq, ...] -> [B, Hq, ...]."""
        return rows.view(self.batch, self.heads, *rows.shape[1:])

    def own(self, rows: Tensor) -> Tensor:
        """[B * Hq, padded rows, ...] -> [B, Hq, Nq, ...], the call's own rows."""
        return self.by_head(rows)[:, :, self.lead : self.lead + self.rows]
