"""Masks as Block-Sparse-Attention, XAttention and cuDNN's front end build them, from their documented behaviour."""

from __future__ import annotations

import numpy as np

SIDE = 128


def block_sparse(kind: int, info: np.ndarray, base: np.ndarray | None, length: int) -> np.ndarray:
    """[N, N] bool of a head: 0 dense, -1 (sink blocks, local blocks with the diagonal one), k the k-th block mask; causal."""
    at = np.arange(length)
    causal = at[None] <= at[:, None]
    rows, keys = at[:, None] // SIDE, at[None] // SIDE
    if kind == 0:
        return causal
    if kind == -1:
        sink, local = info
        return causal & ((keys < sink) | (keys > rows - local))
    assert base is not None
    return causal & base[kind - 1][rows, keys]


def find_blocks(mass: np.ndarray, threshold: float) -> set[int]:
    """Of one row of estimated block masses: the first and the last, and the fewest others whose sum reaches the threshold."""
    order = np.argsort(-mass, kind="stable")
    before = np.cumsum(mass[order]) - mass[order]
    return {0, len(mass) - 1, *order[before < threshold * mass.sum()].tolist()}


def intervals(function: np.ndarray) -> np.ndarray:
    """[N, N] bool of a mask function [nfunc, N]: [0, F0) and [F1, F2), [F3, F4), ..."""
    nfunc, length = function.shape
    assert nfunc % 2 == 1
    assert function.dtype == np.int32
    keys = np.arange(length)[None]
    seen = keys < function[0][:, None]
    for at in range(1, nfunc, 2):
        seen = seen | ((keys >= function[at][:, None]) & (keys < function[at + 1][:, None]))
    return seen
