"""One tile of the blocked kernel: scores and unnormalised weights of a few heads' query rows against every key they can see.

`x` holds scores, then scores minus the row maximum, then their product with `e`; `e` holds exp(score - row maximum). Both live in buffers that
are allocated once per call and reused by every tile. A row is followed in memory by the next one, with `left` and `right` columns of
zeros where an accumulator needs them, so that diagonals are plain strided views (`diagonal`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.kernels.geometry import Span
    from headscope.kernels.hiding import Patch


@dataclass(slots=True, eq=False)
class Tile:
    """Streams [s0, s1) (of batch element b, or of several when `b` is None) by R rows by n keys.

    - `number`: of the tile along the rows; `start`: absolute position of its first row, `first_key` of its first column.
    - `x`, `e` [streams, G, R, n]; `maxima` [streams, G, R, n / unit]: largest score per key block; `m` [streams, G, R, 1]: row maximum, finite.
    - `f` [streams, G, R]: 1 / normaliser, 0 on rows that see no key; `w`: the same, 0 on rows that do not count.
    """

    number: int
    s0: int
    s1: int
    b: int | None
    start: int
    first_key: int
    n: int
    span: Span
    left: int
    right: int
    patches: list[Patch]
    x_store: Tensor
    e_store: Tensor
    x: Tensor
    e: Tensor
    unit: int
    maxima: Tensor | None = None
    m: Tensor | None = None
    f: Tensor | None = None
    w: Tensor | None = None

    @property
    def stride(self) -> int:
        """Numbers from one row to the next."""
        return self.left + self.n + self.right

    @property
    def shape(self) -> tuple[int, int, int]:
        """(streams, G, R)."""
        return self.x.shape[0], self.x.shape[1], self.x.shape[2]

    @property
    def rows(self) -> slice:
        """The tile's rows among the padded rows of the call."""
        size = self.x.shape[2]
        return slice(self.number * size, (self.number + 1) * size)

    def matrices(self, rows: int) -> Tensor:
        """e as matrices of `rows` rows, [streams * G * R / rows, rows, n]."""
        total = self.e_store.shape[0]
        return self.e_store.view(total // rows, rows, self.stride)[..., self.left : self.left + self.n]

    def diagonal(self, first: int, width: int) -> Tensor:
        """View [streams * G, R, width] of e: entry [., r, j] is the key at (row's position) + first + j. Must lie within the padding."""
        streams, group, size = self.shape
        begin = self.left + self.start + first - self.first_key
        step = size * self.stride
        return self.e_store.as_strided((streams * group, size, width), (step, self.stride + 1, 1), begin)


def tile_of(buffers: tuple[Tensor, Tensor], shape: tuple[int, int, int], left: int, n: int, right: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_store, e_store, x, e) of a tile: the flat buffers as [streams * G * R, left + n + right] and their inner [streams, G, R, n]."""
    streams, group, size = shape
    rows, stride = streams * group * size, left + n + right
    x_store, e_store = (buffer[: rows * stride].view(rows, stride) for buffer in buffers)
    x, e = (store.view(streams, group, size, stride)[..., left : left + n] for store in (x_store, e_store))
    if left:
        e_store[:, :left].zero_()
    if right:
        e_store[:, left + n :].zero_()
    return x_store, e_store, x, e
