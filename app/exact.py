"""Exact cells: weights recomputed from a run's stored q and k, the same cells pooled, and whole rows and columns of A.

The formula is the store's (`weights_window`); what is added is memory. Neighbouring windows read the same pieces of q and k, and reading
and checking a piece takes longer than its dot products, so the last pieces stay in memory. A window is cut so that no step of it is larger
than PIECE x PIECE weights; a head is never recomputed whole.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np

from headscope.app.cache import SizedCache
from headscope.errors import RunError, refusal
from headscope.store.kept import ROWS, KeptLayer, weights_window
from headscope.store.schema import one_line

MEMORY = 160 * 2**20
PIECE = 1024
STRETCH = 16384
TOP = 24


class Pieces:
    """A stored array [H, N, ...], sliced as [head, a:b] like the array itself; pieces of ROWS positions stay in a cache."""

    def __init__(self, source: Any, name: tuple[object, ...], cache: SizedCache[np.ndarray]) -> None:
        self.shape = source.shape
        self._source, self._name, self._cache = source, name, cache

    def __getitem__(self, index: tuple[int, slice]) -> np.ndarray:
        head, span = index
        first, last = span.start, span.stop
        parts = []
        for piece in range(first // ROWS, -(-last // ROWS)):
            low = piece * ROWS
            values = self._cache.get((*self._name, head, piece), partial(self._read, head, low))
            parts.append(values[max(first - low, 0) : last - low])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read(self, head: int, low: int) -> np.ndarray:
        return np.asarray(self._source[head, low : low + ROWS])


class ExactHead:
    """One head of a layer whose q and k were kept."""

    def __init__(self, layer: KeptLayer, head: int, name: tuple[object, ...], cache: SizedCache[np.ndarray]) -> None:
        self.head = head
        arrays = {what: Pieces(getattr(layer, what), (*name, what), cache) for what in ("q", "k", "lse")}
        self.layer = KeptLayer(layer.facts, arrays["q"], arrays["k"], arrays["lse"], layer.extra)

    def window(self, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
        """[q1 - q0, k1 - k0] float32, NaN in rows that were not kept; RunError for what is not there or damaged."""
        first = self.layer.first
        if q0 < first < q1:
            return np.concatenate([np.full((first - q0, k1 - k0), np.nan, dtype=np.float32), self.window(first, q1, k0, k1)])
        if q1 <= first:
            return np.full((q1 - q0, k1 - k0), np.nan, dtype=np.float32)
        try:
            return weights_window(self.layer, self.head, q0, q1, k0, k1)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            why = f"its content is not what was written ({one_line(error)})"
            raise refusal(RunError, "the stored q and k", why, "write the run again") from error

    def pooled(self, plane: str, block: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
        """[ceil((q1 - q0) / block), ceil((k1 - k0) / block)] float32: mass per query of the block, or the largest weight."""
        if block == 1:
            return self.window(q0, q1, k0, k1)
        out = np.empty((-(-(q1 - q0) // block), -(-(k1 - k0) // block)), dtype=np.float32)
        for a in range(q0, q1, PIECE):
            for c in range(k0, k1, PIECE):
                part = self.window(a, min(a + PIECE, q1), c, min(c + PIECE, k1))
                cells = _blocks(part, block, plane)
                row, column = (a - q0) // block, (c - k0) // block
                out[row : row + cells.shape[0], column : column + cells.shape[1]] = cells
        return out

    def row(self, query: int) -> np.ndarray:
        """A[query, 0 .. last visible key]: float32 [keys]."""
        end = min(query + 1, self.layer.keys) if self.layer.facts.causal else self.layer.keys
        return np.concatenate([self.window(query, query + 1, low, min(low + STRETCH, end))[0] for low in range(0, max(end, 1), STRETCH)])

    def column(self, key: int) -> tuple[int, np.ndarray]:
        """(first query, A[first query .., key]): every row that may see the key, float32."""
        first = max(key, self.layer.first) if self.layer.facts.causal else self.layer.first
        parts = [
            self.window(low, min(low + STRETCH, self.layer.rows), key, key + 1)[:, 0] for low in range(first, self.layer.rows, STRETCH)
        ]
        return first, np.concatenate(parts)


class ExactCells:
    """Exact heads of any run, with one memory for all of them."""

    def __init__(self, memory: int = MEMORY) -> None:
        self._pieces: SizedCache[np.ndarray] = SizedCache(memory, lambda values: int(values.nbytes))
        self.working = threading.BoundedSemaphore(2)
        """At most two windows are computed at a time: the other threads keep serving what is stored."""

    def head(self, name: str, layer: KeptLayer, number: int, head: int) -> ExactHead:
        """A head; `name` must differ between runs and between versions of a run."""
        return ExactHead(layer, head, (name, number), self._pieces)


def _blocks(part: np.ndarray, block: int, plane: str) -> np.ndarray:
    rows, columns = part.shape
    high, wide = -(-rows // block), -(-columns // block)
    if high * block != rows or wide * block != columns:
        fill = 0.0
        part = np.pad(part, ((0, high * block - rows), (0, wide * block - columns)), constant_values=fill)
    cells = part.reshape(high, block, wide, block)
    if plane == "max":
        return cells.max(axis=(1, 3))
    counts = np.minimum(block, rows - np.arange(high) * block).astype(np.float64)
    return (cells.sum(axis=(1, 3), dtype=np.float64) / counts[:, None]).astype(np.float32)


def largest(values: np.ndarray, count: int = TOP) -> np.ndarray:
    """Places of the largest values above zero, largest first, equal ones in order."""
    known = np.where(np.isfinite(values), values, 0)
    order = np.argsort(-known, kind="stable")[:count]
    return order[known[order] > 0]


def binned(values: np.ndarray, bins: int = 1024) -> tuple[int, np.ndarray, np.ndarray]:
    """(positions per bin, sums, maxima) of at most `bins` equal stretches; the last may be shorter."""
    width = max(-(-values.size // bins), 1)
    known = np.where(np.isfinite(values), values, 0).astype(np.float64)
    padded = np.pad(known, (0, -values.size % width)).reshape(-1, width)
    return width, padded.sum(1), padded.max(1)


__all__ = ["ExactCells", "ExactHead", "binned", "largest"]
