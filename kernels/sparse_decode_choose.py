"""Choosing keys on the device: scores of one query row against keys or against what stands for blocks of them, and lists from choices.

Everything has a fixed shape and nothing is read back, so that choosing can be captured in a CUDA graph with the step that it is for. Lists
are made in three passes over a bit field (who keeps which entry, how many entries lie in each stretch, where each goes), which is the price
of having every entry once however many heads of a group keep it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from headscope.kernels.sparse_decode_host import KeyLists
from headscope.kernels.triton_common import INTERPRETED
from headscope.kernels.triton_host import cdiv, padded

if TYPE_CHECKING:
    from torch import Tensor

STRETCH = 2048
"""Entries of the bit field that one program counts and moves."""

# fmt: off


@triton.jit
def score_kernel(q, k, s, tops, totals, stride_qb, stride_qh, stride_kb, stride_kh, stride_kn, n_keys, kv_heads, scale,
                 GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
                 WEIGHTS: tl.constexpr):
    """s [B, Hq, N] float32 = scale * q k^T for one row per head; WEIGHTS: its maximum and sum of exponentials below it per tile too."""
    i_t = tl.program_id(0)
    i_b = tl.program_id(1) // kv_heads
    i_g = tl.program_id(1) % kv_heads
    o_m = tl.arange(0, M)
    o_d = tl.arange(0, DP)
    o_n = i_t * BN + tl.arange(0, BN)
    head = i_g * GROUP + o_m
    m_m = o_m < GROUP
    p_q = q + i_b.to(tl.int64) * stride_qb + head[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = k + i_b.to(tl.int64) * stride_kb + i_g.to(tl.int64) * stride_kh + o_n.to(tl.int64)[:, None] * stride_kn + o_d[None, :]
    b_k = tl.load(p_k, mask=(o_n < n_keys)[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
        b_k = b_k.to(tl.float32)
    # [M, BN]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    p_s = s + (i_b.to(tl.int64) * kv_heads * GROUP + head.to(tl.int64)[:, None]) * n_keys + o_n[None, :]
    tl.store(p_s, b_s, mask=m_m[:, None] & (o_n < n_keys)[None, :])
    if WEIGHTS:
        b_s = tl.where((o_n < n_keys)[None, :], b_s, -float("inf"))
        top = tl.max(b_s, 1)
        at = (i_b.to(tl.int64) * kv_heads * GROUP + head) * tl.num_programs(0) + i_t
        tl.store(tops + at, top, mask=m_m)
        tl.store(totals + at, tl.sum(tl.exp(b_s - top[:, None]), 1), mask=m_m)


@triton.jit
def mark_kernel(columns, since, bits, n_columns, n_entries, heads, kv_heads, origin, GROUP: tl.constexpr, BC: tl.constexpr):
    """Sets bit h of bits [B, Hkv, E] at every entry that head h of the group chose before its `since`."""
    i_r = tl.program_id(1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    head = i_r % heads
    b_c = tl.load(columns + i_r.to(tl.int64) * n_columns + o_c, mask=o_c < n_columns, other=-1)
    kept = (b_c >= origin) & (b_c < tl.load(since + i_r)) & (b_c - origin < n_entries)
    row = (i_r // heads) * kv_heads + head // GROUP
    p_b = bits + row.to(tl.int64) * n_entries + tl.where(kept, b_c - origin, 0)
    tl.atomic_or(p_b, tl.full([BC], 1, tl.int32) << (head % GROUP), mask=kept)


@triton.jit
def count_kernel(bits, totals, n_entries, stretches, BE: tl.constexpr):
    """totals [B Hkv, T]: entries of a stretch that somebody keeps."""
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    b_b = tl.load(bits + tl.program_id(1).to(tl.int64) * n_entries + o_e, mask=o_e < n_entries, other=0)
    tl.store(totals + tl.program_id(1) * stretches + tl.program_id(0), tl.sum((b_b != 0).to(tl.int32)))


@triton.jit
def move_kernel(bits, totals, entries, kept, counts, n_entries, room, stretches, BE: tl.constexpr, BT: tl.constexpr):
    """The entries of a stretch to their places behind those of the stretches before it."""
    i_t = tl.program_id(0)
    i_r = tl.program_id(1)
    o_t = tl.arange(0, BT)
    before = tl.sum(tl.load(totals + i_r * stretches + o_t, mask=o_t < i_t, other=0))
    o_e = i_t * BE + tl.arange(0, BE)
    b_b = tl.load(bits + i_r.to(tl.int64) * n_entries + o_e, mask=o_e < n_entries, other=0)
    here = b_b != 0
    place = before + tl.cumsum(here.to(tl.int32), 0) - 1
    ok = here & (place < room)
    tl.store(entries + i_r.to(tl.int64) * room + place, o_e, mask=ok)
    tl.store(kept + i_r.to(tl.int64) * room + place, b_b, mask=ok)
    if i_t == stretches - 1:
        tl.store(counts + i_r, tl.minimum(before + tl.sum(here.to(tl.int32)), room))

# fmt: on


def key_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[B, Hq, N] float32: scale * q k^T of q [B, Hq, D] with k [B, Hkv, N, D]; both contiguous along D."""
    return _scores(q, k, scale, False)[0]


def scores_and_sums(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same scores, and [B, Hq, T] of every tile of a row its maximum and the sum of exponentials below it."""
    return _scores(q, k, scale, True)


def _scores(q: Tensor, k: Tensor, scale: float, weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    tile = 128 if width <= 128 else 64
    tiles = cdiv(keys, tile)
    tops, totals = (torch.empty(batch, heads, tiles, dtype=torch.float32, device=q.device) if weights else out for _ in range(2))
    score_kernel[(tiles, batch * kv_heads)](
        q, k, out, tops, totals, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), keys, kv_heads, scale,
        GROUP=heads // kv_heads, M=padded(heads // kv_heads), D=width, DP=padded(width), BN=tile, UPCAST=INTERPRETED, WEIGHTS=weights,
        num_warps=4,
    )  # fmt: skip
    return out, tops, totals


def lists_from(columns: Tensor, since: Tensor, kv_heads: int, entries: int, origin: int, room: int, block: int = 1) -> KeyLists:
    """KeyLists of chosen entries: columns [B, Hq, C] int64 (absolute, -1 for none) before `since` [B, Hq] int64, of `entries` that begin at
    `origin`; room for `room` of each key head.
    """
    batch, heads, count = columns.shape
    device, rows = columns.device, batch * kv_heads
    bits = torch.zeros(batch, kv_heads, entries, dtype=torch.int32, device=device)
    stretches = cdiv(entries, STRETCH)
    totals = torch.empty(rows, stretches, dtype=torch.int32, device=device)
    found, kept = (torch.empty(batch, kv_heads, room, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=device)
    mark_kernel[(cdiv(count, 1024), batch * heads)](
        columns.contiguous(),
        since.contiguous(),
        bits,
        count,
        entries,
        heads,
        kv_heads,
        origin,
        GROUP=heads // kv_heads,
        BC=1024,
        num_warps=4,
    )
    count_kernel[(stretches, rows)](bits, totals, entries, stretches, BE=STRETCH, num_warps=4)
    move_kernel[(stretches, rows)](
        bits, totals, found, kept, counts, entries, room, stretches, BE=STRETCH, BT=padded(stretches), num_warps=4
    )
    return KeyLists(found, kept, counts, block)
