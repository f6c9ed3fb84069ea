"""What an imported file says, as a HeadProfile: shown, compared and exported again like one that was measured.

Most published files know less than a profile does. Retrieval_Head's has scores and no key heads; DuoAttention's has key heads and no query
heads. What is missing is taken from `like` (a model, a profile, a plan) or from headscope's report beside the file, and what remains
unknown is said in the card's notes, never guessed without a word.

The plan of a file that has one travels in the card (`parameters["imported"]["plan"]`), so it survives saving: `plan_of(profile)` finds it
in an imported profile and in a run directory made from one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import ExportError, refusal
from headscope.plans.plan import Place, PlanModel, SparsePlan
from headscope.profile.card import RunCard, now, version_facts
from headscope.profile.head_profile import HeadProfile
from headscope.profile.roles import assign_roles
from headscope.store.files import canonical_heads

if TYPE_CHECKING:
    from headscope.scope import Scope

    Like = PlanModel | SparsePlan | HeadProfile | Scope
    """Whatever says what the model's attention looks like."""

SHOWN = 8_192
"""Tokens at which the densities of an imported plan are shown where the file names no length."""
UNKNOWN_DIM = 1
"""Stands for a head_dim that no file said."""


@dataclass(frozen=True)
class Hints:
    """What a reader may know besides the file: the model's shape, the name to give it, and a length that rules in shares refer to."""

    model: PlanModel | None = None
    name: str = "imported"
    length: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def shape(
        self,
        heads: Sequence[int],
        *,
        layers: Sequence[int] | None = None,
        kv_heads: Sequence[int] | None = None,
        by_key_head: bool = False,
    ) -> PlanModel:
        """The model of a file with these heads per layer (key heads with `by_key_head`). ExportError when `like` has other ones."""
        numbers = tuple(range(len(heads)) if layers is None else layers)
        counts = tuple(heads)
        if self.model is None:
            own = counts if kv_heads is None else tuple(kv_heads)
            return PlanModel(self.name, numbers, counts, own, (UNKNOWN_DIM,) * len(counts))
        known = self.model.kv_heads if by_key_head else self.model.heads
        if self.model.layers != numbers or tuple(known) != counts:
            what = "key heads" if by_key_head else "heads"
            raise refusal(
                ExportError,
                f"a file of {len(counts)} layers with {_span(counts)} {what}",
                f"{self.model.name} has {len(self.model.layers)} layers with {_span(known)}",
                "name the model that the file was made for",
            )
        return self.model


@dataclass
class Found:
    """What a format's reader made of a file."""

    model: PlanModel
    plan: SparsePlan | None = None
    scores: dict[str, dict[Place, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class ImportedProfile(HeadProfile):
    """A HeadProfile read from another engine's file. `format`: its name; `plan_found`: the SparsePlan that the file is, or None."""

    format: str = ""

    @property
    def plan_found(self) -> SparsePlan | None:
        """The plan of the file; None for a file of scores."""
        return plan_of(self)


def plan_of(profile: HeadProfile) -> SparsePlan | None:
    """The plan that an imported profile carries, also after it was saved and loaded; None for a measured one."""
    given = facts_of(profile).get("plan")
    return None if given is None else SparsePlan.from_dict(given)


def facts_of(profile: HeadProfile) -> Mapping[str, Any]:
    """What an import noted beside scores and plan (format, sink, recent, ...); empty for a measured profile."""
    found = profile.card.parameters.get("imported", {})
    return found if isinstance(found, dict) else {}


def shape_of(like: Like | None) -> PlanModel | None:
    """The shape of a model, from whatever knows it."""
    if like is None or isinstance(like, PlanModel):
        return like
    return like.model if isinstance(like, SparsePlan) else PlanModel.of(like)


def model_from(given: Any, path: Path) -> PlanModel:
    """The shape of a model from plain data. ExportError for anything else."""
    lists = ("layers", "heads", "kv_heads", "head_dim")
    rows = [given.get(name) if isinstance(given, dict) else None for name in lists]
    counted = [row for row in rows if isinstance(row, list) and row and all(type(one) is int and one >= 0 for one in row)]
    if len(counted) != len(lists) or len({len(row) for row in counted}) != 1:
        raise refusal(ExportError, str(path), "the model in it is damaged", "write the export again")
    layers, heads, kv_heads, dims = (tuple(row) for row in counted)
    if any(one < 1 or two < 1 or one % two for one, two in zip(heads, kv_heads, strict=True)):
        raise refusal(
            ExportError, str(path), f"heads {heads} on key heads {kv_heads}", "they are shared out evenly; write the export again"
        )
    return PlanModel(str(given.get("name", "imported")), layers, heads, kv_heads, dims, str(given.get("fingerprint", "")))


def profile_of(found: Found, name: str, path: Path, length: int | None) -> ImportedProfile:
    """The profile of what a reader found."""
    import pandas as pd

    model, plan = found.model, found.plan
    scores = dict(found.scores)
    at = length or SHOWN
    if plan is not None:
        known = {pattern: pattern.density(at) for pattern in set(plan.patterns.values())}
        scores["kept_share"] = {place: known[pattern] for place, pattern in plan.patterns.items()}
    rows: list[dict[str, Any]] = []
    for layer, head in model.places:
        facts = {"layer": layer, "head": head, "kv_head": model.kv_head(layer, head), "module": f"layers.{layer}", "kind": "full"}
        rows.append({**facts, **{metric: float(values[layer, head]) for metric, values in scores.items()}})
    table = pd.DataFrame(rows)
    table["roles"], table["reasons"] = assign_roles(table)
    notes = list(found.notes)
    if set(model.head_dim) == {UNKNOWN_DIM}:
        notes.append("the file does not say the model's head_dim; pass like= (--like) to make its plan runnable")
    card = RunCard(
        model={
            "name": model.name,
            "source": str(path),
            "revision": None,
            "class": "imported",
            "fingerprint": model.fingerprint,
            "layers": len(model.layers),
            "heads": max(model.heads),
            "kv_heads": max(model.kv_heads),
            "head_dim": max(model.head_dim),
            "parameters": 0,
            "dtype": "unknown",
            "device": "none",
            "max_length": length,
        },
        data=[],
        probes=[{"name": f"import:{name}", "parameters": {}, "source": name}],
        metrics={metric: {"probe": f"import:{name}", "unit": "as imported", "higher_is": _meaning(metric, at)} for metric in scores},
        numbers={},
        attention_kernels=[],
        statistics_kernel="none: imported",
        parameters={"imported": {"format": name, **found.facts, "plan": None if plan is None else plan.to_dict()}},
        seeds={},
        versions=version_facts(),
        headscope_version=_version(),
        created=now(),
        notes=notes,
    )
    profile = ImportedProfile(canonical_heads(table), card)
    profile.format = name
    return profile


def _meaning(metric: str, length: int) -> str:
    return f"keeps more of the causal entries at {length:,} tokens" if metric == "kept_share" else "as the file has it"


def _version() -> str:
    from headscope import __version__

    return __version__


def _span(counts: Iterable[int]) -> str:
    listed = sorted(set(counts))
    return str(listed[0]) if len(listed) == 1 else f"{listed[0]}..{listed[-1]}"
