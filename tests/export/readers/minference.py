"""MInference's reader and its two index rules, from the documented behaviour, in float64."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


class Reader:
    """Patterns of one layer: {int(head): item}; a head that is missing has the default; an item is unpacked into exactly four."""

    def __init__(self, path: Path, layer: int) -> None:
        self.best = {int(head): item for head, item in json.load(path.open())[layer].items()}

    def head(self, head: int) -> tuple[str, int, int]:
        kind, a, b, _ = self.best.get(head, ("vertical_and_slash", 1000, 6096, 1))
        assert kind in ("stream_llm", "vertical_and_slash", "block_sparse")
        return kind, a, b


def mask(kind: str, a: int, b: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[N, N] bool of what a head with queries and keys [N, D] computes in the prefill."""
    length = len(q)
    at = torch.arange(length)
    back = at[:, None] - at[None]
    if kind == "stream_llm":
        return (back >= 0) & ((at[None] < a) | (back < b))
    vertical, slash, last = min(length, max(a, 30)), min(length, max(b, 50)), min(64, length)
    scores = q[-last:] @ k.T / q.shape[1] ** 0.5
    weights = scores.masked_fill(back[-last:] < 0, -torch.inf).softmax(-1)
    columns = weights.sum(0)
    columns[:30] = torch.inf
    diagonals = torch.zeros(length, dtype=weights.dtype)
    for row in range(last):
        for key in range(length - last + row + 1):
            diagonals[length - last + row - key] += weights[row, key]
    diagonals[:100] = torch.inf
    kept = torch.zeros(length, dtype=torch.bool)
    kept[columns.topk(vertical).indices] = True
    near = torch.zeros(length, dtype=torch.bool)
    near[diagonals.topk(slash).indices] = True
    return (back >= 0) & (kept[None] | near[back.clamp(min=0)])


class DualChunk:
    """vLLM up to 0.10: every head by number, vertical_and_slash only, and exactly 30 columns become 130."""

    def __init__(self, folder: Path, layer: int, heads: int) -> None:
        config = json.load((folder / "sparse_attention_config.json").open())
        by_number = {int(head): item for head, item in config[layer].items()}
        self.items = [by_number[head] for head in range(heads)]

    def sizes(self, head: int) -> tuple[int, int]:
        kind, vertical, slash, _ = self.items[head]
        assert kind == "vertical_and_slash", "only support slash mode"
        return (vertical + 100 if vertical == 30 else vertical), slash


class CachedDualChunk:
    """SGLang where the getter caches without the layer: the first layer asked for answers for all."""

    def __init__(self, folder: Path, heads: int) -> None:
        self.config: list[dict[str, Any]] = json.load((folder / "sparse_attention_config.json").open())
        self.heads = heads
        self.get = lru_cache(maxsize=1)(lambda: self.layer)
        self.layer: list[Any] = []

    def sizes(self, layer: int, head: int) -> tuple[int, int]:
        if not self.layer:
            self.layer = [self.config[layer][str(one)] for one in range(self.heads)]
        _, vertical, slash, _ = self.get()[head]
        return (vertical + 100 if vertical == 30 else vertical), slash
