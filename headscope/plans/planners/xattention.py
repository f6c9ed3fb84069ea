"""XAttention: tiles by the sums along their antidiagonals, as many as hold a share of the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic import TopBlocks
from headscope.plans.dynamic_curves import allocate, curves_of
from headscope.plans.patterns import BLOCK, Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, Requires, share, whole

THRESHOLDS = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Settings that are tried per head."""


@dataclass(frozen=True)
class XAttention(Planner):
    """Prefill: per row tile, the fewest key tiles that hold `threshold` of an estimate by strided antidiagonal sums, and the first and the
    diagonal tile. One threshold for all heads (0.9 by default).

    Thresholds per head are measured on the live model: with `recall`, each head's smallest threshold whose tiles hold that share of its
    attention; with `density`, the thresholds that hold most of the attention, all heads together, within the bound. `text` is what they are
    measured on (None: a bundled essay).

    Departures: the paper searches thresholds with a dynamic programme over task accuracy; here each head's own kept attention is the value,
    which one pass measures. The forced tiles come on top of the share. Block size, stride and thresholds are the official ones.
    """

    threshold: float | None = None
    recall: float | None = None
    stride: int = 16
    block: int = BLOCK
    text: str | None = None

    name: ClassVar[str] = "xattention"
    source: ClassVar[str] = "XAttention, arXiv:2503.16428, mit-han-lab/x-attention"
    requires: ClassVar[Requires] = Requires()
    dials: ClassVar[tuple[str, ...]] = ("threshold", "recall")
    bounds: ClassVar[tuple[str, ...]] = ("density",)

    def check(self) -> None:
        whole(self.name, "stride", self.stride, 1)
        whole(self.name, "block", self.block, 1)
        if self.block % self.stride:
            raise refusal(PlanError, f"block={self.block}, stride={self.stride}", "a tile is made of whole strides", "use stride=8 or 16")
        for field in ("threshold", "recall"):
            if getattr(self, field) is not None:
                share(self.name, field, getattr(self, field))
        if self.threshold is not None and self.recall is not None:
            raise refusal(PlanError, "threshold beside recall", "each says how much is kept", "pass one of them")

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        if self.density is None and self.recall is None:
            evidence.note("a threshold's density is known per input; pass density= or recall= with a live model to have it measured")
            return dict.fromkeys(evidence.model.places, self._rule(0.9 if self.threshold is None else self.threshold, None))
        found = curves_of(evidence, [self._rule(one, None) for one in THRESHOLDS], self.text)
        if self.density is not None:
            chosen = allocate(self.density, found)
        else:
            enough = found.mass >= float(self.recall or 1.0)
            chosen = [int(np.argmax(column)) if column.any() else len(THRESHOLDS) - 1 for column in enough.T]
        return {
            place: self._rule(THRESHOLDS[number], found.expected(number, head))
            for head, (place, number) in enumerate(zip(found.places, chosen, strict=True))
        }

    def _rule(self, threshold: float, expected: float | None) -> TopBlocks:
        return TopBlocks(mass=threshold, rule="antidiagonal", block=self.block, stride=self.stride, expected=expected)
