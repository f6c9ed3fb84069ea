"""Pyramids of block maps, exact at every level, in zarr v3.

A cell of level z + 1 is the sum (block_mass) or the maximum (block_max) of its four cells in level z, so what a zoomed-out view shows is
true and not an average of averages. One chunk per layer and head: a page that shows one head reads one chunk. The chunks of as many layers
as make up SHARD_BYTES are kept in one file, since thousands of small files make a run slow to write and to copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store.content import PLANES, MapInfo
from headscope.store.schema import SCHEMA_VERSION, check_version

COARSEST = 8
"""A level is halved as long as it has more cells a side than this."""

SHARD_BYTES = 32 * 2**20
"""Layers that share a file, at most this much before compression (one layer at least)."""


def build_pyramid(finest: np.ndarray, plane: str) -> list[np.ndarray]:
    """Levels [L, H, n, n] of a plane, finest first; an odd side is filled up with a row and column of zeros."""
    levels = [np.ascontiguousarray(finest, dtype=np.float32)]
    while levels[-1].shape[-1] > COARSEST:
        level = levels[-1]
        if level.shape[-1] % 2:
            level = np.pad(level, ((0, 0), (0, 0), (0, 1), (0, 1)))
        half = level.shape[-1] // 2
        cells = level.reshape(*level.shape[:2], half, 2, half, 2)
        if plane == "block_mass":
            levels.append(cells.sum(axis=(3, 5), dtype=np.float64).astype(np.float32))
        else:
            levels.append(cells.max(axis=(3, 5)))
    return levels


def write_maps(folder: Path, pyramids: dict[str, list[np.ndarray]], info: MapInfo) -> None:
    """Writes a zarr group with one array per plane and level."""
    import zarr
    from zarr.codecs import ZstdCodec

    group = zarr.open_group(str(folder), mode="w", zarr_format=3)
    group.attrs.update(
        {
            "schema_version": SCHEMA_VERSION,
            "block": info.block,
            "tokens": info.tokens,
            "causal": info.causal,
            "planes": list(info.planes),
            "sizes": list(info.sizes),
        }
    )
    for plane in info.planes:
        for level, values in enumerate(pyramids[plane]):
            layers, heads, rows, columns = values.shape
            together = min(layers, max(1, SHARD_BYTES // (heads * rows * columns * 4)))
            array = group.create_array(
                f"{plane}/{level}",
                shape=values.shape,
                chunks=(1, 1, rows, columns),
                shards=(together, heads, rows, columns),
                chunk_key_encoding={"name": "default", "separator": "."},
                dtype="float32",
                compressors=ZstdCodec(level=1),
                fill_value=0.0,
            )
            array[...] = values


class MapReader:
    """Reads one head's map at a time from a group that `write_maps` wrote."""

    def __init__(self, folder: Path) -> None:
        import zarr

        self.folder = folder
        try:
            self._group: Any = zarr.open_group(str(folder), mode="r", zarr_format=3)
            attributes: dict[str, Any] = dict(self._group.attrs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise refusal(RunError, str(folder), f"it cannot be opened ({one_line(error)})", "write the run again") from error
        check_version(attributes.get("schema_version"), folder)
        try:
            self.info = MapInfo(
                block=int(attributes["block"]),
                tokens=int(attributes["tokens"]),
                causal=bool(attributes["causal"]),
                planes=tuple(plane for plane in PLANES if plane in attributes["planes"]),
                sizes=tuple(int(size) for size in attributes["sizes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise refusal(RunError, str(folder), f"its attributes are incomplete ({one_line(error)})", "write the run again") from error

    def heads(self, plane: str, level: int) -> int:
        """Heads per layer in the arrays."""
        return int(self._group[f"{plane}/{level}"].shape[1])

    def file(self, plane: str, index: int, level: int) -> str:
        """The file, relative to the group, that holds the layer at `index`."""
        return f"{plane}/{level}/c.{index // int(self._group[f'{plane}/{level}'].shards[0])}.0.0.0"

    def read(self, plane: str, index: int, head: int, level: int) -> np.ndarray:
        """[n, n] float32 of the layer at `index`."""
        try:
            return np.asarray(self._group[f"{plane}/{level}"][index, head])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            where = f"{self.folder}, {plane} level {level}"
            raise refusal(RunError, where, f"it cannot be read ({one_line(error)})", "write the run again") from error


def one_line(error: BaseException) -> str:
    """An error of another library as one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
