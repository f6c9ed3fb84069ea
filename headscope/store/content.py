"""What a run holds besides its card and table: the shown text, its statistics and its maps, in memory.

`RunContent` (just measured) and `Run` (on disk) answer the same questions, so a profile does not care whether it was saved yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from headscope.errors import RunError, refusal, unknown_name

PLANES = ("block_mass", "block_max")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The shown text: `text` as people read it, `ids` [N], and `strings` [N], the piece of text each token stands for."""

    text: str
    ids: tuple[int, ...]
    strings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Tokens(N={len(self)}, {self.text[:40]!r})"


@dataclass(frozen=True, slots=True)
class MapInfo:
    """The block maps: `block` tokens a side at level 0, `tokens` N, `planes`, and `sizes`, the cells a side of each level (finest first).

    Level z has cells of block * 2^z tokens. block_mass cells are sums, block_max cells maxima, at every level exactly. `causal`: above the
    diagonal there is nothing.
    """

    block: int
    tokens: int
    causal: bool
    planes: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(slots=True, eq=False)
class RunContent:
    """Shown text, statistics and maps in memory.

    `layers`: numbers of the main stack. `statistics`: "row/<name>" and "column/<name>" -> [L, H, N] float32 (argmax int32). `pyramids`:
    plane -> arrays [L, H, n, n] float32, finest first.
    """

    layers: tuple[int, ...]
    tokens: Tokens | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    pyramids: dict[str, list[np.ndarray]] = field(default_factory=dict)
    maps: MapInfo | None = None

    @property
    def statistics(self) -> list[str]:
        """Names of the arrays."""
        return sorted(self.arrays)

    def statistic(self, name: str, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """[L, H, N], or [H, N] of a layer, or [N] of a head."""
        if name not in self.arrays:
            raise unknown_name(RunError, "statistic", name, self.arrays)
        index = slice_of(self.layers, self.arrays[name].shape, layer, head)
        return self.arrays[name][index]

    def map(self, plane: str, layer: int, head: int, level: int = 0) -> np.ndarray:
        """[n, n] float32: one head's map."""
        place = map_place(self.maps, self.layers, plane, layer, level)
        stacked = self.pyramids[plane][level]
        check_head(head, stacked.shape[1])
        return stacked[place, head]


def layer_index(layers: Sequence[int], layer: int) -> int:
    """Where a layer number stands in the arrays; RunError when the run does not have it."""
    if layer not in layers:
        span = f"{min(layers)}..{max(layers)}" if layers else "none"
        raise refusal(RunError, f"layer {layer}", f"this run has the layers {span}", "pass one of them")
    return list(layers).index(layer)


def check_head(head: int, heads: int) -> None:
    """Raises RunError for a head that does not exist; a negative one would silently be another head."""
    if not 0 <= head < heads:
        raise refusal(RunError, f"head {head}", f"this run has the heads 0..{heads - 1}", "pass one of them")


def slice_of(layers: Sequence[int], shape: Sequence[int], layer: int | None, head: int | None) -> tuple[int | slice, ...]:
    """The index of a layer and a head in an [L, H, N] array."""
    if head is not None:
        check_head(head, shape[1])
    first: int | slice = slice(None) if layer is None else layer_index(layers, layer)
    second: int | slice = slice(None) if head is None else head
    return (first, second, slice(None))


def map_place(info: MapInfo | None, layers: Sequence[int], plane: str, layer: int, level: int) -> int:
    """Index of the layer, after checking that the run has this plane and level."""
    if info is None:
        raise refusal(RunError, "block maps", "this run was made without them", "profile again with maps=True")
    if plane not in info.planes:
        raise unknown_name(RunError, "map", plane, info.planes)
    if not 0 <= level < len(info.sizes):
        raise refusal(RunError, f"level {level}", f"the maps have the levels 0..{len(info.sizes) - 1}", "pass one of them")
    return layer_index(layers, layer)
