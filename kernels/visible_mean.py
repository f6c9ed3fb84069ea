"""The mean of the values that each query may see: attention with equal weights, without its matrix.

A query sees a run of keys (causality, windows, packed sequences) less the padding among them, so its sum is a difference of two running
sums: O(N d) for all rows. They are kept in float64, since a window's sum is the small difference of two large ones. Masks that are given
entry by entry have no runs, and are multiplied out block by block.

The silent failure this avoids: the literal mean 1/L over all keys, which shows a causal model its future and counts padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.kernels.gather import visible_at
from headscope.kernels.naive import naive_scores

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

BLOCK = 64
"""Rows summed by one product."""
ENTRIES = 1 << 22
"""Entries of an explicit mask held at a time."""


@torch.no_grad()
def visible_mean(call: AttentionCall) -> Tensor:
    """[B, Hq, Nq, Dv], in float32 (float64 where q is): sum over visible keys of v, divided by their number; 0 on rows that see none."""
    assert call.v is not None
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    bounds = None if call.mask.allowed is not None or call.mask.bias is not None else _runs(call)
    if bounds is None:
        return _by_blocks(call).to(dtype)
    low, high = bounds
    batch, kv_heads, keys, width = call.v.shape
    v = call.v.double()
    ones = torch.ones(batch, keys, dtype=torch.float64, device=v.device)
    if call.mask.key_valid is not None:
        v = v.masked_fill(~call.mask.key_valid[:, None, :, None], 0.0)
        ones = call.mask.key_valid.double()
    if call.q.shape[2] == 1:  # a decode step: one sum, no running ones
        index = torch.arange(keys, device=v.device)
        inside = ((index >= low) & (index < high)).double() * ones
        total, count = torch.einsum("bk,bhkd->bhd", inside, v)[:, :, None], inside.sum(-1)[:, None, None, None]
    else:
        running = _running(v)
        counts = torch.nn.functional.pad(ones.cumsum(1), (1, 0))
        plain = call.mask.causal and call.mask.window is None and call.mask.query_segments is None
        if plain and call.q.shape[2] == keys and call.query_offset == call.key_offset:
            # a whole sequence read from left to right: row i's sum is the i-th, and there is nothing to take off
            mean = running[:, :, 1:] / counts[:, None, 1:, None].clamp_min(1.0)
            return _per_head(mean.to(dtype), call.group)

        def at(where: Tensor) -> Tensor:
            index = where.expand(batch, -1)[:, None, :, None].expand(batch, kv_heads, where.shape[-1], width)
            return running.gather(2, index)

        total = at(high) - at(low)
        count = (counts.gather(1, high.expand(batch, -1)) - counts.gather(1, low.expand(batch, -1)))[:, None, :, None]
    mean = torch.where(count > 0, total / count.clamp_min(1.0), torch.zeros((), dtype=torch.float64, device=v.device))
    return _per_head(mean.to(dtype), call.group)


def _per_head(mean: Tensor, group: int) -> Tensor:
    return mean if group == 1 else mean.repeat_interleave(group, 1)


def _running(v: Tensor) -> Tensor:
    """[B, H, N + 1, D]: sums of v [B, H, N, D] float64 up to each key, 0 in front.

    Within blocks of 64 by a product with a triangle of ones, over blocks by a scan: a scan over all rows, whose sums depend on one another
    and lie apart in memory, leaves a GPU waiting.
    """
    batch, heads, count, width = v.shape
    if count <= 2 * BLOCK:
        return torch.nn.functional.pad(v.cumsum(2), (0, 0, 1, 0))
    blocks = -(-count // BLOCK)
    part = torch.nn.functional.pad(v, (0, 0, 0, blocks * BLOCK - count)).view(batch, heads, blocks, BLOCK, width)
    inside = torch.ones(BLOCK, BLOCK, dtype=v.dtype, device=v.device).tril() @ part
    before = torch.nn.functional.pad(inside[:, :, :-1, -1].cumsum(2), (0, 0, 1, 0))
    out = torch.zeros(batch, heads, count + 1, width, dtype=v.dtype, device=v.device)
    out[:, :, 1:] = inside.add_(before[:, :, :, None]).view(batch, heads, -1, width)[:, :, :count]
    return out


def _runs(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
    """(first, end) index of the keys that each row sees, [1 or B, Nq]; None when packed sequences do not lie one after the other."""
    mask, keys = call.mask, call.k.shape[2]
    t = (torch.arange(call.q.shape[2], device=call.q.device) + call.query_offset - call.key_offset)[None]
    low, high = torch.zeros_like(t), torch.full_like(t, keys)
    if mask.causal:
        high = t + 1
    if mask.window is not None:
        low = t - mask.window + 1
        high = high if mask.causal else t + mask.window
    if mask.query_segments is not None and mask.key_segments is not None:
        of_key = mask.key_segments.to(torch.int64).contiguous()
        if not bool((of_key.diff(dim=1) >= 0).all()):
            return None
        of_row = mask.query_segments.to(torch.int64).contiguous()
        low = torch.maximum(low, torch.searchsorted(of_key, of_row))
        high = torch.minimum(high, torch.searchsorted(of_key, of_row, right=True))
    high = high.clamp(0, keys)
    return torch.minimum(low.clamp(0, keys), high), high


def _by_blocks(call: AttentionCall) -> Tensor:
    batch, heads, rows, _ = call.q.shape
    keys = call.k.shape[2]
    assert call.v is not None
    device = call.q.device
    v = call.v.double()
    if call.mask.key_valid is not None:
        v = v.masked_fill(~call.mask.key_valid[:, None, :, None], 0.0)
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[None, :, None, None]
    j = torch.arange(keys, device=device)[None, None, None, :]
    pieces = []
    for part in torch.arange(rows, device=device).split(max(ENTRIES // (batch * heads * keys), 1)):
        shape = (batch, heads, len(part), keys)
        seen = visible_at(call, b, h, part[None, None, :, None], j).expand(shape).double()
        grouped = seen.reshape(batch, call.k.shape[1], -1, keys) @ v
        pieces.append(grouped.view(batch, heads, len(part), -1) / seen.sum(-1, keepdim=True).clamp_min(1.0))
    return torch.cat(pieces, 2)


def naive_visible_mean(call: AttentionCall) -> Tensor:
    """The dense twin, float64 on the CPU."""
    assert call.v is not None
    seen = naive_scores(call)[1].double()
    v = call.v.cpu().double().nan_to_num().repeat_interleave(call.group, 1)
    return (seen @ v) / seen.sum(-1, keepdim=True).clamp_min(1.0)


__all__ = ["naive_visible_mean", "visible_mean"]
