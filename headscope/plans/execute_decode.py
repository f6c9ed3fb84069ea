"""Decode steps on the device: from a plan's patterns, and the keys chosen for them, to one launch over whatever cache holds the keys.

What was chosen (budgets, top keys) stays in tensors, and its lists and rules are built once per choice, not once per step: a step under a
plan costs two kernels and no look at the device, unless its rule says that keys are chosen anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.call import MaskFacts
from headscope.kernels.sparse_decode_call import decode_refuses, launched, rules_and_lists, visits
from headscope.kernels.sparse_decode_host import NEVER, KeyLists, Places
from headscope.plans.cache_far import Far
from headscope.plans.cache_parts import Full, Kept, Ring
from headscope.plans.cache_store import with_sums
from headscope.plans.choices import Choice, StandIns, choose_top_keys, lists_of
from headscope.plans.compensation import Sums, with_dropped
from headscope.plans.dynamic import TopKeys
from headscope.plans.execute_heads import Heads
from headscope.plans.execute_pick import Pick, pick, pickable, spread
from headscope.plans.patterns import Dense, Pattern, Span, Streaming

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
    sums: dict[Pattern, Sums] = field(default_factory=dict)
    made: tuple[list[object], KeyLists, Tensor] | None = None
    pick: Pick | None = None

    def chose(self, head: int) -> bool:
        """Whether a head has a choice."""
        return head in self.keys or (self.pick is not None and head in self.pick.heads)

    def row(self, head: int) -> tuple[Tensor, Tensor]:
        """(columns, since) of one head."""
        if head not in self.keys and self.pick is not None:
            return self.pick.row(head)
        return self.keys[head]

    def take(self, choice: Choice) -> None:
        """A new choice for some heads."""
        if self.pick is not None and any(head in self.pick.heads for head in choice.heads):
            self.keys.update({head: self.pick.row(head) for head in self.pick.heads})
            self.pick = None
        for head in choice.heads:
            self.keys[head] = choice.row(head)

    def select(self, index: Tensor) -> None:
        """The sequences of these numbers."""
        self.keys = {head: (one[index.to(one.device)], since[index.to(since.device)]) for head, (one, since) in self.keys.items()}
        self.stand_ins.kept.clear()
        self.made = None
        self.pick = None if self.pick is None else self.pick.select(index)
        for sums in self.sums.values():
            sums.select(index)


def refuses(call: AttentionCall, patterns: Heads, stored: bool = False) -> str:
    """ "" when a step can run here, else why not: `decode_refuses`, with the keys of dynamic patterns taken as chosen. `stored`:
    the older keys are in a store.
    """
    if patterns.compensating and ((call.key_offset and not stored) or call.q.shape[2] > 1):
        return "compensation keys of a cache that lost its first keys"
    return decode_refuses(call, patterns.rules.distinct)


def choose_due(call: AttentionCall, patterns: Heads, memory: Memory, step: int, heads: Sequence[int] = (), total: int = 0) -> None:
    """Let the heads whose turn it is choose among the call's keys. `heads`: numbers in the layer, of `total`, of the call's heads; none
    where the call has them all.
    """
    numbers = heads or range(len(patterns))
    turns: list[tuple[int, int, TopKeys]] = []
    for at in patterns.choosing:
        one, head = patterns[at], numbers[at]
        if isinstance(one, TopKeys) and (not memory.chose(head) or (step - 1) % one.refresh == 0):
            turns.append((at, head, one))
    if turns and len(turns) == len(patterns.choosing) and pickable(call, patterns):
        memory.pick = spread(pick(call, patterns, memory.stand_ins), numbers, total or len(patterns))
        for _, head, _ in turns:
            memory.keys.pop(head, None)
    elif turns:
        found = choose_top_keys(call, [at for at, _, _ in turns], [one for _, _, one in turns], memory.stand_ins)
        memory.take(Choice(tuple(head for _, head, _ in turns), found.columns, found.since))


def picked(patterns: Heads, memory: Memory, other: Callable[[int], Memory]) -> Pick | None:
    """The pick that says what all listed heads of a layer see: the layer's own, or that of the layer whose keys they take over, head by
    head; None where they see different choices or something else lies in lists. `other`: a layer's memory.
    """
    if not patterns.listed or not patterns.only_ranges:
        return None
    sources = patterns.sources
    if sources is None:
        return None
    made = memory.pick if sources < 0 else other(sources).pick
    return made if made is not None and set(patterns.listed) <= set(made.heads) and _none_else(made, patterns) else None


def _none_else(made: Pick, patterns: Heads) -> bool:
    """Whether the heads that chose beside the listed ones see every key anyway; lists would let them see more than their patterns."""
    return all(isinstance(patterns.rules[head], Dense) for head in made.heads if head not in patterns.listed)


def call_step(call: AttentionCall, patterns: Heads, chosen: Keys, memory: Memory, made: Pick | None = None) -> Tensor:
    """[B, n, Hq, Dv] of a decode step over the call's own keys. `chosen`: what each head with a dynamic pattern sees, perhaps chosen by
    another layer; `made`: the same in lists; `memory`: where this layer's lists are kept.
    """
    assert call.v is not None
    rules, lists = rules_and_lists(call, patterns.rules, bool(patterns.listed))
    keys = visits(patterns.rules, call.k.shape[2], call.group)
    rules, lists, keys = _all_chosen(call, patterns, patterns.listed, chosen, made, rules, lists, keys, memory)
    output, lse = launched(call, Places.of(call.k, call.v), rules, lists, keys, _ranged(made, lists, patterns))
    if patterns.compensating:
        output, lse = _compensated(call, list(enumerate(patterns)), output, lse, call.k, call.v, call.first_token, memory)
    return output


def store_step(call: AttentionCall, patterns: Heads, store: LayerStore, chosen: Keys, memory: Memory, made: Pick | None = None) -> Tensor:
    """The same over the parts of a freeing cache, which has the call's new keys already."""
    whole = replace(call, key_offset=0, mask=MaskFacts(causal=True, window=call.mask.window))
    fixed, rows = store.rules(patterns.rules)
    own = store.lists()
    rules, lists = rules_and_lists(whole, fixed, own is not None or bool(patterns.listed))
    if rows is not None:
        rules = torch.where(rows[0], rows[1], rules)
    if own is not None:
        lists = _merged(own, lists)
    keys = _store_visits(store, fixed)
    tails = store.tails
    listed = tuple(head for head in patterns.listed if head not in tails) if tails else patterns.listed
    rules, lists, keys = _all_chosen(whole, patterns, listed, chosen, made, rules, lists, keys, memory)
    output, lse = with_sums(store, call, *launched(whole, store.places(), rules, lists, keys, _ranged(made, lists, patterns)))
    if patterns.compensating:
        for heads, one in store.full_calls(call):
            assert one.v is not None
            mine = [(head, patterns[head]) for head in heads]
            output, lse = _compensated(call, mine, output, lse, one.k, one.v, store.starts, memory)
    return output


def _ranged(made: Pick | None, lists: KeyLists | None, patterns: Heads) -> bool:
    """Whether some head reads a range of keys beside its list."""
    return made is None or not made.whole or lists is not made.lists or len(patterns.listed) < len(patterns)


def _all_chosen(
    call: AttentionCall,
    patterns: Heads,
    listed: tuple[int, ...],
    chosen: Keys,
    made: Pick | None,
    rules: Tensor,
    lists: KeyLists | None,
    keys: list[int],
    memory: Memory,
) -> tuple[Tensor, KeyLists | None, list[int]]:
    """Rules, lists and visits with what the heads `listed` chose."""
    if not listed:
        return rules, lists, keys
    if made is not None and lists is None:
        each = made.blocks * made.lists.block
        busy = {head // call.group for head in listed}
        return made.rules(rules, listed), made.lists, [count + (each if g in busy else 0) for g, count in enumerate(keys)]
    own = {head: chosen[head] if head in chosen or made is None else made.row(head) for head in listed}
    return _with_chosen(call, own, rules, lists, keys, memory, _common_block(call, patterns, listed))


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
    groups: dict[Streaming | Span, list[int]] = {}
    for at, (_, one) in enumerate(patterns):
        if isinstance(one, Streaming | Span) and one.compensate:
            groups.setdefault(one, []).append(at)
    for one, places in groups.items():
        sums = memory.sums.setdefault(one, Sums(one))
        sums.follow(k, v, call.query_offset + 1, starts)
        heads = [patterns[at][0] for at in places]
        output, lse = with_dropped(call, heads, output, lse, sums, [at // call.group for at in places])
    return output, lse


def _with_chosen(
    call: AttentionCall, listed: Keys, rules: Tensor, lists: KeyLists | None, keys: list[int], memory: Memory, block: int
) -> tuple[Tensor, KeyLists, list[int]]:
    """Rules, lists and visits with chosen keys; lists are built anew only when the keys are others than the last time."""
    given: list[object] = [rules, lists, call.key_offset, tuple(listed), *(one for pair in listed.values() for one in pair)]
    before = memory.made
    if (
        before is None
        or len(before[0]) != len(given)
        or not all(a is b or (isinstance(a, int | tuple) and a == b) for a, b in zip(before[0], given, strict=True))
    ):
        length = call.query_offset + call.q.shape[2] - call.key_offset
        block = block if lists is None else 1  # blocks and single keys are not told apart in one list
        found = lists_of(listed, call.q.shape[0], len(keys), call.group, length, call.key_offset, block)
        since = (torch.stack([since for _, since in listed.values()], 1) - call.key_offset).clamp(max=NEVER).to(torch.int32)
        ruled = rules.repeat(since.shape[0] // rules.shape[0], 1, 1)
        nothing = torch.zeros_like(since)
        ruled.index_copy_(1, _heads(tuple(listed), rules.device), torch.stack([nothing, nothing, since], -1))
        memory.made = (given, _merged(found, lists) or found, ruled)
    assert memory.made is not None
    extra = [
        max((columns.shape[1] for head, (columns, _) in listed.items() if head // call.group == g), default=0) for g in range(len(keys))
    ]
    return memory.made[2], memory.made[1], [a + b for a, b in zip(keys, extra, strict=True)]


def _common_block(call: AttentionCall, patterns: Sequence[Pattern], listed: Sequence[int]) -> int:
    """Keys of a block where all listed heads chose blocks of one size that count from place 0, else 1."""
    sizes = {int(getattr(patterns[head], "block", 1)) for head in listed}
    return sizes.pop() if len(sizes) == 1 and call.first_token is None and call.key_offset == 0 else 1


@lru_cache(maxsize=256)
def _heads(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, dtype=torch.int64).to(device)


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
            elif isinstance(part, Far):
                keys[g] = max(part.windows) + len(part.where)
            elif isinstance(part, Kept):
                keys[g] = part.count + store.length - part.since
            elif isinstance(part, Full):
                keys[g] = min(keys[g], store.length)
    return keys
