"""One tile of the blocked kernel: unnormalised weights of a few heads' query rows against every key they can see.

Rows follow one another in memory with `left` and `right` columns of zeros between them where an accumulator needs them, so that diagonals
are plain strided views (`diagonal`). The memory is allocated once per call and reused by every tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class Tile:
    """Heads by R rows by n keys; a head is one of B * Hq, and the tile's are those of whole streams, `heads` among them all.

    - `b`: batch element, None when there are several in the tile and nothing differs between them.
    - `rows`: the tile's rows among the call's padded rows; `start`: absolute position of the first, `first_key` of the first column.
    - `store` [heads * R, left + n + right] and `e` [heads, R, n], its inner part: exp(score - row maximum), 0 where hidden.
    - `maxima` [heads, R, n / unit]: largest score per key block; `m` [heads, R, 1]: row maximum, made finite.
    - `f` [heads, R]: 1 / normaliser, 0 on rows that see no key; `w`: the same, 0 on rows that do not count.
    """

    heads: slice
    b: int | None
    rows: slice
    start: int
    first_key: int
    n: int
    left: int
    right: int
    store: Tensor
    e: Tensor
    maxima: Tensor
    m: Tensor
    f: Tensor
    w: Tensor

    @property
    def stride(self) -> int:
        """Numbers from one row to the next."""
        return self.left + self.n + self.right

    def matrices(self, rows: int) -> Tensor:
        """e as matrices of `rows` rows, [heads * R / rows, rows, n]."""
        return self.store.view(-1, rows, self.stride)[..., self.left : self.left + self.n]

    def diagonal(self, first: int, width: int) -> Tensor:
        """View [heads, R, width] of e: entry [., r, j] is the key at (row's position) + first + j. Must lie within the margins."""
        heads, size, _ = self.e.shape
        begin = self.store.storage_offset() + self.left + self.start + first - self.first_key
        return self.store.as_strided((heads, size, width), (size * self.stride, self.stride + 1, 1), begin)
