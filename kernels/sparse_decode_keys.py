"""A choice of single keys by their exact scores, in launches that each read the scores once.

Scores of every key are the larger part of what a dense step reads, so what follows must cost next to nothing. A sort does not: the k-th
largest of a row is bracketed from a sample of it, one pass over all scores counts what lies above the bracket and collects the few per cent
within, and among these the k-th is found by halving. Two passes more write the joint list of each key head, ascending, with a bit per head;
of equal scores the first ones are taken, so that the choice is that of a stable sort. Where a sample misleads (scores that repeat, or go
with the place they are taken from), the whole row is searched: slower, and the same choice.

Nothing is read back; lengths come from the device.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from headscope.kernels.sparse_decode_host import KeyLists
from headscope.kernels.triton_host import cdiv, padded

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 4096
"""Scores of a row that its bracket is worked out from."""
ROOM = 16384
"""Scores within a bracket that are searched at once."""
STRETCH = 4096
"""Scores that one program of the passes over all of them reads."""

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _ordered(b_s):
    """Scores as whole numbers in the same order, or back."""
    b_x = b_s.to(tl.int32, bitcast=True)
    return b_x ^ ((b_x >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(s, o_n, length, first, count):
    """Numbers in the order of the scores at places o_n: what is always kept above all, what is not there below."""
    b_x = _ordered(tl.load(s + o_n, mask=o_n < length, other=0.0) + 0.0)
    b_x = tl.where(o_n < first, 0x7FFFFFFF, b_x)
    return tl.where(o_n < count, b_x, -0x80000000)


@triton.jit
def _middle(low, high, above_low, above_high, want, turn):
    """A number between: where the count would fall were the scores spread evenly, and every second time half way."""
    share = (above_low - want).to(tl.float32) / tl.maximum(above_low - above_high, 1).to(tl.float32)
    f_low = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    f_high = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    guess = _ordered(f_low + share * (f_high - f_low) + 0.0)
    half = (low >> 1) + (high >> 1) + (low & high & 1)
    return tl.where((turn % 2 == 0) & (guess > low) & (guess < high), guess, half)


@triton.jit
def _facts(table, lengths, i_b, head):
    """(keys to keep, first ones always, keys before the window) of one row."""
    count = tl.maximum(tl.load(lengths + i_b) - tl.load(table + head * 3 + 2), 0)
    return tl.minimum(tl.load(table + head * 3), count), tl.minimum(tl.load(table + head * 3 + 1), count), count


@triton.jit
def weights_kernel(s, tops, totals, w, n_keys, tiles, GROUP: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """w [B Hkv, N]: log of the summed softmax weights of a group's scores; `tops`, `totals` [B Hq, T] from the tiles that made them."""
    i_r = tl.program_id(1)
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    o_t = tl.arange(0, BT)
    best = tl.full([BE], -float("inf"), tl.float32)
    b_w = tl.zeros([BE], tl.float32)
    for place in tl.static_range(GROUP):
        row = (i_r * GROUP + place).to(tl.int64)
        b_t = tl.load(tops + row * tiles + o_t, mask=o_t < tiles, other=-float("inf"))
        b_l = tl.load(totals + row * tiles + o_t, mask=o_t < tiles, other=0.0)
        top = tl.max(b_t)
        lse = top + tl.log(tl.sum(b_l * tl.exp(b_t - top)))
        b_x = tl.load(s + row * n_keys + o_e, mask=o_e < n_keys, other=0.0) - lse
        new = tl.maximum(best, b_x)
        b_w = b_w * tl.exp(best - new) + tl.exp(b_x - new)
        best = new
    tl.store(w + i_r.to(tl.int64) * n_keys + o_e, best + tl.log(b_w), mask=o_e < n_keys)


@triton.jit
def bracket_kernel(s, table, lengths, bracket, counters, n_keys, rows, NS: tl.constexpr):
    """`bracket` [R, 2]: numbers that the k-th largest of a row likely lies between, lower excluded; zeroes `counters` [R, 2]."""
    i_r = tl.program_id(0)
    want, first, count = _facts(table, lengths, i_r // rows, i_r % rows)
    step = tl.maximum(count // NS, 1)
    o_s = tl.arange(0, NS)
    place = o_s * step + step // 2
    b_x = _keys(s + i_r.to(tl.int64) * n_keys, place, n_keys, first, count)
    taken = tl.sum((place < count).to(tl.int32))
    part = want.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)
    middle = part * taken
    wide = 4.0 * tl.sqrt(middle * (1.0 - part)) + 4.0
    side = tl.arange(0, 2)
    rank = tl.where(side == 0, middle + wide, middle - wide).to(tl.int32)
    rank = tl.minimum(tl.maximum(rank, 1), tl.maximum(taken, 1))
    slack = (wide / 4.0).to(tl.int32)
    there = b_x > -0x80000000
    low = tl.min(tl.where(there, b_x, 0x7FFFFFFF)) - 1 + tl.zeros([2], tl.int32)
    high = tl.max(tl.where(there, b_x, -0x7FFFFFFF)) + tl.zeros([2], tl.int32)
    above_low = taken + tl.zeros([2], tl.int32)
    above_high = tl.zeros([2], tl.int32)
    open_ = (high - 1 > low) & (taken > 0)
    turn = 0
    while tl.max(open_.to(tl.int32)) > 0:
        half = _middle(low, high, above_low, above_high, rank, turn)
        above = tl.sum((b_x[None, :] > half[:, None]).to(tl.int32), 1)
        lower = open_ & (above <= rank + slack)  # a bracket need not be sharp
        upper = open_ & (above >= rank - slack)
        high = tl.where(lower, half, high)
        above_high = tl.where(lower, above, above_high)
        low = tl.where(upper, half, low)
        above_low = tl.where(upper, above, above_low)
        open_ = open_ & (high - 1 > low)
        turn += 1
    begin = tl.sum(tl.where(side == 0, low, 0))
    end = tl.sum(tl.where(side == 1, high, 0))
    begin = tl.where(middle + wide >= taken, -0x80000000, begin)
    end = tl.where(middle - wide <= 1, 0x7FFFFFFF, end)
    tl.store(bracket + i_r * 2, tl.minimum(begin, end))
    tl.store(bracket + i_r * 2 + 1, end)
    tl.store(counters + i_r * 2 + side, tl.zeros([2], tl.int32))


@triton.jit
def collect_kernel(s, table, lengths, bracket, counters, found, places, n_keys, rows, BE: tl.constexpr, ROOM: tl.constexpr):
    """Counts the scores above a row's bracket, and puts those within into `found`, their places into `places` [R, ROOM], in any order."""
    i_r = tl.program_id(1)
    _, first, count = _facts(table, lengths, i_r // rows, i_r % rows)
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    b_x = _keys(s + i_r.to(tl.int64) * n_keys, o_e, n_keys, first, count)
    begin = tl.load(bracket + i_r * 2)
    end = tl.load(bracket + i_r * 2 + 1)
    above = tl.sum((b_x > end).to(tl.int32))
    within = (b_x > begin) & (b_x <= end)
    many = tl.sum(within.to(tl.int32))
    tl.atomic_add(counters + i_r * 2, above)
    base = tl.atomic_add(counters + i_r * 2 + 1, many)
    at = base + tl.cumsum(within.to(tl.int32), 0) - 1
    ok = within & (at < ROOM)
    tl.store(found + i_r.to(tl.int64) * ROOM + at, b_x, mask=ok)
    tl.store(places + i_r.to(tl.int64) * ROOM + at, o_e, mask=ok)


@triton.jit
def _above(s, number, n_keys, first, count, BE: tl.constexpr):
    """How many of a row's numbers are larger."""
    total = 0
    for begin in tl.range(0, count, BE):
        total += tl.sum((_keys(s, begin + tl.arange(0, BE), n_keys, first, count) > number).to(tl.int32))
    return total


@triton.jit
def _equal(s, number, until, n_keys, first, count, BE: tl.constexpr):
    """How many of a row's numbers at places up to `until` are this one."""
    total = 0
    for begin in tl.range(0, tl.minimum(count, until + 1), BE):
        o_e = begin + tl.arange(0, BE)
        total += tl.sum(((_keys(s, o_e, n_keys, first, count) == number) & (o_e <= until)).to(tl.int32))
    return total


@triton.jit
def threshold_kernel(s, table, lengths, bracket, counters, found, places, limits, n_keys, rows, BE: tl.constexpr, ROOM: tl.constexpr):
    """`limits` [R, 2]: a row keeps the numbers above the first, and those equal to it at places up to the second."""
    i_r = tl.program_id(0)
    want, first, count = _facts(table, lengths, i_r // rows, i_r % rows)
    p_s = s + i_r.to(tl.int64) * n_keys
    before = tl.load(counters + i_r * 2)
    many = tl.load(counters + i_r * 2 + 1)
    low = tl.load(bracket + i_r * 2)
    high = tl.load(bracket + i_r * 2 + 1)
    caught = (many <= ROOM) & (before < want) & (before + many >= want)
    o_c = tl.arange(0, ROOM)
    m_c = (o_c < many) & caught
    b_x = tl.load(found + i_r.to(tl.int64) * ROOM + o_c, mask=m_c, other=-0x80000000)
    if caught:
        low = tl.min(tl.where(m_c, b_x, 0x7FFFFFFF)) - 1
        high = tl.max(b_x)
        above_low = before + many
        above_high = before
    else:
        low = tl.full([], -0x80000000, tl.int32)
        high = tl.full([], 0x7FFFFFFF, tl.int32)
        above_low = count
        above_high = tl.zeros([], tl.int32)
    turn = 0
    while (want > 0) & (high - 1 > low):
        half = _middle(low, high, above_low, above_high, want, turn)
        if caught:
            above = before + tl.sum((b_x > half).to(tl.int32))
        else:
            above = _above(p_s, half, n_keys, first, count, BE)
        if above <= want:
            high = half
            above_high = above
        if above >= want:
            low = half
            above_low = above
        turn += 1
    if caught:
        larger = before + tl.sum((b_x > high).to(tl.int32))
    else:
        larger = _above(p_s, high, n_keys, first, count, BE)
    more = tl.where(want > 0, want - larger, 0)
    until = tl.full([], -1, tl.int32)
    if more > 0:  # of equal scores the first ones
        b_p = tl.load(places + i_r.to(tl.int64) * ROOM + o_c, mask=m_c, other=0x7FFFFFFF)
        b_p = tl.where(b_x == high, b_p, 0x7FFFFFFF)
        until = count - 1
        short = tl.full([], -1, tl.int32)  # up to here there are too few
        while until - 1 > short:
            half = (short + until) // 2
            if caught:
                here = tl.sum((b_p <= half).to(tl.int32))
            else:
                here = _equal(p_s, high, half, n_keys, first, count, BE)
            if here >= more:
                until = half
            else:
                short = half
    tl.store(limits + i_r * 2, tl.where(want > 0, high, 0x7FFFFFFF))
    tl.store(limits + i_r * 2 + 1, until)


@triton.jit
def _seen(s, table, lengths, limits, o_e, i_b, i_g, n_keys, kv_heads, GROUP: tl.constexpr, GROUPED: tl.constexpr, TAIL: tl.constexpr):
    """Bits of the heads of a group that keep the keys at places o_e."""
    b_b = tl.zeros(o_e.shape, tl.int32)
    length = tl.load(lengths + i_b)
    for place in tl.static_range(GROUP):
        head = i_g * GROUP + place
        row = i_b * kv_heads + i_g if GROUPED else i_b * kv_heads * GROUP + head
        keep = tl.load(table + head * 3)
        _, first, count = _facts(table, lengths, i_b, head)
        b_x = _keys(s + row.to(tl.int64) * n_keys, o_e, n_keys, first, count)
        limit = tl.load(limits + row * 2)
        mine = (b_x > limit) | ((b_x == limit) & (o_e <= tl.load(limits + row * 2 + 1)))
        mine = mine & (o_e < count)
        if TAIL:
            mine = mine | ((o_e >= count) & (o_e < length))
        b_b |= (mine & (keep > 0)).to(tl.int32) << place
    return b_b


@triton.jit
def tally_kernel(s, table, lengths, limits, totals, n_keys, kv_heads, stretches,
                 GROUP: tl.constexpr, GROUPED: tl.constexpr, TAIL: tl.constexpr, BE: tl.constexpr):
    """totals [B Hkv, T]: keys of a stretch that some head of the group keeps."""
    i_r = tl.program_id(1)
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    b_b = _seen(s, table, lengths, limits, o_e, i_r // kv_heads, i_r % kv_heads, n_keys, kv_heads, GROUP, GROUPED, TAIL)
    tl.store(totals + i_r * stretches + tl.program_id(0), tl.sum((b_b != 0).to(tl.int32)))


@triton.jit
def list_kernel(s, table, lengths, limits, totals, entries, kept, counts, rules, n_keys, kv_heads, stretches, room,
                GROUP: tl.constexpr, GROUPED: tl.constexpr, TAIL: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """The kept keys of a stretch to their places behind those of the stretches before it, and the rules of the group."""
    i_t = tl.program_id(0)
    i_r = tl.program_id(1)
    i_b = i_r // kv_heads
    i_g = i_r % kv_heads
    o_e = i_t * BE + tl.arange(0, BE)
    o_t = tl.arange(0, BT)
    before = tl.sum(tl.load(totals + i_r * stretches + o_t, mask=o_t < i_t, other=0))
    b_b = _seen(s, table, lengths, limits, o_e, i_b, i_g, n_keys, kv_heads, GROUP, GROUPED, TAIL)
    here = b_b != 0
    place = before + tl.cumsum(here.to(tl.int32), 0) - 1
    ok = here & (place < room)
    at = i_r.to(tl.int64) * room + place
    tl.store(entries + at, o_e, mask=ok)
    tl.store(kept + at, b_b, mask=ok)
    if i_t == stretches - 1:
        tl.store(counts + i_r, tl.minimum(before + tl.sum(here.to(tl.int32)), room))
    if i_t == 0:
        for member in tl.static_range(GROUP):
            head = i_g * GROUP + member
            _, _, count = _facts(table, lengths, i_b, head)
            p_r = rules + (i_b * kv_heads * GROUP + head) * 3
            tl.store(p_r, 0)
            tl.store(p_r + 1, 0)
            tl.store(p_r + 2, count)

# fmt: on


def group_weights(scores: Tensor, tops: Tensor, totals: Tensor, kv_heads: int) -> Tensor:
    """[B, Hkv, N] float32: logs of the summed softmax weights of each key head's query heads. `scores` [B, Hq, N] float32; `tops`, `totals`
    [B, Hq, T]: maximum and sum of exponentials below it of each tile of a row.
    """
    batch, heads, keys = scores.shape
    tiles = tops.shape[2]
    out = torch.empty(batch, kv_heads, keys, dtype=torch.float32, device=scores.device)
    weights_kernel[(cdiv(keys, 2048), batch * kv_heads)](
        scores, tops, totals, out, keys, tiles, GROUP=heads // kv_heads, BT=padded(tiles), BE=2048, num_warps=8
    )
    return out


def select_keys(
    scores: Tensor, heads: int, kv_heads: int, table: Tensor, first_rows: Tensor, lengths: Tensor, room: int, tail: bool
) -> tuple[KeyLists, Tensor]:
    """(lists of the chosen keys, rules [B, Hq, 3] int32: from where a head keeps every key) by scores [B, Hq, N] float32 of every head, or
    [B, Hkv, N] of key heads whose query heads choose together.

    `table` [Hq, 3] int32 per head: keys to keep (0: it does not choose), first ones always, keys of the window; `first_rows`: the same for
    each row of `scores`; `lengths` [B] int32; `room`: the most keys that a key head lists. With `tail` the windows are listed too.
    """
    batch, rows, keys = scores.shape
    device, group = scores.device, heads // kv_heads
    bracket, counters, limits = (torch.empty(batch * rows, 2, dtype=torch.int32, device=device) for _ in range(3))
    found, places = (torch.empty(batch * rows, ROOM, dtype=torch.int32, device=device) for _ in range(2))
    stretches = cdiv(keys, STRETCH)
    bracket_kernel[(batch * rows,)](scores, first_rows, lengths, bracket, counters, keys, rows, NS=SAMPLE, num_warps=16)
    collect_kernel[(stretches, batch * rows)](
        scores, first_rows, lengths, bracket, counters, found, places, keys, rows, BE=STRETCH, ROOM=ROOM, num_warps=8
    )
    threshold_kernel[(batch * rows,)](
        scores, first_rows, lengths, bracket, counters, found, places, limits, keys, rows, BE=STRETCH, ROOM=ROOM, num_warps=16
    )
    totals = torch.empty(batch * kv_heads, stretches, dtype=torch.int32, device=device)
    entries, bits = (torch.empty(batch, kv_heads, room, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=device)
    rules = torch.empty(batch, heads, 3, dtype=torch.int32, device=device)
    flags = {"GROUP": group, "GROUPED": rows == kv_heads and group > 1, "TAIL": tail, "BE": STRETCH, "num_warps": 8}
    grid = (stretches, batch * kv_heads)
    tally_kernel[grid](scores, table, lengths, limits, totals, keys, kv_heads, stretches, **flags)
    list_kernel[grid](
        scores, table, lengths, limits, totals, entries, bits, counts, rules, keys, kv_heads, stretches, room, BT=padded(stretches), **flags
    )
    return KeyLists(entries, bits, counts), rules
