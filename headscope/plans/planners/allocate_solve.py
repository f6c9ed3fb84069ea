"""One knapsack over all heads: what each may have, what it loses with it, what it costs; bounds on compute, on memory, or on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from headscope.plans.plan import SparsePlan
from headscope.plans.planners.allocation import Options, allocate

if TYPE_CHECKING:
    from headscope.plans.patterns import Pattern
    from headscope.plans.plan import Place
    from headscope.plans.planners.base import Evidence

Lists = Mapping["Place", Sequence["Pattern"]]
Losses = Mapping["Place", np.ndarray]


def solved(evidence: Evidence, patterns: Lists, losses: Losses) -> dict[Place, Pattern]:
    """The choice of least summed loss within the evidence's bounds. `patterns`: place -> candidates, as many for every head of a key head;
    where the cache is bounded those heads take the same number, since what a key head keeps is what its neediest query head needs.
    """
    costs: dict[Pattern, float] = {}

    def density(pattern: Pattern) -> float:
        if pattern not in costs:
            costs[pattern] = pattern.density(evidence.length)
        return costs[pattern]

    if evidence.cache is None:
        places = evidence.model.places
        items = [Options(losses[place], np.array([[density(one) for one in patterns[place]]])) for place in places]
        taken = allocate(items, [float(evidence.density or 0.0) * len(items)])
        return {place: patterns[place][at] for place, at in zip(places, taken, strict=True)}
    dims = dict(zip(evidence.model.layers, evidence.model.head_dim, strict=True))
    total = sum(dims[layer] for layer, _ in evidence.groups)
    held = cached(evidence, patterns)
    items = []
    for group in evidence.groups:
        members = evidence.members(*group)
        rows = [held[group] * dims[group[0]] / total]
        if evidence.density is not None:
            rows.append(np.sum([[density(one) for one in patterns[place]] for place in members], 0) / len(evidence.model.places))
        items.append(Options(np.sum([losses[place] for place in members], 0), np.stack(rows)))
    budgets = [evidence.cache, *([evidence.density] if evidence.density is not None else [])]
    out: dict[Place, Pattern] = {}
    for group, at in zip(evidence.groups, allocate(items, budgets), strict=True):
        out |= {place: patterns[place][at] for place in evidence.members(*group)}
    return out


def cached(evidence: Evidence, patterns: Lists) -> dict[Place, np.ndarray]:
    """(layer, key head) -> share of its keys that stay where its query heads all have their candidate of each number."""
    count = min(len(listed) for listed in patterns.values())
    out: dict[Place, list[float]] = {group: [] for group in evidence.groups}
    for at in range(count):
        keys = SparsePlan(evidence.model, {place: listed[at] for place, listed in patterns.items()}).cached_keys(evidence.length)
        for group, kept in keys.items():
            out[group].append(kept / evidence.length)
    return {group: np.array(values) for group, values in out.items()}
