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

FLOOR = {torch.float32: -70.0, torch.float64: -700.0}
"""Smallest score - row maximum that is told apart: its exponential, times a normaliser, is still a normal number."""


class RowSums:
    """Maximum m, Z = sum e, sum e (m - s) and argmax of every row; everything else is derived from them in float64."""

    def __init__(self, call: AttentionCall, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        self.call, self.request = call, request
        self.want_entropy = request.needs("entropy")
        self.want_argmax = request.needs("argmax")
        self.want_weights = any(name != "argmax" for name in request.names)
        shape = (g.streams, g.group, g.padded_rows)
        self.m = torch.full(shape, float("-inf"), dtype=g.dtype, device=g.device)
        self.z = torch.ones(shape, dtype=g.dtype, device=g.device)
        self.es = torch.zeros(shape, dtype=g.dtype, device=g.device) if self.want_entropy else None
        self.argmax = torch.full(shape, -1, dtype=torch.int64, device=g.device) if self.want_argmax else None
        self.sinks = None if call.sink_logits is None else call.sink_logits.to(g.device).double().view(g.kv_heads, g.group).repeat(g.batch, 1)
        mask = call.mask
        self._hides = mask.key_valid is not None or mask.query_segments is not None or mask.allowed is not None or mask.bias is not None
        self._ramp = torch.arange(g.unit, 0, -1, dtype=g.dtype, device=g.device)
        self._row_number = torch.arange(1, device=g.device)

    def add(self, tile: Tile) -> None:
        """From scores to weights: takes the maximum, exponentiates, sums, and sets the tile's `maxima`, `m` and `f`."""
        g = self.geometry
        streams, group, size = tile.shape
        x, e = tile.x, tile.e
        at = (slice(tile.s0, tile.s1), slice(None), tile.rows)
        tile.maxima = x.unflatten(-1, (tile.n // g.unit, g.unit)).amax(-1)
        m = torch.amax(tile.maxima, -1, keepdim=True)
        self.m[at] = m.squeeze(-1)
        if self.argmax is not None:
            self.argmax[at] = self._first_maximum(tile, m)
        if not self.want_weights:
            return
        top, bottom = g.own_rows(tile.number)
        bounded = not self._hides and bottom - top == size and tile.first_key <= tile.start and (g.causal or g.window is None)
        if not bounded:
            m = m.clamp_min(torch.finfo(g.dtype).min / 2)
        tile.m = m
        x.sub_(m).clamp_(min=FLOOR[g.dtype])
        torch.exp(x, out=e)
        for patch in tile.patches:
            patch.fill(e, 0.0)
        if self.es is not None:
            torch.sum(x.mul_(e), -1, out=self.es[at])
        z = torch.sum(e, -1)
        self.z[at] = z
        if self.sinks is None:
            f = z.reciprocal_()
        else:
            sink = self.sinks[tile.s0 : tile.s1, :, None]
            f = (z.double() + torch.exp(sink - m.squeeze(-1).double())).reciprocal_().to(g.dtype)
        tile.f = f if bounded else f.masked_fill_(self.m[at] == float("-inf"), 0.0)

    def _first_maximum(self, tile: Tile, m: Tensor) -> Tensor:
        """Absolute position of the first key that reaches the row maximum m, [streams, G, R]."""
        g = self.geometry
        streams, group, size = tile.shape
        rows, blocks = streams * group * size, tile.stride // g.unit
        assert tile.maxima is not None
        which = tile.maxima.argmax(-1)
        if self._row_number.shape[0] != rows or self._blocks != blocks:
            self._row_number, self._blocks = torch.arange(rows, device=g.device) * blocks, blocks
        flat = (which.view(-1) + self._row_number).add_(tile.left // g.unit)
        # [rows, unit]: the block of scores that holds the maximum; ramp falls with the key, so its largest value marks the first hit
        block = tile.x_store.view(-1, g.unit).index_select(0, flat)
        hits = torch.eq(block, m.view(-1, 1)).to(g.dtype).mul_(self._ramp)
        offset = g.unit - hits.amax(-1).to(torch.int64)
        return which.mul_(g.unit).add_(offset.view(streams, group, size)).add_(tile.first_key)

    _blocks = -1

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
        return self.geometry.by_head(self.sinks)[:, :, None]

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
        self.sums = torch.zeros(g.streams, g.group, g.padded_rows, dtype=g.dtype, device=g.device)

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """None."""
        return 0, 0

    def add(self, tile: Tile) -> None:
        """Sum the first columns."""
        first = self.first[tile.b or 0] - tile.first_key
        begin, end = max(first, 0), min(first + self.count, tile.n)
        if begin < end:
            torch.sum(tile.e[..., begin:end], -1, out=self.sums[tile.s0 : tile.s1, :, tile.rows])

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Divide."""
        rows.put(out, "sink_mass", self.geometry.own(self.sums).double() * rows.factor())


class ClassMass:
    """class_mass: the weight on the keys of each label, by a product with the labels' one-hot matrix, block of keys by block of keys."""

    def __init__(self, call: AttentionCall, request: StatisticsRequest, geometry: Geometry) -> None:
        g = self.geometry = geometry
        assert request.labels is not None
        classes = request.classes
        labels = at_positions(request.labels.to(g.device), g.first_key, g.end_key - g.first_key, -1)
        self.one_hot = (labels[..., None] == torch.arange(classes, device=g.device)).to(g.dtype)
        self.sums = torch.zeros(g.streams, g.group, g.padded_rows, classes, dtype=torch.float64, device=g.device)

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """None."""
        return 0, 0

    def add(self, tile: Tile) -> None:
        """Product of every key block with its one-hot rows, added in float64."""
        g = self.geometry
        table = self.one_hot[tile.b or 0] if self.one_hot.shape[0] > 1 else self.one_hot[0]
        first = tile.first_key - g.first_key
        total = tile.e_store.shape[0]
        blocks = tile.n // g.unit
        weights = tile.matrices(total)[0].view(total, blocks, g.unit).transpose(0, 1)
        masses = torch.bmm(weights, table[first : first + tile.n].view(blocks, g.unit, -1)).sum(0, dtype=torch.float64)
        self.sums[tile.s0 : tile.s1, :, tile.rows] = masses.view(*tile.shape, -1)

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Divide."""
        rows.put(out, "class_mass", self.geometry.own(self.sums) * rows.factor()[..., None])
