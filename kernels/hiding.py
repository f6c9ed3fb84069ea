"""What the keys of a tile hide from its rows, as a few rectangles instead of one mask over everything.

In a causal prefill only the tile on the diagonal hides anything, so a mask over all keys would be a wasted pass over memory. Each fact of
`MaskFacts` becomes rectangles (rows, columns, mask) of the tile; facts that hide nothing there give none. Hidden scores are set to -inf
before the row maximum and their weights to 0 after the exponential; where padding is hidden this is by assignment, so that whatever a
padded key holds, NaN included, goes nowhere.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.geometry import Geometry, Span

HIDING_BIAS = -1e30
"""A bias at or below this hides its key: hosts write "not visible" as -inf or as the lowest number of their dtype."""


class Patch(NamedTuple):
    """Rows [top, bottom) and columns [begin, end) of a tile, and what is hidden there, for scores and for weights.

    Either both are one bool mask [1 or heads, rows or 1, columns or 1], True for hidden, to be assigned by; or `hide` is 0 and -inf to add
    to scores and `keep` 1 and 0 to multiply weights with, which is twice as fast and as good for keys that are real tokens.
    """

    top: int
    bottom: int
    begin: int
    end: int
    hide: Tensor
    keep: Tensor


class Hiding:
    """Patches of any tile of a call. Masks that depend only on t - s are made once and reused along the diagonal."""

    def __init__(self, call: AttentionCall, geometry: Geometry) -> None:
        self.mask = call.mask
        self.geometry = geometry
        self._all = torch.ones(1, 1, 1, dtype=torch.bool, device=geometry.device)
        self._edges: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}

    @property
    def explicit(self) -> bool:
        """True when segments, an explicit mask or a bias may hide keys anywhere."""
        return self.mask.allowed is not None or self.mask.bias is not None or self.mask.query_segments is not None

    def patches(self, tile: int, first_key: int, count: int, span: Span, b: int, heads: slice) -> list[Patch]:
        """For the rows of a tile and keys first_key .. first_key + count of batch element b; `heads` are its query heads in the tile."""
        g = self.geometry
        start, size = g.tile_start(tile), g.tile_rows
        low, high = span.begin + g.k0 - first_key, span.end + g.k0 - first_key
        out: list[Patch] = []
        if low > 0:
            out.append(Patch(0, size, 0, low, self._all, self._all))
        if high < count:
            out.append(Patch(0, size, high, count, self._all, self._all))
        if g.causal:
            out += self._beyond(start, first_key, low, high, 1)
        if g.window is not None:
            out += self._before(start, first_key, low, high, g.window)
            if not g.causal:
                out += self._beyond(start, first_key, low, high, g.window)
        if self.explicit or self.mask.key_valid is not None:
            out += self._explicit(tile, low, high, span, b, heads)
        return out

    def _beyond(self, start: int, first_key: int, low: int, high: int, ahead: int) -> list[Patch]:
        """Hides s >= t + ahead."""
        size = self.geometry.tile_rows
        begin = min(max(start + ahead - first_key, low), high)
        return [Patch(0, size, begin, high, *self._edge(first_key + begin - start - ahead, high - begin, True))] if begin < high else []

    def _before(self, start: int, first_key: int, low: int, high: int, window: int) -> list[Patch]:
        """Hides s <= t - window."""
        size = self.geometry.tile_rows
        end = max(min(start + size - window - first_key, high), low)
        return [Patch(0, size, low, end, *self._edge(first_key + low - start + window, end - low, False))] if low < end else []

    def _edge(self, shift: int, columns: int, beyond: bool) -> tuple[Tensor, Tensor]:
        """`hide` and `keep` [R, columns] that hide column + shift >= row (beyond), or column + shift <= row."""
        key = (shift, columns, beyond)
        if key not in self._edges:
            g = self.geometry
            row = torch.arange(g.tile_rows, device=g.device)[:, None]
            column = torch.arange(columns, device=g.device) + shift
            hidden = column >= row if beyond else column <= row
            zero = torch.zeros(hidden.shape, dtype=g.dtype, device=g.device)
            self._edges[key] = (zero.masked_fill(hidden, -math.inf), (~hidden).to(g.dtype))
        return self._edges[key]

    def _explicit(self, tile: int, low: int, high: int, span: Span, b: int, heads: slice) -> list[Patch]:
        g, mask = self.geometry, self.mask
        top, bottom = g.own_rows(tile)
        first = g.tile_start(tile) + top - g.q0
        rows, keys = slice(first, first + bottom - top), slice(span.begin, span.end)
        hidden: Tensor | None = None

        def hide(more: Tensor) -> None:
            nonlocal hidden
            hidden = more if hidden is None else hidden | more

        if mask.key_valid is not None:
            valid = mask.key_valid[b, keys]
            if not bool(valid.all()):
                hide(~valid[None, None, :])
        if mask.query_segments is not None and mask.key_segments is not None:
            hide((mask.query_segments[b, rows][:, None] != mask.key_segments[b, keys][None, :])[None])
        if mask.allowed is not None:
            hide(~self.of_heads(mask.allowed, b, heads)[..., rows, keys])
        if mask.bias is not None:
            hide(self.of_heads(mask.bias, b, heads)[..., rows, keys] <= HIDING_BIAS)
        return [] if hidden is None else [Patch(top, bottom, low, high, hidden, hidden)]

    def of_heads(self, values: Tensor, b: int, heads: slice) -> Tensor:
        """[B or 1, Hq or 1, Nq, Nk] -> [1 or heads, Nq, Nk] of one batch element."""
        mine = values[b if values.shape[0] > 1 else 0]
        return mine if mine.shape[0] == 1 else mine[heads]
