"""DuoAttention: the key heads with the largest gates keep every key, the others a sink and a recent window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from headscope.errors import PlanError, unknown_name
from headscope.plans.patterns import Dense, Pattern, Streaming
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, Requires, longest, ranked, share, whole
from headscope.probes.duo_surrogate import default_window

SCORES = ("duo_gate", "duo_change_group", "duo_error_group")


@dataclass(frozen=True)
class Duo(Planner):
    """Key heads ranked by their gate; the best keep all keys, the rest a few first and recent ones.

    `sparsity`: share of key heads that stream (DuoAttention's quantile; 0.5 by default, 0.75 at most in the paper for models with grouped
    keys). With `density` or `cache` instead, as many key heads keep all keys as the bound allows. `sink`, `recent`: None takes 128 and 256,
    and 1/16 and 1/8 of shorter texts, as the probe does. `score`: "duo_gate" (trained gates),
    "duo_change_group" or "duo_error_group" (the surrogate: what streaming changes in the output); None takes the first that is there.

    Departures: the official code adds random numbers to the gates so that a quantile cuts ties; here the lower layer and head stays full,
    and the same gates give the same plan. The window is exact, where its training kernel counts whole blocks of 128. Prefill streams too,
    where the official inference runs its first chunk dense.
    """

    sparsity: float | None = None
    sink: int | None = None
    recent: int | None = None
    score: str | None = None

    name: ClassVar[str] = "duo"
    source: ClassVar[str] = "DuoAttention, arXiv:2410.10819, mit-han-lab/duo-attention"
    requires: ClassVar[Requires] = Requires(metrics=(("duo_gate",), ("duo_change_group",)))
    dials: ClassVar[tuple[str, ...]] = ("sparsity",)

    def check(self) -> None:
        if self.sparsity is not None:
            share(self.name, "sparsity", self.sparsity, zero=True)
        if self.sink is not None:
            whole(self.name, "sink", self.sink)
        if self.recent is not None:
            whole(self.name, "recent", self.recent, 1)
        if self.score is not None and self.score not in SCORES:
            raise unknown_name(PlanError, "score", self.score, SCORES)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        score = self.score or next((name for name in SCORES if evidence.has(name)), SCORES[0])
        if score != "duo_gate":
            evidence.note(f"ranked by {score}, a stand-in for trained gates")
        values = evidence.by_group(evidence.metric(score))
        order = ranked({group: evidence.at(values, group) for group in evidence.groups})
        usual = default_window(evidence.length)
        rest = Streaming(usual[0] if self.sink is None else self.sink, usual[1] if self.recent is None else self.recent)
        if evidence.bounded:
            order = list(longest(order, lambda chosen: evidence.fits(dense_groups(evidence, chosen, rest))))
        else:
            order = order[: len(order) - round((0.5 if self.sparsity is None else self.sparsity) * len(order))]
        return dense_groups(evidence, order, rest)


def dense_groups(evidence: Evidence, chosen: Iterable[tuple[int, int]], rest: Pattern) -> dict[Place, Pattern]:
    """Dense for the query heads of the chosen (layer, key head), `rest` for the others."""
    dense = {place for group in chosen for place in evidence.members(*group)}
    return {place: Dense() if place in dense else rest for place in evidence.model.places}
