"""Distance statistics of the blocked kernel: distance, distance_sq, waad and local_mass, without a subtraction of large numbers.

A mean distance taken as t - sum A s loses its digits for a head that looks one token back at position 100,000. Here every row is split
into a band of its nearest keys and the rest:

- the band, a diagonal view of the tile, is copied out as a small matrix whose column j is always the same distance, so all four
  statistics are one product with fixed weights (|d|, d^2, min(|d|, W), |d| < w);
- then it is set to zero, and what is left is not near. Its moments come from one product per block of keys with (1, o, o^2), o the distance
  to the block's end, joined in float64 by position relative to the tile.

Blocks are at most twice as long as the band (as long, where keys follow the row), so no term is much larger than what it adds up to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headscope.kernels.strips import block_moments, take_band

if TYPE_CHECKING:
    from headscope.kernels.blocked_rows import RowSums
    from headscope.kernels.geometry import Geometry
    from headscope.kernels.tile import Tile
    from headscope.statistics.partial import PartialStatistics
    from headscope.statistics.request import StatisticsRequest

NAMES = ("distance", "distance_sq", "waad", "local_mass")
NEAR = 64
"""Shortest band that the moments of the rest need."""
LONG_BAND = 256
"""Band length from which its product is taken in float64."""


class Distances:
    """The four statistics that depend on |t - s|. Must be the last to see a tile: it overwrites the band."""

    def __init__(self, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.request = request
        self.names = [name for name in NAMES if request.needs(name)]
        self.moments = request.needs("distance", "distance_sq")
        self.far_mass = request.needs("waad") and not self.moments
        self.far_sides = request.needs("distance") and not g.causal
        last, end = g.q0 + g.rows - 1, g.k0 + g.keys - 1
        self.far_block = g.unit if g.causal else min(g.unit, NEAR)
        longest = max(last - g.k0, end - g.q0, 0) + 1
        near = max(
            NEAR if self.moments else 1,
            request.local_window if request.needs("local_mass") else 1,
            request.waad_window if request.needs("waad") else 1,
        )
        self.near = min(near, longest)
        self.first = -(self.near - 1)  # position of the band's first key, relative to the row's
        self.width = self.near if g.causal else 2 * self.near - 1
        d = torch.arange(self.width, device=g.device).add_(self.first).abs_()
        columns = {
            "distance": d,
            "distance_sq": d * d,
            "waad": d.clamp(max=request.waad_window),
            "local_mass": d < request.local_window,
        }
        self.band_dtype = torch.float64 if self.width > LONG_BAND else g.dtype
        self.band_weights = torch.stack([columns[name].to(self.band_dtype) for name in self.names], -1)
        shape = (g.batch * g.heads, g.padded_rows)
        self.band_sums = torch.zeros(*shape, len(self.names), dtype=self.band_dtype, device=g.device)
        self.far = torch.zeros(*shape, 3 if self.moments else 1, dtype=torch.float64, device=g.device)
        self.sides = torch.zeros(shape, dtype=torch.float64, device=g.device) if self.far_sides else None
        if self.moments:
            self._make_tables()

    def _make_tables(self) -> None:
        """(1, o, o^2) of a block, and what turns its sums into sums of 1, s, s^2 for every block relative to a tile."""
        g = self.geometry
        o = torch.arange(self.far_block - 1, -1, -1, device=g.device, dtype=g.dtype)
        self.powers = torch.stack([torch.ones_like(o), o, o * o])
        margin = self.near + self.width + g.tile_rows + 2 * g.unit
        self.lowest = (g.first_key - margin) // self.far_block - g.tile_start(g.tiles - 1) // self.far_block
        highest = (g.end_key + margin) // self.far_block - g.first_row // self.far_block
        end = (torch.arange(self.lowest, highest + 1, device=g.device, dtype=torch.float64) + 1) * self.far_block - 1
        zero, one = torch.zeros_like(end), torch.ones_like(end)
        # [power of o, block, power of s]: what each adds to sum e, sum e s, sum e s^2, with s = end - o
        self.table = torch.stack([one, end, end * end, zero, -one, -2 * end, zero, zero, one], -1).view(-1, 3, 3).transpose(0, 1)
        self.ends = end

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """Room for the band of the tile's first and last row."""
        last = start + self.geometry.tile_rows - 1 + self.first + self.width
        if last <= first_key or start + self.first >= first_key + n:
            return 0, 0
        return max(first_key - start - self.first, 0), max(last - first_key - n, 0)

    def add(self, tile: Tile) -> None:
        """Band first, then the rest."""
        size = tile.e.shape[1]
        at = (tile.heads, tile.rows)
        last = tile.start + size - 1 + self.first + self.width
        if last > tile.first_key and tile.start + self.first < tile.first_key + tile.n:
            self.band_sums[at] = take_band(tile.diagonal(self.first, self.width), self.band_weights, self.moments or self.far_mass)
        if self.moments:
            self._add_moments(tile)
        elif self.far_mass:
            torch.sum(tile.e, -1, dtype=torch.float64, out=self.far[at][..., 0])

    def _add_moments(self, tile: Tile) -> None:
        g = self.geometry
        at = (tile.heads, tile.rows)
        size, blocks = tile.e.shape[1], tile.stride // self.far_block
        sums = block_moments(tile.store, self.powers)
        base = tile.start // self.far_block
        first = (tile.first_key - tile.left) // self.far_block - base - self.lowest
        self.far[at] = torch.bmm(sums, self.table[:, first : first + blocks]).sum(0).view(-1, size, 3)
        if self.sides is not None:
            # a block lies wholly before or wholly after a row, so its part of the distance is one absolute value
            t = torch.arange(size, device=g.device, dtype=torch.float64) + (tile.start - base * self.far_block)
            gap = t[:, None] - self.ends[first : first + blocks]
            self.sides[at] = torch.addcmul(sums[1].view(-1, size, blocks), gap, sums[0].view(-1, size, blocks)).abs_().sum(-1)

    def merge(self, other: Any) -> None:
        """Add the sums of another part of the call."""
        self.band_sums += other.band_sums
        self.far += other.far
        if self.sides is not None:
            self.sides += other.sides

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Join band and rest, divide."""
        g = self.geometry
        factor = rows.factor()
        band, far = g.own(self.band_sums).double(), g.own(self.far)
        tile_row = torch.arange(g.padded_rows, device=g.device) // g.tile_rows * g.tile_rows + g.first_row
        t = torch.arange(g.padded_rows, device=g.device) + g.first_row - tile_row // self.far_block * self.far_block
        t = t[g.lead : g.lead + g.rows].double()
        for i, name in enumerate(self.names):
            total = band[..., i]
            if name == "distance":
                total = total + (t * far[..., 0] - far[..., 1] if self.sides is None else g.own(self.sides))
            elif name == "distance_sq":
                total = total + (t * t * far[..., 0] - 2 * t * far[..., 1] + far[..., 2])
            elif name == "waad":
                total = total + self.request.waad_window * far[..., 0]
            rows.put(out, name, total * factor)
