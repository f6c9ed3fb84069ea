"""DuoAttention's loader and cache, from its documented behaviour: noise before the quantile, sink and recent keys kept after each step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def load(folder: Path) -> tuple[np.ndarray, int, int]:
    """(gates [L, Hkv], sink, recent): a tab-separated table, clipped, and two entries of config.json; nothing else is read."""
    gates = np.clip(np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t"), 0, 1)
    config = json.loads((folder / "config.json").read_text())
    return gates, config["sink_size"], config["recent_size"]


def full_heads(gates: np.ndarray, sparsity: float, seed: int) -> np.ndarray:
    """Which heads keep all keys: noise of up to 1e-6 on every gate, then the quantile; 1 and 0 are special."""
    noisy = gates + np.random.default_rng(seed).uniform(0, 1e-6, gates.shape)
    threshold = 2.0 if sparsity >= 1 else -1.0 if sparsity <= 0 else np.quantile(noisy, sparsity)
    return noisy >= threshold


def decode(length: int, sink: int, recent: int) -> list[set[int]]:
    """The keys that each row of a text sees, decoded token by token with a streaming head's cache."""
    cache: list[int] = []
    seen = []
    for token in range(length):
        cache = [*cache, token]
        seen.append(set(cache))
        if len(cache) > sink + recent:
            cache = cache[:sink] + cache[-recent:]  # recent 0 keeps everything, as slices do
    return seen
