"""Rotary pairs with two jobs: the fast ones tell position, the slow ones stand still and carry content.

Pair i of a head turns by f_i = theta^(-2i / D) radians per token. For a constant key u (1 on every fast pair) and a query whose pair i is
c * exp(-1j * f_i * delta), the score of the key d tokens back is

    c * K(d - delta),   K(m) = sum_{fast i} cos(f_i * m),

largest at d = delta and lower by at least c * `gap` elsewhere. A large theta makes neighbouring pairs differ by a factor of eight or so:
a handful of pairs then tells all positions apart, and the last ones turn less than 1e-6 radians over the whole context, which is nothing in
float32. With an ordinary theta no pair stands still, and a content match would fade with distance without anyone noticing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_STILL = 1e-6
_RATIO = 8.0
_LARGEST = 1e37


@dataclass(frozen=True)
class Rotary:
    """`theta`: the config's base. `inv_freq` [D / 2] as transformers computes it. Pairs [0, fast) tell position, pairs [still, D / 2) carry
    content; `gap` = min_{0 < |m| < 2 N} K(0) - K(m)."""

    theta: float
    inv_freq: Tensor
    fast: int
    still: int
    gap: float

    @property
    def content_dims(self) -> tuple[int, ...]:
        """Dimensions of a head that do not turn: first members of the still pairs, then second members."""
        pairs = len(self.inv_freq)
        return (*range(self.still, pairs), *range(pairs + self.still, 2 * pairs))

    def query(self, delta: int) -> Tensor:
        """The query [D] float64 whose kernel peaks at distance delta with K(0) = `fast`."""
        pairs = len(self.inv_freq)
        out = torch.zeros(2 * pairs, dtype=torch.float64)
        phase = self.inv_freq[: self.fast].double() * delta
        out[: self.fast] = phase.cos()
        out[pairs : pairs + self.fast] = -phase.sin()
        return out


def rotary(head_dim: int, positions: int) -> Rotary:
    """The division of `head_dim` (even) for a context of `positions` tokens. `still` is D / 2 when nothing is left for content."""
    pairs = head_dim // 2
    theta = min(_RATIO**pairs, _LARGEST)
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    ratio = theta ** (1 / pairs)
    fast = min(math.ceil(math.log(positions, ratio)) + 1, pairs)
    still = int((inv_freq * positions > _STILL).sum())
    distance = torch.arange(1, 2 * positions, dtype=torch.float64)
    kernel = (1 - (distance[:, None] * inv_freq[:fast].double()).cos()).sum(-1)
    return Rotary(theta, inv_freq, fast, max(still, fast), float(kernel.min()))
