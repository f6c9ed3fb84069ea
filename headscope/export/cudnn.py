"""cuDNN front end: interval mask functions for its flex attention."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.fitting import Fitted
from headscope.export.imported import Found, Hints
from headscope.export.masks import Tables, tables
from headscope.export.tensors import load_tensors, save_tensors
from headscope.plans.patterns import Blocks, Dense, Pattern, Streaming
from headscope.plans.plan import SparsePlan

INTERVALS = 32
"""Intervals of one row, at most: every row of every head holds as many endpoints as the worst one."""
STRIP = 512
ENTRIES = 1 << 26
"""Visible (row, key) pairs of a mask that is no window, at most, when it is read back."""


class CudnnFlex(Format):
    """int32 `mask_func` [heads, nfunc, tokens] with nfunc odd: row t sees [0, F0) U [F1, F2) U [F3, F4) ... (NVIDIA/cudnn-frontend, flex
    attention, experimental). Distinct patterns stand once in `functions` [P, nfunc, tokens]; `layer.N` [heads] says which head has which,
    so that functions[layer.N] is the argument. A sink with a window is nfunc 3; empty intervals fill shorter rows.
    """

    name: ClassVar[str] = "cudnn"
    title: ClassVar[str] = "cuDNN interval mask functions"
    engine: ClassVar[str] = "cuDNN front end, flex attention (SM90, SM100, SM103; experimental)"
    reader: ClassVar[str] = "cudnn create_mask_plan, flex_attn_func"
    main: ClassVar[str] = "mask_func.safetensors"
    holds: ClassVar[tuple[str, ...]] = (
        f"any rule on positions whose rows are at most {INTERVALS} runs of keys, per query head, at one length",
    )
    lacks: ClassVar[tuple[str, ...]] = (
        "keys chosen per input",
        "many scattered columns or diagonals",
        "other lengths than the one it was made for",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Rules on positions with few runs of keys; spans fixed at the length."""
        length = export.tokens("cudnn")
        fitted = Fitted.of(plan)
        fitted.windows("cuDNN", length)

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            found = tables(pattern, length) if pattern.static else None
            if found is None:
                return Dense(), "a mask function cannot be chosen per input"
            if isinstance(pattern, Dense | Streaming) or most_runs(found) <= INTERVALS:
                return pattern, ""
            return Dense(), f"its rows are more than {INTERVALS} runs of keys"

        fitted.each(rule)
        fitted.notes.append(f"mask functions of exactly {length:,} tokens; row t's last interval ends at t + 1, its own key included")
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """Functions, and each layer's choice of them."""
        length, plan, model = export.tokens("cudnn"), export.patterns(), export.model
        kinds = list(dict.fromkeys(plan.patterns.values()))
        found = [endpoints(pattern, length) for pattern in kinds]
        width = max(len(one) for one in found)
        own = np.arange(1, length + 1, dtype=np.int32)
        functions = np.stack([np.concatenate([one, np.broadcast_to(own, (width - len(one), length))]) for one in found])
        content: dict[str, np.ndarray] = {"functions": functions.astype(np.int32), "layers": np.array(model.layers, dtype=np.int64)}
        number_of = {pattern: number for number, pattern in enumerate(kinds)}
        for layer, heads in zip(model.layers, model.heads, strict=True):
            content[f"layer.{layer}"] = np.array([number_of[plan[layer, head]] for head in range(heads)], dtype=np.int32)
        return {self.main: save_tensors(content)}

    def decode(self, path: Path, hints: Hints) -> Found:
        """Patterns with the masks of the functions."""
        t = load_tensors(path)
        functions, numbers = t.get("functions"), t.get("layers")
        if functions is None or numbers is None or functions.ndim != 3 or functions.shape[1] % 2 == 0 or functions.shape[2] < 1:
            raise refusal(
                ExportError, str(path), "it has no functions [P, odd, tokens] and layers", "pass mask_func.safetensors of headscope"
            )
        length = functions.shape[2]
        if functions.min() < 0 or (functions > np.arange(1, length + 1)).any() or (np.diff(functions.astype(np.int64), axis=1) < 0).any():
            raise refusal(ExportError, str(path), "its intervals overlap or pass their row", "copy the export again")
        patterns = [pattern_from(one, path) for one in functions]
        rows: dict[int, np.ndarray] = {}
        for layer in (int(one) for one in numbers):
            row = t.get(f"layer.{layer}")
            if row is None or row.ndim != 1 or not len(row) or row.min() < 0 or row.max() >= len(patterns):
                raise refusal(ExportError, str(path), f"layer {layer} names functions that are not there", "copy the export again")
            rows[layer] = row
        model = hints.shape([len(row) for row in rows.values()], layers=list(rows))
        given = {(layer, head): patterns[int(rows[layer][head])] for layer, head in model.places}
        notes = [f"mask functions of {length:,} tokens"]
        plan = SparsePlan(model, given, "imported from cuDNN", {"length": length}, tuple(notes))
        return Found(model, plan, {}, notes, {"length": length})

    def load(self, export: Export) -> str:
        """A layer's argument."""
        return (
            f't = safetensors.torch.load_file("{self.main}", device="cuda")\n'
            'mask_func = t["functions"][t[f"layer.{layer}"].long()]  # [heads, nfunc, tokens] int32, for create_mask_plan'
        )


def endpoints(pattern: Pattern, length: int) -> np.ndarray:
    """[nfunc, length] int32: the ends of each row's runs of keys, the first run beginning at 0."""
    own = np.arange(1, length + 1, dtype=np.int32)
    if isinstance(pattern, Dense):
        return own[None]
    if isinstance(pattern, Streaming):
        sink = np.minimum(pattern.sink, own)
        return np.stack([sink, np.maximum(own - pattern.window, sink), own])
    found = tables(pattern, length)
    assert found is not None
    runs = most_runs(found)
    out = np.broadcast_to(own, (2 * runs + 1, length)).copy()
    for start in range(0, length, STRIP):
        rows = np.arange(start, min(length, start + STRIP))
        edges = _edges(found, rows)
        for at, row in enumerate(rows):
            ends = np.flatnonzero(edges[at])
            ends = ends[1:] if len(ends) and ends[0] == 0 else np.concatenate([[0], ends])  # F0 = 0: no run from the first key on
            out[: len(ends), row] = ends
    return out


def most_runs(found: Tables) -> int:
    """The most runs of visible keys that a row has."""
    length = len(found.columns)
    most = 1
    for start in range(0, length, STRIP):
        edges = _edges(found, np.arange(start, min(length, start + STRIP)))
        most = max(most, -(-int(edges.sum(1).max()) // 2))
    return most


def _edges(found: Tables, rows: np.ndarray) -> np.ndarray:
    """[R, keys + 1] bool: where a run of visible keys begins or has ended."""
    seen = found.visible(rows, np.arange(int(rows[-1]) + 1))
    return np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1) != 0


def pattern_from(function: np.ndarray, path: Path) -> Pattern:
    """The plainest pattern with the mask of a function [nfunc, tokens]."""
    length = function.shape[1]
    own = np.arange(1, length + 1)
    last = function[:, -1].astype(np.int64)
    runs = [(0, int(last[0])), *((int(a), int(b)) for a, b in zip(last[1::2], last[2::2], strict=True))]
    runs = [(a, b) for a, b in runs if b > a]
    guesses: list[Pattern] = [Dense()] if runs == [(0, length)] else []
    if runs:
        sink = runs[0][1] if runs[0][0] == 0 and len(runs) > 1 else 0
        guesses.append(Streaming(sink, length - runs[-1][0]))
    for guess in guesses:
        if _equal(endpoints(guess, length), function, own):
            return guess
    counts = function[0].astype(np.int64) + (function[2::2].astype(np.int64) - function[1::2]).sum(0)
    if counts.sum() > ENTRIES:
        raise refusal(ExportError, f"{path}: a mask of {length:,} tokens", "no window, and too large key by key", "import a shorter one")
    return Blocks(tuple(_keys(function[:, row]) for row in range(length)), 1)


def _keys(ends: np.ndarray) -> tuple[int, ...]:
    runs = [(0, int(ends[0])), *((int(a), int(b)) for a, b in zip(ends[1::2], ends[2::2], strict=True))]
    return tuple(key for a, b in runs for key in range(a, b))


def _equal(first: np.ndarray, second: np.ndarray, own: np.ndarray) -> bool:
    """Whether two functions have the same mask, however many empty runs either has."""
    return all(_plain(first[:, row]) == _plain(second[:, row]) for row in range(len(own)))


def _plain(ends: np.ndarray) -> list[tuple[int, int]]:
    """Runs with neither empty nor touching ones."""
    out: list[tuple[int, int]] = []
    for a, b in [(0, int(ends[0])), *((int(a), int(b)) for a, b in zip(ends[1::2], ends[2::2], strict=True))]:
        if b > a:
            if out and out[-1][1] == a:
                out[-1] = (out[-1][0], b)
            else:
                out.append((a, b))
    return out
