"""DuoAttentionPress as kvpress documents it, without kvpress: pattern from `load_attention_pattern`, a share of heads streams."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class DuoAttentionPress:
    """The part that a pattern goes through."""

    head_compression_ratio: float = 0.0
    on_the_fly_scoring: bool = False
    sink_size: int = field(init=False, default=0)
    recent_size: int = field(init=False, default=0)
    streaming: Any = field(init=False, default=None)

    @staticmethod
    def load_attention_pattern(model: Any) -> tuple[int, int, np.ndarray]:
        raise RuntimeError("kvpress would fetch this from the network")

    def post_init_from_model(self, model: Any) -> None:
        """The smallest scores stream, as many as the ratio says, rounded."""
        self.sink_size, self.recent_size, scores = self.load_attention_pattern(model)
        count = round(scores.size * self.head_compression_ratio)
        self.streaming = np.zeros(scores.shape, dtype=bool)
        if count > 0:
            self.streaming[np.unravel_index(np.argsort(scores, axis=None)[:count], scores.shape)] = True

    def masked(self, layer: int, keys: int) -> np.ndarray:
        """[Hkv, keys] bool: keys masked from decoding on, after a prefill of `keys` tokens."""
        out = np.zeros((self.streaming.shape[1], keys), dtype=bool)
        out[self.streaming[layer], self.sink_size : -self.recent_size] = True
        return out


@contextmanager
def module(path: Path) -> Iterator[Any]:
    """The exported module, imported where `kvpress` is this file."""
    stand_in = types.ModuleType("kvpress")
    stand_in.DuoAttentionPress = DuoAttentionPress
    before = sys.modules.get("kvpress")
    sys.modules["kvpress"] = stand_in
    found = types.ModuleType("headscope_press_under_test")
    sys.modules[found.__name__] = found
    try:
        exec(compile(path.read_text(), str(path), "exec"), found.__dict__)
        yield found
    finally:
        del sys.modules[found.__name__]
        if before is None:
            del sys.modules["kvpress"]
        else:
            sys.modules["kvpress"] = before
