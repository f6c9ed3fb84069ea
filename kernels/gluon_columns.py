"""Column sums of a causal call on Hopper, alone and complete, when the rows' lse is known: what every key receives, in one sweep.

An edit that asks which keys are sinks needs this sum and nothing else, and pays for it beside every forward pass. A program owns 256 keys
of one query head, 128 for each of two parties of four warps, and walks over the query tiles from its diagonal on; one more warp brings
them. The product is transposed, k q^T, so that a column's sum runs along a thread's registers and crosses its four lanes once, at the
end; every column is written once, by the program that owns it, with no atomics and the same bits on every run. The parties take turns at
the matrix unit, as in `gluon_interior`: 64 exponentials a thread take about as long as the product they come from.

The silent failure this avoids: a row beyond the last one, which the copy engine fills with zeros and whose weights would be exp(0); its
lse is read as +inf, so that it gives nothing.

Naming as in `triton_columns`; 0 and 1 are a party's upper and lower 64 keys.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

UPPER: gl.constexpr = gl.constexpr(0)
LOWER: gl.constexpr = gl.constexpr(1)
TILE_KEYS, WARPS = 64, 4
"""Keys of a tile of keys as the kernel loads it, and warps to launch it with."""

# fmt: off


@gluon.jit
def _sums(b_acc, b_ref, scale2, o_i, o_j, MASKED: gl.constexpr):
    """What 64 keys receive from 128 queries, [64, 4]: a thread's own part. `b_acc` [64, 128] products, `b_ref` [128] lse in log2 units."""
    if MASKED:
        # first, so that the two forms begin differently and the compiler finds nothing to lift in front of the branch between them
        b_acc = gl.where(gl.expand_dims(o_i, 0) >= gl.expand_dims(o_j, 1), b_acc, -float("inf"))
    b_p = gl.exp2(b_acc * scale2 - gl.expand_dims(b_ref, 0))
    # the four lanes of a row hold queries 8 i + 2 lane + {0, 1}: all 32 of a lane side by side
    return gl.sum(gl.reshape(gl.permute(gl.reshape(b_p, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32]), 2)


@gluon.jit
def _consume(W: gl.constexpr, b_k, b_q, ready, empty, turn, lse, out, scale2, i_k, i_bh, begin, full, end, Nq, Nk, delta,
             DP: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: 128 keys, in two products of 64 a tile. W: 0 the upper, 1 the lower 128 keys of the program."""
    dtype: gl.constexpr = b_q.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    b_zero = gl.zeros([64, 128], gl.float32, mma)
    lanes: gl.constexpr = gl.reshape(gl.permute(gl.reshape(b_zero, [64, 16, 4, 2]), [0, 2, 1, 3]), [64, 4, 32]).type.layout
    pair: gl.constexpr = gl.SliceLayout(2, lanes)
    o_c = gl.arange(0, 128, gl.SliceLayout(0, mma))
    # the first row that sees a key
    o_j = i_k * 256 + W * 128 - delta + gl.arange(0, 64, gl.SliceLayout(1, mma))
    lse += i_bh.to(gl.int64) * Nq
    b_c0 = gl.zeros([64, 4], gl.float32, pair)
    b_c1 = gl.zeros([64, 4], gl.float32, pair)
    b_k0 = b_k.index(2 * W)._reinterpret(dtype, [64, DP], flat)
    b_k1 = b_k.index(2 * W + 1)._reinterpret(dtype, [64, DP], flat)
    mbarrier.wait(ready.index(STAGES), 0)
    i_s = 0
    i_p = 0
    i_t = 0
    for i_q in range(begin, end):
        o_i = i_q * 128 + o_c
        b_ref = gl.load(lse + o_i, mask=o_i < Nq, other=float("inf")) * 1.4426950408889634
        b_qt = b_q.index(i_s)._reinterpret(dtype, [128, DP], flat).permute([1, 0])
        mbarrier.wait(ready.index(i_s), i_p)
        # the matrix unit is one party's at a time, until its products are done: handed over while they are only queued, both parties'
        # products share the unit and end together, and the sweep takes 1.14 times as long
        if W == 0:
            mbarrier.wait(turn.index(0), i_t ^ 1)
        else:
            mbarrier.wait(turn.index(1), i_t)
        b_s0 = warpgroup_mma(b_k0, b_qt, b_zero, use_acc=False, is_async=True)
        b_s1 = warpgroup_mma(b_k1, b_qt, b_zero, use_acc=False, is_async=True)
        b_a0, b_a1 = warpgroup_mma_wait(0, deps=[b_s0, b_s1])
        _barrier()
        mbarrier.arrive(turn.index(1 - W), count=1)
        mbarrier.arrive(empty.index(i_s), count=1)
        # a branch in either case: nothing of it may move in front of the turn's end
        if i_q < full:
            b_c0 += _sums(b_a0, b_ref, scale2, o_i, o_j, True)
            b_c1 += _sums(b_a1, b_ref, scale2, o_i, o_j + 64, True)
        else:
            b_c0 += _sums(b_a0, b_ref, scale2, o_i, o_j, False)
            b_c1 += _sums(b_a1, b_ref, scale2, o_i, o_j, False)
        i_t ^= 1
        i_s += 1
        if i_s == STAGES:
            i_s = 0
            i_p ^= 1
    o_n = i_k * 256 + W * 128 + gl.arange(0, 64, gl.SliceLayout(1, pair))
    p_o = out + i_bh.to(gl.int64) * Nk + o_n
    gl.store(p_o, gl.sum(b_c0, 1), mask=o_n < Nk)
    gl.store(p_o + 64, gl.sum(b_c1, 1), mask=o_n + 64 < Nk)


@gluon.jit
def _feed(k, q, b_k, b_q, ready, empty, i_b, i_h, i_kh, o_k, begin, end, DP: gl.constexpr, STAGES: gl.constexpr):
    """One warp: the program's keys, then query tiles, each into the slot that both parties have read."""
    mbarrier.expect(ready.index(STAGES), 256 * DP * 2)
    for i in gl.static_range(4):
        tma.async_copy_global_to_shared(k, [i_b, i_kh, o_k + 64 * i, 0], ready.index(STAGES), b_k.index(i))
    i_s = 0
    i_p = 1
    for i_q in range(begin, end):
        mbarrier.wait(empty.index(i_s), i_p)
        mbarrier.expect(ready.index(i_s), 128 * DP * 2)
        tma.async_copy_global_to_shared(q, [i_b, i_h, i_q * 128, 0], ready.index(i_s), b_q.index(i_s))
        i_s += 1
        if i_s == STAGES:
            i_s = 0
            i_p ^= 1


@gluon.jit(do_not_specialize=["Hq", "group", "Nq", "Nk", "delta"])
def columns_only_kernel(k, q, lse, out, scale2, Hq, group, Nq, Nk, delta, DP: gl.constexpr, STAGES: gl.constexpr):
    """One program per 256 keys and query head: out [B * Hq, Nk] float32 = sum over rows of exp(score - lse).

    `lse` [B * Hq, Nq] in nats; `delta`: absolute position of row 0 less that of key 0, not negative; every key has a row that sees it.
    """
    dtype: gl.constexpr = q.dtype
    # the longest programs come first by themselves: early keys are seen by most rows
    i_k = gl.program_id(0)
    i_bh = gl.program_id(1)
    i_b = i_bh // Hq
    i_h = i_bh % Hq
    begin = gl.maximum(i_k * 256 - delta, 0) // 128
    full = (gl.maximum(i_k * 256 + 255 - delta, 0) + 127) // 128
    end = (Nq + 127) // 128
    b_k = gl.allocate_shared_memory(dtype, [4, 1, 1, 64, DP], k.layout)
    b_q = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, DP], q.layout)
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
            (_consume, (UPPER, b_k, b_q, ready, empty, turn, lse, out, scale2, i_k, i_bh, begin, full, end, Nq, Nk, delta, DP, STAGES)),
            (_consume, (LOWER, b_k, b_q, ready, empty, turn, lse, out, scale2, i_k, i_bh, begin, full, end, Nq, Nk, delta, DP, STAGES)),
            (_feed, (k, q, b_k, b_q, ready, empty, i_b, i_h, i_h // group, i_k * 256, begin, end, DP, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
