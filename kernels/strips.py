"""The inner loop of the blocked kernel: from queries and keys to weights, maxima and sums, strip by strip.

These functions are plain PyTorch, run through TorchScript where it is available (`compiled`). That changes no result: it runs the same
operations without the interpreter between them, and without the interpreter lock, so that parts of a call on several threads do not queue
for it. torch.compile would need a C++ compiler on the user's machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_compiling = Lock()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through TorchScript from its first call on; itself where this Python or torch has no TorchScript."""
    ready: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any) -> Any:
        if not ready:
            with _compiling:
                if not ready:
                    ready.append(_scripted(function))
        return ready[0](*args)

    return call


def _scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript announces its deprecation; the plain function is the way out
            return torch.jit.script(function)
    except (AttributeError, RuntimeError, NotImplementedError):
        return function


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

    `q` [G * R, D] and `k` [D, visible keys] of each stream; `strips`: heads [first, last) that go through together, some of one stream or
    some whole streams. Patch i hides rows and columns `bounds[i]` by `hide[i]` before and `keep[i]` after the exponential: bool to fill,
    else to add and to multiply. `bias` [1 or heads, rows, visible keys] may be empty and belongs to rows bias_at[0] to bias_at[1].
    `softcap` 0: none. `lowest`: rows that see nothing are shifted by this, to stay finite.
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


@compiled
def split_normaliser(
    store: Tensor, maxima: Tensor, masses: Tensor, ramp: Tensor, lines: Tensor, skip: int, unit: int
) -> tuple[Tensor, Tensor]:
    """(rest, index), [heads, R] each: sum e without the row's largest weight, and the column of that weight, the first of equals.

    The first block whose largest score is the row's, and in it the first weight of 1: the others round down to 0, and `ramp` falls with the
    key, so that its largest value marks the first hit. `masses` [heads, R, blocks] are sums of e per block, and are used up; `lines`:
    number of each row's first block in `store`, before the `skip` blocks of its left margin.
    """
    which = maxima.argmax(-1, keepdim=True)
    block = store.view(-1, unit).index_select(0, (which.view(-1) + lines).add_(skip))
    offset = (unit - block.floor().mul_(ramp).amax(-1, keepdim=True)).to(torch.int64).clamp_(0, unit - 1)
    block.scatter_(1, offset, 0.0)
    masses.scatter_(-1, which, block.sum(-1).view_as(which))
    return masses.sum(-1), which.mul_(unit).add_(offset.view_as(which)).squeeze(-1)


@compiled
def sum_columns(w: Tensor, e: Tensor, rows: int, unit: int, masses: bool) -> tuple[Tensor, Tensor]:
    """Weighted by w: sums over the tile's rows [heads, n], and over blocks of `rows` rows and `unit` keys [heads, R / rows, n / unit]."""
    heads, size = w.shape[0], w.shape[1]
    n = e.shape[2]
    if rows == size:
        by_block = torch.bmm(w.view(heads, 1, size), e)
    else:
        by_block = torch.matmul(w.view(heads, size // rows, 1, rows), e.unflatten(1, [size // rows, rows])).view(heads, -1, n)
    cells = by_block.view(heads, -1, n // unit, unit).sum(-1) if masses else by_block[:0]
    return (by_block.squeeze(1) if rows == size else by_block.sum(1)), cells


@compiled
def log_peaks(maxima: Tensor, m: Tensor, w: Tensor, rows: int) -> Tensor:
    """Largest log weight per block of `rows` counting rows and per key block, [heads, R / rows, blocks]; uses `maxima` up."""
    logs = maxima.sub_(m).add_(w.log().unsqueeze(-1))
    return logs.view(logs.shape[0], -1, rows, logs.shape[2]).amax(2)


@compiled
def sum_edge(w: Tensor, e: Tensor, mask: Tensor) -> Tensor:
    """Sums over rows of w e where mask is 1: [heads, columns]."""
    return torch.bmm(w.unsqueeze(1), e * mask).squeeze(1)


@compiled
def take_band(band: Tensor, weights: Tensor, clear: bool) -> Tensor:
    """[heads, R, statistics]: the band's columns times their weights, in the weights' dtype; the band is then set to zero."""
    near = band.to(weights.dtype, copy=True, memory_format=torch.contiguous_format)
    if clear:
        band.zero_()
    return torch.mm(near.view(-1, near.shape[2]), weights).view(near.shape[0], near.shape[1], -1)


@compiled
def block_moments(store: Tensor, powers: Tensor) -> Tensor:
    """Sums of e, e o and e o^2 per block of columns, [3, rows, blocks] float64. Results and powers lie row by row: then the product runs at
    the speed of reading e."""
    sums = torch.empty(3, store.numel() // powers.shape[1], dtype=store.dtype, device=store.device)
    torch.mm(store.view(-1, powers.shape[1]), powers.t(), out=sums.t())
    return sums.view(3, store.shape[0], -1).to(torch.float64)
