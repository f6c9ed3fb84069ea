"""LayerStore: the keys that one layer of a freeing cache keeps, and attention over them.

What a key head keeps is what any query head of its group may still see: all keys, a ring, a ring and the far keys that rules name for good
(strided tiles, columns), or (budgets) chosen keys and a tail. A streaming head inside a dense head's group frees nothing, and neither does
a pattern that may come back to any key (tiles at powers of two, tiles by list, keys chosen per step).

Attention over a store is exact attention under the plan: the decode kernels read the parts as they lie; elsewhere, and for chunks of a
prefill, each part is handed on as one or two ordinary calls whose results are joined by their log-sum-exps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import PlanError, refusal
from headscope.kernels.sparse_decode_host import KeyLists, Places
from headscope.plans.cache_far import Far, can_free
from headscope.plans.cache_parts import Full, Kept, Part, Ring
from headscope.plans.choices import Choice, lists_of
from headscope.plans.compensation import Sums, uncompensated, with_dropped
from headscope.plans.dynamic import Budget
from headscope.plans.execute_heads import Heads
from headscope.plans.indices import Chosen
from headscope.plans.patterns import Dense, Pattern, Span, Streaming

if TYPE_CHECKING:
    from torch import Tensor


def part_of(patterns: Sequence[Pattern], window: int | None) -> Part:
    """An empty part for a key head whose group has these patterns, in a layer whose own attention has this window."""
    if window is None and not all(isinstance(one, Streaming | Span) for one in patterns):
        return Far((), patterns=tuple(patterns)) if can_free(patterns) else Full(())
    static = [one if isinstance(one, Streaming | Span) else Streaming(0, 1 << 30) for one in patterns]
    sink = max(int(getattr(one, "sink", 0)) for one in static)
    windows = tuple(dict.fromkeys(static))
    if window is not None:
        return Ring((), sink=sink, windows=windows, limit=window)
    return Ring((), sink=sink, windows=windows, sums=tuple(Sums(one) for one in windows if one.compensate))


@dataclass(eq=False)
class LayerStore:
    """`patterns`: one per query head of the layer; `window`: of the layer itself. `length`: tokens seen, also those dropped since."""

    patterns: tuple[Pattern, ...]
    kv_heads: int
    window: int | None
    length: int = 0
    starts: Tensor | None = None
    parts: list[Part] = field(default_factory=list)
    _places: tuple[tuple[int, ...], Places] | None = None
    _lists: KeyLists | None = None
    _rules: tuple[tuple[object, ...], Heads, tuple[Tensor, Tensor] | None] | None = None

    def __post_init__(self) -> None:
        same: dict[tuple[object, ...], Part] = {}
        for g in range(self.kv_heads):
            one = part_of(self.patterns[g * self.group : (g + 1) * self.group], self.window)
            key = (one.sink, one.windows) if isinstance(one, Ring) else (one.patterns,) if isinstance(one, Far) else ()
            same.setdefault(key, one).heads += (g,)
        self.parts = list(same.values())

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return len(self.patterns) // self.kv_heads

    @property
    def device(self) -> torch.device:
        """Where the keys are."""
        return next((part.k.device for part in self.parts if part.k is not None), torch.device("cpu"))

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(part.bytes for part in self.parts)

    def append(self, k: Tensor, v: Tensor, starts: Tensor | None) -> None:
        """k [B, Hkv, n, D], v [B, Hkv, n, Dv] of the next n positions."""
        self.append_lasting(k, v, starts)
        self.append_passing(k, v)

    def append_lasting(self, k: Tensor, v: Tensor, starts: Tensor | None) -> None:
        """The same for the parts that drop nothing; the rings follow when the rows of a chunk have seen what they are about to drop."""
        self.starts = None if starts is None else starts.to(k.device)
        if starts is not None and not self.length:
            self._keep_all_of_padded()
        for part in self.parts:
            if not isinstance(part, Ring | Far):
                part.append(k[:, list(part.heads)], v[:, list(part.heads)], self.length, self.starts)
        self.length += k.shape[2]

    def append_passing(self, k: Tensor, v: Tensor) -> None:
        """The same keys for the rings, after `append_lasting`."""
        for part in self.parts:
            if isinstance(part, Ring | Far):
                part.append(k[:, list(part.heads)], v[:, list(part.heads)], self.length - k.shape[2], self.starts)

    def _keep_all_of_padded(self) -> None:
        """Texts that begin at different places have their tiles and columns at different places, so all keys stay."""
        heads = sorted(g for part in self.parts if isinstance(part, Far | Full) for g in part.heads)
        others = [part for part in self.parts if not isinstance(part, Far | Full)]
        self.parts = [Full(tuple(heads)), *others] if heads else others

    def select(self, index: Tensor) -> None:
        """Keep (or repeat) sequences by number."""
        for part in self.parts:
            part.select(index)
        self.starts = None if self.starts is None else self.starts[index.to(self.starts.device)]
        self._places, self._lists = None, None

    # ---- budgets ------------------------------------------------------------------------------------------------

    def compress(self, choice: Choice) -> None:
        """Drop what the budgets of `choice` leave out, where no other head of the group needs it."""
        full = next((part for part in self.parts if isinstance(part, Full)), None)
        if full is None:
            return
        for g in full.heads:
            heads = range(g * self.group, (g + 1) * self.group)
            made = self._kept(full, g, [self.patterns[head] for head in heads], list(heads), choice)
            if made is not None:
                self.parts.append(made)
        gone = {g for part in self.parts if isinstance(part, Kept) for g in part.heads}
        left = tuple(g for g in full.heads if g not in gone)
        if gone and not left:
            self.parts.remove(full)
        elif gone and full.k is not None and full.v is not None:
            index = [full.heads.index(g) for g in left]
            full.heads, full.k, full.v = left, full.k[:, index], full.v[:, index]
        self._places, self._lists = None, None

    def _kept(self, full: Full, g: int, patterns: list[Pattern], heads: list[int], choice: Choice) -> Kept | None:
        """The part of a group of budgets and streaming heads; None where another pattern needs every key."""
        if not any(isinstance(one, Budget) for one in patterns) or not all(isinstance(one, Budget | Streaming) for one in patterns):
            return None
        if any(getattr(one, "compensate", False) for one in patterns):
            return None
        first = 0 if self.starts is None else int(self.starts.max())
        windows = [one.window for one in patterns if isinstance(one, Streaming)]
        since = min(self.length - max(windows, default=0), *(int(choice.row(h)[1].min()) for h in heads if h in choice.heads))
        sinks = max((one.sink for one in patterns if isinstance(one, Streaming)), default=0)
        if since < first + sinks:
            return None  # a text this short keeps all: its first keys are still in the windows
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for head, one in zip(heads, patterns, strict=True):
            if isinstance(one, Budget):
                seen[head] = choice.row(head)
            elif isinstance(one, Streaming) and one.sink:
                begin = torch.zeros(choice.since.shape[0], 1, dtype=torch.int64, device=choice.since.device)
                begin = begin if self.starts is None else self.starts[:, None].long()
                seen[head] = begin + torch.arange(one.sink, device=begin.device), torch.full_like(begin[:, 0], since)
        batch = choice.since.shape[0]
        lists = lists_of({head % self.group: one for head, one in seen.items()}, batch, 1, self.group, self.length, 0)
        most = int(lists.counts.max())
        place = torch.arange(most, device=lists.entries.device)
        chosen = lists.entries[:, 0, :most].long().masked_fill(place >= lists.counts, -1)
        # a budget may choose keys behind `since`, which another head of the group made earlier than its own: they lie in the tail
        made = Kept.of(full, g, chosen, lists.bits[:, 0, :most].masked_fill(place >= lists.counts, 0), since, self.length)
        # keys before a text's start are never seen, so the earliest of the sequences' positions is right for all
        made.tails = {head: int(choice.row(head)[1].min()) for head in heads if head in choice.heads}
        return made

    # ---- reading ------------------------------------------------------------------------------------------------

    def places(self) -> Places:
        """Where every key head's keys lie, for the decode kernels; as offsets from the first part's memory."""
        held = [(part, part.k, part.v) for part in self.parts if part.k is not None and part.v is not None]
        where = tuple(x.data_ptr() for _, k, v in held for x in (k, v))
        if self._places is not None and self._places[0] == where:
            return self._places[1]
        _, k0, v0 = held[0]
        batch, size = k0.shape[0], k0.element_size()
        bases = torch.zeros(2, batch, self.kv_heads, dtype=torch.int64)
        table = torch.zeros(self.kv_heads, 3, dtype=torch.int32)
        for part, k, v in held:
            rule = torch.tensor(part.place_rule(), dtype=torch.int32)
            for at, g in enumerate(part.heads):
                table[g] = rule
                for side, (x, first) in enumerate(((k, k0), (v, v0))):
                    bases[side, :, g] = (x.data_ptr() - first.data_ptr()) // size + torch.arange(batch) * x.stride(0) + at * x.stride(1)
        bases_on = bases.to(k0.device)
        aligned = bool((bases % 16 == 0).all())
        found = Places(
            k0, v0, bases_on[0], bases_on[1], (k0.shape[3], 1), (v0.shape[3], 1), table.to(k0.device),
            any(isinstance(part, Ring | Far) for part in self.parts), aligned, tuple(x for _, k, v in held for x in (k, v)),
        )  # fmt: skip
        self._places = (where, found)
        return found

    def lists(self) -> KeyLists | None:
        """Places and bits of the keys that heads see beside their ranges, in parts that drop some; None where there are none."""
        far = [(part.heads, *part.listed()) for part in self.parts if isinstance(part, Far) and part.k is not None]
        if far:
            return _listed(self._places_of_kept() + far, self.kv_heads, next(part.k.shape[0] for part in self.parts if part.k is not None))
        if self._lists is None:
            kept = self._places_of_kept()
            self._lists = _listed(kept, self.kv_heads, kept[0][2].shape[0]) if kept else None
        return self._lists

    def _places_of_kept(self) -> list[tuple[tuple[int, ...], Tensor, Tensor]]:
        kept = [part for part in self.parts if isinstance(part, Kept) and part.count]
        return [(part.heads, torch.arange(part.count, dtype=torch.int32, device=part.bits.device), part.bits) for part in kept]

    def rules(self, fixed: Heads) -> tuple[Heads, tuple[Tensor, Tensor] | None]:
        """(the static patterns whose ranges the heads read here, ([1, Hq, 1] bool which heads keep every key from a position on, [1, Hq, 3]
        int32 their rules)): first keys of a head whose key head drops some are in its list.
        """
        key = (fixed, tuple(id(part) for part in self.parts))
        if self._rules is None or self._rules[0] != key:
            own = list(fixed)
            for part in self.parts:
                for g in part.heads if isinstance(part, Kept | Far) else ():
                    heads = range(g * self.group, (g + 1) * self.group)
                    for head, ranged in zip(heads, part.rules() if isinstance(part, Far) else [fixed[head] for head in heads], strict=True):
                        own[head] = Streaming(0, ranged.window) if isinstance(ranged, Streaming) else ranged
            tails, rows = self.tails, None
            if tails:
                mask, rule = torch.zeros(1, len(own), 1, dtype=torch.bool), torch.zeros(1, len(own), 3, dtype=torch.int32)
                for head, since in tails.items():
                    mask[0, head], rule[0, head, 2] = True, since
                rows = (mask.to(self.device), rule.to(self.device))
            self._rules = (key, fixed if own == list(fixed) else Heads(own), rows)
        return self._rules[1], self._rules[2]

    def full_calls(self, call: AttentionCall) -> list[tuple[list[int], AttentionCall]]:
        """For rules that choose among all keys: (query heads, call over all their keys) of the part that keeps every key."""
        out = []
        for part in self.parts:
            if isinstance(part, Full) and part.k is not None and part.v is not None:
                heads = [g * self.group + i for g in part.heads for i in range(self.group)]
                k, v = part.k[:, :, : self.length], part.v[:, :, : self.length]
                mask = MaskFacts(causal=True, window=call.mask.window)
                out.append((heads, replace(call, q=call.q[:, heads], k=k, v=v, mask=mask, key_offset=0, first_token=self.starts)))
        return out

    @property
    def tails(self) -> dict[int, int]:
        """Query heads with a compressed budget, and the position from which each keeps every key."""
        return {head: since for part in self.parts if isinstance(part, Kept) for head, since in part.tails.items()}

    def compressed(self, head: int) -> bool:
        """Whether a query head's key head was compressed."""
        return any(isinstance(part, Kept) and part.heads == (head // self.group,) for part in self.parts)


def _listed(parts: list[tuple[tuple[int, ...], Tensor, Tensor]], kv_heads: int, batch: int) -> KeyLists:
    """KeyLists of (key heads, places [n], bits [B, n] or [n]) of each part."""
    room, device = max(len(places) for _, places, _ in parts), parts[0][1].device
    entries = torch.zeros(batch, kv_heads, room, dtype=torch.int32, device=device)
    bits = torch.zeros_like(entries)
    counts = [0] * kv_heads
    for heads, places, seen in parts:
        for g in heads:
            entries[:, g, : len(places)], bits[:, g, : len(places)] = places, seen
            counts[g] = len(places)
    return KeyLists(entries, bits, torch.tensor(counts, dtype=torch.int32).to(device).expand(batch, -1).contiguous())


SubCall = tuple[list[int], AttentionCall, list[Pattern]]
"""Query heads, their call of one sequence, and a pattern for each."""


def subcalls(store: LayerStore, call: AttentionCall, b: int, patterns: Sequence[Pattern]) -> list[SubCall]:
    """One sequence's rows as ordinary calls over the store's parts; positions count from the start of its text.

    `call` holds the new keys only; the lasting parts of the store have them as well, its rings only where the call has one row.
    `patterns`: what each query head is to see now.
    """
    assert call.v is not None
    start = 0 if store.starts is None else int(store.starts[b])
    rows, skip = call.q.shape[2], max(0, start - call.query_offset)
    if skip >= rows:
        return []
    length, offset = store.length - start, call.query_offset + skip - start
    out: list[SubCall] = []

    def add(heads: list[int], k: Tensor, v: Tensor, at: int, own: list[Pattern], allowed: Tensor | None = None) -> None:
        mask = MaskFacts(causal=allowed is None, window=call.mask.window if allowed is None else None, allowed=allowed)
        one = replace(
            call,
            q=call.q[b : b + 1, heads, skip:],
            k=k,
            v=v,
            mask=mask,
            query_offset=offset,
            key_offset=at,
            first_token=None,
            sink_logits=None,
        )
        out.append((heads, one, own))

    for part in store.parts:
        if part.k is None or part.v is None:
            raise refusal(PlanError, "an empty cache", "no key was ever stored in it", "run a prompt first")
        k, v = part.k[b : b + 1], part.v[b : b + 1]
        heads = [g * store.group + i for g in part.heads for i in range(store.group)]
        mine = [patterns[head].fixed(length) for head in heads]
        if isinstance(part, Full):
            add(heads, k[:, :, start : store.length], v[:, :, start : store.length], 0, mine)
        elif isinstance(part, Ring):
            old = length if rows == 1 else length - rows + skip
            if rows > 1 and part.sums:
                raise refusal(
                    PlanError,
                    f"{rows} tokens after {old}",
                    "heads that compensate for dropped keys have only the sum of those before the last of these tokens",
                    "give the whole prompt at once, or use the model's own cache",
                )
            mine = [uncompensated(one) for one in mine]  # what was dropped is put back by `with_sums`
            low = min(old, max(part.sink, old - part.size))
            at = part.places(torch.arange(low, old, device=k.device))
            near = [k[:, :, at], v[:, :, at]]
            reach = 0 if all(one.fixed(1) == one.fixed(1 << 20) for one in part.windows) else part.window(length)
            if rows > 1 and max(part.sink, old + 1 - reach) < low:
                raise refusal(
                    PlanError,
                    f"{rows} tokens after {old}",
                    f"windows that grow with the text look back {reach} keys from the first of them, and only {old - low} are left",
                    "give the whole prompt at once, or use the model's own cache",
                )
            if rows > 1:
                near = [torch.cat([x, new[b : b + 1, list(part.heads), skip:]], 2) for x, new in zip(near, (call.k, call.v), strict=True)]
            first = min(part.sink, old)
            if length > low:
                add(heads, near[0], near[1], low, mine)
            if first:
                add(heads, k[:, :, :first], v[:, :, :first], 0, mine)
        elif isinstance(part, Far):
            old = length if rows == 1 else length - rows
            where, places = part.before(old)
            near = [x[:, :, places] for x in (k, v)]
            if rows > 1:
                where = torch.cat([where, torch.arange(old, length, device=where.device)])
                near = [torch.cat([x, new[b : b + 1, list(part.heads)]], 2) for x, new in zip(near, (call.k, call.v), strict=True)]
            at, seen_at = torch.arange(length - rows, length), where.cpu()
            each = [one.visible(at, seen_at) & (seen_at[None] <= at[:, None]) for one in mine[: store.group]]
            visible = torch.stack(each * len(part.heads))[None].to(k.device)
            add(heads, near[0], near[1], 0, [Dense()] * len(heads), visible)
        elif isinstance(part, Kept):
            tail = slice(part.count, part.count + store.length - part.since)
            rest: list[Pattern] = [
                one if isinstance(one, Streaming) else Chosen((), part.tails[head] - start) for head, one in zip(heads, mine, strict=True)
            ]
            add(heads, k[:, :, tail], v[:, :, tail], part.since - start, rest)
            bits = part.bits[b]
            seen = torch.stack([(bits >> i) & 1 for i in range(store.group)]).bool()[None, :, None, :].expand(1, -1, rows - skip, -1)
            if part.count:
                add(heads, k[:, :, : part.count], v[:, :, : part.count], 0, [Dense()] * len(heads), seen)
    return out


def with_sums(store: LayerStore, call: AttentionCall, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """A decode step's output and lse with what the compensating rings dropped."""
    for part in store.parts:
        for sums in part.sums if isinstance(part, Ring) else ():
            heads = [
                head for g in part.heads for head in range(g * store.group, (g + 1) * store.group) if store.patterns[head] == sums.pattern
            ]
            places = [part.heads.index(head // store.group) for head in heads]
            output, lse = with_dropped(call, heads, output, lse, sums, places)
    return output, lse


def joined(outputs: Sequence[tuple[Tensor, Tensor]], sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over several sets of keys as one: outputs [1, n, h, Dv] with their lse [1, h, n], and sink logits [h]."""
    lse = torch.stack([one[1] for one in outputs])
    total = torch.logsumexp(lse, 0)
    if sink_logits is not None:
        total = torch.logaddexp(total, sink_logits.to(total)[None, :, None])
    out = torch.zeros_like(outputs[0][0], dtype=total.dtype)
    for z, own in outputs:
        weight = torch.exp(own - total.masked_fill(total == -math.inf, 0.0)).transpose(1, 2)[..., None]
        out += weight * z.to(total.dtype)
    return out.to(outputs[0][0].dtype), total
