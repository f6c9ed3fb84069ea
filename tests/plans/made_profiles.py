"""Profiles made by hand: any metrics, tables and maps on any shape, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from headscope.profile import HeadProfile, RunCard
from headscope.store import MapInfo, RunContent, Tokens
from headscope.store.pyramid import build_pyramid


def made(
    metrics: Mapping[str, Any] | None = None,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 1024,
    maps: np.ndarray | None = None,
    block: int = 16,
    columns: np.ndarray | None = None,
    tables: dict[str, pd.DataFrame] | None = None,
    max_length: int | None = None,
) -> HeadProfile:
    """A profile with `metrics`, each [L, H] or [L, Hkv]; `maps` [L, H, n, n] block masses; `columns` [L, H, N] column sums."""
    rows = [
        {
            "layer": layer,
            "head": head,
            "kv_head": head * kv_heads // heads,
            "module": f"layers.{layer}",
            "kind": "full",
            **{
                name: float(np.asarray(values)[layer, head if np.shape(values)[1] == heads else head * kv_heads // heads])
                for name, values in (metrics or {}).items()
            },
            "roles": [],
            "reasons": {},
        }
        for layer in range(layers)
        for head in range(heads)
    ]
    facts = {
        "name": "made",
        "source": "pypi:made",
        "class": "Made",
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": 8,
        "parameters": 1,
        "dtype": "float32",
        "device": "cpu",
        "max_length": max_length,
    }
    data = [{"name": "text", "kind": "natural", "sha256": "0" * 64, "sequences": 1, "tokens": tokens}]
    card = RunCard(facts, data, [], {}, {}, ["sdpa"], "blocked", {}, {})
    content = None
    if maps is not None:
        count = maps.shape[-1]
        info = MapInfo(block, tokens, True, ("block_mass",), tuple(level.shape[-1] for level in build_pyramid(maps, "block_mass")))
        assert info.sizes[0] == count
        content = RunContent(
            tuple(range(layers)),
            Tokens("", tuple(range(tokens)), ("",) * tokens),
            {} if columns is None else {"column/column_sum": columns},
            {"block_mass": build_pyramid(maps, "block_mass")},
            info,
        )
    return HeadProfile(pd.DataFrame(rows), card, content, tables=tables or {})
