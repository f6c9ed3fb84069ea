"""Row statistics of the blocked kernel that do not depend on distance: normaliser, maximum, entropy, sink and class mass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from headscope.kernels.counts import at_positions

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.geometry import Geometry
    from headscope.kernels.tile import Tile
    from headscope.statistics.partial import PartialStatistics
    from headscope.statistics.request import StatisticsRequest

class RowSums:
    """Maximum m, Z = sum e, sum e (s - m) and argmax of every row, [B * Hq, padded rows]; the rest follows from them in float64."""

    def __init__(self, call: AttentionCall, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.call, self.request = call, request
        shape = (g.batch * g.heads, g.padded_rows)
        self.m = torch.full(shape, float("-inf"), dtype=g.dtype, device=g.device)
        self.z = torch.ones(shape, dtype=g.dtype, device=g.device)
        self.es = torch.zeros(shape, dtype=g.dtype, device=g.device) if request.needs("entropy") else None
        self.argmax = torch.full(shape, -1, dtype=torch.int64, device=g.device) if request.needs("argmax") else None
        self.sinks = None if call.sink_logits is None else call.sink_logits.to(g.device).double().repeat(g.batch)[:, None]
        self._ramp = torch.arange(g.unit, 0, -1, dtype=g.dtype, device=g.device)
        self._lines = torch.arange(1, device=g.device)
        self._blocks = -1

    def add(self, tile: Tile, bounded: bool) -> Tensor:
        """Take in a tile whose m, z and es are set; gives its `f`, [heads, R]. `bounded`: every row is known to see a key."""
        at = (tile.heads, tile.rows)
        if bounded:
            self.m[at] = tile.m.squeeze(-1)
        if self.argmax is not None:
            self.argmax[at] = self._first_maximum(tile)
        if self.sinks is None:
            f = self.z[at].reciprocal()
        else:
            f = (self.z[at].double() + torch.exp(self.sinks[tile.heads] - tile.m.squeeze(-1).double())).reciprocal_().to(self.geometry.dtype)
        return f if bounded else f.masked_fill_(self.m[at] == float("-inf"), 0.0)

    def _first_maximum(self, tile: Tile) -> Tensor:
        """Absolute position of the first key with the row's largest weight, [heads, R].

        The first block whose largest score is the row's, and in it the first weight of 1 (the others round down to 0); ramp falls with the
        key, so that its largest value marks the first hit.
        """
        g = self.geometry
        lines, blocks = tile.store.shape[0], tile.stride // g.unit
        which = tile.maxima.argmax(-1)
        if self._lines.shape[0] != lines or self._blocks != blocks:
            self._lines, self._blocks = torch.arange(lines, device=g.device) * blocks, blocks
        flat = (which.view(-1) + self._lines).add_(tile.left // g.unit)
        hits = tile.store.view(-1, g.unit).index_select(0, flat).floor_().mul_(self._ramp)
        offset = g.unit - hits.amax(-1).to(torch.int64)
        return which.mul_(g.unit).add_(offset.view_as(which)).add_(tile.first_key)

    def seen(self) -> Tensor:
        """[B, Hq, Nq] bool: the row sees a key."""
        return self.geometry.own(self.m) > float("-inf")

    def lse(self) -> Tensor:
        """ln of the normaliser, sink logit included, [B, Hq, Nq] float64; NaN on rows that do not count."""
        lse = self._mask(self.geometry.own(self.m.double() + self.z.double().log()))
        return lse if self.sinks is None else torch.logaddexp(lse, self._sink())

    def factor(self) -> Tensor:
        """1 / normaliser in units of exp(m), [B, Hq, Nq] float64; NaN on rows that do not count."""
        if self.sinks is None:
            return self._mask(self.geometry.own(self.z.double())).reciprocal()
        return torch.exp(self.geometry.own(self.m).double() - self.lse())

    def put(self, out: PartialStatistics, name: str, value: Tensor) -> None:
        """Store a row statistic in the result's dtype."""
        out.rows[name] = value.to(self.geometry.dtype)

    def finish(self, out: PartialStatistics) -> None:
        """lse, entropy, row_max, argmax, sink_logit_mass, as asked for."""
        request, g = self.request, self.geometry
        if request.needs("lse", "sink_logit_mass"):
            lse = self.lse()
            if request.needs("lse"):
                self.put(out, "lse", lse)
            if request.needs("sink_logit_mass"):
                self.put(out, "sink_logit_mass", lse * 0.0 if self.sinks is None else torch.exp(self._sink() - lse))
        if self.es is not None:
            z, factor = g.own(self.z).double(), self.factor()
            gap = z.log() if self.sinks is None else self.lse() - g.own(self.m).double()
            self.put(out, "entropy", (factor * (gap * z - g.own(self.es).double())).clamp_min(0.0))
        if request.needs("row_max"):
            self.put(out, "row_max", self.factor())
        if self.argmax is not None:
            valid = self.call.mask.query_valid
            best = g.own(self.argmax).masked_fill(~self.seen(), -1)
            out.rows["argmax"] = best if valid is None else best.masked_fill(~valid[:, None], -1)

    def _sink(self) -> Tensor:
        assert self.sinks is not None
        return self.geometry.by_head(self.sinks)

    def _mask(self, value: Tensor) -> Tensor:
        """NaN on padded rows and on rows that see no key."""
        valid = self.call.mask.query_valid
        live = self.seen() if valid is None else self.seen() & valid[:, None]
        return value.masked_fill(~live, math.nan)


class SinkMass:
    """sink_mass: the weight on the first k0 real tokens, summed directly."""

    def __init__(self, call: AttentionCall, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.count = request.sink_tokens
        self.first = [0] * g.batch if call.first_token is None else [int(x) for x in call.first_token.tolist()]
        self.sums = torch.zeros(g.batch * g.heads, g.padded_rows, dtype=g.dtype, device=g.device)

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """None."""
        return 0, 0

    def add(self, tile: Tile) -> None:
        """Sum the first columns."""
        first = self.first[tile.b or 0] - tile.first_key
        begin, end = max(first, 0), min(first + self.count, tile.n)
        if begin < end:
            torch.sum(tile.e[..., begin:end], -1, out=self.sums[tile.heads, tile.rows])

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Divide."""
        rows.put(out, "sink_mass", self.geometry.own(self.sums).double() * rows.factor())


class ClassMass:
    """class_mass: the weight on the keys of each label, by a product with the labels' one-hot matrix, block of keys by block of keys."""

    def __init__(self, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        assert request.labels is not None
        classes = request.classes
        labels = at_positions(request.labels.to(g.device), g.first_key, g.end_key - g.first_key, -1)
        self.one_hot = (labels[..., None] == torch.arange(classes, device=g.device)).to(g.dtype)
        self.sums = torch.zeros(g.batch * g.heads, g.padded_rows, classes, dtype=torch.float64, device=g.device)

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """None."""
        return 0, 0

    def add(self, tile: Tile) -> None:
        """Product of every key block with its one-hot rows, added in float64."""
        g = self.geometry
        table = self.one_hot[tile.b or 0] if self.one_hot.shape[0] > 1 else self.one_hot[0]
        first = tile.first_key - g.first_key
        total = tile.store.shape[0]
        blocks = tile.n // g.unit
        weights = tile.matrices(total)[0].view(total, blocks, g.unit).transpose(0, 1)
        masses = torch.bmm(weights, table[first : first + tile.n].view(blocks, g.unit, -1)).sum(0, dtype=torch.float64)
        self.sums[tile.heads, tile.rows] = masses.view(*tile.f.shape, -1)

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Divide."""
        rows.put(out, "class_mass", self.geometry.own(self.sums) * rows.factor()[..., None])
