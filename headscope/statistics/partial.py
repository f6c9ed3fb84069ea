"""PartialStatistics: what one attention call contributes, in a form that can be added to what earlier calls of the sequence gave.

A sequence reaches attention in pieces: one prefill, a chunk at a time, then a row at a time. Kernels therefore return sums and counts,
never means; the container divides once, at the end. All positions are absolute, and blocks of maps are aligned to absolute position 0,
so pieces of any length meet in the same cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class PartialStatistics:
    """Sums of one call. float32 tensors (float64 when the call's q is float64) on the call's device, argmax int64.

    - `rows`: name -> [B, H, Nq] (`class_mass`: [B, H, Nq, C]); final values, NaN (argmax -1) on rows that do not count.
    - `columns`: "column_sum" and, for `fai`, "fai_sum": [B, H, Nk] sums over the rows that count.
    - `counts`: "row_count" [B, Nk], how many of this call's counting rows have t >= s (bidirectional: all counting rows), and
      "fai_count" [B, Nk], how many lie in the band; int64. A padded key has count 0.
    - `maps`: "block_mass", "block_max": [B, H, nq, nk], cell [0, 0] being block (query_offset // block, key_offset // block) of the
      absolute grid; "segment_mass": [B, H, S, S].
    - `diagonals`: [B, H, R] and `diagonal_start`, the distance t - s of entry 0 (0 for causal calls, negative otherwise).
    - `pairs`: name -> [B, H, P], NaN where the pair's query or key is not in this call.
    """

    query_offset: int
    key_offset: int
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    diagonals: Tensor | None = None
    diagonal_start: int = 0
    pairs: dict[str, Tensor] = field(default_factory=dict)
