"""Choosing: the base of dynamic patterns that bring their own rule, and what those rules share.

A rule sees one head of one sequence of a prefill call and gives a static pattern, so that whatever executes static patterns executes it.
Rules of this kind act in the prefill only; decoding under them is dense, as in the methods that they come from. All of them work on tiles,
which is why a chunk of a prefill must begin where a tile begins: a tile that is judged by half of its rows would be chosen differently from
one chunk size to the next, and nobody would see it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.errors import PlanError, refusal
from headscope.plans.patterns import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


@dataclass(frozen=True)
class Choosing(Pattern):
    """Base. `expected`: the share of the causal entries that the rule was measured to keep on some text; None where nobody measured, and
    then the pattern counts as dense, so that no plan looks cheaper than it is.
    """

    expected: float | None = field(default=None, kw_only=True)
    static = False

    @abstractmethod
    def choose(self, call: AttentionCall, head: int) -> Pattern:
        """The static pattern for one head of a call of one sequence."""

    def check(self) -> None:
        self._part("expected", self.expected)

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """PlanError: it depends on the input."""
        raise refusal(
            PlanError, f"the mask of {self}", "its keys are chosen per input", "build them from a call: pattern.choose(call, head)"
        )

    def kept(self, length: int) -> float:
        every = length * (length + 1) / 2
        return every if self.expected is None else self.expected * every

    def cached(self, length: int) -> float:
        return length

    def _part(self, name: str, value: float | None) -> None:
        if value is not None and not 0 < value <= 1:
            raise refusal(PlanError, f"{self.kind} with {name}={value!r}", "it is a share", f"use 0 < {name} <= 1")


@dataclass(frozen=True, eq=False)
class OneHead:
    """q [Nq, D] and k [Nk, D] float64 of one head and sequence without padding; `origin`: position of the first row in the text."""

    q: Tensor
    k: Tensor
    origin: int
    scale: float

    @classmethod
    def of(cls, call: AttentionCall, head: int, block: int) -> OneHead:
        """PlanError for a chunk that begins inside a tile of `block` tokens."""
        start = 0 if call.first_token is None else int(call.first_token[0])
        skip_q, skip_k = max(0, start - call.query_offset), max(0, start - call.key_offset)
        origin = call.query_offset + skip_q - start
        if origin % block:
            raise refusal(
                PlanError,
                f"a chunk that starts at position {origin}",
                f"tiles of {block} tokens are chosen whole",
                f"use chunks of a multiple of {block}",
            )
        q, k = call.q[0, head, skip_q:].double(), call.k[0, head // call.group, skip_k:].double()
        return cls(q, k, origin, call.scale)


def tile_means(values: Tensor, block: int) -> Tensor:
    """[N, D] -> [n, D]: mean of each tile; the last may be shorter."""
    return torch.stack([part.mean(0) for part in values.split(block)])


def tile_sums(values: Tensor, block: int) -> Tensor:
    """[N] -> [n]: sum over each tile; the last may be shorter."""
    return torch.nn.functional.pad(values, (0, -len(values) % block)).unflatten(0, (-1, block)).sum(-1)


def fewest(values: Tensor, share: float) -> Tensor:
    """Bool like values [n]: the fewest entries that hold `share` of the sum; of equals the first, and never one that is 0."""
    ranked, order = values.sort(descending=True, stable=True)
    before = ranked.cumsum(0) - ranked
    total = values.sum()
    taken = (before < share * total - 1e-9 * total) & (ranked > 0)  # rounding of the running sum must take no entry more
    return torch.zeros_like(values, dtype=torch.bool).scatter(0, order, taken)


def largest(values: Tensor, count: int) -> Tensor:
    """Bool like values [n]: the `count` largest, the first of equals."""
    order = values.sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(values, dtype=torch.bool).index_fill(0, order, True)
