"""Noise that is a function of place: the same at a position whether it is met in a prefill, a chunk, a decode step or a padded batch.

Numbers drawn from a generator depend on how many were drawn before, so a generation with a cache would see other noise than the same text
read at once. Here every number is a hash of (seed, module, head, position, coordinate), turned into a standard normal by Box and Muller.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

_A, _B, _GOLDEN = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64), 0x9E3779B97F4A7C15 - (1 << 64)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (products wrap, shifts are made logical)."""
    x = (x ^ _shift(x, 30)) * _A
    x = (x ^ _shift(x, 27)) * _B
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def position_noise(call: AttentionCall, seed: int, heads: list[int], width: int, dtype: torch.dtype) -> Tensor:
    """[B, Nq, len(heads), width] standard normal, positions counted from each sequence's first real token."""
    device = call.q.device
    batch, count = call.q.shape[0], call.q.shape[2]
    key = int.from_bytes(hashlib.sha256(f"{seed}:{call.module}".encode()).digest()[:7], "little")
    first = torch.zeros(batch, dtype=torch.int64, device=device) if call.first_token is None else call.first_token.to(device)
    position = (torch.arange(count, device=device) + call.query_offset)[None] - first[:, None]
    head = torch.tensor(heads, device=device)
    counter = (position[:, :, None] * 65536 + head)[..., None] * 65536 + torch.arange(width, device=device)
    state = _mixed(_mixed(counter * _GOLDEN + key))
    u1 = (_shift(state, 11).double() + 0.5) * 2.0**-53
    u2 = (_shift(_mixed(state + _GOLDEN), 11).double() + 0.5) * 2.0**-53
    return ((-2.0 * u1.log()).sqrt() * torch.cos(2.0 * math.pi * u2)).to(dtype)


__all__ = ["position_noise"]
