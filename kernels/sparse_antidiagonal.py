"""XAttention's estimate of block masses (arXiv:2503.16428) on the device: sums along antidiagonals, without the matrix of them in memory.

Row r of the estimate is `stride` reversed queries side by side, column c `stride` keys side by side; their product is the sum of every
`stride`-th antidiagonal of a stride x stride block. Its softmax is over all columns, but only sums over tiles of 128 tokens are wanted:
the first kernel leaves one logarithm per row and tile, the second takes them together, a tile of rows at a time.

Naming as in `sparse_prefill_triton`; `per` is rows of the estimate per tile, 128 / stride.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from headscope.kernels.triton_common import INTERPRETED, LOG2E
from headscope.kernels.triton_host import cdiv, describable, padded

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

DESCRIPTORS = True
"""Whether tiles are loaded by tensor descriptors where the tensors can be described."""
SHAPE = (128, 128, 8, 3)
"""Rows and columns of a tile of the estimate, warps and stages of its kernel in half precision."""

# fmt: off


@triton.jit(do_not_specialize=["group", "rows", "columns", "origin", "n_tiles"])
def sums_kernel(q, k, heads, out, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale2, n_heads, group, rows, columns,
                origin, n_tiles, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PER: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr):
    """log2 of the summed exponentials per row and tile of columns: `out` [B * heads, rows, n_tiles] float32."""
    # the last rows, which have most columns, first
    i_r = tl.num_programs(0) - 1 - tl.program_id(0)
    i_c = tl.program_id(1)
    i_bh = tl.program_id(2)
    i_b = i_bh // n_heads
    i_h = tl.load(heads + i_bh % n_heads).to(tl.int32)
    o_r = i_r * BM + tl.arange(0, BM)
    o_c = i_c * BN + tl.arange(0, BN)
    if i_c * BN > i_r * BM + BM - 1 + origin:
        return
    m_r = o_r < rows
    m_c = o_c < columns
    i_kh = i_h // group
    b_s = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for i_s in range(0, S):
            b_q = tl.reshape(q.load([i_b, i_h, i_r * BM, S - 1 - i_s, 0]), [BM, DP])
            b_k = tl.reshape(k.load([i_b, i_kh, i_c * BN, i_s, 0]), [BN, DP])
            b_s = tl.dot(b_q, tl.trans(b_k), acc=b_s)
    else:
        o_d = tl.arange(0, DP)
        m_d = (o_d < D)[None, :]
        p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
        p_q = p_q + (o_r * S + S - 1).to(tl.int64)[:, None] * stride_qn + o_d[None, :]
        p_k = k + i_b.to(tl.int64) * stride_kb + i_kh.to(tl.int64) * stride_kh
        p_k = p_k + (o_c * S).to(tl.int64)[:, None] * stride_kn + o_d[None, :]
        for _ in range(0, S):
            b_q = tl.load(p_q, mask=m_r[:, None] & m_d, other=0.0)
            b_k = tl.load(p_k, mask=m_c[:, None] & m_d, other=0.0)
            if UPCAST:
                b_q = b_q.to(tl.float32)
                b_k = b_k.to(tl.float32)
            b_s = tl.dot(b_q, tl.trans(b_k), acc=b_s, input_precision="ieee")
            p_q -= stride_qn
            p_k += stride_kn
    b_s = tl.where((o_r[:, None] + origin >= o_c[None, :]) & m_c[None, :], b_s * scale2, -float("inf"))
    b_3 = tl.reshape(b_s, [BM, BN // PER, PER])
    b_m = tl.max(b_3, 2)
    b_0 = tl.where(b_m > -float("inf"), b_m, 0.0)
    b_z = tl.sum(tl.exp2(b_3 - b_0[:, :, None]), 2)
    b_l = tl.where(b_z > 0, b_m + tl.log2(tl.where(b_z > 0, b_z, 1.0)), -float("inf"))
    o_t = i_c * (BN // PER) + tl.arange(0, BN // PER)
    p_o = out + (i_bh.to(tl.int64) * rows + o_r)[:, None] * n_tiles + o_t[None, :]
    tl.store(p_o, b_l, mask=m_r[:, None] & (o_t < n_tiles)[None, :])


@triton.jit(do_not_specialize=["n_rows", "n_tiles", "low"])
def masses_kernel(sums, out, n_rows, n_tiles, low, PER: tl.constexpr, BT: tl.constexpr):
    """Share of each tile in a tile of rows: `out` [B * heads, row tiles, n_tiles] from `sums`; zero behind the rows' own tile."""
    i_r = tl.program_id(0)
    i_bh = tl.program_id(1)
    end = low + i_r + 1
    p_s = sums + ((i_bh.to(tl.int64) * n_rows + i_r) * PER + tl.arange(0, PER))[:, None] * n_tiles
    b_m = tl.full([PER], -1e30, tl.float32)
    b_z = tl.zeros([PER], tl.float32)
    for o_t in range(0, end, BT):
        b_t = o_t + tl.arange(0, BT)
        b_l = tl.load(p_s + b_t[None, :], mask=(b_t < end)[None, :], other=-float("inf"))
        b_n = tl.maximum(b_m, tl.max(b_l, 1))
        b_z = b_z * tl.exp2(b_m - b_n) + tl.sum(tl.exp2(b_l - b_n[:, None]), 1)
        b_m = b_n
    b_m += tl.log2(b_z)
    p_o = out + (i_bh.to(tl.int64) * n_rows + i_r) * n_tiles
    for o_t in range(0, n_tiles, BT):
        b_t = o_t + tl.arange(0, BT)
        b_l = tl.load(p_s + b_t[None, :], mask=(b_t < end)[None, :], other=-float("inf"))
        tl.store(p_o + b_t, tl.sum(tl.exp2(b_l - b_m[:, None]), 0) / PER, mask=b_t < n_tiles)


# fmt: on
def _described(x: Tensor, stride: int, rows: int) -> object:
    """A descriptor of [B, H, N, D] that loads every `stride`-th of its rows, so many at once."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, heads, tokens, width = x.shape
    outer = [width * 8 if n == 1 else step for n, step in zip(x.shape[:2], x.stride()[:2], strict=True)]
    strides = [*outer, x.stride(2) * stride, x.stride(2), 1]
    return TensorDescriptor(x, [batch, heads, tokens // stride, stride, width], strides, [1, 1, rows, 1, padded(width)])


def antidiagonal(call: AttentionCall, heads: Tensor, stride: int) -> Tensor:
    """[B, heads, row tiles of the call, key tiles] float32: the share of each tile in its rows. Lengths are multiples of 128.

    Memory: one float32 per `stride` rows and 128 keys of each head.
    """
    q, k, per = call.q, call.k, 128 // stride
    batch, many, rows, columns = q.shape[0], len(heads), q.shape[2] // stride, k.shape[2] // stride
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    tiles = columns // per
    sums = torch.empty(batch * many, rows, tiles, dtype=torch.float32, device=q.device)
    bm, bn, warps, stages = (64, 64, 4, 1) if INTERPRETED or q.element_size() == 4 else SHAPE
    bn = max(bn, per)
    tma = DESCRIPTORS and describable(q, k) and not INTERPRETED
    sums_kernel[(cdiv(rows, bm), cdiv(columns, bn), batch * many)](
        *((_described(q, stride, bm), _described(k, stride, bn)) if tma else (q, k)), heads, sums, *q.stride()[:3], *k.stride()[:3],
        call.scale / stride * LOG2E, many, call.group, rows, columns, call.query_offset // stride, tiles, S=stride, D=q.shape[3],
        DP=padded(q.shape[3]), PER=per, BM=bm, BN=bn, TMA=tma, UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    mass = torch.empty(batch, many, rows // per, tiles, dtype=torch.float32, device=q.device)
    masses_kernel[(rows // per, batch * many)](
        sums, mass, rows // per, tiles, call.query_offset // 128, PER=per, BT=min(1024, max(16, triton.next_power_of_2(tiles)))
    )
    return mass
