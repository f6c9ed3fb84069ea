"""What the keys of a tile hide from its rows, as a few rectangles instead of one mask over everything.

In a causal prefill only the tile on the diagonal hides anything, so a mask over all keys would be a wasted pass over memory. Each fact of
`MaskFacts` becomes rectangles (rows, columns, mask) of the tile; facts that hide nothing there give none. Hidden scores are set to -inf before
the row maximum and their weights to 0 after the exponential, both by assignment, so that whatever a padded key holds, NaN included,
goes nowhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.kernels.geometry import Geometry, Span

HIDING_BIAS = -1e30
"""A bias at or below this hides its key: hosts write "not visible" as -inf or as the lowest number of their dtype."""


class Patch(NamedTuple):
    """Columns [begin, end) of rows [top, bottom) of a tile; `mask` broadcasts to [streams, G, bottom - top, end - begin], None hides all."""

    top: int
    bottom: int
    begin: int
    end: int
    mask: Tensor | None

    def fill(self, tile: Tensor, value: float) -> None:
        """Assign a value to what is hidden in a tile [streams, G, R, n]."""
        part = tile[:, :, self.top : self.bottom, self.begin : self.end]
        if self.mask is None:
            part.fill_(value)
        else:
            part.masked_fill_(self.mask, value)


class Hiding:
    """Patches of any tile of a call. Masks that depend only on t - s are made once and reused along the diagonal."""

    def __init__(self, call: AttentionCall, geometry: Geometry) -> None:
        self.mask = call.mask
        self.geometry = geometry
        self._edges: dict[tuple[int, int, bool], Tensor] = {}

    @property
    def explicit(self) -> bool:
        """True when segments, an explicit mask or a bias may hide keys anywhere."""
        return self.mask.allowed is not None or self.mask.bias is not None or self.mask.query_segments is not None

    def patches(self, tile: int, first_key: int, count: int, span: Span, b: int, heads: slice) -> list[Patch]:
        """For the rows of a tile and keys first_key .. first_key + count of batch element b; `heads` are its key heads in the tile."""
        g = self.geometry
        start, size = g.tile_start(tile), g.tile_rows
        low, high = span.begin + g.k0 - first_key, span.end + g.k0 - first_key
        out: list[Patch] = []
        if low > 0:
            out.append(Patch(0, size, 0, low, None))
        if high < count:
            out.append(Patch(0, size, high, count, None))
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
        return [Patch(0, size, begin, high, self._edge(first_key + begin - start - ahead, high - begin, True))] if begin < high else []

    def _before(self, start: int, first_key: int, low: int, high: int, window: int) -> list[Patch]:
        """Hides s <= t - window."""
        size = self.geometry.tile_rows
        end = max(min(start + size - window - first_key, high), low)
        return [Patch(0, size, low, end, self._edge(first_key + low - start + window, end - low, False))] if low < end else []

    def _edge(self, shift: int, columns: int, beyond: bool) -> Tensor:
        """[R, columns] bool: column + shift >= row (beyond), or column + shift <= row."""
        key = (shift, columns, beyond)
        if key not in self._edges:
            row = torch.arange(self.geometry.tile_rows, device=self.geometry.device)[:, None]
            column = torch.arange(columns, device=self.geometry.device)[None, :] + shift
            self._edges[key] = column >= row if beyond else column <= row
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
                hide(~valid[None, None, None, :])
        if mask.query_segments is not None and mask.key_segments is not None:
            hide((mask.query_segments[b, rows][:, None] != mask.key_segments[b, keys][None, :])[None, None])
        if mask.allowed is not None:
            hide(~self.of_streams(mask.allowed, b, heads)[..., rows, keys])
        if mask.bias is not None:
            hide(self.of_streams(mask.bias, b, heads)[..., rows, keys] <= HIDING_BIAS)
        return [] if hidden is None else [Patch(top, bottom, low, high, hidden)]

    def of_streams(self, values: Tensor, b: int, heads: slice) -> Tensor:
        """[B or 1, Hq or 1, Nq, Nk] -> [streams or 1, G or 1, Nq, Nk] of one batch element's key heads."""
        mine = values[b if values.shape[0] > 1 else 0]
        if mine.shape[0] == 1:
            return mine[None]
        return mine.unflatten(0, (self.geometry.kv_heads, self.geometry.group))[heads]
