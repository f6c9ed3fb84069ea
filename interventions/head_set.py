"""HeadSet: heads by list, by role, by metric, or by set operations on such.

    HeadSet.select(profile, "retrieval")          every head with the role
    HeadSet.select(profile, "top 5 induction")    the five with the largest values of a metric, or the strongest five of a role
    HeadSet.select(profile, "sink > 0.5")         every head beyond a threshold of a metric
    HeadSet.of("18.6, 17.3")                      these

A set is settled when it is made: it holds pairs, so a specification means the same heads wherever it is loaded.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import Head, heads_of

if TYPE_CHECKING:
    from headscope.profile import HeadProfile
    from headscope.scope import Scope

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
TOP = re.compile(r"top\s+(\d+)\s+(\S+)")
THRESHOLD = re.compile(r"(\S+?)\s*(>=|<=|>|<)\s*(-?[\d.]+(?:[eE][-+]?\d+)?)")


class HeadSet(Sequence[Head]):
    """Heads (layer, head), in order and once each. `origin`: in words, how they were chosen. May be empty."""

    def __init__(self, pairs: Any, origin: str = "") -> None:
        self.pairs: tuple[Head, ...] = heads_of(pairs) if isinstance(pairs, str) or len(pairs := tuple(pairs)) else ()
        self.origin = origin

    @classmethod
    def of(cls, heads: Any) -> HeadSet:
        """From pairs, "18.6,17.3" or another set."""
        return heads if isinstance(heads, HeadSet) else cls(heads)

    @classmethod
    def select(cls, profile: HeadProfile, text: str) -> HeadSet:
        """From a profile: "role", "top N role-or-metric", or "metric > number" (also >=, <, <=).

        InterventionError for a text that is none of these or chooses no head; ProbeError for an unknown role or metric.
        """
        text = text.strip()
        if match := TOP.fullmatch(text):
            ranked = profile.rank if match[2] in profile.metrics else profile.top
            found = ranked(match[2], int(match[1]))
        elif match := THRESHOLD.fullmatch(text):
            values = profile.matrix(match[1])
            beyond = COMPARE[match[2]]
            found = [
                (layer, head)
                for index, layer in enumerate(profile.layers)
                for head in range(values.shape[1])
                if beyond(values[index, head], float(match[3]))
            ]
        elif text in profile.roles:
            found = profile.top(text, profile.heads)
        elif text in profile.metrics:
            raise refusal(
                InterventionError, f"heads {text!r}", "it is a metric, and every head has a value", f'say "top 5 {text}" or "{text} > 0.5"'
            )
        else:
            raise refusal(
                InterventionError, f"heads {text!r}", "it is no way to choose heads", 'say "role", "top 5 induction" or "sink > 0.5"'
            )
        if not found:
            raise refusal(
                InterventionError, f"heads {text!r}", "no head of this profile is chosen by it", "choose another role or threshold"
            )
        return cls(found, text)

    @classmethod
    def random(cls, scope: Scope, n: int, seed: int, *, without: Any = ()) -> HeadSet:
        """n heads of the main stack drawn by seed, none of `without`: a control for a chosen set."""
        banned = set(heads_of(without)) if len(without) else set()
        pool = [(m.layer, h) for m in scope.topology.main if not m.capturable for h in range(m.heads) if (m.layer, h) not in banned]
        if not 1 <= n <= len(pool):
            raise refusal(InterventionError, f"{n} random heads", f"there are {len(pool)} to draw from", "ask for fewer")
        return cls(random.Random(seed).sample(pool, n), f"{n} at random, seed {seed}")

    def __or__(self, other: Any) -> HeadSet:
        return HeadSet((*self.pairs, *HeadSet.of(other)), f"{self.origin} or {getattr(other, 'origin', 'others')}")

    def __and__(self, other: Any) -> HeadSet:
        both = set(HeadSet.of(other))
        return HeadSet([pair for pair in self.pairs if pair in both], f"{self.origin} and {getattr(other, 'origin', 'others')}")

    def __sub__(self, other: Any) -> HeadSet:
        gone = set(HeadSet.of(other))
        return HeadSet([pair for pair in self.pairs if pair not in gone], f"{self.origin} without {getattr(other, 'origin', 'others')}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Head: ...
    @overload
    def __getitem__(self, index: slice) -> HeadSet: ...
    def __getitem__(self, index: int | slice) -> Head | HeadSet:
        return HeadSet(self.pairs[index], self.origin) if isinstance(index, slice) else self.pairs[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadSet) and self.pairs == other.pairs

    def __hash__(self) -> int:
        return hash(self.pairs)

    def __repr__(self) -> str:
        names = ", ".join(f"{layer}.{head}" for layer, head in self.pairs[:8]) + (", ..." if len(self) > 8 else "")
        return f"HeadSet({len(self)} heads{f' ({self.origin})' if self.origin else ''}: {names})"


__all__ = ["HeadSet"]
