"""Choosing keys on the device: what `indices` gives head by head, for all heads of a call at once and without waiting for the device.

The rules are those of `indices.budget` and `indices.top_keys`, in tensors: no length is read back, no list is built on the host. `KeyLists`
for the decode kernels come from the chosen positions of a whole group, since its heads read their keys together.

A choice is kept in absolute positions, so that it stays right while the text grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.kernels.sparse_decode_host import KeyLists

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.dynamic import Budget, TopKeys
    from headscope.plans.indices import Chosen


@dataclass(frozen=True, eq=False)
class Choice:
    """Keys chosen for the query heads `heads`: `columns` [B, h, C] int64 absolute positions, -1 where a head has fewer; and every key from
    `since` [B, h] int64 on.
    """

    heads: tuple[int, ...]
    columns: Tensor
    since: Tensor

    @classmethod
    def of(cls, chosen: Sequence[Sequence[Chosen]], heads: Sequence[int], starts: Sequence[int], device: torch.device) -> Choice:
        """From [B][h] `Chosen` patterns, which count from the start of each text."""
        room = max(1, *(len(one.columns) for row in chosen for one in row))
        columns = torch.full((len(chosen), len(heads), room), -1, dtype=torch.int64)
        since = torch.zeros(len(chosen), len(heads), dtype=torch.int64)
        for b, row in enumerate(chosen):
            for h, one in enumerate(row):
                inside = [at + starts[b] for at in one.columns if at < one.since]
                columns[b, h, : len(inside)] = torch.tensor(inside, dtype=torch.int64)
                since[b, h] = one.since + starts[b]
        return cls(tuple(heads), columns.to(device), since.to(device))

    @classmethod
    def of_rows(cls, rows: dict[int, tuple[Tensor, Tensor]]) -> Choice:
        """From what `row` gives, head by head."""
        room = max(columns.shape[1] for columns, _ in rows.values())
        columns = [torch.nn.functional.pad(one, (0, room - one.shape[1]), value=-1) for one, _ in rows.values()]
        return cls(tuple(rows), torch.stack(columns, 1), torch.stack([since for _, since in rows.values()], 1))

    def row(self, head: int) -> tuple[Tensor, Tensor]:
        """(columns [B, C], since [B]) of one head."""
        at = self.heads.index(head)
        return self.columns[:, at], self.since[:, at]

    def select(self, index: Tensor) -> Choice:
        """The choices of some sequences."""
        return Choice(self.heads, self.columns[index.to(self.columns.device)], self.since[index.to(self.since.device)])


def _starts(call: AttentionCall) -> Tensor:
    """[B, 1, 1] int64 absolute."""
    if call.first_token is None:
        return torch.zeros(1, 1, 1, dtype=torch.int64, device=call.q.device)
    return call.first_token.to(call.q.device)[:, None, None]


def _scores(call: AttentionCall, rows: int, heads: list[int]) -> Tensor:
    """[B, h, rows, Nk] scores of the last rows, -inf where hidden; float64 on a CPU, float32 elsewhere."""
    wide = torch.float64 if call.q.device.type == "cpu" else torch.float32
    q = call.q[:, heads, call.q.shape[2] - rows :].to(wide)
    parts = [q[:, at] @ call.k[:, head // call.group].to(wide).transpose(-1, -2) for at, head in enumerate(heads)]
    scores = torch.stack(parts, 1) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    s = torch.arange(call.k.shape[2], device=q.device) + call.key_offset
    t = torch.arange(rows, device=q.device)[:, None] + (call.query_offset + call.q.shape[2] - rows)
    seen = (s <= t)[None] & (s >= _starts(call))
    if call.mask.window is not None:
        seen = seen & (t - s < call.mask.window)
    if call.mask.key_valid is not None:
        seen = seen & call.mask.key_valid[:, None, :]
    return scores.masked_fill(~seen[:, None], -math.inf)


def _largest(values: Tensor, keeps: list[int]) -> Tensor:
    """[B, h, C] places of each head's largest finite-or-forced values, the first of equals on a CPU; -1 behind them."""
    most = max(1, min(max(keeps), values.shape[-1]))
    if values.device.type == "cpu":
        ranked, order = values.sort(dim=-1, descending=True, stable=True)
        ranked, order = ranked[..., :most], order[..., :most]
    else:
        ranked, order = values.topk(most, dim=-1)
    count = torch.tensor(keeps, device=values.device)[None, :, None]
    return order.masked_fill((ranked == -math.inf) | (torch.arange(most, device=values.device) >= count), -1)


def choose_budgets(call: AttentionCall, heads: Sequence[int], patterns: Sequence[Budget]) -> Choice:
    """At the end of a prefill: per head the keys before the recent ones that the last rows weigh most (see `indices.budget`)."""
    found: list[Tensor | None] = [None] * len(heads)
    sinces: list[Tensor | None] = [None] * len(heads)
    rows, group = call.q.shape[2], call.group
    starts = _starts(call).expand(call.q.shape[0], 1, 1)
    end = call.query_offset + rows
    s = torch.arange(call.k.shape[2], device=call.q.device) + call.key_offset
    weights: dict[tuple[int, int], Tensor] = {}
    for at, (head, one) in enumerate(zip(heads, patterns, strict=True)):
        g, window = head // group, min(one.window, rows)
        if (g, window) not in weights:  # a group at a time: the last rows of all heads might not fit in memory
            weights = {(g, window): _last_weights(call, window, list(range(g * group, (g + 1) * group)), starts)}
        mass = weights[g, window]
        mass = mass.mean(1) if one.grouped else mass[:, head % group]
        since = starts[:, 0].maximum(torch.full_like(starts[:, 0], end - max(one.window, one.recent)))
        outside = (s >= since) | (s < starts[:, 0])
        mass = mass.masked_fill(outside, 0.0)
        if one.pool > 1:
            mass = torch.nn.functional.avg_pool1d(mass[:, None], one.pool, 1, one.pool // 2)[:, 0, : len(s)]
        mass = mass.masked_fill(s < starts[:, 0] + one.sink, math.inf).masked_fill(outside, -math.inf)
        chosen = _largest(mass[:, None], [one.keep])[:, 0]
        found[at], sinces[at] = torch.where(chosen < 0, -1, chosen + call.key_offset), since[:, 0]
    return _together(heads, found, sinces)


def _last_weights(call: AttentionCall, count: int, heads: list[int], starts: Tensor) -> Tensor:
    """[B, h, Nk]: sums of A over the last rows that are no padding."""
    t = torch.arange(count, device=call.q.device)[:, None] + (call.query_offset + call.q.shape[2] - count)
    weights = torch.softmax(_scores(call, count, heads), -1).nan_to_num(nan=0.0)
    return weights.masked_fill((t < starts)[:, None], 0.0).sum(2)


def choose_top_keys(call: AttentionCall, heads: Sequence[int], patterns: Sequence[TopKeys]) -> Choice:
    """For a decode row: per head the keys of largest weight, the first ones among them, and the last ones (see `indices.top_keys`)."""
    found: list[Tensor | None] = [None] * len(heads)
    sinces: list[Tensor | None] = [None] * len(heads)
    end = call.query_offset + call.q.shape[2]
    starts = _starts(call)
    s = torch.arange(call.k.shape[2], device=call.q.device) + call.key_offset
    for group in _by_group(call, heads):
        places = [at for at, head in enumerate(heads) if head in group]
        one = [patterns[at] for at in places]
        scores = _scores(call, 1, group)[:, :, 0]
        sink = torch.tensor([pattern.sink for pattern in one], device=s.device)[:, None]
        since = starts.clamp(min=0).maximum(end - torch.tensor([pattern.window for pattern in one], device=s.device)[:, None])
        scores = scores.masked_fill(s < starts + sink, math.inf).masked_fill((s >= since) | (s < starts), -math.inf)
        chosen = _largest(scores, [pattern.keep for pattern in one])
        chosen = torch.where(chosen < 0, -1, chosen + call.key_offset)
        for place, at in enumerate(places):
            found[at], sinces[at] = chosen[:, place], since[:, place, 0].expand(call.q.shape[0])
    return _together(heads, found, sinces)


def _by_group(call: AttentionCall, heads: Sequence[int]) -> list[list[int]]:
    """Heads by their key head: scores of a group fit in memory where those of all heads might not."""
    groups: dict[int, list[int]] = {}
    for head in heads:
        groups.setdefault(head // call.group, []).append(head)
    return list(groups.values())


def _together(heads: Sequence[int], found: list[Tensor | None], sinces: list[Tensor | None]) -> Choice:
    columns = [one for one in found if one is not None]
    room = max(one.shape[-1] for one in columns)
    padded = [torch.nn.functional.pad(one, (0, room - one.shape[-1]), value=-1) for one in columns]
    return Choice(tuple(heads), torch.stack(padded, 1), torch.stack([one for one in sinces if one is not None], 1))


def lists_of(choices: dict[int, tuple[Tensor, Tensor]], batch: int, kv_heads: int, group: int, keys: int, origin: int) -> KeyLists:
    """KeyLists of chosen positions: head -> (columns [B, C] absolute, -1 for none; since [B]), in places of a cache whose place 0 holds
    position `origin` and that has `keys` of them. Keys from `since` on are left to the rules. No host synchronisation.
    """
    device = next(iter(choices.values()))[0].device
    bits = torch.zeros(batch, kv_heads, keys + 1, dtype=torch.int32, device=device)
    room = 0
    for g in range(kv_heads):
        own = [head for head in choices if head // group == g]
        room = max(room, sum(choices[head][0].shape[1] for head in own))
        for head in own:
            columns, since = choices[head]
            at = torch.where((columns < origin) | (columns >= since[:, None]), keys, columns - origin)
            bits[:, g] = bits[:, g] | torch.zeros_like(bits[:, g]).scatter_(1, at, 1 << (head % group))
    bits = bits[..., :keys]
    room = max(1, min(room, keys))
    present = bits != 0
    place = torch.where(present, present.cumsum(-1) - 1, room).clamp(max=room)
    entries = torch.zeros(batch, kv_heads, room + 1, dtype=torch.int32, device=device)
    numbers = torch.arange(keys, dtype=torch.int32, device=device).expand(batch, kv_heads, keys)
    entries.scatter_(2, place, numbers)
    kept = torch.zeros_like(entries).scatter_(2, place, bits)
    return KeyLists(entries[..., :room].contiguous(), kept[..., :room].contiguous(), present.sum(-1, dtype=torch.int32))
