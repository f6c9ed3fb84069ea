"""Task-KV: heads that gather something of their own keep every key; the others sinks, recent tokens and the middle ones looked at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from headscope.plans.dynamic import Budget
from headscope.plans.patterns import Dense, Pattern
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, Requires, largest, ranked, share, whole


@dataclass(frozen=True)
class TaskKV(Planner):
    """Per layer, the key heads farthest from the layer's semantic centre, and the one nearest to it, keep all keys.

    Of n key heads in layer r of R, f(r) = n * `beta` - (n * `beta` - `least`) * r / (R - 1) keep all (more in the first layers), and the
    nearest one beside them. The others keep `sink` (16) first, `recent` (256) last and k middle keys, those that the last `window` rows
    weigh most, with k = (B - N * f) / (n - f) - sink - recent for a budget of B keys a layer. `budget`: B as a share of N * n (.4); with
    `cache` instead, the largest k that the bound allows.

    A property of a prompt rather than of the model: profile on texts of the task. Departures: where keys are shared, a key head's distance
    is the largest of its query heads'; there is no official code, so f is rounded to the nearest head here.
    """

    budget: float | None = None
    beta: float = 0.25
    least: int = 1
    sink: int = 16
    recent: int = 256
    window: int = 32

    name: ClassVar[str] = "task_kv"
    source: ClassVar[str] = "Task-KV, arXiv:2501.15113"
    requires: ClassVar[Requires] = Requires(metrics=(("semantic_distance",),))
    dials: ClassVar[tuple[str, ...]] = ("budget",)
    bounds: ClassVar[tuple[str, ...]] = ("cache",)

    def check(self) -> None:
        share(self.name, "beta", self.beta, zero=True)
        if self.budget is not None:
            share(self.name, "budget", self.budget)
        for name, lowest in (("least", 0), ("sink", 0), ("recent", 1), ("window", 1)):
            whole(self.name, name, getattr(self, name), lowest)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        values = evidence.by_group(evidence.metric("semantic_distance"))
        full = self.full(evidence, values)
        if evidence.bounded:
            most = max(0, evidence.length - self.sink - self.recent)
            middle = largest(0, most, lambda k: evidence.fits(self._patterns(evidence, full, dict.fromkeys(evidence.model.layers, k))))
            return self._patterns(evidence, full, dict.fromkeys(evidence.model.layers, middle))
        part = 0.4 if self.budget is None else self.budget
        middles = {}
        for layer, groups in zip(evidence.model.layers, evidence.model.kv_heads, strict=True):
            whole_heads = len(full[layer])
            rest = (part * groups - whole_heads) * evidence.length / max(1, groups - whole_heads)
            middles[layer] = max(0, int(rest - self.sink - self.recent))
            if rest < self.sink + self.recent and whole_heads < groups:
                evidence.note(
                    f"budget {part} leaves nothing for middle tokens in layer {layer}, whose full heads take {whole_heads}/{groups}"
                )
        return self._patterns(evidence, full, middles)

    def full(self, evidence: Evidence, values: np.ndarray) -> dict[int, set[int]]:
        """Layer -> key heads that keep everything; `values` [L, Hkv] are their distances."""
        found: dict[int, set[int]] = {}
        last = max(1, len(evidence.model.layers) - 1)
        for at, (layer, groups) in enumerate(zip(evidence.model.layers, evidence.model.kv_heads, strict=True)):
            order = ranked({group: float(values[at, group]) for group in range(groups)})
            many = groups * self.beta
            count = min(groups, max(0, round(many - (many - self.least) * at / last)))
            found[layer] = {*order[:count], *([order[-1]] if count else [])}
        return found

    def _patterns(self, evidence: Evidence, full: Mapping[int, set[int]], middle: Mapping[int, int]) -> dict[Place, Pattern]:
        out: dict[Place, Pattern] = {}
        for layer, group in evidence.groups:
            rest = Budget(self.sink + middle[layer], self.window, 1, self.sink, self.recent)
            out |= dict.fromkeys(evidence.members(layer, group), Dense() if group in full[layer] else rest)
        return out
