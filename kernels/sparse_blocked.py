"""Sparse attention on any device in plain PyTorch: a tile of rows against the keys that some row of it may see, and no others.

Heads of one pattern go together, since their tiles have the same keys. What a pattern keeps is found per tile of rows from the pattern
itself (`Pattern.reach`) and remembered, for a model asks the same of every layer; the mask inside the tile is the pattern's own
`visible`, so there is no second description of it that could differ. Memory is O(tile x kept keys) per head.

The scores, the softcap, padding, windows, segments and sink logits are those of the call: a plan takes keys away from what the model may
see and never adds any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.errors import CaptureError, refusal
from headscope.kernels.gather import _scores

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans import Pattern

ROWS = 128
"""Rows of a tile."""


@torch.no_grad()
def blocked_sparse_attention(call: AttentionCall, patterns: Sequence[Pattern], heads: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """(output [B, Nq, H, Dv] in q's dtype, lse [B, H, Nq] float32, or float64 where q is) under static patterns.

    `heads`: the query heads to compute, in order; `patterns`: one for each of them (None: all heads). Positions of a pattern count from
    each sequence's first real token. Rows that see no key (padding) give 0 and -inf. Needs `call.v`. Raises PlanError for a pattern whose
    keys are chosen per input.
    """
    if call.v is None:
        raise refusal(CaptureError, repr(call), "it has no values, so there is no output to compute", "capture v as well")
    chosen = list(range(call.q.shape[1])) if heads is None else list(heads)
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    batch, _, rows, _ = call.q.shape
    out = call.q.new_zeros(batch, rows, len(chosen), call.v.shape[-1])
    lse = torch.full((batch, len(chosen), rows), -math.inf, dtype=dtype, device=call.q.device)
    first = [0] * batch if call.first_token is None else [int(one) for one in call.first_token]
    sums: dict[str, Tensor] = {}
    groups: dict[Pattern, list[int]] = {}
    for place, pattern in enumerate(patterns):
        groups.setdefault(pattern, []).append(place)
    for pattern, places in groups.items():
        for start in sorted(set(first)):
            elements = [b for b, one in enumerate(first) if one == start]
            fixed = pattern.fixed(rows + call.query_offset - start)
            for top in range(max(0, start - call.query_offset), rows, ROWS):  # what is before is padding
                tile = slice(top, min(rows, top + ROWS))
                _tile(call, fixed, [chosen[p] for p in places], places, elements, start, tile, out, lse, sums)
    return out, lse


def _tile(
    call: AttentionCall,
    pattern: Pattern,
    heads: list[int],
    places: list[int],
    elements: list[int],
    start: int,
    rows: slice,
    out: Tensor,
    lse: Tensor,
    sums: dict[str, Tensor],
) -> None:
    """One tile of rows of the heads that share a pattern, for the batch elements whose text starts at the same place."""
    values = call.v
    assert values is not None
    device, dtype = call.q.device, lse.dtype
    low, high = rows.start + call.query_offset - start, rows.stop - 1 + call.query_offset - start
    base = call.key_offset - start
    last = call.k.shape[2] - 1 + base
    keys, seen = _reach(pattern, low, high, base, min(last, high) if call.mask.causal else last)
    if not len(keys):
        return
    i, j = torch.arange(rows.start, rows.stop, device=device), (keys - base).to(device)
    h = torch.tensor(heads, device=device)
    b = torch.tensor(elements, device=device)
    q = call.q[b][:, h, rows].to(dtype)
    k = call.k[b][:, h // call.group][:, :, j].to(dtype)
    v = values[b][:, h // call.group][:, :, j].to(dtype)
    if call.mask.key_valid is not None:
        v = v.masked_fill(~call.mask.key_valid[b][:, None, j, None], 0.0)
    scores = _scores(call, q @ k.transpose(-1, -2), b[:, None, None, None], h[None, :, None, None], i[None, None, :, None], j)
    scores = scores.masked_fill(~seen.to(device), -math.inf)
    total = torch.logsumexp(scores, -1)
    extra = None
    if getattr(pattern, "compensate", False):
        extra = _compensation(call, pattern, q, b, h, i, start, sums)
        total = torch.logaddexp(total, extra[0])
    if call.sink_logits is not None:
        total = torch.logaddexp(total, call.sink_logits.to(device=device, dtype=dtype)[h][None, :, None])
    weights = torch.exp(scores - total.masked_fill(total == -math.inf, 0.0)[..., None])
    where = torch.tensor(places, device=device)
    z = weights @ v
    if extra is not None:
        z = z + torch.exp(extra[0] - total)[..., None] * extra[1]
    z = z.transpose(1, 2).to(out.dtype)
    out[b[:, None, None], i[None, :, None], where] = z
    lse[b[:, None, None], where[None, :, None], i] = total


@lru_cache(maxsize=512)
def _reach(pattern: Pattern, low: int, high: int, base: int, last: int) -> tuple[Tensor, Tensor]:
    """Positions of the keys that a row low..high may see, ascending, and [rows, keys] which row sees which; keys are base..last."""
    at = torch.arange(low, high + 1)
    keys = pattern.reach(low, high)
    keys = keys[(keys >= base) & (keys <= last)]
    seen = pattern.visible(at, keys)
    useful = seen.any(0)
    return keys[useful], seen[:, useful]


def _compensation(
    call: AttentionCall, pattern: Pattern, q: Tensor, b: Tensor, h: Tensor, i: Tensor, start: int, sums: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(score [B, H, R], value [B, H, R, Dv]) of one key more per row: the mean of the keys that the row dropped, counted as often as there
    are of them. -inf where a row dropped none.

    A row drops the keys between the sink and its window, so their sums are differences of running sums over the keys: O(N).
    """
    sink, window = int(getattr(pattern, "sink", 0)), int(getattr(pattern, "window", 1))
    for name, source in (("k", call.k), ("v", call.v)):
        if name not in sums and source is not None:
            kept = source.double()
            if call.mask.key_valid is not None:
                kept = kept.masked_fill(~call.mask.key_valid[:, None, :, None], 0.0)
            sums[name] = torch.nn.functional.pad(kept.cumsum(2), (0, 0, 1, 0))
    offset = call.key_offset - start  # position of k[..., 0, :]
    count = call.k.shape[2]
    low = torch.full_like(i, min(count, max(0, sink - offset)))
    high = (i + call.query_offset - start - window + 1 - offset).clamp(min=0, max=count)
    number = (high - low).clamp(min=0)
    groups = h // call.group

    def mean(name: str) -> Tensor:
        total = sums[name][b][:, groups]
        part = total[:, :, torch.maximum(high, low)] - total[:, :, low]
        return (part / number.clamp(min=1)[:, None]).to(q.dtype)

    score = (q * mean("k")).sum(-1) * call.scale
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    return score + torch.log(number.to(q.dtype)), mean("v")
