"""Patterns over the streams of joint attention: what an image token's row of attention is replaced with where text stands beside it.

In self-attention "the row becomes the identity" has one meaning. In joint attention (SD3, Flux) image tokens also attend to text, and then
it may mean that the whole row is the identity, or that only its image part is. The silent failure this avoids is the one taken for the
other: the first cuts image tokens off from the prompt, the second leaves nearly all of the row's weight on it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.patterns import identity, mean_query
from headscope.kernels.gather import attention_rows
from headscope.kernels.partial import exact_attention, row_lse, select_heads

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def own_and_text(call: AttentionCall, heads: list[int], image: Tensor) -> Tensor:
    """[B, len(heads), Nq, Dv]: attention over a query's own key and all keys that are no image tokens, normalised over these.

    `image`: bool [1 or B, Nk]. Sums over the text keys alone, O(N |text| d) and no mask of N x N. Meant for rows of image tokens.
    InterventionError in causal, windowed or cross-attention, which no joint stream has.
    """
    own = identity(call, heads)
    if call.mask.causal or call.mask.window is not None:
        raise refusal(
            InterventionError,
            f"joint='diagonal' in {call.module}",
            "its attention is causal or windowed, so it is no joint attention of image and text",
            "pass joint='replace'",
        )
    columns = (~image).any(0).nonzero().flatten()
    if not len(columns):
        return own
    sub = select_heads(call, heads)
    rows, mask = sub.q.shape[2], sub.mask
    dtype = torch.float64 if sub.q.dtype == torch.float64 else torch.float32
    start = call.query_offset - call.key_offset
    at = torch.arange(rows, device=sub.q.device)
    kv = [head // call.group for head in heads]
    score = (sub.q.to(dtype) * call.k[:, kv, start : start + rows].to(dtype)).sum(-1) * sub.scale
    if sub.softcap is not None:
        score = sub.softcap * torch.tanh(score / sub.softcap)
    if mask.bias is not None:
        score = score + mask.bias[:, :, at, at + start].to(dtype)
    if mask.allowed is not None:
        score = score.masked_fill(~mask.allowed[:, :, at, at + start], -math.inf)
    text = replace(
        sub,
        k=sub.k[:, :, columns],
        v=None if sub.v is None else sub.v[:, :, columns],
        mask=replace(
            mask,
            query_valid=None,
            key_valid=None if mask.key_valid is None else mask.key_valid[:, columns],
            key_segments=None if mask.key_segments is None else mask.key_segments[:, columns],
            allowed=None if mask.allowed is None else mask.allowed[..., columns],
            bias=None if mask.bias is None else mask.bias[..., columns],
        ),
        facts={name: fact for name, fact in sub.facts.items() if name != "lse"},  # that one is over all keys
    )
    lse = row_lse(text).to(dtype)
    lse = lse.masked_fill(lse.isnan(), -math.inf)
    share = torch.sigmoid(score - lse).nan_to_num(nan=0.0)[..., None]
    return share * own.to(dtype) + (1.0 - share) * exact_attention(text).transpose(1, 2).to(dtype)


def attention_with(call: AttentionCall, heads: list[int], q: Tensor) -> Tensor:
    """[B, len(heads), Nq, Dv]: exact attention of heads with other queries [B, len(heads), 1 or Nq, D].

    One query for all rows costs one row of attention where all rows see the same keys.
    """
    sub = select_heads(call, heads)
    mask, rows = sub.mask, sub.q.shape[2]
    shared = q.shape[2] == 1
    alike = not mask.causal and mask.window is None and mask.query_segments is None and mask.allowed is None and mask.bias is None
    sub = replace(sub, q=q.expand(-1, -1, rows, -1).to(sub.q.dtype), mask=replace(mask, query_valid=None))
    if shared and alike:
        return attention_rows(sub, torch.zeros(1, dtype=torch.int64, device=q.device)).nan_to_num(nan=0.0).expand(-1, -1, rows, -1)
    return exact_attention(sub).transpose(1, 2)


def mean_query_of(call: AttentionCall, heads: list[int], among: Tensor | None) -> Tensor:
    """[B, len(heads), 1, D]: the mean of the queries of real tokens, of those in `among` (bool [1 or B, Nq]) if given."""
    if among is None:
        return mean_query(call, heads)
    valid = among.expand(call.q.shape[0], -1)
    valid = valid if call.mask.query_valid is None else valid & call.mask.query_valid
    return mean_query(replace(call, mask=replace(call.mask, query_valid=valid)), heads)


__all__ = ["attention_with", "mean_query_of", "own_and_text"]
