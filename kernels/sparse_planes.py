"""Masks of tiles with diagonals and single columns as bits, in the order in which the Hopper kernel holds a tile in registers.

A lane of that kernel holds keys 8 a + 2 lane + b of a row (a < 16, b < 2) as elements 2 a + b: a word of 32 bits for every row and lane
says it all, so that a mask costs one load where looking up every entry costs 32. A tile's diagonals depend on how far it lies before the
diagonal one and on nothing else; fixed columns in it on its number alone; which of the gathered columns lie in a visited tile, and are
not to be counted again, on the row.

Naming as in `sparse_prefill_triton`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from headscope.kernels.sparse_states import SIDE
from headscope.kernels.triton_host import cdiv

if TYPE_CHECKING:
    from torch import Tensor

# fmt: off


@triton.jit
def _words(m_x, R: tl.constexpr):
    """[R, 128] bool -> [R, 4] int32: a word per lane."""
    b_x = tl.permute(tl.reshape(m_x.to(tl.int32), [R, 16, 4, 2]), [0, 2, 1, 3])
    return tl.sum(tl.reshape(b_x, [R, 4, 32]) << tl.arange(0, 32)[None, None, :], 2)


@triton.jit(do_not_specialize=["n_gaps", "n_positions"])
def diagonals_kernel(diagonals, gaps, out, n_gaps, n_positions, R: tl.constexpr):
    """R rows of a visited tile per program: `out` [slots, n_gaps, 128, 4] int32."""
    i_g = tl.program_id(0)
    i_r = tl.program_id(1)
    i_s = tl.program_id(2).to(tl.int64)
    if tl.load(gaps + i_s * n_gaps + i_g) == 0:
        return
    o_r = i_r * R + tl.arange(0, R)
    b_d = 128 * i_g + o_r[:, None] - tl.arange(0, 128)[None, :]
    m_x = tl.load(diagonals + i_s * n_positions + b_d, mask=(b_d >= 0) & (b_d < n_positions), other=0) != 0
    p_o = out + ((i_s * n_gaps + i_g) * 128 + o_r)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(p_o, _words(m_x, R))


@triton.jit(do_not_specialize=["n_tiles"])
def marks_kernel(marked, out, n_tiles):
    """One key tile per program: `out` [slots, n_tiles, 4] int32 of `marked` [slots, 128 n_tiles] uint8."""
    i_t = tl.program_id(1).to(tl.int64) * n_tiles + tl.program_id(0)
    m_x = tl.load(marked + i_t * 128 + tl.arange(0, 128)) != 0
    tl.store(out + i_t * 4 + tl.arange(0, 4)[None, :], _words(m_x[None, :], 1))


@triton.jit(do_not_specialize=["n_columns", "n_gaps", "n_parts"])
def columns_kernel(columns, gaps, out, n_columns, n_gaps, n_parts):
    """One row tile per program: `out` [slots, n_gaps, n_parts, 4] int32, the gathered columns that lie in none of its tiles."""
    i_r = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    for i_p in range(0, n_parts):
        o_c = i_p * 128 + tl.arange(0, 128)
        b_c = tl.load(columns + i_s * n_columns + o_c, mask=o_c < n_columns, other=1073741824)
        gap = i_r - b_c // 128
        m_x = tl.load(gaps + i_s * n_gaps + gap, mask=gap >= 0, other=1) == 0
        tl.store(out + ((i_s * n_gaps + i_r) * n_parts + i_p) * 4 + tl.arange(0, 4)[None, :], _words(m_x[None, :], 1))


# fmt: on
class Planes(NamedTuple):
    """Bits of all slots: `diagonals` [slots, G, 128, 4], `marks` [slots, G, 4], `columns` [slots, G, C / 128, 4], all int32."""

    diagonals: Tensor
    marks: Tensor
    columns: Tensor


def planes_of(columns: Tensor, gaps: Tensor, diagonals: Tensor, marked: Tensor) -> Planes:
    """The bits of the tables of `TileLists`. Diagonals of tiles that are not visited are left as they are: nobody reads them."""
    slots, count = gaps.shape
    parts = cdiv(columns.shape[1], SIDE)
    made = Planes(
        torch.empty(slots, count, SIDE, 4, dtype=torch.int32, device=gaps.device),
        torch.empty(slots, count, 4, dtype=torch.int32, device=gaps.device),
        torch.empty(slots, count, parts, 4, dtype=torch.int32, device=gaps.device),
    )
    diagonals_kernel[(count, 4, slots)](diagonals, gaps, made.diagonals, count, diagonals.shape[1], R=SIDE // 4)
    marks_kernel[(count, slots)](marked, made.marks, count, num_warps=1)
    columns_kernel[(count, slots)](columns, gaps, made.columns, columns.shape[1], count, parts, num_warps=1)
    return made
