"""The interior of a causal call on Hopper: every statistic of the tiles that need no mask, in one pass, when the rows' lse is known.

At 131,072 tokens more than 99 % of the visible entries lie in tiles that are wholly visible and further from the diagonal than any band.
For those, with the lse given, a weight is final when it is computed, and rows, columns and maps can all be taken from it at once. A
program owns 256 query rows of one head, 128 for each of two parties of four warps, and walks over key tiles; one more warp brings them.
The parties take turns at the matrix unit, so that one's product runs while the other takes its own apart; left alone they fall into step
and wait for the same unit, which costs as much again. (FlashAttention-3, 2407.08608, does the same for the forward pass. It is
written in Gluon because Triton has no roles for warps.) Nothing crosses threads in a turn but one exchange for the columns and two
numbers for a map's cell:

- a row's statistics stay in the threads that hold the row and are joined across its four lanes once, at the end;
- a column's 128 weights are added inside the threads first, then exchanged through shared memory.

What programs add to the same column or map cell is added as 64-bit integers in units of 2^-44, so that the order in which programs
finish does not show: the same bits on every run, which float atomics would not give.

All other tiles, with their masks and edges, belong to `triton_rows` and `triton_columns`; `triton_interior` says which.

Naming as in `triton_rows`; 0 and 1 are a party's upper and lower 64 rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

UPPER: gl.constexpr = gl.constexpr(0)
LOWER: gl.constexpr = gl.constexpr(1)
QUERIES, WARPS = 64, 4
"""Rows of a tile of queries as the kernel loads it, and warps to launch it with."""

# fmt: off


@gluon.jit
def _take(b_acc, b_ref, b_u, b_x, b_m, b_w, b_z, b_d, b_e, b_i, i_k, scale2,
          ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, PEAK: gl.constexpr, FAR: gl.constexpr,
          MASS: gl.constexpr, TOP: gl.constexpr):
    """Takes one product [64, 128] apart: its weights [64, 4, 32], the rows' accumulators [64, 4] after it, the tile's mass and largest
    exponent per row and lane."""
    # the four lanes of a row hold keys 8 i + 2 lane + {0, 1}: all 32 of a lane side by side
    b_s = gl.reshape(gl.permute(gl.reshape(b_acc, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32])
    b_y = b_s * scale2 - gl.expand_dims(b_ref, 2)
    b_p = gl.exp2(b_y)
    b_t = b_z
    b_top = b_m
    if ENTROPY:
        b_x += gl.sum(b_p * b_y, 2)
    if PEAK or TOP:
        b_top = gl.max(b_y, 2)
    if PEAK:
        b_w = gl.where(b_top > b_m, i_k, b_w)
        b_m = gl.maximum(b_m, b_top)
    if DISTANCE or SQUARE or FAR or MASS:
        b_t = gl.sum(b_p, 2)
        b_z += b_t
        if DISTANCE or SQUARE:
            b_1 = gl.sum(b_p * b_i, 2)
            b_d += b_u * b_t + b_1
            if SQUARE:
                b_e += b_u * (b_u * b_t + 2.0 * b_1) + gl.sum(b_p * (b_i * b_i), 2)
    return b_p, b_x, b_m, b_w, b_z, b_d, b_e, b_t, b_top


@gluon.jit
def _cell(mass, top, b_t, b_top, i_k, inside, MASS: gl.constexpr, TOP: gl.constexpr):
    """Adds what four warps found to their map cell, one number per warp: rows 16 w .. 16 w + 15 lie in warp w."""
    if MASS:
        p_m = gl.cast(gl.sum(gl.reshape(b_t, [4, 64]), 1) * 17592186044416.0, gl.int64)
        gl.atomic_add(mass + i_k + gl.zeros_like(p_m), p_m, mask=inside & (p_m >= 0), sem="relaxed")
    if TOP:
        p_x = gl.cast(gl.exp2(gl.max(gl.reshape(b_top, [4, 64]), 1)), gl.int32, bitcast=True)
        gl.atomic_max(top + i_k + gl.zeros_like(p_x), p_x, mask=inside & (p_x >= 0), sem="relaxed")


@gluon.jit
def _across(b_p):
    """Sums over the rows of a thread: [32, 128], one row per warp and lane group."""
    b_c = gl.reshape(gl.permute(gl.reshape(b_p, [64, 4, 16, 2]), [0, 2, 1, 3]), [4, 2, 8, 128])
    return gl.reshape(gl.sum(b_c, 1), [32, 128])


@gluon.jit
def _flush(columns, b_c):
    """Adds a tile's column sums [32, 128] to 128 columns."""
    b_c = gl.convert_layout(b_c, gl.BlockedLayout([32, 1], [1, 32], [1, 4], [1, 0]))
    b_c = gl.cast(gl.sum(gl.reshape(b_c, [1, 32, 128]), 1) * 17592186044416.0, gl.int64)
    o_c = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, b_c.type.layout)), 0)
    gl.atomic_add(columns + (o_c + gl.zeros_like(b_c)), b_c, sem="relaxed")


@gluon.jit
def _add(p_raw, n_rows, m_r, b_x, b_m, b_w, b_z, b_d, b_e, waad_window,
         ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr, WIN: gl.constexpr):
    """Joins a row's accumulators over its four lanes and with what the edges' sweep left in their slots; sink tokens and the local
    window are wholly its own."""
    b_top = gl.max(b_m, 1)
    b_old = gl.load(p_raw + n_rows, mask=m_r, other=-1e30)
    gl.store(p_raw + n_rows, gl.maximum(b_top, b_old), mask=m_r)
    if ENTROPY >= 0:
        gl.store(p_raw + ENTROPY * n_rows, gl.load(p_raw + ENTROPY * n_rows, mask=m_r, other=0.0) + gl.sum(b_x, 1), mask=m_r)
    if DISTANCE >= 0:
        gl.store(p_raw + DISTANCE * n_rows, gl.load(p_raw + DISTANCE * n_rows, mask=m_r, other=0.0) + gl.sum(b_d, 1), mask=m_r)
    if SQUARE >= 0:
        gl.store(p_raw + SQUARE * n_rows, gl.load(p_raw + SQUARE * n_rows, mask=m_r, other=0.0) + gl.sum(b_e, 1), mask=m_r)
    if WAAD >= 0:
        gl.store(p_raw + WAAD * n_rows, gl.load(p_raw + WAAD * n_rows, mask=m_r, other=0.0) + gl.sum(b_z, 1) * waad_window, mask=m_r)
    if WIN >= 0:
        # the interior's tiles come first, so that it wins a draw
        b_first = gl.min(gl.where(b_m == gl.expand_dims(b_top, 1), b_w, 8388608), 1)
        b_win = gl.load(p_raw + WIN * n_rows, mask=m_r, other=0.0)
        gl.store(p_raw + WIN * n_rows, gl.where(b_top >= b_old, b_first.to(gl.float32), b_win), mask=m_r)


@gluon.jit
def _consume(W: gl.constexpr, b_q, b_k, ready, empty, turn, ref, raw, columns, mass, top, scale2, i_g, i_bh, n, n_heads, n_groups, Nq, Nk,
             delta, waad_window, cells_q, cells_k, always,
             ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr, PEAK: gl.constexpr,
             WIN: gl.constexpr, ROW: gl.constexpr, COLUMNS: gl.constexpr, MASS: gl.constexpr, TOP: gl.constexpr,
             DP: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: 128 rows, in two products of 64 rows a tile. W: 0 the upper, 1 the lower 128 rows of the program."""
    dtype: gl.constexpr = b_k.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    FAR: gl.constexpr = WAAD >= 0
    o_q = i_g * 256 + W * 128
    i_cell = (i_bh.to(gl.int64) * cells_q + 2 * i_g + W) * cells_k
    mass += i_cell
    top += i_cell
    columns += i_bh.to(gl.int64) * Nk
    inside = 2 * i_g + W < cells_q

    b_zero = gl.zeros([64, 128], gl.float32, mma)
    lanes: gl.constexpr = gl.reshape(gl.permute(gl.reshape(b_zero, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32]).type.layout
    pair: gl.constexpr = gl.SliceLayout(2, lanes)
    o_r = gl.arange(0, 64, gl.SliceLayout(1, pair))
    o_32 = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, lanes)))
    b_i = gl.expand_dims(gl.expand_dims(8 * (15 - o_32 // 2) + 1 - o_32 % 2, 0), 1).to(gl.float32)
    o_4 = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, pair)), 0)
    b_u = (gl.expand_dims(o_q + delta - 127 + o_r, 1) + (6 - 2 * o_4)).to(gl.float32)
    p_ref = ref + i_bh.to(gl.int64) * n_groups * 256 + o_q + o_r
    b_ref0 = gl.expand_dims(gl.load(p_ref), 1)
    b_ref1 = gl.expand_dims(gl.load(p_ref + 64), 1)
    b_none = gl.zeros([64, 4], gl.float32, pair)
    b_x0 = b_none
    b_z0 = b_none
    b_d0 = b_none
    b_e0 = b_none
    b_x1 = b_none
    b_z1 = b_none
    b_d1 = b_none
    b_e1 = b_none
    b_m0 = gl.full([64, 4], -1e30, gl.float32, pair)
    b_m1 = b_m0
    b_w0 = gl.full([64, 4], 8388608, gl.int32, pair)
    b_w1 = b_w0
    b_q0 = b_q.index(2 * W)._reinterpret(dtype, [64, DP], flat)
    b_q1 = b_q.index(2 * W + 1)._reinterpret(dtype, [64, DP], flat)
    mbarrier.wait(ready.index(STAGES), 0)
    i_s = 0
    i_p = 0
    for i_k in range(0, n):
        b_kt = b_k.index(i_s)._reinterpret(dtype, [128, DP], flat).permute([1, 0])
        mbarrier.wait(ready.index(i_s), i_p)
        # the matrix unit is one party's at a time
        if W == 0:
            mbarrier.wait(turn.index(0), (i_k & 1) ^ 1)
        else:
            mbarrier.wait(turn.index(1), i_k & 1)
        b_s0 = warpgroup_mma(b_q0, b_kt, b_zero, use_acc=False, is_async=True)
        b_s1 = warpgroup_mma(b_q1, b_kt, b_zero, use_acc=False, is_async=True)
        b_a0, b_a1 = warpgroup_mma_wait(0, deps=[b_s0, b_s1])
        _barrier()
        mbarrier.arrive(turn.index(1 - W), count=1)
        mbarrier.arrive(empty.index(i_s), count=1)
        # a branch that is always taken: nothing of it may move in front of the turn's end
        if i_k < always:
            b_p, b_x0, b_m0, b_w0, b_z0, b_d0, b_e0, b_t0, b_top0 = _take(
                b_a0, b_ref0, b_u, b_x0, b_m0, b_w0, b_z0, b_d0, b_e0, b_i, i_k, scale2,
                ENTROPY >= 0, DISTANCE >= 0, SQUARE >= 0, PEAK, FAR, MASS, TOP)
            if COLUMNS:
                b_c = _across(b_p)
            b_p, b_x1, b_m1, b_w1, b_z1, b_d1, b_e1, b_t1, b_top1 = _take(
                b_a1, b_ref1, b_u + 64.0, b_x1, b_m1, b_w1, b_z1, b_d1, b_e1, b_i, i_k, scale2,
                ENTROPY >= 0, DISTANCE >= 0, SQUARE >= 0, PEAK, FAR, MASS, TOP)
            if COLUMNS:
                _flush(columns + i_k * 128, b_c + _across(b_p))
            _cell(mass, top, b_t0 + b_t1, gl.maximum(b_top0, b_top1), i_k, inside, MASS, TOP)
        b_u -= 128.0
        i_s += 1
        if i_s == STAGES:
            i_s = 0
            i_p ^= 1
    if ROW:
        n_rows = n_heads.to(gl.int64) * Nq
        p_raw = raw + i_bh.to(gl.int64) * Nq + o_q + o_r
        _add(p_raw, n_rows, o_q + o_r < Nq, b_x0, b_m0, b_w0, b_z0, b_d0, b_e0, waad_window,
             ENTROPY, DISTANCE, SQUARE, WAAD, WIN)
        _add(p_raw + 64, n_rows, o_q + o_r + 64 < Nq, b_x1, b_m1, b_w1, b_z1, b_d1, b_e1, waad_window,
             ENTROPY, DISTANCE, SQUARE, WAAD, WIN)


@gluon.jit
def _feed(q, k, b_q, b_k, ready, empty, i_b, i_h, i_kh, o_q, n, DP: gl.constexpr, STAGES: gl.constexpr):
    """One warp: the program's queries, then key tiles, each into the slot that both parties have read."""
    mbarrier.expect(ready.index(STAGES), 256 * DP * 2)
    for i in gl.static_range(4):
        tma.async_copy_global_to_shared(q, [i_b, i_h, o_q + 64 * i, 0], ready.index(STAGES), b_q.index(i))
    i_s = 0
    i_p = 1
    for i_k in range(0, n):
        mbarrier.wait(empty.index(i_s), i_p)
        mbarrier.expect(ready.index(i_s), 128 * DP * 2)
        tma.async_copy_global_to_shared(k, [i_b, i_kh, i_k * 128, 0], ready.index(i_s), b_k.index(i_s))
        i_s += 1
        if i_s == STAGES:
            i_s = 0
            i_p ^= 1


@gluon.jit(do_not_specialize=["Hq", "group", "Nq", "Nk", "delta", "near", "waad_window", "cells_q", "cells_k", "always"])
def interior_kernel(q, k, ref, raw, columns, mass, top, scale2, Hq, group, Nq, Nk, delta, near, waad_window, cells_q, cells_k, always,
                    ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr,
                    PEAK: gl.constexpr, WIN: gl.constexpr, ROW: gl.constexpr,
                    COLUMNS: gl.constexpr, MASS: gl.constexpr, TOP: gl.constexpr, DP: gl.constexpr, STAGES: gl.constexpr):
    """One program per 256 rows and head. Slots of `raw` [slots, B * Hq * Nq] as in `rows_kernel` with a given lse, which is `ref`
    [B * Hq, tiles * 256] in log2 units, +inf beyond the last row. `columns` [B * Hq, Nk] and `mass` [B * Hq, cells_q, cells_k] int64, and
    `top` (int32, the bits of a float) are added to. `delta`: absolute position of row 0 less that of key 0; the tiles
    taken end `near` tokens before the program's first row. `always`: larger than any tile number; see `_consume`.
    """
    dtype: gl.constexpr = q.dtype
    # the longest programs first: the last ones to run are then short
    i_g = gl.num_programs(0) - 1 - gl.program_id(0)
    i_bh = gl.program_id(1)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    n = gl.maximum(i_g * 256 + delta - near + 1, 0) // 128
    b_q = gl.allocate_shared_memory(dtype, [4, 1, 1, 64, DP], q.layout)
    b_k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, DP], k.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    _barrier()
    gl.warp_specialize(
        [
            (_consume, (UPPER, b_q, b_k, ready, empty, turn, ref, raw, columns, mass, top, scale2, i_g, i_bh, n, gl.num_programs(1),
                        gl.num_programs(0), Nq, Nk, delta, waad_window, cells_q, cells_k, always,
                        ENTROPY, DISTANCE, SQUARE, WAAD, PEAK, WIN, ROW, COLUMNS, MASS, TOP, DP, STAGES)),
            (_consume, (LOWER, b_q, b_k, ready, empty, turn, ref, raw, columns, mass, top, scale2, i_g, i_bh, n, gl.num_programs(1),
                        gl.num_programs(0), Nq, Nk, delta, waad_window, cells_q, cells_k, always,
                        ENTROPY, DISTANCE, SQUARE, WAAD, PEAK, WIN, ROW, COLUMNS, MASS, TOP, DP, STAGES)),
            (_feed, (q, k, b_q, b_k, ready, empty, i_b, i_h, i_h // group, i_g * 256, n, DP, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
