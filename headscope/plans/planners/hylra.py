"""HyLRA: which layers choose keys and which take over those of an earlier layer, as one dynamic programme over how alike layers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from headscope.errors import PlanError, refusal
from headscope.plans.patterns import Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, Requires, share, whole
from headscope.plans.planners.tidal import taken_over


@dataclass(frozen=True)
class HyLRA(Planner):
    """Decoding only: every layer is either full (sees every key, and chooses `keep` (256) per head) or reuses what the last full layer
    before it chose, where the two layers' attention maps have a cosine of `theta` or more (probe "map_similarity").

    Offline dynamic programme over the layers: as few full ones as `theta` allows, and of those ways the one with the most similarity.
    With `full` instead, exactly so many full layers, chosen for the largest sum of cosines whatever they are.

    Departures: the paper compares the sets of chosen keys; cosines of mean maps stand in for that overlap. Its code and the sensitivity
    that it weighs layers by are not public. Layers are full, then, where nothing before them is alike.
    """

    keep: int | None = None
    theta: float | None = None
    full: int | None = None

    name: ClassVar[str] = "hylra"
    source: ClassVar[str] = "HyLRA, arXiv:2602.00777 (no public code)"
    dials: ClassVar[tuple[str, ...]] = ("keep",)
    bounds: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[Requires] = Requires(metrics=(("map_similarity",),), tables=("map_similarity.layers",))

    def check(self) -> None:
        whole(self.name, "keep", 256 if self.keep is None else self.keep, 1)
        if self.theta is not None:
            share(self.name, "theta", self.theta)
        if self.full is not None:
            whole(self.name, "full", self.full, 1)
        if self.theta is not None and self.full is not None:
            raise refusal(PlanError, "theta beside full", "each says how many layers are full", "pass one of them")

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        cosines = evidence.table("map_similarity.layers").to_numpy(dtype=np.float64)
        count = len(evidence.model.layers)
        if cosines.shape != (count, count) or not np.isfinite(cosines).all():
            raise refusal(
                PlanError, f"cosines of shape {cosines.shape}", f"{evidence.model.name} has {count} layers", "measure map_similarity again"
            )
        if self.full is not None and self.full > count:
            raise refusal(PlanError, f"full={self.full}", f"{evidence.model.name} has {count} layers", f"use at most {count}")
        choosers = full_layers(cosines, 0.85 if self.theta is None else self.theta, self.full)
        evidence.note("decoding only: the prefill is dense, and no key leaves the cache")
        evidence.note(f"full layers: {', '.join(str(evidence.model.layers[one]) for one in choosers)}")
        return taken_over(evidence.model, 256 if self.keep is None else self.keep, choosers)


def full_layers(cosines: np.ndarray, theta: float, full: int | None) -> list[int]:
    """Places of the full layers. cosines [L, L]; layer i may reuse full layer f < i if every layer in between does too and cosines[f, i] is
    theta or more; `full` gives the number of full layers instead, and lets any layer reuse any.

    best[m][f]: the largest sum of cosines of the layers before f that reuse, when f is the m-th full layer. O(L^3).
    """
    count = len(cosines)
    allowed = np.ones((count, count), dtype=bool) if full is not None else cosines >= theta
    # gain[f][i]: sum of cosines of layers f + 1 .. i - 1 with f; -inf where one of them may not reuse f
    gain = np.full((count, count + 1), -np.inf)
    for f in range(count):
        total = 0.0
        for i in range(f + 1, count + 1):
            gain[f, i] = total
            if i < count:
                total = total + cosines[f, i] if allowed[f, i] else -np.inf
    best = np.full((count + 1, count + 1), -np.inf)
    source = np.zeros((count + 1, count + 1), dtype=np.int64)
    best[1, 0] = 0.0
    ends = []
    for m in range(1, count + 1):
        if m > 1:
            for i in range(m - 1, count):
                values = best[m - 1, :i] + gain[:i, i]
                source[m, i] = int(values.argmax())
                best[m, i] = values[source[m, i]]
        values = best[m, :count] + gain[:, count]
        ends.append((float(values.max()), int(values.argmax())))
    wanted = full if full is not None else next(m for m, (value, _) in enumerate(ends, start=1) if value > -np.inf)
    chosen = [ends[wanted - 1][1]]
    for m in range(wanted, 1, -1):
        chosen.append(int(source[m, chosen[-1]]))
    return sorted(chosen)
