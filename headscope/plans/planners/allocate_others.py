"""The plans of the other planners under the same bounds: what allocating has to beat, and may borrow from."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from headscope.errors import HeadscopeError

if TYPE_CHECKING:
    from headscope.plans.patterns import Pattern
    from headscope.plans.plan import Place
    from headscope.plans.planners.base import Evidence, Planner


def others(evidence: Evidence) -> dict[str, dict[Place, Pattern]]:
    """Name -> its patterns, of every planner of causal models that keeps the evidence's bounds and whose measurements are there. None of
    them is measured for this: a planner without its probe is left out, as is one that cannot meet the bounds.
    """
    from headscope.plans.planners.registry import PLANNERS

    asked = [bound for bound in ("density", "cache") if getattr(evidence, bound) is not None]
    found: dict[str, dict[Place, Pattern]] = {}
    for name, cls in PLANNERS.items():
        if name == evidence.planner or not cls.causal or not set(asked) <= set(cls.bounds) or not known(evidence, cls):
            continue
        options: dict[str, Any] = {bound: getattr(evidence, bound) for bound in asked}
        options |= proportions(cls, evidence.length)
        source = evidence.profile if evidence.profile is not None else evidence.live("its rules are tried out")
        try:
            found[name] = dict(cls(length=evidence.length, **options).plan(source, evidence.scope).patterns)
        except HeadscopeError:  # it cannot meet the bounds, or not on this model
            continue
    return found


def known(evidence: Evidence, cls: type[Planner]) -> bool:
    """Whether what a planner stands on was measured."""
    needs = cls.requires
    have = all(evidence.profile is not None and name in evidence.profile.tables for name in needs.tables)
    if needs.statistics and (evidence.profile is None or evidence.profile.maps is None):
        return False
    return have and (not needs.metrics or any(evidence.has(*names) for names in needs.metrics))


def proportions(cls: type[Planner], length: int) -> dict[str, Any]:
    """Tiles and windows of a planner in proportion to the text: as published from 4,096 tokens on, smaller for shorter texts."""
    names = {item.name for item in fields(cls)}
    block = min(128, max(16, 1 << round(math.log2(max(1.0, length / 32)))))
    out: dict[str, Any] = {"block": block} if "block" in names else {}
    if cls.name == "xattention":
        out["stride"] = min(16, block // 4)
    if cls.name == "anchor":
        out["step"] = 4
    if cls.name in ("duo", "task_kv"):
        out |= {"recent": min(256, max(8, length // 32)), "sink": min(128 if cls.name == "duo" else 16, max(4, length // 128))}
    return out
