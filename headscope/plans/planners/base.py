"""Planner: one method that turns what is known about the heads into a sparse plan, as one small frozen dataclass.

A planner never measures on the quiet. It says what it stands on (`requires`), and where a profile lacks that, the error names the metric
and the command that measures it: a plan made from a default in place of a measurement would look like any other plan. A live scope may be
given in place of a profile; then the probes that are missing are run, and the plan's notes say so.

`density` and `cache` mean the same for every planner, or the figures could not stand in one plot: the share of the causal (row, key)
entries of a prefill of `length` tokens that the plan computes, over all heads, and the share of the dense KV cache that must stay after it.
They are bounds that are never passed. Each method's own dial (a quantile of gates, a threshold, a window) is a field of its planner and
excludes them. Methods that prefill dense and then drop keys know `cache` only, and refuse `density`.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.patterns import LARGEST, Dense, Pattern
from headscope.plans.plan import Place, PlanModel, SparsePlan

if TYPE_CHECKING:
    import pandas as pd

    from headscope.profile import HeadProfile
    from headscope.scope import Scope

    Source: TypeAlias = Scope | HeadProfile | PlanModel
    """What a plan can be made from; a PlanModel (a shape alone) is enough for methods that measure nothing."""

T_ = TypeVar("T_")
SLACK = 1e-9
"""Rounding allowed to a bound."""


@dataclass(frozen=True, slots=True)
class Requires:
    """What a planner stands on: `metrics`, alternatives of which one set must be there; `tables` of active probes ("probe.name");
    `statistics` of the shown text ("column/column_sum", "map/block_mass"); `scope`: a live model.
    """

    metrics: tuple[tuple[str, ...], ...] = ()
    tables: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    scope: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "metrics": [list(one) for one in self.metrics],
            "tables": list(self.tables),
            "statistics": list(self.statistics),
            "scope": self.scope,
        }


@dataclass(eq=False)
class Evidence:
    """What a planner may look at: `model`, `length` (tokens that densities and budgets are stated at), and the source's measurements.

    Values are [L, H] float64, NaN where a layer has fewer heads. `notes` collects what a reader of the plan must know.
    """

    model: PlanModel
    length: int
    planner: str
    profile: HeadProfile | None = None
    scope: Scope | None = None
    notes: list[str] = field(default_factory=list)
    density: float | None = None
    cache: float | None = None

    @property
    def bounded(self) -> bool:
        """True when density or cache is given."""
        return self.density is not None or self.cache is not None

    def fits(self, patterns: Mapping[Place, Pattern]) -> bool:
        """True when a plan of these patterns passes neither bound."""
        made = SparsePlan(self.model, patterns)
        within = self.density is None or made.density(self.length) <= self.density * (1 + SLACK)
        return within and (self.cache is None or made.kv_share(self.length) <= self.cache * (1 + SLACK))

    def has(self, *metrics: str) -> bool:
        """True when the profile has all these metrics."""
        return self.profile is not None and all(name in self.profile.metrics for name in metrics)

    def metric(self, name: str) -> np.ndarray:
        """[L, H] float64. PlanError where it was not measured, or is NaN for a head that exists."""
        if not self.has(name):
            self._measure(name, _probe_of(name))
        assert self.profile is not None
        values = np.array(self.profile.matrix(name), dtype=np.float64)
        self._finite(name, values)
        return values

    def table(self, name: str) -> pd.DataFrame:
        """A table of an active probe, "moa.spans". PlanError where it was not measured."""
        if self.profile is None or name not in self.profile.tables:
            self._measure(name, name.partition(".")[0])
        assert self.profile is not None
        if name not in self.profile.tables:
            raise refusal(PlanError, f"planner {self.planner!r}", f"it reads the table {name}", "profile again with this version")
        return self.profile.tables[name]

    def block_maps(self) -> tuple[int, dict[Place, np.ndarray]]:
        """(tokens a side of a cell, (layer, head) -> block_mass [n, n]) of the profile's text, or of one that a live scope reads now.
        PlanError for a run without maps.
        """
        if self.profile is None and self.scope is not None:
            limit = min(2048, self.length, self.scope.max_length or 2048)
            self.profile = self.scope.profile(probes=["streaming"], context=limit, maps=True)
            self.note(f"block maps were measured for this plan, on a text of {limit} tokens")
        info = None if self.profile is None else self.profile.maps
        if self.profile is None or info is None or "block_mass" not in info.planes:
            raise refusal(
                PlanError,
                f"planner {self.planner!r}",
                "it needs block maps, and this source has none",
                f"measure them: headscope profile {self.where} --out RUN (without --no-maps)",
            )
        return info.block, {place: self.profile.map("block_mass", *place).astype(np.float64) for place in self.model.places}

    def live(self, why: str) -> Scope:
        """The live model. PlanError where a profile was given."""
        if self.scope is None:
            command = f"headscope.load({self.where!r}) and headscope.plan(scope, {self.planner!r})"
            raise refusal(PlanError, f"planner {self.planner!r} on a profile", why, f"pass a live scope: {command}")
        return self.scope

    @property
    def where(self) -> str:
        """How the model is named on a command line."""
        card = getattr(self.profile, "card", None)
        facts: Mapping[str, Any] = {} if card is None else card.model
        return str(facts.get("source") or getattr(self.scope, "source", "") or facts.get("name") or self.model.name)

    def by_group(self, values: np.ndarray, join: Callable[[np.ndarray], Any] = np.max) -> np.ndarray:
        """[L, H] -> [L, Hkv]: the values of the query heads that share a key head, joined."""
        out = np.full((len(self.model.layers), max(self.model.kv_heads)), np.nan)
        for at, (heads, groups) in enumerate(zip(self.model.heads, self.model.kv_heads, strict=True)):
            out[at, :groups] = [join(part) for part in values[at, :heads].reshape(groups, -1)]
        return out

    def members(self, layer: int, kv_head: int) -> list[Place]:
        """The query heads (layer, head) that read a key head."""
        at = self.model.layers.index(layer)
        size = self.model.heads[at] // self.model.kv_heads[at]
        return [(layer, head) for head in range(kv_head * size, (kv_head + 1) * size)]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Every (layer, key head), in order."""
        return [(layer, group) for layer, count in zip(self.model.layers, self.model.kv_heads, strict=True) for group in range(count)]

    def at(self, values: np.ndarray, place: Place) -> float:
        """The value of a (layer, head) or (layer, key head) in a matrix."""
        return float(values[self.model.layers.index(place[0]), place[1]])

    def note(self, text: str) -> None:
        """Adds a note to the plan, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _measure(self, what: str, probe: str) -> None:
        """Runs a probe on the live scope, or says how to measure it."""
        if self.scope is None:
            have = "the shape of a model has no measurements" if self.profile is None else "this profile does not have it"
            raise refusal(
                PlanError,
                f"planner {self.planner!r}",
                f"it needs {what!r}, and {have}",
                f"measure it: headscope profile {self.where} --probes {probe} --out RUN",
            )
        from headscope.profile.head_profile import HeadProfile

        limit = self.scope.max_length
        context = min(2048 if limit is None else min(limit, 2048), self.length)
        found = self.scope.profile(probes=[probe], context=context, maps=False, keep_statistics=False)
        self.note(f"probe {probe} was run for this plan, on texts of {context} tokens")
        if self.profile is None:
            self.profile = found
            return
        new = [name for name in found.metrics if name not in self.profile.metrics]
        table = self.profile.table.merge(found.table[["layer", "head", *new]], on=["layer", "head"], how="left")
        tables = {**self.profile.tables, **found.tables}
        self.profile = HeadProfile(table, self.profile.card, self.profile._content, tables=tables)

    def _finite(self, name: str, values: np.ndarray) -> None:
        for layer, head in self.model.places:
            if not math.isfinite(self.at(values, (layer, head))):
                raise refusal(
                    PlanError,
                    f"{name} of head {layer}.{head}",
                    "it is not a number, and a head without one cannot be ranked",
                    f"measure it again: headscope profile {self.where} --probes {_probe_of(name)} --out RUN",
                )


@dataclass(frozen=True)
class Planner(ABC):
    """Base of the planners. `name`; `source`: paper, arXiv id, official code; `requires`. Instance fields are the method's parameters.

    - `density`: the most that may be computed, a share of the causal entries of a prefill of `length` tokens, 0 < density <= 1.
    - `cache`: the most that may stay cached, a share of the dense KV cache after `length` tokens, 0 < cache <= 1. Without either, the
      method's own parameters say how much is kept.
    - `length`: tokens that density and budgets are stated at; None takes the model's context length, or the profile's longest text.
    """

    density: float | None = field(default=None, kw_only=True)
    cache: float | None = field(default=None, kw_only=True)
    length: int | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    source: ClassVar[str]
    requires: ClassVar[Requires] = Requires()
    dials: ClassVar[tuple[str, ...]] = ()
    """The method's own parameters that say how much is kept, and so exclude `density` and `cache`."""
    bounds: ClassVar[tuple[str, ...]] = ("density", "cache")
    """Which of the two bounds the method can keep."""
    causal: ClassVar[bool] = True
    """False for methods that also plan models whose rows see every key."""

    def __post_init__(self) -> None:
        for bound in ("density", "cache"):
            if getattr(self, bound) is None:
                continue
            share(self.name, bound, getattr(self, bound))
            if bound not in self.bounds:
                why = "its prefill is dense, and keys are dropped afterwards" if bound == "density" else "it drops no keys from the cache"
                raise refusal(PlanError, f"{bound} of planner {self.name!r}", why, f"pass {' or '.join(self.bounds + self.dials)}")
            given = [name for name in self.dials if getattr(self, name) is not None]
            if given:
                raise refusal(PlanError, f"{bound} beside {', '.join(given)}", "each says how much is kept", "pass one of them")
        if self.length is not None:
            whole(self.name, "length", self.length, 1)
        self.check()

    def check(self) -> None:  # noqa: B027 - a planner without parameters has nothing to check
        """Raises PlanError for parameters that describe no plan."""

    @abstractmethod
    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        """A pattern for every (layer, head) of the model."""

    def plan(self, source: Source, scope: Scope | None = None) -> SparsePlan:
        """The plan for a profile, a live scope, or (methods that measure nothing) a PlanModel. `scope`: the live model beside its profile,
        for methods that measure more, or check what they made.

        Raises PlanError when a measurement is missing, with the command that makes it, or when the budget cannot be met.
        """
        evidence = evidence_of(self, source, scope)
        evidence.density, evidence.cache = self.density, self.cache
        patterns = self.choose(evidence)
        length = evidence.length
        plan = SparsePlan(evidence.model, patterns, self.name, {**self.parameters(), "length": length}, tuple(evidence.notes))
        for bound, kept in (("density", plan.density(length)), ("cache", plan.kv_share(length))):
            most = getattr(self, bound)
            if most is not None and kept > most * (1 + SLACK):
                raise refusal(
                    PlanError,
                    f"{bound} {most} at {length:,} tokens",
                    f"the leanest plan of {self.name!r} with these parameters keeps {kept:.4f}",
                    f"pass {bound}={math.ceil(kept * 1000) / 1000} or more, or smaller windows",
                )
        return plan

    def parameters(self) -> dict[str, Any]:
        """The method's parameters, as they go into the plan."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """This planner as plain data, for lists and pages."""
        doc = inspect.cleandoc(cls.__doc__ or "")
        return {
            "name": cls.name,
            "title": doc.split("\n\n")[0].replace("\n", " "),
            "page": doc,
            "requires": cls.requires.to_dict(),
            "parameters": {item.name: plain(item.default) for item in fields(cls)},
            "source": cls.source,
        }


def evidence_of(planner: Planner, source: Source, scope: Scope | None = None) -> Evidence:
    """What `planner` may look at in a source, and in the live model beside it. PlanError for a source that is none, or for an encoder."""
    from headscope.profile.head_profile import HeadProfile
    from headscope.scope import Scope

    if isinstance(source, PlanModel):
        if planner.length is None:
            raise refusal(PlanError, f"planner {planner.name!r} on a shape", "it does not say how long texts are", "pass length=32768")
        return Evidence(source, planner.length, planner.name)
    if isinstance(source, HeadProfile):
        card = source.card
        longest = card.model.get("max_length") or max((int(row["tokens"]) for row in card.data), default=None)
        model = PlanModel.of(source)
        found = Evidence(model, _length(planner, longest, model.name), planner.name, profile=source, scope=scope)
        if scope is not None:
            SparsePlan.uniform(model, Dense()).check(scope)
        if planner.requires.scope:
            found.live("it runs the model")
        return found
    if isinstance(source, Scope):
        other = next((module.name for module in source.topology.main if not module.causal), None)
        if other is not None and planner.causal:
            raise refusal(PlanError, f"planner {planner.name!r} on {source.name}", f"{other} is not causal", "plan a causal model")
        return Evidence(PlanModel.of(source), _length(planner, source.max_length, source.name), planner.name, scope=source)
    raise refusal(PlanError, f"a {type(source).__name__}", "plans are made from what is known of heads", "pass a Scope or a HeadProfile")


def _length(planner: Planner, longest: int | None, name: str) -> int:
    found = planner.length or longest
    if not found:
        raise refusal(PlanError, f"planner {planner.name!r} on {name}", "no length is known", "pass length=32768")
    return int(found)


def _probe_of(metric: str) -> str:
    """The probe that measures a metric; PlanError for a metric of none."""
    from headscope.probes.registry import REGISTRY

    for name, cls in REGISTRY.items():
        if any(one.name == metric for one in cls.metrics):
            return name
    raise unknown_name(PlanError, "metric", metric, [one.name for cls in REGISTRY.values() for one in cls.metrics])


# ---- parameters -----------------------------------------------------------------------------------------------------


def share(planner: str, name: str, value: Any, *, zero: bool = False) -> None:
    """PlanError for a value that is no share: 0 < value <= 1 (or 0 <= with `zero`)."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and (0 if zero else 1e-12) <= value <= 1
    if not good:
        low = "0 <=" if zero else "0 <"
        raise refusal(PlanError, f"{planner} with {name}={value!r}", "it is a share", f"use {low} {name} <= 1")


def whole(planner: str, name: str, value: Any, lowest: int = 0) -> None:
    """PlanError for a value that does not count tokens."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise refusal(PlanError, f"{planner} with {name}={value!r}", f"it counts and is {lowest} or more", "correct it")
    if value > LARGEST:
        raise refusal(PlanError, f"{planner} with {name}={value}", f"it counts, {LARGEST:,} at most", "use a smaller one")


def plain(value: Any) -> Any:
    """A parameter as JSON holds it."""
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


# ---- ranking under a budget -----------------------------------------------------------------------------------------


def ranked(values: Mapping[T_, float]) -> list[T_]:
    """Keys by value, largest first; equal ones in the order of the mapping, so that the same scores always give the same plan."""
    listed = list(values)
    return [listed[at] for at in sorted(range(len(listed)), key=lambda at: (-values[listed[at]], at))]


def longest(order: Sequence[T_], fits: Callable[[Sequence[T_]], bool]) -> Sequence[T_]:
    """The longest prefix of `order` that fits; empty where none does. What fits may not begin to fit again as prefixes grow."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(order[:middle]) else (low, middle - 1)
    return order[:low]


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest whole number of low..high that fits; `low` where none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
