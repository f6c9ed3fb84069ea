"""PowerAttention: a window and the blocks at distances of powers of two, the same for every head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from headscope.plans.patterns import BLOCK, Pattern, Power
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, largest, whole


@dataclass(frozen=True)
class PowerPlanner(Planner):
    """Every head sees its last keys, and the blocks 1, 2, 4, 8 ... blocks back: after d layers, 2^d blocks.

    `window` tokens (None: two blocks), `block` tokens a side, `sink` first keys. With `density`, the longest window that the bound allows.
    Nothing is measured: the method sets the same mask for all heads, and its authors train the model under it before use. A model that was
    not trained so loses what falls between the powers.
    """

    window: int | None = None
    block: int = BLOCK
    sink: int = 0

    name: ClassVar[str] = "power"
    source: ClassVar[str] = "PowerAttention, arXiv:2503.03588"
    dials: ClassVar[tuple[str, ...]] = ("window",)
    bounds: ClassVar[tuple[str, ...]] = ("density",)

    def check(self) -> None:
        whole(self.name, "block", self.block, 1)
        whole(self.name, "sink", self.sink)
        if self.window is not None:
            whole(self.name, "window", self.window, 1)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        evidence.note("this mask is meant for models that were trained under it")

        def make(window: int) -> dict[Place, Pattern]:
            return dict.fromkeys(evidence.model.places, Power(window, self.block, self.sink))

        if evidence.bounded:
            return make(largest(1, evidence.length, lambda window: evidence.fits(make(window))))
        return make(2 * self.block if self.window is None else self.window)
