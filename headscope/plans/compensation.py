"""One key for all dropped ones: the running sums behind RazorAttention's compensation, for decoding.

A compensating head sees, beside its first and last keys, the mean of those between, counted as often as there are of them. Decoding drops
one key a step, so sums that are kept cost one addition a step, where working the mean out anew would read the whole text. A ring that
overwrites a key adds it to its sums first; with a full cache the sums lie beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.plans.patterns import Pattern, Streaming

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def compensates(pattern: Pattern) -> bool:
    """Whether a pattern asks for the mean of what it drops."""
    return isinstance(pattern, Streaming) and pattern.compensate


def uncompensated(pattern: Pattern) -> Pattern:
    """The pattern without its compensation."""
    return Streaming(pattern.sink, pattern.window) if isinstance(pattern, Streaming) and pattern.compensate else pattern


@dataclass(eq=False)
class Sums:
    """Sums of the dropped keys [B, h, D] and values [B, h, Dv] of some key heads; positions below `upto` were looked at."""

    k: Tensor | None = None
    v: Tensor | None = None
    upto: int = 0

    def add(self, k: Tensor, v: Tensor, counted: Tensor) -> None:
        """Keys k [B, h, n, D] and values, of which those with `counted` [B or 1, n] are dropped now."""
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        keep = counted[:, None, :, None]
        new = [x.to(wide).masked_fill(~keep, 0.0).sum(2) for x in (k, v)]
        self.k, self.v = (new[0], new[1]) if self.k is None or self.v is None else (self.k + new[0], self.v + new[1])

    def select(self, index: Tensor) -> None:
        """The sequences of these numbers."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[index.to(self.k.device)], self.v[index.to(self.v.device)]

    def follow(self, k: Tensor, v: Tensor, end: int, starts: Tensor | None, sink: int) -> None:
        """Of a full cache k [B, Hkv, N, D]: the positions up to `end` that are behind the first `sink` of their text."""
        end = max(end, 0)
        if self.k is None or end > self.upto:
            where = torch.arange(self.upto, end, device=k.device)
            begin = torch.zeros(1, 1, dtype=torch.int64, device=k.device) if starts is None else starts.to(k.device)[:, None]
            self.add(k[:, :, self.upto : end], v[:, :, self.upto : end], where >= begin + sink)
            self.upto = end


def with_dropped(
    call: AttentionCall,
    heads: list[int],
    output: Tensor,
    lse: Tensor,
    sums: Sums,
    places: list[int],
    pattern: Streaming,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A decode step's (output [B, 1, Hq, Dv], lse [B, Hq, 1]) with the dropped keys of `heads` as one key more. `places`: the number in
    `sums` of each head's key head; `pattern`: what those heads have in common.
    """
    if sums.k is None or sums.v is None:
        return output, lse
    device = output.device
    t = call.query_offset
    begin = torch.zeros(1, dtype=torch.int64, device=device) if starts is None else starts.to(device)
    count = (t - pattern.window + 1 - begin - pattern.sink).clamp(min=0)[:, None].to(sums.k.dtype)  # [B or 1, 1]
    index = torch.tensor(places, device=device)
    own = torch.tensor(heads, device=device)
    mean_k, mean_v = (x[:, index] / count.clamp(min=1)[..., None] for x in (sums.k, sums.v))
    score = (call.q[:, own, 0].to(mean_k.dtype) * mean_k).sum(-1) * call.scale
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    score = (score + torch.log(count)).to(lse.dtype)
    before = lse[:, own, 0]
    total = torch.logaddexp(before, score)
    old, new = torch.exp(before - total), torch.exp(score - total)
    merged = output[:, 0, own].to(total.dtype) * old[..., None] + mean_v.to(total.dtype) * new[..., None]
    output, lse = output.clone(), lse.clone()
    output[:, 0, own] = merged.to(output.dtype)
    lse[:, own, 0] = total
    return output, lse
