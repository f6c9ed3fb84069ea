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

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from headscope.kernels.triton_common import INTERPRETED, soft_cap
from headscope.kernels.triton_gather import _bias, _visible
from headscope.kernels.triton_host import cdiv, padded
from headscope.kernels.triton_launch import Tile
from headscope.kernels.triton_run import Run, empty, poisoned

if TYPE_CHECKING:
    from torch import Tensor

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


@triton.jit(do_not_specialize=["Nq", "Nk", "stride_ib", "stride_cb", "stride_ch", "Hq", "group"])
def masses_kernel(q, k, lse, columns, count, codes, out, weak, lo, hi, key_valid, q_segments, k_segments, allowed, bias,
                  stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_ib,
                  stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, stride_cb, stride_ch,
                  scale2, slope, cap2, Hq, group, Nq, Nk,
                  SETS: tl.constexpr, WEAK: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """out [SETS, B, Hq, Nq] = mass of each row on the keys whose code has bit g; `columns` [count] int32: the keys with any bit.

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
    if WEAK:
        n = last
    else:
        n = tl.load(count)
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
                   stride_bb, stride_bh, stride_bq, stride_bk, stride_cb, stride_ch, scale2, slope, cap2, Hq, group, Nq, Nk,
                   SETS: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                   DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
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
    # one weak row, and the whole tile is summed over all keys
    b_weak = tl.load(weak + row + o_i, mask=m_i & (b_base == b_base), other=0)
    everything = tl.max(b_weak.to(tl.int32))
    last = tl.max(b_hi)
    n = tl.load(count)
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


def listed(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(keys [Nk] int32, ascending, count [1] int32) of the keys that have a code in any head or sequence, without asking the device."""
    named = codes.flatten(0, 1).ne(0).any(0)
    place = named.cumsum(0)
    size = len(named)
    keys = torch.zeros(size + 1, dtype=torch.int32, device=codes.device)
    index = torch.arange(size, dtype=torch.int32, device=codes.device)
    keys.scatter_(0, torch.where(named, place - 1, size), index)
    return keys, place[-1:].to(torch.int32)


def masses(call: AttentionCall, lse: Tensor, codes: Tensor, sets: int, keys: tuple[Tensor, Tensor]) -> Tensor:
    """[sets, B, Hq, Nq] float32: each row's mass on the keys with bit 0, 1, 2 of `codes` int8 [1 or B, 1 or Hq, Nk]; NaN where lse is.

    `keys`: `listed(codes)`. `lse` [B, Hq, Nq] in nats.
    """
    out = empty(call.q, sets, *call.q.shape[:3])
    _masses(call, lse, codes, sets, keys, out, None)
    return out


def direct_masses(call: AttentionCall, lse: Tensor, codes: Tensor, mass: Tensor, weak: Tensor) -> Tensor:
    """`mass` [B, Hq, Nq] with its `weak` rows, bool [B, Hq, Nq], summed over every key with bit 0 of `codes`, in place: where it was found
    as one minus nearly one, its digits are rounding."""
    none = torch.zeros(1, dtype=torch.int32, device=call.q.device)
    _masses(call, lse, codes, 1, (none, none), mass, weak.to(torch.int8).contiguous())
    return mass


def _masses(
    call: AttentionCall, lse: Tensor, codes: Tensor, sets: int, keys: tuple[Tensor, Tensor], out: Tensor, weak: Tensor | None
) -> None:
    run, tile = Run(call, None), _tile(call)
    with torch.cuda.device(call.q.device if call.q.is_cuda else -1):
        masses_kernel[cdiv(run.rows, tile.rows), run.heads, run.batch](
            call.q, call.k, lse.to(torch.float32).contiguous(), *keys, codes, out, codes if weak is None else weak, *run.mask_pointers(),
            *call.q.stride(), *call.k.stride(), *run.mask_strides(), *_code_strides(codes), *run.scales, run.heads, call.group, run.rows,
            run.keys, SETS=sets, WEAK=weak is not None, ELEMENT=run.seen.element, SOFTCAP=run.softcap, D=run.width,
            DP=padded(run.width), BM=tile.rows, BN=tile.keys, UPCAST=run.upcast, **tile.options,
        )  # fmt: skip


def shifted(
    call: AttentionCall, lse: Tensor, output: Tensor, heads: Tensor, base: Tensor, factors: tuple[Tensor, ...], weak: Tensor, codes: Tensor,
    keys: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """`output` [B, Nq, H, Dv] with sum_j f A v_j for its heads `heads` int64 [Hq], on a copy; see the module.

    `call`: of these heads alone. `base` [B, Hq, Nq]: b, NaN on rows that are left alone. `factors`: f of keys with bit 0 of `codes`, and of
    the others with bit 1, [B, Hq, Nq] each. `weak` bool [B, Hq, Nq].
    """
    assert call.v is not None
    run = Run(call, None)
    new = poisoned(torch.empty_like(output)) if run.heads == output.shape[2] else output.clone()
    first, second = factors[0].contiguous(), factors[-1].contiguous()
    tile = _tile(call)
    with torch.cuda.device(call.q.device if call.q.is_cuda else -1):
        shifted_kernel[cdiv(run.rows, tile.rows), run.heads, run.batch](
            call.q, call.k, call.v, lse.to(torch.float32).contiguous(), output, new, heads, base.contiguous(),
            weak.to(torch.int8).contiguous(), first, second, *keys, codes, *run.mask_pointers(), *call.q.stride(), *call.k.stride(),
            *call.v.stride(), *output.stride(), *new.stride(), *run.mask_strides(), *_code_strides(codes), *run.scales, run.heads,
            call.group, run.rows, run.keys, SETS=len(factors), ELEMENT=run.seen.element, SOFTCAP=run.softcap, D=run.width,
            DP=padded(run.width), DV=call.v.shape[3], DVP=padded(call.v.shape[3]), BM=tile.rows, BN=tile.keys, UPCAST=run.upcast,
            **tile.options,
        )  # fmt: skip
    return new


def _tile(call: AttentionCall) -> Tile:
    width = max(call.q.shape[3], 1 if call.v is None else call.v.shape[3])
    if INTERPRETED:
        return Tile(64, 64)
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(128, 64, 8, 2) if width <= 128 and call.q.shape[2] > 64 else Tile(64, 32, 4, 2)


def _code_strides(codes: Tensor) -> tuple[int, int]:
    return 0 if codes.shape[0] == 1 else codes.stride(0), 0 if codes.shape[1] == 1 else codes.stride(1)


__all__ = ["direct_masses", "listed", "masses", "masses_kernel", "shifted", "shifted_kernel"]
