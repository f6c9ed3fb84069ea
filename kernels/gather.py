"""Exact entries of A at chosen places, and exact outputs of chosen rows, without the matrix.

Once a row's lse is known, A[t, s] = exp(score[t, s] - lse[t]) costs one dot product. A place that the model could not look at is 0, not the
weight it would have had, so every fact of the mask is applied at the place itself (`visible_at`). Sums run in float64: a gather is small,
and its error is then only that of the lse.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from headscope.errors import CaptureError, StatisticError, refusal
from headscope.kernels.hiding import HIDING_BIAS

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

PAIRS_AT_ONCE = 1 << 22
"""Numbers of q gathered at a time by `exact_pairs`."""


def visible_at(call: AttentionCall, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Whether query row i sees key j (indices into the call's q and k) for batch element b and query head h; all broadcast."""
    mask = call.mask
    ahead = (i + call.query_offset) - (j + call.key_offset)
    seen = ahead >= 0 if mask.causal else torch.ones_like(ahead, dtype=torch.bool)
    if mask.window is not None:
        seen = seen & ((ahead if mask.causal else ahead.abs()) < mask.window)
    if mask.key_valid is not None:
        seen = seen & mask.key_valid[b, j]
    if mask.query_segments is not None and mask.key_segments is not None:
        seen = seen & (mask.query_segments[b, i] == mask.key_segments[b, j])
    if mask.allowed is not None:
        seen = seen & mask.allowed[_expanded(b, mask.allowed, 0), _expanded(h, mask.allowed, 1), i, j]
    if mask.bias is not None:
        seen = seen & (_bias_at(call, b, h, i, j) > HIDING_BIAS)
    return seen


def _expanded(index: Tensor, values: Tensor, dim: int) -> Tensor:
    return index if values.shape[dim] > 1 else torch.zeros_like(index)


def _bias_at(call: AttentionCall, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    bias = call.mask.bias
    assert bias is not None
    return bias[_expanded(b, bias, 0), _expanded(h, bias, 1), i, j].double()


def _scores(call: AttentionCall, products: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Raw products q.k to scores, -inf where hidden; b, h, i, j broadcast to `products`."""
    scores = products * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask.bias is not None:
        scores = scores + _bias_at(call, b, h, i, j).to(scores.dtype)
    return scores.masked_fill(~visible_at(call, b, h, i, j), -math.inf)


@torch.no_grad()
def window_scores(call: AttentionCall, head: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Scores of one head, [B, len(rows), len(columns)] float64 with -inf where hidden; rows and columns are indices into q and k."""
    q = call.q[:, head, rows].double()
    k = call.k[:, head // call.group, columns].double()
    b = torch.arange(q.shape[0], device=q.device)[:, None, None]
    h = torch.full((1, 1, 1), head, dtype=torch.int64, device=q.device)
    return _scores(call, q @ k.transpose(-1, -2), b, h, rows[None, :, None], columns[None, None, :])


@torch.no_grad()
def gather_weights(call: AttentionCall, lse: Tensor, head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """A of one head at absolute positions: [B, len(queries), len(keys)], float32 (float64 where q is).

    `lse` [B, Hq, Nq] are the rows' normalisers as `measure` gives them; rows where it is NaN give NaN. Raises StatisticError for a head
    or a position that is not in the call.
    """
    if not 0 <= head < call.q.shape[1]:
        raise refusal(StatisticError, f"head {head}", f"the call has heads 0..{call.q.shape[1] - 1}", "pass one of them")
    rows = _indices("query", queries, call.query_offset, call.q.shape[2], call.q)
    columns = _indices("key", keys, call.key_offset, call.k.shape[2], call.q)
    weights = torch.exp(window_scores(call, head, rows, columns) - lse[:, head, rows].to(call.q.device).double()[..., None])
    return weights.to(torch.float64 if call.q.dtype == torch.float64 else torch.float32)


def _indices(what: str, positions: Tensor, offset: int, count: int, like: Tensor) -> Tensor:
    index = torch.as_tensor(positions, dtype=torch.int64).reshape(-1) - offset  # where it lies: a look at a GPU's would wait for it
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        low, high = int(index.min()) + offset, int(index.max()) + offset
        raise refusal(
            StatisticError,
            f"{what} positions {low}..{high}",
            f"the call holds {offset}..{offset + count - 1}",
            "pass positions among those",
        )
    return index.to(like.device, non_blocking=True)


@torch.no_grad()
def exact_pairs(call: AttentionCall, lse: Tensor, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """name -> A at (queries, keys), each [P] or [B, P] of absolute positions: [B, Hq, P], NaN where either is not in the call or is -1.

    `lse` [B, Hq, Nq] float64 is NaN on rows that do not count, and so are their entries.
    """
    batch, heads, rows, width = call.q.shape
    kv_heads, keys = call.k.shape[1], call.k.shape[2]
    device = call.q.device
    b = torch.arange(batch, device=device)[:, None]
    h = torch.arange(heads, device=device)[None, :, None]
    out: dict[str, Tensor] = {}
    for name, (queries, columns) in pairs.items():
        t, s = (x.to(device=device, dtype=torch.int64).expand(batch, x.shape[-1]) for x in (queries, columns))
        i, j = t - call.query_offset, s - call.key_offset
        inside = (t >= 0) & (s >= 0) & (i >= 0) & (i < rows) & (j >= 0) & (j < keys)
        values = torch.full((batch, heads, t.shape[1]), math.nan, dtype=torch.float64, device=device)
        found = inside.any(0).nonzero().flatten()
        step = max(PAIRS_AT_ONCE // (batch * heads * width), 1)
        for part in found.split(step):
            at, to = i[:, part].clamp(0, rows - 1), j[:, part].clamp(0, keys - 1)
            q = call.q.transpose(1, 2)[b, at].double()  # [B, P, Hq, D]
            k = call.k.transpose(1, 2)[b, to].double()  # [B, P, Hkv, D]
            products = (q.unflatten(2, (kv_heads, call.group)) * k[:, :, :, None]).sum(-1).flatten(2).transpose(1, 2)
            scores = _scores(call, products, b[:, None], h, at[:, None], to[:, None])
            weights = torch.exp(scores - lse.gather(2, at[:, None].expand(batch, heads, len(part))))
            values[:, :, part] = weights.masked_fill(~inside[:, None, part], math.nan)
        out[name] = values.to(torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    return out


@torch.no_grad()
def attention_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """Exact attention output of query rows by index into q: [B, Hq, len(rows), Dv], float32 (float64 where q is).

    What the host's own kernel should have given for these rows, so that a capture can check that it read the call right. A row that sees
    no key gives NaN. Memory is O(len(rows) * Nk) per head. Needs `call.v`.
    """
    if call.v is None:
        raise refusal(CaptureError, repr(call), "it has no values, so there is no output to compute", "capture v as well")
    rows = _indices("row", rows, 0, call.q.shape[2], call.q)
    columns = torch.arange(call.k.shape[2], device=call.q.device)
    batch, heads, count = call.q.shape[0], call.q.shape[1], len(rows)
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    q = call.q[:, :, rows].to(dtype).reshape(batch, call.k.shape[1], call.group * count, -1)
    products = (q @ call.k.to(dtype).transpose(-1, -2)).view(batch, heads, count, -1)
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[None, :, None, None]
    scores = _scores(call, products, b, h, rows[None, None, :, None], columns[None, None, None, :])
    lse = torch.logsumexp(scores, -1)
    lse = lse.masked_fill(lse == -math.inf, math.nan)
    if call.sink_logits is not None:
        lse = torch.logaddexp(lse, call.sink_logits.to(dtype)[:, None])
    weights = torch.exp(scores - lse[..., None]).view(batch, call.k.shape[1], call.group * count, -1)
    values = call.v.to(dtype)
    if call.mask.key_valid is not None:  # what padding holds must not reach a sum, NaN least of all
        values = values.masked_fill(~call.mask.key_valid[:, None, :, None], 0.0)
    return (weights @ values).view(batch, heads, count, -1)
