"""Heads: the patterns of a layer's query heads, with what an executor asks about them again and again worked out once.

A decode step takes some ten microseconds a layer on a device, and patterns may hold thousands of numbers each: to hash them, to compare
them or to count what they keep at every call would cost more than the step. So a layer's patterns are one value for as long as the plan
runs, which knows its hash, its meaning in each phase and from which length on it drops anything.
"""

from __future__ import annotations

from functools import cached_property

from headscope.plans.compensation import compensates, uncompensated
from headscope.plans.dynamic import Budget, TopKeys
from headscope.plans.execute_checks import phase
from headscope.plans.patterns import Dense, Pattern, Span, Streaming


class Heads(tuple[Pattern, ...]):
    """One pattern per query head of a layer."""

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or tuple.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    @cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)

    @cached_property
    def distinct(self) -> tuple[Pattern, ...]:
        """Each pattern once."""
        return tuple(dict.fromkeys(self))

    @cached_property
    def decode(self) -> Heads:
        """What they mean in a decode step."""
        return Heads(phase(one, True) for one in self)

    @cached_property
    def prefill(self) -> Heads:
        """What they mean in a prefill."""
        return Heads(phase(one, False) for one in self)

    @cached_property
    def static(self) -> bool:
        """Whether positions alone say what every head sees."""
        return all(one.static for one in self.distinct)

    @cached_property
    def budgets(self) -> tuple[int, ...]:
        """Heads that choose their keys at the end of the prefill."""
        return tuple(head for head, one in enumerate(self) if isinstance(one, Budget))

    @cached_property
    def listed(self) -> tuple[int, ...]:
        """Heads that see chosen keys."""
        return tuple(head for head, one in enumerate(self) if isinstance(one, Budget) or (isinstance(one, TopKeys) and not one.full))

    @cached_property
    def choosing(self) -> tuple[int, ...]:
        """Heads that choose keys in decode steps, for themselves or others."""
        return tuple(head for head, one in enumerate(self) if isinstance(one, TopKeys) and one.source is None)

    @cached_property
    def sources(self) -> int | None:
        """The layer whose choice all listed heads see, each that of the head with its own number; -1 for their own, None otherwise."""
        found = set()
        for head in self.listed:
            source = getattr(self[head], "source", None)
            if isinstance(self[head], Budget) or (source is not None and source[1] != head):
                return None
            found.add(-1 if source is None else int(source[0]))
        return found.pop() if len(found) == 1 else None

    @cached_property
    def rules(self) -> Heads:
        """The static patterns beside which chosen keys and what compensates for dropped ones are put; a listed head keeps its own key."""
        return Heads(
            Streaming(0, 1) if head in self.listed else Dense() if isinstance(one, TopKeys) else uncompensated(one)
            for head, one in enumerate(self)
        )

    @cached_property
    def compensating(self) -> bool:
        """Whether a head asks for the mean of what it drops."""
        return any(compensates(one) for one in self.distinct)

    @cached_property
    def holding(self) -> bool:
        """Whether a head's keys of one step are used in later ones."""
        return self.compensating or any(isinstance(one, TopKeys) and one.refresh > 1 for one in self.distinct)

    @cached_property
    def only_ranges(self) -> bool:
        """Whether every head, chosen keys aside, sees first keys, last keys, or all."""
        return all(isinstance(one, Dense | Streaming | Span) for one in self.rules.distinct)

    def part(self, heads: tuple[int, ...]) -> Heads:
        """Those of some heads."""
        known: dict[tuple[int, ...], Heads] = self.__dict__.setdefault("_parts", {})
        if heads not in known:
            known[heads] = self if len(heads) == len(self) else Heads(self[head] for head in heads)
        return known[heads]

    @cached_property
    def dense(self) -> int:
        """Heads that see every key."""
        return sum(isinstance(one, Dense) for one in self)

    def drop_at(self, length: int) -> bool:
        """Whether some head drops a key of a text this long. What is dropped of a text is dropped of a longer one."""
        if not self.static:
            return True
        whole, some = self.__dict__.setdefault("_drops", [0, 1 << 62])
        if length <= whole or length >= some:
            return length >= some
        for tried in (length, length + 64):  # most steps after one of them need no count
            full = tried * (tried + 1) / 2
            if any(one.kept(tried) < full for one in self.distinct):
                self.__dict__["_drops"][1] = tried
                return length >= tried
            self.__dict__["_drops"][0] = tried
        return False
