"""The inner loop of the blocked kernel: from queries and keys to weights, maxima and sums, strip by strip.

These functions are plain PyTorch, run through TorchScript where it is available (`compiled`). That changes no result: it runs the same
operations without the interpreter between them, and without the interpreter lock, so that parts of a call on several threads do not queue for
it. torch.compile would need a C++ compiler on the user's machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through TorchScript from its first call on; itself where this Python or torch has no TorchScript."""
    ready: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any) -> Any:
        if not ready:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # TorchScript announces its deprecation; the plain function is the way out
                    ready.append(torch.jit.script(function))
            except (AttributeError, RuntimeError, NotImplementedError):
                ready.append(function)
        return ready[0](*args)

    return call


@compiled
def weigh_strips(
    q: list[Tensor],
    k: list[Tensor],
    strips: list[tuple[int, int]],
    bounds: list[tuple[int, int, int, int]],
    hide: list[Tensor],
    keep: list[Tensor],
    bias: Tensor,
    bias_at: tuple[int, int],
    x_store: Tensor,
    e: Tensor,
    maxima: Tensor,
    m: Tensor,
    masses: Tensor,
    es: Tensor,
    column: int,
    group: int,
    unit: int,
    softcap: float,
    floor: float,
    lowest: float,
) -> None:
    """Fill e [heads, R, n], maxima, masses [heads, R, n / unit], m [heads, R, 1] and, unless it is empty, es [heads, R].

    `q` [G * R, D] and `k` [D, visible keys] of each stream; `strips`: heads [first, last) that go through together, some of one stream or some
    whole streams. Patch i hides rows and columns `bounds[i]` by `hide[i]` before and `keep[i]` after the exponential: bool to fill, else to add
    and to multiply. `bias` [1 or heads, rows, visible keys] may be empty and belongs to rows bias_at[0] to bias_at[1]. `softcap` 0: none. `lowest`: rows that see
    nothing are shifted by this, to stay finite.
    """
    size, n = e.shape[1], e.shape[2]
    keys = k[0].shape[1]
    for first, last in strips:
        count = last - first
        x = x_store[: count * size * n].view(count, size, n)
        scores = x.view(count * size, n)[:, column : column + keys]
        if count < group:
            inside = first % group * size
            torch.mm(q[first // group][inside : inside + count * size], k[first // group], out=scores)
        else:
            for i in range(count // group):
                torch.mm(q[first // group + i], k[first // group + i], out=scores[i * group * size : (i + 1) * group * size])
        if softcap > 0.0:
            scores.tanh_().mul_(softcap)
        if bias.numel() > 0:
            part = x[:, bias_at[0] : bias_at[1], column : column + keys]
            part.add_(bias if bias.shape[0] == 1 else bias[first:last])
        for i in range(len(bounds)):
            top, bottom, begin, end = bounds[i]
            part = x[:, top:bottom, begin:end]
            mask = hide[i]
            if mask.dtype == torch.bool:
                part.masked_fill_(mask if mask.shape[0] == 1 else mask[first:last], -float("inf"))
            else:
                part.add_(mask)
        peaks, top_score, weights = maxima[first:last], m[first:last], e[first:last]
        torch.amax(x.view(count, size, n // unit, unit), [-1], out=peaks)
        torch.amax(peaks, [-1], True, out=top_score)
        top_score.clamp_(min=lowest)
        x.sub_(top_score).clamp_(min=floor)
        torch.exp(x, out=weights)
        for i in range(len(bounds)):
            top, bottom, begin, end = bounds[i]
            part = weights[:, top:bottom, begin:end]
            mask = keep[i]
            if mask.dtype == torch.bool:
                part.masked_fill_(mask if mask.shape[0] == 1 else mask[first:last], 0.0)
            else:
                part.mul_(mask)
        if es.numel() > 0:
            x.mul_(weights)
            torch.sum(x, [-1], out=es[first:last])
        torch.sum(weights.unflatten(-1, [n // unit, unit]), [-1], out=masses[first:last])
