"""Patterns that a head's attention can be mixed with: pattern @ v for each of them, in O(N d) or by one exact attention.

    identity       the value at the query's own position
    uniform        the mean of the values that the query may see
    argmax         the value of the key with the largest weight
    query_mean     attention of the mean query (SEG with infinite blur), for attention that sees everything

All are per query head and read the key head that it shares; grouped queries need nothing of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headscope.errors import InterventionError, refusal
from headscope.kernels.dispatch import measure
from headscope.kernels.gather import attention_rows
from headscope.kernels.partial import head_index, select_heads
from headscope.kernels.visible_mean import visible_mean
from headscope.statistics.request import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def _kv_index(call: AttentionCall, heads: list[int]) -> Tensor:
    """The key head of each query head, as an index."""
    return head_index(tuple(head // call.group for head in heads), call.q.device)


def identity(call: AttentionCall, heads: list[int]) -> Tensor:
    """[B, len(heads), Nq, Dv]: v at the query's own position. InterventionError where queries have no place among the keys."""
    assert call.v is not None
    rows, shift = call.q.shape[2], call.query_offset - call.key_offset
    if call.is_cross or shift < 0 or shift + rows > call.k.shape[2]:
        raise refusal(
            InterventionError,
            f"the identity pattern in {call.module}",
            "its queries are not among its keys (cross-attention)",
            "mix with uniform or argmax instead",
        )
    return call.v[:, _kv_index(call, heads), shift : shift + rows]


def uniform(call: AttentionCall, heads: list[int]) -> Tensor:
    """[B, len(heads), Nq, Dv]: the mean of v over the keys that each query may see; 0 on rows that see none."""
    by_head = call.mask.allowed is not None or call.mask.bias is not None
    if by_head:
        return visible_mean(select_heads(call, heads))
    kv = [head // call.group for head in heads]
    distinct = sorted(set(kv))
    assert call.v is not None
    index = head_index(tuple(distinct), call.q.device)
    # a mask without per-head parts gives all query heads of a key head the same mean
    whole = len(distinct) == call.k.shape[1]
    k, v = (call.k, call.v) if whole else (call.k[:, index], call.v[:, index])
    mean = visible_mean(replace(call, q=call.q[:, : len(distinct)], k=k, v=v, sink_logits=None))
    if v.dtype in (torch.float16, torch.bfloat16):
        mean = mean.to(v.dtype)  # as wide as what it is mixed with, before it is repeated over a group
    if len(heads) == call.q.shape[1] and heads == sorted(heads):
        return mean.repeat_interleave(call.group, 1)
    return mean if kv == distinct else mean[:, head_index(tuple(distinct.index(one) for one in kv), mean.device)]


def argmax(call: AttentionCall, heads: list[int]) -> Tensor:
    """[B, len(heads), Nq, Dv]: v of the key with the largest weight (the first of equal ones); 0 on rows that see no key."""
    assert call.v is not None
    sub = select_heads(call, heads)
    best = measure(sub, StatisticsRequest(names=("argmax",))).rows["argmax"] - call.key_offset
    values = call.v[:, _kv_index(call, heads)]
    index = best.clamp_min(0)[..., None].expand(*best.shape, values.shape[-1])
    return values.gather(2, index).masked_fill((best < 0)[..., None], 0.0)


def mean_query(call: AttentionCall, heads: list[int]) -> Tensor:
    """[B, len(heads), 1, D]: the mean of the queries that are real tokens. InterventionError for causal attention and for a part of a
    sequence: either would mix in queries that the row must not, or cannot, know."""
    if call.mask.causal or call.query_offset:
        raise refusal(
            InterventionError,
            f"the mean query in {call.module}",
            "in causal attention it would carry later tokens into earlier ones",
            "use it in bidirectional attention (diffusion models, encoders), or mix with uniform",
        )
    q = call.q[:, head_index(tuple(heads), call.q.device)]
    q = q.float() if call.q.dtype in (torch.float16, torch.bfloat16) else q
    valid = call.mask.query_valid
    if valid is None:
        return q.mean(2, keepdim=True).to(call.q.dtype)
    q = q.masked_fill(~valid[:, None, :, None], 0.0)
    return (q.sum(2, keepdim=True) / valid.sum(1).clamp_min(1)[:, None, None, None]).to(call.q.dtype)


def query_mean(call: AttentionCall, heads: list[int]) -> Tensor:
    """[B, len(heads), Nq, Dv]: attention of the mean query. One row of attention where all queries see the same keys."""
    mean = mean_query(call, heads)
    sub = select_heads(call, heads)
    mask = sub.mask
    plain = mask.window is None and mask.query_segments is None and mask.allowed is None and mask.bias is None
    rows = sub.q.shape[2]
    sub = replace(sub, q=mean.expand(-1, -1, rows, -1))
    out = attention_rows(sub, torch.arange(1 if plain else rows, device=mean.device)).nan_to_num(nan=0.0)
    return out.expand(-1, -1, rows, -1)


PATTERNS = {"identity": identity, "uniform": uniform, "argmax": argmax, "query_mean": query_mean}

__all__ = ["PATTERNS", "argmax", "identity", "mean_query", "query_mean", "uniform"]
