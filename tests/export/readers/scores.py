"""Retrieval_Head's and HeadKV's readers of head_score files, from their documented behaviour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def retrieval_head(path: Path) -> list[tuple[list[int], float]]:
    """Heads by mean score, best first: one line is read, names say which head it is."""
    with path.open() as file:
        found = json.loads(file.readline())
    means = [([int(part) for part in name.split("-")], float(np.mean(values))) for name, values in found.items()]
    return sorted(means, key=lambda one: one[1], reverse=True)


def headkv(path: Path, layers: int, heads: int) -> np.ndarray:
    """[L, H] means: one line is read, heads are taken in the order of the file, whatever their names."""
    with path.open() as file:
        found = json.loads(file.readline())
    return np.array([np.mean(values) for values in found.values()]).reshape(layers, heads)
