"""PlanExecutor: runs a plan in a live model, prefill and decode, at the seam where every attention call passes.

It answers a call with the heads' outputs, or leaves it to the model's own kernel: where all heads of the layer are dense, where the call is
short enough that the plan drops nothing, and in modules that the plan does not cover (vision towers, cross attention). What ran how is
counted in `report`, so that a plan that in truth ran dense cannot pass for a sparse one.

Dynamic patterns choose their keys at the call: vertical-slash and block choices per prefill chunk, budgets at the end of the prefill, top
keys per decode step or every `refresh` steps, or from the layer whose choice they take over. State belongs to one sequence of calls and is
dropped when a text begins again at position 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.kernels.sparse_blocked import blocked_sparse_attention
from headscope.plans.dynamic import Budget, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.indices import choose, element
from headscope.plans.patterns import Dense, Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.plan import SparsePlan
    from headscope.scope import Scope

Place = tuple[int, int]


@dataclass(eq=False)
class _LayerState:
    """What a layer remembers between calls: per (sequence, head) the keys chosen, and at which decode step."""

    chosen: dict[Place, Pattern] = field(default_factory=dict)
    step: int = 0


@dataclass(eq=False)
class PlanExecutor:
    """Executes `plan`. `report`: how many heads of calls ran "sparse", "dense" within a sparse call, and calls left to the "host"."""

    plan: SparsePlan
    report: Counter[str] = field(default_factory=Counter)
    _state: dict[int, _LayerState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._layers: dict[int, list[Pattern]] = {}
        for (layer, _), pattern in self.plan.patterns.items():
            self._layers.setdefault(layer, []).append(pattern)

    def execute(self, call: AttentionCall) -> Tensor | None:
        """[B, Nq, Hq, Dv], or None for a call that the model's own kernel is to run."""
        patterns = self._layers.get(call.layer) if call.layer is not None else None
        if patterns is None or call.is_cross or not call.mask.causal:
            return None
        layer = int(call.layer or 0)
        if call.query_offset == 0:
            self._state[layer] = _LayerState()
        state = self._state.setdefault(layer, _LayerState())
        decode = call.q.shape[2] == 1 and call.query_offset > 0
        state.step = state.step + 1 if decode else 0
        now = [_phase(pattern, decode) for pattern in patterns]
        remembers = [head for head, pattern in enumerate(patterns) if isinstance(pattern, Budget)]
        if remembers and not decode:
            self._remember(call, patterns, remembers, state)
        longest = call.k.shape[2] + call.key_offset
        if all(pattern.static and pattern.kept(longest) >= longest * (longest + 1) / 2 for pattern in set(now)):
            self.report["host"] += 1
            return None
        if all(pattern.static for pattern in now):
            output, _ = blocked_sparse_attention(call, now)
        else:
            parts = [self._element(element(call, b), b, now, state) for b in range(call.q.shape[0])]
            output = torch.cat(parts)
        dense = sum(isinstance(pattern, Dense) for pattern in now)
        self.report["dense"] += dense
        self.report["sparse"] += len(now) - dense
        return output

    def _element(self, call: AttentionCall, b: int, patterns: list[Pattern], state: _LayerState) -> Tensor:
        """One sequence of a call whose keys are chosen per input."""
        chosen = [self._chosen(call, b, head, pattern, state) for head, pattern in enumerate(patterns)]
        return blocked_sparse_attention(call, chosen)[0]

    def _chosen(self, call: AttentionCall, b: int, head: int, pattern: Pattern, state: _LayerState) -> Pattern:
        place = (b, head)
        if isinstance(pattern, Budget):  # chosen at the end of the prefill
            return state.chosen[place]
        if isinstance(pattern, TopKeys):
            if pattern.source is not None:
                layer, other = pattern.source
                return self._state[layer].chosen[b, other]
            if place not in state.chosen or (state.step - 1) % pattern.refresh == 0:
                state.chosen[place] = choose(call, head, pattern)
            return state.chosen[place]
        return choose(call, head, pattern)

    def _remember(self, call: AttentionCall, patterns: list[Pattern], heads: list[int], state: _LayerState) -> None:
        for b in range(call.q.shape[0]):
            one = element(call, b)
            for head in heads:
                state.chosen[b, head] = choose(one, head, patterns[head])

    def __repr__(self) -> str:
        ran = ", ".join(f"{count} {what}" for what, count in self.report.items()) or "nothing yet"
        return f"PlanExecutor({self.plan.method!r}: ran {ran})"


def _phase(pattern: Pattern, decode: bool) -> Pattern:
    """What a pattern means in this phase: prefill-only rules decode dense, decode-only rules prefill dense."""
    prefill_only = isinstance(pattern, VerticalSlash | TopBlocks)
    decode_only = isinstance(pattern, Budget | TopKeys)
    return Dense() if (decode and prefill_only) or (not decode and decode_only) else pattern


@contextmanager
def executing(scope: Scope, plan: SparsePlan, *, force: bool = False) -> Iterator[PlanExecutor]:
    """Runs the model under a plan inside the block: see `Scope.execute`."""
    plan.check(scope, force=force)
    executor = PlanExecutor(plan)
    with scope.executing(executor):
        yield executor
