"""A plan's attention in one pass over a text that is partly read and partly written, exact and under autograd.

Decoding token by token shows what a plan costs, slowly: every step is a pass. With the right tokens given, all rows can be computed at
once instead, those before `start` as a prefill and those after it as decode steps, since what either may see is known from the text. The
result is that of `scope.execute(plan)` to rounding, and gradients flow through it, so that the plan can be improved from where it is.

The silent failure this avoids: judging a plan by a pass in which budgets drop nothing, or in which choices of a prefill look at the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic import TopKeys
from headscope.plans.patterns import Dense, Pattern
from headscope.probes.calls import score_rows
from headscope.probes.pattern_masks import Masks, largest, scores_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.plan import Place


@dataclass(eq=False)
class Planned:
    """An executor (see `Scope.executing`) for single texts. `patterns` of all heads; `start`: the first row that is decoded, or None."""

    patterns: Mapping[Place, Pattern]
    start: int | None = None
    _chosen: dict[Place, Tensor] = field(default_factory=dict)

    def execute(self, call: AttentionCall) -> Tensor | None:
        """[1, N, Hq, Dv]. PlanError for a batch or a part of a text."""
        if call.layer is None or call.is_cross or not call.mask.causal:
            return None
        if call.q.shape[0] != 1 or call.query_offset or call.first_token is not None:
            raise refusal(PlanError, "a batch, a chunk or padding", "plans are tried out on single texts", "give one text at a time")
        return attended(call, self.seen(call))

    @torch.no_grad()
    def seen(self, call: AttentionCall) -> Tensor:
        """[Hq, N, N] bool, before causality."""
        layer, length, device = int(call.layer or 0), call.q.shape[2], call.q.device
        rows = torch.arange(length, device=device)
        out = torch.ones(call.q.shape[1], length, length, dtype=torch.bool, device=device)
        masks = Masks(call, self.start, decodes=True)
        groups: dict[Pattern, list[int]] = {}
        for head in range(call.q.shape[1]):
            groups.setdefault(self.patterns[layer, head], []).append(head)
        for pattern, heads in groups.items():
            index = torch.tensor(heads, device=device)
            if isinstance(pattern, Dense):
                continue
            if not isinstance(pattern, TopKeys):
                out[index] = masks.of(pattern, rows, index)
            elif self.start is not None and self.start < length:
                for head in heads:
                    found = self._top_keys(call, layer, head, pattern)
                    if not pattern.full:
                        out[head, self.start :] = found
        return out

    def _top_keys(self, call: AttentionCall, layer: int, head: int, pattern: TopKeys) -> Tensor:
        """[rows that are decoded, N] bool, as chosen by the head itself or by the one whose choice it takes over."""
        if pattern.source is not None:
            return self._chosen[pattern.source]
        if pattern.block > 1:
            raise refusal(PlanError, f"{pattern}", "choices of whole blocks are not tried out", "use block=1")
        assert self.start is not None
        at = torch.arange(self.start, call.q.shape[2], device=call.q.device)
        chooser = self.start + (at - self.start) // pattern.refresh * pattern.refresh
        weights = torch.softmax(score_rows(call, self.start, call.q.shape[2])[0, head], -1)[chooser - self.start]
        keys = torch.arange(call.q.shape[2], device=call.q.device)
        recent = keys > (chooser - pattern.window)[:, None]
        inside = weights.masked_fill(keys < pattern.sink, torch.inf).masked_fill(recent, -1.0)
        self._chosen[layer, head] = (largest(inside, pattern.keep) & ~recent) | recent
        return self._chosen[layer, head]


def attended(call: AttentionCall, seen: Tensor) -> Tensor:
    """[1, N, Hq, Dv] of one sequence whose heads see `seen` [Hq, N, N] of what they could."""
    length = call.q.shape[2]
    assert call.v is not None
    plain = call.softcap is None and call.sink_logits is None and call.mask.bias is None and call.mask.allowed is None
    if plain and call.mask.window is None and call.mask.key_valid is None and call.mask.query_segments is None:
        at = torch.arange(length, device=seen.device)
        k, v = (part.repeat_interleave(call.group, 1) for part in (call.k, call.v))
        mask = (seen & (at <= at[:, None]))[None]
        return torch.nn.functional.scaled_dot_product_attention(call.q, k, v, mask, scale=call.scale).transpose(1, 2)
    scores = scores_of(call, torch.arange(length), torch.promote_types(call.q.dtype, torch.float32)).masked_fill(~seen, -torch.inf)
    total = torch.logsumexp(scores, -1, keepdim=True)
    if call.sink_logits is not None:
        total = torch.logaddexp(total, call.sink_logits.to(scores)[:, None, None])
    values = call.v[0].to(scores.dtype).repeat_interleave(call.group, 0)
    return (torch.exp(scores - total) @ values).to(call.q.dtype).transpose(0, 1)[None]
