"""FlexPrefill's choice: which kind of pattern a head needs is decided per input, and how many tiles by the mass that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic_rules import Choosing, OneHead, fewest, largest, tile_means, tile_sums
from headscope.plans.patterns import BLOCK, Blocks
from headscope.plans.remembered import Newest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


@dataclass(frozen=True)
class FlexBlocks(Choosing):
    """Tiles chosen per input as FlexPrefill does (arXiv:2502.20766). Prefill only.

    The last `block` rows of A give the weight per key and per distance. The same rows are estimated from means of tiles; if the square root
    of the Jensen-Shannon divergence of estimate and truth, per tile of keys, is below `tau`, tile means speak for the head, and the
    heaviest tiles of the whole map of tile means are taken until they hold `gamma` of it. Otherwise as many columns and diagonals of tiles
    are taken as keys and distances need to hold `gamma`. Either way `least` columns and diagonals, the heaviest, the first column and the
    main diagonal are kept.

    Departures from the official code: budgets count tiles of `block` where it divides by 128 whatever its block is; the first column and
    the main diagonal come on top of the budget; a tile without weight makes its divergence NaN and the head silently vertical-slash, while
    here 0 log 0 is 0.
    """

    gamma: float = 0.9
    tau: float = 0.1
    block: int = BLOCK
    least: int = 1
    kind = "flex_blocks"

    def check(self) -> None:
        self._whole(1, "block", "least")
        self._part("gamma", self.gamma)
        super().check()
        if not self.tau >= 0:
            raise refusal(PlanError, f"{self.kind} with tau={self.tau!r}", "a divergence is not negative", "use tau=0.1")

    def choose(self, call: AttentionCall, head: int) -> Blocks:
        """The tiles for one head of a call of one sequence. Time O(N^2 / block^2 + N block)."""
        seen, size = _newest.of(call, (head, self.block), lambda: _Seen.of(call, head, self.block)), self.block
        count, first = len(seen.masses), seen.first
        aware = root_divergence(seen.estimate, seen.masses / seen.masses.sum()) < self.tau
        budgets = [
            self.least if aware else min(max(int(fewest(part, self.gamma).sum()) // size + 1, self.least), count)
            for part in (seen.columns, seen.diagonals)
        ]
        column, diagonal = largest(seen.masses, budgets[0]), largest(tile_sums(seen.diagonals, size), budgets[1])
        column[0] = diagonal[0] = True
        behind = torch.arange(first, count)[:, None] - torch.arange(count)
        chosen = column[None, :] | diagonal[behind.clamp_min(0)]
        if aware:
            weights = torch.softmax(seen.scores.masked_fill(behind < 0, -torch.inf), -1)
            chosen |= fewest(weights.flatten(), self.gamma).view_as(chosen)
        chosen &= behind >= 0
        listed = [tuple(row.nonzero().flatten().tolist()) for row in chosen]
        return Blocks((*(tuple(range(tile + 1)) for tile in range(first)), *listed), size)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is read of a head before anything is chosen: weight per key and per distance of the last rows, per tile of keys (`masses`) and
    as tile means estimate it, and the scores of tile means; `first`: the number of the first row tile.
    """

    columns: Tensor
    diagonals: Tensor
    masses: Tensor
    estimate: Tensor
    scores: Tensor
    first: int

    @classmethod
    def of(cls, call: AttentionCall, head: int, size: int) -> _Seen:
        from headscope.plans.indices import last_weights

        one = OneHead.of(call, head, size)
        rows, first_row = last_weights(call, head, size)
        keys = tile_means(one.k, size)
        distances = torch.zeros(rows.shape[1], dtype=rows.dtype)
        for place, row in enumerate(rows):
            distances[: first_row + place + 1] += row[: first_row + place + 1].flip(0)
        columns = rows.mean(0)
        estimate = torch.softmax(one.q[-len(rows) :].mean(0) @ keys.T * one.scale, -1).cpu()
        scores = (tile_means(one.q, size) @ keys.T * one.scale).cpu()
        return cls(columns, distances / len(rows), tile_sums(columns, size), estimate, scores, one.origin // size)


_newest: Newest[_Seen] = Newest()


def root_divergence(p: Tensor, q: Tensor) -> float:
    """Square root of the Jensen-Shannon divergence of two distributions [n], in nats."""
    middle = (p + q) / 2
    parts = [(torch.special.xlogy(one, one) - torch.special.xlogy(one, middle)).sum() for one in (p, q)]
    return float((0.5 * (parts[0] + parts[1])).clamp_min(0.0).sqrt())
