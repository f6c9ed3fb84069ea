"""Ranks among heads."""

from __future__ import annotations

import numpy as np


def descending_ranks(values: np.ndarray) -> np.ndarray:
    """1 for the largest value, equal values share the best rank of the group, NaN stays NaN; same shape, float64."""
    flat = values.ravel()
    out = np.full(flat.shape, np.nan)
    known = np.flatnonzero(~np.isnan(flat))
    ordered = np.sort(flat[known])
    out[known] = 1 + known.size - np.searchsorted(ordered, flat[known], side="right")
    return out.reshape(values.shape)


def rank_share(values: np.ndarray) -> np.ndarray:
    """The share of heads that are not larger, 0 .. 1: the rank as something a colour can show. NaN stays NaN."""
    ranks = descending_ranks(values)
    known = int((~np.isnan(ranks)).sum())
    return (known - ranks + 1) / max(known, 1)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation over the heads that have both, equal values sharing their mean rank; NaN for fewer than two or a constant."""
    from headscope.profile.comparison import correlation, mean_ranks

    both = np.isfinite(first) & np.isfinite(second)
    return correlation(mean_ranks(first[both]), mean_ranks(second[both]))
