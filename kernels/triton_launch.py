"""Launch parameters of the Triton kernels: one table, keyed on compute capability and Triton version, never on a GPU's name.

Found by a sweep over tile shapes, warps and stages (`headscope.bench.capture_gpu.tune`); a capability that nobody has measured gets the
small, safe tiles. A name in a product list says nothing about a card that came later, a capability does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from headscope.kernels.triton_common import INTERPRETED


class Tile(NamedTuple):
    """How a kernel is launched: query rows by keys per tile, warps and software-pipelining stages, tensor descriptors or pointers."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2
    descriptors: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class _Row(NamedTuple):
    """One line of the table: the first line that fits is used. `capability` is the least (major, minor), `width` the largest head_dim."""

    kernel: str
    capability: tuple[int, int]
    triton: tuple[int, int]
    half: bool
    width: int
    tile: Tile


_TABLE = (
    _Row("out", (9, 0), (3, 4), True, 128, Tile(128, 128, 8, 3, True)),
    _Row("out", (9, 0), (3, 4), True, 256, Tile(128, 64, 8, 2, True)),
    _Row("rows", (9, 0), (3, 4), True, 128, Tile(64, 128, 4, 3, True)),
    _Row("rows", (9, 0), (3, 4), True, 256, Tile(128, 64, 8, 2, True)),
    _Row("columns", (9, 0), (3, 4), True, 128, Tile(128, 128, 4, 2, True)),
    _Row("columns", (9, 0), (3, 4), True, 256, Tile(64, 128, 8, 2, True)),
    _Row("sparse", (9, 0), (3, 4), True, 128, Tile(128, 64, 8, 3)),
    _Row("", (8, 0), (3, 0), True, 128, Tile(64, 64, 4, 2)),
    _Row("", (8, 0), (3, 0), True, 256, Tile(64, 32, 4, 2)),
    _Row("", (0, 0), (3, 0), False, 64, Tile(64, 64, 8, 1)),
    _Row("", (0, 0), (3, 0), False, 128, Tile(32, 64, 4, 1)),
    _Row("", (0, 0), (3, 0), False, 256, Tile(32, 32, 4, 1)),
    _Row("", (0, 0), (3, 0), True, 256, Tile(32, 32, 4, 1)),
)

_forced: dict[str, Tile] = {}


def tile_for(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> Tile:
    """The tile of "rows", "out" (rows with the attention output), "columns" or "sparse" (prefill) for a head_dim."""
    if kernel in _forced:
        return _forced[kernel]
    if INTERPRETED:
        return Tile(64, 64)
    capability, version = torch.cuda.get_device_capability(device), triton_version()
    half = dtype in {torch.bfloat16, torch.float16}
    for row in _TABLE:
        runs = capability >= row.capability and version >= row.triton
        if row.kernel in {kernel, ""} and runs and half == row.half and width <= row.width:
            return row.tile
    return Tile(32, 32, 4, 1)


@contextmanager
def use_tile(kernel: str, tile: Tile) -> Iterator[None]:
    """Within the block, launches a kernel with these parameters: for tests and for tuning."""
    before = _forced.get(kernel)
    _forced[kernel] = tile
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton."""
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 4 under the interpreter, so that splitting is exercised there too."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
