"""Sweep 2: with every row's lse known, one pass over the queries gives what keys receive: column sums, bands, block maps, diagonals.

A program owns one tile of keys of one query head and walks over query tiles, the order of flash attention's dK/dV pass. The tile product
is transposed, k q^T, so that a sum over queries runs along the tile's rows, inside a thread, instead of across lanes. Every column and
every map cell is then written once, by the program that owns it: no atomics there, no scratch beyond the maps themselves, and the same bits
on every run. Only diagonals and text segments cross programs and are added atomically, one vector per tile.

Rows that do not count (padding, rows outside `request.rows`, rows that see nothing) arrive with an lse of +inf, so their weights
are exactly zero without a mask; a NaN there would otherwise spread over a whole column.

Layout of the tile's names: b_s [BN keys, BM queries].
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton_common import element_mask, fold_max, fold_sum, load_bias, load_tile, soft_cap, tile_ranges

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _walk(b_c, b_f, b_k, q, ref, b_lo, b_hi, b_keys, a_key, b_seg, a_max, n_tiles, s1, n1, s2, n2, s3, i_b, i_h, i_cell_k, seg_min, seg_max,
          key_valid, q_segments, k_segments, allowed, bias, mass, top, diagonal, text_q, segment_mass,
          stride_qb, stride_qh, stride_qn, stride_qd, stride_ref, stride_ab, stride_ah, stride_aq, stride_ak,
          stride_bb, stride_bh, stride_bq, stride_bk, stride_tq,
          scale2, slope, cap2, Hq, Nq, Nk, q_offset, k_offset, q_shift, fai_lo, fai_hi, cells_q, cells_k,
          diagonal_start, diagonals, segments,
          MASKED: tl.constexpr, COLUMNS: tl.constexpr, FAI: tl.constexpr, MASS: tl.constexpr, TOP: tl.constexpr, CELL: tl.constexpr,
          DIAGONAL: tl.constexpr, SEGMENTED: tl.constexpr, GUARD: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr,
          CAUSAL: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
          UPCAST: tl.constexpr):
    """Visits n_tiles query tiles, numbered s1.., then s2.., then s3.., and returns the column sums and band sums."""
    o_i = tl.arange(0, BM)
    o_j = tl.arange(0, BN)
    i_bh = (i_b * Hq + i_h).to(tl.int64)
    for i in range(0, n_tiles):
        if MASKED:
            i_q = tl.where(i < n1, s1 + i, tl.where(i < n1 + n2, s2 + i - n1, s3 + i - n1 - n2))
        elif CAUSAL:
            i_q = s2 + i
        else:
            i_q = tl.where(i < n1, s1 + i, s2 + i - n1)
        o_q = i_q * BM - q_shift
        b_rows = o_q + o_i
        # [BN, BM]
        b_q = load_tile(q, i_b, i_h, o_q, Nq, stride_qb, stride_qh, stride_qn, stride_qd, D, DP, BM, TMA, UPCAST)
        b_ref = tl.load(ref + i_bh * stride_ref + i_q * BM + o_i)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        if SOFTCAP:
            b_y = soft_cap(b_s, slope, cap2)
            if ELEMENT & 8:
                b_y += load_bias(i_b, i_h, b_rows, b_keys, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk, True)
            b_y -= b_ref[None, :]
        elif ELEMENT & 8:
            b_y = b_s * scale2 + load_bias(i_b, i_h, b_rows, b_keys, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk, True)
            b_y -= b_ref[None, :]
        else:
            b_y = b_s * scale2 - b_ref[None, :]
        if MASKED:
            m_s = (b_rows[None, :] >= b_lo[:, None]) & (b_rows[None, :] < b_hi[:, None])
            if ELEMENT & 7:
                m_s = element_mask(m_s, i_b, i_h, b_rows, b_keys, Nq, Nk, key_valid, q_segments, k_segments, allowed,
                                   stride_ab, stride_ah, stride_aq, stride_ak, ELEMENT, True)
            b_y = tl.where(m_s, b_y, -float("inf"))
        if GUARD:
            # whatever a padded query holds, NaN included, goes nowhere
            b_y = tl.where(b_ref[None, :] < float("inf"), b_y, -float("inf"))
        b_p = tl.exp2(b_y)
        if COLUMNS or MASS or FAI:
            b_t = tl.sum(b_p, 1)
        if COLUMNS:
            b_c += b_t
        if FAI:
            if MASKED:
                b_diff = (q_offset + b_rows)[None, :] - (a_key + o_j)[:, None]
                b_f += tl.sum(tl.where((b_diff >= fai_lo) & (b_diff <= fai_hi), b_p, 0.0), 1)
            elif FAI == 2:
                if CAUSAL:
                    b_f += b_t
                else:
                    b_f += tl.where(q_offset + o_q > a_max, b_t, 0.0)
        if MASS or TOP:
            o_ck = i_cell_k + tl.arange(0, BN // CELL)
            o_cq = i_q * (BM // CELL) + tl.arange(0, BM // CELL)
            # [BN // CELL, BM // CELL]
            o_cell = (i_bh * cells_q + o_cq)[None, :] * cells_k + o_ck[:, None]
            m_cell = (o_cq < cells_q)[None, :] & (o_ck < cells_k)[:, None]
            if MASS:
                if CELL == BM:
                    b_m = tl.sum(tl.reshape(b_t, [BN // CELL, CELL]), 1)[:, None]
                else:
                    b_m = fold_sum(b_p, BN, BM, CELL)
                tl.store(mass + o_cell, b_m, mask=m_cell)
            if TOP:
                if CELL == BM:
                    b_x = tl.exp2(tl.max(tl.reshape(tl.max(b_y, 1), [BN // CELL, CELL]), 1))[:, None]
                else:
                    b_x = fold_max(b_p, BN, BM, CELL)
                tl.store(top + o_cell, b_x, mask=m_cell)
        if DIAGONAL:
            # turn row j of the tile left by j, so that a diagonal becomes a column: c holds distance base + c, wrapped ones base + c - BM
            b_turn = (o_i[None, :] + o_j[:, None]) % BM
            b_d = tl.gather(b_p, b_turn, 1)
            m_near = (o_i[None, :] + o_j[:, None]) < BM
            base = q_offset + o_q - a_key - diagonal_start
            o_near = base + o_i
            o_far = base + o_i - BM
            p_d = diagonal + i_bh * diagonals
            tl.atomic_add(p_d + o_near, tl.sum(tl.where(m_near, b_d, 0.0), 0), mask=(o_near >= 0) & (o_near < diagonals), sem="relaxed")
            tl.atomic_add(p_d + o_far, tl.sum(tl.where(m_near, 0.0, b_d), 0), mask=(o_far >= 0) & (o_far < diagonals), sem="relaxed")
        if SEGMENTED:
            b_tq = tl.load(text_q + i_b.to(tl.int64) * stride_tq + b_rows, mask=(b_rows >= 0) & (b_rows < Nq), other=-1)
            q_max = tl.max(b_tq)
            q_min = tl.min(tl.where(b_tq >= 0, b_tq, segments))
            for i_sk in range(seg_min, seg_max + 1):
                for i_sq in range(q_min, q_max + 1):
                    m_p = (b_seg == i_sk)[:, None] & (b_tq == i_sq)[None, :]
                    tl.atomic_add(segment_mass + (i_bh * segments + i_sq) * segments + i_sk, tl.sum(tl.where(m_p, b_p, 0.0)), sem="relaxed")
    return b_c, b_f


@triton.jit(
    do_not_specialize=["Nq", "Nk", "q_offset", "k_offset", "q_shift", "k_shift", "near", "fai_lo", "fai_hi", "cells_q", "cells_k",
        "diagonal_start", "diagonals", "segments", "stride_ib", "stride_db", "stride_tq", "stride_tk", "Hq", "group"]
)
def columns_kernel(q, k, ref, lo, hi, dense, key_valid, q_segments, k_segments, allowed, bias,
                   columns, fai, mass, top, diagonal, text_q, text_k, segment_mass,
                   stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_ref, stride_ib, stride_db,
                   stride_ab, stride_ah, stride_aq, stride_ak, stride_bb, stride_bh, stride_bq, stride_bk, stride_tq, stride_tk,
                   scale2, slope, cap2, Hq, group, Nq, Nk, q_offset, k_offset, q_shift, k_shift, near, fai_lo, fai_hi, cells_q, cells_k,
                   diagonal_start, diagonals, segments,
                   EDGES: tl.constexpr, COLUMNS: tl.constexpr, FAI: tl.constexpr, MASS: tl.constexpr, TOP: tl.constexpr, CELL: tl.constexpr,
                   DIAGONAL: tl.constexpr, SEGMENTED: tl.constexpr, GUARD: tl.constexpr, ELEMENT: tl.constexpr, SOFTCAP: tl.constexpr,
                   CAUSAL: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   TMA: tl.constexpr,
                   UPCAST: tl.constexpr):
    """Column statistics of one key tile. `ref` [B * Hq, tiles * BM]: lse in log2 units from row -q_shift on,
    +inf on rows that do not count.

    FAI is 0, 1 (closed band fai_lo .. fai_hi) or 2 (from fai_lo to the end); CELL the side of a map cell, at most BM and BN;
    GUARD: some queries are padding. EDGES leaves the tiles that `gluon_interior` takes out.
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
    # a key that nobody sees, in a tile with others, would count in a map's cell: such tiles keep their masks
    n_seen = tl.sum((b_hi > b_lo).to(tl.int32))
    if n_seen < BN:
        is_dense = is_dense * 0
    a_max = k_offset + tl.minimum(o_k + BN, Nk) - 1
    begin, f0, f1, g0, g1, end = tile_ranges(
        b_lo, b_hi, 0, k_offset + tl.maximum(o_k, 0), a_max, q_offset, Nq, near, q_shift, is_dense, BM, CAUSAL, False)
    if EDGES:
        # the first 256 rows to which this tile is interior
        i_g = (tl.maximum(o_k + BN + near - 1 - q_offset + k_offset, 0) + 255) // 256
        f0 = begin
        f1 = begin
        g0 = tl.maximum(begin, tl.minimum(end, i_g * (256 // BM)))
        g1 = end
    b_k = load_tile(k, i_b, i_h // group, o_k, Nk, stride_kb, stride_kh, stride_kn, stride_kd, D, DP, BN, TMA, UPCAST)
    b_c = tl.zeros([BN], tl.float32)
    b_f = tl.zeros([BN], tl.float32)
    b_seg = b_lo
    seg_min = 0
    seg_max = -1
    if SEGMENTED:
        b_seg = tl.load(text_k + i_b.to(tl.int64) * stride_tk + b_keys, mask=m_k, other=-1)
        seg_max = tl.max(b_seg)
        seg_min = tl.min(tl.where(b_seg >= 0, b_seg, segments))
    i_cell_k = i_k * (BN // CELL)
    n1 = f0 - begin
    n2 = g0 - f1
    n3 = end - g1
    b_c, b_f = _walk(
        b_c, b_f, b_k, q, ref, b_lo, b_hi, b_keys, k_offset + o_k, b_seg, a_max, n1 + n2 + n3, begin, n1, f1, n2, g1,
        i_b, i_h, i_cell_k, seg_min, seg_max, key_valid, q_segments, k_segments, allowed, bias, mass, top, diagonal, text_q, segment_mass,
        stride_qb, stride_qh, stride_qn, stride_qd, stride_ref, stride_ab, stride_ah, stride_aq, stride_ak,
        stride_bb, stride_bh, stride_bq, stride_bk, stride_tq,
        scale2, slope, cap2, Hq, Nq, Nk, q_offset, k_offset, q_shift, fai_lo, fai_hi, cells_q, cells_k, diagonal_start, diagonals, segments,
        True, COLUMNS, FAI, MASS, TOP, CELL, DIAGONAL, SEGMENTED, GUARD, ELEMENT, SOFTCAP, CAUSAL, D, DP, BM, BN, TMA, UPCAST)
    if (ELEMENT & 12) == 0 and not EDGES:
        # with an explicit mask or a bias no tile is full
        b_c, b_f = _walk(
            b_c, b_f, b_k, q, ref, b_lo, b_hi, b_keys, k_offset + o_k, b_seg, a_max, f1 - f0 + g1 - g0, f0, f1 - f0, g0, 0, 0,
            i_b, i_h, i_cell_k, seg_min, seg_max, key_valid, q_segments, k_segments, allowed, bias, mass, top, diagonal, text_q,
            segment_mass,
            stride_qb, stride_qh, stride_qn, stride_qd, stride_ref, stride_ab, stride_ah, stride_aq, stride_ak,
            stride_bb, stride_bh, stride_bq, stride_bk, stride_tq,
            scale2, slope, cap2, Hq, Nq, Nk, q_offset, k_offset, q_shift, fai_lo, fai_hi, cells_q, cells_k, diagonal_start, diagonals,
            segments,
            False, COLUMNS, FAI, MASS, TOP, CELL, DIAGONAL, SEGMENTED, GUARD, ELEMENT, SOFTCAP, CAUSAL, D, DP, BM, BN, TMA, UPCAST)
    o_col = i_bh.to(tl.int64) * Nk + b_keys
    if COLUMNS:
        tl.store(columns + o_col, b_c, mask=m_k)
    if FAI:
        tl.store(fai + o_col, b_f, mask=m_k)
