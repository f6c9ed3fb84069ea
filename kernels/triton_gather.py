"""Gathers: exact weights A[t, s] at chosen places, given the rows' lse.

`pairs_kernel` reads one query and one key per pair, in any order; `window_kernel` reads every pair of a list of queries and a list of keys
of one head as a small matrix. Both apply the same mask as the sweeps: a place that the model could not look at is 0, not the
weight it would have had.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton_common import soft_cap

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _visible(m_p, i_b, i_h, b_i, b_j, Nq, Nk, lo, hi, key_valid, q_segments, k_segments, allowed,
             stride_ib, stride_ab, stride_ah, stride_aq, stride_ak, ELEMENT: tl.constexpr):
    """Which of the places (row b_i, key b_j), broadcast against each other, the mask allows."""
    b64 = i_b.to(tl.int64)
    m_in = (b_i >= 0) & (b_i < Nq)
    m_jn = (b_j >= 0) & (b_j < Nk)
    b_lo = tl.load(lo + b64 * stride_ib + b_i, mask=m_in, other=0)
    b_hi = tl.load(hi + b64 * stride_ib + b_i, mask=m_in, other=0)
    m_p = m_p & (b_j >= b_lo) & (b_j < b_hi)
    if ELEMENT & 1:
        m_p = m_p & (tl.load(key_valid + b64 * Nk + b_j, mask=m_jn, other=0) != 0)
    if ELEMENT & 2:
        b_qs = tl.load(q_segments + b64 * Nq + b_i, mask=m_in, other=0)
        m_p = m_p & (b_qs == tl.load(k_segments + b64 * Nk + b_j, mask=m_jn, other=0))
    if ELEMENT & 4:
        p_a = allowed + b64 * stride_ab + i_h.to(tl.int64) * stride_ah + b_i.to(tl.int64) * stride_aq + b_j.to(tl.int64) * stride_ak
        m_p = m_p & (tl.load(p_a, mask=m_in & m_jn, other=0) != 0)
    return m_p


@triton.jit
def _bias(i_b, i_h, b_i, b_j, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk):
    p_b = bias + i_b.to(tl.int64) * stride_bb + i_h.to(tl.int64) * stride_bh + b_i.to(tl.int64) * stride_bq + b_j.to(tl.int64) * stride_bk
    m_b = (b_i >= 0) & (b_i < Nq) & (b_j >= 0) & (b_j < Nk)
    b_b = tl.load(p_b, mask=m_b, other=0.0).to(tl.float32)
    return tl.where(b_b > -1e30, b_b * 1.4426950408889634, -float("inf"))


@triton.jit(
    do_not_specialize=["Nq", "Nk", "n_pairs", "q_offset", "k_offset", "stride_ib", "stride_pb", "Hq", "group"]
)
def pairs_kernel(q, k, lse, queries, keys, out, lo, hi, key_valid, q_segments, k_segments, allowed, bias,
                 stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_pb, stride_ib,
                 stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk,
                 scale2, slope, cap2, Hq, group, Nq, Nk, n_pairs, q_offset, k_offset,
                 ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr):
    """out [B, Hq, P] = A at absolute positions (queries, keys) [B or 1, P] int64; NaN where either is not in this call."""
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    i_bh = tl.program_id(1)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    m_p = o_p < n_pairs
    b_t = tl.load(queries + i_b.to(tl.int64) * stride_pb + o_p, mask=m_p, other=-1)
    b_s = tl.load(keys + i_b.to(tl.int64) * stride_pb + o_p, mask=m_p, other=-1)
    b_i = b_t - q_offset
    b_j = b_s - k_offset
    m_in = (b_t >= 0) & (b_s >= 0) & (b_i >= 0) & (b_i < Nq) & (b_j >= 0) & (b_j < Nk)
    o_d = tl.arange(0, DP)
    # [BP, DP]
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + b_i[:, None] * stride_qn + o_d[None, :] * stride_qd
    p_k = k + i_b.to(tl.int64) * stride_kb + (i_h // group).to(tl.int64) * stride_kh + b_j[:, None] * stride_kn + o_d[None, :] * stride_kd
    m_d = m_in[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_q, mask=m_d, other=0.0).to(tl.float32)
    b_k = tl.load(p_k, mask=m_d, other=0.0).to(tl.float32)
    b_y = tl.sum(b_q * b_k, 1)
    if SOFTCAP:
        b_y = soft_cap(b_y, slope, cap2)
    else:
        b_y = b_y * scale2
    if ELEMENT & 8:
        b_y += _bias(i_b, i_h, b_i, b_j, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk)
    m_v = _visible(m_in, i_b, i_h, b_i, b_j, Nq, Nk, lo, hi, key_valid, q_segments, k_segments, allowed,
                   stride_ib, stride_ab, stride_ah, stride_aq, stride_ak, ELEMENT)
    b_lse = tl.load(lse + i_bh.to(tl.int64) * Nq + b_i, mask=m_in, other=float("nan")) * 1.4426950408889634
    b_a = tl.exp2(b_y - b_lse)
    # NaN stays NaN where the row itself does not count
    b_a = tl.where(m_v | (b_lse != b_lse), b_a, 0.0)
    b_a = tl.where(m_in, b_a, float("nan"))
    tl.store(out + i_bh.to(tl.int64) * n_pairs + o_p, b_a, mask=m_p)


@triton.jit(
    do_not_specialize=["Nq", "Nk", "n_queries", "n_keys", "i_h", "stride_ib", "Hq", "group"]
)
def window_kernel(q, k, lse, queries, keys, out, lo, hi, key_valid, q_segments, k_segments, allowed, bias,
                  stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_ib,
                  stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk,
                  scale2, slope, cap2, i_h, Hq, group, Nq, Nk, n_queries, n_keys,
                  ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  UPCAST: tl.constexpr):
    """out [B, Lq, Lk] = A[queries, keys] of one head; `queries` and `keys` are int64 indices into this call, all inside it."""
    i_b = tl.program_id(2)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_m = o_m < n_queries
    m_n = o_n < n_keys
    b_i = tl.load(queries + o_m, mask=m_m, other=-1)
    b_j = tl.load(keys + o_n, mask=m_n, other=-1)
    o_d = tl.arange(0, DP)
    head = i_b * 0 + i_h
    p_q = q + i_b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + b_i[:, None] * stride_qn + o_d[None, :] * stride_qd
    p_k = k + i_b.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh + b_j[:, None] * stride_kn + o_d[None, :] * stride_kd
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    b_k = tl.load(p_k, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
        b_k = b_k.to(tl.float32)
    # [BM, BN]
    b_y = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if SOFTCAP:
        b_y = soft_cap(b_y, slope, cap2)
    else:
        b_y = b_y * scale2
    b_i2 = b_i[:, None]
    b_j2 = b_j[None, :]
    if ELEMENT & 8:
        b_y += _bias(i_b, head, b_i2, b_j2, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk)
    m_o = m_m[:, None] & m_n[None, :]
    m_v = _visible(m_o, i_b, head, b_i2, b_j2, Nq, Nk, lo, hi, key_valid, q_segments, k_segments, allowed,
                   stride_ib, stride_ab, stride_ah, stride_aq, stride_ak, ELEMENT)
    b_lse = tl.load(lse + (i_b.to(tl.int64) * Hq + head) * Nq + b_i, mask=m_m, other=float("nan")) * 1.4426950408889634
    b_a = tl.exp2(b_y - b_lse[:, None])
    b_a = tl.where(m_v | (b_lse != b_lse)[:, None], b_a, 0.0)
    p_o = out + i_b.to(tl.int64) * n_queries * n_keys + o_m.to(tl.int64)[:, None] * n_keys + o_n[None, :]
    tl.store(p_o, b_a, mask=m_o)
