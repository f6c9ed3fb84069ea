"""Decode steps on the device: from a plan's patterns, and the keys chosen for them, to one launch over whatever cache holds the keys.

What was chosen (budgets, top keys) stays in tensors, and its lists and rules are built once per choice, not once per step: a step under a
plan costs two kernels and no look at the device, unless its rule says that keys are chosen anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.call import MaskFacts
from headscope.kernels.sparse_decode_call import decode_refuses, launched, rules_and_lists, visits
from headscope.kernels.sparse_decode_host import NEVER, KeyLists, Places
from headscope.plans.cache_parts import Full, Kept, Ring
from headscope.plans.cache_store import with_sums
from headscope.plans.choices import Choice, StandIns, choose_top_keys, lists_of
from headscope.plans.compensation import Sums, compensates, uncompensated, with_dropped
from headscope.plans.dynamic import Budget, TopKeys
from headscope.plans.patterns import Dense, Pattern, Streaming

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.cache_store import LayerStore

Keys = dict[int, tuple["Tensor", "Tensor"]]
"""Query head -> (columns [B, C] absolute positions, -1 for none; since [B])."""


@dataclass(eq=False)
class Memory:
    """What a layer's heads chose, and the lists and rules made of it."""

    keys: Keys = field(default_factory=dict)
    stand_ins: StandIns = field(default_factory=StandIns)
    sums: dict[tuple[int, int], Sums] = field(default_factory=dict)
    made: tuple[list[object], KeyLists, Tensor] | None = None

    def take(self, choice: Choice) -> None:
        """A new choice for some heads."""
        for head in choice.heads:
            self.keys[head] = choice.row(head)

    def select(self, index: Tensor) -> None:
        """The sequences of these numbers."""
        self.keys = {head: (one[index.to(one.device)], since[index.to(since.device)]) for head, (one, since) in self.keys.items()}
        self.stand_ins.kept.clear()
        self.sums.clear()


def refuses(call: AttentionCall, patterns: Sequence[Pattern], stored: bool = False) -> str:
    """ "" when a step can run here, else why not: `decode_refuses`, with the keys of dynamic patterns taken as chosen. `stored`:
    the older keys are in a store.
    """
    if any(compensates(one) for one in patterns) and ((call.key_offset and not stored) or call.q.shape[2] > 1):
        return "compensation keys of a cache that lost its first keys"
    return decode_refuses(call, [Dense() if isinstance(one, Budget | TopKeys) else uncompensated(one) for one in patterns])


def choose_due(call: AttentionCall, patterns: Sequence[Pattern], memory: Memory, step: int, heads: Sequence[int] | None = None) -> None:
    """Let the heads whose turn it is choose among the call's keys. `heads`: numbers in the layer of the call's heads."""
    numbers = range(len(patterns)) if heads is None else heads
    turns: list[tuple[int, int, TopKeys]] = [
        (at, head, one)
        for at, (head, one) in enumerate(zip(numbers, patterns, strict=True))
        if isinstance(one, TopKeys) and one.source is None and (head not in memory.keys or (step - 1) % one.refresh == 0)
    ]
    if turns:
        found = choose_top_keys(call, [at for at, _, _ in turns], [one for _, _, one in turns], memory.stand_ins)
        memory.take(Choice(tuple(head for _, head, _ in turns), found.columns, found.since))


def call_step(call: AttentionCall, patterns: Sequence[Pattern], chosen: Keys, memory: Memory) -> Tensor:
    """[B, n, Hq, Dv] of a decode step over the call's own keys. `chosen`: what each head with a dynamic pattern sees, perhaps chosen by
    another layer; `memory`: where this layer's lists are kept.
    """
    assert call.v is not None
    listed = [head for head, one in enumerate(patterns) if _is_listed(one)]
    fixed = tuple(_fixed(one) for one in patterns)
    rules, lists = rules_and_lists(call, fixed)
    keys = visits(fixed, call.k.shape[2], call.group)
    if listed:
        own = {head: chosen[head] for head in listed}
        rules, lists, keys = _with_chosen(call, own, rules, lists, keys, memory, _common_block(call, patterns, listed))
    output, lse = launched(call, Places.of(call.k, call.v), rules, lists, keys)
    return _compensated(call, list(enumerate(patterns)), output, lse, call.k, call.v, call.first_token, memory)[0]


def store_step(call: AttentionCall, patterns: Sequence[Pattern], store: LayerStore, chosen: Keys, memory: Memory) -> Tensor:
    """The same over the parts of a freeing cache, which has the call's new keys already."""
    whole = replace(call, key_offset=0, mask=MaskFacts(causal=True, window=call.mask.window))
    tails = store.tails
    # the first keys of a streaming head in a compressed group are in that group's list
    fixed = tuple(
        Streaming(0, one.window) if isinstance(one, Streaming) and store.compressed(head) else _fixed(one)
        for head, one in enumerate(patterns)
    )
    rules, lists = rules_and_lists(whole, fixed)
    if tails:
        mask, rows = _tail_rules(tuple(sorted(tails.items())), len(patterns), call.q.device)
        rules, lists = torch.where(mask, rows, rules), _merged(store.lists(), lists)
    keys = _store_visits(store, fixed)
    listed = {head: chosen[head] for head, one in enumerate(patterns) if _is_listed(one) and head not in tails}
    if listed:
        rules, lists, keys = _with_chosen(whole, listed, rules, lists, keys, memory, _common_block(whole, patterns, list(listed)))
    output, lse = with_sums(store, call, *launched(whole, store.places(), rules, lists, keys))
    for heads, one in store.full_calls(call):
        assert one.v is not None
        mine = [(head, patterns[head]) for head in heads]
        output, lse = _compensated(call, mine, output, lse, one.k, one.v, store.starts, memory)
    return output


def _compensated(
    call: AttentionCall,
    patterns: list[tuple[int, Pattern]],
    output: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    memory: Memory,
) -> tuple[Tensor, Tensor]:
    """A step's output and lse with what the compensating heads dropped; `patterns`: (head, pattern) of the query heads of k and v."""
    groups: dict[Streaming, list[int]] = {}
    for at, (_, one) in enumerate(patterns):
        if isinstance(one, Streaming) and one.compensate:
            groups.setdefault(one, []).append(at)
    for one, places in groups.items():
        sums = memory.sums.setdefault((one.sink, one.window), Sums())
        sums.follow(k, v, call.query_offset - one.window + 1, starts, one.sink)
        heads = [patterns[at][0] for at in places]
        output, lse = with_dropped(call, heads, output, lse, sums, [at // call.group for at in places], one, starts)
    return output, lse


def _is_listed(pattern: Pattern) -> bool:
    return isinstance(pattern, Budget) or (isinstance(pattern, TopKeys) and not pattern.full)


def _fixed(pattern: Pattern) -> Pattern:
    """The static pattern in a dynamic one's place: none where a list says what is seen."""
    if isinstance(pattern, TopKeys) and pattern.full:
        return Dense()
    return Streaming(0, 1) if _is_listed(pattern) else uncompensated(pattern)


def _with_chosen(
    call: AttentionCall, listed: Keys, rules: Tensor, lists: KeyLists | None, keys: list[int], memory: Memory, block: int
) -> tuple[Tensor, KeyLists, list[int]]:
    """Rules, lists and visits with chosen keys; lists are built anew only when the keys are others than the last time."""
    given: list[object] = [lists, call.key_offset, tuple(listed), *(one for pair in listed.values() for one in pair)]
    before = memory.made
    if (
        before is None
        or len(before[0]) != len(given)
        or not all(a is b or (isinstance(a, int | tuple) and a == b) for a, b in zip(before[0], given, strict=True))
    ):
        length = call.query_offset + call.q.shape[2] - call.key_offset
        block = block if lists is None else 1  # blocks and single keys are not told apart in one list
        found = lists_of(listed, call.q.shape[0], len(keys), call.group, length, call.key_offset, block)
        since = (torch.stack([since for _, since in listed.values()], 1) - call.key_offset).clamp(max=NEVER)
        memory.made = (given, _merged(found, lists) or found, since.to(torch.int32))
    assert memory.made is not None
    _, made, since = memory.made
    rules = rules.repeat(since.shape[0] // rules.shape[0], 1, 1)
    index = _heads(tuple(listed), rules.device)
    rules.index_copy_(1, index, torch.stack([torch.zeros_like(since), torch.zeros_like(since), since], -1))
    extra = [
        max((columns.shape[1] for head, (columns, _) in listed.items() if head // call.group == g), default=0) for g in range(len(keys))
    ]
    return rules, made, [a + b for a, b in zip(keys, extra, strict=True)]


def _common_block(call: AttentionCall, patterns: Sequence[Pattern], listed: Sequence[int]) -> int:
    """Keys of a block where all listed heads chose blocks of one size that count from place 0, else 1."""
    sizes = {int(getattr(patterns[head], "block", 1)) for head in listed}
    return sizes.pop() if len(sizes) == 1 and call.first_token is None and call.key_offset == 0 else 1


@lru_cache(maxsize=256)
def _heads(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, dtype=torch.int64).to(device)


@lru_cache(maxsize=256)
def _tail_rules(tails: tuple[tuple[int, int], ...], heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """([1, Hq, 1] bool which heads keep everything from a position on, [1, Hq, 3] int32 their rules)."""
    mask = torch.zeros(1, heads, 1, dtype=torch.bool)
    rows = torch.zeros(1, heads, 3, dtype=torch.int32)
    for head, since in tails:
        mask[0, head] = True
        rows[0, head, 2] = since
    return mask.to(device), rows.to(device)


def _merged(one: KeyLists | None, other: KeyLists | None) -> KeyLists | None:
    """Two lists of different heads as one; unused room becomes entries that nobody sees."""
    if one is None or other is None:
        return one or other
    parts = []
    for lists in (one, other):
        at = torch.arange(lists.entries.shape[2], device=lists.entries.device)
        used = at < lists.counts[..., None]
        parts.append((lists.entries.masked_fill(~used, 0), lists.bits.masked_fill(~used, 0)))
    entries, bits = (torch.cat([a, b], 2) for a, b in zip(*parts, strict=True))
    return KeyLists(entries, bits, torch.full_like(one.counts, entries.shape[2]))


def _store_visits(store: LayerStore, fixed: Sequence[Pattern]) -> list[int]:
    keys = visits(fixed, store.length, store.group)
    for part in store.parts:
        for g in part.heads:
            if isinstance(part, Ring):
                keys[g] = min(store.length, part.sink + part.size)
            elif isinstance(part, Kept):
                keys[g] = part.count + store.length - part.since
            elif isinstance(part, Full):
                keys[g] = min(keys[g], store.length)
    return keys
