"""Sparse attention of many rows in plain Triton: every program walks over the tiles that its head keeps, and over no others.

The form is flash attention's (Dao et al., 2205.14135), with the loop over key tiles replaced by three: tiles that need a mask, tiles of
which everything is kept, and single columns gathered 128 at a time. Which those are `sparse_lists` says; query heads of a group read the
same keys in place. Rows that see nothing give 0 and an lse of -inf, and every element of the output is written, padding included.

Two silent failures are settled here: keys that are padding may hold NaN, which a weight of zero does not undo, so their values are loaded
as zeros; and a list made for positions is shifted per sequence, so a tile may begin before the first key that is there.

Naming: i_ index, o_ offset, b_ tile, m_ mask, p_ pointers; t and s are positions of rows and keys.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton_common import soft_cap

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def visit(i, row, sink, window, limit, LIMIT: tl.constexpr):
    """Number of the i-th tile of a head told by ranges; `sparse_lists.ranges` has the bounds."""
    top = row * 128
    reach = window
    if LIMIT:
        reach = tl.minimum(window, limit)
    w0 = tl.minimum(tl.maximum(top - reach + 1, 0) // 128, row)
    w1 = tl.maximum(tl.minimum(tl.maximum(top + 128 - reach, 0) + 127, row * 128) // 128, w0)
    sinks = tl.minimum((sink + 127) // 128, w0)
    full = tl.minimum(sink // 128, sinks)
    if LIMIT:
        full = 0
    edge = 1 + w1 - w0
    partial = edge + sinks - full
    inner = tl.where(i < partial + full, i - partial, w1 + i - partial - full)
    outer = tl.where(i < edge, w0 + i - 1, full + i - edge)
    return tl.where(i == 0, row, tl.where(i < partial, outer, inner))


@triton.jit
def _load(x, i_b, i_h, index, m_n, stride_b, stride_h, stride_n, stride_d, D: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `index` of one head as [rows, DP]; zero where `m_n` is false and from column D on."""
    cols = tl.arange(0, DP)
    p_x = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h + index.to(tl.int64)[:, None] * stride_n + cols[None, :] * stride_d
    m_x = m_n[:, None]
    if D < DP:
        m_x = m_x & (cols < D)[None, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def _step(b_q, b_m, b_z, b_o, k, v, i_b, i_kh, b_index, m_key, m_seen, stride_kb, stride_kh, stride_kn, stride_kd,
          stride_vb, stride_vh, stride_vn, stride_vd, scale2, slope, cap2,
          MASKED: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
          UPCAST: tl.constexpr):
    """One tile into the online softmax: keys at `b_index`, of which `m_key` are there and, per row, `m_seen` are kept."""
    b_k = _load(k, i_b, i_kh, b_index, m_key, stride_kb, stride_kh, stride_kn, stride_kd, D, DP, UPCAST)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if SOFTCAP:
        b_s = soft_cap(b_s, slope, cap2)
    else:
        b_s = b_s * scale2
    if MASKED:
        b_s = tl.where(m_seen, b_s, -float("inf"))
    b_next = tl.maximum(b_m, tl.max(b_s, 1))
    b_a = tl.exp2(b_m - b_next)
    b_p = tl.exp2(b_s - b_next[:, None])
    b_z = b_z * b_a + tl.sum(b_p, 1)
    b_v = _load(v, i_b, i_kh, b_index, m_key, stride_vb, stride_vh, stride_vn, stride_vd, DV, DVP, UPCAST)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o * b_a[:, None], input_precision="ieee")
    return b_next, b_z, b_o


@triton.jit
def _outside(m_seen, i_b, b_rows, b_index, m_r, m_key, Nq, Nk, q_segments, k_segments, SEGMENTS: tl.constexpr):
    """What the model itself hides beyond causality and its window."""
    if SEGMENTS:
        b_qs = tl.load(q_segments + i_b.to(tl.int64) * Nq + b_rows, mask=m_r, other=0)
        b_ks = tl.load(k_segments + i_b.to(tl.int64) * Nk + b_index, mask=m_key, other=0)
        m_seen = m_seen & (b_qs[:, None] == b_ks[None, :])
    return m_seen


@triton.jit(do_not_specialize=["Hq", "group", "Nq", "Nk", "q_offset", "k_offset", "limit", "n_columns", "n_gaps", "n_positions"])
def prefill_kernel(q, k, v, out, lse, work, rules, tiles, cells, columns, gaps, diagonals, marked, first, sinks, key_valid,
                   q_segments, k_segments,
                   stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
                   stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on,
                   scale2, slope, cap2, Hq, group, Nq, Nk, q_offset, k_offset, limit, n_columns, n_gaps, n_positions,
                   LIMIT: tl.constexpr, CELLS: tl.constexpr, LINES: tl.constexpr, VALID: tl.constexpr, SEGMENTS: tl.constexpr,
                   CAREFUL: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
                   D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   UPCAST: tl.constexpr):
    """BM rows of a line of `work` per program: `out` [B, Nq, Hq, Dv], `lse` [B, Hq, Nq] float32. CAREFUL: no tile is free of masks."""
    PARTS: tl.constexpr = 128 // BM
    KEYS: tl.constexpr = 128 // BN
    i_w = tl.program_id(0) // PARTS
    i_part = tl.program_id(0) % PARTS
    p_w = work + i_w.to(tl.int64) * 8
    i_bh = tl.load(p_w)
    row = tl.load(p_w + 1)
    partial = tl.load(p_w + 2)
    full = tl.load(p_w + 3)
    start = tl.load(p_w + 4)
    gathered = tl.load(p_w + 5)
    slot = tl.maximum(tl.load(p_w + 6), 0)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    i_kh = i_h // group
    sink = tl.load(rules + i_h * 2)
    window = tl.load(rules + i_h * 2 + 1)
    origin = tl.load(first + i_b).to(tl.int32)
    b_t = row * 128 + i_part * BM + tl.arange(0, BM)
    b_rows = b_t + origin - q_offset
    m_r = (b_rows >= 0) & (b_rows < Nq)
    k_shift = origin - k_offset

    b_q = _load(q, i_b, i_h, b_rows, m_r, stride_qb, stride_qh, stride_qn, stride_qd, D, DP, UPCAST)
    b_m = tl.full([BM], -1e30, tl.float32)
    b_z = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, DVP], tl.float32)
    masked = partial
    if CAREFUL:
        masked = partial + full
    for i in range(0, masked * KEYS):
        i_t = i // KEYS
        tile = visit(i_t, row, sink, window, limit, LIMIT)
        if start >= 0:
            tile = tl.load(tiles + start + i_t)
        b_s = tile * 128 + (i % KEYS) * BN + tl.arange(0, BN)
        b_index = b_s + k_shift
        m_key = (b_s >= 0) & (b_index >= 0) & (b_index < Nk)
        b_back = b_t[:, None] - b_s[None, :]
        m_kept = (b_s[None, :] < sink) | (b_back < window) | (i_t >= partial)
        if CELLS:
            b_bits = tl.load(cells + start + i_t, mask=start >= 0, other=0)
            b_line = ((b_bits >> (b_t % 128 // 16 * 8).to(tl.int64)) & 255).to(tl.int32)
            m_kept = m_kept | (((b_line[:, None] >> (b_s % 128 // 16)[None, :]) & 1) != 0)
        if LINES:
            m_line = (b_back >= 0) & (b_back < n_positions) & (start >= 0)
            b_diagonal = tl.load(diagonals + slot.to(tl.int64) * n_positions + b_back, mask=m_line, other=0)
            b_marked = tl.load(marked + slot.to(tl.int64) * n_positions + b_s, mask=(b_s < n_positions) & (start >= 0), other=0)
            m_kept = m_kept | (b_diagonal != 0) | (b_marked != 0)[None, :]
        if VALID:
            m_key = m_key & (tl.load(key_valid + i_b.to(tl.int64) * Nk + b_index, mask=m_key, other=0) != 0)
        m_seen = m_kept & (b_back >= 0) & m_key[None, :]
        if LIMIT:
            m_seen = m_seen & (b_back < limit)
        m_seen = _outside(m_seen, i_b, b_rows, b_index, m_r, m_key, Nq, Nk, q_segments, k_segments, SEGMENTS)
        b_m, b_z, b_o = _step(b_q, b_m, b_z, b_o, k, v, i_b, i_kh, b_index, m_key, m_seen, stride_kb, stride_kh, stride_kn, stride_kd,
                              stride_vb, stride_vh, stride_vn, stride_vd, scale2, slope, cap2, True, SOFTCAP, D, DP, DV, DVP, UPCAST)
    if LINES:
        for i in range(0, gathered * KEYS):
            o_c = i * BN + tl.arange(0, BN)
            b_s = tl.load(columns + slot.to(tl.int64) * n_columns + o_c, mask=o_c < n_columns, other=1073741824)
            b_index = b_s + k_shift
            gap = row - b_s // 128
            m_key = (gap >= 0) & (b_index >= 0) & (b_index < Nk)
            m_key = m_key & (tl.load(gaps + slot.to(tl.int64) * n_gaps + gap, mask=m_key, other=1) == 0)
            if VALID:
                m_key = m_key & (tl.load(key_valid + i_b.to(tl.int64) * Nk + b_index, mask=m_key, other=0) != 0)
            b_back = b_t[:, None] - b_s[None, :]
            m_seen = (b_back >= 0) & m_key[None, :]
            if LIMIT:
                m_seen = m_seen & (b_back < limit)
            m_seen = _outside(m_seen, i_b, b_rows, b_index, m_r, m_key, Nq, Nk, q_segments, k_segments, SEGMENTS)
            b_m, b_z, b_o = _step(b_q, b_m, b_z, b_o, k, v, i_b, i_kh, b_index, m_key, m_seen,
                                  stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
                                  scale2, slope, cap2, True, SOFTCAP, D, DP, DV, DVP, UPCAST)
    if not CAREFUL:
        for i in range(partial * KEYS, (partial + full) * KEYS):
            i_t = i // KEYS
            tile = visit(i_t, row, sink, window, limit, LIMIT)
            if start >= 0:
                tile = tl.load(tiles + start + i_t)
            b_index = tile * 128 + (i % KEYS) * BN + k_shift + tl.arange(0, BN)
            b_m, b_z, b_o = _step(b_q, b_m, b_z, b_o, k, v, i_b, i_kh, b_index, b_index < Nk, b_index < Nk,
                                  stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
                                  scale2, slope, cap2, False, SOFTCAP, D, DP, DV, DVP, UPCAST)

    b_top = b_m
    b_total = b_z
    if SINKS:
        # beyond the first real token only: rows of padding see no sink either
        b_sink = tl.where(b_t >= 0, tl.load(sinks + i_h) * 1.4426950408889634, -1e30)
        b_top = tl.maximum(b_m, b_sink)
        b_total = b_z * tl.exp2(b_m - b_top) + tl.where(b_t >= 0, tl.exp2(b_sink - b_top), 0.0)
        b_o = b_o * tl.exp2(b_m - b_top)[:, None]
    b_o = b_o / tl.where(b_total > 0, b_total, 1.0)[:, None]
    b_lse = tl.where(b_total > 0, (b_top + tl.log2(tl.where(b_total > 0, b_total, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(lse + i_bh.to(tl.int64) * Nq + b_rows, b_lse, mask=m_r)
    o_d = tl.arange(0, DVP)
    p_o = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh + b_rows.to(tl.int64)[:, None] * stride_on + o_d[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_r[:, None] & (o_d < DV)[None, :])
