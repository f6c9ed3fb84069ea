"""The planners by name. One line each; a name that comes twice is refused when this module is imported."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.planners.allocate import Allocate
from headscope.plans.planners.anchor import Anchor
from headscope.plans.planners.base import Planner
from headscope.plans.planners.duo import Duo
from headscope.plans.planners.flexprefill import FlexPrefill
from headscope.plans.planners.headkv import HeadKV
from headscope.plans.planners.hylra import HyLRA
from headscope.plans.planners.minference import MInference
from headscope.plans.planners.moa import MoaPlanner
from headscope.plans.planners.power import PowerPlanner
from headscope.plans.planners.razor import Razor
from headscope.plans.planners.s2 import S2
from headscope.plans.planners.snapkv import SnapKV
from headscope.plans.planners.sparse_d import SparseD
from headscope.plans.planners.task_kv import TaskKV
from headscope.plans.planners.tca import Tca
from headscope.plans.planners.tidal import Tidal
from headscope.plans.planners.xattention import XAttention

if TYPE_CHECKING:
    from headscope.plans.plan import SparsePlan
    from headscope.plans.planners.base import Source
    from headscope.scope import Scope


def register(*classes: type[Planner]) -> dict[str, type[Planner]]:
    """Planner classes by name; PlanError when a name comes twice."""
    found: dict[str, type[Planner]] = {}
    for cls in classes:
        if cls.name in found:
            raise refusal(PlanError, f"planner {cls.name!r}", f"{found[cls.name].__name__} has that name already", "choose another name")
        found[cls.name] = cls
    return found


PLANNERS = register(
    Allocate,
    Duo,
    Razor,
    SnapKV,
    HeadKV,
    TaskKV,
    MoaPlanner,
    Tca,
    PowerPlanner,
    S2,
    MInference,
    Tidal,
    HyLRA,
    SparseD,
    XAttention,
    FlexPrefill,
    Anchor,
)
"""Every planner."""


def planner(method: str | Planner | type[Planner], **options: Any) -> Planner:
    """A planner from a name, a class or an instance, with its options. PlanError for an unknown name or option."""
    if isinstance(method, Planner):
        if options:
            raise refusal(PlanError, f"options {', '.join(options)} beside {method!r}", "it has its own", "use dataclasses.replace")
        return method
    if isinstance(method, str):
        if method not in PLANNERS:
            raise unknown_name(PlanError, "planner", method, PLANNERS)
        method = PLANNERS[method]
    if not (isinstance(method, type) and issubclass(method, Planner)):
        raise refusal(PlanError, f"planner {method!r:.60}", "it is no name and no planner", f"use one of {', '.join(PLANNERS)}")
    known = {item.name for item in fields(method)}
    for name in options:
        if name not in known:
            raise unknown_name(PlanError, f"option of planner {method.name!r}", name, known)
    return method(**options)


def plan(source: Source, method: str | Planner | type[Planner], *, scope: Scope | None = None, **options: Any) -> SparsePlan:
    """A sparse plan: `plan(profile, "duo", density=0.25)`.

    `source`: a HeadProfile, a live Scope, or a PlanModel for methods that measure nothing. `method`: a name of PLANNERS, a class or an
    instance. `scope`: the live model beside its profile, for methods that measure more or check what they made. `options`: the planner's
    parameters; `density`, `cache` and `length` mean the same for all of them (see `headscope.plans.planners`).
    Raises PlanError for an unknown name or option, a missing measurement (with the command that makes it), and a budget that cannot be met.
    """
    return planner(method, **options).plan(source, scope)
