"""Patterns: which keys a query head may still see. The base, and those that are rules on positions alone; `dynamic` has the others.

A pattern is a small frozen value. A static one is a rule on positions alone: `visible(rows, keys)` says it for any rows and keys, which is
the specification that kernels, masks and densities are tested against. A dynamic one depends on the input; it names how its indices are
built (`rule`) and how many it keeps, and its density is an expectation that the plan can state, while its mask exists per input only.

Windows are stated once and for all: `window` w keeps the keys t - w + 1 .. t, the row's own included; `sink` k keeps the keys 0 .. k - 1.
Exporters convert to what another engine means by the same words. Every pattern keeps each row's own key, so that no row is ever empty; a
softmax over nothing is the NaN that sparse kernels are known for.

Positions are of the sequence without padding, 0 for its first token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.errors import PlanError, refusal

BLOCK = 128
"""Tokens a side of a tile, where a pattern or an engine counts in tiles."""
LARGEST = 2**31 - 1
"""The most that a pattern counts: products of two such numbers still fit in the int64 of positions."""


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of the patterns. `kind` is the name in JSON; `static` says whether the kept keys depend on positions alone."""

    kind: ClassVar[str]
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:  # noqa: B027 - a pattern without parameters has nothing to check
        """Raises PlanError for values that describe no pattern."""

    @abstractmethod
    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """rows [R], keys [K] int64 positions -> [R, K] bool, before causality. Dynamic patterns raise PlanError."""

    def fixed(self, length: int) -> Pattern:
        """The rule as it is for a text of `length` tokens: itself, unless it grows with the text."""
        return self

    def reach(self, low: int, high: int) -> Tensor:
        """Positions that some row of low..high may see, ascending, perhaps a few more; what a tile of rows must load."""
        keys = torch.arange(high + 1)
        return keys[self.visible(torch.arange(low, high + 1), keys).any(0)]

    @abstractmethod
    def kept(self, length: int) -> float:
        """Expected number of (row, key) entries that are computed in causal attention over `length` tokens."""

    @abstractmethod
    def cached(self, length: int) -> float:
        """Keys of one head that must stay in the cache after `length` tokens, for decoding to go on."""

    def density(self, length: int) -> float:
        """Kept share of the causal entries, 0 .. 1."""
        return self.kept(length) / (length * (length + 1) / 2)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, `kind` first."""
        return {"kind": self.kind, **asdict(self)}

    def _whole(self, lowest: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise refusal(PlanError, f"{self.kind} with {name}={value!r}", f"it counts tokens and is {lowest} or more", "correct it")
            if value > LARGEST:
                raise refusal(PlanError, f"{self.kind} with {name}={value}", f"it counts tokens, {LARGEST:,} at most", "use a smaller one")


@dataclass(frozen=True)
class Dense(Pattern):
    """Every key: attention as the model was trained."""

    kind = "dense"

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """All true."""
        return torch.ones(len(rows), len(keys), dtype=torch.bool)

    def kept(self, length: int) -> float:
        return length * (length + 1) / 2

    def cached(self, length: int) -> float:
        return length


@dataclass(frozen=True)
class Streaming(Pattern):
    """The first `sink` keys and the last `window` ones (StreamingLLM, arXiv:2309.17453; DuoAttention's streaming heads).

    With `compensate`, the keys dropped between them are one key more, their mean, that counts as many times as there are of them, with the
    mean of their values (RazorAttention, arXiv:2407.15891).
    """

    sink: int
    window: int
    compensate: bool = False
    kind = "streaming"

    def check(self) -> None:
        self._whole(0, "sink")
        self._whole(1, "window")

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """s < sink or t - s < window."""
        return (keys < self.sink)[None, :] | (rows[:, None] - keys[None, :] < self.window)

    def reach(self, low: int, high: int) -> Tensor:
        """The sink, and the windows of all rows: two ranges."""
        begin = max(0, low - self.window + 1)
        return torch.cat([torch.arange(min(self.sink, begin)), torch.arange(begin, high + 1)])

    def kept(self, length: int) -> float:
        full = min(length, self.sink + self.window)
        return full * (full + 1) / 2 + (length - full) * (self.sink + self.window + self.compensate)

    def cached(self, length: int) -> float:
        full = self.sink + self.window
        return length if length <= full else full + self.compensate  # the mean of what was dropped stays too


@dataclass(frozen=True)
class Span(Pattern):
    """A window that grows with the text, alpha + beta * N keys and `floor` at least, beside `sink` first ones (MoA's elastic spans,
    arXiv:2406.14909). N is the length of the whole text, so that every row has the same window. `compensate`: as in `Streaming`
    (RazorAttention's windows, of N / 5 and 4,000 at least, are such).
    """

    alpha: float
    beta: float
    sink: int = 64
    floor: int = 1
    compensate: bool = False
    kind = "span"

    def check(self) -> None:
        self._whole(0, "sink")
        self._whole(1, "floor")
        if not (0 <= self.beta <= 1 and abs(self.alpha) < 1e12) or self.alpha + self.beta * 1e9 < 1:
            raise refusal(
                PlanError, f"span alpha={self.alpha} beta={self.beta}", "its window would be empty", "use 0 <= beta <= 1, alpha >= 1 - beta"
            )

    def at(self, length: int) -> Streaming:
        """The window at one length; at least `floor`."""
        return Streaming(self.sink, min(length, max(self.floor, int(self.alpha + self.beta * length))), self.compensate)

    def fixed(self, length: int) -> Streaming:
        """The window at that length."""
        return self.at(length)

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """As `at(length).visible`, where the last row is the end of the text. Kernels, which go tile by tile, ask `fixed` first."""
        return self.at(int(rows.max()) + 1 if len(rows) else 1).visible(rows, keys)

    def kept(self, length: int) -> float:
        return self.at(length).kept(length)

    def cached(self, length: int) -> float:
        return self.at(length).cached(length)


@dataclass(frozen=True)
class Strided(Pattern):
    """The last `window` keys and every `stride`-th tile of `block` tokens before, beginning at tile `offset`; heads with different offsets
    share out the text between them (S2-Attention, arXiv:2407.17678).
    """

    window: int
    stride: int
    offset: int = 0
    block: int = BLOCK
    sink: int = 0
    kind = "strided"

    def check(self) -> None:
        self._whole(1, "window", "stride", "block")
        self._whole(0, "offset", "sink")
        if self.offset >= self.stride:
            raise refusal(
                PlanError, f"strided offset={self.offset}", f"tiles are counted modulo stride={self.stride}", "use a smaller offset"
            )

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """t - s < window, or s < sink, or tile(s) mod stride == offset."""
        always = (keys < self.sink) | ((keys // self.block) % self.stride == self.offset)
        return always[None, :] | (rows[:, None] - keys[None, :] < self.window)

    def kept(self, length: int) -> float:
        behind, sink, starts, size = self._behind(length)  # key s lies behind the window of behind - s rows
        tiles = size * (behind - starts) - size * (size - 1) // 2
        return _triangle(length, self.window) + float(tiles.sum()) + sink * behind - sink * (sink - 1) / 2

    def cached(self, length: int) -> float:
        _, sink, _, size = self._behind(length)
        return float(min(length, self.window) + sink + size.sum())

    def _behind(self, length: int) -> tuple[int, int, Tensor, Tensor]:
        """Of what lies behind the last row's window: how many keys, how many of them in the sink, and the kept tiles' first keys and sizes
        without the sink. Tile by tile: a text of 100 million tokens must not cost as much memory.
        """
        behind, first = max(0, length - self.window), self.offset * self.block
        sink = min(self.sink, behind)
        starts = torch.arange(first, max(behind, first), self.stride * self.block)
        ends = (starts + self.block).clamp(max=behind)
        starts = starts.clamp(min=sink)
        return behind, sink, starts, (ends - starts).clamp(min=0)


@dataclass(frozen=True)
class Power(Pattern):
    """The last `window` keys and the tiles whose distance in tiles is a power of two (PowerAttention, arXiv:2503.03588): d layers see 2^d
    tiles back.
    """

    window: int
    block: int = BLOCK
    sink: int = 0
    kind = "power"

    def check(self) -> None:
        self._whole(1, "window", "block")
        self._whole(0, "sink")

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """t - s < window, or s < sink, or tile(t) - tile(s) in {1, 2, 4, ...}."""
        gap = rows[:, None] // self.block - keys[None, :] // self.block
        power = (gap > 0) & ((gap & (gap - 1)) == 0)
        return power | (keys < self.sink)[None, :] | (rows[:, None] - keys[None, :] < self.window)

    def kept(self, length: int) -> float:
        rows = torch.arange(length)
        tile, behind = rows // self.block, rows - self.window + 1  # keys 0 .. behind - 1 lie behind the window
        total = torch.zeros(length, dtype=torch.int64)

        def add(start: Tensor, end: Tensor, wanted: Tensor) -> None:
            nonlocal total
            total = total + (torch.minimum(end, behind) - start).clamp(min=0) * wanted

        step = 1
        while step <= int(tile[-1]):
            add((tile - step) * self.block, (tile - step + 1) * self.block, tile >= step)
            step *= 2
        for first in range(-(-self.sink // self.block)):
            gap = tile - first
            listed = (gap > 0) & ((gap & (gap - 1)) == 0)
            begin = torch.full_like(tile, first * self.block)
            add(begin, torch.full_like(tile, min(self.sink, (first + 1) * self.block)), ~listed)
        return _triangle(length, self.window) + float(total.sum())

    def cached(self, length: int) -> float:
        return length  # which tile is at a power of two changes with every tile, so all must stay


@dataclass(frozen=True)
class Lines(Pattern):
    """Fixed columns and fixed diagonals: keys at `columns`, and keys `diagonals` tokens back; the row's own key always."""

    columns: tuple[int, ...] = ()
    diagonals: tuple[int, ...] = (0,)
    kind = "lines"

    def check(self) -> None:
        for name in ("columns", "diagonals"):
            given = tuple(getattr(self, name))
            if list(given) != sorted(set(given)) or any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in given):
                raise refusal(
                    PlanError, f"lines with {name} {given[:6]}", "they are distinct, ascending and 0 or more", f"pass sorted({name})"
                )
            object.__setattr__(self, name, given)

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """s in columns, or t - s in diagonals, or s = t."""
        back = rows[:, None] - keys[None, :]
        diagonal = torch.isin(back, torch.tensor([0, *self.diagonals]))
        return torch.isin(keys, torch.tensor(self.columns, dtype=torch.int64))[None, :] | diagonal

    def kept(self, length: int) -> float:
        columns = torch.tensor([one for one in self.columns if one < length], dtype=torch.int64)
        diagonals = torch.tensor(sorted({0, *(one for one in self.diagonals if one < length)}), dtype=torch.int64)
        both = torch.searchsorted(diagonals, length - columns)  # diagonals that a column meets within the text
        return float((length - columns).sum() + (length - diagonals).sum() - both.sum())

    def cached(self, length: int) -> float:
        inside = {one for one in self.columns if one < length}
        reach = max(self.diagonals, default=0) + 1
        return len(inside | set(range(max(0, length - reach), length)))


@dataclass(frozen=True)
class Blocks(Pattern):
    """Tiles by list: row tile i sees the key tiles `kept_blocks[i]`; row tiles past the list see what its last entry saw, shifted along the
    diagonal. The diagonal tile is always kept.
    """

    kept_blocks: tuple[tuple[int, ...], ...]
    block: int = BLOCK
    kind = "blocks"

    def check(self) -> None:
        self._whole(1, "block")
        if not self.kept_blocks:
            raise refusal(PlanError, "blocks without a row", "there is nothing to keep", "list the key tiles of each row tile")
        cleaned = []
        for row, listed in enumerate(self.kept_blocks):
            given = tuple(listed)
            if any(isinstance(one, bool) or not isinstance(one, int) for one in given) or list(given) != sorted(set(given)):
                raise refusal(
                    PlanError, f"key tiles {given[:6]} of row tile {row}", "they are distinct and ascending", "pass sorted(set(...))"
                )
            if given and (given[0] < 0 or given[-1] > row):
                raise refusal(
                    PlanError, f"key tiles {given[:6]} of row tile {row}", f"causal rows see tiles 0..{row}", "leave the others out"
                )
            cleaned.append(given)
        object.__setattr__(self, "kept_blocks", tuple(cleaned))

    def row(self, tile: int) -> tuple[int, ...]:
        """The key tiles of a row tile, ascending, the diagonal one included."""
        last, tile = len(self.kept_blocks) - 1, max(0, tile)
        listed = self.kept_blocks[min(tile, last)]
        shifted = tuple(one + max(0, tile - last) for one in listed) if tile > last else listed
        return tuple(sorted({*shifted, tile}))

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """tile(s) in row(tile(t))."""
        out = torch.zeros(len(rows), len(keys), dtype=torch.bool)
        tiles = rows // self.block
        for tile in tiles.unique().tolist():
            out[tiles == tile] = torch.isin(keys // self.block, torch.tensor(self.row(tile)))
        return out

    def kept(self, length: int) -> float:
        size, total = self.block, 0.0
        for tile in range(-(-length // size)):
            height = min(size, length - tile * size)
            total += height * size * (len(self.row(tile)) - 1) + height * (height + 1) / 2
        return total

    def cached(self, length: int) -> float:
        return length


def _triangle(length: int, window: int) -> float:
    """Causal entries of a window."""
    full = min(length, window)
    return full * (full + 1) / 2 + (length - full) * window
