"""Exact outputs of all heads of a layer under one pattern after another, from scores that are made once.

The weights of the rows are the same for every pattern; only which of them count differs. So a pattern costs a mask, a product with the
values and a division, for all heads together.

The silent failure this avoids: dividing by a kept weight that has run out of digits. Rows that keep less than a millionth of their weight
are computed again from their scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.probes.pattern_masks import Masks, scores_of

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.patterns import Pattern

FAINT = 1e-6
"""Kept weight of a row below which it is computed from its scores."""


@dataclass(eq=False)
class Outputs:
    """Rows [R] of one layer's call of one sequence; `start`, `decodes`: see `Masks`. float64 where the model is, else float32."""

    call: AttentionCall
    rows: Tensor
    start: int | None = None
    decodes: bool = False
    masks: Masks = field(init=False)
    scores: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.masks = Masks(self.call, self.start, self.decodes)
        self.dtype = torch.float64 if self.call.q.dtype == torch.float64 else torch.float32
        self.scores = scores_of(self.call, self.rows, self.dtype)
        logits = self.call.sink_logits
        self.sink = None if logits is None else logits.to(self.dtype)[:, None, None]
        assert self.call.v is not None
        self.values = self.call.v[0].to(self.dtype)
        total = torch.logsumexp(self.scores, -1, keepdim=True)
        total = total if self.sink is None else torch.logaddexp(total, self.sink)
        self.weights = torch.exp(self.scores - total)
        self.lost = 0.0 if self.sink is None else torch.exp(self.sink - total)
        self.all = self.weights.sum(-1, keepdim=True) + self.lost  # 1 to rounding, and to the same rounding as what patterns keep of it

    def whole(self) -> Tensor:
        """[H, R, Dv]: the outputs with every key."""
        return self.times(self.weights)

    def under(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """(outputs [H, R, Dv], kept weight [H, R]) under a pattern."""
        seen = self.masks.of(pattern, self.rows)
        weights = self.weights * seen
        kept = weights.sum(-1, keepdim=True)
        if getattr(pattern.fixed(self.masks.length), "compensate", False):
            return self._compensated(seen), kept[..., 0]
        if kept.is_cuda or bool((kept < FAINT).any()):  # on a device, to look costs more than to compute
            scores = self.scores.masked_fill(~seen, -torch.inf)
            total = torch.logsumexp(scores, -1, keepdim=True)
            total = total if self.sink is None else torch.logaddexp(total, self.sink)
            return self.times(torch.exp(scores - total)), kept[..., 0]
        return self.times(weights) / ((kept + self.lost) / self.all), kept[..., 0]

    def times(self, weights: Tensor) -> Tensor:
        """[H, R, N] weights times the values, without repeating those that heads share: [H, R, Dv]."""
        return (weights.reshape(len(self.values), -1, weights.shape[-1]) @ self.values).view(*weights.shape[:2], -1)

    def _compensated(self, seen: Tensor) -> Tensor:
        """With the keys that are left out as one key more, their mean (RazorAttention)."""
        call, device = self.call, self.scores.device
        dropped = ((torch.arange(seen.shape[-1], device=device) <= self.rows.to(device)[:, None]) & ~seen).to(self.dtype)  # [1, R, N]
        count = dropped.sum(-1, keepdim=True)
        share = dropped / count.clamp(min=1)
        mean = (share @ call.k[0].to(self.dtype)).repeat_interleave(call.group, 0)
        score = (call.q[0][:, self.rows.to(device)].to(self.dtype) * mean).sum(-1, keepdim=True) * call.scale
        score = call.softcap * torch.tanh(score / call.softcap) if call.softcap is not None else score
        both = torch.cat([self.scores.masked_fill(~seen, -torch.inf), score + torch.log(count)], -1)
        total = torch.logsumexp(both, -1, keepdim=True)
        weights = torch.exp(both - (total if self.sink is None else torch.logaddexp(total, self.sink)))
        extra = (share @ self.values).repeat_interleave(call.group, 0)
        return self.times(weights[..., :-1].contiguous()) + weights[..., -1:] * extra
