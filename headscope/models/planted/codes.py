"""Unit codes for tokens and blocks: one-hot while they fit the dimensions, spread over the sphere when there are more of them.

A content head's score is scale * cos(code, code'); what matters is only the largest cosine between two different codes (`worst`), since
the scale is chosen from it so that a mismatch always lies a full margin below a match. Random codes alone would do, but their worst pair is
close, which asks for large scores, and float32 then breaks the ties between equal matches; so they are pushed apart first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PUSHED = 1024
_STEPS = 80


def codes(count: int, dims: int, seed: int) -> tuple[Tensor, float]:
    """`count` unit rows [count, dims] float64 and the largest cosine between two of them (0 or more). Same seed, same codes."""
    if count <= dims:
        return torch.eye(count, dims, dtype=torch.float64), 0.0
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dims, generator=generator, dtype=torch.float64)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    if count <= _PUSHED:
        rows = _push_apart(rows)
    return rows, worst_cosine(rows)


def worst_cosine(rows: Tensor) -> float:
    """Largest cosine between two different unit rows, in blocks of memory count x 1024; never below 0."""
    worst = 0.0
    for start in range(0, len(rows), 1024):
        gram = rows[start : start + 1024] @ rows.T
        here = torch.arange(len(gram))
        gram[here, here + start] = -1.0
        worst = max(worst, float(gram.max()))
    return worst


def _push_apart(rows: Tensor) -> Tensor:
    """Repulsion on the sphere: each row steps away from its near neighbours, weighted by a softmax that sharpens as it goes."""
    best, least = rows, worst_cosine(rows)
    for step in range(_STEPS):
        gram = rows @ rows.T
        gram.fill_diagonal_(-1e9)
        pull = torch.softmax(gram * (10 + step), dim=-1) @ rows
        rows = rows - (0.5 - 0.4 * step / _STEPS) * pull
        rows = rows / rows.norm(dim=-1, keepdim=True)
        worst = worst_cosine(rows)
        if worst < least:
            best, least = rows, worst
    return best
