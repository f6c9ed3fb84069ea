"""Column, map and diagonal statistics of the blocked kernel: everything that sums over queries.

With a whole row in the tile its normaliser is known, so a column sum over the tile's rows is a vector of normalised row weights times the
tile, one matrix-vector product, and a row that does not count has weight 0. Block masses are sums of that vector over key blocks; block
maxima come from the maxima of scores that the row maximum needed anyway. Diagonals are columns of a skewed view of the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from headscope.kernels.counts import at_positions
from headscope.kernels.strips import log_peaks, sum_columns, sum_edge

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.kernels.blocked_rows import RowSums
    from headscope.kernels.geometry import Geometry
    from headscope.kernels.tile import Tile
    from headscope.statistics.partial import PartialStatistics
    from headscope.statistics.request import StatisticsRequest


class ColumnSums:
    """column_sum, fai, block_mass and block_max, which share the tile's column vector."""

    def __init__(self, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.request = request
        self.block_rows = min(g.tile_rows, request.block) if request.needs("block_mass") else g.tile_rows
        self.width = g.end_key - g.first_key
        heads = g.batch * g.heads
        self.want_columns = request.needs("column_sum", "sink_importance")
        self.want_vector = self.want_columns or request.needs("block_mass", "fai")
        self.columns = torch.zeros(heads, self.width, dtype=torch.float64, device=g.device) if self.want_columns else None
        self.fai = _FutureBand(request.fai_band, g) if request.needs("fai") else None
        self.first_block = (g.q0 // request.block, g.k0 // request.block)
        last = ((g.q0 + g.rows - 1) // request.block, (g.k0 + g.keys - 1) // request.block)
        self.blocks = (last[0] - self.first_block[0] + 1, last[1] - self.first_block[1] + 1)
        self.per_block = request.block // g.unit
        cells = (heads, self.blocks[0], self.blocks[1] * self.per_block)
        self.mass = torch.zeros(cells, dtype=g.dtype, device=g.device) if request.needs("block_mass") else None
        self.peak = torch.full(cells, float("-inf"), dtype=g.dtype, device=g.device) if request.needs("block_max") else None

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """None."""
        return 0, 0

    def add(self, tile: Tile) -> None:
        """One product for all of the tile's columns, and what follows from it."""
        first = tile.first_key - self.geometry.first_key
        if self.want_vector:
            vector, cells = sum_columns(tile.w, tile.e, self.block_rows, self.geometry.unit, self.mass is not None)
            if self.mass is not None:
                self._place(self.mass, tile, cells, torch.add)
            if self.columns is not None:
                self.columns[tile.heads, first : first + tile.n].add_(vector)
            if self.fai is not None:
                self.fai.add(tile, vector)
        if self.peak is not None:
            peaks = log_peaks(tile.maxima, tile.m, tile.w, min(tile.e.shape[1], self.request.block))
            self._place(self.peak, tile, peaks, torch.maximum)

    def _place(self, grid: Tensor, tile: Tile, cells: Tensor, how: Callable[..., Tensor]) -> None:
        """Combine a tile's cells [heads, blocks of rows, key blocks] with the grid's; blocks before the first and after the last drop
        out."""
        row = tile.start // self.request.block - self.first_block[0]
        skip = max(-row, 0)
        cells = cells[:, skip : self.blocks[0] - row]
        column = tile.first_key // self.geometry.unit - self.first_block[1] * self.per_block
        part = grid[tile.heads, row + skip : row + skip + cells.shape[1], column : column + cells.shape[2]]
        how(part, cells, out=part)

    def merge(self, other: Any) -> None:
        """Add (maxima: compare) the results of another part of the call."""
        if self.columns is not None:
            self.columns += other.columns
        if self.fai is not None:
            self.fai.sums += other.fai.sums
        if self.mass is not None:
            self.mass += other.mass
        if self.peak is not None:
            torch.maximum(self.peak, other.peak, out=self.peak)

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Cut to the call's keys; log maxima to weights."""
        g = self.geometry
        lead = g.k0 - g.first_key
        if self.columns is not None:
            out.columns["column_sum"] = g.by_head(self.columns)[..., lead : lead + g.keys].to(g.dtype)
        if self.fai is not None:
            out.columns["fai_sum"] = g.by_head(self.fai.sums)[..., lead : lead + g.keys].to(g.dtype)
        if self.mass is not None:
            out.maps["block_mass"] = g.by_head(self.mass.unflatten(-1, (self.blocks[1], self.per_block)).sum(-1))
        if self.peak is not None:
            out.maps["block_max"] = g.by_head(self.peak.unflatten(-1, (self.blocks[1], self.per_block)).amax(-1)).exp_()


class _FutureBand:
    """fai: for each key the weights from rows s + lo .. s + hi, as the columns that are in the band for all rows of a tile, plus edges."""

    def __init__(self, band: tuple[int, int | None], geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.low, high = band
        self.high = g.q0 + g.rows + g.tile_rows - g.k0 + self.low if high is None else high
        self.sums = torch.zeros(g.batch * g.heads, g.end_key - g.first_key, dtype=torch.float64, device=g.device)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def add(self, tile: Tile, vector: Tensor) -> None:
        """`vector` [heads, n] are the tile's column sums."""
        size = tile.e.shape[1]
        begin = max(tile.start - self.high - tile.first_key, 0)
        end = min(tile.start + size - self.low - tile.first_key, tile.n)
        if begin >= end:
            return
        # columns that every row of the tile has in its band
        whole_begin = max(tile.start + size - 1 - self.high - tile.first_key, begin)
        whole_end = min(tile.start - self.low + 1 - tile.first_key, end)
        if whole_begin < whole_end:
            self._at(tile, whole_begin, whole_end).add_(vector[..., whole_begin:whole_end])
            parts = [(begin, whole_begin), (whole_end, end)]
        else:
            parts = [(begin, end)]
        for first, last in parts:
            if first < last:
                self._edge(tile, first, last)

    def _edge(self, tile: Tile, first: int, last: int) -> None:
        size = tile.e.shape[1]
        mask = self._mask(tile.first_key + first - tile.start, last - first, size)
        self._at(tile, first, last).add_(sum_edge(tile.w, tile.e[..., first:last], mask))

    def _at(self, tile: Tile, first: int, last: int) -> Tensor:
        shift = tile.first_key - self.geometry.first_key
        return self.sums[tile.heads, shift + first : shift + last]

    def _mask(self, shift: int, columns: int, size: int) -> Tensor:
        """[R, columns] of 0 and 1: lo <= t - s <= hi, for columns that start `shift` after the tile's first row."""
        key = (shift, columns)
        if key not in self._masks:
            g = self.geometry
            ahead = torch.arange(size, device=g.device)[:, None] - torch.arange(columns, device=g.device)[None, :] - shift
            self._masks[key] = ((ahead >= self.low) & (ahead <= self.high)).to(g.dtype)
        return self._masks[key]


class SegmentMass:
    """segment_mass: column vectors of each segment among the tile's rows (few, as segments are mostly runs), then summed by key segment."""

    def __init__(self, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        assert request.segments is not None
        segments = request.segments.to(g.device)
        self.count = request.segment_count
        self.of_row = at_positions(segments, g.first_row, g.padded_rows, -1)
        of_key = at_positions(segments, g.first_key, g.end_key - g.first_key, -1)
        self.of_key = torch.where(of_key < 0, self.count, of_key)
        self.sums = torch.zeros(g.batch * g.heads, self.count, self.count + 1, dtype=torch.float64, device=g.device)

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """None."""
        return 0, 0

    def add(self, tile: Tile) -> None:
        """Weights of each row segment times the tile, added up by key segment in float64."""
        b = tile.b or 0
        heads, size, _ = tile.e.shape
        of_row = (self.of_row[b] if self.of_row.shape[0] > 1 else self.of_row[0])[tile.rows]
        present = of_row[of_row >= 0].unique()
        if not present.numel():
            return
        first = tile.first_key - self.geometry.first_key
        of_key = (self.of_key[b] if self.of_key.shape[0] > 1 else self.of_key[0])[first : first + tile.n]
        weights = tile.w[:, None] * (of_row == present[:, None]).to(tile.w.dtype)
        vectors = torch.bmm(weights, tile.matrices(size)).double()
        sums = vectors.new_zeros(heads, len(present), self.count + 1).index_add_(-1, of_key, vectors)
        self.sums[tile.heads].index_add_(1, present, sums)

    def merge(self, other: Any) -> None:
        """Add the sums of another part of the call."""
        self.sums += other.sums

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Drop the keys of no segment."""
        out.maps["segment_mass"] = self.geometry.by_head(self.sums[..., : self.count]).to(self.geometry.dtype)


class Diagonals:
    """diagonal_sum: in a view skewed by one per row every diagonal is a column."""

    def __init__(self, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.start = 0 if g.causal else g.q0 - (g.k0 + g.keys - 1)
        self.count = max(g.q0 + g.rows - 1 - g.k0, self.start) - self.start + 1
        # entries of padded rows and keys are zero, and fall outside of the distances that exist
        self.slack = g.tile_rows + g.unit
        self.sums = torch.zeros(g.batch * g.heads, self.slack + self.count + self.slack, dtype=torch.float64, device=g.device)

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """A tile's height on both sides."""
        return self.geometry.tile_rows - 1, self.geometry.tile_rows - 1

    def add(self, tile: Tile) -> None:
        """Column j of the view holds the keys at row + first + j: distance -(first + j)."""
        size = tile.e.shape[1]
        first = tile.first_key - tile.start - (size - 1)
        width = tile.n + size - 1
        vector = torch.bmm(tile.w.unsqueeze(1), tile.diagonal(first, width)).squeeze(1)
        nearest = -(first + width - 1) - self.start + self.slack
        self.sums[tile.heads, nearest : nearest + width].add_(vector.flip(-1))

    def merge(self, other: Any) -> None:
        """Add the sums of another part of the call."""
        self.sums += other.sums

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Cut to the distances that exist."""
        g = self.geometry
        out.diagonals = g.by_head(self.sums[..., self.slack : self.slack + self.count]).to(g.dtype)
        out.diagonal_start = self.start
