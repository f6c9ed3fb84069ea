"""Sparse attention of many rows on Hopper: the tiles that each head keeps, at the matrix unit's rate.

Two parties of four warps own 64 rows each and take turns at the matrix unit, so that one's products run while the other takes its scores
apart; one more warp brings the tiles (the roles and the order of FlashAttention-3, 2407.08608). A turn starts two products, the next
tile's q k^T and the last tile's p v, and so keys and the values of the tile before come and go as a pair.

What is different from a dense forward: a row of a sparse head is over after a dozen tiles, so what is paid once per row counts.

- Which tile comes next is read from a list, by the warp that brings it; the parties never wait for a list.
- Programs stay on their processor and take one line of work after another, and the turns do not stop where a line ends: the first q k^T
  of the next line is started together with the last p v of this one, whose rows are finished while the other party computes, and go
  out by a bulk copy.
- Only the partial tiles, which come first and of which the diagonal one is the first of all, have masks: a word of 32 bits per row and
  lane, put together from sinks, windows, cells, diagonals and columns before its scores are there, and tested bit by bit. What is
  looked up for it is asked for before the party waits for its turn.

What bounds it (Nsight Compute, H200, 32,768 tokens, a tenth and half of the tiles): the tensor pipe is busy 75 and 81 % of the time, at a
clock that the power limit lowers to 1.68 GHz; DRAM 11 and 2 %, L2 51 and 54 %, one block of 12 warps a processor. A line of work costs
1.3 tiles beside its own: its end and its masked tile. Weights are converted after both products of a turn and not before: the compiler
gives the registers of an operand away as soon as its product is started.

Naming as in `gluon_forward`; the lists are those of `sparse_lists`, the words those of `sparse_planes`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

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
def _upto(b_w):
    """Word of a lane with its keys up to and including b_w + 2 lane: key 8 a + 2 lane + b of a tile is bit 2 a + b."""
    b_n = gl.maximum(gl.minimum(2 * (b_w >> 3) + gl.minimum(b_w & 7, 1) + 1, 32), 0)
    return gl.where(b_n == 32, -1, (1 << (b_n & 31)) - 1)


@gluon.jit
def _looked_up(i, row, tile, partial, slot, start, o_r, o_4, cells, columns, diagonals, marks, has_cells, n_gaps, n_parts):
    """What the tables keep of the i-th tile of a line of work, a partial one or one of gathered columns: words [64, 4]."""
    o_w = o_r * 4 + o_4
    some = (o_w >= 0) & ((start >= 0) & (n_parts > 0))
    looked = some & (i < partial)
    b_word = gl.load(diagonals + (slot * n_gaps + row - tile) * 512 + o_w, mask=looked, other=0)
    b_word = b_word | gl.load(marks + (slot * n_gaps + tile) * 4 + o_w % 4, mask=looked, other=0)
    b_word = b_word | gl.load(columns + ((slot * n_gaps + row) * n_parts + i - partial) * 4 + o_w % 4, mask=some & (i >= partial), other=0)
    bits = gl.load(cells + start + i, mask=(start >= 0) & (i < partial) & (has_cells != 0), other=0)
    b_c = ((bits >> ((o_r // 16) * 8).to(gl.int64)) & 255).to(gl.int32)
    b_c = (b_c | (b_c << 12)) & 983055  # a cell of 16 keys is four bits of every lane
    b_c = (b_c | (b_c << 6)) & 50529027
    b_c = (b_c | (b_c << 3)) & 286331153
    return b_word | (b_c * 15)


@gluon.jit
def _kept(b_word, i, row, tile, partial, b_t, o_4, sink, window, limit, GENERAL: gl.constexpr):
    """Words [64, 4] of what is kept of a tile with masks. b_t [64, 1]: positions of the rows; o_4 [1, 4]: lane."""
    if GENERAL:
        # single columns lie in no visited tile, and the diagonal one is visited: they come before every row
        tile = gl.where(i < partial, tile, row - 1)
    o_first = tile * 128 + 2 * o_4
    b_w = b_t - o_first
    b_x = _upto(sink - 1 - o_first) | ~_upto(b_w - window)
    if GENERAL:
        b_x = gl.where(i < partial, b_x, 0) | b_word
    return b_x & _upto(b_w) & ~_upto(b_w - limit)


@gluon.jit
def _softmax(b_s, scale2, b_m, b_z):
    """Scores [64, 4, 32] -> weights, factor on what was before, maximum, sums [64, 4]."""
    b_next = gl.maximum(b_m, gl.max(gl.max(b_s, 2), 1) * scale2)
    b_f = gl.exp2(b_m - b_next)
    b_p = gl.exp2(b_s * scale2 - gl.expand_dims(gl.expand_dims(b_next, 1), 2))
    return b_p, b_f, b_next, b_z * gl.expand_dims(b_f, 1) + gl.sum(b_p, 2)


@gluon.jit
def _masked_softmax(b_s, b_x, o_32, scale2, b_m, b_z):
    """The same where only the entries with a bit in b_x [64, 4] count."""
    b_s = gl.where(((gl.expand_dims(b_x, 2) >> o_32) & 1) != 0, b_s * scale2, -float("inf"))
    b_next = gl.maximum(b_m, gl.max(gl.max(b_s, 2), 1))
    b_f = gl.exp2(b_m - b_next)
    b_p = gl.exp2(b_s - gl.expand_dims(gl.expand_dims(b_next, 1), 2))
    return b_p, b_f, b_next, b_z * gl.expand_dims(b_f, 1) + gl.sum(b_p, 2)


@gluon.jit
def _lanes(b_s):
    """A tile of scores by rows, lanes and the elements that a lane holds."""
    return gl.reshape(gl.permute(gl.reshape(b_s, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32])


@gluon.jit
def _operand(b_p, dtype: gl.constexpr, operand: gl.constexpr):
    """Weights [64, 4, 32] as the left operand of a product."""
    b_p = gl.reshape(gl.permute(gl.reshape(b_p.to(dtype), [64, 4, 16, 2]), [0, 2, 1, 3]), [64, 128])
    return gl.convert_layout(b_p, operand, assert_trivial=True)


@gluon.jit
def _finish(W: gl.constexpr, b_o, b_m, b_z, i_b, i_h, o_row, front, sinks, out, s_o, lse, Hq, Nq, flat: gl.constexpr,
            row_of: gl.constexpr, mma_o: gl.constexpr, dtype: gl.constexpr, D: gl.constexpr):
    """Output and lse of the 64 rows from o_row on: b_o [64, D] and b_z [64, 4] are sums relative to the maximum b_m. `out` has `front` rows
    more in front, since a bulk copy to rows before a tensor's first is an illegal instruction.
    """
    b_one = gl.sum(b_z, 1)
    b_sink = gl.load(sinks + i_h) * 1.4426950408889634
    b_top = gl.maximum(b_m, b_sink)
    b_share = gl.exp2(b_m - b_top)
    b_one = b_one * b_share + gl.exp2(b_sink - b_top)
    b_f = gl.where(b_one > 0, b_share / b_one, 0.0)
    b_lse = gl.where(b_one > 0, (b_top + gl.log2(b_one)) * 0.6931471805599453, -float("inf"))
    o_n = o_row + gl.arange(0, 64, row_of)
    gl.store(lse + (i_b * Hq + i_h).to(gl.int64) * Nq + o_n, b_lse, mask=(o_n >= 0) & (o_n < Nq))
    b_o *= gl.expand_dims(gl.convert_layout(b_f, gl.SliceLayout(1, mma_o), assert_trivial=True), 1)
    tma.store_wait(0)  # the rows before have left
    _barrier()
    s_o.index(W)._reinterpret(dtype, [64, D], flat).store(b_o.to(dtype))
    fence_async_shared()
    _barrier()
    tma.async_copy_shared_to_global(out, [i_b, i_h, o_row + front, 0], s_o.index(W))


@gluon.jit
def _consume(W: gl.constexpr, s_q, s_k, s_v, s_o, ready_q, empty_q, ready, empty, turn, work, rules, tiles, cells, columns, diagonals,
             marks, sinks, out, lse, scale2, items, Hq, Nq, q_offset, limit, has_cells, n_gaps, n_parts,
             GENERAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: rows 64 W .. 64 W + 63 of every line of work of the program."""
    dtype: gl.constexpr = s_k.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_o, k_width=2)
    b_zero = gl.zeros([64, 128], gl.float32, mma)
    lanes: gl.constexpr = _lanes(b_zero).type.layout
    pair: gl.constexpr = gl.SliceLayout(2, lanes)
    row_of: gl.constexpr = gl.SliceLayout(1, pair)
    o_r = gl.expand_dims(gl.arange(0, 64, row_of) + 64 * W, 1)
    o_4 = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, pair)), 0)
    o_32 = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, lanes))), 0), 1)
    b_word = o_r * 0 + o_4 * 0
    b_m = gl.full([64], -1e30, gl.float32, row_of)
    b_z = gl.zeros([64, 4], gl.float32, pair)
    b_o = gl.zeros([64, D], gl.float32, mma_o)
    b_p = gl.zeros([64, 128], dtype, operand)
    c = 0
    j = 0
    done_b = 0
    done_h = 0
    done_row = 0
    # one round more than there are lines: it only finishes the last
    for i_w in range(gl.program_id(0), items + gl.num_programs(0), gl.num_programs(0)):
        more = i_w < items
        p_w = work + gl.minimum(i_w, items - 1) * 8
        i_bh = gl.load(p_w)
        row = gl.load(p_w + 1)
        partial = gl.load(p_w + 2)
        start = gl.load(p_w + 4)
        gathered = gl.load(p_w + 5)
        n = gl.where(more, partial + gl.load(p_w + 3) + gathered, 1)
        slot = gl.maximum(gl.load(p_w + 6), 0)
        i_b = i_bh // Hq
        i_h = i_bh % Hq
        sink = gl.load(rules + i_h * 2)
        window = gl.load(rules + i_h * 2 + 1)
        b_t = row * 128 + o_r
        if GENERAL:
            b_word = _looked_up(0, row, row, partial, slot, start, o_r, o_4, cells, columns, diagonals, marks, has_cells, n_gaps, n_parts)
        # the diagonal tile's scores with the last values of the line before; where there is none, a product of whatever lies there is
        # started all the same, since a product in a branch would have to be waited for there, and thrown away
        i_s = c % STAGES
        i_t = (c + STAGES - 1) % STAGES
        b_q = s_q.index(2 * (j & 1) + W)._reinterpret(dtype, [64, D], flat)
        b_kt = s_k.index(i_s)._reinterpret(dtype, [128, D], flat).permute([1, 0])
        b_v = s_v.index(i_t)._reinterpret(dtype, [128, D], flat)
        mbarrier.wait(ready_q.index(j & 1), (j >> 1) & 1, pred=more)
        mbarrier.wait(ready.index(i_s), (c // STAGES) & 1)
        if W == 0:
            mbarrier.wait(turn.index(0), (c & 1) ^ 1)
        else:
            mbarrier.wait(turn.index(1), c & 1)
        b_sa = warpgroup_mma(b_q, b_kt, b_zero, use_acc=False, is_async=True)
        b_oa = warpgroup_mma(b_p, b_v, b_o, is_async=True)
        mbarrier.arrive(turn.index(1 - W), count=1)
        b_x = _kept(b_word, 0, row, row, partial, b_t, o_4, sink, window, limit, GENERAL)
        b_e = _lanes(warpgroup_mma_wait(1, deps=[b_sa]))
        b_top = gl.full([64], -1e30, gl.float32, row_of)
        b_sum = gl.zeros([64, 4], gl.float32, pair)
        if more:
            b_e, _b_f, b_top, b_sum = _masked_softmax(b_e, b_x, o_32, scale2, b_top, b_sum)
        b_o = warpgroup_mma_wait(0, deps=[b_oa])
        _barrier()
        mbarrier.arrive(empty.index(i_s), count=1)
        if j > 0:
            _finish(W, b_o, b_m, b_z, done_b, done_h, done_row, q_offset % 128, sinks, out, s_o, lse, Hq, Nq, flat, row_of, mma_o, dtype,
                    D)
        b_m = b_top
        b_z = b_sum
        b_o = gl.zeros([64, D], gl.float32, mma_o)
        b_p = _operand(b_e, dtype, operand)
        ahead = row
        if partial > 1:
            ahead = _visit(1, row, partial, gathered, sink, window, limit, tiles, start)
        for i in range(1, n):
            i_g = c + i
            i_s = i_g % STAGES
            i_t = (i_g - 1) % STAGES
            b_kt = s_k.index(i_s)._reinterpret(dtype, [128, D], flat).permute([1, 0])
            b_v = s_v.index(i_t)._reinterpret(dtype, [128, D], flat)
            tile = ahead
            if i + 1 < partial:
                ahead = _visit(i + 1, row, partial, gathered, sink, window, limit, tiles, start)
            if GENERAL:  # noqa: SIM102  (known when compiling)
                if i < partial + gathered:
                    b_word = _looked_up(i, row, tile, partial, slot, start, o_r, o_4, cells, columns, diagonals, marks, has_cells, n_gaps,
                                        n_parts)
            mbarrier.wait(ready.index(i_s), (i_g // STAGES) & 1)
            if W == 0:
                mbarrier.wait(turn.index(0), (i_g & 1) ^ 1)
            else:
                mbarrier.wait(turn.index(1), i_g & 1)
            b_sa = warpgroup_mma(b_q, b_kt, b_zero, use_acc=False, is_async=True)
            b_oa = warpgroup_mma(b_p, b_v, b_o, is_async=True)
            mbarrier.arrive(turn.index(1 - W), count=1)
            b_s = _lanes(warpgroup_mma_wait(1, deps=[b_sa]))
            # in branches, and written twice, so that the compiler does not wait for the other product before them
            if i >= partial + gathered:
                b_e, b_f, b_m, b_z = _softmax(b_s, scale2, b_m, b_z)
            else:
                b_x = _kept(b_word, i, row, tile, partial, b_t, o_4, sink, window, limit, GENERAL)
                b_e, b_f, b_m, b_z = _masked_softmax(b_s, b_x, o_32, scale2, b_m, b_z)
            b_o = warpgroup_mma_wait(0, deps=[b_oa])
            _barrier()
            mbarrier.arrive(empty.index(i_s), count=1)
            b_o *= gl.expand_dims(gl.convert_layout(b_f, gl.SliceLayout(1, mma_o), assert_trivial=True), 1)
            b_p = _operand(b_e, dtype, operand)
        mbarrier.arrive(empty_q.index(j & 1), count=1, pred=more)
        c += n
        j += 1  # noqa: SIM113
        done_b = i_b
        done_h = i_h
        done_row = row * 128 - q_offset + 64 * W
    tma.store_wait(0)


@gluon.jit
def _bring(x, x_g, i_b, i_kh, i_h, o_k, single, ready, slot, GENERAL: gl.constexpr):
    """128 keys or values from o_k on, or so many of the single columns of a query head."""
    if GENERAL:
        tma.async_copy_global_to_shared(x, [i_b, i_kh, o_k, 0], ready, slot, pred=single == 0)
        tma.async_copy_global_to_shared(x_g, [i_b, i_h, o_k, 0], ready, slot, pred=single != 0)
    else:
        tma.async_copy_global_to_shared(x, [i_b, i_kh, o_k, 0], ready, slot)


@gluon.jit
def _feed(q, k, v, k_g, v_g, s_q, s_k, s_v, ready_q, empty_q, ready, empty, work, rules, tiles, items, Hq, group, q_offset,
          limit, GENERAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """One warp: queries, then key tiles, each with the values of the tile before, into slots that both parties have read, a line of work
    after another; at last the values of the last tile.
    """
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
    last_b = 0
    last_kh = 0
    last_h = 0
    last_k = 0
    last_single = 0
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
            single = 0
            if GENERAL:
                single = ((i >= partial) & (i < partial + gathered)).to(gl.int32)
                o_k = gl.where(single != 0, (i - partial) * 128, o_k)
            tile = _visit(gl.minimum(i + 1, n - 1), row, partial, gathered, sink, window, limit, tiles, start)
            i_g = c + i
            i_s = i_g % STAGES
            mbarrier.wait(empty.index(i_s), ((i_g // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(i_s), 128 * D * 2, pred=i_g == 0)
            mbarrier.expect(ready.index(i_s), 256 * D * 2, pred=i_g > 0)
            _bring(k, k_g, i_b, i_kh, i_h, o_k, single, ready.index(i_s), s_k.index(i_s), GENERAL)
            if i_g > 0:
                _bring(v, v_g, last_b, last_kh, last_h, last_k, last_single, ready.index(i_s), s_v.index((i_g - 1) % STAGES), GENERAL)
            last_b = i_b
            last_kh = i_kh
            last_h = i_h
            last_k = o_k
            last_single = single
        c += n
        i_bh = next_bh
        row = next_row
        partial = next_partial
        full = next_full
        start = next_start
        gathered = next_gathered
        j += 1  # noqa: SIM113
    i_s = c % STAGES
    mbarrier.wait(empty.index(i_s), ((c // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(i_s), 128 * D * 2)
    _bring(v, v_g, last_b, last_kh, last_h, last_k, last_single, ready.index(i_s), s_v.index((c - 1) % STAGES), GENERAL)


@gluon.jit(do_not_specialize=["items", "Hq", "group", "Nq", "q_offset", "limit", "has_cells", "n_gaps", "n_parts"])
def sparse_kernel(q, k, v, k_g, v_g, out, lse, work, rules, tiles, cells, columns, diagonals, marks, sinks, scale2, items, Hq, group, Nq,
                  q_offset, limit, has_cells, n_gaps, n_parts, GENERAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """One program per processor over all `items` lines of `work`: `out` [B, Hq, q_offset % 128 + Nq, D], whose first rows are
    nobody's, `lse` [B, Hq, Nq] float32. Every line has tiles.
    GENERAL compiles in cells, diagonals and single columns: `diagonals`, `marks` and `columns` are `sparse_planes.Planes`, and `k_g` and
    `v_g` hold the single columns of each query head side by side. No model window then, which single columns would need positions for.
    `limit`: the model's own window, 2^30 for none; `sinks` [Hq] float32, -inf for none.
    """
    dtype: gl.constexpr = q.dtype
    s_q = gl.allocate_shared_memory(dtype, [4, 1, 1, 64, D], q.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, D], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, D], v.layout)
    s_o = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], out.layout)
    ready_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready_q.index(i), count=1)
        mbarrier.init(empty_q.index(i), count=2)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    _barrier()
    gl.warp_specialize(
        [
            (_consume, (UPPER, s_q, s_k, s_v, s_o, ready_q, empty_q, ready, empty, turn, work, rules, tiles, cells, columns, diagonals,
                        marks, sinks, out, lse, scale2, items, Hq, Nq, q_offset, limit, has_cells, n_gaps, n_parts, GENERAL, D, STAGES)),
            (_consume, (LOWER, s_q, s_k, s_v, s_o, ready_q, empty_q, ready, empty, turn, work, rules, tiles, cells, columns, diagonals,
                        marks, sinks, out, lse, scale2, items, Hq, Nq, q_offset, limit, has_cells, n_gaps, n_parts, GENERAL, D, STAGES)),
            (_feed, (q, k, v, k_g, v_g, s_q, s_k, s_v, ready_q, empty_q, ready, empty, work, rules, tiles, items, Hq, group, q_offset,
                     limit, GENERAL, D, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )
