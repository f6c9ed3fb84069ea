"""The two small kernels behind sweep 1: from accumulators to values, and from the winning tile to the winning key.

`finish_kernel` joins the pieces of a row that was split over several programs (decode: one query, 131,072 keys), divides by the
normaliser, adds a learned sink logit to it, and writes NaN on rows that are padding or see no key: a zero there would be averaged in
without a trace. `argmax_kernel` looks again at the tile in which sweep 1 saw a row's largest score. It is given the rows in the order of
their winning tiles, so that a program needs one or two tiles for all of its rows: N / BM tiles per head, instead of an index carried
through all N^2 entries.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton_common import element_mask, load_bias, load_tile, soft_cap

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _merged(b_old, p_new, m_r, b_old_factor, b_new_factor):
    """An accumulator of the splits so far joined with the next one's."""
    return b_old * b_old_factor + tl.load(p_new, mask=m_r, other=0.0) * b_new_factor


@triton.jit(
    do_not_specialize=["Nq", "n_rows", "n_splits", "stride_raw", "stride_ib", "Hq"]
)
def finish_kernel(raw, classes, lo, hi, sinks, stride_ib, stride_raw, Hq, Nq, n_rows, n_splits,
                  GIVEN: tl.constexpr, ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, SQUARE: tl.constexpr, WAAD: tl.constexpr,
                  SINK: tl.constexpr, LOCAL: tl.constexpr, WIN: tl.constexpr, CLASSES: tl.constexpr, SINK_LOGITS: tl.constexpr,
                  BR: tl.constexpr):
    """In place in the first split of `raw`: slot 0 becomes the lse in nats, slot 1 the largest weight, the others their statistic."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < n_rows
    i_bh = o_r // Nq
    p_i = (i_bh // Hq) * stride_ib + o_r % Nq
    m_live = tl.load(hi + p_i, mask=m_r, other=0) > tl.load(lo + p_i, mask=m_r, other=0)
    step = tl.full([], 1, tl.int64) * n_rows
    # joined over the splits: b_ref the reference, b_one the sum relative to it (given lse: the largest exponent)
    b_ref = tl.full([BR], -1e30, tl.float32)
    b_one = tl.zeros([BR], tl.float32)
    if GIVEN:
        b_one = b_ref
    b_win = tl.full([BR], 8388608.0, tl.float32)
    b_x = tl.zeros([BR], tl.float32)
    b_d1 = tl.zeros([BR], tl.float32)
    b_d2 = tl.zeros([BR], tl.float32)
    b_wa = tl.zeros([BR], tl.float32)
    b_si = tl.zeros([BR], tl.float32)
    b_lc = tl.zeros([BR], tl.float32)
    b_cl = b_x
    if CLASSES > 0:
        o_c = tl.arange(0, CLASSES)
        b_cl = tl.zeros([BR, CLASSES], tl.float32)
    for i in range(0, n_splits):
        p_s = raw + i * stride_raw * step + o_r
        b_r = tl.load(p_s, mask=m_r, other=-1e30)
        b_1 = tl.load(p_s + step, mask=m_r, other=0.0)
        b_f = tl.full([BR], 1.0, tl.float32)
        b_g = tl.full([BR], 1.0, tl.float32)
        if WIN >= 0:
            b_w = tl.load(p_s + WIN * step, mask=m_r, other=8388608.0)
            if GIVEN:
                m_win = (b_1 > b_one) | ((b_1 == b_one) & (b_w < b_win))
            else:
                m_win = (b_r > b_ref) | ((b_r == b_ref) & (b_w < b_win))
            b_win = tl.where(m_win, b_w, b_win)
        if GIVEN:
            b_ref = b_r
        else:
            b_max = tl.maximum(b_ref, b_r)
            b_f = tl.exp2(b_ref - b_max)
            b_g = tl.exp2(b_r - b_max)
        if ENTROPY >= 0:
            b_n = tl.load(p_s + ENTROPY * step, mask=m_r, other=0.0)
            if GIVEN:
                b_x += b_n
            else:
                b_x = (b_x + b_one * (b_ref - b_max)) * b_f + (b_n + b_1 * (b_r - b_max)) * b_g
        if GIVEN:
            b_one = tl.maximum(b_one, b_1)
        else:
            b_one = b_one * b_f + b_1 * b_g
            b_ref = b_max
        if DISTANCE >= 0:
            b_d1 = _merged(b_d1, p_s + DISTANCE * step, m_r, b_f, b_g)
        if SQUARE >= 0:
            b_d2 = _merged(b_d2, p_s + SQUARE * step, m_r, b_f, b_g)
        if WAAD >= 0:
            b_wa = _merged(b_wa, p_s + WAAD * step, m_r, b_f, b_g)
        if SINK >= 0:
            b_si = _merged(b_si, p_s + SINK * step, m_r, b_f, b_g)
        if LOCAL >= 0:
            b_lc = _merged(b_lc, p_s + LOCAL * step, m_r, b_f, b_g)
        if CLASSES > 0:
            p_c = classes + (i * step + o_r)[:, None] * CLASSES + o_c[None, :]
            b_cl = _merged(b_cl, p_c, m_r[:, None], b_f[:, None], b_g[:, None])
    if GIVEN:
        m_live = m_live & (tl.abs(b_ref) < float("inf"))
        b_lse = b_ref
        b_part = tl.full([BR], 1.0, tl.float32)
        b_peak = tl.exp2(b_one)
        b_x = -b_x
    else:
        m_live = m_live & (b_one > 0)
        b_one = tl.where(m_live, b_one, 1.0)
        b_lift = b_ref
        b_share = b_one
        b_total = b_one
        if SINK_LOGITS:
            # the sink may tower over every score, so the larger of the two is the reference
            b_sink = tl.load(sinks + i_bh % Hq, mask=m_r, other=0.0) * 1.4426950408889634
            b_lift = tl.maximum(b_ref, b_sink)
            b_share = b_one * tl.exp2(b_ref - b_lift)
            b_total = b_share + tl.exp2(b_sink - b_lift)
        b_log = (b_lift - b_ref) + tl.log2(b_total)
        b_lse = b_lift + tl.log2(b_total)
        b_peak = tl.exp2(-b_log)
        b_part = b_peak
        # -sum A log2 A with log2 A = y - b_log, y the exponents that b_x summed
        b_x = b_peak * (b_one * b_log - b_x)
    b_x = tl.maximum(b_x, 0.0)
    b_nan = tl.full([BR], float("nan"), tl.float32)
    p_r = raw + o_r
    tl.store(p_r, tl.where(m_live, b_lse * 0.6931471805599453, b_nan), mask=m_r)
    tl.store(p_r + step, tl.where(m_live, b_peak, b_nan), mask=m_r)
    if WIN >= 0:
        tl.store(p_r + WIN * step, tl.where(m_live, b_win, 8388608.0), mask=m_r)
    if ENTROPY >= 0:
        tl.store(p_r + ENTROPY * step, tl.where(m_live, b_x * 0.6931471805599453, b_nan), mask=m_r)
    if DISTANCE >= 0:
        tl.store(p_r + DISTANCE * step, tl.where(m_live, b_d1 * b_part, b_nan), mask=m_r)
    if SQUARE >= 0:
        tl.store(p_r + SQUARE * step, tl.where(m_live, b_d2 * b_part, b_nan), mask=m_r)
    if WAAD >= 0:
        tl.store(p_r + WAAD * step, tl.where(m_live, b_wa * b_part, b_nan), mask=m_r)
    if SINK >= 0:
        tl.store(p_r + SINK * step, tl.where(m_live, b_si * b_part, b_nan), mask=m_r)
    if LOCAL >= 0:
        tl.store(p_r + LOCAL * step, tl.where(m_live, b_lc * b_part, b_nan), mask=m_r)
    if CLASSES > 0:
        b_cl = tl.where(m_live[:, None], b_cl * b_part[:, None], float("nan"))
        tl.store(classes + o_r[:, None] * CLASSES + o_c[None, :], b_cl, mask=m_r[:, None])


@triton.jit(
    do_not_specialize=["Nq", "Nk", "k_offset", "stride_ib", "Hq", "group"]
)
def argmax_kernel(q, k, win, order, argmax, lo, hi, key_valid, q_segments, k_segments, allowed, bias,
                  stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_ib,
                  stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk,
                  scale2, slope, cap2, Hq, group, Nq, Nk, k_offset,
                  ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  TMA: tl.constexpr, UPCAST: tl.constexpr):
    """Absolute position of the first largest score of every row, given the number of the key tile it lies in; -1 where there is none.

    `order` [B, Hq, Nq] int64: the head's rows sorted by `win`.
    """
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    i_kh = i_h // group
    o_r = i_q * BM + tl.arange(0, BM)
    m_r = o_r < Nq
    b_rows = tl.load(order + i_bh.to(tl.int64) * Nq + o_r, mask=m_r, other=0)
    b_lo = tl.load(lo + i_b.to(tl.int64) * stride_ib + b_rows, mask=m_r, other=0)
    b_hi = tl.load(hi + i_b.to(tl.int64) * stride_ib + b_rows, mask=m_r, other=0)
    o_row = i_bh.to(tl.int64) * Nq + b_rows
    b_win = tl.load(win + o_row, mask=m_r, other=8388608.0).to(tl.int32)
    o_d = tl.arange(0, DP)
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + b_rows[:, None] * stride_qn + o_d[None, :] * stride_qd
    b_q = tl.load(p_q, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_arg = tl.full([BM], -1, tl.int64)
    i_k = tl.min(b_win)
    while i_k < 8388608:
        o_k = i_k * BN
        b_keys = o_k + tl.arange(0, BN)
        # [BM, BN]
        b_k = load_tile(k, i_b, i_kh, o_k, Nk, stride_kb, stride_kh, stride_kn, stride_kd, D, DP, BN, TMA, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if SOFTCAP:
            b_s = soft_cap(b_s, slope, cap2)
        else:
            b_s = b_s * scale2
        m_s = (b_keys[None, :] >= b_lo[:, None]) & (b_keys[None, :] < b_hi[:, None])
        if ELEMENT & 7:
            m_s = element_mask(m_s, i_b, i_h, b_rows, b_keys, Nq, Nk, key_valid, q_segments, k_segments, allowed,
                               stride_ab, stride_ah, stride_aq, stride_ak, ELEMENT, False)
        if ELEMENT & 8:
            b_s += load_bias(i_b, i_h, b_rows, b_keys, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk, False)
        b_s = tl.where(m_s, b_s, -float("inf"))
        b_top = tl.max(b_s, 1)
        b_at = tl.min(tl.where(b_s == b_top[:, None], b_keys[None, :], Nk), 1)
        b_arg = tl.where(b_win == i_k, (k_offset + b_at).to(tl.int64), b_arg)
        i_k = tl.min(tl.where(b_win > i_k, b_win, 8388608))
    tl.store(argmax + o_row, b_arg, mask=m_r)
