"""An estimate of block masses on the device: mean queries against mean keys.

The same numbers as `headscope.plans.indices` has for one head, in float32 and for all heads of a call at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.kernels.sparse_states import SIDE

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def pooled(call: AttentionCall, heads: Tensor) -> Tensor:
    """[B, heads, row tiles of the call, key tiles] float32: softmax of the products of the tiles' means (MInference, FlexPrefill)."""
    low = call.query_offset // SIDE
    q = tile_means(call.q)[:, heads]
    k = tile_means(call.k)[:, heads // call.group]
    scores = q @ k.transpose(-1, -2) * call.scale
    return torch.softmax(scores.masked_fill(_ahead(scores, low), -torch.inf), -1)


def tile_means(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, H, n, D] float32: the mean of each tile; the last may be shorter."""
    whole = x.shape[2] // SIDE
    parts = [x[:, :, : whole * SIDE].unflatten(2, (whole, SIDE)).mean(3, dtype=torch.float32)]
    if whole * SIDE < x.shape[2]:
        parts.append(x[:, :, whole * SIDE :].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2)


def _ahead(scores: Tensor, low: int) -> Tensor:
    """[rows, keys] bool: key tiles behind the row tile."""
    row = torch.arange(low, low + scores.shape[-2], device=scores.device)[:, None]
    return torch.arange(scores.shape[-1], device=scores.device)[None, :] > row
