"""RazorAttention: heads that find earlier tokens again keep every key; the others a window, and one key that stands for what they drop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from headscope.errors import PlanError, refusal
from headscope.plans.patterns import Dense, Pattern, Span
from headscope.plans.plan import Place
from headscope.plans.planners.base import Evidence, Planner, Requires, largest, longest, ranked, share, whole


@dataclass(frozen=True)
class Razor(Planner):
    """Echo and induction heads by quota keep all keys; the others some first and recent ones and a compensation token.

    `echo` (.01) and `induction` (.14): shares of the model's heads, by echo_sum and ind_sum, that are retrieval heads; a quota above 0 is
    one head at least. Where keys are shared, all query heads of a key head with a retrieval head keep all keys. Other heads keep `sink`
    (N0 = 4) first keys and a window of L_h = max(`window`, N / `divisor`): S0 = 4,000 and C = 5. With `compensate`, what they drop is one
    key more: the mean of the dropped keys, counted as often as there are of them, with the mean of their values.

    With `density` or `cache` the window is what is fitted: retrieval heads first, as many of the quota as fit beside windows of `least`
    tokens, then the longest window, as a share of the text, for all others.

    Departures: no official code fixes how ties and fractions of a head are settled; here shares are rounded to the nearest head, and equal
    scores go by layer and head.
    """

    echo: float = 0.01
    induction: float = 0.14
    sink: int = 4
    window: int | None = None
    divisor: float | None = None
    least: int = 16
    compensate: bool = True

    name: ClassVar[str] = "razor"
    source: ClassVar[str] = "RazorAttention, arXiv:2407.15891"
    requires: ClassVar[Requires] = Requires(metrics=(("echo_sum", "ind_sum"),))
    dials: ClassVar[tuple[str, ...]] = ("window", "divisor")

    def check(self) -> None:
        share(self.name, "echo", self.echo, zero=True)
        share(self.name, "induction", self.induction, zero=True)
        whole(self.name, "sink", self.sink)
        whole(self.name, "least", self.least, 1)
        if self.window is not None:
            whole(self.name, "window", self.window, 1)
        if self.divisor is not None and not self.divisor >= 1:
            raise refusal(PlanError, f"razor with divisor={self.divisor!r}", "windows are N / divisor", "pass 1 or more")

    def choose(self, evidence: Evidence) -> Mapping[Place, Pattern]:
        order = self.groups(evidence)
        if not evidence.bounded:
            floor, divisor = 4000 if self.window is None else self.window, 5.0 if self.divisor is None else self.divisor
            rest = Span(0.0, 1 / divisor, self.sink, floor, self.compensate)
            if rest.at(evidence.length).window >= evidence.length:
                evidence.note(f"windows of {floor:,} keep everything at {evidence.length:,} tokens: pass a smaller window, or density")
            return self._patterns(evidence, order, rest)
        lean = self._span(self.least, evidence.length)
        fitting = longest(order, lambda some: evidence.fits(self._patterns(evidence, some, lean)))
        if len(fitting) < len(order):
            evidence.note(f"{len(fitting)} of {len(order)} key heads with retrieval heads fit the bound")
        window = largest(
            self.least,
            evidence.length,
            lambda size: evidence.fits(self._patterns(evidence, fitting, self._span(size, evidence.length))),
        )
        return self._patterns(evidence, fitting, self._span(window, evidence.length))

    def groups(self, evidence: Evidence) -> list[tuple[int, int]]:
        """(layer, key head) of the retrieval heads: echo heads first, then induction heads, each by score."""
        found: dict[tuple[int, int], None] = {}
        for metric, quota in (("echo_sum", self.echo), ("ind_sum", self.induction)):
            values = evidence.metric(metric)
            order = ranked({place: evidence.at(values, place) for place in evidence.model.places})
            count = max(1, round(quota * len(order))) if quota > 0 else 0
            for layer, head in order[:count]:
                found[layer, evidence.model.kv_head(layer, head)] = None
        return list(found)

    def _span(self, window: int, length: int) -> Span:
        return Span(0.0, min(1.0, (window + 0.5) / length), self.sink, min(window, self.least), self.compensate)

    def _patterns(self, evidence: Evidence, groups: Iterable[tuple[int, int]], rest: Pattern) -> dict[Place, Pattern]:
        dense = {place for group in groups for place in evidence.members(*group)}
        return {place: Dense() if place in dense else rest for place in evidence.model.places}
