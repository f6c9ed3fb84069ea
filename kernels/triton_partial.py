"""A fold in two kernels: how much of each row rests on a few key sets, and the output with these sets given other weights.

    masses     m_g,i = sum_{j in set g} A_ij
    shifted    z'_i  = sum_j f_ij A_ij v_j,      f_ij the row's factor of the set that j is in, b_i for keys in none
                     = b_i z_i + sum_{j in sets} (f_ij - b_i) A_ij v_j

With lse and z known from the fused attention kernel both visit the keys of the sets and no others, O(N |X| d), and no row-by-key tensor
ever leaves the chip. Between the two the caller decides, from the masses, what each row's factors are. The naive twin is
`headscope.kernels.shifted.naive_shifted`.

Nothing here waits for the device: the keys are compacted on it and the kernels read their number from memory, so that the host, several
layers ahead, stays ahead. Where b_i is so large that z's rounding would show (`weak` rows) a tile sums over all keys instead, the first
form of the same sum. Rows with b_i = NaN keep z to the bit.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.triton_common import INTERPRETED, soft_cap
from headscope.kernels.triton_gather import _bias, _visible
from headscope.kernels.triton_host import cdiv, padded
from headscope.kernels.triton_launch import Tile
from headscope.kernels.triton_run import Run, empty, poisoned

if TYPE_CHECKING:
    from headscope.call import AttentionCall

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _weights(b_q, o_i, o_j, m_j, b_lo, b_hi, b_lse, k, i_b, i_h, i_kv, lo, hi, key_valid, q_segments, k_segments, allowed, bias,
             stride_kb, stride_kn, stride_kd, stride_kh, stride_ib, stride_ab, stride_ah, stride_aq, stride_ak,
             stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope, cap2, Nq, Nk,
             ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr):
    """A of a tile, [BM, BN], given lse in log2 units; 0 where hidden."""
    o_d = tl.arange(0, DP)
    p_k = k + i_b.to(tl.int64) * stride_kb + i_kv.to(tl.int64) * stride_kh + o_j.to(tl.int64)[:, None] * stride_kn
    # [BN, DP]
    b_k = tl.load(p_k + o_d[None, :] * stride_kd, mask=m_j[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    # [BM, BN]
    b_y = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if SOFTCAP:
        b_y = soft_cap(b_y, slope, cap2)
    else:
        b_y = b_y * scale2
    if ELEMENT & 8:
        b_y += _bias(i_b, i_h, o_i[:, None], o_j[None, :], Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk)
    m_s = m_j[None, :] & (o_j[None, :] >= b_lo[:, None]) & (o_j[None, :] < b_hi[:, None])
    if ELEMENT & 7:
        m_s = _visible(m_s, i_b, i_h, o_i[:, None], o_j[None, :], Nq, Nk, lo, hi, key_valid, q_segments, k_segments, allowed,
                       stride_ib, stride_ab, stride_ah, stride_aq, stride_ak, ELEMENT)
    return tl.where(m_s, tl.exp2(b_y - b_lse[:, None]), 0.0)


@triton.jit(do_not_specialize=["Nk", "lists"])
def list_kernel(codes, columns, count, Nk, stride_cb, stride_ch, lists, BN: tl.constexpr):
    """columns [lists per sequence x B, Nk] int32: the keys with a code, ascending; count: how many. One program per list."""
    i_l = tl.program_id(0)
    p_c = codes + (i_l // lists).to(tl.int64) * stride_cb + (i_l % lists).to(tl.int64) * stride_ch
    p_o = columns + i_l.to(tl.int64) * Nk
    n = tl.program_id(0) * 0
    for at in range(0, Nk, BN):
        o_j = at + tl.arange(0, BN)
        b_m = (tl.load(p_c + o_j, mask=o_j < Nk, other=0) != 0).to(tl.int32)
        tl.store(p_o + n + tl.cumsum(b_m, 0) - 1, o_j, mask=b_m != 0)
        n += tl.sum(b_m)
    tl.store(count + i_l, n)


@triton.jit
def factors_kernel(m_s, m_t, gate, rows, base, kept, grown, keep, size, Nq, rows_each, stride_rb,
                   OTHERS: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr):
    """What a redistribution multiplies the weights of a row by: those of its source, of its target, and all others; [B, h, Nq] each.

    A row changes where its target holds something (1e-12, `p_site.EPSILON`), its source does, `gate` says so and it is among `rows`;
    elsewhere base is NaN.
    """
    o_x = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_x = o_x < size
    b_s = tl.load(m_s + o_x, mask=m_x, other=0.0)
    b_t = tl.load(m_t + o_x, mask=m_x, other=0.0)
    m_c = (b_t >= 1e-12) & (b_s > 0.0)
    if GATE:
        m_c = m_c & (tl.load(gate + o_x, mask=m_x, other=0) != 0)
    b_g = 1.0 + tl.where(m_c, (1.0 - keep) * b_s / tl.where(m_c, b_t, 1.0), 0.0)
    m_e = m_c
    if ROWS:
        m_e = m_e & (tl.load(rows + (o_x // rows_each) * stride_rb + o_x % Nq, mask=m_x, other=0) != 0)
    if OTHERS:
        b_b = b_g
    else:
        b_b = b_g * 0.0 + 1.0
    tl.store(base + o_x, tl.where(m_e, b_b, float("nan")), mask=m_x)
    tl.store(kept + o_x, tl.where(m_c, keep, 1.0), mask=m_x)
    tl.store(grown + o_x, b_g, mask=m_x)


@triton.jit(do_not_specialize=["Nq", "Nk", "stride_ib", "stride_cb", "stride_ch", "Hq", "group"])
def masses_kernel(q, k, lse, columns, count, codes, out, weak, lo, hi, key_valid, q_segments, k_segments, allowed, bias,
                  stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_ib,
                  stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, stride_cb, stride_ch,
                  stride_lb, stride_lh, scale2, slope, cap2, Hq, group, Nq, Nk,
                  SETS: tl.constexpr, WEAK: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """out [SETS, B, Hq, Nq] = mass of each row on the keys whose code has bit g; `columns`: lists of the keys with any bit.

    WEAK: only rows that are `weak` [B, Hq, Nq] int8 are written, and tiles without one left at once; all keys are visited.
    """
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    o_i = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    m_i = o_i < Nq
    row = (i_b.to(tl.int64) * Hq + i_h) * Nq
    m_o = m_i
    if WEAK:
        # where no row is weak nothing more is read
        m_o = tl.load(weak + row + o_i, mask=m_i, other=0) != 0
        m_i = m_i & (tl.max(m_o.to(tl.int32)) > 0)
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + o_i.to(tl.int64)[:, None] * stride_qn
    # [BM, DP]
    b_q = tl.load(p_q + o_d[None, :] * stride_qd, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_lo = tl.load(lo + i_b.to(tl.int64) * stride_ib + o_i, mask=m_i, other=0)
    b_hi = tl.load(hi + i_b.to(tl.int64) * stride_ib + o_i, mask=m_i, other=0)
    b_lse = tl.load(lse + row + o_i, mask=m_i, other=float("inf")) * 1.4426950408889634
    p_c = codes + i_b.to(tl.int64) * stride_cb + i_h.to(tl.int64) * stride_ch
    last = tl.max(b_hi)
    i_l = i_b * stride_lb + i_h * stride_lh
    columns += i_l.to(tl.int64) * Nk
    if WEAK:
        n = last
    else:
        n = tl.load(count + i_l)
    b_0 = tl.zeros([BM], tl.float32)
    b_1 = tl.zeros([BM], tl.float32)
    b_2 = tl.zeros([BM], tl.float32)
    for at in range(0, n, BN):
        o_x = at + tl.arange(0, BN)
        m_j = o_x < n
        if WEAK:
            first = at
            o_j = o_x
        else:
            first = tl.load(columns + at)
            o_j = tl.load(columns + o_x, mask=m_j, other=0)
        if first < last:
            b_c = tl.load(p_c + o_j, mask=m_j, other=0)
            b_p = _weights(b_q, o_i, o_j, m_j, b_lo, b_hi, b_lse, k, i_b, i_h, i_h // group, lo, hi, key_valid, q_segments, k_segments,
                           allowed, bias, stride_kb, stride_kn, stride_kd, stride_kh, stride_ib, stride_ab, stride_ah, stride_aq,
                           stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope, cap2, Nq, Nk,
                           ELEMENT, SOFTCAP, D, DP, UPCAST)
            b_0 += tl.sum(tl.where((b_c & 1)[None, :] != 0, b_p, 0.0), 1)
            if SETS > 1:
                b_1 += tl.sum(tl.where((b_c & 2)[None, :] != 0, b_p, 0.0), 1)
            if SETS > 2:
                b_2 += tl.sum(tl.where((b_c & 4)[None, :] != 0, b_p, 0.0), 1)
    # a row that does not count has no masses either
    b_n = tl.where(b_lse == b_lse, 0.0, float("nan"))
    size = tl.num_programs(2).to(tl.int64) * Hq * Nq
    tl.store(out + row + o_i, b_0 + b_n, mask=m_o)
    if SETS > 1:
        tl.store(out + size + row + o_i, b_1 + b_n, mask=m_o)
    if SETS > 2:
        tl.store(out + 2 * size + row + o_i, b_2 + b_n, mask=m_o)


@triton.jit(do_not_specialize=["Nq", "Nk", "stride_ib", "stride_cb", "stride_ch", "Hq", "group"])
def shifted_kernel(q, k, v, lse, z, new, heads, base, weak, f_1, f_2, columns, count, codes, lo, hi, key_valid, q_segments, k_segments,
                   allowed, bias, stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
                   stride_vb, stride_vh, stride_vn, stride_vd, stride_zb, stride_zn, stride_zh, stride_zd,
                   stride_nb, stride_nn, stride_nh, stride_nd, stride_ib, stride_ab, stride_ah, stride_aq, stride_ak,
                   stride_bb, stride_bh, stride_bq, stride_bk, stride_cb, stride_ch, stride_lb, stride_lh, scale2, slope, cap2, Hq, group,
                   Nq, Nk, SETS: tl.constexpr, WEAK: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr,
                   DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """new [B, Nq, H, Dv] at heads[i_h] = sum_j f A v_j; f = f_1 on keys with bit 0, f_2 on others with bit 1, base elsewhere.

    base, f_1, f_2 [B, Hq, Nq] float32, weak [B, Hq, Nq] int8.
    """
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    o_i = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    o_v = tl.arange(0, DVP)
    m_i = o_i < Nq
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + o_i.to(tl.int64)[:, None] * stride_qn
    # [BM, DP]
    b_q = tl.load(p_q + o_d[None, :] * stride_qd, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_lo = tl.load(lo + i_b.to(tl.int64) * stride_ib + o_i, mask=m_i, other=0)
    b_hi = tl.load(hi + i_b.to(tl.int64) * stride_ib + o_i, mask=m_i, other=0)
    row = (i_b.to(tl.int64) * Hq + i_h) * Nq
    b_lse = tl.load(lse + row + o_i, mask=m_i, other=float("inf")) * 1.4426950408889634
    b_base = tl.load(base + row + o_i, mask=m_i, other=float("nan"))
    b_f1 = tl.load(f_1 + row + o_i, mask=m_i, other=0.0)
    b_f2 = b_f1
    if SETS > 1:
        b_f2 = tl.load(f_2 + row + o_i, mask=m_i, other=0.0)
    everything = i_b * 0
    if WEAK:
        # one weak row, and the whole tile is summed over all keys
        b_weak = tl.load(weak + row + o_i, mask=m_i & (b_base == b_base), other=0)
        everything = tl.max(b_weak.to(tl.int32))
    last = tl.max(b_hi)
    i_l = i_b * stride_lb + i_h * stride_lh
    columns += i_l.to(tl.int64) * Nk
    n = tl.load(count + i_l)
    if everything > 0:
        n = last
    # what a key that is listed loses of what z holds of it
    b_less = tl.where(everything > 0, 0.0, b_base)
    p_c = codes + i_b.to(tl.int64) * stride_cb + i_h.to(tl.int64) * stride_ch
    i_kv = i_h // group
    p_v = v + i_b.to(tl.int64) * stride_vb + i_kv.to(tl.int64) * stride_vh
    # [BM, DVP]
    b_o = tl.zeros([BM, DVP], tl.float32)
    for at in range(0, n, BN):
        o_x = at + tl.arange(0, BN)
        m_j = o_x < n
        first = at
        o_j = o_x
        if everything == 0:
            first = tl.load(columns + at)
            o_j = tl.load(columns + o_x, mask=m_j, other=0)
        if first < last:
            b_c = tl.load(p_c + o_j, mask=m_j, other=0)
            b_p = _weights(b_q, o_i, o_j, m_j, b_lo, b_hi, b_lse, k, i_b, i_h, i_kv, lo, hi, key_valid, q_segments, k_segments,
                           allowed, bias, stride_kb, stride_kn, stride_kd, stride_kh, stride_ib, stride_ab, stride_ah, stride_aq,
                           stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope, cap2, Nq, Nk,
                           ELEMENT, SOFTCAP, D, DP, UPCAST)
            b_f = b_base[:, None]
            if SETS > 1:
                b_f = tl.where((b_c & 2)[None, :] != 0, b_f2[:, None], b_f)
            b_f = tl.where((b_c & 1)[None, :] != 0, b_f1[:, None], b_f) - b_less[:, None]
            # [BN, DVP]
            m_v = m_j
            if ELEMENT & 1:
                # what padding holds must not reach a sum, NaN least of all
                m_v = m_v & (tl.load(key_valid + i_b.to(tl.int64) * Nk + o_j, mask=m_j, other=0) != 0)
            b_v = tl.load(p_v + o_j.to(tl.int64)[:, None] * stride_vn + o_v[None, :] * stride_vd,
                          mask=m_v[:, None] & (o_v < DV)[None, :], other=0.0)
            if UPCAST:
                b_v = b_v.to(tl.float32)
            b_o += tl.dot((b_p * b_f).to(b_v.dtype), b_v, input_precision="ieee")
    i_to = tl.load(heads + i_h)
    m_z = m_i[:, None] & (o_v < DV)[None, :]
    p_z = z + i_b.to(tl.int64) * stride_zb + i_to * stride_zh + o_i.to(tl.int64)[:, None] * stride_zn + o_v[None, :] * stride_zd
    b_z = tl.load(p_z, mask=m_z, other=0.0)
    b_n = b_less[:, None] * b_z.to(tl.float32) + b_o
    p_n = new + i_b.to(tl.int64) * stride_nb + i_to * stride_nh + o_i.to(tl.int64)[:, None] * stride_nn + o_v[None, :] * stride_nd
    tl.store(p_n, tl.where((b_base == b_base)[:, None], b_n.to(b_z.dtype), b_z), mask=m_z)


# fmt: on


class Lists(NamedTuple):
    """Lists of keys: `keys` [lists, Nk] int32, `number` [lists] int32 how many are in each; `of_batch`, `of_head`: how far apart the lists
    of two sequences and of two heads are."""

    keys: Tensor
    number: Tensor
    of_batch: int
    of_head: int


def listed(codes: Tensor) -> Lists:
    """The keys that have a code, for every sequence and head that has codes of its own; without asking the device."""
    batch, heads, size = codes.shape
    keys = torch.empty(batch * heads, size, dtype=torch.int32, device=codes.device)
    count = torch.empty(batch * heads, dtype=torch.int32, device=codes.device)
    with torch.cuda.device(codes.device if codes.is_cuda else -1):
        list_kernel[(batch * heads,)](codes, keys, count, size, codes.stride(0), codes.stride(1), heads, BN=1024, num_warps=4)
    return Lists(keys, count, 0 if batch == 1 else heads, 0 if heads == 1 else 1)


def factors(m_s: Tensor, m_t: Tensor, keep: float, gate: Tensor | None, rows: Tensor | None, others: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(base, kept, grown) [B, h, Nq] float32 of a redistribution that leaves the source `keep`; see `factors_kernel`.

    `gate` bool [B, h, Nq], `rows` bool [1 or B, Nq]; `others`: the target is every key that has no code.
    """
    base, kept, grown = (empty(m_s, *m_s.shape) for _ in range(3))
    _, heads, count = m_s.shape
    gate = None if gate is None else gate.expand(m_s.shape).contiguous()
    rows = None if rows is None else rows.contiguous()
    with torch.cuda.device(m_s.device if m_s.is_cuda else -1):
        factors_kernel[(cdiv(m_s.numel(), 1024),)](
            m_s, m_t, m_s if gate is None else gate, m_s if rows is None else rows, base, kept, grown, keep, m_s.numel(), count,
            heads * count, 0 if rows is None or len(rows) == 1 else count, OTHERS=others, GATE=gate is not None, ROWS=rows is not None,
            BN=1024, num_warps=4,
        )  # fmt: skip
    return base, kept, grown


def masses(call: AttentionCall, lse: Tensor, codes: Tensor, sets: int, keys: Lists) -> Tensor:
    """[sets, B, Hq, Nq] float32: each row's mass on the keys with bit 0, 1, 2 of `codes` int8 [1 or B, 1 or Hq, Nk]; NaN where lse is.

    `keys`: `listed(codes)`. `lse` [B, Hq, Nq] in nats.
    """
    out = empty(call.q, sets, *call.q.shape[:3])
    _masses(call, lse, codes, sets, keys, out, None)
    return out


def direct_masses(call: AttentionCall, lse: Tensor, codes: Tensor, mass: Tensor, weak: Tensor) -> Tensor:
    """`mass` [B, Hq, Nq] with its `weak` rows, bool [B, Hq, Nq], summed over every key with bit 0 of `codes`, in place: where it was found
    as one minus nearly one, its digits are rounding."""
    none = weak.view(torch.int8)  # no list is read
    _masses(call, lse, codes, 1, Lists(none, none, 0, 0), mass, none)
    return mass


def _masses(call: AttentionCall, lse: Tensor, codes: Tensor, sets: int, keys: Lists, out: Tensor, weak: Tensor | None) -> None:
    run, tile = Run(call, None), _tile(call)
    with torch.cuda.device(call.q.device if call.q.is_cuda else -1):
        masses_kernel[cdiv(run.rows, tile.rows), run.heads, run.batch](
            call.q, call.k, lse.to(torch.float32).contiguous(), keys.keys, keys.number, codes, out, codes if weak is None else weak,
            *run.mask_pointers(), *call.q.stride(), *call.k.stride(), *run.mask_strides(), *_code_strides(codes), keys.of_batch,
            keys.of_head, *run.scales, run.heads, call.group, run.rows, run.keys, SETS=sets, WEAK=weak is not None,
            ELEMENT=run.seen.element, SOFTCAP=run.softcap, D=run.width, DP=padded(run.width), BM=tile.rows, BN=tile.keys,
            UPCAST=run.upcast, **tile.options,
        )  # fmt: skip


def shifted(
    call: AttentionCall, lse: Tensor, output: Tensor, heads: Tensor, base: Tensor, factors: tuple[Tensor, ...], weak: Tensor | None,
    codes: Tensor, keys: Lists,
) -> Tensor:  # fmt: skip
    """`output` [B, Nq, H, Dv] with sum_j f A v_j for its heads `heads` int64 [Hq], on a copy; see the module.

    `call`: of these heads alone. `base` [B, Hq, Nq]: b, NaN on rows that are left alone. `factors`: f of keys with bit 0 of `codes`, and of
    the others with bit 1, [B, Hq, Nq] each. `weak` bool [B, Hq, Nq]; None: no row is.
    """
    assert call.v is not None
    run = Run(call, None)
    new = poisoned(torch.empty_like(output)) if run.heads == output.shape[2] else output.clone()
    first, second = factors[0].contiguous(), factors[-1].contiguous()
    tile, flags = _tile(call), codes if weak is None else weak.contiguous().view(torch.int8)
    with torch.cuda.device(call.q.device if call.q.is_cuda else -1):
        shifted_kernel[cdiv(run.rows, tile.rows), run.heads, run.batch](
            call.q, call.k, call.v, lse.to(torch.float32).contiguous(), output, new, heads, base.contiguous(),
            flags, first, second, keys.keys, keys.number, codes, *run.mask_pointers(), *call.q.stride(), *call.k.stride(),
            *call.v.stride(), *output.stride(), *new.stride(), *run.mask_strides(), *_code_strides(codes), keys.of_batch, keys.of_head,
            *run.scales, run.heads, call.group, run.rows, run.keys, SETS=len(factors), WEAK=weak is not None, ELEMENT=run.seen.element,
            SOFTCAP=run.softcap, D=run.width, DP=padded(run.width), DV=call.v.shape[3], DVP=padded(call.v.shape[3]), BM=tile.rows,
            BN=tile.keys, UPCAST=run.upcast, **tile.options,
        )  # fmt: skip
    return new


def _tile(call: AttentionCall) -> Tile:
    width = max(call.q.shape[3], 1 if call.v is None else call.v.shape[3])
    if INTERPRETED:
        return Tile(64, 64)
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(128, 32, 4, 2) if width <= 128 and call.q.shape[2] > 64 else Tile(64, 32, 4, 2)


def _code_strides(codes: Tensor) -> tuple[int, int]:
    return 0 if codes.shape[0] == 1 else codes.stride(0), 0 if codes.shape[1] == 1 else codes.stride(1)


__all__ = [
    "Lists",
    "direct_masses",
    "factors",
    "factors_kernel",
    "list_kernel",
    "listed",
    "masses",
    "masses_kernel",
    "shifted",
    "shifted_kernel",
]
