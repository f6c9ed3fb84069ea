"""Smoothed queries (SEG): a Gaussian blur of q over the image's grid, which blurs the scores' rows in the same way.

Kernel of odd length ceil(6 sigma) (+ 1 if even), reflected at the border, as in Hong (2024, arXiv 2408.00760). Only image tokens are
blurred; text tokens of a joint stream stay. The silent failures this avoids: a grid taken for square, and text rows blurred into the
picture.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from headscope.errors import InterventionError, refusal
from headscope.interventions.where import token_class

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def blurred(call: AttentionCall, q: Tensor, sigma: float, grid: tuple[int, int] | None = None) -> Tensor:
    """q [B, h, Nq, D] with image rows blurred. `grid`: (height, width) of the image tokens; None: a square.

    InterventionError where image rows are not a grid, or attention is causal (a blur would carry later rows into earlier ones).
    """
    if call.mask.causal:
        raise refusal(InterventionError, f"blurred queries in {call.module}", "its attention is causal", "use bidirectional attention")
    image = token_class(call, "image", None, "query")[0] if call.facts.get("streams") else torch.ones(q.shape[2], dtype=torch.bool)
    where = image.nonzero().flatten().to(q.device)
    height, width = grid if grid is not None else (math.isqrt(len(where)),) * 2
    if height * width != len(where):
        raise refusal(
            InterventionError,
            f"{len(where)} image tokens in {call.module}",
            f"they are no grid of {height} x {width}",
            "pass grid=(height, width)",
        )
    size = math.ceil(6 * sigma)
    size += 1 - size % 2
    half = size // 2
    if half >= min(height, width):
        raise refusal(
            InterventionError, f"sigma={sigma} on {height} x {width} tokens", "the blur is wider than the image", "use how='mean'"
        )
    part = q[:, :, where].to(torch.promote_types(q.dtype, torch.float32)).transpose(-1, -2).reshape(-1, 1, height, width)
    x = torch.arange(size, dtype=part.dtype, device=q.device) - half
    line = torch.exp(-(x**2) / (2 * sigma**2))
    line = line / line.sum()
    padded = functional.pad(part, (half, half, half, half), mode="reflect")
    smooth = functional.conv2d(functional.conv2d(padded, line[None, None, None]), line[None, None, :, None])
    out = q.clone()
    out[:, :, where] = smooth.reshape(q.shape[0], q.shape[1], q.shape[3], -1).transpose(-1, -2).to(q.dtype)
    return out


__all__ = ["blurred"]
