"""Rounding a plan to what a target can hold, by rules that formats share.

The rule of all of them: what a target cannot express is rounded up to something that keeps at least the same keys, so that a lossy export
costs time before it costs attention. Where a target has nothing larger to offer (no sinks in a layer's sliding window), the report says
what the rounding loses in numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from headscope.errors import ExportError, refusal
from headscope.export.words import canonical, same, word
from headscope.plans.patterns import Dense, Pattern, Span, Streaming
from headscope.plans.plan import Place, PlanModel, SparsePlan


@dataclass
class Fitted:
    """What a target will run: a pattern per head, why it differs from the one asked for, and what holds for the whole export."""

    patterns: dict[Place, Pattern]
    why: dict[Place, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, plan: SparsePlan) -> Fitted:
        """The plan as it is, each pattern in its plainest form."""
        return cls({place: canonical(pattern) for place, pattern in plan.patterns.items()})

    def change(self, place: Place, pattern: Pattern, why: str) -> None:
        """Another pattern for a head; `why` is kept where its effect differs, after what was said before."""
        before = self.patterns[place]
        self.patterns[place] = pattern
        if not same(before, pattern):
            said = self.why.get(place)
            self.why[place] = why if said is None or said == why else f"{said}; {why}"

    def each(self, rule: Callable[[Pattern], tuple[Pattern, str]]) -> None:
        """Applies a rule pattern -> (pattern, why) to every head; heads of the same pattern ask it once."""
        known: dict[Pattern, tuple[Pattern, str]] = {}
        for place, pattern in self.patterns.items():
            if pattern not in known:
                known[pattern] = rule(pattern)
            self.change(place, *known[pattern])

    def windows(self, target: str, length: int | None) -> None:
        """Spans as the window that they are at `length` tokens, where it is known (shorter texts get a wider one than asked for), and
        windows without their compensation token, which no engine has.
        """
        if length is not None:
            fixed = f"{target} has windows of a fixed size: the one at {length:,} tokens"
            self.each(lambda one: (_at(one, length) if isinstance(one, Span) else one, fixed))
        plain = f"{target} has no compensation token"
        self.each(lambda one: (replace(one, compensate=False) if isinstance(one, Streaming | Span) and one.compensate else one, plain))


def _at(span: Span, length: int) -> Streaming:
    """A span's window at a length, its floor kept also where the text is shorter."""
    return Streaming(span.sink, max(span.floor, int(span.alpha + span.beta * length)), span.compensate)


def groups(model: PlanModel) -> list[list[Place]]:
    """The query heads of every key head, layer by layer."""
    out = []
    for layer, heads, kv_heads in zip(model.layers, model.heads, model.kv_heads, strict=True):
        size = heads // kv_heads
        out += [[(layer, head) for head in range(group * size, (group + 1) * size)] for group in range(kv_heads)]
    return out


def layers(model: PlanModel) -> list[list[Place]]:
    """The query heads of every layer."""
    return [[(layer, head) for head in range(heads)] for layer, heads in zip(model.layers, model.heads, strict=True)]


def rectangular(model: PlanModel, what: str, target: str) -> int:
    """The number of `what` ("heads", "kv_heads") that every layer has. ExportError where layers differ."""
    counts = set(getattr(model, what))
    if len(counts) > 1:
        raise refusal(
            ExportError,
            f"{model.name} with {sorted(counts)} {what} in its layers",
            f"{target} holds a table with as many in every layer",
            "choose a format that names layers, such as headscope's own",
        )
    return int(next(iter(counts)))


def from_zero(model: PlanModel, target: str) -> None:
    """ExportError for a model whose attention layers are not 0, 1, 2, ...: a list of layers would shift them."""
    if model.layers != tuple(range(len(model.layers))):
        raise refusal(
            ExportError,
            f"{model.name} with attention in layers {list(model.layers)[:6]}",
            f"{target} is a list, in which they would become 0..{len(model.layers) - 1}",
            "choose a format that names layers, such as headscope's own",
        )


def to_two_classes(plan: SparsePlan, target: str, length: int | None) -> Fitted:
    """Every head dense or streaming: spans as their window at `length`, anything else dense."""
    fitted = Fitted.of(plan)
    fitted.windows(target, length)
    to_dense(fitted, (Streaming,), f"{target} has full and streaming heads only")
    return fitted


def to_whole_groups(fitted: Fitted, model: PlanModel, target: str) -> None:
    """Heads of a key head alike: one dense head makes its group dense, the widest window becomes that of its group."""
    for members in groups(model):
        kinds = {fitted.patterns[place] for place in members}
        if len(kinds) == 1:
            continue
        largest = widest(kinds)
        for place in members:
            fitted.change(place, largest, f"{target} decides per key head, and another head of its group has {word(largest)}")


def widest(patterns: set[Pattern]) -> Pattern:
    """The smallest pattern that keeps what each of these does: dense, or the largest sink and window."""
    streaming = [one for one in patterns if isinstance(one, Streaming)]
    if len(streaming) < len(patterns) or not streaming:
        return Dense()
    return Streaming(max(one.sink for one in streaming), max(one.window for one in streaming))


def to_one_window(fitted: Fitted, target: str, default: Streaming) -> Streaming:
    """One sink and window for all streaming heads, the largest of each; `default` where no head streams."""
    kinds = {one for one in fitted.patterns.values() if isinstance(one, Streaming)}
    if not kinds:
        return default
    one = widest(set(kinds))
    assert isinstance(one, Streaming)
    for place, pattern in list(fitted.patterns.items()):
        if isinstance(pattern, Streaming):
            fitted.change(place, one, f"{target} has one sink and one window for all streaming heads")
    return one


def to_dense(fitted: Fitted, kinds: tuple[type[Pattern], ...], why: str) -> None:
    """Patterns of other kinds than these become dense."""
    fitted.each(lambda pattern: (pattern if isinstance(pattern, kinds) else Dense(), why))


def finite_scores(values: Mapping[Place, float], metric: str, model: PlanModel) -> None:
    """ExportError for a head without a score, or whose score is no number."""
    for place in model.places:
        found: Any = values.get(place)
        if found is None or found != found or found in (float("inf"), float("-inf")):
            raise refusal(
                ExportError,
                f"{metric} of head {place[0]}.{place[1]} = {found}",
                "a head without a score cannot be ranked by the engine",
                "measure it again, or export another metric (--metric)",
            )
