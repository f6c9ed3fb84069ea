"""What a run holds besides its card and table: the shown text, its statistics, its maps and kept q and k, in memory.

`RunContent` (just measured) and `Run` (on disk) answer the same questions, so a profile does not care whether it was saved yet, and a run
is written, layer by layer, in the same way from either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from headscope.errors import RunError, refusal, unknown_name
from headscope.store.kept import KeptLayer, weights_window

if TYPE_CHECKING:
    from headscope.store.pictures import Pictures

PLANES = ("block_mass", "block_max")

TILE = 256
"""Cells a side of a tile, the piece of a map that is stored, checked and read by itself."""


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
    diagonal there is nothing. `tile`: cells a side of a tile.
    """

    block: int
    tokens: int
    causal: bool
    planes: tuple[str, ...]
    sizes: tuple[int, ...]
    tile: int = TILE

    def tiles(self, level: int) -> int:
        """Tiles a side of a level."""
        return -(-self.sizes[level] // self.tile)


@dataclass(slots=True, eq=False)
class RunContent:
    """Shown text, statistics and maps in memory.

    `layers`: numbers of the main stack. `statistics`: "row/<name>" and "column/<name>" -> [L, H, N] float32 (argmax int32). `pyramids`:
    plane -> arrays [L, H, n, n] float32, finest first. `kept`: layer -> its q, k and lse. `pictures`: attention over a picture.
    """

    layers: tuple[int, ...]
    tokens: Tokens | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    pyramids: dict[str, list[np.ndarray]] = field(default_factory=dict)
    maps: MapInfo | None = None
    kept: dict[int, KeptLayer] = field(default_factory=dict)
    pictures: Pictures | None = None

    @property
    def heads_per_layer(self) -> int:
        """The largest number of heads in a layer: the second axis of statistics and maps; 0 where neither is there."""
        shapes = [values.shape for values in (*self.arrays.values(), *(levels[0] for levels in self.pyramids.values()))]
        return shapes[0][1] if shapes else 0

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

    def tile(self, plane: str, level: int, layer: int, head: int, i: int, j: int) -> np.ndarray:
        """One tile of a head's map: [rows, columns] float32, tile row `i` from the top and tile column `j`; smaller at the edges."""
        whole = self.map(plane, layer, head, level)
        return whole[tile_span(self.maps, level, i, j)]

    def finest(self, plane: str, layer: int) -> np.ndarray:
        """[H, n, n] float32: level 0 of a layer's heads."""
        return self.pyramids[plane][0][map_place(self.maps, self.layers, plane, layer, 0)]

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers whose q and k are there, so that `window` can recompute them."""
        return tuple(sorted(self.kept))

    def kept_layer(self, layer: int) -> KeptLayer:
        """q, k, lse and the facts of a layer's attention call; RunError when they were not kept."""
        if layer not in self.kept:
            layer_index(self.layers, layer)
            raise not_kept(layer, self.kept_layers)
        return self.kept[layer]

    def window(self, layer: int, head: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
        """[q1 - q0, k1 - k0] float32: exact weights of queries q0..q1-1 on keys k0..k1-1; see `headscope.store.kept`."""
        return weights_window(self.kept_layer(layer), head, q0, q1, k0, k1)


def not_kept(layer: int, kept: Sequence[int]) -> RunError:
    """Why a layer's map cannot be recomputed, and how to make a run in which it can."""
    have = f"this run kept those of {', '.join(map(str, kept))}" if kept else "this run kept none"
    return refusal(
        RunError,
        f"an exact window of layer {layer}",
        f"it is recomputed from q and k, and {have}",
        f"profile again with keep=({layer},) or keep='all' (--keep {layer})",
    )


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


def tile_span(info: MapInfo | None, level: int, i: int, j: int) -> tuple[slice, slice]:
    """Rows and columns of a tile; RunError for one that the level does not have."""
    if info is None:
        raise refusal(RunError, "block maps", "this run was made without them", "profile again with maps=True")
    last = info.tiles(level) - 1
    if not (0 <= i <= last and 0 <= j <= last):
        raise refusal(RunError, f"tile ({i}, {j})", f"level {level} has the tiles 0..{last} a side", "pass one of them")
    size = info.sizes[level]
    rows, columns = (slice(at * info.tile, min((at + 1) * info.tile, size)) for at in (i, j))
    return rows, columns
