"""Rows of tile states to lists of tile numbers, on the device: the partial tiles first, the diagonal one in front of them, then the full.

Naming as in `sparse_prefill_triton`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 512
"""States that are read at a time."""

# fmt: off


@triton.jit(do_not_specialize=["R", "T", "low"])
def compact_kernel(state, tiles, partial, full, start, R, T, low, BLOCK: tl.constexpr):
    """One row of `state` [slots, R, T] uint8 per program: its numbers into `tiles` from `start` [slots, R] int64 on, its counts into
    `partial` and `full` [slots, R]. Key tiles behind the row's own are not looked at.
    """
    i_s = tl.program_id(0) // (R - low)
    row = low + tl.program_id(0) % (R - low)
    p_s = state + (i_s.to(tl.int64) * R + row) * T
    home = tl.load(p_s + row) == 1
    n_partial = home.to(tl.int32)
    for o_t in range(0, row, BLOCK):
        b_t = o_t + tl.arange(0, BLOCK)
        n_partial += tl.sum((tl.load(p_s + b_t, mask=b_t < row, other=0) == 1).to(tl.int32), 0)
    p_o = tiles + tl.load(start + i_s * R + row)
    if home:
        tl.store(p_o, row)
    o_partial = home.to(tl.int32)
    o_full = n_partial
    for o_t in range(0, row, BLOCK):
        b_t = o_t + tl.arange(0, BLOCK)
        b_s = tl.load(p_s + b_t, mask=b_t < row, other=0)
        b_1 = (b_s == 1).to(tl.int32)
        b_2 = (b_s == 2).to(tl.int32)
        tl.store(p_o + o_partial + tl.cumsum(b_1, 0) - 1, b_t, mask=b_s == 1)
        tl.store(p_o + o_full + tl.cumsum(b_2, 0) - 1, b_t, mask=b_s == 2)
        o_partial += tl.sum(b_1, 0)
        o_full += tl.sum(b_2, 0)
    tl.store(partial + i_s * R + row, n_partial)
    tl.store(full + i_s * R + row, o_full - n_partial)
