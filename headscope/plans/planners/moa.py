"""MoA: every head a window that grows with the text at a rate of its own, chosen by an integer program over measured influence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from headscope.errors import PlanError, refusal
from headscope.plans.patterns import Dense, Pattern, Span
from headscope.plans.plan import Place, PlanModel
from headscope.plans.planners.allocation import Options, allocate
from headscope.plans.planners.base import Evidence, Planner, Requires, whole

if TYPE_CHECKING:
    import pandas as pd

TABLE, WEIGHT = "moa.spans", "moa_influence"
BETAS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True, eq=False)
class Profiled:
    """What one run says: `tokens` N; `losses` (layer, head) -> (spans [n] tokens ascending, influence in nats lost at each [n])."""

    tokens: int
    losses: Mapping[Place, tuple[np.ndarray, np.ndarray]]

    def at(self, place: Place, window: float) -> float:
        """Influence that a head loses with a window: what the longest profiled span that is no longer does, or the shortest."""
        spans, lost = self.losses[place]
        number = int(np.searchsorted(spans, window + 1e-9, side="right"))
        return float(lost[max(0, number - 1)])


@dataclass(frozen=True)
class MoaPlanner(Planner):
    """Windows of alpha + beta * N keys beside the first block, per head; the program takes those that lose least influence under a bound.

    The profile's probe `moa` gives, at its length, the influence that each window loses; `runs` are further run directories of the same
    model at other lengths. Candidates are all alpha of a grid (`steps` parts of the shortest length) and beta of `betas` whose window is
    between one key and the whole text at every length. At every profiled length the mean density is at most `density` (0.5 where no bound
    is given). Each length's loss, and their sum in shares, is minimised in turn; of the plans that no other beats at all lengths (the
    Pareto set), the one with the least loss on `validate` is taken, another run, or else with the least summed share.

    Departures: candidates and the bound are those of the paper, the solver is HiGHS where the official code needs Gurobi; models with
    grouped keys need not be converted, and with `cache` the heads of a key head share a window. From a single length alpha and beta cannot
    be told apart: then alpha is 0 and windows grow in proportion.
    """

    runs: tuple[str, ...] = ()
    validate: str | None = None
    steps: int = 8
    betas: tuple[float, ...] = BETAS
    block: int = 64

    name: ClassVar[str] = "moa"
    source: ClassVar[str] = "MoA, arXiv:2406.14909, thu-nics/MoA"
    requires: ClassVar[Requires] = Requires(metrics=((WEIGHT,),), tables=(TABLE,))

    def check(self) -> None:
        whole(self.name, "steps", self.steps, 1)
        whole(self.name, "block", self.block, 1)
        if not self.betas or not all(0 <= beta <= 1 for beta in self.betas):
            raise refusal(PlanError, f"betas={self.betas}", "a window is at most the text", "pass shares of 0 to 1")

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        if not evidence.bounded:
            evidence.density = 0.5
            evidence.note("no bound was given: density 0.5")
        known = [profiled(evidence.model, evidence.table(TABLE), evidence.metric(WEIGHT))]
        known += [self._load(evidence, run) for run in self.runs]
        judge = None if self.validate is None else self._load(evidence, self.validate)
        lengths = sorted({one.tokens for one in known})
        if len(lengths) == 1:
            evidence.note(f"profiled at {lengths[0]} tokens only, so windows grow in proportion to the text")
        found = self.candidates(lengths)
        places = evidence.groups if evidence.cache is not None else evidence.model.places
        members = {place: evidence.members(*place) if evidence.cache is not None else [place] for place in places}
        # [profiles, items, candidates]
        losses = np.array([[[self._lost(one, members[place], span) for span in found] for place in places] for one in known])
        worst = losses.max(2).sum(1).clip(min=1e-300)
        aims = [*losses, (losses / worst[:, None, None]).sum(0)]
        plans = [self._solve(evidence, aim, found, lengths, members) for aim in aims]
        totals = np.array([[loss[np.arange(len(places)), taken].sum() for loss in losses] for taken in plans])
        best = [at for at in range(len(plans)) if not _beaten(totals, at)]

        def judged(at: int) -> float:
            if judge is None:
                return float((totals[at] / worst).sum())
            pairs = zip(places, plans[at], strict=True)
            return sum(self._lost(judge, members[place], found[number]) for place, number in pairs)

        taken = plans[min(best, key=judged)]
        evidence.note(f"{len(best)} plans in the Pareto set over {lengths} tokens")
        pairs = [(found[number], place) for place, number in zip(places, taken, strict=True)]
        return {head: Dense() if one.beta >= 1 else one for one, place in pairs for head in members[place]}

    def _lost(self, known: Profiled, heads: Sequence[Place], span: Span) -> float:
        return sum(known.at(head, span.at(known.tokens).window) for head in heads)

    def candidates(self, lengths: Sequence[int]) -> list[Span]:
        """The windows that are tried, by what they keep at the longest of the lengths; the last keeps everything."""
        step = max(1, lengths[0] // self.steps)
        alphas = [0.0] if len(lengths) == 1 else [float(number * step) for number in range(-self.steps, self.steps + 1)]
        listed = [Span(alpha, beta, self.block) for alpha in alphas for beta in self.betas if self._fits(alpha, beta, lengths)]
        listed.append(Span(float(self.block), 0.0, self.block))
        return sorted(dict.fromkeys([*listed, Span(0.0, 1.0, self.block)]), key=lambda one: (one.at(lengths[-1]).window, one.beta))

    def _fits(self, alpha: float, beta: float, lengths: Sequence[int]) -> bool:
        return alpha + beta * 1e9 >= 1 and all(1 <= alpha + beta * length <= length for length in lengths)

    def _solve(
        self,
        evidence: Evidence,
        losses: np.ndarray,
        found: Sequence[Span],
        lengths: Sequence[int],
        members: Mapping[Place, Sequence[Place]],
    ) -> list[int]:
        """The candidate of every item: least loss [items, candidates] with every bound kept at every length."""
        sizes = sorted({*lengths, evidence.length})
        rows: list[np.ndarray] = []
        budgets: list[float] = []
        if evidence.density is not None:
            rows += [np.array([one.density(length) for one in found]) for length in sizes]
            budgets += [evidence.density * len(evidence.model.places)] * len(sizes)
        cached: list[np.ndarray] = []
        if evidence.cache is not None:
            cached = [np.array([one.cached(length) / length for one in found]) for length in sizes]
            budgets += [evidence.cache] * len(sizes)
        dims = dict(zip(evidence.model.layers, evidence.model.head_dim, strict=True))
        total = sum(dims[layer] for layer, _ in evidence.groups)
        items = []
        for number, place in enumerate(members):
            costs = [row * len(members[place]) for row in rows] + [row * dims[place[0]] / total for row in cached]
            items.append(Options(losses[number], np.stack(costs)))
        return allocate(items, budgets)

    def _load(self, evidence: Evidence, run: str) -> Profiled:
        """What another run of the same model says."""
        from headscope.profile.head_profile import HeadProfile

        profile = HeadProfile.load(run)
        model = PlanModel.of(profile)
        if model.places != evidence.model.places or (model.fingerprint and model.fingerprint != evidence.model.fingerprint):
            raise refusal(PlanError, f"run {run} of {model.name}", f"the plan is for {evidence.model.name}", "pass runs of one model")
        if TABLE not in profile.tables or WEIGHT not in profile.metrics:
            command = f"headscope profile {evidence.where} --probes moa --out RUN"
            raise refusal(PlanError, f"run {run}", "probe moa was not run in it", f"measure it: {command}")
        return profiled(model, profile.tables[TABLE], profile.matrix(WEIGHT))


def profiled(model: PlanModel, table: pd.DataFrame, influence: np.ndarray) -> Profiled:
    """A run's spans in tokens and what they lose in nats; `influence` [L, H]. PlanError for heads that the table does not have."""
    losses: dict[Place, tuple[np.ndarray, np.ndarray]] = {}
    for place, part in table.groupby(["layer", "head"], sort=False):
        layer, head = (int(one) for one in place)
        ordered = part.sort_values("span")
        weight = float(influence[model.layers.index(layer), head])
        losses[layer, head] = (ordered["span"].to_numpy(dtype=np.float64), ordered["lost"].to_numpy(dtype=np.float64) * weight)
    missing = [place for place in model.places if place not in losses]
    if missing:
        raise refusal(PlanError, f"head {missing[0][0]}.{missing[0][1]}", f"{TABLE} has no row of it", "run probe moa again")
    if not all(np.isfinite(lost).all() for _, lost in losses.values()):
        raise refusal(PlanError, TABLE, "a loss in it is not a number", "run probe moa again")
    return Profiled(int(table["span"].max()), losses)


def _beaten(totals: np.ndarray, at: int) -> bool:
    """True when another row is at most as large everywhere and smaller somewhere, or equal and earlier."""
    others = [(other, (row <= totals[at]).all(), (row < totals[at]).any()) for other, row in enumerate(totals)]
    return any(never_worse and (better or other < at) for other, never_worse, better in others)
