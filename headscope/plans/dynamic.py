"""Dynamic patterns: which keys a head sees is chosen per input.

A dynamic pattern is the recipe, with its sizes; `headscope.plans.indices` reads q and k of a call and gives the static pattern that it
comes to there. Counts are what the sizes promise. Where only statistics can say how much a rule keeps (a share of mass), the count is
that of dense attention, so that no plan looks cheaper than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.patterns import BLOCK, Pattern


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """`vertical` columns and `slash` diagonals chosen per input from the last `last_q` rows (MInference, arXiv:2407.02490); the first
    `sink` columns and the last `window` diagonals are always among them. Prefill only: decoding is dense. `expected`: the share of the
    causal entries that this was measured to keep; None where nobody measured, and then it counts as many entries as it has lines.
    """

    vertical: int
    slash: int
    last_q: int = 64
    sink: int = 30
    window: int = 100
    expected: float | None = None
    kind = "vertical_slash"
    static = False

    def check(self) -> None:
        self._whole(0, "vertical", "sink")
        self._whole(1, "slash", "last_q", "window")
        if self.expected is not None and not 0 < self.expected <= 1:
            raise refusal(PlanError, f"expected={self.expected}", "it is a part of the entries", "use 0 < expected <= 1")

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """PlanError: it depends on the input."""
        raise _dynamic(self)

    def kept(self, length: int) -> float:
        if self.expected is not None:
            return self.expected * length * (length + 1) / 2
        return min(length * (length + 1) / 2, length * float(max(self.vertical, self.sink) + max(self.slash, self.window)))

    def cached(self, length: int) -> float:
        return length


@dataclass(frozen=True)
class TopBlocks(Pattern):
    """Per row tile, the key tiles that an estimate of the block masses ranks first: `share` of them, or as many as reach `mass`.

    `rule`: "pooled" (mean queries against mean keys, MInference, FlexPrefill arXiv:2502.20766), "antidiagonal" (strided sums, XAttention
    arXiv:2503.16428), "anchor" (scores against an anchor's maximum less `mass` nats, AnchorAttention arXiv:2505.23520), "exact" (the block
    masses themselves). The first tile and the diagonal one are always kept. `expected`: with `mass`, the share of the causal entries that
    this was measured to keep; None where nobody measured, and then it counts as dense.
    """

    share: float | None = None
    mass: float | None = None
    rule: Literal["pooled", "antidiagonal", "anchor", "exact"] = "pooled"
    block: int = BLOCK
    stride: int = 16
    expected: float | None = None
    kind = "top_blocks"
    static = False

    def check(self) -> None:
        self._whole(1, "block", "stride")
        if self.expected is not None and not 0 < self.expected <= 1:
            raise refusal(PlanError, f"expected={self.expected}", "it is a part of the entries", "use 0 < expected <= 1")
        if (self.share is None) == (self.mass is None):
            raise refusal(
                PlanError, f"share={self.share}, mass={self.mass}", "one of them says how many tiles are kept", "give exactly one"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise refusal(PlanError, f"share={self.share}", "it is a part of the tiles", "use 0 < share <= 1")
        if self.mass is not None and not (0 < self.mass <= 1 or (self.rule == "anchor" and self.mass > 0)):
            raise refusal(PlanError, f"mass={self.mass}", "it is a part of the attention mass", "use 0 < mass <= 1")
        if self.rule not in ("pooled", "antidiagonal", "anchor", "exact"):
            raise unknown_name(PlanError, "rule", self.rule, ("pooled", "antidiagonal", "anchor", "exact"))

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """PlanError: it depends on the input."""
        raise _dynamic(self)

    def kept(self, length: int) -> float:
        part = self.share if self.share is not None else self.expected or 1.0  # how many tiles a mass needs is known from statistics only
        return max(part * length * (length + 1) / 2, min(length, self.block) * length / 2)

    def cached(self, length: int) -> float:
        return length


@dataclass(frozen=True)
class Budget(Pattern):
    """After a dense prefill, the `keep` keys that the last `window` rows weigh most, and those rows' own keys (SnapKV, arXiv:2404.14469;
    HeadKV gives each head a budget of its own). `pool`: width of the mean filter over the scores. `sink`: first keys that are always among
    the `keep`; `recent`: last keys that stay beside them, `window` at least (Task-KV, arXiv:2501.15113).

    `grouped`: the query heads of a key head choose together, by their mean weights, so that heads of one budget share their keys and the
    cache holds `keep` of them and not the union of what each head would have chosen.
    """

    keep: int
    window: int = 32
    pool: int = 5
    sink: int = 0
    recent: int = 0
    grouped: bool = True
    kind = "budget"
    static = False

    def check(self) -> None:
        self._whole(0, "keep", "sink", "recent")
        self._whole(1, "window", "pool")
        if self.sink > self.keep:
            raise refusal(PlanError, f"budget with sink={self.sink}", f"they are among keep={self.keep}", "keep more, or a smaller sink")

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """PlanError: it depends on the input."""
        raise _dynamic(self)

    def kept(self, length: int) -> float:
        return length * (length + 1) / 2

    def cached(self, length: int) -> float:
        return min(length, self.keep + max(self.window, self.recent))


@dataclass(frozen=True)
class TopKeys(Pattern):
    """Decoding only: per step the `keep` keys of largest weight, chosen by this head itself every `refresh` steps, or taken over from
    `source` = (layer, head), a layer before it (TidalDecode arXiv:2410.05076, HyLRA arXiv:2602.00777). With `full`, the head chooses keys
    for others and sees every key itself.

    With `block` > 1 whole blocks of that many keys are chosen, without reading them, by an `estimate` from what stands for each: "bounds",
    the largest score that its smallest and largest coordinates allow (Quest, arXiv:2406.10774), or "mean", the score of its mean key.

    `grouped`: the query heads of a key head choose together, by the mean of their weights (of the softmax of their estimates), so that a
    step reads the keys of one choice and not of their union.
    """

    keep: int
    refresh: int = 1
    source: tuple[int, int] | None = None
    sink: int = 4
    window: int = 64
    full: bool = False
    block: int = 1
    estimate: Literal["exact", "bounds", "mean"] = "exact"
    grouped: bool = False
    kind = "top_keys"
    static = False

    def check(self) -> None:
        self._whole(1, "keep", "refresh", "window", "block")
        self._whole(0, "sink")
        if self.estimate not in ("exact", "bounds", "mean"):
            raise unknown_name(PlanError, "estimate", self.estimate, ("exact", "bounds", "mean"))
        if (self.estimate == "exact") != (self.block == 1) or self.block > 128 or self.block & (self.block - 1):
            raise refusal(
                PlanError,
                f"top_keys with block={self.block}, estimate={self.estimate!r}",
                "single keys are chosen by their exact scores, blocks of 2, 4, .. 128 keys by bounds or means",
                'give e.g. block=32, estimate="bounds"',
            )
        if not isinstance(self.full, bool) or (self.full and self.source is not None):
            raise refusal(
                PlanError, f"full={self.full!r}, source={self.source}", "a head that takes keys over cannot see all", "give one of them"
            )
        if self.source is not None:
            object.__setattr__(self, "source", (int(self.source[0]), int(self.source[1])))

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """PlanError: it depends on the input."""
        raise _dynamic(self)

    def kept(self, length: int) -> float:
        return length * (length + 1) / 2

    def cached(self, length: int) -> float:
        return length


def _dynamic(pattern: Pattern) -> PlanError:
    return refusal(PlanError, f"the mask of {pattern}", "its keys are chosen per input", "build them from a call (headscope.plans.indices)")
