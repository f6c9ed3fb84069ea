"""Gates per key head, which DuoAttention, LServe and kvpress share: 1 keeps all keys, 0 keeps a sink and a recent window.

The window is converted. These engines keep sink + recent keys in a streaming head's cache and append a new token before it attends, so a
decoding row sees sink + recent + 1 keys; headscope's window counts the row's own key. A window of w is therefore recent = w - 1. With
recent = 0 both engines' slices (`[-0:]`) turn into "everything", so a window of 1 is written as 2.

Gates of a plan are exactly 0 or 1, and their sparsity is stated as the exact share of zeros: the engines find the threshold as a quantile
of gates to which they add noise of up to 1e-6, and at that share the quantile falls between the zeros and the ones whatever the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from headscope.errors import ExportError, refusal
from headscope.export.base import Export
from headscope.export.fitting import Fitted, from_zero, groups, rectangular, to_one_window, to_two_classes, to_whole_groups
from headscope.export.imported import Found, Hints
from headscope.plans.patterns import Dense, Pattern, Streaming
from headscope.plans.plan import Place, SparsePlan

DEFAULT = Streaming(128, 257)
"""DuoAttention's sizes (128 sinks, 256 recent), where no head streams."""


def fit_gates(plan: SparsePlan, target: str, length: int | None) -> Fitted:
    """Dense and streaming heads, whole key groups, one window of 2 or more."""
    rectangular(plan.model, "kv_heads", target)
    from_zero(plan.model, target)
    fitted = to_two_classes(plan, target, length)
    to_whole_groups(fitted, plan.model, target)
    to_one_window(fitted, target, DEFAULT)
    fitted.each(lambda pattern: _at_least_two(pattern, target))
    return fitted


def _at_least_two(pattern: Pattern, target: str) -> tuple[Pattern, str]:
    if isinstance(pattern, Streaming) and pattern.window == 1:
        return Streaming(pattern.sink, 2), f"{target} reads recent_size 0 as every key"
    return pattern, ""


def gates_of(export: Export) -> tuple[np.ndarray, int, int, dict[Place, float]]:
    """([L, Hkv] float64 gates, sink_size, recent_size, the gate of each query head) of a plan or of scores."""
    model = export.model
    rows = np.zeros((len(model.layers), model.kv_heads[0]))
    written: dict[Place, float] = {}
    members = groups(model)
    one = DEFAULT
    if export.plan is not None:
        streaming = [pattern for pattern in export.plan.patterns.values() if isinstance(pattern, Streaming)]
        one = streaming[0] if streaming else DEFAULT
    for number, places in enumerate(members):
        if export.plan is not None:
            gate = 0.0 if isinstance(export.plan[places[0]], Streaming) else 1.0
        else:
            assert export.scores is not None
            gate = max(export.scores[place] for place in places)
        rows.flat[number] = gate
        written.update(dict.fromkeys(places, gate))
    if export.plan is not None:
        return rows, one.sink, one.window - 1, written
    return rows, _count(export.facts, "sink_size", 128), _count(export.facts, "recent_size", 256), written


def check_score_shape(export: Export, target: str) -> None:
    """ExportError for a model whose layers a table cannot hold."""
    rectangular(export.model, "kv_heads", target)
    from_zero(export.model, target)


def describe_gates(export: Export, gates: np.ndarray, sink: int, recent: int) -> None:
    """Numbers, facts and notes of an export of gates."""
    if export.plan is not None:
        export.numbers["sparsity"] = float((gates == 0).sum() / gates.size)
        export.notes += [
            f"recent_size {recent}: a decoding row sees {sink} sinks, {recent} keys before its own, and its own: the plan's {recent + 1}",
            "gates are exactly 0 or 1; at the sparsity given (the exact share of zeros) the quantile keeps exactly these heads",
        ]
    else:
        export.notes.append(f"gates as measured ({export.metric}); the engine chooses how many heads stream; sink {sink}, recent {recent}")
    export.facts |= {"sink_size": sink, "recent_size": recent}


def found_gates(table: list[list[float]], sink: int, recent: int, hints: Hints, metric: str) -> Found:
    """Scores by head, and the plan where every gate is 0 or 1."""
    model = hints.shape([len(row) for row in table], by_key_head=True)
    scores = {
        place: float(np.clip(gate, 0, 1))
        for places, gate in zip(groups(model), (one for row in table for one in row), strict=True)
        for place in places
    }
    facts: dict[str, Any] = {"sink_size": sink, "recent_size": recent}
    notes = [f"sink_size {sink} and recent_size {recent}: a decoding row sees {sink} + {recent} + 1 keys"]
    outside = sum(not 0 <= gate <= 1 for row in table for gate in row)
    if outside:
        notes.append(f"{outside} gates lie outside 0..1 and are clipped, as the engine does")
    if all(gate in (0.0, 1.0) for gate in scores.values()):
        streaming = Streaming(sink, recent + 1)
        patterns: Mapping[Place, Pattern] = {place: Dense() if gate else streaming for place, gate in scores.items()}
        plan = SparsePlan(model, patterns, "imported gates", {}, tuple(notes))
        return Found(model, plan, {metric: scores}, notes, facts)
    notes.append("the file holds gates and no plan: how many heads stream is chosen when a plan is made of them")
    return Found(model, None, {metric: scores}, notes, facts)


def _count(facts: Mapping[str, Any], name: str, default: int) -> int:
    value = facts.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise refusal(ExportError, f"{name} {value!r}", "it counts tokens", "correct the file")
    return value
