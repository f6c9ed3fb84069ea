"""MoA's sizes and caches, from their documented behaviour."""

from __future__ import annotations

import json
import math
from pathlib import Path


def sizes(path: Path, tokens: int) -> list[list[tuple[int, int]]]:
    """Per layer and head (static, circular) keys: alpha + beta N, at most N, at least 128, up to a multiple of 64; 64 of them static."""
    config = json.loads(path.read_text())
    out = []
    for row, rates in zip(config["alphas"], config["betas"], strict=True):
        whole = [math.ceil(max(min(int(a + tokens * b), tokens), 128) / 64) * 64 for a, b in zip(row, rates, strict=True)]
        out.append([(min(size, 64), size - min(size, 64)) for size in whole])
    return out


def decode(tokens: int, static: int, circular: int) -> set[int]:
    """The keys that the last of `tokens` rows sees: the static ones, and a ring to which its own key was added before."""
    return {*range(min(static, tokens)), *range(max(0, tokens - circular), tokens)}


def prefill(row: int, static: int, circular: int) -> set[int]:
    """The keys that a row of the prefill sees: whole blocks of 64, the diagonal one among circular / 64."""
    block = row // 64
    blocks = {*range(min(static // 64, block + 1)), *range(max(0, block + 1 - circular // 64), block + 1)}
    return {key for one in blocks for key in range(one * 64, min(one * 64 + 64, row + 1))}
