"""Choosing keys on the device: what `indices` gives head by head, for all heads of a call at once and without waiting for the device.

The rules are those of `indices.budget` and `indices.top_keys`, in tensors: no length is read back, no list is built on the host. `KeyLists`
for the decode kernels come from the chosen positions of a whole group, since its heads read their keys together.

A choice is kept in absolute positions, so that it stays right while the text grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
    """Keys chosen for the query heads `heads`: `columns` [B, h, C] int32 absolute positions, -1 where a head has fewer; and every key from
    `since` [B, h] int64 on.
    """

    heads: tuple[int, ...]
    columns: Tensor
    since: Tensor

    @classmethod
    def of(cls, chosen: Sequence[Sequence[Chosen]], heads: Sequence[int], starts: Sequence[int], device: torch.device) -> Choice:
        """From [B][h] `Chosen` patterns, which count from the start of each text."""
        room = max(1, *(len(one.columns) for row in chosen for one in row))
        columns = torch.full((len(chosen), len(heads), room), -1, dtype=torch.int32)
        since = torch.zeros(len(chosen), len(heads), dtype=torch.int64)
        for b, row in enumerate(chosen):
            for h, one in enumerate(row):
                inside = [at + starts[b] for at in one.columns if at < one.since]
                columns[b, h, : len(inside)] = torch.tensor(inside, dtype=torch.int32)
                since[b, h] = one.since + starts[b]
        return cls(tuple(heads), columns.to(device), since.to(device))

    @classmethod
    def of_rows(cls, rows: dict[int, tuple[Tensor, Tensor]]) -> Choice:
        """From what `row` gives, head by head."""
        room = max(columns.shape[1] for columns, _ in rows.values())
        columns = [_widened(one, room) for one, _ in rows.values()]
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
        ranked, order = values.topk(most, dim=-1, sorted=len(set(keeps)) > 1)
    count = _on(tuple(keeps), values.device)[None, :, None]
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
        found[at], sinces[at] = torch.where(chosen < 0, -1, chosen + call.key_offset).int(), since[:, 0]
    return _together(heads, found, sinces)


def _last_weights(call: AttentionCall, count: int, heads: list[int], starts: Tensor) -> Tensor:
    """[B, h, Nk]: sums of A over the last rows that are no padding."""
    t = torch.arange(count, device=call.q.device)[:, None] + (call.query_offset + call.q.shape[2] - count)
    weights = torch.softmax(_scores(call, count, heads), -1).nan_to_num(nan=0.0)
    return weights.masked_fill((t < starts)[:, None], 0.0).sum(2)


def choose_top_keys(call: AttentionCall, heads: Sequence[int], patterns: Sequence[TopKeys], stand_ins: StandIns | None = None) -> Choice:
    """For a decode row: per head the keys of largest weight, the first ones among them, and the last ones (see `indices.top_keys`).

    `stand_ins`: what stands for the blocks of this cache, kept from step to step; None to work it out anew.
    """
    found: list[Tensor | None] = [None] * len(heads)
    sinces: list[Tensor | None] = [None] * len(heads)
    for kind in dict.fromkeys((one.block, one.estimate, one.grouped) for one in patterns):
        places = [at for at, one in enumerate(patterns) if (one.block, one.estimate, one.grouped) == kind]
        own, rules = [heads[at] for at in places], [patterns[at] for at in places]
        choose = _top_blocks if kind[0] > 1 else _top_single
        columns, since = choose(call, own, rules, StandIns() if stand_ins is None else stand_ins)
        for place, at in enumerate(places):
            found[at], sinces[at] = columns[:, place], since[:, place]
    return _together(heads, found, sinces)


def _top_single(call: AttentionCall, heads: list[int], patterns: list[TopKeys], stand_ins: StandIns) -> tuple[Tensor, Tensor]:
    """(columns [B, h, C], since [B, h]) of rules that choose single keys."""
    end, starts = call.query_offset + call.q.shape[2], _starts(call)
    s = torch.arange(call.k.shape[2], device=call.q.device) + call.key_offset
    sink, window = (_numbers(call, [getattr(one, name) for one in patterns]) for name in ("sink", "window"))
    since = starts.maximum(end - window[:, None]).clamp(min=0).expand(call.q.shape[0], -1, -1)
    grouped = patterns[0].grouped
    if call.q.device.type == "cpu":
        scores = _scores(call, 1, list(range(call.q.shape[1])) if grouped else heads)[:, :, 0]
    else:
        from headscope.kernels.sparse_decode_choose import key_scores

        scores = key_scores(call.q[:, :, -1], call.k, call.scale)
        scores = scores if grouped or len(heads) == scores.shape[1] else scores[:, heads]
        if call.mask.key_valid is not None:
            scores = scores.masked_fill(~call.mask.key_valid[:, None], -math.inf)
        if call.mask.window is not None:
            scores = scores.masked_fill(s < end - call.mask.window, -math.inf)
        if grouped and call.softcap is not None:  # in weights the cap counts; in the order of one head's scores it does not
            scores = call.softcap * torch.tanh(scores / call.softcap)
    if grouped:
        weights = torch.softmax(scores.masked_fill(s < starts, -math.inf), -1).unflatten(1, (-1, call.group)).mean(2)
        scores = weights[:, [head // call.group for head in heads]]
    scores = scores.masked_fill(s < starts + sink[:, None], math.inf).masked_fill((s >= since) | (s < starts), -math.inf)
    chosen = _largest(scores, [one.keep for one in patterns])
    return torch.where(chosen < 0, -1, chosen + call.key_offset).int(), since[..., 0]


def _top_blocks(call: AttentionCall, heads: list[int], patterns: list[TopKeys], stand_ins: StandIns) -> tuple[Tensor, Tensor]:
    """The same for rules that choose blocks, all of one size and estimate; blocks count from the start of each text."""
    size, estimate = patterns[0].block, patterns[0].estimate
    end, starts = call.query_offset + call.q.shape[2], _starts(call)[:, 0]
    window = _numbers(call, [one.window for one in patterns])
    count = ((end - starts - window).clamp(min=0) // size).expand(call.q.shape[0], -1)  # [B, h] whole blocks before the window
    most = max(1, max(0, end - min(one.window for one in patterns)) // size)
    stands = stand_ins.of(call, size, estimate, most)
    scores = _stand_scores(call, stands, estimate == "bounds")
    if patterns[0].grouped:
        hidden = torch.arange(scores.shape[-1], device=scores.device) >= count[..., None]
        members = scores.unflatten(1, (-1, call.group))[:, [head // call.group for head in heads]]
        scores = torch.softmax(members.masked_fill(hidden[:, :, None], -math.inf), -1).mean(2)
    else:
        scores = scores[:, heads]
    number = torch.arange(scores.shape[-1], device=scores.device)
    first = _numbers(call, [-(-one.sink // size) for one in patterns])
    scores = scores.masked_fill(number < first[:, None], math.inf).masked_fill(number >= count[..., None], -math.inf)
    chosen = _largest(scores, [max(1, one.keep // size) for one in patterns])
    keys = chosen[..., None] * size + torch.arange(size, device=chosen.device) + starts[:, :, None, None]
    return torch.where(chosen[..., None] < 0, -1, keys).int().flatten(2), starts + count * size


def _stand_scores(call: AttentionCall, stands: Tensor, bounds: bool) -> Tensor:
    """[B, Hq, n] scores of the last row with what stands for blocks, scaled."""
    if call.q.device.type != "cpu":
        from headscope.kernels.sparse_decode_select import stand_scores

        return stand_scores(call.q[:, :, -1].to(stands.dtype), stands, stands.shape[2], call.scale, bounds)
    q = call.q[:, :, -1].double()
    q = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1) if bounds else q
    return (q.unflatten(1, (-1, call.group)) @ stands.double().transpose(-1, -2)).flatten(1, 2) * call.scale


def _numbers(call: AttentionCall, values: list[int]) -> Tensor:
    return _on(tuple(values), call.q.device)


@lru_cache(maxsize=256)
def _on(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


@dataclass(eq=False)
class StandIns:
    """What stands for blocks of keys, kept while a text grows: [B, Hkv, n, 2 D] largest and smallest coordinates, or [B, Hkv, n, D] means.

    Only whole blocks are ever looked at, and those do not change, so each is worked out once.
    """

    kept: dict[tuple[int, str], tuple[Tensor, int]] = field(default_factory=dict)

    def of(self, call: AttentionCall, size: int, estimate: str, count: int) -> Tensor:
        """Those of the first `count` blocks of each text. Texts that begin at different places are worked out anew each time."""
        keys = call.k.shape[2]
        if call.first_token is not None or call.key_offset:
            where = torch.arange(count * size, device=call.k.device) + (_starts(call)[:, 0] - call.key_offset)
            index = where.clamp(0, keys - 1)[:, None, :, None].expand(call.k.shape[0], call.k.shape[1], -1, call.k.shape[3])
            return _stand_ins(call.k.gather(2, index), size, estimate)
        held, done = self.kept.get((size, estimate), (None, 0))
        if count * size > keys:  # a text shorter than one block: nothing to choose from
            return _stand_ins(torch.nn.functional.pad(call.k, (0, 0, 0, count * size - keys)), size, estimate)
        if held is None or held.shape[2] < count or held.shape[0] != call.k.shape[0]:
            wide = call.k.shape[3] * (2 if estimate == "bounds" else 1)
            more = call.k.new_empty(*call.k.shape[:2], count + max(8, count // 64), wide)
            if held is not None and held.shape[0] == call.k.shape[0]:
                more[:, :, :done] = held[:, :, :done]
            else:
                done = 0
            held = more
        if done < count:
            held[:, :, done:count] = _stand_ins(call.k[:, :, done * size : count * size], size, estimate)
        self.kept[size, estimate] = held, max(done, count)
        return held[:, :, :count]


def _stand_ins(k: Tensor, size: int, estimate: str) -> Tensor:
    blocks = k.unflatten(2, (-1, size))
    if estimate == "mean":
        return blocks.mean(3)
    return torch.cat([blocks.amax(3), blocks.amin(3)], -1)


def _together(heads: Sequence[int], found: list[Tensor | None], sinces: list[Tensor | None]) -> Choice:
    columns = [one for one in found if one is not None]
    room = max(one.shape[-1] for one in columns)
    return Choice(
        tuple(heads), torch.stack([_widened(one, room) for one in columns], 1), torch.stack([one for one in sinces if one is not None], 1)
    )


def _widened(columns: Tensor, room: int) -> Tensor:
    """[B, C] with -1 up to `room`; as it is where it fills the room, for a copy a head would be most of a choice's time."""
    return columns if columns.shape[-1] == room else torch.nn.functional.pad(columns, (0, room - columns.shape[-1]), value=-1)


def lists_of(
    choices: dict[int, tuple[Tensor, Tensor]], batch: int, kv_heads: int, group: int, keys: int, origin: int, block: int = 1
) -> KeyLists:
    """KeyLists of chosen positions: head -> (columns [B, C] absolute, -1 for none; since [B]), in places of a cache whose place 0 holds
    position `origin` and that has `keys` of them. Keys from `since` on are left to the rules. No host synchronisation.

    With `block` > 1 the columns of every head are whole blocks, one after the other, and so are the lists' entries.
    """
    device = next(iter(choices.values()))[0].device
    heads = kv_heads * group
    most = max(columns.shape[1] for columns, _ in choices.values())
    nobody = torch.full((batch, most), -1, dtype=torch.int32, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    rows = [choices.get(head, nobody) for head in range(heads)]
    columns = torch.stack([_widened(one, most) for one, _ in rows], 1)
    since = torch.stack([one for _, one in rows], 1)
    if block > 1:
        columns = torch.div(columns[..., ::block], block, rounding_mode="floor")
        since, keys = since // block, -(-keys // block)
    per = [sum(columns.shape[2] for head in choices if head // group == g) for g in range(kv_heads)]
    room = max(1, min(max(per), keys))
    if device.type != "cpu":
        from headscope.kernels.sparse_decode_choose import lists_from

        return lists_from(columns, since, kv_heads, keys, origin, room, block)
    at = torch.where((columns < origin) | (columns >= since[..., None]), keys, columns - origin).long()
    member = torch.zeros(batch, heads, keys + 1, dtype=torch.int32, device=device).scatter_(2, at, 1)[..., :keys]
    shift = torch.arange(group, dtype=torch.int32, device=device)
    bits = (member.unflatten(1, (kv_heads, group)) << shift[:, None]).sum(2, dtype=torch.int32)
    present = bits != 0
    place = torch.where(present, present.cumsum(-1) - 1, room).clamp(max=room)
    entries = torch.zeros(batch, kv_heads, room + 1, dtype=torch.int32, device=device)
    numbers = torch.arange(keys, dtype=torch.int32, device=device).expand(batch, kv_heads, keys)
    entries.scatter_(2, place, numbers)
    kept = torch.zeros_like(entries).scatter_(2, place, bits)
    return KeyLists(entries[..., :room].contiguous(), kept[..., :room].contiguous(), present.sum(-1, dtype=torch.int32), block)
