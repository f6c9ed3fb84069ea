"""Sparse attention of many rows on Hopper: the tiles that each head keeps, at the matrix unit's rate.

Two parties of four warps own 64 rows each and take turns at the matrix unit, so that one's products run while the other takes its scores
apart; one more warp brings the tiles (the roles and the order of FlashAttention-3, 2407.08608). A turn starts two products, the next
tile's q k^T and the last tile's p v.

What is different from a dense forward: which tile comes next is read from a list, by the warp that brings it, so that the parties never
wait for a list; only the partial tiles, which come first and of which the diagonal one is the first of all, have masks; and programs stay
on their processor and take one line of work after another, since a row of a sparse head is over after a dozen tiles: the next rows'
queries and keys are then on their way while the last ones are being finished.

Naming as in `gluon_forward`; the lists are those of `sparse_lists`.
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
def _visit(i, row, partial, gathered, sink, window, limit, tiles, start):
    """Number of the i-th tile of a line of work, by its list or, as in `sparse_prefill_triton.visit`, by its ranges. Tiles of gathered
    columns come between the partial and the full ones, and have no number."""
    if start >= 0:
        tile = gl.load(tiles + start + gl.where(i < partial, i, gl.maximum(i - gathered, 0)))
    else:
        top = row * 128
        reach = gl.minimum(window, limit)
        w0 = gl.minimum(gl.maximum(top - reach + 1, 0) // 128, row)
        w1 = gl.maximum(gl.minimum(gl.maximum(top + 128 - reach, 0) + 127, row * 128) // 128, w0)
        sinks = gl.minimum((sink + 127) // 128, w0)
        full = gl.where(limit < 1073741824, 0, gl.minimum(sink // 128, sinks))
        edge = 1 + w1 - w0
        inner = gl.where(i < partial + full, i - partial, w1 + i - partial - full)
        outer = gl.where(i < edge, w0 + i - 1, full + i - edge)
        tile = gl.where(i == 0, row, gl.where(i < partial, outer, inner))
    return tile


@gluon.jit
def _whole(b_s, scale2, b_m, b_z):
    """Scores [64, 4, 32] of a tile of which everything is kept -> weights, factor on what was before, maximum, sums [64, 4]."""
    b_next = gl.maximum(b_m, gl.max(gl.max(b_s, 2), 1) * scale2)
    b_f = gl.exp2(b_m - b_next)
    b_p = gl.exp2(b_s * scale2 - gl.expand_dims(gl.expand_dims(b_next, 1), 2))
    return b_p, b_f, b_next, b_z * gl.expand_dims(b_f, 1) + gl.sum(b_p, 2)


@gluon.jit
def _masked(b_s, scale2, b_m, b_z, i, row, b_t, o_r, o_4, o_32, partial, gathered, slot, start, sink, window, limit, tiles, cells, columns,
            diagonals, marks, has_cells, n_gaps, n_parts, GENERAL: gl.constexpr):
    """The same of the i-th tile of a line of work, a partial one or one of gathered columns. b_t [64, 1, 1]: positions of the rows; o_r
    [64, 1], o_4 [1, 4], o_32 [1, 1, 32]: row, lane and element; `sparse_planes` says which key that is."""
    tile = row
    if i != 0:
        tile = _visit(gl.minimum(i, partial - 1), row, partial, gathered, sink, window, limit, tiles, start)
    if GENERAL:
        # single columns lie in no visited tile, and the diagonal one is visited: they come before every row
        tile = gl.where(i < partial, tile, gl.maximum(row - 1, 0))
    b_key = tile * 128 + gl.expand_dims(2 * o_4, 2) + 8 * (o_32 // 2) + o_32 % 2
    b_dist = b_t - b_key
    kept = (b_key < sink) | (b_dist < window)
    if GENERAL:
        o_w = o_r * 4 + o_4
        looked = (o_w >= 0) & ((start >= 0) & (n_parts > 0) & (i < partial))
        single = (o_w >= 0) & ((start >= 0) & (n_parts > 0) & (i >= partial))
        b_word = gl.load(diagonals + (slot * n_gaps + row - tile) * 512 + o_w, mask=looked, other=0)
        b_word = b_word | gl.load(marks + (slot * n_gaps + tile) * 4 + o_w % 4, mask=looked, other=0)
        b_word = b_word | gl.load(columns + ((slot * n_gaps + row) * n_parts + i - partial) * 4 + o_w % 4, mask=single, other=0)
        kept = kept | (((gl.expand_dims(b_word, 2) >> o_32) & 1) != 0)
        bits = gl.load(cells + start + i, mask=(start >= 0) & (i < partial) & (has_cells != 0), other=0)
        b_line = ((bits >> ((o_r // 16) * 8).to(gl.int64)) & 255).to(gl.int32)
        kept = kept | (((gl.expand_dims(b_line, 2) >> (o_32 // 4)) & 1) != 0)
    kept = kept & (b_dist >= 0) & (b_dist < limit)
    b_y = gl.where(kept, b_s * scale2, -float("inf"))
    b_next = gl.maximum(b_m, gl.max(gl.max(b_y, 2), 1))
    b_f = gl.exp2(b_m - b_next)
    b_p = gl.exp2(b_y - gl.expand_dims(gl.expand_dims(b_next, 1), 2))
    return b_p, b_f, b_next, b_z * gl.expand_dims(b_f, 1) + gl.sum(b_p, 2)


@gluon.jit
def _finish(W: gl.constexpr, b_o, b_m, b_z, i_bh, row, sinks, out, lse, stride_ob, stride_oh, stride_on, Hq, Nq, q_offset,
            D: gl.constexpr, row_of: gl.constexpr, mma_o: gl.constexpr, dtype: gl.constexpr):
    """Output and lse of 64 rows: b_o [64, D] and b_z [64, 4] are sums relative to the maximum b_m."""
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    b_one = gl.sum(b_z, 1)
    b_sink = gl.load(sinks + i_h) * 1.4426950408889634
    b_top = gl.maximum(b_m, b_sink)
    b_share = gl.exp2(b_m - b_top)
    b_one = b_one * b_share + gl.exp2(b_sink - b_top)
    b_f = b_share / b_one
    o_n = row * 128 - q_offset + 64 * W + gl.arange(0, 64, row_of)
    gl.store(lse + i_bh.to(gl.int64) * Nq + o_n, (b_top + gl.log2(b_one)) * 0.6931471805599453, mask=(o_n >= 0) & (o_n < Nq))
    b_o *= gl.expand_dims(gl.convert_layout(b_f, gl.SliceLayout(1, mma_o), assert_trivial=True), 1)
    o_d = gl.arange(0, D, gl.SliceLayout(0, mma_o))
    o_n = row * 128 - q_offset + 64 * W + gl.arange(0, 64, gl.SliceLayout(1, mma_o))
    p_o = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh + gl.expand_dims(o_n.to(gl.int64) * stride_on, 1)
    gl.store(p_o + gl.expand_dims(o_d, 0), b_o.to(dtype), mask=gl.expand_dims((o_n >= 0) & (o_n < Nq), 1))


@gluon.jit
def _consume(W: gl.constexpr, s_q, s_k, s_v, ready_q, empty_q, ready_k, ready_v, empty_k, empty_v, turn, work, rules, tiles, cells, columns,
             diagonals, marks, sinks, out, lse, stride_ob, stride_oh, stride_on, scale2, items, Hq, Nq, q_offset, limit, has_cells,
             n_gaps, n_parts, GENERAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: rows 64 W .. 64 W + 63 of every line of work of the program."""
    dtype: gl.constexpr = s_k.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    b_zero = gl.zeros([64, 128], gl.float32, mma)
    lanes: gl.constexpr = gl.reshape(gl.permute(gl.reshape(b_zero, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32]).type.layout
    pair: gl.constexpr = gl.SliceLayout(2, lanes)
    row_of: gl.constexpr = gl.SliceLayout(1, pair)
    o_r = gl.expand_dims(gl.arange(0, 64, row_of) + 64 * W, 1)
    o_4 = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, pair)), 0)
    o_32 = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, lanes))), 0), 1)
    c = 0
    j = 0
    for i_w in range(gl.program_id(0), items, gl.num_programs(0)):
        p_w = work + i_w * 8
        i_bh = gl.load(p_w)
        row = gl.load(p_w + 1)
        partial = gl.load(p_w + 2)
        start = gl.load(p_w + 4)
        gathered = gl.load(p_w + 5)
        n = partial + gl.load(p_w + 3) + gathered
        slot = gl.maximum(gl.load(p_w + 6), 0)
        i_h = i_bh % Hq
        sink = gl.load(rules + i_h * 2)
        window = gl.load(rules + i_h * 2 + 1)
        b_t = gl.expand_dims(row * 128 + o_r, 2)
        b_q = s_q.index(2 * (j & 1) + W)._reinterpret(dtype, [64, D], flat)
        # the diagonal tile: scores only, its values are multiplied in the next turn
        i_s = c % STAGES
        b_kt = s_k.index(i_s)._reinterpret(dtype, [128, D], flat).permute([1, 0])
        mbarrier.wait(ready_q.index(j & 1), (j >> 1) & 1)
        mbarrier.wait(ready_k.index(i_s), (c // STAGES) & 1)
        if W == 0:
            mbarrier.wait(turn.index(0), (c & 1) ^ 1)
        else:
            mbarrier.wait(turn.index(1), c & 1)
        b_sa = warpgroup_mma(b_q, b_kt, b_zero, use_acc=False, is_async=True)
        mbarrier.arrive(turn.index(1 - W), count=1)
        b_s0 = warpgroup_mma_wait(0, deps=[b_sa])
        _barrier()
        mbarrier.arrive(empty_k.index(i_s), count=1)
        b_s0 = gl.reshape(gl.permute(gl.reshape(b_s0, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32])
        b_p0, _b_f0, b_m, b_z = _masked(
            b_s0, scale2, gl.full([64], -1e30, gl.float32, row_of), gl.zeros([64, 4], gl.float32, pair), 0, row, b_t, o_r, o_4, o_32,
            partial, gathered, slot, start, sink, window, limit, tiles, cells, columns, diagonals, marks, has_cells, n_gaps, n_parts,
            GENERAL)
        b_p1 = gl.reshape(gl.permute(gl.reshape(b_p0.to(dtype), [64, 4, 16, 2]), [0, 2, 1, 3]), [64, 128])
        b_p2 = gl.convert_layout(b_p1, operand, assert_trivial=True)
        b_o = gl.zeros([64, D], gl.float32, mma_o)
        for i in range(1, n):
            i_g = c + i
            i_s = i_g % STAGES
            i_t = (i_g - 1) % STAGES
            b_kt = s_k.index(i_s)._reinterpret(dtype, [128, D], flat).permute([1, 0])
            b_v = s_v.index(i_t)._reinterpret(dtype, [128, D], flat)
            mbarrier.wait(ready_k.index(i_s), (i_g // STAGES) & 1)
            mbarrier.wait(ready_v.index(i_t), ((i_g - 1) // STAGES) & 1)
            if W == 0:
                mbarrier.wait(turn.index(0), (i_g & 1) ^ 1)
            else:
                mbarrier.wait(turn.index(1), i_g & 1)
            b_sa = warpgroup_mma(b_q, b_kt, b_zero, use_acc=False, is_async=True)
            b_oa = warpgroup_mma(b_p2, b_v, b_o, is_async=True)
            mbarrier.arrive(turn.index(1 - W), count=1)
            b_s = warpgroup_mma_wait(1, deps=[b_sa])
            b_s = gl.reshape(gl.permute(gl.reshape(b_s, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32])
            if i >= partial + gathered:
                b_p, b_f, b_m, b_z = _whole(b_s, scale2, b_m, b_z)
            else:
                b_p, b_f, b_m, b_z = _masked(
                    b_s, scale2, b_m, b_z, i, row, b_t, o_r, o_4, o_32, partial, gathered, slot, start, sink, window, limit, tiles, cells,
                    columns, diagonals, marks, has_cells, n_gaps, n_parts, GENERAL)
            b_p = gl.reshape(gl.permute(gl.reshape(b_p.to(dtype), [64, 4, 16, 2]), [0, 2, 1, 3]), [64, 128])
            b_o = warpgroup_mma_wait(0, deps=[b_oa])
            _barrier()
            mbarrier.arrive(empty_k.index(i_s), count=1)
            mbarrier.arrive(empty_v.index(i_t), count=1)
            b_o *= gl.expand_dims(gl.convert_layout(b_f, gl.SliceLayout(1, mma_o), assert_trivial=True), 1)
            b_p2 = gl.convert_layout(b_p, operand, assert_trivial=True)
        mbarrier.arrive(empty_q.index(j & 1), count=1)
        c += n
        i_t = (c - 1) % STAGES
        mbarrier.wait(ready_v.index(i_t), ((c - 1) // STAGES) & 1)
        b_v = s_v.index(i_t)._reinterpret(dtype, [128, D], flat)
        b_o = warpgroup_mma_wait(0, deps=[warpgroup_mma(b_p2, b_v, b_o, is_async=True)])
        _barrier()
        mbarrier.arrive(empty_v.index(i_t), count=1)
        _finish(W, b_o, b_m, b_z, i_bh, row, sinks, out, lse, stride_ob, stride_oh, stride_on, Hq, Nq, q_offset, D, row_of, mma_o, dtype)
        j += 1  # noqa: SIM113


@gluon.jit
def _feed(q, k, v, k_g, v_g, s_q, s_k, s_v, ready_q, empty_q, ready_k, ready_v, empty_k, empty_v, work, rules, tiles, items, Hq, group,
          q_offset, limit, GENERAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """One warp: queries, then key and value tiles, each into the slot that both parties have read, a line of work after another."""
    c = 0
    j = 0
    # what comes next is asked for one line of work, and one tile, ahead
    p_w = work + gl.program_id(0) * 8
    i_bh = gl.load(p_w)
    row = gl.load(p_w + 1)
    partial = gl.load(p_w + 2)
    full = gl.load(p_w + 3)
    start = gl.load(p_w + 4)
    gathered = gl.load(p_w + 5)
    for i_w in range(gl.program_id(0), items, gl.num_programs(0)):
        p_w = work + gl.minimum(i_w + gl.num_programs(0), items - 1) * 8
        next_bh = gl.load(p_w)
        next_row = gl.load(p_w + 1)
        next_partial = gl.load(p_w + 2)
        next_full = gl.load(p_w + 3)
        next_start = gl.load(p_w + 4)
        next_gathered = gl.load(p_w + 5)
        n = partial + full + gathered
        i_b = i_bh // Hq
        i_h = i_bh % Hq
        i_kh = i_h // group
        sink = gl.load(rules + i_h * 2)
        window = gl.load(rules + i_h * 2 + 1)
        o_q = row * 128 - q_offset
        i_u = j & 1
        mbarrier.wait(empty_q.index(i_u), ((j >> 1) & 1) ^ 1)
        mbarrier.expect(ready_q.index(i_u), 128 * D * 2)
        for i in gl.static_range(2):
            tma.async_copy_global_to_shared(q, [i_b, i_h, o_q + 64 * i, 0], ready_q.index(i_u), s_q.index(2 * i_u + i))
        tile = row
        for i in range(0, n):
            o_k = tile * 128
            tile = _visit(gl.minimum(i + 1, n - 1), row, partial, gathered, sink, window, limit, tiles, start)
            i_g = c + i
            i_s = i_g % STAGES
            i_p = ((i_g // STAGES) & 1) ^ 1
            mbarrier.wait(empty_k.index(i_s), i_p)
            mbarrier.expect(ready_k.index(i_s), 128 * D * 2)
            if GENERAL:
                single = (i >= partial) & (i < partial + gathered)
                listed = (i < partial) | (i >= partial + gathered)
                tma.async_copy_global_to_shared(k, [i_b, i_kh, o_k, 0], ready_k.index(i_s), s_k.index(i_s), pred=listed)
                tma.async_copy_global_to_shared(k_g, [i_b, i_h, (i - partial) * 128, 0], ready_k.index(i_s), s_k.index(i_s), pred=single)
            else:
                tma.async_copy_global_to_shared(k, [i_b, i_kh, o_k, 0], ready_k.index(i_s), s_k.index(i_s))
            mbarrier.wait(empty_v.index(i_s), i_p)
            mbarrier.expect(ready_v.index(i_s), 128 * D * 2)
            if GENERAL:
                single = (i >= partial) & (i < partial + gathered)
                listed = (i < partial) | (i >= partial + gathered)
                tma.async_copy_global_to_shared(v, [i_b, i_kh, o_k, 0], ready_v.index(i_s), s_v.index(i_s), pred=listed)
                tma.async_copy_global_to_shared(v_g, [i_b, i_h, (i - partial) * 128, 0], ready_v.index(i_s), s_v.index(i_s), pred=single)
            else:
                tma.async_copy_global_to_shared(v, [i_b, i_kh, o_k, 0], ready_v.index(i_s), s_v.index(i_s))
        c += n
        i_bh = next_bh
        row = next_row
        partial = next_partial
        full = next_full
        start = next_start
        gathered = next_gathered
        j += 1  # noqa: SIM113


@gluon.jit(do_not_specialize=["items", "Hq", "group", "Nq", "q_offset", "limit", "has_cells", "n_gaps", "n_parts"])
def sparse_kernel(q, k, v, k_g, v_g, out, lse, work, rules, tiles, cells, columns, diagonals, marks, sinks, stride_ob, stride_oh,
                  stride_on, scale2, items, Hq, group, Nq, q_offset, limit, has_cells, n_gaps, n_parts,
                  GENERAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """One program per processor over all `items` lines of `work`: `out` [B, Nq, Hq, D], `lse` [B, Hq, Nq] float32. Every line has tiles.
    GENERAL compiles in cells, diagonals and single columns: `diagonals`, `marks` and `columns` are `sparse_planes.Planes`, and `k_g` and
    `v_g` hold the single columns of each query head side by side. No model window then, which single columns would need positions for.
    `limit`: the model's own window, 2^30 for none; `sinks` [Hq] float32, -inf for none.
    """
    dtype: gl.constexpr = q.dtype
    s_q = gl.allocate_shared_memory(dtype, [4, 1, 1, 64, D], q.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, D], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, D], v.layout)
    ready_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready_q.index(i), count=1)
        mbarrier.init(empty_q.index(i), count=2)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(empty_k.index(i), count=2)
        mbarrier.init(empty_v.index(i), count=2)
    _barrier()
    gl.warp_specialize(
        [
            (_consume, (UPPER, s_q, s_k, s_v, ready_q, empty_q, ready_k, ready_v, empty_k, empty_v, turn, work, rules, tiles, cells,
                        columns, diagonals, marks, sinks, out, lse, stride_ob, stride_oh, stride_on, scale2, items, Hq, Nq, q_offset, limit,
                        has_cells, n_gaps, n_parts, GENERAL, D, STAGES)),
            (_consume, (LOWER, s_q, s_k, s_v, ready_q, empty_q, ready_k, ready_v, empty_k, empty_v, turn, work, rules, tiles, cells,
                        columns, diagonals, marks, sinks, out, lse, stride_ob, stride_oh, stride_on, scale2, items, Hq, Nq, q_offset, limit,
                        has_cells, n_gaps, n_parts, GENERAL, D, STAGES)),
            (_feed, (q, k, v, k_g, v_g, s_q, s_k, s_v, ready_q, empty_q, ready_k, ready_v, empty_k, empty_v, work, rules, tiles, items, Hq,
                     group, q_offset, limit, GENERAL, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
