"""What the sparse prefill kernels are told: which tiles of keys each tile of rows visits, and what is masked inside them.

A tile is 128 rows by 128 keys, counted in positions of the text without padding, so that one list serves every sequence of a batch and
every chunk of a long prefill. Each head is told in one of two ways:

- sink and window (dense heads too: a window without end) are two ranges, and the kernels compute their tiles;
- everything else is lists: per tile of rows first the partial tiles, the diagonal one in front, then the full ones, whose every entry is
  kept and causal, so that no mask is looked at. Fixed columns that lie in no visited tile are gathered, 128 at a time.

The rule inside a partial tile is the same for all heads: sink, window, a bit per 16 x 16 cell, a kept diagonal, a kept column. A key tile
is in a row's list at most once, so no entry counts twice; that, and a full tile that is not quite full, are the silent errors of
block-sparse kernels, and what the tests of this file look for entry by entry.

`work` has a line per program: a tile of rows of one head of one sequence, the longest first; where the keys of all heads do not fit the
device's cache together, one key head after another, so that they stay there while its query heads read them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from headscope.kernels.sparse_states import CELL, SIDE, TileStates, states_of

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.sparse_planes import Planes
    from headscope.plans import Pattern

ENDLESS = 1 << 30
"""A window that drops nothing."""
FIELDS = 8
"""Numbers of a line of `work`."""
ROW = 1.2
"""What a line of work costs beside its tiles, in tiles."""
KEPT = 64
"""Layers and lengths whose lists are remembered."""


@dataclass(frozen=True, eq=False)
class TileLists:
    """Tensors for one call, all on its device.

    - `work` [programs, 8] int32: sequence * Hq + head, row tile, partial tiles, full tiles, where its list starts (-1: ranges), gathered
      tiles, slot of its lists, tiles in all. A row tile below 0 is padding and has no tiles.
    - `rules` [Hq, 2] int32: sink and window inside partial tiles. `slots` [B, Hq] int64: where the lists of a head are, -1: ranges.
    - `tiles` int32, and with `CELLS` `cells` int64 beside it: bit 8 i + j keeps rows 16 i .. and keys 16 j .. of a partial tile.
    - with `LINES`: `columns` [slots, C] int32 ascending, ENDLESS where there are no more; `gaps` [slots, G] uint8, whether the tile so many
      tiles before the diagonal is visited; `diagonals` [slots, 128 G] and `marked` [slots, P] uint8, which of them are kept.
    """

    work: Tensor
    rules: Tensor
    slots: Tensor
    tiles: Tensor
    cells: Tensor | None
    columns: Tensor | None
    gaps: Tensor | None
    diagonals: Tensor | None
    marked: Tensor | None
    visits: int | None = None
    """Tiles of all lines of `work`; None where the device alone knows. `masked`: those of them that are not full."""
    masked: int = 0

    @cached_property
    def planes(self) -> Planes | None:
        """Diagonals and columns as the Hopper kernel reads them; made when first asked for."""
        from headscope.kernels.sparse_planes import planes_of

        if self.columns is None or self.gaps is None or self.diagonals is None or self.marked is None:
            return None
        return planes_of(self.columns, self.gaps, self.diagonals, self.marked)


@dataclass(frozen=True, eq=False)
class Packed:
    """Lists of several slots: `start`, `partial`, `full` [slots, R] and the flat `tiles`, `cells`."""

    start: Tensor
    partial: Tensor
    full: Tensor
    tiles: Tensor
    cells: Tensor | None


def supported(patterns: Sequence[Pattern]) -> str:
    """ "" when lists can say what every (static) pattern keeps, or why not."""
    for pattern in {id(one): one for one in patterns}.values():
        block = getattr(pattern, "block", SIDE)
        if pattern.kind not in ("dense", "streaming", "strided", "power", "lines", "blocks"):
            return f"pattern {pattern.kind!r} has no tile lists"
        if block % SIDE and (SIDE % block or block < CELL):
            return f"blocks of {block} tokens do not divide tiles of {SIDE} into cells of {CELL}"
    return ""


_built: OrderedDict[tuple[object, ...], tuple[TileLists, Sequence[Pattern]]] = OrderedDict()


def static_lists(call: AttentionCall, patterns: Sequence[Pattern]) -> TileLists:
    """The lists of a call under static patterns that are `supported`; those of calls without padding are remembered.

    Those with lists are looked up by identity, since hashing a plan's blocks takes longer than running them; the entry holds the patterns,
    so that an identity cannot be taken over by another.
    """
    batch, _, rows, _ = call.q.shape
    shape = (rows, call.k.shape[2], call.query_offset, call.key_offset, call.mask.window, batch, call.group, str(call.q.device))
    key = (*(range_of(one) or id(one) for one in patterns), *shape)
    if call.first_token is None and key in _built:
        _built.move_to_end(key)
        return _built[key][0]
    made = _static(call, patterns)
    if call.first_token is None:
        made = settled(made)
        _built[key] = (made, tuple(patterns))
        if len(_built) > KEPT:
            _built.popitem(last=False)
    return made


def forget() -> None:
    """Gives up the remembered lists: a generation that is past its prompt does not need them, and they take memory that a plan saved."""
    _built.clear()


def range_of(pattern: Pattern) -> tuple[int, int] | None:
    """(sink, window) of a pattern that needs no lists."""
    if pattern.kind not in ("dense", "streaming"):
        return None
    return int(getattr(pattern, "sink", 0)), min(int(getattr(pattern, "window", ENDLESS)), ENDLESS)


def rules_of(pattern: Pattern) -> tuple[int, int]:
    """(sink, window) inside the partial tiles of a static pattern."""
    whole = pattern.kind == "blocks" and int(getattr(pattern, "block", 1)) % SIDE == 0
    own = (int(getattr(pattern, "sink", 0)), ENDLESS if whole else int(getattr(pattern, "window", 0)))
    return range_of(pattern) or own


def _static(call: AttentionCall, patterns: Sequence[Pattern]) -> TileLists:
    device, limit = call.q.device, call.mask.window
    length = call.query_offset + call.q.shape[2]
    count = -(-length // SIDE)
    slots: dict[int, int] = {}
    listed: list[Pattern] = []
    rules, slot = [], []
    for pattern in patterns:
        rules.append(rules_of(pattern))
        if range_of(pattern) is not None:
            slot.append(-1)
            continue
        if id(pattern) not in slots:
            slots[id(pattern)] = len(listed)
            listed.append(pattern)
        slot.append(slots[id(pattern)])
    states = [states_of(pattern, count, device) for pattern in listed]
    rule = torch.tensor(rules, dtype=torch.int32, device=device)
    where = torch.tensor(slot, dtype=torch.int64, device=device)
    packed = pack(
        torch.stack([one.state for one in states]) if states else torch.zeros(0, count, count, dtype=torch.uint8, device=device),
        torch.stack([one.with_cells() for one in states]) if any(one.cells is not None for one in states) else None,
        limit,
    )
    lines = _lines(states, count, device)
    return assemble(call, rule, where.expand(call.q.shape[0], -1), packed, lines)


def _lines(states: list[TileStates], count: int, device: torch.device) -> dict[str, Tensor]:
    """Columns, gaps, diagonals and marked columns of all slots, of one width; empty where no head has any."""
    if not any(one.columns is not None for one in states):
        return {}
    width = SIDE * -(-max(1, *(len(one.columns) for one in states if one.columns is not None)) // SIDE)
    columns = torch.full((len(states), width), ENDLESS, dtype=torch.int32, device=device)
    gaps = torch.ones(len(states), count, dtype=torch.uint8, device=device)
    diagonals = torch.zeros(len(states), count * SIDE, dtype=torch.uint8, device=device)
    marked = torch.zeros(len(states), count * SIDE, dtype=torch.uint8, device=device)
    for place, one in enumerate(states):
        if one.columns is None or one.diagonals is None:
            continue
        columns[place, : len(one.columns)] = one.columns
        marked[place, one.columns.long()] = 1
        diagonals[place] = one.diagonals
        gaps[place] = (one.state[-1].flip(0) > 0).to(torch.uint8)
    return {"columns": columns, "gaps": gaps, "diagonals": diagonals, "marked": marked}


def pack(state: Tensor, cells: Tensor | None, window: int | None) -> Packed:
    """Lists of `state` [slots, R, T] uint8 (0 nothing kept, 1 some, 2 all), with `cells` [slots, R, T] int64 or None.

    `window`: the model's own, which takes away from every pattern.
    """
    slots, count, keys = state.shape
    device = state.device
    if window is not None:
        back = SIDE * (torch.arange(count, device=device)[:, None] - torch.arange(keys, device=device))
        state = torch.where(back - SIDE + 1 >= window, 0, torch.where(back + SIDE - 1 >= window, state.clamp(max=1), state))
    some, all_ = state == 1, state == 2
    partial, full = some.sum(-1), all_.sum(-1)
    total = (partial + full).flatten()
    start = (total.cumsum(0) - total).view(slots, count)
    place = torch.where(
        some,
        (start + partial)[..., None] - some.cumsum(-1),  # the nearest first
        (start + partial)[..., None] + all_.cumsum(-1) - 1,
    )
    kept = state > 0
    order = place[kept]
    numbers = torch.arange(keys, dtype=torch.int32, device=device).expand_as(state)
    tiles = torch.zeros(max(1, len(order)), dtype=torch.int32, device=device)
    tiles[order] = numbers[kept]
    bits = None
    if cells is not None:
        bits = torch.zeros(max(1, len(order)), dtype=torch.int64, device=device)
        bits[order] = cells[kept]
    return Packed(start.int(), partial.int(), full.int(), tiles, bits)


def assemble(call: AttentionCall, rules: Tensor, slot: Tensor, packed: Packed, lines: dict[str, Tensor]) -> TileLists:
    """The programs of a call. `slot` [B, Hq] int64: where a head's lists are, -1 for ranges. Nothing here waits for the device."""
    batch, heads, rows, _ = call.q.shape
    device, limit = call.q.device, call.mask.window
    if call.first_token is None:
        low = torch.full((batch, 1), call.query_offset // SIDE, device=device)
        many = (call.query_offset + rows - 1) // SIDE - call.query_offset // SIDE + 1
    else:
        low = torch.div(call.query_offset - call.first_token.to(device), SIDE, rounding_mode="floor")[:, None]
        many = -(-rows // SIDE) + 1
    row = low + torch.arange(many - 1, -1, -1, device=device)  # [B, many], the last first
    last = (call.query_offset + rows - 1) // SIDE
    used = (row >= 0) & (row <= last)
    at = row.clamp(0, last)
    partial, full = range_counts(at[:, None], rules[:, 0, None].long(), rules[:, 1, None].long(), limit)
    listed = slot >= 0
    start = torch.full_like(partial, -1)
    gathered = torch.zeros_like(partial)
    if packed.start.shape[0]:
        chosen = slot.clamp(min=0)[:, :, None], at[:, None]
        pick = listed[:, :, None]
        partial = torch.where(pick, packed.partial[chosen].long(), partial)
        full = torch.where(pick, packed.full[chosen].long(), full)
        start = torch.where(pick, packed.start[chosen].long(), start)
        if lines:
            ends = (torch.arange(last + 1, device=device, dtype=torch.int32) + 1) * SIDE
            below = torch.searchsorted(lines["columns"], ends.expand(len(lines["columns"]), -1).contiguous())
            gathered = torch.where(pick, ((below + SIDE - 1) // SIDE)[chosen], 0)
    idle = ~used[:, None].expand(partial.shape)
    partial, full, gathered = (x.masked_fill(idle, 0) for x in (partial, full, gathered))
    cost = partial + full + gathered
    line = torch.stack(
        [
            torch.arange(batch * heads, device=device).view(batch, heads, 1).expand_as(cost),
            row[:, None].expand_as(cost),
            partial,
            full,
            start,
            gathered,
            slot[:, :, None].expand_as(cost),
            cost,
        ],
        -1,
    )
    owner = cost.view(batch * (heads // call.group), call.group, many)
    grouped = line.view(-1, call.group, many, FIELDS).transpose(1, 2).flatten(1, 2)
    ordered = owner.transpose(1, 2).flatten(1)
    if call.k.nbytes + (0 if call.v is None else call.v.nbytes) <= cache_bytes(device):  # every head's keys are at hand
        order = ordered.flatten().argsort(descending=True, stable=True)
        work = grouped.flatten(0, 1)[order]
    else:  # key heads one after another, the busiest first; inside a key head its longest rows first
        busy = owner.sum((1, 2)).argsort(descending=True, stable=True)
        inside = ordered[busy].argsort(dim=1, descending=True, stable=True)
        work = grouped[busy].gather(1, inside[..., None].expand(-1, -1, FIELDS)).flatten(0, 1)
    work = work.to(torch.int32).contiguous()
    columns, gaps, diagonals, marked = (lines.get(name) for name in ("columns", "gaps", "diagonals", "marked"))
    return TileLists(work, rules.contiguous(), slot, packed.tiles, packed.cells, columns, gaps, diagonals, marked)


def settled(lists: TileLists) -> TileLists:
    """Lists that will be used again: their visits counted, and their work dealt out so that all processors end together. Waits."""
    count = lists.work[:, [2, 3, 5]].sum(0).tolist()
    work = lists.work
    if work.is_cuda:
        many = torch.cuda.get_device_properties(work.device).multi_processor_count
        order = dealt(work[:, 7].cpu().numpy() + ROW, many)
        work = work[torch.from_numpy(order).to(work.device)]
    return replace(lists, work=work, visits=sum(count), masked=count[0] + count[2])


def dealt(cost: np.ndarray, many: int) -> np.ndarray:
    """An order in which processor i, of `many`, that takes every `many`-th line from the i-th on gets about as much as every other: round
    by round, the longest line to the processor that has least so far.
    """
    load, order = np.zeros(many), np.empty(len(cost), np.int64)
    for top in range(0, len(cost), many):
        part = np.arange(top, min(top + many, len(cost)))
        part = part[np.argsort(-cost[part], kind="stable")]
        free = np.argsort(load[: len(part)], kind="stable")
        order[top + free] = part
        load[free] += cost[part]
    return order


@lru_cache(maxsize=8)
def cache_bytes(device: torch.device) -> int:
    """Bytes of keys and values that stay in a device's last cache while others pass through."""
    return torch.cuda.get_device_properties(device).L2_cache_size * 3 // 4 if device.type == "cuda" else 0


def range_counts(row: Tensor, sink: Tensor, window: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """(partial, full) tiles of row tiles `row` under sink and window: `ranges`, counted."""
    sinks, full_sinks, w0, w1 = ranges(row, sink, window, limit)
    return 1 + (w1 - w0) + (sinks - full_sinks), full_sinks + row - w1


def ranges(row: Tensor, sink: Tensor, window: Tensor, limit: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tiles a tile of rows visits, as four bounds: sink tiles 0 .. a - 1, the first b of them full; window tiles w0 .. row, of which
    w1 .. row - 1 are full. `limit`: the model's own window. As `visit` in the kernels computes them."""
    top = row * SIDE
    reach = window if limit is None else window.clamp(max=limit)
    w0 = torch.minimum((top - reach + 1).clamp(min=0) // SIDE, row)
    w1 = torch.maximum(torch.minimum((top + SIDE - reach).clamp(min=0) + SIDE - 1, row * SIDE) // SIDE, w0)
    sinks = torch.minimum((sink + SIDE - 1) // SIDE, w0)
    full_sinks = torch.minimum(sink // SIDE, sinks) if limit is None else torch.zeros_like(sinks)
    return sinks, full_sinks, w0, w1
