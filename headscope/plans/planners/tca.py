"""Budgets by kept mass (TCA-Attention's calibration): per head the sparsest choice of blocks that keeps a target share of its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.dynamic import TopBlocks
from headscope.plans.patterns import Dense, Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, Requires, share

SHARES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)


@dataclass(frozen=True)
class Tca(Planner):
    """Per head the smallest share of the blocks of a row that holds `mass` of its attention; which blocks is chosen per input.

    For every candidate of `shares`, kept mass is that of the heaviest blocks of each row of the profile's block map, the first and the
    diagonal one always among them. The head gets the smallest candidate that reaches `mass` (.9). With `density`, the largest mass that the
    bound allows. `rule`: how blocks are chosen at run time (see `TopBlocks`); an estimate reaches less than the heaviest blocks do, so the
    target is what the head needs, and not what a rule guarantees.

    Departures: TCA's candidates are shapes that say how many tokens each block gives up, and tokens are then picked one by one; here whole
    blocks are. What is the same: one forward pass, one budget per head, the sparsest candidate that meets the target.
    """

    mass: float | None = None
    shares: tuple[float, ...] = SHARES
    rule: Literal["pooled", "antidiagonal", "exact"] = "pooled"

    name: ClassVar[str] = "tca"
    source: ClassVar[str] = "TCA-Attention (Training-free Context-adaptive Attention for Efficient Long Context Modeling)"
    requires: ClassVar[Requires] = Requires(statistics=("map/block_mass",))
    dials: ClassVar[tuple[str, ...]] = ("mass",)
    bounds: ClassVar[tuple[str, ...]] = ("density",)

    def check(self) -> None:
        if self.mass is not None:
            share(self.name, "mass", self.mass)
        if not self.shares or list(self.shares) != sorted(set(self.shares)):
            raise refusal(PlanError, f"shares={self.shares}", "candidates are tried from the smallest", "pass them ascending")
        for one in self.shares:
            share(self.name, "shares", one)
        if self.rule not in ("pooled", "antidiagonal", "exact"):
            raise unknown_name(PlanError, "rule", self.rule, ("pooled", "antidiagonal", "exact"))

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        block, maps = evidence.block_maps()
        curves = {place: [held(maps[place], one) for one in self.shares] for place in evidence.model.places}

        def make(mass: float) -> dict[Place, Pattern]:
            return {place: self._pattern(curve, mass, block) for place, curve in curves.items()}

        if not evidence.bounded:
            return make(0.9 if self.mass is None else self.mass)
        targets = sorted({value for curve in curves.values() for value in curve})
        low, high = 0, len(targets) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if evidence.fits(make(targets[middle])) else (low, middle - 1)
        return make(targets[low])

    def _pattern(self, curve: list[float], mass: float, block: int) -> Pattern:
        chosen = next((one for one, value in zip(self.shares, curve, strict=True) if value >= mass - 1e-9), 1.0)
        return Dense() if chosen >= 1 else TopBlocks(share=chosen, rule=self.rule, block=block)


def held(mass: np.ndarray, part: float) -> float:
    """Share of a block map's mass in the `part` heaviest visible blocks of each row, the first and the diagonal one always kept."""
    kept = 0.0
    for tile, row in enumerate(mass):
        visible = row[: tile + 1]
        order = np.argsort(-visible, kind="stable")[: max(1, round(part * (tile + 1)))]
        kept += float(visible[sorted({0, tile, *order.tolist()})].sum())
    return kept / max(float(np.tril(mass).sum()), 1e-300)
