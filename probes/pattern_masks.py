"""Which keys every row of every head of a layer sees under many patterns: what `plans.indices.choose` gives, for all heads at once.

A measurement that tries dozens of patterns on every head would spend its time choosing, head by head and setting by setting. What a rule
looks at (block estimates, the weights of the last rows, distances from an anchor) does not depend on its dial, so it is made once per layer
and kept, and each setting is then a comparison on the call's own device. Nothing here waits for a device.

The silent failure this avoids: a second implementation that chooses a little differently from the first. It is tested entry by entry
against `choose`, and rules that have no form here go through `choose` itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from headscope.call import MaskFacts
from headscope.kernels.gather import visible_at
from headscope.plans.dynamic import Budget, TopBlocks, VerticalSlash
from headscope.plans.dynamic_anchor import Stripes
from headscope.plans.indices import choose
from headscope.plans.patterns import Dense, Power, Streaming, Strided
from headscope.probes.calls import score_rows

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.patterns import Pattern

EXACT = torch.float64
"""What rules compute in: two settings that differ by one key must not be told apart by rounding."""


@dataclass(eq=False)
class Masks:
    """The masks of one layer's call of one sequence without padding, which begins at position 0. `start`: where answers begin, which is
    when budgets choose; None: at the end. `decodes`: rows from `start` on are decoded, so that rules that act in the prefill know nothing
    of them and leave them dense.
    """

    call: AttentionCall
    start: int | None = None
    decodes: bool = False
    _known: dict[Hashable, Tensor] = field(default_factory=dict)
    _before: Masks | None = None

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return int(self.call.q.shape[2])

    def of(self, pattern: Pattern, rows: Tensor, heads: Tensor | None = None) -> Tensor:
        """[H, R, N] bool, before causality, of rows [R] of `heads` [H] (None: all); H is 1 for a static pattern."""
        pattern = pattern.fixed(self.length)
        device = self.call.q.device
        rows, keys = rows.to(device), torch.arange(self.length, device=device)
        if isinstance(pattern, Dense | Streaming | Strided | Power):  # rules that are computed wherever the positions are
            return pattern.visible(rows, keys).to(device)[None]
        if pattern.static:
            return pattern.visible(rows.cpu(), keys.cpu()).to(device)[None]
        every = torch.arange(self.call.q.shape[1], device=device) if heads is None else heads.to(device)
        if self.decodes and self.start is not None and self.start < self.length and not isinstance(pattern, Budget):
            seen = self._prompt().of(pattern, rows.clamp(max=self.start - 1), every)
            return torch.nn.functional.pad(seen, (0, self.length - self.start), value=True) | (rows >= self.start)[:, None]
        if isinstance(pattern, VerticalSlash):
            columns, diagonals = self._lines(pattern)
            back = rows[:, None] - keys
            return columns[every][:, None] | (diagonals[every][:, back.clamp(min=0)] & (back >= 0))
        if isinstance(pattern, TopBlocks) and pattern.rule in ("pooled", "antidiagonal"):
            return self._tiles(pattern)[every][:, rows // pattern.block][:, :, keys // pattern.block]
        if isinstance(pattern, Stripes):
            group = rows // (pattern.block * pattern.step)
            near = (keys < pattern.block) | (keys >= (group * pattern.block * pattern.step)[:, None])
            return near | (self._distances(pattern.block, pattern.step)[every][:, group] + pattern.theta >= 0)
        if isinstance(pattern, Budget):
            chosen, since = self._budget(pattern)
            start = self.length if self.start is None else self.start
            return chosen[every][:, None] | (keys >= since) | (rows < start)[:, None]
        found = [choose(self.call, head, pattern).visible(rows.cpu(), keys.cpu()).to(device) for head in every.tolist()]
        return torch.stack(found)

    def _prompt(self) -> Masks:
        if self._before is None:
            facts = MaskFacts(True, self.call.mask.window)
            self._before = Masks(
                replace(self.call, q=self.call.q[:, :, : self.start], k=self.call.k[:, :, : self.start], v=None, mask=facts)
            )
        return self._before

    def shares(self, pattern: Pattern, rows: Tensor) -> Tensor:
        """[H] float64: the share of the causal entries of these rows that is kept; the pattern's own count where it is static."""
        heads, device = self.call.q.shape[1], self.call.q.device
        if pattern.static or isinstance(pattern, Budget):
            return torch.full((heads,), pattern.density(self.length), dtype=torch.float64, device=device)
        causal = torch.arange(self.length, device=device) <= rows.to(device)[:, None]
        return (self.of(pattern, rows) & causal).sum((1, 2)).double() / causal.sum()

    # ---- rules ------------------------------------------------------------------------------------------------------

    def _lines(self, pattern: VerticalSlash) -> tuple[Tensor, Tensor]:
        """([H, N] bool columns, [H, N] bool diagonals by distance)."""
        count = min(pattern.last_q, self.length)
        name = ("lines", count)
        if name not in self._known:
            first = self.length - count
            weights = torch.softmax(score_rows(self.call, first, self.length, dtype=EXACT)[0], -1)
            at = torch.arange(first, self.length, device=weights.device)[:, None]
            back = at - torch.arange(self.length, device=weights.device)  # distance 0 .. t is key t .. 0
            turned = weights.gather(-1, back.clamp(min=0).expand_as(weights)) * (back >= 0)
            self._known[name] = torch.stack([weights.sum(1), turned.sum(1)])
        columns, diagonals = self._known[name].clone()
        columns[:, : pattern.sink] = torch.inf
        diagonals[:, : pattern.window] = torch.inf
        return largest(columns, max(pattern.vertical, pattern.sink)), largest(diagonals, max(pattern.slash, pattern.window))

    def _tiles(self, pattern: TopBlocks) -> Tensor:
        """[H, n, n] bool by row tile and key tile."""
        name = ("tiles", pattern.rule, pattern.block, pattern.stride if pattern.rule == "antidiagonal" else 0)
        count = -(-self.length // pattern.block)
        number = torch.arange(count, device=self.call.q.device)
        seen = number <= number[:, None]
        if name not in self._known:
            q, k = self.call.q[0].to(EXACT), self.call.k[0].to(EXACT).repeat_interleave(self.call.group, 0)
            scores = antidiagonals(q, k, self.call.scale, pattern.block, pattern.stride) if pattern.rule == "antidiagonal" else None
            if scores is None:
                scores = means(q, pattern.block) @ means(k, pattern.block).transpose(-1, -2) * self.call.scale
            self._known[name] = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        mass = self._known[name]
        ranked, order = mass.masked_fill(~seen, -1.0).sort(dim=-1, descending=True, stable=True)
        if pattern.share is not None:
            most = (pattern.share * (number + 1).to(EXACT)).round().clamp(min=1)  # half to even, as Python rounds
            taken = number < most[:, None]
        else:
            held = ranked.clamp(min=0)
            taken = held.cumsum(-1) - held < (float(pattern.mass or 1.0) - 1e-9) * held.sum(-1, keepdim=True)
        kept = torch.zeros_like(seen).expand_as(mass).scatter(-1, order, taken.expand_as(mass))
        return (kept & seen) | (number == 0) | (number == number[:, None])

    def _distances(self, block: int, step: int) -> Tensor:
        """[H, groups, N]: how far, in nats, the best mean score of a key in the group's tiles lies above the tile's mean anchor."""
        name = ("stripes", block, step)
        if name not in self._known:
            q, k = self.call.q[0].to(EXACT), self.call.k[0].to(EXACT).repeat_interleave(self.call.group, 0)
            width, at = block * step, torch.arange(self.length, device=q.device)
            out = q.new_full((q.shape[0], -(-self.length // width), self.length), -torch.inf)
            for group in range(out.shape[1]):
                begin, end = group * width, min(self.length, (group + 1) * width)
                near = torch.cat([at[: min(block, begin)], at[begin:end]])
                scores = (q[:, begin:end] @ k[:, near].transpose(-1, -2) * self.call.scale).masked_fill(
                    near > at[begin:end, None], -torch.inf
                )
                anchors = means(scores.amax(-1, keepdim=True), block)
                between = at[min(block, begin) : begin]
                if len(between):
                    close = means(q[:, begin:end], block) @ k[:, between].transpose(-1, -2) * self.call.scale - anchors
                    out[:, group, between] = close.amax(1)
            self._known[name] = out
        return self._known[name]

    def _budget(self, pattern: Budget) -> tuple[Tensor, int]:
        """([H, N] bool chosen keys, from where on every key is kept)."""
        start = self.length if self.start is None else self.start
        count = min(pattern.window, start)
        name = ("budget", count)
        if name not in self._known:
            facts = MaskFacts(True, self.call.mask.window)
            before = replace(self.call, q=self.call.q[:, :, :start], k=self.call.k[:, :, :start], v=None, mask=facts)
            self._known[name] = torch.softmax(score_rows(before, start - count, start, dtype=EXACT)[0], -1).sum(1)
        since = max(0, start - max(pattern.window, pattern.recent))
        scores = self._known[name][:, :since]
        if pattern.grouped:
            group = self.call.group
            scores = scores.unflatten(0, (-1, group)).mean(1).repeat_interleave(group, 0)
        if pattern.pool > 1 and since:
            scores = torch.nn.functional.avg_pool1d(scores[:, None], pattern.pool, 1, pattern.pool // 2)[:, 0, :since]
        scores = scores.clone()
        scores[:, : pattern.sink] = torch.inf
        return torch.nn.functional.pad(largest(scores, pattern.keep), (0, self.length - since)), since


def largest(values: Tensor, count: int) -> Tensor:
    """Bool like values [H, n]: the `count` largest of each row, the first of equals."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, : max(0, count)]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, True)


def means(values: Tensor, block: int) -> Tensor:
    """[H, N, D] -> [H, n, D]: mean of each tile; the last may be shorter."""
    count = values.shape[1]
    sums = torch.nn.functional.pad(values, (0, 0, 0, -count % block)).unflatten(1, (-1, block)).sum(2)
    sizes = torch.full((sums.shape[1], 1), block, dtype=values.dtype, device=values.device)
    sizes[-1] = count - (sums.shape[1] - 1) * block
    return sums / sizes


def antidiagonals(q: Tensor, k: Tensor, scale: float, block: int, stride: int) -> Tensor:
    """XAttention's estimate in nats [H, n, n] of q, k [H, N, D]: see `headscope.plans.indices`."""

    def strided(values: Tensor, flip: bool) -> Tensor:
        whole = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[1] % stride)).unflatten(1, (-1, stride))
        return (whole.flip(2) if flip else whole).flatten(2)

    scores = strided(q, True) @ strided(k, False).transpose(-1, -2) * (scale / stride)
    per = max(1, block // stride)
    count = scores.shape[1]
    number = torch.arange(count, device=q.device)
    weights = torch.softmax(scores.masked_fill(number > number[:, None], -torch.inf), -1)
    missing = -count % per
    return torch.log(torch.nn.functional.pad(weights, (0, missing, 0, missing)).unflatten(1, (-1, per)).unflatten(3, (-1, per)).sum((2, 4)))


def scores_of(call: AttentionCall, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores of rows [R] of one sequence on all keys: [H, R, N] in `dtype`, -inf where hidden."""
    device, heads = call.q.device, call.q.shape[1]
    rows, keys = rows.to(device), torch.arange(call.k.shape[2], device=device)
    q = call.q[0, :, rows].to(dtype).reshape(call.k.shape[1], -1, call.q.shape[-1])
    scores = (q @ call.k[0].to(dtype).transpose(-1, -2)).view(heads, len(rows), -1) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask.bias is not None:
        scores = scores + call.mask.bias[0][:, rows][..., keys].to(dtype)
    zero, h = torch.zeros(1, 1, 1, dtype=torch.int64, device=device), torch.arange(heads, device=device)[:, None, None]
    return scores.masked_fill(~visible_at(call, zero, h, rows[None, :, None], keys[None, None, :]), -torch.inf)
