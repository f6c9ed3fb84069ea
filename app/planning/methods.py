"""Which planners a run can serve, and what it lacks for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headscope.plans.planners.base import Planner
    from headscope.profile import HeadProfile


@dataclass(frozen=True, slots=True)
class Method:
    """A planner in the list. `lacks`: what must be measured first, "" when nothing."""

    name: str
    title: str
    source: str
    bounds: tuple[str, ...]
    lacks: str


def methods_for(profile: HeadProfile) -> list[Method]:
    """Every planner, those that the run can serve first."""
    from headscope.plans.planners import PLANNERS

    found = []
    for name, cls in PLANNERS.items():
        about = cls.describe()
        found.append(Method(name, str(about["title"]), cls.source, cls.bounds, lacking(cls, profile)))
    return sorted(found, key=lambda one: bool(one.lacks))


def lacking(cls: type[Planner], profile: HeadProfile) -> str:
    """What a run lacks for a planner, in a few words."""
    needs = cls.requires
    if needs.scope:
        return "a live model"
    if needs.metrics and not any(all(name in profile.metrics for name in names) for names in needs.metrics):
        return " or ".join(" and ".join(names) for names in needs.metrics)
    missing = [name for name in needs.tables if name not in profile.tables]
    return ", ".join(missing)
