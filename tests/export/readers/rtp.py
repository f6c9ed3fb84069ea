"""rtp-llm's head-wise prefill, from its documented behaviour, in float64: gathered heads, window_left, a threshold on the length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def config(path: Path) -> dict[str, Any]:
    """The entry of config.json."""
    found: dict[str, Any] = json.loads(path.read_text())["headwise_config"]
    return found


def retrieval(entry: dict[str, Any], layer: int, heads: int) -> torch.Tensor:
    """[H] bool; a layer that is missing is all retrieval."""
    return torch.tensor(entry.get(str(layer), [1] * heads)) == 1


def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention of a subset of query heads [h, N, D] with all key heads [Hkv, N, D]: the kernel deals the heads out evenly."""
    size = len(q) // len(k)
    if len(q) % len(k):
        raise RuntimeError("the kernel needs a whole number of query heads per key head")
    k, v = k.repeat_interleave(size, 0), v.repeat_interleave(size, 0)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights @ v


def prefill(entry: dict[str, Any], layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[H, N, D]: a prompt computed in one piece."""
    length = q.shape[1]
    at = torch.arange(length)
    back = at[:, None] - at[None]
    causal = back >= 0
    if length < entry.get("seqlen_threshold", 16384):
        return gathered(q, k, v, causal)
    full = retrieval(entry, layer, len(q))
    window = (back <= entry.get("swa_token_num", 8192)) | (at[None] < entry.get("sink_token_num", 4))
    out = torch.empty_like(q)
    for heads, seen in ((full, causal), (~full, causal & window)):
        if bool(heads.any()):
            out[heads] = gathered(q[heads], k, v, seen)
    return out
