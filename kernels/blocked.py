"""Attention statistics on any device in plain PyTorch: exact, in O(N) memory, in one pass over the scores.

A GPU kernel sees a row's keys block by block and therefore needs an online softmax and, because a row's normaliser is known last, a second
sweep for everything that sums over queries. On a CPU a few rows against all their keys fit in the cache at once, so a tile holds whole rows:
scores are computed once, and row, column and map statistics are read off the same tile.

What keeps float32 within 1e-5 of a float64 matrix, where the obvious formulas lose digits:

- entropy is ln Z + sum e (m - s) / Z, with m the row's largest score; lse - sum A s cancels when scores are large;
- no distance is t - E[s] (see blocked_distance) and no mass is one minus another;
- sums over many keys go through short blocks, which are then added in float64: a long running sum of equal numbers drifts one way.

Differences m - s are cut at 70: a weight of exp(-70) = 4e-31 of the row's largest stands for anything below it. exp of a more negative number is
denormal or underflows, and either makes a CPU an order of magnitude slower. Hidden keys weigh exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from headscope.kernels.blocked_columns import ColumnSums, Diagonals, SegmentMass
from headscope.kernels.blocked_distance import Distances
from headscope.kernels.blocked_rows import ClassMass, RowSums, SinkMass
from headscope.kernels.counts import eligible_rows, row_counts
from headscope.kernels.gather import exact_pairs
from headscope.kernels.geometry import ENTRIES, Geometry, Span
from headscope.kernels.hiding import Hiding
from headscope.kernels.tile import Tile, tile_of
from headscope.statistics.partial import PartialStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest


class Accumulator(Protocol):
    """One family of statistics: told of every tile, asked for its result once."""

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """Columns of zeros needed before and after the keys of a tile."""

    def add(self, tile: Tile) -> None:
        """Take in a tile."""

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Write the results."""


@torch.no_grad()
def measure_blocked(call: AttentionCall, request: StatisticsRequest) -> PartialStatistics:
    """Everything in `request.names` for one call; see PartialStatistics for shapes. Inputs are not changed."""
    out = PartialStatistics(call.query_offset, call.key_offset)
    geometry = Geometry(call, request)
    rows = RowSums(call, request, geometry)
    families = _families(call, request, geometry)
    eligible = eligible_rows(call, request)
    for tile in _tiles(call, request, geometry, rows, families, eligible):
        for family in families:
            family.add(tile)
    rows.finish(out)
    for family in families:
        family.finish(out, rows)
    if request.needs("column_sum", "sink_importance", "fai"):
        seen = rows.seen().any(1)
        out.counts = row_counts(call, request, seen if eligible is None else seen & eligible)
    if request.needs("pairs"):
        out.pairs = exact_pairs(call, rows.lse(), request.pairs)
    return out


def _families(call: AttentionCall, request: StatisticsRequest, geometry: Geometry) -> list[Accumulator]:
    """The accumulators that the request needs. Distances come last: they consume the tile."""
    families: list[Accumulator] = []
    if request.needs("sink_mass"):
        families.append(SinkMass(call, request, geometry))
    if request.needs("class_mass"):
        families.append(ClassMass(call, request, geometry))
    if request.needs("column_sum", "sink_importance", "fai", "block_mass", "block_max"):
        families.append(ColumnSums(call, request, geometry))
    if request.needs("segment_mass"):
        families.append(SegmentMass(call, request, geometry))
    if request.needs("diagonal_sum"):
        families.append(Diagonals(call, request, geometry))
    if request.needs("distance", "distance_sq", "waad", "local_mass"):
        families.append(Distances(call, request, geometry))
    return families


def _tiles(
    call: AttentionCall,
    request: StatisticsRequest,
    g: Geometry,
    rows: RowSums,
    families: list[Accumulator],
    eligible: Tensor | None,
) -> Iterator[Tile]:
    """Every tile in turn, finished: weights computed, row sums taken. A tile is valid until the next one is asked for."""
    softcap = call.softcap
    q = g.queries(call, call.scale if softcap is None else call.scale / softcap)
    k = call.k.to(g.dtype)
    k = k if k.stride(-1) == 1 else k.contiguous()
    hiding = Hiding(call, g)
    counting = _counting(call, g, eligible)
    whole = counting.view(g.batch, g.tiles, g.tile_rows).all(-1).tolist()
    weights = g.per_stream(counting.to(g.dtype))
    buffers = torch.empty(2, 0, dtype=g.dtype, device=g.device)
    for streams, b, valid in _groups(call, request, g):
        for number in range(g.tiles):
            span = g.span(number, valid)
            if span.begin >= span.end:
                continue
            start = g.tile_start(number)
            first_key = (g.k0 + span.begin) // g.unit * g.unit
            n = -(-(g.k0 + span.end) // g.unit) * g.unit - first_key
            left = right = 0
            for family in families:
                margins = family.margins(start, first_key, n)
                left, right = max(left, margins[0]), max(right, margins[1])
            left, right = -(-left // g.unit) * g.unit, -(-right // g.unit) * g.unit
            entries = g.group * g.tile_rows * (left + n + right)
            step = min(max(ENTRIES // entries, 1), streams.stop - streams.start)
            if buffers.shape[1] < step * entries:
                buffers = torch.empty(2, step * entries, dtype=g.dtype, device=g.device)
            for s0 in range(streams.start, streams.stop, step):
                s1 = min(s0 + step, streams.stop)
                shape = (s1 - s0, g.group, g.tile_rows)
                stores = tile_of((buffers[0], buffers[1]), shape, left, n, right)
                heads = slice(s0 % g.kv_heads, (s1 - 1) % g.kv_heads + 1)
                patches = hiding.patches(number, first_key, n, span, b or 0, heads)
                tile = Tile(number, s0, s1, b, start, first_key, n, span, left, right, patches, *stores, g.unit)
                _score(call, g, hiding, tile, q, k, heads)
                rows.add(tile)
                if tile.f is not None:
                    full = whole[b][number] if b is not None else all(row[number] for row in whole)
                    tile.w = tile.f if full else tile.f * weights[s0:s1, :, tile.rows]
                yield tile


def _score(call: AttentionCall, g: Geometry, hiding: Hiding, tile: Tile, q: Tensor, k: Tensor, heads: slice) -> None:
    """Scores of a tile into x, -inf where hidden."""
    begin, end = tile.span
    column = tile.left + g.k0 + begin - tile.first_key
    scores = tile.x_store.view(tile.s1 - tile.s0, -1, tile.stride)[..., column : column + end - begin]
    for i, s in enumerate(range(tile.s0, tile.s1)):
        torch.mm(q[s, tile.number], k[s // g.kv_heads, s % g.kv_heads, begin:end].t(), out=scores[i])
    if call.softcap is not None:
        scores.tanh_().mul_(call.softcap)
    if call.mask.bias is not None:
        top, bottom = g.own_rows(tile.number)
        first = tile.start + top - g.q0
        bias = hiding.of_streams(call.mask.bias, tile.b or 0, heads)[..., first : first + bottom - top, begin:end]
        column -= tile.left
        tile.x[:, :, top:bottom, column : column + end - begin].add_(bias)
    for patch in tile.patches:
        patch.fill(tile.x, float("-inf"))


def _counting(call: AttentionCall, g: Geometry, eligible: Tensor | None) -> Tensor:
    """[B, padded rows] bool: the row is in the call and eligible."""
    out = torch.zeros(g.batch, g.padded_rows, dtype=torch.bool, device=g.device)
    out[:, g.lead : g.lead + g.rows] = True if eligible is None else eligible
    return out


def _groups(call: AttentionCall, request: StatisticsRequest, g: Geometry) -> list[tuple[range, int | None, Span]]:
    """Streams that share one geometry, the batch element they are of (None: any), and their first and last real key."""
    everything = Span(0, g.keys)
    mask = call.mask
    tables = (request.labels if request.needs("class_mass") else None, request.segments if request.needs("segment_mass") else None)
    per_batch = mask.query_segments is not None or mask.allowed is not None or mask.bias is not None
    per_batch |= any(table is not None and table.dim() > 1 for table in tables)
    per_batch |= request.needs("sink_mass") and call.first_token is not None
    valid = mask.key_valid
    if valid is not None and bool(valid.all()):
        valid = None
    if g.batch == 1 and valid is None:
        return [(range(g.streams), 0, everything)]
    if not per_batch and valid is None:
        return [(range(g.streams), None, everything)]
    out: list[tuple[range, int | None, Span]] = []
    for b in range(g.batch):
        span = everything
        if valid is not None:
            real = valid[b].nonzero().flatten()
            span = Span(int(real[0]), int(real[-1]) + 1) if real.numel() else Span(0, 0)
        out.append((range(b * g.kv_heads, (b + 1) * g.kv_heads), b, span))
    return out
