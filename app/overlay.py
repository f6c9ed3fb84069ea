"""What a plan would drop of a head's map, and the mass that would go with it.

A pattern is a rule on positions, so the kept share of a block is a count. Blocks of more than eight tokens are counted on some of their
rows (all their keys), which the page says; the lost mass is a sum over exact rows where q and k were kept, and over the stored map, whose
cells are then taken as spread evenly, where they were not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headscope.app.tiles import Geometry
from headscope.errors import RunError, refusal

if TYPE_CHECKING:
    from headscope.app.exact import ExactHead
    from headscope.plans import SparsePlan
    from headscope.plans.patterns import Pattern

ENTRIES = 1 << 22
"""Entries of a rule looked at in one step."""
WHOLE_ROWS = 8
"""Blocks up to this size are counted on every row."""
QUERIES = 16
LONGEST_CHOICE = 16_384
"""Tokens up to which a rule that reads q and k is carried out here."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Mass that a pattern drops: `mean` and `worst` over the queries (`at`: where), `queries` of them, `exact` or from the block map."""

    mean: float
    worst: float
    at: int
    queries: int
    exact: bool


def static_pattern(plan: SparsePlan, layer: int, head: int, exact: ExactHead | None, shape: Geometry) -> Pattern:
    """The head's pattern as a rule on positions. RunError for a rule that depends on the input and cannot be carried out here."""
    pattern = plan[layer, head]
    if pattern.static:
        return pattern
    what = f"{pattern.kind} of head {layer}.{head}"
    if pattern.kind in ("budget", "topkeys", "top_keys"):
        raise refusal(RunError, what, "it drops keys while decoding, not in this map", "read its numbers on the plan's page")
    source = getattr(pattern, "source", None)
    if source is not None:
        raise refusal(RunError, what, f"it takes over the keys of head {source[0]}.{source[1]}", "open that head")
    if exact is None:
        raise refusal(RunError, what, "its keys are chosen from q and k, which were not kept", f"profile again with keep=({layer},)")
    if shape.tokens > LONGEST_CHOICE:
        why = f"its keys are chosen from q and k, which takes too long for {shape.tokens:,} tokens here"
        raise refusal(RunError, what, why, f"look at it in a run of at most {LONGEST_CHOICE:,} tokens")
    from headscope.plans.indices import choose
    from headscope.store.kept import window_call

    return choose(window_call(exact.layer, exact.head, 0, shape.tokens, 0, shape.tokens), 0, pattern)


def kept_share(pattern: Pattern, shape: Geometry, block: int, i: int, j: int) -> np.ndarray:
    """[rows, columns] float32 of a tile: kept share of the entries that causality leaves, NaN where it leaves none."""
    (q0, q1), (k0, k1) = shape.span(block, i), shape.span(block, j)
    rows, columns = -(-(q1 - q0) // block), -(-(k1 - k0) // block)
    looked = np.unique(np.concatenate([_rows_of(q0 + row * block, min(q0 + (row + 1) * block, q1), block) for row in range(rows)]))
    kept, seen = np.zeros((rows, columns)), np.zeros((rows, columns))
    starts = np.arange(columns) * block
    step = max(ENTRIES // max(k1 - k0, 1), 1)
    for first in range(0, looked.size, step):
        part = looked[first : first + step]
        visible, allowed = _visible(pattern, shape, part, k0, k1)
        at = (part - q0) // block
        np.add.at(kept, at, np.add.reduceat(visible & allowed, starts, axis=1, dtype=np.float64))
        np.add.at(seen, at, np.add.reduceat(allowed, starts, axis=1, dtype=np.float64))
    return np.where(seen > 0, kept / np.maximum(seen, 1), np.nan).astype(np.float32)


def loss(pattern: Pattern, shape: Geometry, exact: ExactHead | None, block: int, coarse: np.ndarray) -> Loss:
    """The lost mass. `coarse`: the stored map at a level of one tile, mass per query, cells of `block`; used where no row is exact."""
    if exact is not None:
        queries = np.unique(np.linspace(min(64, shape.tokens - 1), shape.tokens - 1, QUERIES).astype(np.int64))
        lost = []
        for query in queries.tolist():
            weights = exact.row(query).astype(np.float64)
            visible, _ = _visible(pattern, shape, np.array([query]), 0, weights.size)
            lost.append(float(np.nansum(weights[~visible[0]])))
        worst = int(np.argmax(lost))
        return Loss(float(np.mean(lost)), lost[worst], int(queries[worst]), len(lost), True)
    share = kept_share(pattern, shape, block, 0, 0)
    per_row = np.nansum(np.where(np.isfinite(share), (1 - share) * coarse, 0), axis=1)
    worst = int(per_row.argmax())
    return Loss(float(per_row.mean()), float(per_row[worst]), worst * block, shape.tokens, False)


def _rows_of(first: int, last: int, block: int) -> np.ndarray:
    if block <= WHOLE_ROWS:
        return np.arange(first, last)
    count = 4 if block <= 32 else 2 if block <= 128 else 1
    return first + ((np.arange(count) + 0.5) * (last - first) / count).astype(np.int64)


def _visible(pattern: Pattern, shape: Geometry, rows: np.ndarray, k0: int, k1: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    keys = torch.arange(k0, k1)
    visible = pattern.visible(torch.from_numpy(rows), keys).numpy()
    allowed = keys.numpy()[None, :] <= rows[:, None] if shape.causal else np.ones_like(visible)
    return visible, allowed


__all__ = ["Loss", "kept_share", "loss", "static_pattern"]
