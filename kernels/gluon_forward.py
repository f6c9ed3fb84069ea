"""The row-statistics forward on Hopper: attention output, lse and every row statistic of a causal call in one pass over the keys.

A program owns 128 query rows of one head, 64 for each of two parties of four warps, which take turns at the matrix unit: while one's
products run, the other takes its scores apart (the roles and the order of FlashAttention-3, 2407.08608); one more warp brings the tiles.
Each turn starts two products, the next tile's q k^T and this tile's p v, and only waits for the first of them. The online softmax and the
statistics are those of `triton_rows`; each lane sums its own 32 keys of a row, and the four lanes of a row only share the running
maximum, which the output needs, until the row is done.

Tiles on the diagonal, within a band of a statistic, or with sink tokens go through the masked code; all others know that everything
is visible and far away. Both are branches of one loop, so nothing has to be joined afterwards.

Naming as in `triton_rows` and `gluon_interior`.
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
def _begin(b_top, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc, i_k,
           ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr, SINK: gl.constexpr,
           LOCAL: gl.constexpr, WIN: gl.constexpr):
    """Moves a row's accumulators to its new maximum: b_top [64], in log2 units, is the largest score of the tile."""
    b_next = gl.maximum(b_m, b_top)
    if WIN:
        b_w = gl.where(b_top > b_m, i_k, b_w)
    b_f = gl.exp2(b_m - b_next)
    b_g = gl.expand_dims(b_f, 1)
    if ENTROPY:
        b_x = (b_x + b_z * gl.expand_dims(b_m - b_next, 1)) * b_g
    b_z *= b_g
    if DISTANCE:
        b_d *= b_g
    if SQUARE:
        b_e *= b_g
    if WAAD:
        b_a *= b_g
    if SINK:
        b_si *= b_g
    if LOCAL:
        b_lc *= b_g
    return b_next, b_f, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc


@gluon.jit
def _far(b_s, scale2, b_u, b_i, waad_window, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc, i_k,
         ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr, SINK: gl.constexpr,
         LOCAL: gl.constexpr, WIN: gl.constexpr):
    """A tile [64, 4, 32] that is visible throughout and behind every band. b_u [64, 4]: distance to a lane's nearest key."""
    b_top = gl.max(gl.max(b_s, 2), 1) * scale2
    b_m, b_f, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc = _begin(
        b_top, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc, i_k, ENTROPY, DISTANCE, SQUARE, WAAD, SINK, LOCAL, WIN)
    b_y = b_s * scale2 - gl.expand_dims(gl.expand_dims(b_m, 1), 2)
    b_p = gl.exp2(b_y)
    if ENTROPY:
        b_x += gl.sum(b_p * b_y, 2)
    b_t = gl.sum(b_p, 2)
    b_z += b_t
    if DISTANCE or SQUARE:
        b_1 = gl.sum(b_p * b_i, 2)
        if DISTANCE:
            b_d += b_u * b_t + b_1
        if SQUARE:
            b_e += b_u * (b_u * b_t + 2.0 * b_1) + gl.sum(b_p * (b_i * b_i), 2)
    if WAAD:
        b_a += b_t * waad_window
    return b_p, b_f, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc


@gluon.jit
def _near(b_s, scale2, b_dist, b_key, sinks, waad_window, local_window, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc, i_k,
          ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr, SINK: gl.constexpr,
          LOCAL: gl.constexpr, WIN: gl.constexpr):
    """Any other tile: b_dist [64, 4, 32] is the distance from row to key, below zero where the key is hidden; b_key [1, 4, 32]."""
    b_y = gl.where(b_dist >= 0, b_s * scale2, -float("inf"))
    b_top = gl.max(gl.max(b_y, 2), 1)
    b_m, b_f, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc = _begin(
        b_top, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc, i_k, ENTROPY, DISTANCE, SQUARE, WAAD, SINK, LOCAL, WIN)
    b_y = b_y - gl.expand_dims(gl.expand_dims(b_m, 1), 2)
    b_p = gl.exp2(b_y)
    if ENTROPY:
        b_x += gl.sum(b_p * gl.where(b_p > 0, b_y, 0.0), 2)
    b_z += gl.sum(b_p, 2)
    b_pd = b_p * b_dist.to(gl.float32)
    if DISTANCE:
        b_d += gl.sum(b_pd, 2)
    if SQUARE:
        b_e += gl.sum(b_pd * b_dist.to(gl.float32), 2)
    if WAAD:
        b_a += gl.sum(b_p * gl.minimum(b_dist, waad_window).to(gl.float32), 2)
    if SINK:
        b_si += gl.sum(gl.where(b_key < sinks, b_p, 0.0), 2)
    if LOCAL:
        b_lc += gl.sum(gl.where(b_dist < local_window, b_p, 0.0), 2)
    return b_p, b_f, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc


@gluon.jit
def _consume(W: gl.constexpr, s_q, s_k, s_v, ready_q, ready_k, ready_v, empty_k, empty_v, turn, raw, out, stride_ob, stride_oh, stride_on,
             scale2, i_b, i_h, i_bh, o_first, n, n_heads, Nq, delta, near, sinks, waad_window, local_window,
             ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr, SINK: gl.constexpr,
             LOCAL: gl.constexpr, WIN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: rows 64 W .. 64 W + 63 of the program, over all of its key tiles."""
    dtype: gl.constexpr = s_k.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    o_q = o_first + 64 * W
    # the far tiles are [first, last)
    last = gl.maximum(o_first + delta - near + 1, 0) // 128
    first = 0
    if SINK >= 0:
        first = (gl.maximum(sinks, 0) + 127) // 128

    b_zero = gl.zeros([64, 128], gl.float32, mma)
    lanes: gl.constexpr = gl.reshape(gl.permute(gl.reshape(b_zero, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32]).type.layout
    pair: gl.constexpr = gl.SliceLayout(2, lanes)
    row: gl.constexpr = gl.SliceLayout(1, pair)
    o_r = gl.arange(0, 64, row)
    o_32 = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, lanes)))
    o_4 = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, pair)), 0)
    b_i = gl.expand_dims(gl.expand_dims(8 * (15 - o_32 // 2) + 1 - o_32 % 2, 0), 1).to(gl.float32)
    b_u = (gl.expand_dims(o_q + delta - 127 + o_r, 1) + (6 - 2 * o_4)).to(gl.float32)
    b_j = gl.expand_dims(2 * o_4, 2) + gl.expand_dims(gl.expand_dims(8 * (o_32 // 2) + o_32 % 2, 0), 1)
    b_home = gl.expand_dims(gl.expand_dims(o_q + delta + o_r, 1), 2)
    b_z = gl.zeros([64, 4], gl.float32, pair)
    b_x = b_z
    b_d = b_z
    b_e = b_z
    b_a = b_z
    b_si = b_z
    b_lc = b_z
    b_m = gl.full([64], -1e30, gl.float32, row)
    b_w = gl.full([64], 8388608, gl.int32, row)

    b_q = s_q.index(W)._reinterpret(dtype, [64, D], flat)
    b_o = gl.zeros([64, D], gl.float32, mma_o)
    # nothing yet: a product with weights of zero
    b_p2 = gl.convert_layout(gl.zeros([64, 128], dtype, mma), operand)
    mbarrier.wait(ready_q.index(0), 0)
    for i_k in range(0, n):
        i_v = gl.maximum(i_k - 1, 0)
        i_s = i_k % STAGES
        i_t = i_v % STAGES
        b_kt = s_k.index(i_s)._reinterpret(dtype, [128, D], flat).permute([1, 0])
        b_v = s_v.index(i_t)._reinterpret(dtype, [128, D], flat)
        mbarrier.wait(ready_k.index(i_s), (i_k // STAGES) & 1)
        mbarrier.wait(ready_v.index(i_t), (i_v // STAGES) & 1)
        if W == 0:
            mbarrier.wait(turn.index(0), (i_k & 1) ^ 1)
        else:
            mbarrier.wait(turn.index(1), i_k & 1)
        b_sa = warpgroup_mma(b_q, b_kt, b_zero, use_acc=False, is_async=True)
        b_oa = warpgroup_mma(b_p2, b_v, b_o, is_async=True)
        mbarrier.arrive(turn.index(1 - W), count=1)
        b_s = warpgroup_mma_wait(1, deps=[b_sa])
        b_s = gl.reshape(gl.permute(gl.reshape(b_s, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32])
        if (i_k >= first) & (i_k < last):
            b_p, b_f, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc = _far(
                b_s, scale2, b_u, b_i, waad_window, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc, i_k,
                ENTROPY >= 0, DISTANCE >= 0, SQUARE >= 0, WAAD >= 0, SINK >= 0, LOCAL >= 0, WIN >= 0)
        else:
            b_key = i_k * 128 + b_j
            b_p, b_f, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc = _near(
                b_s, scale2, b_home - b_key, b_key, sinks, waad_window, local_window, b_m, b_w, b_z, b_x, b_d, b_e, b_a, b_si, b_lc, i_k,
                ENTROPY >= 0, DISTANCE >= 0, SQUARE >= 0, WAAD >= 0, SINK >= 0, LOCAL >= 0, WIN >= 0)
        b_p = gl.reshape(gl.permute(gl.reshape(b_p.to(dtype), [64, 4, 16, 2]), [0, 2, 1, 3]), [64, 128])
        b_o = warpgroup_mma_wait(0, deps=[b_oa])
        _barrier()
        mbarrier.arrive(empty_k.index(i_s), count=1)
        mbarrier.arrive(empty_v.index(i_t), count=1, pred=i_k > 0)
        b_o *= gl.expand_dims(gl.convert_layout(b_f, gl.SliceLayout(1, mma_o), assert_trivial=True), 1)
        b_p2 = gl.convert_layout(b_p, operand, assert_trivial=True)
        b_u -= 128.0
    i_t = (n - 1) % STAGES
    mbarrier.wait(ready_v.index(i_t), ((n - 1) // STAGES) & 1)
    b_v = s_v.index(i_t)._reinterpret(dtype, [128, D], flat)
    b_o = warpgroup_mma_wait(0, deps=[warpgroup_mma(b_p2, b_v, b_o, is_async=True)])

    n_rows = n_heads.to(gl.int64) * Nq
    m_r = o_q + o_r < Nq
    p_raw = raw + i_bh.to(gl.int64) * Nq + o_q + o_r
    b_one = gl.sum(b_z, 1)
    gl.store(p_raw, b_m, mask=m_r)
    gl.store(p_raw + n_rows, b_one, mask=m_r)
    if ENTROPY >= 0:
        gl.store(p_raw + ENTROPY * n_rows, gl.sum(b_x, 1), mask=m_r)
    if DISTANCE >= 0:
        gl.store(p_raw + DISTANCE * n_rows, gl.sum(b_d, 1), mask=m_r)
    if SQUARE >= 0:
        gl.store(p_raw + SQUARE * n_rows, gl.sum(b_e, 1), mask=m_r)
    if WAAD >= 0:
        gl.store(p_raw + WAAD * n_rows, gl.sum(b_a, 1), mask=m_r)
    if SINK >= 0:
        gl.store(p_raw + SINK * n_rows, gl.sum(b_si, 1), mask=m_r)
    if LOCAL >= 0:
        gl.store(p_raw + LOCAL * n_rows, gl.sum(b_lc, 1), mask=m_r)
    if WIN >= 0:
        gl.store(p_raw + WIN * n_rows, b_w.to(gl.float32), mask=m_r)
    b_o = b_o / gl.expand_dims(gl.convert_layout(b_one, gl.SliceLayout(1, mma_o), assert_trivial=True), 1)
    o_d = gl.arange(0, D, gl.SliceLayout(0, mma_o))
    o_m = gl.arange(0, 64, gl.SliceLayout(1, mma_o))
    p_o = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh + gl.expand_dims((o_q + o_m).to(gl.int64) * stride_on, 1)
    gl.store(p_o + gl.expand_dims(o_d, 0), b_o.to(dtype), mask=gl.expand_dims(o_q + o_m < Nq, 1))


@gluon.jit
def _feed(q, k, v, s_q, s_k, s_v, ready_q, ready_k, ready_v, empty_k, empty_v, i_b, i_h, i_kh, o_q, n, D: gl.constexpr,
          STAGES: gl.constexpr):
    """One warp: the program's queries, then key and value tiles, each into the slot that both parties have read."""
    mbarrier.expect(ready_q.index(0), 128 * D * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [i_b, i_h, o_q + 64 * i, 0], ready_q.index(0), s_q.index(i))
    for i_k in range(0, n):
        i_s = i_k % STAGES
        i_p = ((i_k // STAGES) & 1) ^ 1
        mbarrier.wait(empty_k.index(i_s), i_p)
        mbarrier.expect(ready_k.index(i_s), 128 * D * 2)
        tma.async_copy_global_to_shared(k, [i_b, i_kh, i_k * 128, 0], ready_k.index(i_s), s_k.index(i_s))
        mbarrier.wait(empty_v.index(i_s), i_p)
        mbarrier.expect(ready_v.index(i_s), 128 * D * 2)
        tma.async_copy_global_to_shared(v, [i_b, i_kh, i_k * 128, 0], ready_v.index(i_s), s_v.index(i_s))


@gluon.jit(do_not_specialize=["Hq", "group", "Nq", "delta", "near", "sinks", "waad_window", "local_window"])
def forward_kernel(q, k, v, raw, out, stride_ob, stride_oh, stride_on, scale2, Hq, group, Nq, delta, near, sinks, waad_window, local_window,
                   ENTROPY: gl.constexpr, DISTANCE: gl.constexpr, SQUARE: gl.constexpr, WAAD: gl.constexpr, SINK: gl.constexpr,
                   LOCAL: gl.constexpr, WIN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """One program per 128 rows and head: `out` [B, Hq, Nq, D] and the accumulators of `rows_kernel` without a given lse in `raw`
    [slots, B * Hq * Nq]. `delta`: absolute position of row 0 less that of key 0; `near`: how far behind a program's first row a tile must
    end to lie behind every band; `sinks`: index of the first key that is no sink token.
    """
    dtype: gl.constexpr = q.dtype
    # the longest programs first: the last ones to run are then short
    o_q = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    i_bh = gl.program_id(1)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    n = (gl.minimum(o_q + 128, Nq) + delta + 127) // 128
    s_q = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], q.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, D], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, D], v.layout)
    ready_q = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready_q.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(empty_k.index(i), count=2)
        mbarrier.init(empty_v.index(i), count=2)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    _barrier()
    gl.warp_specialize(
        [
            (_consume, (UPPER, s_q, s_k, s_v, ready_q, ready_k, ready_v, empty_k, empty_v, turn, raw, out, stride_ob, stride_oh, stride_on,
                        scale2, i_b, i_h, i_bh, o_q, n, gl.num_programs(1), Nq, delta, near, sinks, waad_window, local_window,
                        ENTROPY, DISTANCE, SQUARE, WAAD, SINK, LOCAL, WIN, D, STAGES)),
            (_consume, (LOWER, s_q, s_k, s_v, ready_q, ready_k, ready_v, empty_k, empty_v, turn, raw, out, stride_ob, stride_oh, stride_on,
                        scale2, i_b, i_h, i_bh, o_q, n, gl.num_programs(1), Nq, delta, near, sinks, waad_window, local_window,
                        ENTROPY, DISTANCE, SQUARE, WAAD, SINK, LOCAL, WIN, D, STAGES)),
            (_feed, (q, k, v, s_q, s_k, s_v, ready_q, ready_k, ready_v, empty_k, empty_v, i_b, i_h, i_h // group, o_q, n, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
