"""Pyramids of block maps, exact at every level, in zarr v3, written a layer at a time and read a tile at a time.

A cell of level z + 1 is the sum (block_mass) or the maximum (block_max) of its four cells in level z, so what a zoomed-out view shows is
true and not an average of averages. A tile of TILE x TILE cells is compressed and checksummed by itself, so one that is shown costs its own
bytes and not its head's; above a causal diagonal there are no tiles at all. The tiles of as many layers as make up SHARD_BYTES are kept in
one file, since thousands of small files make a run slow to write and to copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store.content import PLANES, TILE, MapInfo
from headscope.store.schema import SCHEMA_VERSION, check_version, one_line

COARSEST = 8
"""A level is halved as long as it has more cells a side than this."""

SHARD_BYTES = 32 * 2**20
"""Layers that share a file, at most this much before compression (one layer at least)."""


def build_pyramid(finest: np.ndarray, plane: str) -> list[np.ndarray]:
    """Levels [..., n, n] float32 of a plane, finest first; an odd side is filled up with a row and column of zeros."""
    levels = [np.ascontiguousarray(finest, dtype=np.float32)]
    while levels[-1].shape[-1] > COARSEST:
        level = levels[-1]
        if level.shape[-1] % 2:
            level = np.pad(level, (*((0, 0),) * (level.ndim - 2), (0, 1), (0, 1)))
        upper, lower = level[..., 0::2, :], level[..., 1::2, :]
        if plane == "block_mass":
            rows = np.add(upper, lower, dtype=np.float64)
            levels.append(np.add(rows[..., 0::2], rows[..., 1::2]).astype(np.float32))
        else:
            rows = np.maximum(upper, lower)
            levels.append(np.maximum(rows[..., 0::2], rows[..., 1::2]))
    return levels


def pyramid_sizes(cells: int) -> tuple[int, ...]:
    """Cells a side of every level, finest first."""
    sizes = [cells]
    while sizes[-1] > COARSEST:
        sizes.append(-(-sizes[-1] // 2))
    return tuple(sizes)


class MapWriter:
    """Writes a zarr group with one array per plane and level, layers in any order. Holds the layers of unfinished files in memory."""

    def __init__(self, folder: Path, info: MapInfo, layers: int, heads: int) -> None:
        import zarr
        from zarr.codecs import ZstdCodec

        self.info = info
        self.layers = layers
        group = zarr.open_group(str(folder), mode="w", zarr_format=3)
        group.attrs.update(
            {
                "schema_version": SCHEMA_VERSION,
                "block": info.block,
                "tokens": info.tokens,
                "causal": info.causal,
                "planes": list(info.planes),
                "sizes": list(info.sizes),
                "tile": info.tile,
            }
        )
        self._arrays: dict[tuple[str, int], Any] = {}
        self._together: list[int] = []
        for level, size in enumerate(info.sizes):
            side = min(info.tile, size)
            whole = -(-size // side) * side
            together = min(layers, max(1, SHARD_BYTES // (heads * size * size * 4)))
            self._together.append(together)
            for plane in info.planes:
                self._arrays[plane, level] = group.create_array(
                    f"{plane}/{level}",
                    shape=(layers, heads, size, size),
                    chunks=(1, 1, side, side),
                    shards=(together, heads, whole, whole),
                    chunk_key_encoding={"name": "default", "separator": "."},
                    dtype="float32",
                    compressors=ZstdCodec(level=1, checksum=True),
                    fill_value=0.0,
                    config={"write_empty_chunks": False},
                )
        self._waiting: dict[tuple[str, int, int], dict[int, np.ndarray]] = {}

    def write(self, index: int, plane: str, finest: np.ndarray) -> None:
        """The layer at `index`: level 0 [H, n, n]; the other levels are made from it."""
        for level, values in enumerate(build_pyramid(finest, plane)):
            shard = index // self._together[level]
            waiting = self._waiting.setdefault((plane, level, shard), {})
            waiting[index] = values
            if len(waiting) == min(self._together[level], self.layers - shard * self._together[level]):
                self._write_shard(plane, level, shard)

    def _write_shard(self, plane: str, level: int, shard: int) -> None:
        waiting = self._waiting.pop((plane, level, shard))
        first = shard * self._together[level]
        values = [waiting[index] for index in sorted(waiting)]
        self._arrays[plane, level][first : first + len(values)] = values[0][None] if len(values) == 1 else np.stack(values)

    def close(self) -> None:
        """Raises RunError when a layer is missing."""
        if self._waiting:
            plane, level, shard = next(iter(self._waiting))
            why = f"of the layers in file {shard} only {sorted(self._waiting[plane, level, shard])} were written"
            raise refusal(RunError, f"{plane} level {level}", why, "write every layer once")


class MapReader:
    """Reads one head's map, or one tile of it, from a group that `MapWriter` wrote."""

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
                tile=int(attributes.get("tile", TILE)),
            )
            if min(self.info.block, self.info.tokens, self.info.tile, *self.info.sizes) < 1:
                raise ValueError(f"{self.info} has a size below 1")
        except (KeyError, TypeError, ValueError) as error:
            raise refusal(RunError, str(folder), f"its attributes are incomplete ({one_line(error)})", "write the run again") from error
        self.checks_itself = "tile" in attributes
        """Tiles have checksums of their own; in older runs only whole files have."""
        self._arrays: dict[tuple[str, int], Any] = {}

    def _array(self, plane: str, level: int) -> Any:
        if (plane, level) not in self._arrays:
            try:
                self._arrays[plane, level] = self._group[f"{plane}/{level}"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise self._damaged(plane, level, error) from error
        return self._arrays[plane, level]

    def heads(self, plane: str, level: int) -> int:
        """Heads per layer in the arrays."""
        return int(self._array(plane, level).shape[1])

    def file(self, plane: str, index: int, level: int) -> str:
        """The file, relative to the group, that holds the layer at `index`."""
        return f"{plane}/{level}/c.{index // int(self._array(plane, level).shards[0])}.0.0.0"

    def read(self, plane: str, level: int, *index: int | slice) -> np.ndarray:
        """[...] float32 by index into [L, H, n, n]."""
        try:
            return np.asarray(self._array(plane, level)[index])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._damaged(plane, level, error) from error

    def _damaged(self, plane: str, level: int, error: BaseException) -> RunError:
        where = f"{self.folder}, {plane} level {level}"
        return refusal(RunError, where, f"its content is not what was written ({one_line(error)})", "copy the run again, or write it again")


__all__ = ["COARSEST", "SHARD_BYTES", "MapReader", "MapWriter", "build_pyramid", "one_line", "pyramid_sizes"]
