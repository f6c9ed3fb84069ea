"""Split-KV decoding under a plan: one query row per head (or a few), each head with keys of its own.

A decode step reads keys and does next to no arithmetic, so what counts is that every kept key is read once and that all of the chip reads.
Hence: one launch for all heads; a program serves all query heads of one key head and loads a tile of keys once for those of them that need
it, whatever each of them sees of it; and the keys of a key head are cut into as many parts as its length under the plan deserves, so that a
quarter of the heads with a hundred times the keys does not wait on a quarter of the chip.

What a head sees is said by positions, not by a mask: the first `sink` keys of its text, the last `window`, every key from `since` on, and a
list (of keys, or of blocks of keys) that all heads of the group share, with one bit per head. A row counts a key once, also where its rules
overlap. Positions become places in memory by a rule per key head (`Places`), so that a cache that keeps a ring for some heads and all keys
for others is read as it lies.

Lengths come from device tensors and grids from capacities: a captured CUDA graph stays right while the text grows. Parts are float32 and
are joined by a second kernel with their log-sum-exps, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton_common import soft_cap

# ruff: noqa: SIM108  (branches on compile-time flags stay statements)
# fmt: off


@triton.jit
def _fold(b_q, b_m, b_l, b_o, k, v, base_k, base_v, slot, real, seen, stride_kn, stride_kd, stride_vn, stride_vd, scale2, slope, cap2,
          D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr):
    """One tile of keys at `slot` [BN] into the running maximum, sum and output of the rows; `seen` [M, BN] says which row sees which."""
    o_d = tl.arange(0, DP)
    o_v = tl.arange(0, DVP)
    # [BN, DP], [BN, DVP]
    m_k = real[:, None]
    m_v = real[:, None]
    if D < DP:
        m_k = m_k & (o_d < D)[None, :]
    if DV < DVP:
        m_v = m_v & (o_v < DV)[None, :]
    wide = slot.to(tl.int64)
    b_k = tl.load(k + base_k + wide[:, None] * stride_kn + o_d[None, :] * stride_kd, mask=m_k, other=0.0)
    b_v = tl.load(v + base_v + wide[:, None] * stride_vn + o_v[None, :] * stride_vd, mask=m_v, other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
        b_v = b_v.to(tl.float32)
    # [M, BN]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if SOFTCAP:
        b_s = soft_cap(b_s, slope, cap2)
    else:
        b_s = b_s * scale2
    b_s = tl.where(seen, b_s, -float("inf"))
    new = tl.maximum(b_m, tl.max(b_s, 1))
    safe = tl.where(new == -float("inf"), 0.0, new)
    b_p = tl.exp2(b_s - safe[:, None])
    b_a = tl.exp2(b_m - safe)
    b_l = b_l * b_a + tl.sum(b_p, 1)
    b_o = b_o * b_a[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return new, b_l, b_o


@triton.jit
def decode_parts(q, k, v, o, l, base_k, base_v, places, rules, lengths, starts, work, slots, bits, counts, valid,  # noqa: E741
                 stride_qb, stride_qh, stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_rb, stride_list,
                 stride_valid, n_rows, kv_heads, model_window, scale2, slope, cap2,
                 GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
                 DVP: tl.constexpr, BN: tl.constexpr, LB: tl.constexpr, LIST: tl.constexpr, RANGES: tl.constexpr, RING: tl.constexpr,
                 VALID: tl.constexpr, ALIGNED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, CHAINED: tl.constexpr):
    """Part `work[program]` = (key head, part, parts) of every sequence: o [B, P, M, DV] float32 and its log2-sum-exp2 l [B, P, M]."""
    if CHAINED:  # the joining kernel may be brought up while this one runs; it waits for the end of this one by itself
        tl.extra.cuda.gdc_launch_dependents()
    i_p = tl.program_id(0)
    i_b = tl.program_id(1)
    i_g = tl.load(work + i_p * 3)
    part = tl.load(work + i_p * 3 + 1)
    parts = tl.load(work + i_p * 3 + 2)
    length = tl.load(lengths + i_b).to(tl.int32)
    start = tl.load(starts + i_b).to(tl.int32)
    rows = tl.arange(0, M)
    m_r = rows < GROUP * n_rows
    h = rows // n_rows
    head = i_g * GROUP + h
    t = length - n_rows + rows % n_rows  # [M] positions
    p_r = rules + i_b * stride_rb + head * 3
    sink = tl.load(p_r, mask=m_r, other=0)
    window = tl.load(p_r + 1, mask=m_r, other=0)
    since = tl.load(p_r + 2, mask=m_r, other=1 << 30)
    p_q = q + i_b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + (rows % n_rows) * stride_qn
    o_d = tl.arange(0, DP)
    b_q = tl.load(p_q[:, None] + o_d[None, :] * stride_qd, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    from_k = tl.load(base_k + i_b * kv_heads + i_g)
    from_v = tl.load(base_v + i_b * kv_heads + i_g)
    if ALIGNED:  # without this a number read from memory could be anything, and every element is loaded by itself
        from_k = tl.multiple_of(from_k, 16)
        from_v = tl.multiple_of(from_v, 16)
    fixed = tl.load(places + i_g * 3)
    ring = tl.load(places + i_g * 3 + 1)
    shift = tl.load(places + i_g * 3 + 2)

    # the two ranges that some row of the group sees: [origin, origin + n_sink) and [low, length)
    first = length - n_rows
    low = tl.minimum(first - tl.max(window) + 1, tl.min(since))
    origin = tl.maximum(start, 0)
    low = tl.minimum(tl.maximum(tl.maximum(low, first - model_window + 1), origin), length)
    n_sink = tl.maximum(tl.minimum(start + tl.max(sink), low) - origin, 0)
    n_range = 0
    if RANGES:
        n_range = n_sink + length - low
    n_list = 0
    if LIST:
        n_list = tl.load(counts + i_b * kv_heads + i_g) * LB
    range_tiles = (n_range + BN - 1) // BN
    tiles = range_tiles + (n_list + BN - 1) // BN
    begin = (part * tiles) // parts
    end = ((part + 1) * tiles) // parts

    b_m = tl.full([M], -float("inf"), tl.float32)
    b_l = tl.zeros([M], tl.float32)
    b_o = tl.zeros([M, DVP], tl.float32)
    o_n = tl.arange(0, BN)
    if RANGES:
        for tile in tl.range(begin, tl.minimum(end, range_tiles)):
            x = tile * BN + o_n
            pos = tl.where(x < n_sink, origin + x, low + x - n_sink)
            real = x < n_range
            back = t[:, None] - pos[None, :]
            seen = (pos[None, :] < start + sink[:, None]) | (back < window[:, None]) | (pos[None, :] >= since[:, None])
            seen = seen & (back >= 0) & (back < model_window)
            if VALID:
                real = real & (tl.load(valid + i_b.to(tl.int64) * stride_valid + pos, mask=real, other=0) != 0)
            seen = seen & real[None, :]
            slot = pos + shift
            if RING:
                away = pos - start
                turned = tl.where(away < fixed, away, fixed + (away - fixed) % tl.maximum(ring, 1))
                slot = tl.where(ring > 0, turned + shift, slot)
            b_m, b_l, b_o = _fold(b_q, b_m, b_l, b_o, k, v, from_k, from_v, slot, real, seen, stride_kn, stride_kd, stride_vn, stride_vd,
                                  scale2, slope, cap2, D, DP, DV, DVP, SOFTCAP, UPCAST)
    if LIST:
        p_list = (i_b * kv_heads + i_g).to(tl.int64) * stride_list
        for tile in tl.range(tl.maximum(begin, range_tiles) - range_tiles, tl.maximum(end - range_tiles, 0)):
            x = tile * BN + o_n
            real = x < n_list
            pos = tl.load(slots + p_list + x // LB, mask=real, other=0) * LB + x % LB
            b_b = tl.load(bits + p_list + x // LB, mask=real, other=0)
            real = real & ((pos >= start) & (pos < length) | (fixed < 0))
            if VALID:
                real = real & (tl.load(valid + i_b.to(tl.int64) * stride_valid + pos, mask=real, other=0) != 0)
            seen = ((b_b[None, :] >> h[:, None]) & 1) != 0
            seen = seen & real[None, :] & m_r[:, None]
            back = t[:, None] - pos[None, :]
            here = (back >= 0) & (back < model_window)
            if RANGES:  # a listed key that a row's ranges hold is counted there
                ranged = (pos[None, :] < start + sink[:, None]) | (back < window[:, None]) | (pos[None, :] >= since[:, None])
                here = here & (ranged == 0)
            seen = seen & (here | (fixed < 0))  # the list of a head with fixed < 0 names places, and holds no key twice
            b_m, b_l, b_o = _fold(b_q, b_m, b_l, b_o, k, v, from_k, from_v, pos, real, seen, stride_kn, stride_kd, stride_vn, stride_vd,
                                  scale2, slope, cap2, D, DP, DV, DVP, SOFTCAP, UPCAST)

    some = b_l > 0.0
    b_o = tl.where(some[:, None], b_o / tl.where(some, b_l, 1.0)[:, None], 0.0)
    at = (i_b * tl.num_programs(0) + i_p).to(tl.int64) * M + rows
    tl.store(l + at, tl.where(some, b_m + tl.log2(tl.where(some, b_l, 1.0)), -float("inf")), mask=m_r)
    o_v = tl.arange(0, DVP)
    tl.store(o + at[:, None] * DV + o_v[None, :], b_o, mask=m_r[:, None] & (o_v < DV)[None, :])


@triton.jit
def join_parts(o, l, out, lse, spans, sink_logits, n_parts, n_rows, heads, stride_ob, stride_on, stride_oh,  # noqa: E741
               GROUP: tl.constexpr, M: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, SINKS: tl.constexpr,
               CHAINED: tl.constexpr):
    """Joins the parts of one row of one head: out [B, n_rows, H, DV], lse [B, H, n_rows] in nats. `spans` [Hkv, 2]: first part, parts."""
    i_r = tl.program_id(0)
    i_d = tl.program_id(1)
    i_b = i_r // (heads * n_rows)
    head = (i_r // n_rows) % heads
    i_n = i_r % n_rows
    first = tl.load(spans + head // GROUP * 2)
    parts = tl.load(spans + head // GROUP * 2 + 1)
    row = (head % GROUP) * n_rows + i_n
    o_d = i_d * BD + tl.arange(0, BD)
    m = -float("inf")
    total = 0.0
    b_o = tl.zeros([BD], tl.float32)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    for at in tl.range(0, parts, BP):
        o_p = at + tl.arange(0, BP)
        m_p = o_p < parts
        place = (i_b.to(tl.int64) * n_parts + first + o_p) * M + row
        b_l = tl.load(l + place, mask=m_p, other=-float("inf"))
        b_x = tl.load(o + place[:, None] * DV + o_d[None, :], mask=m_p[:, None] & (o_d < DV)[None, :], other=0.0)
        new = tl.maximum(m, tl.max(b_l))
        safe = tl.where(new == -float("inf"), 0.0, new)
        b_w = tl.exp2(b_l - safe)
        old = tl.exp2(m - safe)
        total = total * old + tl.sum(b_w)
        b_o = b_o * old + tl.sum(b_w[:, None] * b_x, 0)
        m = new
    if SINKS:
        extra = tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(m, extra)
        old = tl.exp2(m - new)
        total = total * old + tl.exp2(extra - new)
        b_o = b_o * old
        m = new
    some = total > 0.0
    b_o = tl.where(some, b_o / tl.where(some, total, 1.0), 0.0)
    p_o = out + i_b.to(tl.int64) * stride_ob + i_n * stride_on + head * stride_oh + o_d
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=o_d < DV)
    if i_d == 0:
        tl.store(lse + i_r, tl.where(some, (m + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, -float("inf")))
