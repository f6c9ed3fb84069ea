"""The statistics, one row each: what they are called, their shape, and what it takes to compute them.

This table is the only place that knows a statistic's name; requests, kernels, the result container, the run directory and the docs
derive from it. A is the matrix that weighs the values, A[t, s] = exp(score[t, s] - lse[t]), with t and s absolute positions. Where a
model has sink logits, its rows sum to less than one and the deficit is `sink_logit_mass`; nothing is renormalised.

Kinds and shapes (B batch, H query heads, Nq query rows, Nk keys, n blocks):

    row       [B, H, Nq]          one number per query row; NaN (argmax: -1) on padded rows and on rows that see no key
    row_class [B, H, Nq, C]       the same, per key label
    column    [B, H, Nk]          a sum or mean over the query rows that count
    map       [B, H, nq, nk]      per block of queries and keys, blocks aligned to absolute position 0
    diagonal  [B, H, R]           per distance t - s = 0 .. R - 1 (bidirectional: see `diagonal_sum`)
    pairs     [B, H, P]           exact entries A[t, s] at asked places
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headscope.errors import StatisticError, unknown_name

Kind = Literal["row", "row_class", "column", "map", "diagonal", "pairs"]


@dataclass(frozen=True, slots=True)
class Definition:
    """One statistic. `sweep` 1 needs keys only, 2 needs every row's lse first; `needs` names the request's fields it reads."""

    name: str
    kind: Kind
    sweep: Literal[1, 2]
    formula: str
    unit: str
    meaning: str
    needs: tuple[str, ...] = ()


_TABLE = (
    Definition("lse", "row", 1, "ln(sum_s exp(score) + exp(sink logit))", "nats", "normaliser of the row, natural logarithm"),
    Definition("entropy", "row", 1, "-sum_s A ln A", "nats", "spread of the row over its keys"),
    Definition("row_max", "row", 1, "max_s A", "probability", "largest weight of the row"),
    Definition("argmax", "row", 1, "argmax_s A", "absolute position", "key of the largest weight, the first of equals; int64"),
    Definition("distance", "row", 1, "sum_s A |t - s|", "tokens", "mean look-back distance"),
    Definition("distance_sq", "row", 1, "sum_s A (t - s)^2", "tokens^2", "second moment of the distance"),
    Definition("waad", "row", 1, "sum_s A min(|t - s|, W)", "tokens", "windowed average attention distance", ("waad_window",)),
    Definition("sink_mass", "row", 1, "sum_{s < first + k0} A", "probability", "weight on the first k0 real tokens", ("sink_tokens",)),
    Definition(
        "local_mass", "row", 1, "sum_{|t - s| < w} A", "probability", "weight on the w nearest keys, self included", ("local_window",)
    ),
    Definition("sink_logit_mass", "row", 1, "exp(sink logit - lse)", "probability", "weight that a learned sink logit takes from the row"),
    Definition("class_mass", "row_class", 1, "sum_{label(s) = c} A", "probability", "weight on the keys of each label", ("labels",)),
    Definition("column_sum", "column", 2, "sum_t A", "probability", "weight that a key receives from all rows that count"),
    Definition(
        "sink_importance",
        "column",
        2,
        "sum_t A / #{t >= s}",
        "probability",
        "mean weight that a key receives from itself and later rows; bidirectional: from all rows",
    ),
    Definition(
        "fai",
        "column",
        2,
        "mean_{s+lo <= t <= s+hi} A",
        "probability",
        "future attention influence; NaN where the band is empty",
        ("fai_band",),
    ),
    Definition("block_mass", "map", 2, "sum over the block of A", "probability", "weight per block of queries and keys", ("block",)),
    Definition("block_max", "map", 2, "max over the block of A", "probability", "largest weight per block of queries and keys", ("block",)),
    Definition(
        "segment_mass", "map", 2, "sum over the segment pair of A", "probability", "weight per pair of text segments", ("segments",)
    ),
    Definition(
        "diagonal_sum", "diagonal", 2, "sum_t A[t, t - d]", "probability", "weight at each distance d; bidirectional: index d + N - 1"
    ),
    Definition("pairs", "pairs", 2, "A[t, s]", "probability", "exact weights at chosen (query, key) places", ("pairs",)),
)

DEFINITIONS: dict[str, Definition] = {row.name: row for row in _TABLE}
"""Every statistic by name, in the order of the table."""

PASSIVE = tuple(name for name in DEFINITIONS if name not in {"sink_logit_mass", "class_mass", "segment_mass", "pairs", "diagonal_sum"})
"""What needs nothing but the text: the default of a capture."""


def definition(name: str) -> Definition:
    """The definition of a statistic; raises StatisticError that lists the names when there is none."""
    if name not in DEFINITIONS:
        raise unknown_name(StatisticError, "statistic", name, DEFINITIONS)
    return DEFINITIONS[name]
