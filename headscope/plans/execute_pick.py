"""Pick: keys or blocks that a layer's heads chose on the device in one go, as the lists that the decode kernels read.

Choosing head by head, in tensors of positions, costs a dozen small kernels a step, more than the keys it saves. Where all choosing heads of
a layer use one rule (blocks of one size, one estimate) and the cache lies in order, two kernels do it for blocks: estimates from what
stands for them, and the lists of the largest (`kernels.sparse_decode_select`); single keys take some more (`kernels.sparse_decode_keys`).
Whoever needs the chosen keys of a single head, a layer with other
heads for instance, has them worked out from the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.kernels.sparse_decode_host import KeyLists
from headscope.plans.dynamic import TopKeys
from headscope.plans.execute_heads import Heads

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.choices import StandIns


LONGEST = 1 << 18
"""Keys of a text up to which single keys are chosen so: the part of them that a sample leaves open must fit in one program."""


@dataclass(frozen=True, eq=False)
class Pick:
    """`lists` of all key heads of a layer, chosen by the query heads `heads`; `own` [B, Hq, 3] int32: rules that say from where each keeps
    every key; `blocks`: the most that one head keeps. `whole`: the lists have the blocks behind the chosen ones too, and so say all that a
    step sees where every head of the layer reads them.
    """

    heads: tuple[int, ...]
    lists: KeyLists
    own: Tensor
    blocks: int
    whole: bool = False
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _ruled: list[tuple[Tensor, tuple[int, ...], Tensor]] = field(default_factory=list)

    def rules(self, given: Tensor, listed: tuple[int, ...]) -> Tensor:
        """[B, Hq, 3] int32: `given`, and for the heads `listed` that they see every key from `since` on."""
        if len(listed) == self.own.shape[1]:
            return self.own
        if not self._ruled or self._ruled[0][0] is not given or self._ruled[0][1] != listed:
            mask = _mask(listed, self.own.shape[1], self.own.device)
            self._ruled[:] = [(given, listed, torch.where(mask, self.own, given))]
        return self._ruled[0][2]

    def row(self, head: int) -> tuple[Tensor, Tensor]:
        """(columns [B, C] int32 absolute positions, -1 for none; since [B] int64) of one head."""
        if head not in self._rows:
            batch, kv_heads, room = self.lists.bits.shape
            group, size = self.own.shape[1] // kv_heads, self.lists.block
            entries, bits, counts = (x[:, head // group] for x in (self.lists.entries, self.lists.bits, self.lists.counts))
            there = torch.arange(room, device=bits.device) < counts[:, None]
            chosen_ones = entries * size < self.own[:, head, 2:]  # and not those of the window
            kept = there & chosen_ones & ((bits >> (head % group)) & 1).bool()
            place = torch.where(kept, kept.cumsum(-1) - 1, self.blocks).clamp(max=self.blocks)
            chosen = torch.full((batch, self.blocks + 1), -1, dtype=torch.int32, device=bits.device).scatter_(1, place, entries)
            chosen = chosen[:, : self.blocks, None]
            keys = chosen * size + torch.arange(size, dtype=torch.int32, device=bits.device)
            self._rows[head] = torch.where(chosen < 0, -1, keys).flatten(1), self.own[:, head, 2].long()
        return self._rows[head]

    def select(self, index: Tensor) -> Pick:
        """The picks of some sequences."""
        index = index.to(self.own.device)
        lists = KeyLists(self.lists.entries[index], self.lists.bits[index], self.lists.counts[index], self.lists.block)
        return Pick(self.heads, lists, self.own[index], self.blocks, self.whole)


def pickable(call: AttentionCall, patterns: Heads) -> bool:
    """Whether the kernels can choose for the heads of a call over a whole cache in order."""
    if not patterns.choosing or call.first_token is not None or call.key_offset or call.mask.key_valid is not None:
        return False
    if call.mask.window is not None or call.k.shape[2] < 2:
        return False
    rule = _rule(patterns, call.group)
    if rule is None:
        return False
    if rule[0].block == 1:
        return call.k.shape[2] <= LONGEST and not (rule[0].grouped and call.softcap is not None)
    from headscope.kernels.sparse_decode_select import can_select

    return can_select(max(1, call.k.shape[2] // rule[0].block), call.group)


@lru_cache(maxsize=256)
def _rule(patterns: Heads, group: int) -> tuple[TopKeys, int] | None:
    """(one of the rules, the smallest window) of the choosing heads where one launch serves them all, else None."""
    rules = [one for one in (patterns[head] for head in patterns.choosing) if isinstance(one, TopKeys)]
    if len({(one.block, one.estimate, one.grouped, one.refresh) for one in rules}) != 1:
        return None
    if rules[0].grouped:
        shared: dict[int, set[tuple[int, int, int]]] = {}
        for head, one in zip(patterns.choosing, rules, strict=True):
            shared.setdefault(head // group, set()).add((one.keep, one.sink, one.window))
        if any(len(found) > 1 for found in shared.values()):
            return None
    return rules[0], min(one.window for one in rules)


def pick(call: AttentionCall, patterns: Heads, stand_ins: StandIns) -> Pick:
    """The choice of a `pickable` call's newest row. Blocks count from position 0 of the text."""
    found = _rule(patterns, call.group)
    assert found is not None
    rule, window = found
    length, kv_heads, device = call.k.shape[2], call.k.shape[1], call.q.device
    q = call.q[:, :, -1]
    table, most = _table(patterns, device)
    lengths = _lengths(call.q.shape[0], length, device)
    whole = rule.refresh == 1  # at later steps there are newer keys
    widest = max(getattr(patterns[head], "window", 0) for head in patterns.choosing)
    if rule.block == 1:
        from headscope.kernels.sparse_decode_choose import key_scores, scores_and_sums
        from headscope.kernels.sparse_decode_keys import group_weights, select_keys

        if rule.grouped:
            scores = group_weights(*scores_and_sums(q, call.k, call.scale), kv_heads)
            rows = _group_table(patterns, call.group, device)
        else:
            scores, rows = key_scores(q, call.k, call.scale), table
        room = min(length, most * (1 if rule.grouped else call.group) + widest)
        lists, own = select_keys(scores, call.q.shape[1], kv_heads, table, rows, lengths, room, whole)
        return Pick(patterns.choosing, lists, own, min(most, length), whole)
    from headscope.kernels.sparse_decode_select import select_blocks, stand_scores

    count = max(1, max(0, length - window) // rule.block)
    stands = stand_ins.of(call, rule.block, rule.estimate, count)
    scores = stand_scores(q if q.dtype == stands.dtype else q.to(stands.dtype), stands, count, call.scale, rule.estimate == "bounds")
    lists, own = select_blocks(scores, kv_heads, table, lengths, rule.block, rule.grouped, widest if whole else 0)
    return Pick(patterns.choosing, lists, own, min(most, count), whole)


def spread(found: Pick, heads: Sequence[int], total: int) -> Pick:
    """A pick of some key heads' query heads, numbered `heads` in a layer of `total`, as one of the whole layer."""
    if len(heads) == total:
        return found
    lists, group = found.lists, len(heads) // found.lists.counts.shape[1]
    where = _index(tuple(heads[at] // group for at in range(0, len(heads), group)), found.own.device)
    parts = []
    for x in (lists.entries, lists.bits, lists.counts):
        parts.append(x.new_zeros(x.shape[0], total // group, *x.shape[2:]).index_copy_(1, where, x))
    own = found.own.new_zeros(found.own.shape[0], total, 3).index_copy_(1, _index(tuple(heads), found.own.device), found.own)
    return Pick(tuple(heads[at] for at in found.heads), KeyLists(parts[0], parts[1], parts[2], lists.block), own, found.blocks, found.whole)


@lru_cache(maxsize=256)
def _table(patterns: Heads, device: torch.device) -> tuple[Tensor, int]:
    """([Hq, 3] int32 blocks kept, first blocks, keys of the window; the most blocks)."""
    rows = [(0, 0, 0)] * len(patterns)
    for head in patterns.choosing:
        one = patterns[head]
        if isinstance(one, TopKeys):
            rows[head] = (max(1, one.keep // one.block), -(-one.sink // one.block), one.window)
    return torch.tensor(rows, dtype=torch.int32).to(device), max(row[0] for row in rows)


@lru_cache(maxsize=256)
def _group_table(patterns: Heads, group: int, device: torch.device) -> Tensor:
    """[Hkv, 3] int32: the row of each group's choosing heads, which is the same for all of them."""
    table = _table(patterns, torch.device("cpu"))[0].unflatten(0, (-1, group))
    return table.gather(1, table[..., :1].argmax(1, keepdim=True).expand(-1, 1, 3))[:, 0].contiguous().to(device)


@lru_cache(maxsize=64)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device)


@lru_cache(maxsize=64)
def _mask(heads: tuple[int, ...], total: int, device: torch.device) -> Tensor:
    """[1, Hq, 1] bool."""
    out = torch.zeros(1, total, 1, dtype=torch.bool)
    out[0, list(heads)] = True
    return out.to(device)


@lru_cache(maxsize=64)
def _lengths(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.full((batch,), length, dtype=torch.int32, device=device)
