"""AnchorAttention: single columns whose scores come near a maximum that is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from headscope.plans.dynamic_anchor import Stripes
from headscope.plans.dynamic_curves import dialled
from headscope.plans.patterns import BLOCK, Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner

THETAS = (-2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.3, 10.0, 12.0, 16.0, 24.0)
"""Settings that are tried for a density, in nats."""


@dataclass(frozen=True)
class Anchor(Planner):
    """Prefill: rows see the first tile, their own group of `step` tiles of `block`, and the columns whose scores come within `theta` nats
    of the largest among those; see `headscope.plans.Stripes`. `theta` None is the official 12, which counts in powers of two: 8.3 nats.

    With `density`, the largest theta whose mean density is within the bound, measured on the live model on `text` (None: a bundled essay).
    On texts of a few groups the groups themselves are most of the density: use a smaller `step`.
    """

    theta: float | None = None
    block: int = BLOCK
    step: int = 16
    text: str | None = None

    name: ClassVar[str] = "anchor"
    source: ClassVar[str] = "AnchorAttention, arXiv:2505.23520"
    dials: ClassVar[tuple[str, ...]] = ("theta",)
    bounds: ClassVar[tuple[str, ...]] = ("density",)

    def check(self) -> None:
        self._rule(0.0 if self.theta is None else self.theta, None)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        if self.density is None:
            evidence.note("theta's density is known per input; pass density= with a live model to have it measured")
            return dict.fromkeys(evidence.model.places, self._rule(12 * math.log(2.0) if self.theta is None else self.theta, None))
        return dialled(evidence, self._rule, THETAS, self.density, self.text)

    def _rule(self, theta: float, expected: float | None) -> Stripes:
        return Stripes(theta, self.block, self.step, expected=expected)
