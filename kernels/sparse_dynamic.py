"""Lists of dynamic patterns, chosen on the device where they are needed: vertical-slash columns and diagonals, and top blocks.

The rules are those of `headscope.plans.indices`, in the call's own place and in float32, for all sequences and heads at once; nothing
waits for the device, so that a prefill stays one stream of launches. How many tiles a row gets is then not known on the host: each row
has room for all of its causal tiles, and its count is on the device too.

The silent failure this avoids: a choice made from one prompt's indices, or of one head, and used for all, because choosing was too slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.kernels.sparse_lists import ENDLESS, Packed, TileLists, assemble, pack, range_of, rules_of, settled, supported
from headscope.kernels.sparse_states import SIDE, gap_states, states_of
from headscope.plans.dynamic import TopBlocks, VerticalSlash

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans import Pattern


def chosen_on_device(call: AttentionCall, patterns: Sequence[Pattern]) -> str:
    """ "" when `dynamic_lists` takes the call, or why its keys are chosen by `headscope.plans.indices`, head by head."""
    if call.first_token is not None or call.key_offset or call.mask.key_valid is not None or call.mask.query_segments is not None:
        return "padding, packed sequences and cropped caches are chosen for one by one"
    if call.query_offset % SIDE:
        return f"its first row is not at a multiple of {SIDE}"
    for pattern in {id(one): one for one in patterns}.values():
        if isinstance(pattern, VerticalSlash) or pattern.static:
            continue
        if not isinstance(pattern, TopBlocks) or pattern.block != SIDE or pattern.rule not in ("pooled", "antidiagonal"):
            return f"{pattern} has no rule for the device"
        if pattern.rule == "antidiagonal" and (SIDE % pattern.stride or call.k.shape[2] % SIDE or call.q.shape[2] % SIDE):
            return "antidiagonals are summed over whole tiles"
    return supported([one for one in patterns if one.static])


@torch.no_grad()
def dynamic_lists(call: AttentionCall, patterns: Sequence[Pattern]) -> TileLists:
    """The lists of a call of which `chosen_on_device` says nothing; for this call only."""
    batch, _, rows, _ = call.q.shape
    device = call.q.device
    count = -(-(call.query_offset + rows) // SIDE)
    static: dict[int, int] = {}
    fixed: list[Pattern] = []
    groups: dict[Pattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        if not pattern.static:
            groups.setdefault(pattern, []).append(head)
        elif range_of(pattern) is None and id(pattern) not in static:
            static[id(pattern)] = len(fixed)
            fixed.append(pattern)
    shape = (batch * sum(map(len, groups.values())), count, count)
    state = torch.zeros(shape, dtype=torch.uint8, device=device)
    slots = [[-1 if one.static and range_of(one) is not None else static.get(id(one), 0) for one in patterns] for _ in range(batch)]
    lines: dict[str, Tensor] = {}
    at = 0
    for pattern, members in groups.items():
        size = batch * len(members)
        index = _index(tuple(members), device)
        if isinstance(pattern, VerticalSlash):
            columns, diagonals = vertical_slash(call, tuple(members), pattern, count)
            found = _line_tables(columns, diagonals)
            state[at : at + size] = _toeplitz(found["gaps"])
            found["gaps"] = (found["gaps"] > 0).to(torch.uint8)
            _place(lines, found, len(fixed) + at, len(fixed) + shape[0], device)
        else:
            assert isinstance(pattern, TopBlocks)
            state[at : at + size] = top_blocks(call, index, pattern, count).flatten(0, 1)
        for b in range(batch):
            for place, head in enumerate(members):
                slots[b][head] = len(fixed) + at + b * len(members) + place
        at += size
    if call.mask.window is not None:
        back = SIDE * (torch.arange(count, device=device)[:, None] - torch.arange(count, device=device))
        inside = torch.where(back + SIDE - 1 >= call.mask.window, state.clamp(max=1), state)
        state = torch.where(back - SIDE + 1 >= call.mask.window, 0, inside)
    packed = compact(state, call.query_offset // SIDE)
    if fixed:
        packed = _behind(_packed(fixed, count, device, call.mask.window), packed)
    rules = _rules(tuple(_rule(one) for one in patterns), device)
    return assemble(call, rules, _slots(tuple(map(tuple, slots)), device), packed, lines)


def _rule(pattern: Pattern) -> tuple[int, int]:
    if pattern.static:
        return rules_of(pattern)
    return (0, 0) if isinstance(pattern, VerticalSlash) else (0, ENDLESS)


@lru_cache(maxsize=64)
def _index(members: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(members, device=device)


@lru_cache(maxsize=64)
def _rules(rules: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor(rules, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _slots(slots: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(slots, dtype=torch.int64, device=device)


_static: dict[tuple[object, ...], tuple[Packed, list[Pattern]]] = {}


def _packed(patterns: list[Pattern], count: int, device: torch.device, window: int | None) -> Packed:
    """Lists of the static heads beside dynamic ones, remembered by identity as in `static_lists`."""
    key = (*map(id, patterns), count, device, window)
    if key not in _static:
        states = [states_of(pattern, count, device) for pattern in patterns]
        cells = torch.stack([one.with_cells() for one in states]) if any(one.cells is not None for one in states) else None
        if len(_static) >= 64:
            _static.clear()
        _static[key] = (pack(torch.stack([one.state for one in states]), cells, window), patterns)
    return _static[key][0]


def _behind(first: Packed, second: Packed) -> Packed:
    """The lists of both, one after the other."""
    cells = None
    if first.cells is not None:
        cells = torch.cat([first.cells, torch.zeros_like(second.tiles, dtype=torch.int64)])
    return Packed(
        torch.cat([first.start, second.start + len(first.tiles)]),
        torch.cat([first.partial, second.partial]),
        torch.cat([first.full, second.full]),
        torch.cat([first.tiles, second.tiles]),
        cells,
    )


def compact(state: Tensor, low: int) -> Packed:
    """Lists of `state` [slots, R, T] uint8 for the row tiles from `low` on, each with room for its causal tiles, without a look at it."""
    from headscope.kernels.sparse_compact import BLOCK, compact_kernel

    slots, count, keys = state.shape
    device = state.device
    room = (count * (count + 1) - low * (low + 1)) // 2
    tiles = torch.empty(max(1, slots * room), dtype=torch.int32, device=device)
    partial, full = (torch.zeros(slots, count, dtype=torch.int32, device=device) for _ in range(2))
    number = torch.arange(count, device=device)
    start = (number * (number + 1) // 2 - low * (low + 1) // 2) + room * torch.arange(slots, device=device)[:, None]
    if slots:
        compact_kernel[(slots * (count - low),)](
            state.contiguous(), tiles, partial, full, start, count, keys, low, BLOCK=BLOCK, num_warps=1
        )
    return Packed(start.int(), partial, full, tiles, None)


def _toeplitz(gaps: Tensor) -> Tensor:
    """[slots, G] state by distance in tiles -> [slots, G, G] by row and key tile."""
    number = torch.arange(gaps.shape[1], device=gaps.device)
    back = number[:, None] - number[None, :]
    return torch.where(back >= 0, gaps[:, back.clamp(min=0)], 0)


def _line_tables(columns: Tensor, diagonals: Tensor) -> dict[str, Tensor]:
    """What the kernels look up: `columns` [slots, C] ascending, `diagonals` [slots, P] uint8 and what follows from them."""
    marked = torch.zeros_like(diagonals)
    marked.scatter_(1, columns.long().clamp(max=diagonals.shape[1] - 1), (columns < ENDLESS).to(torch.uint8))
    return {"columns": columns, "gaps": gap_states(diagonals), "diagonals": diagonals, "marked": marked}


def _place(lines: dict[str, Tensor], found: dict[str, Tensor], at: int, total: int, device: torch.device) -> None:
    """Puts the tables of some slots into those of all, wide enough for the widest."""
    for name, value in found.items():
        fill = ENDLESS if name == "columns" else 1 if name == "gaps" else 0
        width = -(-value.shape[1] // SIDE) * SIDE if name == "columns" else value.shape[1]
        old = lines.get(name)
        if old is None or old.shape[1] < width:
            grown = torch.full((total, width), fill, dtype=value.dtype, device=device)
            if old is not None:
                grown[:, : old.shape[1]] = old
            lines[name] = grown
        lines[name][at : at + len(value), : value.shape[1]] = value


def vertical_slash(call: AttentionCall, heads: tuple[int, ...], pattern: VerticalSlash, count: int) -> tuple[Tensor, Tensor]:
    """(columns [B * heads, C] int32 ascending, diagonals [B * heads, 128 count] uint8) by the sums of the last rows' weights."""
    device, length, rows = call.q.device, call.k.shape[2], min(pattern.last_q, call.q.shape[2])
    batch, first = call.q.shape[0], length - rows
    t = torch.arange(first, length, device=device)[:, None]
    s = torch.arange(-rows, length, device=device)[None, :]
    hidden = s > t if call.mask.window is None else (s > t) | (t - s >= call.mask.window)
    columns = torch.empty(batch, len(heads), length, device=device)
    diagonals = torch.empty(batch, len(heads), length, device=device)
    for kv in sorted({head // call.group for head in heads}):  # one at a time, so that memory is that of one
        places = [place for place, head in enumerate(heads) if head // call.group == kv]
        q = call.q[:, _index(tuple(heads[place] for place in places), device), -rows:]
        scores = q.float() * call.scale @ call.k[:, kv : kv + 1].float().transpose(-1, -2)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        # as many keys more on the left as there are rows: entry (i, u) then lies i keys further to the right on its diagonal, first - u
        wide = torch.nn.functional.pad(scores, (rows, 0), value=-torch.inf).masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(wide, -1)
        skewed = weights.as_strided((*weights.shape[:3], length), (*weights.stride()[:2], weights.shape[3] + 1, 1), 1)
        low, high = places[0], places[-1] + 1  # heads of a key head that share a pattern stand together
        columns[:, low:high] = weights.sum(2)[:, :, rows:]
        diagonals[:, low:high] = skewed.sum(2).flip(2)
    columns, diagonals = columns.flatten(0, 1), diagonals.flatten(0, 1)
    columns[:, : pattern.sink] = torch.inf
    diagonals[:, : pattern.window] = torch.inf
    lines = diagonals.topk(min(length, max(pattern.slash, pattern.window)), 1).indices
    marked = torch.zeros(len(lines), count * SIDE, dtype=torch.uint8, device=device).scatter_(1, lines, 1)
    kept = columns.topk(min(length, max(pattern.vertical, pattern.sink)), 1).indices.sort(1).values.to(torch.int32)
    return kept if kept.shape[1] else torch.full((len(lines), 1), ENDLESS, dtype=torch.int32, device=device), marked


def top_blocks(call: AttentionCall, heads: Tensor, pattern: TopBlocks, count: int) -> Tensor:
    """[B, heads, count, count] uint8 states of the tiles that the estimate ranks first."""
    from headscope.kernels.sparse_antidiagonal import antidiagonal
    from headscope.kernels.sparse_estimates import pooled

    device, low = call.q.device, call.query_offset // SIDE
    mass = pooled(call, heads) if pattern.rule == "pooled" else antidiagonal(call, heads, pattern.stride)
    row = torch.arange(low, count, device=device)[:, None]
    key = torch.arange(count, device=device)[None, :]
    ranked, order = mass.masked_fill(key > row, -1.0).sort(dim=-1, descending=True, stable=True)
    if pattern.share is not None:
        number = (pattern.share * (row + 1).double()).round().clamp(min=1)
        taken = (torch.arange(count, device=device)[None, :] < number).expand_as(ranked)
    else:
        ranked = ranked.clamp(min=0.0)
        before = ranked.cumsum(-1) - ranked
        taken = before < (float(pattern.mass or 1.0) - 1e-9) * ranked.sum(-1, keepdim=True)
    kept = torch.zeros(ranked.shape, dtype=torch.bool, device=device).scatter_(-1, order, taken)
    kept = (kept | (key == 0)) & (key < row)
    state = torch.zeros(*mass.shape[:2], count, count, dtype=torch.uint8, device=device)
    state[:, :, low:] = kept.to(torch.uint8) * 2 + (key == row).to(torch.uint8)
    return state


def mask_lists(call: AttentionCall, kept: Tensor) -> TileLists:
    """The lists of a call whose heads keep whole tiles: `kept` [Hq, R, R] bool on the call's device, row tiles by key tiles.

    The diagonal tile is kept too, and tiles behind it are not. For calls without padding; to be used more than once, as it waits for the
    device.
    """
    count = kept.shape[1]
    number = torch.arange(count, device=kept.device)
    before = number[None, :] < number[:, None]
    state = torch.where(before, kept * 2, 0) + torch.eye(count, dtype=torch.int64, device=kept.device)
    batch, heads = call.q.shape[:2]
    slots = torch.arange(heads, device=kept.device).expand(batch, -1)
    rules = _rules(((0, ENDLESS),) * heads, kept.device)
    return settled(assemble(call, rules, slots, compact(state.to(torch.uint8), call.query_offset // SIDE), {}))
