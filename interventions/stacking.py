"""Stacking: several edits at once, in one order that does not depend on who was written first.

Edits act by site: scores (S), probabilities (P), head outputs (Z), residual stream (R). Within a site, edits of different heads or rows
never meet. Two that do meet are let through when they commute, so that their order says nothing; otherwise they are refused unless both
carry an `order`. The silent failure this avoids is a result that changes when two lines of a script change places.

An intervention that is no HeadEdit (a recorder, a user's own) stays where it was put, and edits are ordered on either side of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import VERSION, Intervention, check_version, from_spec, spec_of
from headscope.interventions.head_edit import HeadEdit
from headscope.interventions.values import Values, write_values

if TYPE_CHECKING:
    from headscope.scope import Scope

RANK = {"S": 0, "P": 1, "Z": 2, "R": 3}

COMMUTING = {
    frozenset(pair)
    for pair in (
        ("scale", "scale"),
        ("add", "add"),
        ("rescale", "rescale"),
        ("bias", "bias"),
        ("temperature", "temperature"),
        ("query", "temperature"),
        ("query", "bias"),
        ("replace q", "bias"),
        ("replace q", "replace k"),
        ("replace q", "replace v"),
        ("replace k", "replace v"),
        ("replace k", "query"),
        ("replace v", "query"),
        ("replace k", "bias"),
        ("replace v", "bias"),
        ("replace k", "temperature"),
        ("replace v", "temperature"),
        ("replace v", "boost"),
    )
}
"""Kinds of edits (`HeadEdit.algebra`) whose order at one site makes no difference."""


def in_site_order(active: Sequence[Any]) -> list[Any]:
    """Interventions in the order in which they act."""
    out: list[Any] = []
    run: list[HeadEdit] = []
    for one in (*active, None):
        if isinstance(one, HeadEdit):
            run.append(one)
            continue
        out += sorted(run, key=lambda edit: (RANK[edit.acts_at()], 0 if edit.order is None else edit.order))
        run = []
        if one is not None:
            out.append(one)
    return out


def refuse_conflicts(active: Sequence[Any], new: Any) -> None:
    """InterventionError when a bound edit meets an active one at one site of a head, and which comes first would matter."""
    if not isinstance(new, HeadEdit):
        return
    for old in active:
        if isinstance(old, HeadEdit) and (shared := _shared(old, new)) and not _settled(old, new):
            name = f"{type(old).__name__} and {type(new).__name__}" if type(old) is not type(new) else f"two {type(old).__name__}"
            raise refusal(
                InterventionError,
                f"{name} on head {shared}",
                f"both edit its {_SITES[new.acts_at()]}, and the result depends on which comes first",
                "give them order=1 and order=2, or other heads, phases or positions",
            )


_SITES = {"S": "scores", "P": "attention probabilities", "Z": "output", "R": "residual stream"}


def _shared(old: HeadEdit, new: HeadEdit) -> str:
    """A head whose site both edit at rows that may be the same; "" when there is none."""
    if old.acts_at() != new.acts_at() or not _rows_may_meet(old, new):
        return ""
    for module, heads in new.bound.heads.items():
        both = sorted(set(heads) & set(old.bound.heads.get(module, [])))
        if both:
            return f"{module}.{both[0]}"
    return ""


def _settled(old: HeadEdit, new: HeadEdit) -> bool:
    if old == new and old.algebra() in ("replace", "scale"):
        return old.algebra() == "replace" or getattr(old, "mode", "") == "zero" or frozenset((old.algebra(),)) in COMMUTING
    if frozenset((old.algebra(), new.algebra())) in COMMUTING:
        return True
    return old.order is not None and new.order is not None and old.order != new.order


def _rows_may_meet(a: HeadEdit, b: HeadEdit) -> bool:
    if {a.phase, b.phase} == {"prefill", "decode"}:
        return False
    if a.branches is not None and b.branches is not None and not set(a.branches) & set(b.branches):
        return False
    if a.steps is not None and b.steps is not None and (a.steps[1] <= b.steps[0] or b.steps[1] <= a.steps[0]):
        return False
    if {a.positions, b.positions} == {"image", "text"} if isinstance(a.positions, str) and isinstance(b.positions, str) else False:
        return False
    if isinstance(a.positions, slice | tuple) and isinstance(b.positions, slice | tuple):
        return _meet(a.positions, b.positions)
    return True


def _meet(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return bool(set(a) & set(b))
    if isinstance(a, tuple):
        a, b = b, a
    low, high = a.start or 0, a.stop
    if isinstance(b, tuple):
        return any(low <= one and (high is None or one < high) for one in b)
    low = max(low, b.start or 0)
    high = min((one for one in (high, b.stop) if one is not None), default=None)
    return high is None or low < high


@dataclass(frozen=True)
class Stack:
    """Several interventions as one: `with scope.intervene(*stack)`. They act in the order of their sites."""

    interventions: tuple[Intervention, ...]

    def __post_init__(self) -> None:
        given = self.interventions
        listed = (given,) if isinstance(given, Intervention) else tuple(given)
        for one in listed:
            if not isinstance(one, Intervention):
                raise refusal(InterventionError, repr(one), "it is not an intervention", "pass e.g. HeadMask(heads=[(0, 0)])")
        if not listed:
            raise refusal(InterventionError, "a stack of nothing", "there is nothing to change", "pass at least one intervention")
        object.__setattr__(self, "interventions", listed)

    def __iter__(self) -> Iterator[Intervention]:
        return iter(self.interventions)

    def __len__(self) -> int:
        return len(self.interventions)

    def check(self, scope: Scope) -> None:
        """InterventionError when one does not fit the model, or two conflict; nothing is run."""
        bound: list[Any] = []
        for one in self.interventions:
            new = one.bind(scope)
            refuse_conflicts(bound, new)
            bound.append(new)

    def explain(self) -> str:
        """In words, one line per intervention in the order in which they act."""
        ordered = in_site_order(self.interventions)
        return "\n".join(f"{index}. {one.explain()}" for index, one in enumerate(ordered, start=1))

    def to_json(self, tensors: str | Path | None = None) -> str:
        """{"version": 1, "interventions": [...]}; all tensors go to one safetensors file."""
        stored: dict[str, Values] = {}
        specs = []
        for index, one in enumerate(self.interventions):
            values = {key: value for key, value in one.settings().items() if isinstance(value, Values)}
            if not values:
                specs.append(spec_of(one))
                continue
            if tensors is None:
                raise refusal(
                    InterventionError, f"{type(one).__name__} with {', '.join(values)}", "JSON holds no tensors", "pass tensors=file"
                )
            named = {f"{index}.{key}": value for key, value in values.items()}
            stored |= named
            plain = {key: value for key, value in one.settings().items() if key not in values}
            places = {key: value.to_dict(f"{index}.{key}", Path(tensors).name) for key, value in values.items()}
            specs.append({"intervention": one.name, "version": VERSION, **plain, **places})
        if stored and tensors is not None:
            write_values(Path(tensors), stored)
        return json.dumps({"version": VERSION, "interventions": specs}, indent=2)

    def save(self, path: str | Path) -> Path:
        """Writes the JSON, and beside it, where there are tensors, a safetensors file of the same name. Returns the path."""
        path = Path(path)
        text = self.to_json(path.with_suffix(".safetensors"))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text + "\n")
        partial.replace(path)
        return path

    @classmethod
    def from_json(cls, text: str, folder: str | Path = ".") -> Stack:
        """A stack from `to_json`, or from the JSON of one intervention or of a list of them."""
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise refusal(InterventionError, f"{text[:60]!r}", f"it is no JSON ({error})", "pass what Stack.to_json gave") from None
        if isinstance(given, dict) and "interventions" in given:
            given = dict(given)
            check_version(given)
            given = given["interventions"]
        listed = given if isinstance(given, list) else [given]
        return cls(tuple(from_spec(one, folder) for one in listed))

    @classmethod
    def load(cls, path: str | Path) -> Stack:
        """A stack from a file. InterventionError when it is missing or says nothing that can be read."""
        path = Path(path)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise refusal(InterventionError, str(path), f"it cannot be read ({error})", "pass the path of a specification") from None
        return cls.from_json(text, path.parent)


__all__ = ["COMMUTING", "RANK", "Stack", "in_site_order", "refuse_conflicts"]
