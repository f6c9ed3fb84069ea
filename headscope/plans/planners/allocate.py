"""headscope's own planner: one allocation over all heads, from what every pattern was measured to cost every head."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.dynamic import Budget, TopBlocks, VerticalSlash
from headscope.plans.dynamic_rules import Choosing
from headscope.plans.patterns import Dense, Pattern
from headscope.plans.plan import Place, SparsePlan
from headscope.plans.planners.allocate_others import others
from headscope.plans.planners.allocate_refine import Refiner
from headscope.plans.planners.allocate_solve import solved
from headscope.plans.planners.base import Evidence, Planner, Requires, largest, whole
from headscope.plans.planners.trial import Trials, best, grown
from headscope.plans.registry import pattern_from

if TYPE_CHECKING:
    from headscope.probes.pattern_cost import Kind

OBJECTIVES = ("squares", "margin", "error", "norm", "mass")
AIMS = ("both", "recall", "prose")
TABLE = "pattern_cost.candidates"
WINDOWS = 0.4
"""Share of the cache from which a plan that is not tried out takes windows alone: keys chosen once may miss what a later step needs."""


@dataclass(frozen=True)
class Allocate(Planner):
    """Every head gets the pattern that it needs: the budget goes where leaving keys out would change the answers most.

    Probe `pattern_cost` measured what each candidate pattern loses at each head, on texts that must recall and on prose. One knapsack over
    all heads then takes a candidate for each, dense among them, with the least summed loss within `density`, `cache`, or both. `objective`:

    - "squares": sum over rows of (g . delta)^2, what the change of the head's output does to the answers; "margin": its root;
    - "error": sum over rows of ||delta W_O||^2, what it does to the residual stream; "norm": its root;
    - "mass": the attention weight left out.

    Squares are right where heads err independently, roots where heads that do the same err together; which holds is not known beforehand.
    So with a live model, "auto" only begins with these. It makes the plan of every objective, of the largest budget or choice that all
    heads can have at once, and of every other planner that keeps the same bounds and whose measurements are there; runs each on texts that
    nothing was measured on; and keeps the one under which the model stays closest to itself (Kullback-Leibler divergence, see `trial`; the
    worse half is left out after each text). From there it goes on by what the plan itself shows: `rounds` times at most, every candidate of
    every head, and what the second best plan gives it, is weighed again under the plan, and the budget shared out anew (`allocate_refine`).
    Without a live model, "auto" takes "squares" for density and "error" for cache, where from a cache of 0.4 on it takes no budgets of
    chosen keys.

    Every kind of text weighs the same, by its loss when every head has its worst candidate. Bounds on density are judged on recall and on
    prose that is read, bounds on the cache on recall and on prose that is written, both bounds on all three. `aim`: what the plan must
    keep, where a model can do both: finding what was said, writing prose, or each as much as the other. Heads that share keys are planned
    together where `cache` is given, since a key head costs what its neediest query head keeps; rules that choose keys in the prefill and
    keep all of them are then left out, and budgets of keys chosen at its end come in. `dynamic` and `compensate`: whether such rules, and
    windows with a compensation token, may be taken (the latter by density alone: its sums are made from keys that the cache then holds).
    `others`: whether other planners' plans are tried. `trials`: texts of each kind. Without a bound, density is 0.25.

    Windows of an eighth of the text and more, columns, diagonals and budgets grow with the text; shorter windows are tokens. So a plan for
    longer texts than were measured keeps the shares, and is as good as the assumption that heads look as far back in proportion.
    """

    objective: Literal["auto", "squares", "margin", "error", "norm", "mass"] = "auto"
    aim: Literal["both", "recall", "prose"] = "both"
    dynamic: bool = True
    compensate: bool = False
    trials: int = 3
    rounds: int = 2
    others: bool = True

    name: ClassVar[str] = "allocate"
    source: ClassVar[str] = "headscope"
    requires: ClassVar[Requires] = Requires(tables=(TABLE,))

    def check(self) -> None:
        if self.objective not in ("auto", *OBJECTIVES):
            raise unknown_name(PlanError, "objective", self.objective, ("auto", *OBJECTIVES))
        if self.aim not in AIMS:
            raise unknown_name(PlanError, "aim", self.aim, AIMS)
        whole(self.name, "trials", self.trials, 1)
        whole(self.name, "rounds", self.rounds)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        if not evidence.bounded:
            evidence.density = 0.25
            evidence.note("no bound was given: density 0.25")
        if self.objective != "auto":
            return self._solve(evidence, self.objective)
        if evidence.scope is None:
            objective = "squares" if evidence.cache is None else "error"
            evidence.note(f"objective {objective}, not tried out: no live model was given")
            windows = evidence.cache is not None and evidence.cache >= WINDOWS
            return (replace(self, dynamic=False) if windows else self)._solve(evidence, objective)
        made = {objective: self._solve(evidence, objective) for objective in OBJECTIVES}
        if evidence.cache is not None and self.dynamic:
            made |= {f"{name}, windows alone": replace(self, dynamic=False)._solve(evidence, name) for name in ("squares", "error")}
        made |= self._uniform(evidence)
        made |= others(evidence) if self.others else {}
        kinds = self._kinds(evidence)
        judge = Trials.of(evidence.scope, evidence.length, self.trials, kinds=kinds)
        order, losses = best(judge, list(made.values()))
        names = list(made)
        tried = ", ".join(f"{names[at]} {_told(losses[at])}" for at in order)
        evidence.note(f"of the plans tried, {names[order[0]]} keeps the model closest to itself; nats per token lost: {tried}")
        start, second = made[names[order[0]]], made[names[order[min(1, len(order) - 1)]]]
        if not self.rounds:
            return start
        patterns, _ = self.losses(evidence, "mass")
        usable = self._usable(next(iter(patterns.values())), self.dynamic, cache=evidence.cache is not None)
        candidates = {place: [listed[at] for at in usable] for place, listed in patterns.items()}
        fit = Trials.of(evidence.scope, evidence.length, self.trials, kinds=kinds, part=1)
        refiner = Refiner(fit, judge, candidates, lambda lists, values: solved(evidence, lists, values))
        found, scores = refiner.refined(dict(start), second, self.rounds)
        lost = " -> ".join(f"{math.exp(one):.4g}" for one in scores)
        evidence.note(f"shared out anew under the plan, {max(0, len(scores) - 1)} times: {lost} nats per token")
        return found

    def _kinds(self, evidence: Evidence) -> tuple[Kind, ...]:
        """What the plan is judged on."""
        read: tuple[Kind, ...] = () if evidence.density is None else ("prose",)
        written: tuple[Kind, ...] = () if evidence.cache is None else ("written",)
        prose = (*read, *written)
        return {"both": ("recall", *prose), "recall": ("recall",), "prose": prose}[self.aim]

    def _uniform(self, evidence: Evidence) -> dict[str, dict[Place, Pattern]]:
        """Of each kind of choice the largest that all heads can have at once."""
        patterns, _ = self.losses(evidence, "mass")
        first = next(iter(patterns.values()))
        found: dict[str, tuple[float, dict[Place, Pattern]]] = {}
        for at in self._usable(first, self.dynamic, cache=evidence.cache is not None):
            everywhere = {place: listed[at] for place, listed in patterns.items()}
            if not first[at].static and evidence.fits(everywhere):
                made = SparsePlan(evidence.model, everywhere)
                kept = made.density(evidence.length) + made.kv_share(evidence.length)
                kind = f"{first[at].kind} everywhere"
                found[kind] = max(found.get(kind, (0.0, {})), (kept, everywhere), key=lambda one: one[0])
        plans = {kind: everywhere for kind, (_, everywhere) in found.items()}
        if evidence.cache is not None and self.dynamic:

            def budget(keep: int) -> dict[Place, Pattern]:
                return dict.fromkeys(evidence.model.places, Budget(keep, 32, 5))

            size = largest(0, evidence.length, lambda keep: evidence.fits(budget(keep)))
            plans |= {"budget everywhere": budget(size)} if evidence.fits(budget(size)) else {}
        return plans

    def _solve(self, evidence: Evidence, objective: str) -> dict[Place, Pattern]:
        patterns, losses = self.losses(evidence, objective)
        usable = self._usable(next(iter(patterns.values())), self.dynamic, cache=evidence.cache is not None)
        listed = {place: [one[at] for at in usable] for place, one in patterns.items()}
        return solved(evidence, listed, {place: one[usable] for place, one in losses.items()})

    def losses(self, evidence: Evidence, objective: str) -> tuple[dict[Place, list[Pattern]], dict[Place, np.ndarray]]:
        """(layer, head) -> (its candidates, the loss of each [n]); the last candidate is dense and loses nothing. Choices made per input
        carry the share of entries that they were measured to keep at that head.
        """
        table = evidence.table(TABLE)
        wanted = set(self._kinds(evidence)) & set(table["kind"])
        table = table[table["kind"].isin(wanted)] if wanted else table
        if "kept" not in table.columns:
            raise refusal(PlanError, TABLE, "it was measured by an older version, without kept shares", "run probe pattern_cost again")
        words = list(dict.fromkeys(table["pattern"]))
        growth = max(1.0, evidence.length / int(table["tokens"].max()))
        patterns = [grown(pattern_from(json.loads(word)), growth) for word in words]
        values = _values(table, objective)
        if not np.isfinite(values).all():
            bad = table.loc[~np.isfinite(values)].iloc[0]
            raise refusal(PlanError, f"loss of head {bad['layer']}.{bad['head']}", "it is not a number", "measure pattern_cost again")
        frame = table[["layer", "head", "pattern", "kind"]].assign(value=values)
        sums = frame.groupby(["layer", "head", "pattern", "kind"], sort=False)["value"].sum().unstack("pattern")[words]
        if bool(sums.isna().any(axis=None)):
            raise refusal(PlanError, TABLE, "not every candidate was measured on every kind of text", "run probe pattern_cost again")
        scale = sums.max(axis=1).groupby(level="kind").sum()
        joined = sums.div(scale.reindex(sums.index.get_level_values("kind")).clip(lower=1e-300).to_numpy(), axis=0)
        joined = joined.groupby(level=["layer", "head"], sort=False).sum()
        kept = table.groupby(["layer", "head", "pattern"], sort=False)["kept"].mean().unstack("pattern")[words]
        found: dict[Place, np.ndarray] = {}
        listed: dict[Place, list[Pattern]] = {}
        for place in evidence.model.places:
            if place not in joined.index:
                raise refusal(PlanError, f"head {place[0]}.{place[1]}", f"{TABLE} has no row of it", "measure pattern_cost on this model")
            found[place] = np.append(joined.loc[place].to_numpy(dtype=np.float64), 0.0)
            shares = kept.loc[place].to_numpy(dtype=np.float64)
            listed[place] = [*(expecting(one, share) for one, share in zip(patterns, shares, strict=True)), Dense()]
        return listed, found

    def _usable(self, patterns: list[Pattern], dynamic: bool, *, cache: bool) -> list[int]:
        """Numbers of the candidates that may be taken: rules that choose keys once and drop the others save memory, the others compute."""
        allowed = [(self.compensate and not cache) or not getattr(one, "compensate", False) for one in patterns]
        saving = [one.static or (dynamic and isinstance(one, Budget) == cache) for one in patterns]
        return [at for at in range(len(patterns)) if saving[at] and allowed[at]]


def expecting(pattern: Pattern, share: float) -> Pattern:
    """A choice made per input with the share of entries that it was measured to keep, to four digits; other patterns as they are."""
    if isinstance(pattern, VerticalSlash | TopBlocks | Choosing):
        return replace(pattern, expected=min(1.0, max(1e-4, math.ceil(share * 1e4) / 1e4)))
    return pattern


def _told(losses: Mapping[Kind, float]) -> str:
    return "/".join(f"{one:.4g}" for one in losses.values())


def _values(table: pd.DataFrame, objective: str) -> np.ndarray:
    """The loss of every row of the table."""
    if objective == "mass":
        return (1.0 - table["mass"].to_numpy(dtype=np.float64)).clip(min=0)
    column, root = {"margin": ("squares", True), "norm": ("error", True)}.get(objective, (objective, False))
    values = table[column].to_numpy(dtype=np.float64)
    return np.sqrt(values) if root else values
