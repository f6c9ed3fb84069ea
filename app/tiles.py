"""Tiles of a head's map: which there are, what is in them, and how they travel.

A cell is a square block of tokens. `block` names the level: 1 is exact, 2 .. 8 are exact cells pooled, from the run's own block on they are
the stored pyramid. All tiles have the same number of cells a side. On the wire a tile is a 16-byte header and float16 cells over a
float32 scale, so a cell keeps three digits over nine decades at half the bytes; NaN is a cell in which no query sees a key.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from headscope.app.exact import ExactHead
from headscope.app.runs import Run
from headscope.errors import RunError, refusal
from headscope.store.content import TILE

PLANES = {"mass": "block_mass", "max": "block_max"}
HEADER = struct.Struct("<4sBBHHHf")
MAGIC = b"HSTL"
STORED, EXACT, SHARE = 0, 1, 2
LARGEST_POOL = 8
"""The largest block that is pooled from exact cells: a screen of them is some 4,000 tokens, a second of work."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The levels of one head's map: `exact` blocks (empty where q and k were not kept), `stored` blocks, finest first."""

    tokens: int
    tile: int
    causal: bool
    exact: tuple[int, ...]
    stored: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """All blocks, finest first."""
        return (*self.exact, *self.stored)

    def cells(self, block: int) -> int:
        """Cells a side."""
        return -(-self.tokens // block)

    def tiles(self, block: int) -> int:
        """Tiles a side."""
        return -(-self.cells(block) // self.tile)

    def span(self, block: int, i: int) -> tuple[int, int]:
        """Token positions of tile row (or column) i."""
        side = block * self.tile
        return i * side, min((i + 1) * side, self.tokens)


def geometry(run: Run, layer: int) -> Geometry:
    """The levels that this layer's heads have. RunError for a run without maps."""
    info = run.maps
    if info is None:
        raise refusal(RunError, f"the maps of {run.id}", "this run was made without them", "profile again with maps=True")
    stored = tuple(info.block << level for level in range(len(info.sizes)))
    exact = tuple(block for block in (1, 2, 4, 8) if block < info.block and block <= LARGEST_POOL) if layer in run.kept_layers else ()
    return Geometry(info.tokens, info.tile or TILE, info.causal, exact, stored)


def check(shape: Geometry, plane: str, block: int, i: int, j: int) -> None:
    """RunError for a tile that there is not."""
    if plane not in PLANES:
        raise refusal(RunError, f"plane {plane[:20]!r}", "a cell shows its mass or its largest weight", "ask for mass or max")
    if block not in shape.blocks:
        listed = ", ".join(map(str, shape.blocks))
        raise refusal(RunError, f"cells of {block} tokens", f"this head has cells of {listed}", "ask for one of them")
    last = shape.tiles(block) - 1
    if not (0 <= i <= last and 0 <= j <= last):
        raise refusal(RunError, f"tile ({i}, {j})", f"there are the tiles 0..{last} a side", "ask for one of them")


def cells(run: Run, shape: Geometry, exact: ExactHead | None, layer: int, head: int, plane: str, block: int, i: int, j: int) -> np.ndarray:
    """One tile's cells [rows, columns] float32: mass per query of the block (a full row of the map adds up to 1) or the largest weight."""
    (q0, q1), (k0, k1) = shape.span(block, i), shape.span(block, j)
    rows, columns = -(-(q1 - q0) // block), -(-(k1 - k0) // block)
    first_query, first_key = q0 + np.arange(rows) * block, k0 + np.arange(columns) * block
    last_query = np.minimum(first_query + block, shape.tokens) - 1
    if shape.causal and k0 > last_query[-1]:
        return np.full((rows, columns), np.nan, dtype=np.float32)
    if block in shape.exact:
        if exact is None:
            raise refusal(RunError, "exact cells", "q and k of this layer were not kept", f"profile again with keep=({layer},)")
        values = exact.pooled(plane, block, q0, q1, k0, k1)
    else:
        values = run.tile(PLANES[plane], shape.stored.index(block), layer, head, i, j).copy()
        if plane == "mass":
            values /= (last_query - first_query + 1).astype(np.float32)[:, None]
    if shape.causal:
        values[first_key[None, :] > last_query[:, None]] = np.nan
    return values


def encode(values: np.ndarray, kind: int) -> bytes:
    """Header and cells: value = float16 * scale."""
    known = values[np.isfinite(values)]
    scale = float(known.max()) if known.size and known.max() > 0 else 1.0
    rows, columns = values.shape
    return HEADER.pack(MAGIC, 1, kind, 0, rows, columns, scale) + (values / np.float32(scale)).astype("<f2").tobytes()


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """(cells float32, kind): the inverse of `encode`, to three digits."""
    magic, version, kind, _, rows, columns, scale = HEADER.unpack_from(data)
    if magic != MAGIC or version != 1 or len(data) != HEADER.size + 2 * rows * columns:
        raise ValueError(f"{len(data)} bytes are no tile")
    values = np.frombuffer(data, dtype="<f2", offset=HEADER.size).reshape(rows, columns).astype(np.float32)
    return values * np.float32(scale), kind
