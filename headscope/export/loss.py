"""LossReport: what was asked for, what was written, and what the difference costs, head by head.

Formats of other engines hold less than a plan does. A conversion that rounds in silence gives a model that is worse for reasons nobody can
see, so every export comes with this report, for people and as JSON, and an export that changes a head's keys is refused unless `lossy`.

`mass_lost` is the share of a head's attention mass that the asked pattern keeps and the written one drops, on the run's shown text;
negative where the target keeps more (`headscope.plans.mass`: exact where the run kept q and k of a text of up to 8,192 tokens, else from
its block maps). None: the run has no maps, or keys are chosen per input and no q and k were kept.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import PlanError
from headscope.export.files import dump
from headscope.export.words import EVERYTHING, same, word
from headscope.plans.dynamic import VerticalSlash
from headscope.plans.patterns import Dense, Pattern
from headscope.plans.plan import Place, PlanModel, SparsePlan

if TYPE_CHECKING:
    from headscope.profile import HeadProfile

SCHEMA = "headscope-export"
VERSION = 1
NOTABLE = 0.01
"""Mean attention mass from which the report warns."""
EXACT = 8192
"""Tokens up to which kept mass is computed from q and k where the run kept them; that costs an attention of every head."""


@dataclass(frozen=True)
class HeadLoss:
    """One head. `asked`, `written`: patterns in words, or scores."""

    layer: int
    head: int
    asked: str
    written: str
    changed: bool
    why: str = ""
    mass_lost: float | None = None


@dataclass(frozen=True)
class LossReport:
    """The report of one export. `content`: "plan" or "scores". `numbers`: densities asked and written, and what a format adds (sparsity).

    `files`: the target's own files, the first one is what its engine opens. `load`: the lines that load it.
    """

    format: str
    title: str
    content: str
    model: PlanModel
    heads: tuple[HeadLoss, ...]
    files: tuple[str, ...]
    load: str
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    length: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[HeadLoss, ...]:
        """The heads that are not as asked for."""
        return tuple(one for one in self.heads if one.changed)

    @property
    def lossless(self) -> bool:
        """True when every head is written as asked for."""
        return not self.changed

    @property
    def mass_lost(self) -> float | None:
        """Mean over all heads; None where a changed head's was not measured."""
        found = [one.mass_lost for one in self.heads]
        return None if any(one is None for one in found) else float(np.mean([one or 0.0 for one in found]))

    def to_dict(self) -> dict[str, Any]:
        """As plain data: every head, in order."""
        return {
            "schema": SCHEMA,
            "schema_version": VERSION,
            "format": self.format,
            "content": self.content,
            "model": self.model.to_dict(),
            "length": self.length,
            "files": list(self.files),
            "load": self.load,
            "numbers": dict(self.numbers),
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "changed": len(self.changed),
            "mass_lost": self.mass_lost,
            "heads": [
                {
                    "layer": one.layer,
                    "head": one.head,
                    "asked": one.asked,
                    "written": one.written,
                    "changed": one.changed,
                    "why": one.why,
                    "mass_lost": one.mass_lost,
                }
                for one in self.heads
            ],
        }

    def to_json(self) -> bytes:
        """As JSON; the same report gives the same bytes."""
        return dump(self.to_dict(), indent=1)

    def text(self) -> str:
        """For people: heads that were changed in the same way stand in one line."""
        model = self.model
        out = [
            f"{self.title}: {self.content} of {model.name}, {len(model.layers)} layers, {len(self.heads)} heads",
            "",
            *(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in self.numbers.items()),
        ]
        if self.lossless:
            out.append("Every head is written as asked for.")
        else:
            out.append(f"{len(self.changed)} of {len(self.heads)} heads are not as asked for:")
            kinds: dict[tuple[str, str, str], list[HeadLoss]] = {}
            for one in self.changed:
                kinds.setdefault((one.asked, one.written, one.why), []).append(one)
            for (asked, written, why), heads in sorted(kinds.items(), key=lambda item: -len(item[1])):
                out += [
                    f"  {len(heads)} x {asked} -> {written}",
                    f"      why   {why}",
                    f"      heads {_places(heads)}",
                    f"      {_mass(heads)}",
                ]
        if self.mass_lost is not None and self.changed and self.mass_lost >= NOTABLE:
            out.append(f"WARNING: the mean head loses {self.mass_lost:.1%} of its attention mass in this format.")
        out += ["", "What the target means by it:", *(f"  - {note}" for note in self.notes)] if self.notes else []
        return "\n".join(out) + "\n"

    def __repr__(self) -> str:
        return f"LossReport({self.format!r}: {len(self.changed)} of {len(self.heads)} heads changed, files {', '.join(self.files)})"

    def _repr_mimebundle_(self, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None) -> dict[str, str]:
        return {"text/plain": self.text(), "text/html": f"<pre>{html.escape(self.text())}</pre>"}


def _places(heads: list[HeadLoss], shown: int = 12) -> str:
    more = f" and {len(heads) - shown} more" if len(heads) > shown else ""
    return ", ".join(f"{one.layer}.{one.head}" for one in heads[:shown]) + more


def _mass(heads: list[HeadLoss]) -> str:
    known = [one.mass_lost for one in heads if one.mass_lost is not None]
    if not known:
        return "attention mass lost: not measured (no run with block maps, or keys chosen per input)"
    return f"attention mass lost: {np.mean(known):.4f} on average, {max(known):.4f} at most"


def head_losses(
    asked: SparsePlan, written: Mapping[Place, Pattern], why: Mapping[Place, str], profile: HeadProfile | None
) -> list[HeadLoss]:
    """One HeadLoss per head of a plan."""
    words = {pattern: word(pattern) for pattern in {*asked.patterns.values(), *written.values()}}
    changed = [place for place, pattern in asked.patterns.items() if not same(pattern, written[place])]
    lost = mass_lost(asked, written, changed, profile)
    return [
        HeadLoss(
            *place, words[pattern], words[written[place]], place in lost, why.get(place, "") if place in lost else "", lost.get(place, 0.0)
        )
        for place, pattern in asked.patterns.items()
    ]


def mass_lost(
    asked: SparsePlan, written: Mapping[Place, Pattern], changed: list[Place], profile: HeadProfile | None
) -> dict[Place, float | None]:
    """What each changed head's asked pattern keeps less what its written one does; None where no statistics say it."""
    out: dict[Place, float | None] = dict.fromkeys(changed)
    if profile is None or not changed:
        return out
    kept = set(asked.model.layers) <= set(profile.kept_layers)
    pairs = {place: (_plain(asked[place]), _plain(written[place])) for place in changed}
    known = [place for place, pair in pairs.items() if kept or all(pattern.static for pattern in pair)]
    exact = kept and (len(profile.tokens or ()) <= EXACT or any(not one.static for pair in pairs.values() for one in pair))
    if not known:
        return out
    base = SparsePlan.uniform(asked.model, Dense())
    try:
        before, after = (base.replace({place: pairs[place][at] for place in known}).kept_mass(profile, exact=exact).value for at in (0, 1))
    except PlanError:  # no maps, a run of another model, or a pattern too long to be counted
        return out
    for place in known:
        at = asked.model.layers.index(place[0]), place[1]
        out[place] = float(before[at] - after[at])
    return out


def _plain(pattern: Pattern) -> Pattern:
    """Every column is dense."""
    return Dense() if isinstance(pattern, VerticalSlash) and pattern.vertical >= EVERYTHING else pattern
