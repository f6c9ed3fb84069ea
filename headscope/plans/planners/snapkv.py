"""SnapKV: after a dense prefill every key head keeps the keys that the last rows looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic import Budget
from headscope.plans.patterns import Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, largest, whole


@dataclass(frozen=True)
class SnapKV(Planner):
    """The same budget for every head: the keys that the last rows of the prompt weigh most, and those rows' own.

    `capacity`: keys kept in all, `window` of them the last ones (256 + 64 in the class of the official code, 2,048 and 32 by its
    configuration); with `cache` instead, as many as the bound allows. `pool`: width of the mean filter over the scores.

    Departures: where keys are shared, the heads of a key head choose together by their mean weights, so that memory is what was asked for;
    the official code repeats keys first and stores each query head's own choice.
    """

    capacity: int | None = None
    window: int = 32
    pool: int = 5
    grouped: bool = True

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv:2404.14469, FasterDecoding/SnapKV"
    dials: ClassVar[tuple[str, ...]] = ("capacity",)
    bounds: ClassVar[tuple[str, ...]] = ("cache",)

    def check(self) -> None:
        whole(self.name, "window", self.window, 1)
        whole(self.name, "pool", self.pool, 1)
        if self.capacity is not None:
            whole(self.name, "capacity", self.capacity, 1)
            if self.capacity < self.window:
                raise refusal(PlanError, f"capacity={self.capacity}", f"the last window={self.window} are among it", "raise it")

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        def make(capacity: int) -> dict[Place, Pattern]:
            one = Budget(capacity - self.window, self.window, self.pool, grouped=self.grouped)
            return dict.fromkeys(evidence.model.places, one)

        if evidence.bounded:
            return make(largest(self.window, max(self.window, evidence.length), lambda capacity: evidence.fits(make(capacity))))
        return make(2048 if self.capacity is None else self.capacity)
