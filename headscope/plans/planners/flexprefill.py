"""FlexPrefill: kind and budget of every head's pattern are chosen per input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from headscope.plans.dynamic_curves import dialled
from headscope.plans.dynamic_flexprefill import FlexBlocks
from headscope.plans.patterns import BLOCK, Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, share, whole

GAMMAS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
"""Settings that are tried for a density."""


@dataclass(frozen=True)
class FlexPrefill(Planner):
    """Prefill: every head decides per input whether means of tiles describe it (divergence below `tau`), and takes tiles until they hold
    `gamma` (0.9 by default) of its estimated attention; see `headscope.plans.FlexBlocks`.

    With `density`, the largest gamma whose mean density is within the bound, measured on the live model on `text` (None: a bundled essay).
    `least` is the budget below which no head goes, in tiles; the official code's is 1,024 tokens, made for texts of 32,768 and more.
    """

    gamma: float | None = None
    tau: float = 0.1
    block: int = BLOCK
    least: int = 1
    text: str | None = None

    name: ClassVar[str] = "flexprefill"
    source: ClassVar[str] = "FlexPrefill, arXiv:2502.20766, ByteDance-Seed/FlexPrefill"
    dials: ClassVar[tuple[str, ...]] = ("gamma",)
    bounds: ClassVar[tuple[str, ...]] = ("density",)

    def check(self) -> None:
        FlexBlocks(0.9, self.tau, self.block, self.least)
        whole(self.name, "block", self.block, 1)
        if self.gamma is not None:
            share(self.name, "gamma", self.gamma)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        if self.density is None:
            evidence.note("gamma's density is known per input; pass density= with a live model to have it measured")
            return dict.fromkeys(evidence.model.places, self._rule(0.9 if self.gamma is None else self.gamma, None))
        return dialled(evidence, self._rule, GAMMAS, self.density, self.text)

    def _rule(self, gamma: float, expected: float | None) -> FlexBlocks:
        return FlexBlocks(gamma, self.tau, self.block, self.least, expected=expected)
