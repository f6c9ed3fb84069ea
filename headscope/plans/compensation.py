"""One key for all dropped ones: the running sums behind RazorAttention's compensation, for decoding.

A compensating head sees, beside its first and last keys, the mean of those between, counted as often as there are of them. Decoding drops
one key a step, so sums that are kept cost one addition a step, where working the mean out anew would read the whole text. A ring adds a key
to the sums of each pattern whose window it leaves, before it is overwritten; with a full cache the sums lie beside it. A window that grows
with the text grows slower than the text, so what was dropped stays dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.plans.patterns import Pattern, Span, Streaming

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def compensates(pattern: Pattern) -> bool:
    """Whether a pattern asks for the mean of what it drops."""
    return isinstance(pattern, Streaming | Span) and pattern.compensate


def uncompensated(pattern: Pattern) -> Pattern:
    """The pattern without its compensation."""
    return replace(pattern, compensate=False) if isinstance(pattern, Streaming | Span) and pattern.compensate else pattern


@dataclass(eq=False)
class Sums:
    """Sums of what heads of one `pattern` dropped: keys [B, h, D] and values [B, h, Dv] of some key heads.

    `begins`: where each text begins, None for 0 everywhere; `upto`: per sequence (once for all without padding) the positions looked at.
    Both are on the host, so that a step need not ask the device what it drops.
    """

    pattern: Streaming | Span
    k: Tensor | None = None
    v: Tensor | None = None
    begins: list[int] | None = None
    upto: list[int] = field(default_factory=lambda: [0])

    def begin(self, starts: Tensor | None) -> None:
        """Where the texts begin; asked of the device once."""
        if self.k is None and starts is not None:
            self.begins = [int(one) for one in starts.tolist()]
            self.upto = [0] * len(self.begins)

    def ends(self, length: int) -> list[int]:
        """Per sequence, the position before which every key is behind the window of the last of `length` tokens."""
        return [length - min(length - begin, self._window(length - begin)) for begin in self.begins or [0]]

    def _window(self, length: int) -> int:
        one = self.pattern
        return one.at(max(1, length)).window if isinstance(one, Span) else one.window

    def counts(self, length: int) -> list[int]:
        """Per sequence, how many keys are dropped at the last of `length` tokens."""
        return [max(0, end - begin - self.pattern.sink) for end, begin in zip(self.ends(length), self.begins or [0], strict=True)]

    def due(self, length: int) -> tuple[int, int]:
        """The positions, from and to, that `add` is to be given for a text of `length` tokens."""
        return min(self.upto), max(self.ends(length))

    def add(self, k: Tensor, v: Tensor, low: int, length: int) -> None:
        """The keys k [B, h, n, D] and values at positions `low` .. `low` + n - 1: those that are dropped since are added."""
        where, ends = torch.arange(low, low + k.shape[2]), self.ends(length)
        counted = [
            (where >= max(done, begin + self.pattern.sink)) & (where < end)
            for done, begin, end in zip(self.upto, self.begins or [0], ends, strict=True)
        ]
        keep = torch.stack(counted)
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        if k.is_cuda and bool(keep.all()):
            new = [x.sum(2, dtype=wide) for x in (k, v)]
        else:
            mask = keep.to(k.device)[:, None, :, None]
            new = [torch.where(mask, x.to(wide), 0.0).sum(2) for x in (k, v)]
        self.k, self.v = (new[0], new[1]) if self.k is None or self.v is None else (self.k + new[0], self.v + new[1])
        self.upto = [max(done, min(end, low + k.shape[2])) for done, end in zip(self.upto, ends, strict=True)]

    def select(self, index: Tensor) -> None:
        """The sequences of these numbers."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[index.to(self.k.device)], self.v[index.to(self.v.device)]
        if self.begins is not None:
            order = index.tolist()
            self.begins, self.upto = [self.begins[at] for at in order], [self.upto[at] for at in order]

    def follow(self, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """Of a full cache k [B, Hkv, N, D]: what is dropped at the last of `length` tokens and was not before."""
        self.begin(starts)
        low, high = self.due(length)
        if high > low or self.k is None:
            high = max(high, low)
            self.add(k[:, :, low:high], v[:, :, low:high], low, length)


def with_dropped(
    call: AttentionCall, heads: list[int], output: Tensor, lse: Tensor, sums: Sums, places: list[int]
) -> tuple[Tensor, Tensor]:
    """A decode step's (output [B, 1, Hq, Dv], lse [B, Hq, 1]) with the dropped keys of `heads` as one key more. `places`: the number in
    `sums` of each head's key head.
    """
    if sums.k is None or sums.v is None:
        return output, lse
    device = output.device
    counts = sums.counts(call.query_offset + 1)
    if not any(counts):
        return output, lse
    count = torch.tensor(counts, dtype=sums.k.dtype).to(device, non_blocking=True)[:, None]  # [B or 1, 1]
    index, own = (_on(tuple(one), device) for one in (places, heads))
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


@lru_cache(maxsize=256)
def _on(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)
