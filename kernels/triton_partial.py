"""A redistribution in one kernel: attention on some keys is cut, and what is freed goes to others, given the rows' lse and the output z.

    m_S = sum_{j in S} A_ij,  z_S = sum_{j in S} A_ij v_j,  the same for T
    z' = z - (1 - keep) z_S + (1 - keep) (m_S / m_T) z_T

A program owns a tile of rows of one head and visits the keys of the sets and no others, O(N |X| d); masses and sums stay on the chip until
the row's factors are known, so each key is read once and no row-by-key tensor exists. Where T is "all other keys", m_T and z_T are what is
left of the row. Where little is left (`weak` rows) rounding is all that a difference would hold, and the tile sums over all of those
keys instead. Rows that are not edited keep z to the bit. The naive twin is `headscope.kernels.shifted.naive_redistributed`.

Nothing here waits for the device: how many keys there are is read from memory by the kernel, so that the host, several layers ahead,
stays ahead.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

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
    from headscope.kernels.shifted import Gate
    from headscope.kernels.triton_keys import KeyLists

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off

NONE, GIVEN, ON_TARGET, ON_WATCHED = 0, 1, 2, 3
"""Kinds of gates in the kernel: none, a table of rows, a share of the target, a share of the watched keys."""


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


@triton.jit
def _over(begin, end, columns, p_c, p_v, b_q, o_i, b_lo, b_hi, b_lse, k, i_b, i_h, i_kv, lo, hi, key_valid, q_segments, k_segments,
          allowed, bias, stride_kb, stride_kn, stride_kd, stride_kh, stride_vn, stride_vd, stride_ib, stride_ab, stride_ah, stride_aq,
          stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope, cap2, Nq, Nk,
          LISTED: tl.constexpr, WATCH: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
          DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """(mass [BM], sum of A v [BM, DVP], mass on watched keys [BM]) over the keys columns[begin .. end], or, not LISTED, over the keys
    begin .. end that have no code."""
    o_v = tl.arange(0, DVP)
    b_m = tl.zeros([BM], tl.float32)
    b_w = tl.zeros([BM], tl.float32)
    b_z = tl.zeros([BM, DVP], tl.float32)
    o_n = begin + tl.arange(0, BN)
    if LISTED:
        o_n = tl.load(columns + o_n, mask=o_n < end, other=0)
    for at in range(begin, end, BN):
        o_x = at + tl.arange(0, BN)
        m_j = o_x < end
        if LISTED:
            # the list is read a step ahead, so that the keys' own loads do not wait for it
            o_j = o_n
            o_n = tl.load(columns + o_x + BN, mask=o_x + BN < end, other=0)
        else:
            o_j = o_x
            m_j = m_j & (tl.load(p_c + o_j, mask=m_j, other=1) == 0)
        b_p = _weights(b_q, o_i, o_j, m_j, b_lo, b_hi, b_lse, k, i_b, i_h, i_kv, lo, hi, key_valid, q_segments, k_segments, allowed, bias,
                       stride_kb, stride_kn, stride_kd, stride_kh, stride_ib, stride_ab, stride_ah, stride_aq, stride_ak,
                       stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope, cap2, Nq, Nk, ELEMENT, SOFTCAP, D, DP, UPCAST)
        b_m += tl.sum(b_p, 1)
        if WATCH:
            b_c = tl.load(p_c + o_j, mask=m_j, other=0)
            b_w += tl.sum(tl.where((b_c & 4)[None, :] != 0, b_p, 0.0), 1)
        m_v = m_j
        if ELEMENT & 1:
            # what padding holds must not reach a sum, NaN least of all
            m_v = m_v & (tl.load(key_valid + i_b.to(tl.int64) * Nk + o_j, mask=m_j, other=0) != 0)
        # [BN, DVP]
        b_v = tl.load(p_v + o_j.to(tl.int64)[:, None] * stride_vn + o_v[None, :] * stride_vd, mask=m_v[:, None] & (o_v < DV)[None, :],
                      other=0.0)
        if UPCAST:
            b_v = b_v.to(tl.float32)
        b_z += tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_m, b_z, b_w


@triton.jit(do_not_specialize=["Nq", "Nk", "stride_ib", "stride_cb", "stride_ch", "stride_lb", "stride_lh", "lists", "stride_rb", "Hq",
                               "group", "keep", "limit", "floor", "share"])
def redistribute_kernel(q, k, v, lse, z, new, kept, grown, heads, sinks, gate, rows, columns, upto, codes, lo, hi, key_valid, q_segments,
                        k_segments, allowed, bias, stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
                        stride_vb, stride_vh, stride_vn, stride_vd, stride_zb, stride_zn, stride_zh, stride_zd,
                        stride_nb, stride_nn, stride_nh, stride_nd, stride_ib, stride_ab, stride_ah, stride_aq, stride_ak,
                        stride_bb, stride_bh, stride_bq, stride_bk, stride_cb, stride_ch, stride_lb, stride_lh, lists, stride_rb,
                        scale2, slope, cap2, keep, limit, floor, share, Hq, group, Nq, Nk,
                        SECOND: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr, ELEMENT: tl.constexpr,
                        SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """new [B, Nq, H, Dv] at heads[i_h]: the rows redistributed. SECOND: 0 all keys without a code are the target, 1 so they are and the
    second set is left alone, 2 the second set is the target. `kept`, `grown` [B, Hq, Nq]: what the weights on source and target are
    multiplied with, 1 where a row does not change.

    A row changes where its target holds something (1e-12, `p_site.EPSILON`), its source does, the gate says so and it is among `rows`.
    `gate`: [B, Hq, Nq] int8 (GATE 1), or [B] float32 (3), see `shifted.Gate`. `sinks` [Hq]: logits that take part of each row.
    """
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    # the longest programs first
    i_q = tl.num_programs(0) - 1 - tl.program_id(0)
    o_i = i_q * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    o_v = tl.arange(0, DVP)
    m_i = o_i < Nq
    b64 = i_b.to(tl.int64)
    p_q = q + b64 * stride_qb + i_h.to(tl.int64) * stride_qh + o_i.to(tl.int64)[:, None] * stride_qn
    # [BM, DP]
    b_q = tl.load(p_q + o_d[None, :] * stride_qd, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_lo = tl.load(lo + b64 * stride_ib + o_i, mask=m_i, other=0)
    b_hi = tl.load(hi + b64 * stride_ib + o_i, mask=m_i, other=0)
    row = (b64 * Hq + i_h) * Nq
    b_lse = tl.load(lse + row + o_i, mask=m_i, other=float("inf")) * 1.4426950408889634
    # keys first .. last - 1 are all that the tile sees
    first = tl.min(tl.where(m_i & (b_hi > b_lo), b_lo, Nk))
    last = tl.max(b_hi)
    i_l = i_b * stride_lb + i_h * stride_lh
    p_l = columns + i_l.to(tl.int64) * Nk
    p_u = upto + i_l.to(tl.int64) * Nk
    p_c = codes + b64 * stride_cb + i_h.to(tl.int64) * stride_ch
    i_kv = i_h // group
    p_v = v + b64 * stride_vb + i_kv.to(tl.int64) * stride_vh
    # of the source
    begin = tl.load(p_u + first - 1, mask=(first > 0) & (last > first), other=0)
    end = tl.load(p_u + last - 1, mask=last > first, other=0)
    b_ms, b_zs, b_mw = _over(begin, end, p_l, p_c, p_v, b_q, o_i, b_lo, b_hi, b_lse, k, i_b, i_h, i_kv, lo, hi, key_valid, q_segments,
                             k_segments, allowed, bias, stride_kb, stride_kn, stride_kd, stride_kh, stride_vn, stride_vd, stride_ib,
                             stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope, cap2,
                             Nq, Nk, True, GATE > 1, ELEMENT, SOFTCAP, D, DP, DV, DVP, BM, BN, UPCAST)
    m_z = m_i[:, None] & (o_v < DV)[None, :]
    i_to = tl.load(heads + i_h)
    p_z = z + b64 * stride_zb + i_to * stride_zh + o_i.to(tl.int64)[:, None] * stride_zn + o_v[None, :] * stride_zd
    p_n = new + b64 * stride_nb + i_to * stride_nh + o_i.to(tl.int64)[:, None] * stride_nn + o_v[None, :] * stride_nd
    if SECOND > 0:
        p_l += lists.to(tl.int64) * Nk
        p_u += lists.to(tl.int64) * Nk
        begin = tl.load(p_u + first - 1, mask=(first > 0) & (last > first), other=0)
        end = tl.load(p_u + last - 1, mask=last > first, other=0)
        b_mt, b_zt, _ = _over(begin, end, p_l, p_c, p_v, b_q, o_i, b_lo, b_hi, b_lse, k, i_b, i_h, i_kv, lo, hi, key_valid, q_segments,
                              k_segments, allowed, bias, stride_kb, stride_kn, stride_kd, stride_kh, stride_vn, stride_vd, stride_ib,
                              stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope, cap2,
                              Nq, Nk, True, False, ELEMENT, SOFTCAP, D, DP, DV, DVP, BM, BN, UPCAST)
    if SECOND < 2:
        b_all = 1.0 - b_ms
        # what does not move: the source's share, and the second set's
        b_still = keep * b_zs
        b_gone = b_zs
        if SECOND == 1:
            b_all -= b_mt
            b_still += b_zt
            b_gone += b_zt
        if SINKS:
            b_all -= tl.exp2(tl.load(sinks + i_h) * 1.4426950408889634 - b_lse)
        m_weak = m_i & (b_all < limit) & (b_ms > 0.0)
        b_mt = b_all
        if tl.max(m_weak.to(tl.int32)) > 0:
            # one weak row, and the whole tile is summed over all keys without a code
            b_mt, b_zt, _ = _over(first, last, p_l, p_c, p_v, b_q, o_i, b_lo, b_hi, b_lse, k, i_b, i_h, i_kv, lo, hi, key_valid, q_segments,
                                  k_segments, allowed, bias, stride_kb, stride_kn, stride_kd, stride_kh, stride_vn, stride_vd, stride_ib,
                                  stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, scale2, slope,
                                  cap2, Nq, Nk, False, False, ELEMENT, SOFTCAP, D, DP, DV, DVP, BM, BN, UPCAST)
        else:
            b_zt = tl.load(p_z, mask=m_z, other=0.0).to(tl.float32) - b_gone
    m_c = m_i & (b_mt >= 1e-12) & (b_ms > 0.0)
    if GATE == 1:
        m_c = m_c & (tl.load(gate + row + o_i, mask=m_i, other=0) != 0)
    if GATE > 1:
        b_both = b_mt + b_mw
        m_c = m_c & (b_both >= floor)
        if GATE == 2:
            m_c = m_c & (b_mt >= share * b_both)
        else:
            m_c = m_c & (b_mw / (b_both + tl.load(gate + i_b)) <= share)
    b_g = 1.0 + tl.where(m_c, (1.0 - keep) * b_ms / tl.where(m_c, b_mt, 1.0), 0.0)
    tl.store(kept + row + o_i, tl.where(m_c, keep, 1.0), mask=m_i)
    tl.store(grown + row + o_i, b_g, mask=m_i)
    if ROWS:
        m_c = m_c & (tl.load(rows + b64 * stride_rb + o_i, mask=m_i, other=0) != 0)
    if SECOND == 2:
        b_z = tl.load(p_z, mask=m_z, other=0.0)
        b_n = b_z.to(tl.float32) - (1.0 - keep) * b_zs + (b_g - 1.0)[:, None] * b_zt
    else:
        b_z = tl.load(p_z, mask=m_z & (m_c == 0)[:, None], other=0.0)
        b_n = b_g[:, None] * b_zt + b_still
    tl.store(p_n, tl.where(m_c[:, None], b_n.to(b_z.dtype), b_z), mask=m_z)


# fmt: on


def redistributed(
    call: AttentionCall,
    lse: Tensor,
    output: Tensor,
    heads: Tensor,
    keys: KeyLists,
    *,
    keep: float,
    others: bool,
    limit: float,
    gate: Tensor | Gate | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(`output` [B, Nq, H, Dv] with its heads `heads` int64 [Hq] redistributed, on a copy; what their weights on the source [B, Hq, Nq] and
    on the target are multiplied with); see `redistribute_kernel`.

    `call`: of these heads alone, `lse` [B, Hq, Nq] in nats. The target is the second set of `keys`, or with `others` all keys without a
    code. `gate` bool [B, Hq, Nq] or a Gate; `rows` bool [1 or B, Nq]. `limit`: mass of the others below which they are summed directly.
    """
    assert call.v is not None
    run, tile = Run(call, None), tile_of(call)
    new = poisoned(torch.empty_like(output)) if run.heads == output.shape[2] else output.clone()
    factors = empty(call.q, 2, run.batch, run.heads, run.rows)
    sinks = run.sinks() if others else None
    kind, table, floor, share = _gate(gate, factors)
    rows = None if rows is None else rows.contiguous()
    with torch.cuda.device(call.q.device if call.q.is_cuda else -1):
        redistribute_kernel[cdiv(run.rows, tile.rows), run.heads, run.batch](
            call.q, call.k, call.v, lse.to(torch.float32).contiguous(), output, new, factors[0], factors[1], heads,
            factors if sinks is None else sinks, table, factors if rows is None else rows, keys.columns, keys.upto, keys.codes,
            *run.mask_pointers(), *call.q.stride(), *call.k.stride(), *call.v.stride(), *output.stride(), *new.stride(),
            *run.mask_strides(), *keys.strides, keys.columns.shape[1], 0 if rows is None or len(rows) == 1 else rows.stride(0), *run.scales,
            keep, limit, floor, share, run.heads, call.group, run.rows, run.keys, SECOND=keys.sets - 1 if others else 2, GATE=kind,
            ROWS=rows is not None, SINKS=sinks is not None, ELEMENT=run.seen.element, SOFTCAP=run.softcap, D=run.width,
            DP=padded(run.width), DV=call.v.shape[3], DVP=padded(call.v.shape[3]), BM=tile.rows, BN=tile.keys, UPCAST=run.upcast,
            **tile.options,
        )  # fmt: skip
    return new, factors[0], factors[1]


def _gate(gate: Tensor | Gate | None, like: Tensor) -> tuple[int, Tensor, float, float]:
    """(kind, table, floor, share) as the kernel takes a gate."""
    if gate is None:
        return NONE, like, 0.0, 0.0
    if isinstance(gate, Tensor):
        return GIVEN, gate.expand(like.shape[1:]).contiguous(), 0.0, 0.0
    if not gate.watched:
        return ON_TARGET, like, gate.floor, gate.share
    extra = torch.zeros(like.shape[1], device=like.device) if gate.extra is None else gate.extra.to(like).expand(like.shape[1]).contiguous()
    return ON_WATCHED, extra, gate.floor, gate.share


def tile_of(call: AttentionCall) -> Tile:
    """The tile of the kernel for a call."""
    width = max(call.q.shape[3], 1 if call.v is None else call.v.shape[3])
    if INTERPRETED:
        return Tile(64, 64)
    if call.q.dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(64, 32, 4, 3) if width <= 128 else Tile(64, 32, 4, 1)


__all__ = ["redistribute_kernel", "redistributed", "tile_of"]
