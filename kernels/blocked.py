"""Attention statistics on any device in plain PyTorch: exact, in O(N) memory, in one pass over the scores.

A GPU kernel sees a row's keys block by block and therefore needs an online softmax and, because a row's normaliser is known last, a second
sweep for everything that sums over queries. On a CPU a few rows against all their keys fit in the cache at once, so a tile holds whole
rows: scores are computed once, and row, column and map statistics are read off the same tile.

What keeps float32 within 1e-5 of a float64 matrix, where the obvious formulas lose digits:

- entropy is ln Z + sum e (m - s) / Z, with m the row's largest score; lse - sum A s cancels when scores are large;
- no distance is t - E[s] (see blocked_distance) and no mass is one minus another;
- sums over many keys go through short blocks, which are then added in float64: a long running sum of equal numbers drifts one way.

Differences m - s are cut at 70: a weight of exp(-70) = 4e-31 of the row's largest stands for anything below it. exp of a more negative
number is denormal or underflows, and either makes a CPU an order of magnitude slower. Hidden keys weigh exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from headscope.kernels import geometry as tuning
from headscope.kernels.blocked_columns import ColumnSums, Diagonals, SegmentMass
from headscope.kernels.blocked_distance import Distances
from headscope.kernels.blocked_rows import ClassMass, RowSums, SinkMass
from headscope.kernels.counts import eligible_rows, row_counts
from headscope.kernels.gather import exact_pairs
from headscope.kernels.geometry import Geometry, Span
from headscope.kernels.parts import run_parts
from headscope.kernels.scoring import Scoring
from headscope.kernels.tile import Tile
from headscope.statistics.partial import PartialStatistics

if TYPE_CHECKING:
    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest


MOST_THREADS = 8
"""Threads that one call is dealt out to; beyond this they wait for the interpreter more than they compute."""
FEW_ENTRIES = 1 << 20
"""Entries of A per thread below which one thread does it all."""


class Accumulator(Protocol):
    """One family of statistics: told of every tile, asked for its result once."""

    def margins(self, start: int, first_key: int, n: int) -> tuple[int, int]:
        """Columns of zeros needed before and after the keys of a tile."""

    def add(self, tile: Tile) -> None:
        """Take in a tile."""

    def merge(self, other: Any) -> None:
        """Take in what another part of the call gave to an accumulator of the same kind."""

    def finish(self, out: PartialStatistics, rows: RowSums) -> None:
        """Write the results."""


def measure_blocked(call: AttentionCall, request: StatisticsRequest) -> PartialStatistics:
    """Everything in `request.names` for one call; see PartialStatistics for shapes. Inputs are not changed.

    Row tiles are dealt out to as many threads as torch may use (see parts). Every thread adds up its own tiles and the sums are joined in a
    fixed order, so the result depends on the number of threads to rounding, and never on their timing.
    """
    geometry = Geometry(call, request)
    with torch.no_grad():
        shared = Scoring(call, request, geometry)

        def run(part: int, parts: int) -> tuple[RowSums, list[Accumulator]]:
            with torch.no_grad():
                rows, families = RowSums(call, request, geometry), _families(call, request, geometry)
                scoring = shared.part(rows)
                for tile in _tiles(call, request, geometry, scoring, families, part, parts):
                    for family in families:
                        family.add(tile)
                scoring.leave()
                return rows, families

        parts = min(torch.get_num_threads(), MOST_THREADS, geometry.tiles) if geometry.device.type == "cpu" else 1
        if geometry.batch * geometry.heads * geometry.rows * geometry.keys < parts * FEW_ENTRIES:
            parts = 1
        (rows, families), *others = [run(0, 1)] if parts == 1 else run_parts(run, parts)
        for more_rows, more_families in others:
            rows.merge(more_rows)
            for family, more in zip(families, more_families, strict=True):
                family.merge(more)
        return _finish(call, request, rows, families)


def _finish(call: AttentionCall, request: StatisticsRequest, rows: RowSums, families: list[Accumulator]) -> PartialStatistics:
    out = PartialStatistics(call.query_offset, call.key_offset)
    rows.finish(out)
    for family in families:
        family.finish(out, rows)
    if request.needs("column_sum", "sink_importance", "fai"):
        seen, eligible = rows.seen().any(1), eligible_rows(call, request)
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
        families.append(ClassMass(request, geometry))
    if request.needs("column_sum", "sink_importance", "fai", "block_mass", "block_max"):
        families.append(ColumnSums(request, geometry))
    if request.needs("segment_mass"):
        families.append(SegmentMass(request, geometry))
    if request.needs("diagonal_sum"):
        families.append(Diagonals(geometry))
    if request.needs("distance", "distance_sq", "waad", "local_mass"):
        families.append(Distances(request, geometry))
    return families


def _tiles(
    call: AttentionCall, request: StatisticsRequest, g: Geometry, scoring: Scoring, families: list[Accumulator], part: int, parts: int
) -> Iterator[Tile]:
    """This part's row tiles, the last first, weights computed and row sums taken. A tile is valid until the next one is asked for."""
    for streams, b, valid in _groups(call, request, g):
        for number in _dealt(g.tiles, part, parts):
            span = g.span(number, valid)
            if span.begin >= span.end:
                continue
            start = g.tile_start(number)
            first_key = (g.k0 + span.begin) // g.unit * g.unit
            n = -(-(g.k0 + span.end) // g.unit) * g.unit - first_key
            margins = [family.margins(start, first_key, n) for family in families]
            left, right = (-(-max([0, *side]) // g.unit) * g.unit for side in zip(*margins, strict=True)) if margins else (0, 0)
            entries = g.group * g.tile_rows * (left + n + right)
            step = min(max(tuning.ENTRIES // entries, 1), len(streams))
            for first in range(streams.start, streams.stop, step):
                heads = slice(first * g.group, min(first + step, streams.stop) * g.group)
                yield scoring.tile(number, heads, b, first_key, n, span, left, right)


def _dealt(tiles: int, part: int, parts: int) -> list[int]:
    """The tile numbers of one part, descending, dealt back and forth (0, 1, 1, 0, 0, 1, ...).

    A causal tile costs in proportion to its number: dealt round, the threads would wait for the one with the last tile. The largest tile
    comes first so that the memory taken for it serves all the others.
    """
    return [n for n in reversed(range(tiles)) if (n % parts if n // parts % 2 == 0 else parts - 1 - n % parts) == part]


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
