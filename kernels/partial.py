"""Partial attention: what a set of keys contributes to a row that was normalised over all of them.

With lse known, m_X = sum_{j in X} A_ij and z_X = sum_{j in X} A_ij v_j cost O(N |X| d) and no matrix. Nearly every edit of attention
weights is a combination of z with such terms, so a fused kernel's output can be corrected instead of computed again. `log_factor` gives
entries another weight than A_ij, which makes one function serve biases, boosts and redistributions that were already made; it is added in
the exponent, where a factor of 0 or of e^100 is as harmless as any other.

Rows are taken in blocks small enough to stay in cache; sums run in float32, in float64 where q is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.errors import CaptureError, refusal
from headscope.kernels.dispatch import measure
from headscope.kernels.gather import _scores
from headscope.kernels.naive import naive_weights
from headscope.statistics.request import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

ENTRIES = 1 << 21
"""Weights held at a time."""

_LSE = StatisticsRequest(("lse",))

LogFactor = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(scores [B, H, R, X] with -inf where hidden, rows [R], keys [X]) -> ln of what each A_ij is multiplied with, broadcastable to scores."""


@lru_cache(maxsize=4096)
def head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Heads as an index on a device, made once: a Python list would be copied there, and waited for, at every call of every layer."""
    with torch.inference_mode(False):
        return torch.tensor(heads, dtype=torch.int64, device=device)


def select_heads(call: AttentionCall, heads: Sequence[int], rows: slice | None = None) -> AttentionCall:
    """The call of some of its query heads (and of a run of its rows). Views where heads are whole groups, copies of keys where not."""
    heads = list(heads)
    total, group = call.q.shape[1], call.group
    mask = call.mask
    out = call
    if heads != list(range(total)):
        kv = [head // group for head in heads]
        whole = heads == list(range(heads[0], heads[-1] + 1)) and heads[0] % group == 0 and len(heads) % group == 0
        if whole:
            span, kv_span = slice(heads[0], heads[-1] + 1), slice(kv[0], kv[-1] + 1)
            q, k = call.q[:, span], call.k[:, kv_span]
            v = None if call.v is None else call.v[:, kv_span]
        else:
            index = head_index(tuple(heads), call.q.device)
            kv_index = head_index(tuple(kv[:1] if len(set(kv)) == 1 else kv), call.q.device)
            q, k = call.q[:, index], call.k[:, kv_index]
            v = None if call.v is None else call.v[:, kv_index]
        index = head_index(tuple(heads), call.q.device)
        mask = replace(mask, allowed=_of_heads(mask.allowed, index), bias=_of_heads(mask.bias, index))
        sinks = None if call.sink_logits is None else call.sink_logits[index]
        facts = call.facts
        if isinstance(lse := facts.get("lse"), torch.Tensor):
            facts = {name: fact for name, fact in facts.items() if name != "fold"} | {"lse": lse[:, index]}  # a fold holds its parts
        out = replace(call, q=q, k=k, v=v, mask=mask, sink_logits=sinks, facts=facts)
    if rows is not None and (rows.start, rows.stop) != (0, call.q.shape[2]):
        mask = replace(
            mask,
            query_valid=None if mask.query_valid is None else mask.query_valid[:, rows],
            query_segments=None if mask.query_segments is None else mask.query_segments[:, rows],
            allowed=None if mask.allowed is None else mask.allowed[:, :, rows],
            bias=None if mask.bias is None else mask.bias[:, :, rows],
        )
        facts = out.facts
        if isinstance(lse := facts.get("lse"), torch.Tensor):
            facts = {name: fact for name, fact in facts.items() if name != "fold"} | {"lse": lse[:, :, rows]}
        out = replace(out, q=out.q[:, :, rows], mask=mask, query_offset=call.query_offset + rows.start, facts=facts)
    return out


def _of_heads(values: Tensor | None, heads: Tensor) -> Tensor | None:
    return values if values is None or values.shape[1] == 1 else _rows_kept(values, heads)


def _rows_kept(values: Tensor, heads: Tensor) -> Tensor:
    """values [B, H, Nq, Nk] of some heads; what is one row behind an expanded view stays one."""
    if values.stride(2) == 0 and values.shape[2] > 1:
        return values[:, :, :1][:, heads].expand(-1, -1, values.shape[2], -1)
    return values[:, heads]


@torch.no_grad()
def row_lse(call: AttentionCall) -> Tensor:
    """[B, Hq, Nq]: every row's normaliser ln(sum_j exp(s_ij) + exp(sink)), by the statistics kernels; NaN on rows that are padding or see
    no key. float32, float64 where q is."""
    return measure(call, _LSE).rows["lse"]


@torch.no_grad()
def partial_attention(
    call: AttentionCall, lse: Tensor, keys: Tensor | None = None, *, log_factor: LogFactor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mass [B, Hq, R], sum [B, Hq, R, Dv]) over `keys`: sum of A_ij f_ij and of A_ij f_ij v_j, ln f being `log_factor`.

    `lse` [B, Hq, Nq] of the call's rows. `keys`: indices into k (None: all). `rows`: indices into q (None: all). Where lse is NaN, so is
    the result. Needs `call.v`.
    """
    if call.v is None:
        raise refusal(CaptureError, repr(call), "it has no values, so there is no output to compute", "capture v as well")
    batch, heads, count, _ = call.q.shape
    kv_heads, device = call.k.shape[1], call.q.device
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    rows = torch.arange(count, device=device) if rows is None else rows.to(device)
    columns = torch.arange(call.k.shape[2], device=device) if keys is None else keys.to(device)
    k = (call.k if keys is None else call.k[:, :, columns]).to(dtype).transpose(-1, -2)
    v = (call.v if keys is None else call.v[:, :, columns]).to(dtype)
    if call.mask.key_valid is not None:  # what padding holds must not reach a sum, NaN least of all
        v = v.masked_fill(~call.mask.key_valid[:, None, columns, None], 0.0)
    mass = torch.zeros(batch, heads, len(rows), dtype=dtype, device=device)
    total = torch.zeros(batch, heads, len(rows), call.v.shape[-1], dtype=dtype, device=device)
    if not len(columns) or not len(rows):
        return mass, total
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[None, :, None, None]
    lse = lse.to(dtype)
    at = 0
    for part in rows.split(max(ENTRIES // (batch * heads * len(columns)), 1)):
        q = call.q[:, :, part].to(dtype).reshape(batch, kv_heads, call.group * len(part), -1)
        products = (q @ k).view(batch, heads, len(part), -1)
        scores = _scores(call, products, b, h, part[None, None, :, None], columns[None, None, None, :])
        exponent = scores - lse[:, :, part, None]
        if log_factor is not None:
            more = log_factor(scores, part, columns).to(dtype)
            exponent = torch.where(scores == -math.inf, scores, exponent + more)  # a hidden key stays hidden, whatever is added
        weights = torch.exp(exponent)
        where = slice(at, at + len(part))
        mass[:, :, where] = weights.sum(-1)
        total[:, :, where] = (weights.view(batch, kv_heads, -1, len(columns)) @ v).view(batch, heads, len(part), -1)
        at += len(part)
    return mass, total


@torch.no_grad()
def exact_attention(call: AttentionCall, block: int = 256) -> Tensor:
    """[B, Nq, Hq, Dv] in q's dtype: all of a call's output by exact attention in blocks of rows; 0 on rows that see no key."""
    from headscope.kernels.gather import attention_rows

    step = max(min(block, ENTRIES * 2 // (call.q.shape[0] * call.q.shape[1] * call.k.shape[2])), 1)
    rows = torch.arange(call.q.shape[2], device=call.q.device)
    pieces = [attention_rows(call, part).to(call.q.dtype) for part in rows.split(step)]
    return torch.cat(pieces, 2).nan_to_num(nan=0.0).transpose(1, 2).contiguous()


def naive_partial(call: AttentionCall, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The dense twin of `partial_attention` without factors, all rows, in float64 on the CPU."""
    assert call.v is not None
    a = naive_weights(call)
    columns = torch.arange(call.k.shape[2]) if keys is None else keys.cpu()
    v = call.v.cpu().double().nan_to_num().repeat_interleave(call.group, 1)
    return a[..., columns].sum(-1), a[..., columns] @ v[:, :, columns]


__all__ = ["LogFactor", "exact_attention", "head_index", "naive_partial", "partial_attention", "row_lse", "select_heads"]
