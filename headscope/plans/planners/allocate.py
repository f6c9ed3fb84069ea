"""headscope's own planner: one allocation over all heads, from what every pattern was measured to cost every head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.dynamic import Budget, VerticalSlash
from headscope.plans.patterns import Dense, Pattern
from headscope.plans.plan import Place, SparsePlan
from headscope.plans.planners.allocation import Options, allocate
from headscope.plans.planners.base import Evidence, Planner, Requires, whole
from headscope.plans.planners.trial import Trials, best
from headscope.plans.registry import pattern_from

OBJECTIVES = ("squares", "margin", "error", "norm", "mass")
TABLE = "pattern_cost.candidates"


@dataclass(frozen=True)
class Allocate(Planner):
    """Every head gets the pattern that it needs: the budget goes where leaving keys out would change the answers most.

    Probe `pattern_cost` measured what each candidate pattern loses at each head, on texts that must recall and on prose. One knapsack over
    all heads then takes a candidate for each, dense among them, with the least summed loss within `density`, `cache`, or both. `objective`:

    - "squares": sum over rows of (g . delta)^2, what the change of the head's output does to the answers; "margin": its root;
    - "error": sum over rows of ||delta W_O||^2, what it does to the residual stream; "norm": its root;
    - "mass": the attention weight left out.

    Squares are right where heads err independently, roots where heads that do the same err together. Which holds is not known beforehand:
    with a live model, "auto" makes the plan of every objective, and of the largest budget or choice that all heads can have at once, runs
    each on `trials` texts of each kind that nothing was measured on, and takes the one that costs fewest nats; without, it takes "squares"
    for density and "norm" for cache.

    Every kind of text weighs the same, by its loss when every head has its worst candidate. Heads that share keys are planned together
    where `cache` is given, since a key head costs what its neediest query head keeps; rules that choose keys in the prefill and keep all
    of them are then left out, and budgets of keys chosen at its end come in. `dynamic` and `compensate`: whether such rules, and windows
    with a compensation token, may be taken. Without a bound, density is 0.25.

    Windows of an eighth of the text and more, columns, diagonals and budgets grow with the text; shorter windows are tokens. So a plan for
    longer texts than were measured keeps the shares, and is as good as the assumption that heads look as far back in proportion.
    """

    objective: Literal["auto", "squares", "margin", "error", "norm", "mass"] = "auto"
    dynamic: bool = True
    compensate: bool = True
    trials: int = 3

    name: ClassVar[str] = "allocate"
    source: ClassVar[str] = "headscope"
    requires: ClassVar[Requires] = Requires(tables=(TABLE,))

    def check(self) -> None:
        if self.objective not in ("auto", *OBJECTIVES):
            raise unknown_name(PlanError, "objective", self.objective, ("auto", *OBJECTIVES))
        whole(self.name, "trials", self.trials, 1)

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        if not evidence.bounded:
            evidence.density = 0.25
            evidence.note("no bound was given: density 0.25")
        if self.objective != "auto":
            return self._solve(evidence, self.objective)
        if evidence.scope is None:
            objective = "squares" if evidence.cache is None else "norm"
            evidence.note(f"objective {objective}, not tried out: no live model was given")
            return self._solve(evidence, objective)
        made = {objective: self._solve(evidence, objective) for objective in OBJECTIVES}
        made |= self._uniform(evidence)
        plans = [SparsePlan(evidence.model, patterns) for patterns in made.values()]
        at, costs = best(Trials.of(evidence.scope, evidence.length, self.trials), plans)
        tried = ", ".join(f"{name} {cost:.4g}" for name, cost in zip(made, costs, strict=True))
        taken = list(made)[at]
        evidence.note(f"took {taken}; nats per token lost on held-out texts: {tried}")
        return made[taken]

    def _uniform(self, evidence: Evidence) -> dict[str, dict[Place, Pattern]]:
        """Of each kind of candidate the largest that all heads can have at once: what allocating has to beat."""
        patterns, _ = self.losses(evidence, "mass")
        found: dict[str, tuple[float, dict[Place, Pattern]]] = {}
        for at in self._usable(patterns, self.dynamic, cache=evidence.cache is not None):
            everywhere = dict.fromkeys(evidence.model.places, patterns[at])
            kept = patterns[at].density(evidence.length) + patterns[at].cached(evidence.length) / evidence.length
            kind = f"{patterns[at].kind} everywhere"
            if patterns[at].kind in ("budget", "vertical_slash", "top_blocks") and evidence.fits(everywhere):
                found[kind] = max(found.get(kind, (0.0, {})), (kept, everywhere), key=lambda one: one[0])
        return {kind: everywhere for kind, (_, everywhere) in found.items()}

    def _solve(self, evidence: Evidence, objective: str) -> dict[Place, Pattern]:
        patterns, losses = self.losses(evidence, objective)
        if evidence.cache is None:
            return self._by_head(evidence, patterns, losses)
        return self._by_group(evidence, patterns, losses)

    def losses(self, evidence: Evidence, objective: str) -> tuple[list[Pattern], dict[Place, np.ndarray]]:
        """(candidates, (layer, head) -> loss of each [n]); the last candidate is dense and loses nothing."""
        table = evidence.table(TABLE)
        words = list(dict.fromkeys(table["pattern"]))
        growth = max(1.0, evidence.length / int(table["tokens"].max()))
        patterns = [grown(pattern_from(json.loads(word)), growth) for word in words]
        values = _values(table, objective)
        if not np.isfinite(values).all():
            bad = table.loc[~np.isfinite(values)].iloc[0]
            raise refusal(PlanError, f"loss of head {bad['layer']}.{bad['head']}", "it is not a number", "measure pattern_cost again")
        frame = table[["layer", "head", "pattern", "kind"]].assign(value=values)
        sums = frame.groupby(["layer", "head", "pattern", "kind"], sort=False)["value"].sum().unstack("pattern")[words]
        scale = sums.max(axis=1).groupby(level="kind").sum()
        joined = sums.div(scale.reindex(sums.index.get_level_values("kind")).clip(lower=1e-300).to_numpy(), axis=0)
        joined = joined.groupby(level=["layer", "head"], sort=False).sum()
        found: dict[Place, np.ndarray] = {}
        for place in evidence.model.places:
            if place not in joined.index:
                raise refusal(PlanError, f"head {place[0]}.{place[1]}", f"{TABLE} has no row of it", "measure pattern_cost on this model")
            found[place] = np.append(joined.loc[place].to_numpy(dtype=np.float64), 0.0)
        return [*patterns, Dense()], found

    def _by_head(self, evidence: Evidence, patterns: list[Pattern], losses: Mapping[Place, np.ndarray]) -> dict[Place, Pattern]:
        usable = self._usable(patterns, self.dynamic, cache=False)
        density = np.array([patterns[at].density(evidence.length) for at in usable])
        items = [Options(losses[place][usable], density[None]) for place in evidence.model.places]
        assert evidence.density is not None
        taken = allocate(items, [evidence.density * len(items)])
        return {place: patterns[usable[at]] for place, at in zip(evidence.model.places, taken, strict=True)}

    def _usable(self, patterns: list[Pattern], dynamic: bool, *, cache: bool) -> list[int]:
        """Numbers of the candidates that may be taken: rules that choose keys once and drop the others save memory, the others compute."""
        allowed = [self.compensate or not getattr(one, "compensate", False) for one in patterns]
        saving = [one.static or (dynamic and isinstance(one, Budget) == cache) for one in patterns]
        return [at for at in range(len(patterns)) if saving[at] and allowed[at]]

    def _by_group(self, evidence: Evidence, patterns: list[Pattern], losses: Mapping[Place, np.ndarray]) -> dict[Place, Pattern]:
        usable = self._usable(patterns, self.dynamic, cache=True)
        density = np.array([patterns[at].density(evidence.length) for at in usable])
        cached = np.array([patterns[at].cached(evidence.length) for at in usable]) / evidence.length
        dims = dict(zip(evidence.model.layers, evidence.model.head_dim, strict=True))
        items, budgets = [], []
        total = sum(dims[layer] for layer, _ in evidence.groups)
        for group in evidence.groups:
            members = evidence.members(*group)
            loss = np.sum([losses[place][usable] for place in members], 0)
            rows = [cached * dims[group[0]] / total, density * len(members) / len(evidence.model.places)]
            items.append(Options(loss, np.stack(rows if evidence.density is not None else rows[:1])))
        budgets = [evidence.cache, *([evidence.density] if evidence.density is not None else [])]
        taken = allocate(items, [float(one or 0.0) for one in budgets])
        out: dict[Place, Pattern] = {}
        for group, at in zip(evidence.groups, taken, strict=True):
            out |= dict.fromkeys(evidence.members(*group), patterns[usable[at]])
        return out


def grown(pattern: Pattern, growth: float) -> Pattern:
    """A rule that counts keys, for texts `growth` times as long as those that it was measured on."""
    if isinstance(pattern, VerticalSlash):
        return replace(pattern, vertical=round(pattern.vertical * growth), slash=round(pattern.slash * growth))
    return replace(pattern, keep=round(pattern.keep * growth)) if isinstance(pattern, Budget) else pattern


def _values(table: pd.DataFrame, objective: str) -> np.ndarray:
    """The loss of every row of the table."""
    if objective == "mass":
        return (1.0 - table["mass"].to_numpy(dtype=np.float64)).clip(min=0)
    column, root = {"margin": ("squares", True), "norm": ("error", True)}.get(objective, (objective, False))
    values = table[column].to_numpy(dtype=np.float64)
    return np.sqrt(values) if root else values
