"""What a query may see, as intervals: the form in which the Triton kernels read every mask.

Causality, windows, padding at either end and packed segments all leave each query row one interval of visible keys, and each key one
interval of queries that see it. With those two lists a kernel knows, for a whole tile, whether nothing, everything or something in it is
visible, and needs mask code only at the edges. What is no interval (holes in the padding, unsorted segments, an explicit mask) is checked
element by element on top; `dense` then says where no tile may be taken as full. Everything here is O(N) and never waits for the device.

The silent failure this avoids: a kernel with its own idea of causality next to a window, a chunk offset and padding, right in each alone
and wrong by one where two of them meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headscope.call import MaskFacts

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

KEY_HOLES, SEGMENTS, ALLOWED, BIAS = 1, 2, 4, 8


@dataclass(frozen=True, slots=True, eq=False)
class Visibility:
    """Intervals of one call. `side` B or 1 in front: 1 where every sequence of the batch is alike.

    - `lo`, `hi` [B or 1, Nq] int32: query row i may see key indices lo .. hi - 1 (hi <= lo: none).
    - `key_lo`, `key_hi` [B or 1, Nk] int32: key j may be seen by query rows key_lo .. key_hi - 1.
    - `dense` [B or 1] int32: 1 where the intervals say everything, 0 where the element checks named in `element` are needed too.
    - `element`: bits KEY_HOLES, SEGMENTS, ALLOWED, BIAS that the kernels compile in.
    - `key_valid` [B, Nk] int8, `q_segments` [B, Nq] and `k_segments` [B, Nk] int32, or None.
    """

    lo: Tensor
    hi: Tensor
    key_lo: Tensor
    key_hi: Tensor
    dense: Tensor
    element: int
    key_valid: Tensor | None
    q_segments: Tensor | None
    k_segments: Tensor | None


def visibility(call: AttentionCall) -> Visibility:
    """The intervals of a call, on its device. Those of plain masks are kept, since every layer of a model asks for the same ones."""
    mask = call.mask
    shape = (call.q.shape[2], call.k.shape[2], call.query_offset, call.key_offset)
    tensors = (mask.key_valid, mask.query_valid, mask.query_segments, mask.key_segments, mask.allowed, mask.bias)
    if all(x is None for x in tensors):
        return _plain(mask.causal, mask.window, *shape, call.q.device)
    return _build(mask, *shape, call.q.device)


@lru_cache(maxsize=8)
def _plain(causal: bool, window: int | None, rows: int, keys: int, query_offset: int, key_offset: int, device: torch.device) -> Visibility:
    return _build(MaskFacts(causal, window), rows, keys, query_offset, key_offset, device)


def _build(mask: MaskFacts, rows: int, keys: int, query_offset: int, key_offset: int, device: torch.device) -> Visibility:
    row = torch.arange(rows, device=device)[None]
    key = torch.arange(keys, device=device)[None]
    # key index of the query's own position, and query row of the key's own position
    row_home, key_home = row + (query_offset - key_offset), key + (key_offset - query_offset)
    lo, hi = torch.zeros_like(row), torch.full_like(row, keys)
    key_lo, key_hi = torch.zeros_like(key), torch.full_like(key, rows)
    if mask.causal:
        hi, key_lo = torch.minimum(hi, row_home + 1), torch.maximum(key_lo, key_home)
    if mask.window is not None:
        lo, key_hi = torch.maximum(lo, row_home - mask.window + 1), torch.minimum(key_hi, key_home + mask.window)
        if not mask.causal:
            hi, key_lo = torch.minimum(hi, row_home + mask.window), torch.maximum(key_lo, key_home - mask.window + 1)
    dense = torch.ones(1, dtype=torch.bool, device=device)
    element, key_valid, q_segments, k_segments = 0, None, None, None
    if mask.key_valid is not None:
        real = mask.key_valid.to(torch.bool)
        start = real.to(torch.int8).argmax(1, keepdim=True)
        stop = keys - real.flip(1).to(torch.int8).argmax(1, keepdim=True)
        count = real.sum(1, keepdim=True)
        stop = torch.where(count > 0, stop, start)
        lo, hi = torch.maximum(lo, start), torch.minimum(hi, stop)
        key_hi = torch.where(real, key_hi, 0)
        dense = dense & (count == stop - start)[:, 0]
        key_valid, element = real.to(torch.int8).contiguous(), element | KEY_HOLES
    if mask.query_segments is not None and mask.key_segments is not None:
        q_segments = mask.query_segments.to(torch.int32).contiguous()
        k_segments = mask.key_segments.to(torch.int32).contiguous()
        in_order = ((k_segments[:, 1:] >= k_segments[:, :-1]).all(1) & (q_segments[:, 1:] >= q_segments[:, :-1]).all(1))[:, None]
        lo, hi = _within(lo, hi, k_segments, q_segments, in_order)
        key_lo, key_hi = _within(key_lo, key_hi, q_segments, k_segments, in_order)
        dense, element = dense & in_order[:, 0], element | SEGMENTS
    if mask.query_valid is not None:
        hi = torch.where(mask.query_valid.to(torch.bool), hi, 0)
    if mask.allowed is not None:
        element |= ALLOWED
    if mask.bias is not None:
        element |= BIAS
    if element & (ALLOWED | BIAS):
        dense = torch.zeros_like(dense)
    lo, hi = torch.broadcast_tensors(lo.clamp(0, keys), hi.clamp(0, keys))
    key_lo, key_hi = torch.broadcast_tensors(key_lo.clamp(0, rows), key_hi.clamp(0, rows))
    lo, hi, key_lo, key_hi, dense = (x.to(torch.int32).contiguous() for x in (lo, hi, key_lo, key_hi, dense))
    return Visibility(lo, hi, key_lo, key_hi, dense, element, key_valid, q_segments, k_segments)


def _within(lo: Tensor, hi: Tensor, other: Tensor, own: Tensor, in_order: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals cut to the places where sorted `other` holds `own`'s segment; unsorted sequences keep theirs."""
    first = torch.searchsorted(other, own, side="left")
    last = torch.searchsorted(other, own, side="right")
    return torch.where(in_order, torch.maximum(lo, first), lo), torch.where(in_order, torch.minimum(hi, last), hi)


def batched(x: Tensor) -> int:
    """Stride between sequences: 0 where one row serves the whole batch."""
    return 0 if x.shape[0] == 1 else x.stride(0)
