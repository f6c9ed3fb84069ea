"""Rows, columns and maps in one pass, when every row's lse is known beforehand (from the host's own fused kernel).

With the lse given, a weight is final when its tile is visited, so q k^T and the exponentials are computed once instead of twice. A program owns
one tile of keys and walks over query tiles. Its column sums stay in registers, as partial sums that are added across lanes only at the
end; each map cell is written once; what a row gains from the tile is added to the row's accumulators in memory, one vector of atomic
adds per statistic. Rows are therefore the same up to the order of float32 additions from run to run; columns and maps are the same bits.

A row's largest weight and the tile it lies in travel together in one 64-bit maximum: the weight's bits above (a non-negative
float32 orders like its bits), the tile's number counted down below, so that the first of equal tiles wins.

Layout of the tile's names: b_s [BM queries, BN keys].
"""

from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton_common import fold_max, fold_sum, load_tile, moments, soft_cap, tile_ranges


@triton.jit
def _walk(b_c, b_f, b_k, q, ref, weight, raw, peak, b_lo, b_hi, b_keys, o_k, i_k, n_tiles, s1, n1, s2, n2, s3, i_b, i_h, first_token,
          mass, top, stride_qb, stride_qh, stride_qn, stride_qd, stride_wb, n_rows,
          scale2, slope, cap2, Hq, Nq, q_offset, k_offset, q_shift, sink_tokens, local_window, waad_window, fai_lo, fai_hi, cells_q, cells_k,
          MASKED: tl.constexpr, ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, SQUARE: tl.constexpr, WAAD: tl.constexpr,
          SINK: tl.constexpr, LOCAL: tl.constexpr, PEAK: tl.constexpr, COLUMNS: tl.constexpr, FAI: tl.constexpr, MASS: tl.constexpr,
          TOP: tl.constexpr, CELL: tl.constexpr, RESTRICT: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
          D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr):
    """Visits n_tiles query tiles, numbered s1.., then s2.., then s3.., and returns the partial column and band sums [W, 8, BN]."""
    i_bh = (i_b * Hq + i_h).to(tl.int64)
    for i in range(0, n_tiles):
        if MASKED:
            i_q = tl.where(i < n1, s1 + i, tl.where(i < n1 + n2, s2 + i - n1, s3 + i - n1 - n2))
        elif CAUSAL:
            i_q = s2 + i
        else:
            i_q = tl.where(i < n1, s1 + i, s2 + i - n1)
        o_q = i_q * BM - q_shift
        b_rows = o_q + tl.arange(0, BM)
        m_r = (b_rows >= 0) & (b_rows < Nq)
        b_t = q_offset + b_rows
        b_q = load_tile(q, i_b, i_h, o_q, Nq, stride_qb, stride_qh, stride_qn, stride_qd, D, DP, BM, TMA, UPCAST)
        b_ref = tl.load(ref + i_bh * Nq + b_rows, mask=m_r, other=float("inf"))
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if SOFTCAP:
            b_y = soft_cap(b_s, slope, cap2) - b_ref[:, None]
        else:
            b_y = b_s * scale2 - b_ref[:, None]
        if MASKED:
            m_s = (b_rows[:, None] >= b_lo[None, :]) & (b_rows[:, None] < b_hi[None, :])
            b_y = tl.where(m_s, b_y, -float("inf"))
        b_p = tl.exp2(b_y)
        p_row = raw + i_bh * Nq + b_rows
        if ENTROPY >= 0:
            b_h = b_y
            if MASKED:
                b_h = tl.where(b_p > 0, b_y, 0.0)
            tl.atomic_add(p_row + ENTROPY * n_rows, tl.sum(b_p * b_h, 1), mask=m_r, sem="relaxed")
        if PEAK or TOP:
            b_top = tl.exp2(tl.max(b_y, 1))
        if PEAK:
            b_code = (b_top.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (2147483647 - i_k).to(tl.int64)
            # mostly lost races: reading first spares the slower atomic
            b_old = tl.load(peak + i_bh * Nq + b_rows, mask=m_r, other=0)
            tl.atomic_max(peak + i_bh * Nq + b_rows, b_code, mask=m_r & (b_code > b_old) & (b_top > 0), sem="relaxed")
        if MASKED:
            b_zt = tl.sum(b_p, 1)
            if DISTANCE >= 0 or SQUARE >= 0 or WAAD >= 0 or LOCAL >= 0 or FAI > 0:
                b_diff = b_t[:, None] - (k_offset + b_keys)[None, :]
            if DISTANCE >= 0 or SQUARE >= 0 or WAAD >= 0 or LOCAL >= 0:
                b_dist = tl.abs(b_diff)
                b_pd = b_p * b_dist.to(tl.float32)
            if DISTANCE >= 0:
                tl.atomic_add(p_row + DISTANCE * n_rows, tl.sum(b_pd, 1), mask=m_r, sem="relaxed")
            if SQUARE >= 0:
                tl.atomic_add(p_row + SQUARE * n_rows, tl.sum(b_pd * b_dist.to(tl.float32), 1), mask=m_r, sem="relaxed")
            if WAAD >= 0:
                b_w = tl.sum(b_p * tl.minimum(b_dist, waad_window).to(tl.float32), 1)
                tl.atomic_add(p_row + WAAD * n_rows, b_w, mask=m_r, sem="relaxed")
            if LOCAL >= 0:
                tl.atomic_add(p_row + LOCAL * n_rows, tl.sum(tl.where(b_dist < local_window, b_p, 0.0), 1), mask=m_r, sem="relaxed")
            if SINK >= 0:
                m_si = (k_offset + b_keys >= first_token) & (k_offset + b_keys < first_token + sink_tokens)
                tl.atomic_add(p_row + SINK * n_rows, tl.sum(tl.where(m_si[None, :], b_p, 0.0), 1), mask=m_r, sem="relaxed")
        else:
            if DISTANCE >= 0 or SQUARE >= 0:
                behind = True if CAUSAL else k_offset + o_k < q_offset + o_q
                b_zt, b_s1, b_s2 = moments(b_p, behind, SQUARE >= 0, CAUSAL, BM, BN)
                b_u = tl.where(behind, b_t - (k_offset + o_k + BN - 1), k_offset + o_k - b_t).to(tl.float32)
                if DISTANCE >= 0:
                    tl.atomic_add(p_row + DISTANCE * n_rows, b_u * b_zt + b_s1, mask=m_r, sem="relaxed")
                if SQUARE >= 0:
                    tl.atomic_add(p_row + SQUARE * n_rows, b_u * (b_u * b_zt + 2.0 * b_s1) + b_s2, mask=m_r, sem="relaxed")
            else:
                b_zt = tl.sum(b_p, 1)
            if WAAD >= 0:
                tl.atomic_add(p_row + WAAD * n_rows, b_zt * waad_window, mask=m_r, sem="relaxed")
        b_pc = b_p
        m_w = m_r
        if RESTRICT:
            m_w = tl.load(weight + i_b.to(tl.int64) * stride_wb + b_rows, mask=m_r, other=0.0) > 0
            b_pc = tl.where(m_w[:, None], b_p, 0.0)
        if COLUMNS or FAI == 2:
            # rows 16 apart and 8 apart sit in one thread of a matrix unit's layout: add those now, across lanes at the end
            b_part = tl.sum(tl.sum(tl.reshape(b_pc, [BM // (16 * W), W, 2, 8, BN]), 2), 0)
        if COLUMNS:
            b_c += b_part
        if FAI > 0:
            if MASKED:
                b_in = tl.where((b_diff >= fai_lo) & (b_diff <= fai_hi), b_pc, 0.0)
                b_f += tl.sum(tl.sum(tl.reshape(b_in, [BM // (16 * W), W, 2, 8, BN]), 2), 0)
            elif FAI == 2:
                if CAUSAL:
                    b_f += b_part
                else:
                    b_f += tl.where(q_offset + o_q > k_offset + o_k, b_part, 0.0)
        if MASS or TOP:
            o_cq = i_q * (BM // CELL) + tl.arange(0, BM // CELL)
            o_ck = i_k * (BN // CELL) + tl.arange(0, BN // CELL)
            o_cell = (i_bh * cells_q + o_cq)[:, None] * cells_k + o_ck[None, :]
            m_cell = (o_cq < cells_q)[:, None] & (o_ck < cells_k)[None, :]
            if MASS:
                if CELL == BN:
                    b_m = tl.sum(tl.reshape(tl.where(m_w, b_zt, 0.0), [BM // CELL, CELL]), 1)[:, None]
                else:
                    b_m = fold_sum(b_pc, BM, BN, CELL)
                tl.store(mass + o_cell, b_m, mask=m_cell)
            if TOP:
                if CELL == BN:
                    b_x = tl.max(tl.reshape(tl.where(m_w, b_top, 0.0), [BM // CELL, CELL]), 1)[:, None]
                else:
                    b_x = fold_max(b_pc, BM, BN, CELL)
                tl.store(top + o_cell, b_x, mask=m_cell)
    return b_c, b_f


@triton.jit(
    do_not_specialize=["Nq", "Nk", "q_offset", "k_offset", "q_shift", "k_shift", "near", "sink_tokens", "local_window", "waad_window",
        "fai_lo", "fai_hi", "cells_q", "cells_k", "n_rows", "stride_ib", "stride_db", "stride_fb", "stride_wb", "Hq", "group"]
)  # fmt: skip
def fused_kernel(q, k, ref, lo, hi, dense, first, weight, raw, peak, columns, fai, mass, top,
                 stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
                 stride_ib, stride_db, stride_fb, stride_wb, n_rows, scale2, slope, cap2, Hq, group, Nq, Nk, q_offset, k_offset,
                 q_shift, k_shift, near, sink_tokens, local_window, waad_window, fai_lo, fai_hi, cells_q, cells_k,
                 ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, SQUARE: tl.constexpr, WAAD: tl.constexpr, SINK: tl.constexpr,
                 LOCAL: tl.constexpr, PEAK: tl.constexpr, COLUMNS: tl.constexpr, FAI: tl.constexpr, MASS: tl.constexpr, TOP: tl.constexpr,
                 CELL: tl.constexpr, RESTRICT: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
                 D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr,
                 TMA: tl.constexpr, UPCAST: tl.constexpr):
    """Everything that one key tile adds. `raw` [slots, B * Hq * Nq] and `peak` [B * Hq * Nq] int64 must be zero before.

    `ref`: lse in log2 units, +inf on rows that see nothing; `lo`, `hi`: per key, the queries that see it. Masks that are no intervals
    do not come here. Slots as in `rows_kernel`; W: warps of 16 rows that a tile is spread over.
    """
    i_k = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    o_k = i_k * BN - k_shift
    b_keys = o_k + tl.arange(0, BN)
    m_k = (b_keys >= 0) & (b_keys < Nk)
    b_lo = tl.load(lo + i_b.to(tl.int64) * stride_ib + b_keys, mask=m_k, other=0)
    b_hi = tl.load(hi + i_b.to(tl.int64) * stride_ib + b_keys, mask=m_k, other=0)
    is_dense = tl.load(dense + i_b * stride_db)
    n_seen = tl.sum((b_hi > b_lo).to(tl.int32))
    if n_seen < BN:
        is_dense = is_dense * 0
    first_token = 0
    if SINK >= 0:
        first_token = tl.load(first + i_b * stride_fb).to(tl.int32)
        if k_offset + o_k < first_token + sink_tokens:
            is_dense = is_dense * 0
    a_max = k_offset + tl.minimum(o_k + BN, Nk) - 1
    begin, f0, f1, g0, g1, end = tile_ranges(
        b_lo, b_hi, 0, k_offset + tl.maximum(o_k, 0), a_max, q_offset, Nq, near, q_shift, is_dense, BM, CAUSAL, False)
    b_k = load_tile(k, i_b, i_h // group, o_k, Nk, stride_kb, stride_kh, stride_kn, stride_kd, D, DP, BN, TMA, UPCAST)
    b_c = tl.zeros([W, 8, BN], tl.float32)
    b_f = tl.zeros([W, 8, BN], tl.float32)
    n1 = f0 - begin
    n2 = g0 - f1
    n3 = end - g1
    b_c, b_f = _walk(
        b_c, b_f, b_k, q, ref, weight, raw, peak, b_lo, b_hi, b_keys, o_k, i_k, n1 + n2 + n3, begin, n1, f1, n2, g1, i_b, i_h, first_token,
        mass, top, stride_qb, stride_qh, stride_qn, stride_qd, stride_wb, n_rows,
        scale2, slope, cap2, Hq, Nq, q_offset, k_offset, q_shift, sink_tokens, local_window, waad_window, fai_lo, fai_hi, cells_q, cells_k,
        True, ENTROPY, DISTANCE, SQUARE, WAAD, SINK, LOCAL, PEAK, COLUMNS, FAI, MASS, TOP, CELL, RESTRICT, SOFTCAP, CAUSAL,
        D, DP, BM, BN, W, TMA, UPCAST)
    b_c, b_f = _walk(
        b_c, b_f, b_k, q, ref, weight, raw, peak, b_lo, b_hi, b_keys, o_k, i_k, f1 - f0 + g1 - g0, f0, f1 - f0, g0, 0, 0, i_b, i_h, first_token,
        mass, top, stride_qb, stride_qh, stride_qn, stride_qd, stride_wb, n_rows,
        scale2, slope, cap2, Hq, Nq, q_offset, k_offset, q_shift, sink_tokens, local_window, waad_window, fai_lo, fai_hi, cells_q, cells_k,
        False, ENTROPY, DISTANCE, SQUARE, WAAD, SINK, LOCAL, PEAK, COLUMNS, FAI, MASS, TOP, CELL, RESTRICT, SOFTCAP, CAUSAL,
        D, DP, BM, BN, W, TMA, UPCAST)
    o_col = i_bh.to(tl.int64) * Nk + b_keys
    if COLUMNS:
        tl.store(columns + o_col, tl.sum(tl.sum(b_c, 0), 0), mask=m_k)
    if FAI > 0:
        tl.store(fai + o_col, tl.sum(tl.sum(b_f, 0), 0), mask=m_k)
