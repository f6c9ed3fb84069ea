"""The naive twin of every sparse kernel: dense attention in float64 under the mask that the patterns describe.

It builds the N x N matrix, one head at a time, and knows nothing of tiles, lists or caches; that is what makes it a reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from headscope.kernels.gather import window_scores

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans import Pattern


@torch.no_grad()
def naive_sparse_attention(call: AttentionCall, patterns: Sequence[Pattern]) -> tuple[Tensor, Tensor]:
    """(output [B, Nq, Hq, Dv] float64, lse [B, Hq, Nq] float64) under static patterns, one per query head.

    Positions of a pattern count from each sequence's first real token. Rows that see no key (padding) give 0 and -inf. Raises PlanError for
    a pattern that depends on the input.
    """
    batch, heads, rows, _ = call.q.shape
    values = call.v
    assert values is not None
    if call.mask.key_valid is not None:
        values = values.masked_fill(~call.mask.key_valid[:, None, :, None], 0.0)
    first = torch.zeros(batch, dtype=torch.int64) if call.first_token is None else call.first_token.cpu()
    i, j = torch.arange(rows), torch.arange(call.k.shape[2])
    out = torch.zeros(batch, rows, heads, values.shape[-1], dtype=torch.float64, device=call.q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float64, device=call.q.device)
    for head, pattern in enumerate(patterns):
        scores = window_scores(call, head, i.to(call.q.device), j.to(call.q.device))
        for b in range(batch):
            at, to = i + call.query_offset - first[b], j + call.key_offset - first[b]
            fixed = pattern.fixed(rows + call.query_offset - int(first[b]))
            seen = fixed.visible(at, to).to(scores.device)
            scores[b] = scores[b].masked_fill(~seen, -math.inf)
            if getattr(fixed, "compensate", False):
                _compensate(call, head, b, at.to(scores.device), to.to(scores.device), seen, out, lse, scores[b])
                continue
            total = torch.logsumexp(scores[b], -1)
            if call.sink_logits is not None:
                total = torch.logaddexp(total, call.sink_logits[head].double())
            weights = torch.exp(scores[b] - total[:, None]).nan_to_num(nan=0.0)
            out[b, :, head] = weights @ values[b, head // call.group].double()
            lse[b, head] = total.masked_fill((at < 0).to(total.device), -math.inf)
    return out, lse


def _compensate(
    call: AttentionCall, head: int, b: int, at: Tensor, to: Tensor, seen: Tensor, out: Tensor, lse: Tensor, scores: Tensor
) -> None:
    """Rows of one head with the dropped keys of each row as one key, their mean, that counts as many times as there are of them."""
    assert call.v is not None
    k, v = call.k[b, head // call.group].double(), call.v[b, head // call.group].double()
    causal = (to[None, :] <= at[:, None]) & (to >= 0)[None, :]
    lse[b, head] = -math.inf
    for row in (at >= 0).nonzero().flatten().tolist():
        dropped = causal[row] & ~seen[row]
        terms, values = scores[row], v
        if bool(dropped.any()):
            mean = float(call.q[b, head, row].double() @ k[dropped].mean(0)) * call.scale
            mean = call.softcap * math.tanh(mean / call.softcap) if call.softcap is not None else mean
            extra = torch.tensor([mean + math.log(int(dropped.sum()))], dtype=torch.float64, device=k.device)
            terms, values = torch.cat([terms, extra]), torch.cat([v, v[dropped].mean(0)[None]])
        total = torch.logsumexp(terms, -1)
        if call.sink_logits is not None:
            total = torch.logaddexp(total, call.sink_logits[head].double())
        out[b, row, head] = torch.exp(terms - total).nan_to_num(nan=0.0) @ values.nan_to_num(nan=0.0)
        lse[b, head, row] = total
