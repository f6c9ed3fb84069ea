"""Sweep 1: one pass over the keys gives every row statistic, with online softmax, without the N x N matrix.

A program owns one tile of query rows of one head and walks over key tiles. Each accumulator X = sum e^(s-m) x is rescaled when the running
maximum m grows, as in flash attention (Dao et al., 2205.14135; the online softmax is Milakov and Gimelshein's, 1805.02867). Every statistic
is a compile-time flag, so one that is not asked for costs nothing; so is the attention output itself (`OUT`).

With the rows' lse known beforehand (`GIVEN`, from the host's own fused kernel) a weight is final when its tile is visited and nothing is
rescaled. (One pass for rows, columns and maps together is possible then, and was slower than two on an H200: whichever way the tiles
are walked, one of the two directions needs atomic adds or shuffles for every statistic.)

Accuracy, where a straightforward sum would lose digits without a sign of it:

- entropy sums p (s - m), never p s: an lse of 50 would otherwise eat the digits of an entropy of 0.01;
- distances split as (distance to the tile's nearest key) + (distance within the tile), both non-negative, so nothing cancels;
- argmax only notes the winning tile here and `argmax_kernel` finds the key in it: carrying an index through the
  hot loop costs more than looking at one tile again.

Naming: i_ index, o_ offset, p_ pointer, m_ mask, b_ block in registers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton_common import element_mask, load_bias, load_tile, moments, soft_cap, tile_ranges

NEVER = 1 << 23
"""Tile number of a row that has seen nothing; larger than any tile, exact in float32."""

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _walk(b_m, b_z, b_x, b_d1, b_d2, b_wa, b_si, b_lc, b_win, b_cl, b_o,
          b_q, k, v, b_ref, b_lo, b_hi, b_rows, b_t, a_min,
          n_tiles, s1, n1, s2, n2, s3, i_b, i_h, i_kh, first_token,
          key_valid, q_segments, k_segments, allowed, bias, labels,
          stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
          stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, stride_lb,
          scale2, slope, cap2, Hq, Nq, Nk, q_offset, k_offset,
          sink_tokens, local_window, waad_window,
          MASKED: tl.constexpr, GIVEN: tl.constexpr, ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, SQUARE: tl.constexpr,
          WAAD: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, ROWMAX: tl.constexpr, ARGMAX: tl.constexpr, CLASSES: tl.constexpr,
          OUT: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
          D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          TMA: tl.constexpr, UPCAST: tl.constexpr):
    """Visits n_tiles key tiles, numbered s1.., then s2.., then s3.., and returns the updated accumulators."""
    o_j = tl.arange(0, BN)
    for i in range(0, n_tiles):
        if MASKED:
            i_k = tl.where(i < n1, s1 + i, tl.where(i < n1 + n2, s2 + i - n1, s3 + i - n1 - n2))
        elif CAUSAL:
            i_k = s1 + i
        else:
            i_k = tl.where(i < n1, s1 + i, s2 + i - n1)
        o_k = i_k * BN
        b_keys = o_k + o_j
        # [BM, BN]
        b_k = load_tile(k, i_b, i_kh, o_k, Nk, stride_kb, stride_kh, stride_kn, stride_kd, D, DP, BN, TMA, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if SOFTCAP:
            b_s = soft_cap(b_s, slope, cap2)
        elif ELEMENT & 8:
            b_s = b_s * scale2
        if MASKED:
            m_s = (b_keys[None, :] >= b_lo[:, None]) & (b_keys[None, :] < b_hi[:, None])
            if ELEMENT & 7:
                m_s = element_mask(m_s, i_b, i_h, b_rows, b_keys, Nq, Nk, key_valid, q_segments, k_segments, allowed,
                                   stride_ab, stride_ah, stride_aq, stride_ak, ELEMENT, False)
            if ELEMENT & 8:
                b_s += load_bias(i_b, i_h, b_rows, b_keys, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk, False)
            b_s = tl.where(m_s, b_s, -float("inf"))
        RAW: tl.constexpr = (not SOFTCAP) and (ELEMENT & 8) == 0
        # b_y = log2 of the weight, up to the row's reference; b_p = 2^b_y
        if GIVEN:
            if RAW:
                b_y = b_s * scale2 - b_ref[:, None]
            else:
                b_y = b_s - b_ref[:, None]
            if ROWMAX or ARGMAX:
                b_top = tl.max(b_y, 1)
            if ARGMAX:
                m_new = (b_top > b_m) | ((b_top == b_m) & (i_k < b_win))
                b_win = tl.where(m_new, i_k, b_win)
            if ROWMAX or ARGMAX:
                b_m = tl.maximum(b_m, b_top)
            b_p = tl.exp2(b_y)
        else:
            b_top = tl.max(b_s, 1)
            if RAW:
                b_top = b_top * scale2
            if ARGMAX:
                m_new = (b_top > b_m) | ((b_top == b_m) & (i_k < b_win))
                b_win = tl.where(m_new, i_k, b_win)
            b_next = tl.maximum(b_m, b_top)
            if RAW:
                b_y = b_s * scale2 - b_next[:, None]
            else:
                b_y = b_s - b_next[:, None]
            b_p = tl.exp2(b_y)
            b_a = tl.exp2(b_m - b_next)
            if ENTROPY:
                b_x = (b_x + b_z * (b_m - b_next)) * b_a
            b_m = b_next
            b_z *= b_a
            if DISTANCE:
                b_d1 *= b_a
            if SQUARE:
                b_d2 *= b_a
            if WAAD:
                b_wa *= b_a
            if SINK:
                b_si *= b_a
            if LOCAL:
                b_lc *= b_a
            if CLASSES > 0:
                b_cl *= b_a[:, None]
            if OUT:
                b_o *= b_a[:, None]
        if MASKED and ENTROPY:
            b_y = tl.where(b_p > 0, b_y, 0.0)
        if ENTROPY:
            b_x += tl.sum(b_p * b_y, 1)
        if (DISTANCE or SQUARE) and not MASKED:
            behind = True if CAUSAL else k_offset + o_k < a_min
            b_zt, b_s1, b_s2 = moments(b_p, behind, SQUARE, CAUSAL, BM, BN)
        else:
            b_zt = tl.sum(b_p, 1)
        b_z += b_zt
        if MASKED:
            if DISTANCE or SQUARE or WAAD or LOCAL:
                b_dist = tl.abs(b_t[:, None] - (k_offset + b_keys)[None, :])
                b_pd = b_p * b_dist.to(tl.float32)
            if DISTANCE:
                b_d1 += tl.sum(b_pd, 1)
            if SQUARE:
                b_d2 += tl.sum(b_pd * b_dist.to(tl.float32), 1)
            if WAAD:
                b_wa += tl.sum(b_p * tl.minimum(b_dist, waad_window).to(tl.float32), 1)
            if LOCAL:
                b_lc += tl.sum(tl.where(b_dist < local_window, b_p, 0.0), 1)
            if SINK:
                m_si = (k_offset + b_keys >= first_token) & (k_offset + b_keys < first_token + sink_tokens)
                b_si += tl.sum(tl.where(m_si[None, :], b_p, 0.0), 1)
        else:
            if DISTANCE or SQUARE:
                # distance to the tile's nearest key; within the tile it is counted from there
                b_u = tl.where(behind, b_t - (k_offset + o_k + BN - 1), k_offset + o_k - b_t).to(tl.float32)
                if DISTANCE:
                    b_d1 += b_u * b_zt + b_s1
                if SQUARE:
                    b_d2 += b_u * (b_u * b_zt + 2.0 * b_s1) + b_s2
            if WAAD:
                b_wa += b_zt * waad_window
        if CLASSES > 0:
            b_label = tl.load(labels + i_b.to(tl.int64) * stride_lb + b_keys, mask=(b_keys >= 0) & (b_keys < Nk), other=-1)
            b_hot = (b_label[:, None] == tl.arange(0, CLASSES)[None, :]).to(tl.float32)
            b_cl = tl.dot(b_p, b_hot, acc=b_cl, input_precision="tf32x3")
        if OUT:
            b_v = load_tile(v, i_b, i_kh, o_k, Nk, stride_vb, stride_vh, stride_vn, stride_vd, DV, DVP, BN, TMA, UPCAST)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o, input_precision="ieee")
    return b_m, b_z, b_x, b_d1, b_d2, b_wa, b_si, b_lc, b_win, b_cl, b_o


@triton.jit(
    do_not_specialize=["Nq", "Nk", "q_offset", "k_offset", "near", "sink_tokens", "local_window", "waad_window",
        "n_splits", "stride_raw", "stride_ref", "stride_ib", "stride_db", "stride_fb",
        "stride_lb", "Hq", "group"]
)
def rows_kernel(q, k, v, ref, sinks, lo, hi, dense, first, key_valid, q_segments, k_segments, allowed, bias, labels,
                raw, classes, out,
                stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
                stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on,
                stride_ib, stride_db, stride_fb, stride_ab, stride_ah, stride_aq, stride_ak,
                stride_bb, stride_bh, stride_bq, stride_bk, stride_lb, stride_raw,
                scale2, slope, cap2, Hq, group, Nq, Nk, q_offset, k_offset, near,
                sink_tokens, local_window, waad_window, n_splits, stride_ref,
                EDGES: tl.constexpr, GIVEN: tl.constexpr, ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, SQUARE: tl.constexpr,
                WAAD: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr, ROWMAX: tl.constexpr, WIN: tl.constexpr, CLASSES: tl.constexpr,
                OUT: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
                D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                SINK_LOGITS: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr):
    """Accumulators of every row into `raw` [n_splits, slots, B * Hq * Nq]; a slot number of -1 means that nobody asked.

    Slot 0 is the reference of the exponentials (the running maximum, or the given lse), slot 1 the sum (given lse: the largest exponent);
    ENTROPY, DISTANCE, SQUARE, WAAD, SINK, LOCAL and WIN are the slots of the others. All in log2 units; `finish_kernel`
    makes values of them. `ref` [B * Hq, stride_ref]: the given lse. EDGES leaves the tiles that `gluon_interior` takes out, but for their
    sink tokens.
    """
    # the longest rows of a causal head first: the last programs to run are then the short ones
    i_q = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_split = tl.program_id(2)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    i_kh = i_h // group
    o_q = i_q * BM
    b_rows = o_q + tl.arange(0, BM)
    m_r = (b_rows >= 0) & (b_rows < Nq)
    b_lo = tl.load(lo + i_b.to(tl.int64) * stride_ib + b_rows, mask=m_r, other=0)
    b_hi = tl.load(hi + i_b.to(tl.int64) * stride_ib + b_rows, mask=m_r, other=0)
    is_dense = tl.load(dense + i_b * stride_db)
    b_t = q_offset + b_rows
    a_min = q_offset + tl.maximum(o_q, 0)
    a_max = q_offset + tl.minimum(o_q + BM, Nq) - 1
    first_token = 0
    floor = 0
    if SINK >= 0:
        first_token = tl.load(first + i_b * stride_fb).to(tl.int32)
        floor = first_token + sink_tokens - k_offset
    begin, f0, f1, g0, g1, end = tile_ranges(b_lo, b_hi, floor, a_min, a_max, k_offset, Nk, near, 0, is_dense, BN, CAUSAL, True)
    if EDGES:
        f0 = begin
        f1 = tl.maximum(begin, tl.minimum(end, tl.maximum(o_q // 256 * 256 + q_offset - k_offset - near + 1, 0) // BN))
        g0 = f1
        g1 = f1
    if n_splits > 1:
        per = (end - begin + n_splits - 1) // n_splits
        begin = tl.minimum(begin + i_split * per, end)
        end = tl.minimum(begin + per, end)
        f0 = tl.minimum(tl.maximum(f0, begin), end)
        f1 = tl.minimum(tl.maximum(f1, begin), end)
        g0 = tl.minimum(tl.maximum(g0, begin), end)
        g1 = tl.minimum(tl.maximum(g1, begin), end)

    b_q = load_tile(q, i_b, i_h, o_q, Nq, stride_qb, stride_qh, stride_qn, stride_qd, D, DP, BM, TMA, UPCAST)
    b_m = tl.full([BM], -1e30, tl.float32)
    b_z = tl.zeros([BM], tl.float32)
    b_x = tl.zeros([BM], tl.float32)
    b_d1 = tl.zeros([BM], tl.float32)
    b_d2 = tl.zeros([BM], tl.float32)
    b_wa = tl.zeros([BM], tl.float32)
    b_si = tl.zeros([BM], tl.float32)
    b_lc = tl.zeros([BM], tl.float32)
    b_win = tl.full([BM], 8388608, tl.int32)
    b_ref = b_m
    b_cl = b_z
    b_o = b_z
    if GIVEN:
        b_ref = tl.load(ref + i_bh.to(tl.int64) * stride_ref + b_rows, mask=m_r, other=float("inf"))
    if CLASSES > 0:
        b_cl = tl.zeros([BM, CLASSES], tl.float32)
    if OUT:
        b_o = tl.zeros([BM, DVP], tl.float32)
    n1 = f0 - begin
    n2 = g0 - f1
    n3 = end - g1
    b_m, b_z, b_x, b_d1, b_d2, b_wa, b_si, b_lc, b_win, b_cl, b_o = _walk(
        b_m, b_z, b_x, b_d1, b_d2, b_wa, b_si, b_lc, b_win, b_cl, b_o, b_q, k, v, b_ref, b_lo, b_hi, b_rows, b_t, a_min,
        n1 + n2 + n3, begin, n1, f1, n2, g1, i_b, i_h, i_kh, first_token,
        key_valid, q_segments, k_segments, allowed, bias, labels,
        stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
        stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, stride_lb,
        scale2, slope, cap2, Hq, Nq, Nk, q_offset, k_offset, sink_tokens, local_window, waad_window,
        True, GIVEN, ENTROPY >= 0, DISTANCE >= 0, SQUARE >= 0, WAAD >= 0, SINK >= 0, LOCAL >= 0, ROWMAX, WIN >= 0, CLASSES,
        OUT, ELEMENT, SOFTCAP, CAUSAL, D, DP, DV, DVP, BM, BN, TMA, UPCAST)
    if EDGES and SINK >= 0:
        for i_k in range(0, tl.minimum(f1, (tl.maximum(floor, 0) + BN - 1) // BN)):
            b_keys = i_k * BN + tl.arange(0, BN)
            b_k = load_tile(k, i_b, i_kh, i_k * BN, Nk, stride_kb, stride_kh, stride_kn, stride_kd, D, DP, BN, TMA, UPCAST)
            b_y = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale2 - b_ref[:, None]
            m_si = (k_offset + b_keys >= first_token) & (b_keys < floor)
            b_si += tl.sum(tl.where(m_si[None, :], tl.exp2(b_y), 0.0), 1)
    if (ELEMENT & 12) == 0 and not EDGES:
        # with an explicit mask or a bias no tile is full
        b_m, b_z, b_x, b_d1, b_d2, b_wa, b_si, b_lc, b_win, b_cl, b_o = _walk(
            b_m, b_z, b_x, b_d1, b_d2, b_wa, b_si, b_lc, b_win, b_cl, b_o, b_q, k, v, b_ref, b_lo, b_hi, b_rows, b_t, a_min,
            f1 - f0 + g1 - g0, f0, f1 - f0, g0, 0, 0, i_b, i_h, i_kh, first_token,
            key_valid, q_segments, k_segments, allowed, bias, labels,
            stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
            stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, stride_lb,
            scale2, slope, cap2, Hq, Nq, Nk, q_offset, k_offset, sink_tokens, local_window, waad_window,
            False, GIVEN, ENTROPY >= 0, DISTANCE >= 0, SQUARE >= 0, WAAD >= 0, SINK >= 0, LOCAL >= 0, ROWMAX, WIN >= 0, CLASSES,
            OUT, ELEMENT, SOFTCAP, CAUSAL, D, DP, DV, DVP, BM, BN, TMA, UPCAST)

    n_rows = tl.num_programs(1).to(tl.int64) * Nq
    o_row = i_bh.to(tl.int64) * Nq + b_rows
    p_raw = raw + i_split.to(tl.int64) * stride_raw * n_rows + o_row
    if GIVEN:
        tl.store(p_raw, b_ref, mask=m_r)
        tl.store(p_raw + n_rows, b_m, mask=m_r)
    else:
        tl.store(p_raw, b_m, mask=m_r)
        tl.store(p_raw + n_rows, b_z, mask=m_r)
    if ENTROPY >= 0:
        tl.store(p_raw + ENTROPY * n_rows, b_x, mask=m_r)
    if DISTANCE >= 0:
        tl.store(p_raw + DISTANCE * n_rows, b_d1, mask=m_r)
    if SQUARE >= 0:
        tl.store(p_raw + SQUARE * n_rows, b_d2, mask=m_r)
    if WAAD >= 0:
        tl.store(p_raw + WAAD * n_rows, b_wa, mask=m_r)
    if SINK >= 0:
        tl.store(p_raw + SINK * n_rows, b_si, mask=m_r)
    if LOCAL >= 0:
        tl.store(p_raw + LOCAL * n_rows, b_lc, mask=m_r)
    if WIN >= 0:
        tl.store(p_raw + WIN * n_rows, b_win.to(tl.float32), mask=m_r)
    if CLASSES > 0:
        p_cl = classes + (i_split.to(tl.int64) * n_rows + o_row)[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
        tl.store(p_cl, b_cl, mask=m_r[:, None])
    if OUT:
        # rows that see nothing give zero, as flash attention does; a given lse has divided already
        if not GIVEN:
            b_total = tl.where(b_z > 0, b_z, 1.0)
            if SINK_LOGITS:
                b_total += tl.exp2(tl.load(sinks + i_h) * 1.4426950408889634 - b_m)
            b_o = b_o / b_total[:, None]
        b_o = tl.where((b_hi > b_lo)[:, None], b_o, 0.0)
        o_d = tl.arange(0, DVP)
        p_o = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh + b_rows.to(tl.int64)[:, None] * stride_on + o_d[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_r[:, None] & (o_d < DV)[None, :])
