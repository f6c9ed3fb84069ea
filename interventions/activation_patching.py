"""Activation patching: which heads carry what makes a clean run differ from a corrupt one.

One head at a time takes its activations from the other run. Scores are normalised so that 0 is the run that was patched into and 1 the run
the values came from; the silent failure this avoids is a table of raw differences whose sign depends on the direction nobody wrote down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.patching import PatchHeads, PatchSite
from headscope.interventions.record import record_heads
from headscope.interventions.running import outputs_of
from headscope.sweeps import Sweep, _number, sweep

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

Direction = Literal["denoise", "noise"]


def activation_patching(
    scope: Scope,
    clean: Any,
    corrupt: Any,
    metric: Callable[[Tensor], Any],
    heads: Any = "all",
    *,
    at: PatchSite = "z",
    positions: Any = None,
    direction: Direction = "denoise",
    journal: str | Path | None = None,
    name: str | None = None,
) -> Sweep:
    """Patch every head in turn and score it.

    `clean`, `corrupt`: two inputs of one length. `metric`: of the model's output [B, N, V], e.g. a logit difference. `direction`: "denoise"
    runs the corrupt input with clean activations (as TransformerLens' generic patching does), "noise" the clean input with corrupt ones.
    `at`: "z", "q", "k" or "v" (k and v: a head stands for its whole group). `positions`: as in PatchHeads. The result's `value` is
    (m - m_target) / (m_source - m_target): 0 for no effect, 1 for all of it; `facts` hold both metrics.

    Meng et al. (2022, arXiv 2202.05262); Heimersheim & Nanda (2024, arXiv 2404.15255) for the two directions.
    """
    if direction not in ("denoise", "noise"):
        raise unknown_name(InterventionError, "direction", direction, ("denoise", "noise"))
    source, target = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    with record_heads(scope, None if heads == "all" else _groups(scope, heads, at), sites=(at,)) as record:
        high = _number(metric(outputs_of(scope, source)))
    low = _number(metric(outputs_of(scope, target)))
    if high == low:
        raise refusal(
            InterventionError,
            f"metric {high:.6g} on both inputs",
            "there is no difference that heads could carry",
            "pass inputs that differ in it",
        )

    def factory(head: tuple[Any, int]) -> PatchHeads:
        return PatchHeads(_groups(scope, [head], at), record, at, positions=positions)

    def score(output: Tensor) -> float:
        return (_number(metric(output)) - low) / (high - low)

    label = name or f"{at} patched, {direction}"
    found = sweep(scope, factory, heads, score, data=target, journal=journal, name=f"{label} [{low:.6g}, {high:.6g}]" if journal else label)
    return replace(found, metric=label, facts={**found.facts, "source": high, "target": low, "direction": direction, "at": at})


def _groups(scope: Scope, heads: Any, at: PatchSite) -> Any:
    """At k and v, every head stands for the group that shares its keys."""
    from headscope.interventions.base import heads_of, resolve

    pairs = heads_of(heads)
    resolve(pairs, scope.topology)
    if at not in ("k", "v"):
        return pairs
    out: dict[tuple[Any, int], None] = {}
    for layer, head in pairs:
        record = scope.topology[layer]
        kv = record.kv_head(head)
        out.update(dict.fromkeys((layer, other) for other in range(kv * record.group, (kv + 1) * record.group)))
    return tuple(out)


__all__ = ["activation_patching"]
