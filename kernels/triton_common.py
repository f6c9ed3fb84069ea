"""Device functions shared by the Triton statistics kernels: loading tiles, scores in base 2, folding a tile into map cells.

Scores are kept in log2 units (`exp2` is the hardware's own exponential), so the factor log2(e) is folded into the scale on the host and
taken out again when a row is finished. Two silent failures are settled here, once:

- Triton's interpreter multiplies bfloat16 operands wrongly without an error, so `UPCAST` turns them into float32 there;
- a float32 `tl.dot` defaults to tf32, which is wrong in the third digit, so every product of inputs asks for IEEE precision.

Only what exists in every Triton from 3.6 to 3.9 is used: pointers with masks, and tensor descriptors made on the host.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _probe() -> None:
    """Never launched: its type says whether this process compiles kernels or interprets them."""


INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)
"""True when TRITON_INTERPRET=1 was set before triton was imported: kernels then run in numpy, on CPU tensors."""


@triton.jit
def load_tile(x, i_b, i_h, o_n, n_rows, stride_b, stride_h, stride_n, stride_d, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
              TMA: tl.constexpr, UPCAST: tl.constexpr):
    """Rows o_n .. o_n + BR of head i_h as [BR, DP]; rows outside [0, n_rows) and columns from D on are zero."""
    if TMA:
        b_x = tl.reshape(x.load([i_b, i_h, o_n, 0]), [BR, DP])
    else:
        rows = o_n + tl.arange(0, BR)
        cols = tl.arange(0, DP)
        base = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
        p_x = base + rows.to(tl.int64)[:, None] * stride_n + cols[None, :] * stride_d
        m_x = ((rows >= 0) & (rows < n_rows))[:, None]
        if D < DP:
            m_x = m_x & (cols < D)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def soft_cap(b_s, slope, cap2):
    """cap * tanh(score / cap) in log2 units; slope = 2 * scale / cap * log2(e).

    Far from zero by one exp2, whose overflow to inf gives the cap itself; near zero, where 1 - 2 / (e^2x + 1) would leave nothing but
    rounding of the cap, by the series of tanh.
    """
    b_x = b_s * (slope * 0.34657359027997264)
    b_2 = b_x * b_x
    b_tail = 0.13333333333333333 + b_2 * (-0.05396825396825397 + b_2 * 0.0218694885361552)
    b_near = b_x * (1.0 + b_2 * (-0.3333333333333333 + b_2 * b_tail))
    b_far = 1.0 - 2.0 / (tl.exp2(b_s * slope) + 1.0)
    return cap2 * tl.where(tl.abs(b_x) < 0.25, b_near, b_far)


@triton.jit
def element_mask(m_s, i_b, i_h, rows, cols, Nq, Nk, key_valid, q_segments, k_segments, allowed, stride_ab, stride_ah, stride_aq, stride_ak,
                 ELEMENT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What intervals cannot say: holes in the padding (1), unsorted segments (2), an explicit mask (4). [R, C], or [C, R] transposed."""
    m_r = (rows >= 0) & (rows < Nq)
    m_c = (cols >= 0) & (cols < Nk)
    if ELEMENT & 1:
        b_v = tl.load(key_valid + i_b.to(tl.int64) * Nk + cols, mask=m_c, other=0) != 0
        if TRANSPOSED:
            m_s = m_s & b_v[:, None]
        else:
            m_s = m_s & b_v[None, :]
    if ELEMENT & 2:
        b_qs = tl.load(q_segments + i_b.to(tl.int64) * Nq + rows, mask=m_r, other=0)
        b_ks = tl.load(k_segments + i_b.to(tl.int64) * Nk + cols, mask=m_c, other=0)
        if TRANSPOSED:
            m_s = m_s & (b_ks[:, None] == b_qs[None, :])
        else:
            m_s = m_s & (b_qs[:, None] == b_ks[None, :])
    if ELEMENT & 4:
        p_a = allowed + i_b.to(tl.int64) * stride_ab + i_h.to(tl.int64) * stride_ah
        if TRANSPOSED:
            p_t = p_a + cols.to(tl.int64)[:, None] * stride_ak + rows.to(tl.int64)[None, :] * stride_aq
            m_s = m_s & (tl.load(p_t, mask=m_c[:, None] & m_r[None, :], other=0) != 0)
        else:
            p_t = p_a + rows.to(tl.int64)[:, None] * stride_aq + cols.to(tl.int64)[None, :] * stride_ak
            m_s = m_s & (tl.load(p_t, mask=m_r[:, None] & m_c[None, :], other=0) != 0)
    return m_s


@triton.jit
def load_bias(i_b, i_h, rows, cols, Nq, Nk, bias, stride_bb, stride_bh, stride_bq, stride_bk, TRANSPOSED: tl.constexpr):
    """Additive bias of a tile in log2 units, [R, C] or [C, R] transposed; -inf where it hides its key, zero outside the matrix."""
    m_r = (rows >= 0) & (rows < Nq)
    m_c = (cols >= 0) & (cols < Nk)
    p_b = bias + i_b.to(tl.int64) * stride_bb + i_h.to(tl.int64) * stride_bh
    if TRANSPOSED:
        p_t = p_b + cols.to(tl.int64)[:, None] * stride_bk + rows.to(tl.int64)[None, :] * stride_bq
        b_b = tl.load(p_t, mask=m_c[:, None] & m_r[None, :], other=0.0)
    else:
        p_t = p_b + rows.to(tl.int64)[:, None] * stride_bq + cols.to(tl.int64)[None, :] * stride_bk
        b_b = tl.load(p_t, mask=m_r[:, None] & m_c[None, :], other=0.0)
    b_b = b_b.to(tl.float32)
    # hosts write "not visible" as -inf or as the lowest number of their dtype
    return tl.where(b_b > -1e30, b_b * 1.4426950408889634, -float("inf"))


@triton.jit
def fold_sum(b_x, R: tl.constexpr, C: tl.constexpr, MB: tl.constexpr):
    """[R, C] -> [R // MB, C // MB], sums over MB x MB cells."""
    b_y = tl.sum(tl.reshape(b_x, [R, C // MB, MB]), 2)
    return tl.sum(tl.reshape(b_y, [R // MB, MB, C // MB]), 1)


@triton.jit
def fold_max(b_x, R: tl.constexpr, C: tl.constexpr, MB: tl.constexpr):
    """[R, C] -> [R // MB, C // MB], maxima over MB x MB cells."""
    b_y = tl.max(tl.reshape(b_x, [R, C // MB, MB]), 2)
    return tl.max(tl.reshape(b_y, [R // MB, MB, C // MB]), 1)


@triton.jit
def tile_ranges(b_lo, b_hi, floor, a_min, a_max, b_origin, n_other, near, shift, dense, BT: tl.constexpr, ONE_SIDED: tl.constexpr,
                ROWS: tl.constexpr):
    """Which tiles of the other axis a program visits: begin, [f0, f1), [g0, g1), end.

    Tiles in [begin, end) hold something visible; in [f0, f1) and [g0, g1) everything is visible, lies at least `near` from the diagonal,
    and on one side of it, so that no mask is needed. `b_lo`, `b_hi`: the visible interval of each of the program's own rows (or keys);
    `floor`: first index a full tile may hold; `a_min`, `a_max`: absolute positions of the program's own first and last element;
    `b_origin`: absolute position of index 0 of the other axis; tile number i starts at index i * BT - shift.
    """
    some = b_hi > b_lo
    first = tl.min(tl.where(some, b_lo, n_other))
    last = tl.max(tl.where(some, b_hi, 0))
    full_lo = tl.maximum(tl.max(tl.where(some, b_lo, 0)), floor)
    full_hi = tl.min(tl.where(some, b_hi, n_other))
    begin = (first + shift) // BT
    end = tl.maximum((last + shift + BT - 1) // BT, begin)
    f0 = (full_lo + shift + BT - 1) // BT
    top = tl.maximum(full_hi + shift, 0) // BT
    # indices before `below` are at least `near` before the program's first element; from `above` on at least `near` behind its last
    below = a_min - near + 1 - b_origin
    above = a_max + near - b_origin
    f1 = tl.minimum(top, tl.maximum(below + shift, 0) // BT)
    g0 = tl.maximum(f0, tl.maximum(above + shift + BT - 1, 0) // BT)
    g1 = top
    if ONE_SIDED:
        # causal: rows look back only (f), keys are looked at from later rows only (g)
        if ROWS:
            g0 = top
        else:
            f1 = f0
    if near == 0:
        if ONE_SIDED:
            if ROWS:
                f1 = top
            else:
                g0 = f0
        else:
            f1 = top
            g0 = top
    f0 = tl.minimum(tl.maximum(f0, begin), end)
    f1 = tl.minimum(tl.maximum(f1, f0), end)
    g0 = tl.minimum(tl.maximum(g0, f1), end)
    g1 = tl.minimum(tl.maximum(g1, g0), end)
    if dense == 0:
        f1 = f0
        g0 = f0
        g1 = f0
    return begin, f0, f1, g0, g1, end


@triton.jit
def moments(b_p, behind, SQUARE: tl.constexpr, ONE_SIDED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Row sums of p, p j and p j^2 over [R, C], j the distance within the tile from its key nearest to the row (the last one if `behind`).

    j = 8 i + c: the sums over i stay inside a thread and their factors are constants of the instruction, where a vector of all j
    would hold a register per column. The second moment is 0 unless SQUARE.
    """
    b_3 = tl.reshape(b_p, [R, C // 8, 8])
    o_i = tl.arange(0, C // 8)
    o_c = tl.arange(0, 8)
    if ONE_SIDED:
        b_i = (C // 8 - 1 - o_i).to(tl.float32)[None, :, None]
        b_c = (7 - o_c).to(tl.float32)[None, :]
    else:
        b_i = tl.where(behind, C // 8 - 1 - o_i, o_i).to(tl.float32)[None, :, None]
        b_c = tl.where(behind, 7 - o_c, o_c).to(tl.float32)[None, :]
    # [R, 8]
    b_0 = tl.sum(b_3, 1)
    b_1 = tl.sum(b_3 * b_i, 1)
    b_s2 = tl.zeros([R], tl.float32)
    if SQUARE:
        b_2 = tl.sum(b_3 * (b_i * b_i), 1)
        b_s2 = tl.sum(64.0 * b_2 + b_c * (16.0 * b_1 + b_c * b_0), 1)
    return tl.sum(b_0, 1), tl.sum(8.0 * b_1 + b_c * b_0, 1), b_s2
