"""Means with standard errors, and exact tests of one way against another on the same items.

A difference without its error invites a reader to believe it, and two ways judged on the same items must be compared item by item: the
spread between items is most of either's error and none of the difference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (of items drawn independently); prints as 0.812 ± 0.012."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Tensor | Sequence[float] | Sequence[bool]) -> Estimate:
        """Of one number per item; ValueError for none. One item has no error, and NaN stands for it."""
        kept = torch.as_tensor(values, dtype=torch.float64).flatten()
        if not len(kept):
            raise ValueError("no items to average")
        error = float(kept.std() / math.sqrt(len(kept))) if len(kept) > 1 else math.nan
        return cls(float(kept.mean()), error, len(kept))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def difference(one: Tensor, other: Tensor) -> Estimate:
    """The mean of one - other, item by item."""
    return Estimate.of(one.double() - other.double())


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact probability of a split as uneven as this under even odds; 1 where nothing differs. On right and wrong answers to the
    same items it is McNemar's exact test."""
    total = wins + losses
    if not total:
        return 1.0
    log_half = -total * math.log(2)
    choose = (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + log_half for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * math.fsum(math.exp(one) for one in choose))


def mcnemar(one: Tensor, other: Tensor) -> float:
    """Exact p of two bool [n] vectors of right answers to the same items."""
    return sign_test(int((one & ~other).sum()), int((other & ~one).sum()))


def rank(value: float, others: Sequence[float]) -> str:
    """How many of the others reach a value, in words."""
    return f"{sum(other >= value for other in others)} of {len(others)} reach it"


def block(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table as every benchmark hands it over."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


__all__ = ["Estimate", "block", "difference", "mcnemar", "rank", "sign_test"]
