"""A choice of blocks and its lists in two launches: what stands for each block is scored, and the largest become a list per key head.

Choosing pays only where it costs less than the keys it saves, and at one row a step most of what a choice costs is launches and passes over
memory in between. So one program takes all blocks of a key head at once: it finds each head's k-th largest score by halving (the scores
stay in registers, no sort and no histogram), of equal scores the first ones, and writes the joint list of the group with a bit per head,
ascending. Nothing is read back; lengths come from the device, so the choice may be captured in a CUDA
graph with the step that it is for.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from headscope.kernels.sparse_decode_host import KeyLists
from headscope.kernels.triton_common import INTERPRETED
from headscope.kernels.triton_host import cdiv, padded

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 1 << 15
"""Scores of a key head that one program holds."""

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def stand_in_scores(q, stands, s, stride_qb, stride_qh, stride_sb, stride_sh, stride_sn, n_blocks, room, kv_heads, scale,
                    GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BOUNDS: tl.constexpr,
                    UPCAST: tl.constexpr):
    """s [B, Hq, room] float32: the mean key's score, or with BOUNDS the largest that coordinates between two bounds allow."""
    i_t = tl.program_id(0)
    i_b = tl.program_id(1) // kv_heads
    i_g = tl.program_id(1) % kv_heads
    o_m = tl.arange(0, M)
    o_d = tl.arange(0, DP)
    o_n = i_t * BN + tl.arange(0, BN)
    head = i_g * GROUP + o_m
    m_m = o_m < GROUP
    m_d = (o_d < D)[None, :]
    b_q = tl.load(q + i_b.to(tl.int64) * stride_qb + head[:, None] * stride_qh + o_d[None, :], mask=m_m[:, None] & m_d, other=0.0)
    p_k = stands + i_b.to(tl.int64) * stride_sb + i_g.to(tl.int64) * stride_sh + o_n.to(tl.int64)[:, None] * stride_sn + o_d[None, :]
    m_k = (o_n < n_blocks)[:, None] & m_d
    b_k = tl.load(p_k, mask=m_k, other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
        b_k = b_k.to(tl.float32)
    if BOUNDS:
        b_l = tl.load(p_k + D, mask=m_k, other=0.0)
        if UPCAST:
            b_l = b_l.to(tl.float32)
        b_s = tl.dot(tl.where(b_q > 0, b_q, 0.0).to(b_q.dtype), tl.trans(b_k), input_precision="ieee")
        b_s += tl.dot(tl.where(b_q < 0, b_q, 0.0).to(b_q.dtype), tl.trans(b_l), input_precision="ieee")
    else:
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    p_s = s + (i_b.to(tl.int64) * kv_heads * GROUP + head.to(tl.int64)[:, None]) * room + o_n[None, :]
    tl.store(p_s, b_s * scale, mask=m_m[:, None] & (o_n < n_blocks)[None, :])


@triton.jit
def select_kernel(s, table, lengths, rules, entries, kept, counts, n_blocks, room, kv_heads, size,
                  GROUP: tl.constexpr, GP: tl.constexpr, NB: tl.constexpr, GROUPED: tl.constexpr, TAIL: tl.constexpr):
    """The list of one key head, and `rules` [B, Hq, 3]: that a head sees every key from where the last block that it could have chosen
    ends. `table` [Hq, 3] int32: blocks to keep (0: this head does not choose), first ones always, keys of the window.
    """
    i_b = tl.program_id(0) // kv_heads
    i_g = tl.program_id(0) % kv_heads
    o_h = tl.arange(0, GP)
    o_n = tl.arange(0, NB)
    head = i_g * GROUP + o_h
    m_h = o_h < GROUP
    length = tl.load(lengths + i_b)
    keep = tl.load(table + head * 3, mask=m_h, other=0)
    first = tl.load(table + head * 3 + 1, mask=m_h, other=0)
    window = tl.load(table + head * 3 + 2, mask=m_h, other=0)
    count = tl.maximum(length - window, 0) // size
    last = count
    chooses = keep > 0
    o_c = tl.arange(0, 4)[None, :]
    p_r = rules + (i_b * kv_heads * GROUP + head)[:, None] * 3 + o_c
    tl.store(p_r, tl.where(o_c == 2, (count * size)[:, None], 0), mask=m_h[:, None] & (o_c < 3))

    b_s = tl.load(s + (i_b.to(tl.int64) * kv_heads * GROUP + head.to(tl.int64)[:, None]) * n_blocks + o_n[None, :],
                  mask=m_h[:, None] & (o_n < n_blocks)[None, :], other=0.0)
    if GROUPED:  # one choice for all: by the mean of the heads' weights; their rules are the same
        most = tl.max(tl.where(chooses, count, 0))
        there = m_h[:, None] & (o_n < most)[None, :]
        b_w = tl.where(there, b_s, -float("inf"))
        top = tl.max(b_w, 1)
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(tl.exp(b_w - top[:, None]), 1)
        b_w = b_w - (top + tl.log(tl.where(total > 0.0, total, 1.0)))[:, None]  # logs, since small weights are told apart too
        best = tl.max(b_w, 0)
        best = tl.where(best == -float("inf"), 0.0, best)
        b_w = best + tl.log(tl.sum(tl.exp(b_w - best[None, :]), 0))
        b_s = b_w[None, :]
        mask = tl.sum(tl.where(chooses, 1 << o_h, 0))
        keep = tl.max(keep) + tl.zeros([1], tl.int32)
        first = tl.max(tl.where(chooses, first, 0)) + tl.zeros([1], tl.int32)
        count = most + tl.zeros([1], tl.int32)
    # scores as whole numbers in the same order; what is always kept above all, what is not there below
    b_x = (b_s + 0.0).to(tl.int32, bitcast=True)
    b_x = b_x ^ ((b_x >> 31) & 0x7FFFFFFF)
    b_x = tl.where(o_n[None, :] < first[:, None], 0x7FFFFFFF, b_x)
    b_x = tl.where(o_n[None, :] < count[:, None], b_x, -0x80000000)
    want = tl.minimum(keep, count)
    forced = tl.minimum(first, count)
    # `above_low` numbers, as many as are wanted or more, lie above `low`, and `above_high`, fewer, above `high`
    plain = (o_n[None, :] < count[:, None]) & (o_n[None, :] >= first[:, None])
    low = tl.min(tl.where(o_n[None, :] < count[:, None], b_x, 0x7FFFFFFF), 1) - 1
    high = tl.where(want <= forced, 0x7FFFFFFF, tl.max(tl.where(plain, b_x, -0x80000000), 1))
    above_low = count
    above_high = tl.where(want <= forced, 0, forced)
    open_ = (want > 0) & (high - 1 > low)
    turn = 0
    while tl.max(open_.to(tl.int32)) > 0:
        # where the count would fall were the scores between spread evenly, and every second time the middle
        share = (above_low - want).to(tl.float32) / tl.maximum(above_low - above_high, 1).to(tl.float32)
        f_low = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        f_high = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        middle = ((f_low + share * (f_high - f_low)) + 0.0).to(tl.int32, bitcast=True)
        middle = middle ^ ((middle >> 31) & 0x7FFFFFFF)
        halved = (low >> 1) + (high >> 1) + (low & high & 1)
        middle = tl.where((turn % 2 == 0) & (middle > low) & (middle < high), middle, halved)
        above = tl.sum((b_x > middle[:, None]).to(tl.int32), 1)
        lower = open_ & (above <= want)
        upper = open_ & (above >= want)
        high = tl.where(lower, middle, high)
        above_high = tl.where(lower, above, above_high)
        low = tl.where(upper, middle, low)
        above_low = tl.where(upper, above, above_low)
        open_ = open_ & (high - 1 > low)
        turn += 1
    chosen = b_x > high[:, None]
    more = want - tl.sum(chosen.to(tl.int32), 1)
    equal = b_x == high[:, None]
    if tl.max(more) > 0:  # of equal scores the first ones
        chosen = chosen | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= more[:, None]))
    chosen = chosen & (want > 0)[:, None]
    if GROUPED:
        b_b = tl.sum(chosen.to(tl.int32), 0) * mask
    else:
        b_b = tl.sum(chosen.to(tl.int32) << o_h[:, None], 0)
    here = b_b != 0
    place = tl.cumsum(here.to(tl.int32), 0) - 1
    at = tl.program_id(0).to(tl.int64) * room + place
    tl.store(entries + at, o_n, mask=here)
    tl.store(kept + at, b_b, mask=here)
    listed = tl.sum(here.to(tl.int32))
    if TAIL > 0:  # and the blocks that the windows lie in, for who sees them
        begin = tl.min(tl.where(chooses, last, 0x7FFFFFFF))
        o_t = tl.arange(0, TAIL)
        in_tail = ((begin + o_t) * size < length) & (tl.max(chooses.to(tl.int32)) > 0)
        b_t = tl.sum((chooses[:, None] & ((begin + o_t)[None, :] >= last[:, None])).to(tl.int32) << o_h[:, None], 0)
        at = tl.program_id(0).to(tl.int64) * room + listed + o_t
        tl.store(entries + at, begin + o_t, mask=in_tail)
        tl.store(kept + at, b_t, mask=in_tail)
        listed += tl.sum(in_tail.to(tl.int32))
    tl.store(counts + tl.program_id(0), listed)

# fmt: on


def can_select(blocks: int, group: int) -> bool:
    """Whether one program holds the scores of this many blocks."""
    return max(32, _power(blocks)) * _power(group) <= LARGEST


def stand_scores(q: Tensor, stands: Tensor, blocks: int, scale: float, bounds: bool) -> Tensor:
    """[B, Hq, blocks] float32: scores of q [B, Hq, D] with what stands for the first `blocks` blocks: stands [B, Hkv, n, D] mean keys, or
    with `bounds` [B, Hkv, n, 2 D] largest and smallest coordinates. Both contiguous along D.
    """
    batch, heads, width = q.shape
    kv_heads = stands.shape[1]
    out = torch.empty(batch, heads, max(1, blocks), dtype=torch.float32, device=q.device)
    tile = 32 if bounds else 64
    stand_in_scores[(max(1, cdiv(blocks, tile)), batch * kv_heads)](
        q, stands, out, q.stride(0), q.stride(1), stands.stride(0), stands.stride(1), stands.stride(2), blocks, out.shape[2], kv_heads,
        scale, GROUP=heads // kv_heads, M=padded(heads // kv_heads), D=width, DP=padded(width), BN=tile, BOUNDS=bounds, UPCAST=INTERPRETED,
        num_warps=4,
    )  # fmt: skip
    return out


def select_blocks(
    scores: Tensor, kv_heads: int, table: Tensor, lengths: Tensor, size: int, grouped: bool, window: int = 0
) -> tuple[KeyLists, Tensor]:
    """(lists of the chosen blocks of `size` keys, rules [B, Hq, 3] int32: from where a head keeps every key) by scores [B, Hq, n] float32.

    `table` [Hq, 3] int32 per head: how many blocks it keeps, 0 where it does not choose, how many first ones always, and the keys of its
    window, before which a block must end; `lengths` [B] int32. `grouped`: the heads of a key head, whose rows of `table` are equal where
    they are not 0, choose the blocks of the largest mean softmax of the scores. With `window` above 0, the largest of the table, the blocks
    behind the chosen ones are listed too, so that the lists say all that this one row sees.
    """
    batch, heads, blocks = scores.shape
    group, device = heads // kv_heads, scores.device
    tail = _power(window // size + 3) if window else 0
    found, kept = (torch.empty(batch, kv_heads, blocks + tail, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=device)
    rules = torch.empty(batch, heads, 3, dtype=torch.int32, device=device)
    elements = _power(blocks) * _power(group)
    select_kernel[(batch * kv_heads,)](
        scores, table, lengths, rules, found, kept, counts, blocks, blocks + tail, kv_heads, size,
        GROUP=group, GP=_power(group), NB=max(32, _power(blocks)), GROUPED=grouped, TAIL=tail, num_warps=warps_for(elements),
    )  # fmt: skip
    return KeyLists(found, kept, counts, size), rules


def warps_for(elements: int) -> int:
    """Warps of the program that holds so many scores: few, for every step of the search waits on all of them."""
    return 16 if elements > 1 << 14 else 8 if elements > 1 << 12 else 4


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
