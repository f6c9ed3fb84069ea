"""How many query rows a mean is over: the denominators of sink importance and FAI, in O(N), the same for every backend.

A row counts when it is a real token, is among the request's `rows`, and sees at least one key in some head. A row that sees nothing has no
weights to average; counting it would pull every mean towards zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest


def eligible_rows(call: AttentionCall, request: StatisticsRequest) -> Tensor | None:
    """[B, Nq] bool, real tokens among the request's rows; None when that is every row. Rows past the end of `rows` do not count."""
    valid = call.mask.query_valid
    if request.rows is None:
        return valid
    chosen = (
        at_positions(request.rows.to(call.q.device), call.query_offset, call.q.shape[2], 0).bool().expand(call.q.shape[0], call.q.shape[2])
    )
    return chosen if valid is None else chosen & valid


def at_positions(values: Tensor, offset: int, count: int, missing: int) -> Tensor:
    """values [N] or [B, N] by absolute position, as [1 or B, count] for positions offset .. offset + count; `missing` outside of N."""
    table = values.reshape(-1, values.shape[-1])
    out = torch.full((table.shape[0], count), missing, dtype=torch.int64, device=values.device)
    begin, end = max(offset, 0), min(offset + count, table.shape[1])
    if begin < end:
        out[:, begin - offset : end - offset] = table[:, begin:end]
    return out


def row_counts(call: AttentionCall, request: StatisticsRequest, counting: Tensor) -> dict[str, Tensor]:
    """ "row_count" and "fai_count" [B, Nk] int64, as far as the request needs them, from counting [B, Nq] bool."""
    keys = call.k.shape[2]
    rows = call.q.shape[2]
    before = torch.nn.functional.pad(counting.long().cumsum(-1), (1, 0))  # before[:, i]: counting rows with index < i
    first = torch.arange(keys, device=counting.device) + (call.key_offset - call.query_offset)  # row index at which t = s

    def since(index: Tensor) -> Tensor:
        return before[:, -1:] - before[:, index.clamp(0, rows)]

    out: dict[str, Tensor] = {}
    if request.needs("column_sum", "sink_importance"):
        out["row_count"] = since(first if call.mask.causal else torch.zeros_like(first))
    if request.needs("fai"):
        low, high = request.fai_band
        band = since(first + low)
        out["fai_count"] = band if high is None else band - since(first + high + 1)
    if call.mask.key_valid is not None:
        out = {name: count.masked_fill(~call.mask.key_valid, 0) for name, count in out.items()}
    return out
