"""HeadKV: SnapKV's rule with a budget per head, in proportion to how well the head retrieves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.dynamic import Budget
from headscope.plans.patterns import Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, Requires, largest, whole

METRICS = {"retrieval": "retrieval", "reasoning": "retrieval_reasoning"}


@dataclass(frozen=True)
class HeadKV(Planner):
    """A pool of keys shared out over the heads by their retrieval scores (HeadKV), or retrieval-reasoning scores (HeadKV-R2).

    Scores p are normalised to sum 1, raised to `temperature` and normalised again. Every key head gives part of its `base` keys to the
    pool and has the rest for itself: capacity = round(p * floor(base / beta) * heads + base - floor(base / beta)), to which the last
    `window` keys come. With `cache` instead of `base`, the largest base that the bound allows. `scores`: "retrieval" or "reasoning" (R2).

    Departures: where keys are shared, a key head has one budget, by the mean score of its query heads, which choose together; the official
    code repeats the keys and gives each query head its own. A model whose scores are all 0 is refused: nothing would be shared out.
    """

    base: int | None = None
    beta: float = 1.2
    temperature: float = 1.0
    scores: Literal["retrieval", "reasoning"] = "retrieval"
    window: int = 32
    pool: int = 7

    name: ClassVar[str] = "headkv"
    source: ClassVar[str] = "HeadKV, arXiv:2410.19258, FYYFU/HeadKV"
    requires: ClassVar[Requires] = Requires(metrics=(("retrieval",), ("retrieval_reasoning",)))
    dials: ClassVar[tuple[str, ...]] = ("base",)
    bounds: ClassVar[tuple[str, ...]] = ("cache",)

    def check(self) -> None:
        whole(self.name, "window", self.window, 1)
        whole(self.name, "pool", self.pool, 1)
        if self.base is not None:
            whole(self.name, "base", self.base, 1)
        if self.scores not in METRICS:
            raise unknown_name(PlanError, "scores", self.scores, METRICS)
        for name in ("beta", "temperature"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and np.isfinite(value) and value >= (1 if name == "beta" else 0)):
                raise refusal(PlanError, f"headkv with {name}={value!r}", "beta is 1 or more and temperature 0 or more", "correct it")

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        values = evidence.by_group(evidence.metric(METRICS[self.scores]), np.mean)
        scores = np.array([evidence.at(values, group) for group in evidence.groups]).clip(min=0)
        if scores.sum() <= 0:
            raise refusal(PlanError, f"{METRICS[self.scores]} scores that are all 0", "no head earns a share", "use planner 'snapkv'")
        parts = (scores / scores.sum()) ** self.temperature
        parts = parts / parts.sum()

        def make(base: int) -> dict[Place, Pattern]:
            out: dict[Place, Pattern] = {}
            for group, keep in zip(evidence.groups, self.capacities(parts, base), strict=True):
                out |= dict.fromkeys(evidence.members(*group), Budget(keep, self.window, self.pool))
            return out

        if evidence.bounded:
            return make(largest(0, evidence.length, lambda base: evidence.fits(make(base))))
        return make(128 if self.base is None else self.base)

    def capacities(self, parts: np.ndarray, base: int) -> list[int]:
        """Keys of each key head from its part of the pool; `parts` sum to 1."""
        given = int(base // self.beta)
        return [round(float(part) * given * len(parts) + base - given) for part in parts]
