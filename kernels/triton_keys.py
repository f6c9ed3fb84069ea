"""Sets of keys on the device: which keys are sinks, and the keys of each set side by side, so that a kernel visits them and no others.

A key's code says which sets it is in: bit 0 the source of an edit, bit 1 its second set (the target, or keys that are left alone), bit 2
the source's keys that a gate watches. `listed` compacts the first two sets, with a count of how many of a set lie up to each key, from
which a tile of rows knows where its keys begin and end. Nothing here waits for the device: the host, several layers ahead, stays ahead.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.triton_host import padded

# fmt: off


@triton.jit(do_not_specialize=["Nk", "lists", "stride_cb", "stride_ch", "stride_s", "stride_n", "offset", "first", "limit"])
def list_kernel(codes, columns, upto, sums, counts, Nk, lists, stride_cb, stride_ch, stride_s, stride_n, offset, first, limit,
                FOUND: tl.constexpr, SECOND: tl.constexpr, BN: tl.constexpr):
    """columns [sets, B * lists, Nk] int32: the keys of bit 0 (and of bit 1), ascending; upto, alike: how many of them are <= a key.

    FOUND: codes are made here. Bit 0 where sums [B * lists, stride_s] / counts [B or 1, .] at position offset + key is above `limit`, but
    not at position `first`, which gets bit 1 where there is a SECOND set.
    """
    i_l = tl.program_id(0)
    i_g = tl.program_id(1)
    p_c = codes + (i_l // lists).to(tl.int64) * stride_cb + (i_l % lists).to(tl.int64) * stride_ch
    o_l = (i_g * tl.num_programs(0) + i_l).to(tl.int64) * Nk
    n = i_l * 0
    for at in range(0, Nk, BN):
        o_j = at + tl.arange(0, BN)
        m_j = o_j < Nk
        if FOUND:
            b_s = tl.load(sums + i_l.to(tl.int64) * stride_s + offset + o_j, mask=m_j, other=0.0)
            b_n = tl.load(counts + (i_l // lists).to(tl.int64) * stride_n + offset + o_j, mask=m_j, other=1)
            m_f = offset + o_j == first
            b_c = ((tl.div_rn(b_s, tl.maximum(b_n, 1).to(tl.float32)) > limit) & (m_f == 0)).to(tl.int32)
            if SECOND:
                b_c += 2 * m_f.to(tl.int32)
            tl.store(p_c + o_j, b_c.to(tl.int8), mask=m_j & (i_g == 0))
        else:
            b_c = tl.load(p_c + o_j, mask=m_j, other=0).to(tl.int32)
        b_m = tl.where(m_j, (b_c >> i_g) & 1, 0)
        b_u = n + tl.cumsum(b_m, 0)
        tl.store(columns + o_l + b_u - 1, o_j, mask=b_m != 0)
        tl.store(upto + o_l + o_j, b_u, mask=m_j)
        n += tl.sum(b_m)


@triton.jit(do_not_specialize=["stride_n", "size", "tau"])
def phi_kernel(hidden, dimensions, out, stride_n, size, n_dimensions, tau, D: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr):
    """out [rows] int8: whether the largest |x_d| / RMS(x) over `dimensions` is at least tau. One program per hidden state."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, DP)
    o_k = tl.arange(0, KP)
    p_x = hidden + i_n * stride_n
    b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_at = tl.load(dimensions + o_k, mask=o_k < n_dimensions, other=0)
    b_k = tl.load(p_x + b_at, mask=o_k < n_dimensions, other=0.0).to(tl.float32)
    b_rms = tl.maximum(tl.sqrt_rn(tl.sum(b_x * b_x, 0) / size), 1e-30)
    tl.store(out + i_n, (tl.div_rn(tl.max(tl.abs(b_k), 0), b_rms) >= tau).to(tl.int8))


# fmt: on


class KeyLists(NamedTuple):
    """Sets of keys: `codes` int8 [B or 1, h or 1, Nk]; `columns`, `upto` [sets, lists, Nk] int32 (see `list_kernel`), a list for every
    sequence and head that has codes of its own; `sets` 1 or 2."""

    codes: Tensor
    columns: Tensor
    upto: Tensor

    @property
    def sets(self) -> int:
        """How many sets are listed."""
        return self.columns.shape[0]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """How far apart the codes, and the lists, of two sequences and of two heads are."""
        batch, heads, _ = self.codes.shape
        each = 0 if batch == 1 else self.codes.stride(0), 0 if heads == 1 else self.codes.stride(1)
        return *each, 0 if batch == 1 else heads, 0 if heads == 1 else 1


def listed(codes: Tensor, sets: int) -> KeyLists:
    """The keys of bit 0 (and bit 1) of codes int8 [B or 1, h or 1, Nk], side by side."""
    batch, heads, size = codes.shape
    made = _lists(codes, sets)
    with torch.cuda.device(codes.device if codes.is_cuda else -1):
        list_kernel[(batch * heads, sets)](
            codes, made.columns, made.upto, codes, codes, size, heads, codes.stride(0), codes.stride(1), 0, 0, 0, 0, 0.0,
            FOUND=False, SECOND=sets > 1, BN=_block(size), num_warps=8,
        )  # fmt: skip
    return made


def sinks_listed(sums: Tensor, counts: Tensor, limit: float, offset: int, size: int, first: int, apart: bool) -> KeyLists:
    """The keys that receive more than `limit` on average: sums float32 [B, h, P] over counts int64 [B, P], by absolute position.

    Codes and lists of the `size` keys from position `offset` on. The key at position `first` is none; with `apart` it is the second set.
    """
    batch, heads, positions = sums.shape
    codes = torch.empty(batch, heads, size, dtype=torch.int8, device=sums.device)
    made = _lists(codes, 1 + apart)
    sums = sums.contiguous()
    with torch.cuda.device(sums.device if sums.is_cuda else -1):
        list_kernel[(batch * heads, 1 + apart)](
            codes, made.columns, made.upto, sums, counts, size, heads, codes.stride(0), codes.stride(1), positions, counts.stride(0),
            offset, first, limit, FOUND=True, SECOND=apart, BN=_block(size), num_warps=8,
        )  # fmt: skip
    return made


def massive(hidden: Tensor, dimensions: Tensor, tau: float) -> Tensor:
    """Bool [B, N]: tokens whose hidden state [B, N, d] is massive, max |x_d / RMS(x)| >= tau over `dimensions` int64 [K]."""
    batch, count, width = hidden.shape
    flat = hidden.reshape(batch * count, width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = torch.empty(batch, count, dtype=torch.int8, device=hidden.device)
    with torch.cuda.device(hidden.device if hidden.is_cuda else -1):
        phi_kernel[(batch * count,)](
            flat, dimensions, out, flat.stride(0), float(width), len(dimensions), tau, D=width, DP=padded(width),
            KP=padded(len(dimensions)), num_warps=4,
        )  # fmt: skip
    return out.view(torch.bool)


def _lists(codes: Tensor, sets: int) -> KeyLists:
    batch, heads, size = codes.shape
    both = torch.empty(2, sets, batch * heads, size, dtype=torch.int32, device=codes.device)
    return KeyLists(codes, both[0], both[1])


def _block(size: int) -> int:
    return 4096 if size > 1024 else 1024


__all__ = ["KeyLists", "list_kernel", "listed", "massive", "phi_kernel", "sinks_listed"]
