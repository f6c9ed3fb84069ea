"""Row statistics of the blocked kernel that do not depend on distance: normaliser, maximum, entropy, sink and class mass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from headscope.kernels.counts import at_positions
from headscope.kernels.strips import split_normaliser

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.geometry import Geometry
    from headscope.kernels.tile import Tile
    from headscope.statistics.partial import PartialStatistics
    from headscope.statistics.request import StatisticsRequest


class RowSums:
    """Maximum m, rest of the normaliser, sum e (s - m) and argmax of every row, [B * Hq, padded rows]; all else follows in float64.

    With e = exp(s - m) the normaliser is 1 + `rest`: the row's largest weight is exactly 1 and is kept apart. For a head that puts nearly
    everything on one key the rest is what entropy is made of, and next to a 1 float32 would round it away.
    """

    def __init__(self, call: AttentionCall, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.call, self.request = call, request
        shape = (g.batch * g.heads, g.padded_rows)
        self.m = torch.full(shape, -math.inf, dtype=g.dtype, device=g.device)
        self.rest = torch.zeros(shape, dtype=g.dtype, device=g.device)
        self.es = torch.zeros(shape, dtype=g.dtype, device=g.device) if request.needs("entropy") else None
        self.argmax = torch.full(shape, -1, dtype=torch.int64, device=g.device) if request.needs("argmax") else None
        self.sinks = None if call.sink_logits is None else call.sink_logits.to(g.device).double().repeat(g.batch)[:, None]
        self.lowest = torch.finfo(g.dtype).min / 2
        self._ramp = torch.arange(g.unit, 0, -1, dtype=g.dtype, device=g.device)
        self._lines = torch.arange(1, device=g.device)
        self._blocks = -1

    def add(self, tile: Tile, masses: Tensor, bounded: bool) -> Tensor:
        """Take in a tile; gives its `f`, [heads, R]. `masses` [heads, R, n / unit]: sum e per key block, which is used up; `bounded`: every
        row is known to see a key."""
        g, at = self.geometry, (tile.heads, tile.rows)
        lines, blocks = tile.store.shape[0], tile.stride // g.unit
        if self._lines.shape[0] != lines or self._blocks != blocks:
            self._lines, self._blocks = torch.arange(lines, device=g.device) * blocks, blocks
        rest, index = split_normaliser(tile.store, tile.maxima, masses, self._ramp, self._lines, tile.left // g.unit, g.unit)
        if self.argmax is not None:
            self.argmax[at] = index.add_(tile.first_key)
        self.rest[at] = rest
        self.m[at] = tile.m.squeeze(-1)
        if self.sinks is None:
            f = rest.add_(1.0).reciprocal_()
        else:
            f = (rest.double() + 1.0 + torch.exp(self.sinks[tile.heads] - tile.m.squeeze(-1).double())).reciprocal_().to(g.dtype)
        return f if bounded else f.masked_fill_(self.m[at] <= self.lowest, 0.0)

    def merge(self, other: RowSums) -> None:
        """Take over the rows of another part of the call."""
        torch.maximum(self.m, other.m, out=self.m)
        self.rest += other.rest
        if self.es is not None and other.es is not None:
            self.es += other.es
        if self.argmax is not None and other.argmax is not None:
            torch.maximum(self.argmax, other.argmax, out=self.argmax)

    def seen(self) -> Tensor:
        """[B, Hq, Nq] bool: the row sees a key."""
        return self.geometry.own(self.m) > self.lowest

    def lse(self) -> Tensor:
        """ln of the normaliser, sink logit included, [B, Hq, Nq] float64; NaN on rows that do not count."""
        lse = self._mask(self.geometry.own(self.m.double() + self.rest.double().log1p()))
        return lse if self.sinks is None else torch.logaddexp(lse, self._sink())

    def factor(self) -> Tensor:
        """1 / normaliser in units of exp(m), [B, Hq, Nq] float64; NaN on rows that do not count."""
        if self.sinks is None:
            return self._mask(self.geometry.own(self.rest.double()) + 1.0).reciprocal()
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
            rest, factor = g.own(self.rest).double(), self.factor()
            gap = rest.log1p() if self.sinks is None else self.lse() - g.own(self.m).double()
            self.put(out, "entropy", factor * (gap * (rest + 1.0) - g.own(self.es).double()))
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

    def merge(self, other: Any) -> None:
        """Add the sums of another part of the call."""
        self.sums += other.sums

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

    def merge(self, other: Any) -> None:
        """Add the sums of another part of the call."""
        self.sums += other.sums

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Divide."""
        rows.put(out, "class_mass", self.geometry.own(self.sums) * rows.factor()[..., None])
