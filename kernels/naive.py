"""The dense twin: every statistic from the whole matrix A in float64, by its formula and nothing else.

It exists to be compared with, so it shares no code with the blocked and the Triton kernels and takes no shortcut they take: masks are
written as one comparison per fact, heads and statistics are loops, sums are sums. Memory is O(N^2) per head; keep N small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.statistics.partial import PartialStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest

HIDING_BIAS = -1e30
"""A bias at or below this hides its key: hosts write "not visible" as -inf or as the lowest number of their dtype."""


def naive_scores(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(scores [B, Hq, Nq, Nk] float64 with -inf where hidden, visible [B, Hq, Nq, Nk] bool)."""
    batch, heads, rows, _ = call.q.shape
    keys = call.k.shape[2]
    mask = call.mask
    t = (torch.arange(rows) + call.query_offset)[:, None]
    s = (torch.arange(keys) + call.key_offset)[None, :]
    scores = torch.zeros(batch, heads, rows, keys, dtype=torch.float64)
    visible = torch.ones(batch, heads, rows, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            score = call.q[b, h].cpu().double() @ call.k[b, h // call.group].cpu().double().T * call.scale
            if call.softcap is not None:
                score = call.softcap * torch.tanh(score / call.softcap)
            seen = torch.ones(rows, keys, dtype=torch.bool)
            if mask.causal:
                seen = seen & (s <= t)
            if mask.window is not None:
                seen = seen & ((t - s if mask.causal else (t - s).abs()) < mask.window)
            if mask.key_valid is not None:
                seen = seen & mask.key_valid[b].cpu()[None, :]
            if mask.query_segments is not None and mask.key_segments is not None:
                seen = seen & (mask.query_segments[b].cpu()[:, None] == mask.key_segments[b].cpu()[None, :])
            if mask.allowed is not None:
                seen = seen & mask.allowed[b if mask.allowed.shape[0] > 1 else 0, h if mask.allowed.shape[1] > 1 else 0].cpu()
            if mask.bias is not None:
                bias = mask.bias[b if mask.bias.shape[0] > 1 else 0, h if mask.bias.shape[1] > 1 else 0].cpu().double()
                seen = seen & (bias > HIDING_BIAS)
                score = score + bias
            scores[b, h] = torch.where(seen, score, torch.tensor(float("-inf"), dtype=torch.float64))
            visible[b, h] = seen
    return scores, visible


def _log_normaliser(call: AttentionCall, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(m, ln Z), each [B, Hq, Nq, 1], with Z the normaliser in units of exp(m) and m the row's largest score (0 where there is none)."""
    m = scores.amax(-1, keepdim=True)
    m = torch.where(m == float("-inf"), torch.zeros_like(m), m)
    total = torch.exp(scores - m).sum(-1, keepdim=True)
    if call.sink_logits is not None:
        total = total + torch.exp(call.sink_logits.cpu().double()[None, :, None, None] - m)
    return m, total.log()


def naive_lse(call: AttentionCall) -> Tensor:
    """ln(sum exp(score) + exp(sink logit)) of every row, [B, Hq, Nq] float64; -inf (or the sink) on rows that see no key."""
    m, log_z = _log_normaliser(call, naive_scores(call)[0])
    return (m + log_z).squeeze(-1)


def naive_weights(call: AttentionCall) -> Tensor:
    """A [B, Hq, Nq, Nk] float64, the matrix that weighs the values; rows that see no key are zero."""
    scores, visible = naive_scores(call)
    m, log_z = _log_normaliser(call, scores)
    return torch.where(visible, torch.exp(scores - m - log_z), torch.zeros((), dtype=torch.float64))


def naive_measure(call: AttentionCall, request: StatisticsRequest) -> PartialStatistics:
    """What `measure` gives, dense and in float64 (argmax and counts int64), on the CPU."""
    a = naive_weights(call)
    lse = naive_lse(call)
    scores, visible = naive_scores(call)
    batch, heads, rows, keys = a.shape
    out = PartialStatistics(call.query_offset, call.key_offset)
    t = torch.arange(rows) + call.query_offset
    s = torch.arange(keys) + call.key_offset
    difference = t[:, None] - s[None, :]
    distance = difference.abs().double()
    real = torch.ones(batch, rows, dtype=torch.bool) if call.mask.query_valid is None else call.mask.query_valid.cpu().bool()
    defined = visible.any(-1) & real[:, None, :]

    def row(name: str, value: Tensor) -> None:
        if name in request.names:
            keep = defined if value.dim() == 3 else defined[..., None]
            out.rows[name] = torch.where(keep, value, torch.tensor(float("nan"), dtype=torch.float64))

    row("lse", lse)
    m, log_z = _log_normaliser(call, scores)
    row("entropy", -torch.where(a > 0, a * (scores - m - log_z), torch.zeros((), dtype=torch.float64)).sum(-1))
    row("row_max", a.amax(-1) if keys else torch.zeros(batch, heads, rows, dtype=torch.float64))
    if "argmax" in request.names:
        best = scores.argmax(-1) + call.key_offset
        out.rows["argmax"] = torch.where(defined, best, torch.tensor(-1))
    row("distance", (a * distance).sum(-1))
    row("distance_sq", (a * distance**2).sum(-1))
    row("waad", (a * distance.clamp(max=request.waad_window)).sum(-1))
    row("local_mass", (a * (distance < request.local_window)).sum(-1))
    if "sink_mass" in request.names:
        first = torch.zeros(batch, dtype=torch.int64) if call.first_token is None else call.first_token.cpu()
        inside = (s[None, :] >= first[:, None]) & (s[None, :] < first[:, None] + request.sink_tokens)
        row("sink_mass", (a * inside[:, None, None, :]).sum(-1))
    if "sink_logit_mass" in request.names:
        none = torch.zeros_like(lse)
        row("sink_logit_mass", none if call.sink_logits is None else torch.exp(call.sink_logits.cpu().double()[None, :, None] - lse))
    if "class_mass" in request.names and request.labels is not None:
        labels = _at(request.labels, s, batch)
        masses = [(a * (labels == c)[:, None, None, :]).sum(-1) for c in range(request.classes)]
        row("class_mass", torch.stack(masses, -1))

    counting = real & visible.any(-1).any(1)
    if request.rows is not None:
        counting = counting & (_at(request.rows, t, batch) == 1)
    _naive_columns(call, request, out, a, counting)
    if "diagonal_sum" in request.names:
        counted = a * counting[:, None, :, None]
        low = 0 if call.mask.causal else int(t[0] - s[-1])
        distances = range(low, max(int(t[-1] - s[0]), low) + 1)
        out.diagonals = torch.stack([(counted * (difference == d)).sum((-1, -2)) for d in distances], -1)
        out.diagonal_start = low
    if "pairs" in request.names:
        a = torch.where(defined[..., None], a, torch.tensor(float("nan"), dtype=torch.float64))
        for name, (queries, columns) in request.pairs.items():
            queries, columns = (x.cpu().expand(batch, x.shape[-1]) for x in (queries, columns))
            values = torch.full((batch, heads, queries.shape[-1]), float("nan"), dtype=torch.float64)
            for b in range(batch):
                for p in range(queries.shape[-1]):
                    i, j = int(queries[b, p]) - call.query_offset, int(columns[b, p]) - call.key_offset
                    if int(queries[b, p]) >= 0 and int(columns[b, p]) >= 0 and 0 <= i < rows and 0 <= j < keys:
                        values[b, :, p] = a[b, :, i, j]
            out.pairs[name] = values
    return out


def _naive_columns(call: AttentionCall, request: StatisticsRequest, out: PartialStatistics, a: Tensor, counting: Tensor) -> None:
    """Column sums, FAI, their counts, and the maps, over the rows that count."""
    batch, heads, rows, keys = a.shape
    t = torch.arange(rows) + call.query_offset
    s = torch.arange(keys) + call.key_offset
    counted = a * counting[:, None, :, None]
    real_key = torch.ones(batch, keys, dtype=torch.bool) if call.mask.key_valid is None else call.mask.key_valid.cpu().bool()
    if {"column_sum", "sink_importance"} & set(request.names):
        out.columns["column_sum"] = counted.sum(-2)
        later = counting[:, :, None] & (t[:, None] >= s[None, :] if call.mask.causal else torch.ones(rows, keys, dtype=torch.bool))
        out.counts["row_count"] = later.sum(1) * real_key
    if "fai" in request.names:
        low, high = request.fai_band
        band = t[:, None] >= s[None, :] + low
        if high is not None:
            band = band & (t[:, None] <= s[None, :] + high)
        out.columns["fai_sum"] = (counted * band).sum(-2)
        out.counts["fai_count"] = (counting[:, :, None] & band).sum(1) * real_key
    t_block, s_block = t // request.block, s // request.block
    for name in ("block_mass", "block_max"):
        if name in request.names:
            cells = torch.zeros(batch, heads, int(t_block[-1] - t_block[0]) + 1, int(s_block[-1] - s_block[0]) + 1, dtype=torch.float64)
            for i in range(cells.shape[2]):
                for j in range(cells.shape[3]):
                    cell = counted[:, :, t_block == t_block[0] + i][..., s_block == s_block[0] + j]
                    cells[:, :, i, j] = cell.sum((-1, -2)) if name == "block_mass" else cell.amax((-1, -2))
            out.maps[name] = cells
    if "segment_mass" in request.names and request.segments is not None:
        of_row, of_key = _at(request.segments, t, batch), _at(request.segments, s, batch)
        count = request.segment_count
        cells = torch.zeros(batch, heads, count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(count):
                both = (of_row == i)[:, :, None] & (of_key == j)[:, None, :]
                cells[:, :, i, j] = (counted * both[:, None]).sum((-1, -2))
        out.maps["segment_mass"] = cells


def _at(values: Tensor, positions: Tensor, batch: int) -> Tensor:
    """values [N] or [B, N] at absolute positions as [B, len(positions)] int64; -1 beyond N."""
    table = values.cpu().long().expand(batch, values.shape[-1])
    inside = (positions >= 0) & (positions < table.shape[-1])
    picked = table[:, positions.clamp(0, max(table.shape[-1] - 1, 0))]
    return torch.where(inside[None, :], picked, torch.tensor(-1))
