"""How a freeing cache holds the keys of some key heads: all of them, a ring of the newest beside the first, or chosen ones and a tail.

Each part owns its memory, so that what it drops is really gone, and grows by a hundred and twenty-eighth of its size, so that it reserves
little. Keys are stored as they came (rotated for their absolute positions); a part knows which position lies at which of its places, and
says it in the terms of the decode kernels (`place_rule`).

Positions here are absolute, as in the padded batch; `starts` [B] is where each text begins, None for 0. A ring counts from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.plans.compensation import Sums

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.plans.patterns import Pattern


def room_for(count: int) -> int:
    """Places for `count` keys: a hundred and twenty-eighth more, and at least 8, so that growing is rare."""
    return count + max(8, count // 128)


@dataclass(eq=False)
class Part(ABC):
    """Keys of the key heads `heads`; `k` [B, h, places, D], `v` [B, h, places, Dv], None before the first keys."""

    heads: tuple[int, ...]
    k: Tensor | None = None
    v: Tensor | None = None

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """Keys k [B, h, n, D] and values [B, h, n, Dv] of the positions from `length` on."""

    @abstractmethod
    def place_rule(self) -> tuple[int, int, int]:
        """(fixed, ring, shift) of `sparse_decode_host.Places`."""

    @property
    def bytes(self) -> int:
        """Bytes of memory held, room included."""
        return sum(0 if x is None else x.untyped_storage().nbytes() for x in (self.k, self.v))

    def select(self, index: Tensor) -> None:
        """Keep (or repeat) sequences by number."""
        if self.k is not None and self.v is not None:
            self.k, self.v = (x.index_select(0, index.to(x.device)) for x in (self.k, self.v))

    def grown(self, places: int, k: Tensor, v: Tensor) -> None:
        """Make room for at least `places` keys; the first ones stay where they are."""
        if self.k is not None and self.v is not None and self.k.shape[2] >= places:
            return
        new = [x.new_empty(x.shape[0], len(self.heads), room_for(places), x.shape[3]) for x in (k, v)]
        for to, old in zip(new, (self.k, self.v), strict=True):
            if old is not None:
                to[:, :, : old.shape[2]] = old
        self.k, self.v = new


@dataclass(eq=False)
class Full(Part):
    """Every key, at its position."""

    def append(self, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """Keys of the positions from `length` on."""
        end = length + k.shape[2]
        self.grown(end, k, v)
        assert self.k is not None
        assert self.v is not None
        self.k[:, :, length:end] = k
        self.v[:, :, length:end] = v

    def place_rule(self) -> tuple[int, int, int]:
        """(fixed, ring, shift) of `sparse_decode_host.Places`."""
        return 0, 0, 0


@dataclass(eq=False)
class Ring(Part):
    """The first `sink` keys of each text and the newest `size`; `windows`: the patterns whose windows it must hold. `sums`: of what each of
    them that compensates for it has dropped.
    """

    sink: int = 0
    windows: tuple[Pattern, ...] = ()
    limit: int | None = None
    size: int = 0
    sums: tuple[Sums, ...] = ()

    def window(self, length: int) -> int:
        """Keys that a row at the end of `length` tokens may look back, its own included."""
        widest = max(int(getattr(one.fixed(max(1, length)), "window", length)) for one in self.windows)
        return widest if self.limit is None else min(widest, self.limit)

    def append(self, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """Keys of the positions from `length` on; what no later row can see is overwritten."""
        count = k.shape[2]
        for sums in self.sums:
            self._note(sums, k, v, length, starts)
        self._fit(self.window(length + count), k, v, length, starts)
        assert self.k is not None
        assert self.v is not None
        first = max(0, count - self.size)
        away = torch.arange(length, length + count, device=k.device)
        if starts is None:
            keep = (away < self.sink) | (torch.arange(count, device=k.device) >= first)
            for to, new in ((self.k, k), (self.v, v)):
                to.index_copy_(2, self.places(away[keep]), new[:, :, keep])
            return
        away = away[None] - starts[:, None].to(k.device)
        lost = (away < 0) | ((away >= self.sink) & (torch.arange(count, device=k.device) < first))
        index = self.places(away).masked_fill(lost, self.sink + self.size)[:, None, :, None]
        for to, new in ((self.k, k), (self.v, v)):
            to.scatter_(2, index.expand(-1, new.shape[1], -1, new.shape[3]), new)

    def _note(self, sums: Sums, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """Adds what no row behind these keys sees any more, while the ring still has it."""
        sums.begin(starts)
        end = length + k.shape[2]
        low, high = sums.due(end)
        if low < min(high, length) and self.k is not None and self.v is not None:
            begin = torch.zeros(1, 1, dtype=torch.int64, device=k.device) if starts is None else starts.to(k.device)[:, None]
            away = (torch.arange(low, min(high, length), device=k.device)[None] - begin).expand(k.shape[0], -1)
            index = self.places(away.clamp(min=0))[:, None, :, None]
            old = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.k, self.v)]
            sums.add(old[0], old[1], low, end)
        low = max(low, length)
        if high > low or sums.k is None:
            fresh = slice(low - length, max(high, low) - length)
            sums.add(k[:, :, fresh], v[:, :, fresh], low, end)

    def select(self, index: Tensor) -> None:
        """Keep (or repeat) sequences by number."""
        super().select(index)
        for sums in self.sums:
            sums.select(index)

    def places(self, away: Tensor) -> Tensor:
        """Places of keys by distance from the start of their text."""
        return torch.where(away < self.sink, away, self.sink + (away - self.sink) % max(1, self.size))

    def _fit(self, window: int, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """A ring of at least `window` places; a span that grew is unrolled into a larger ring."""
        if self.k is not None and self.size >= window:
            return
        old_k, old_v, old_size = self.k, self.v, self.size
        fixed = all(one.fixed(1 << 20) == one for one in self.windows) or self.limit is not None
        size = window if fixed else room_for(window)
        new = [x.new_zeros(x.shape[0], len(self.heads), self.sink + size + 1, x.shape[3]) for x in (k, v)]  # one place for what is lost
        if old_k is not None and old_v is not None:
            begin = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device) if starts is None else starts.to(k.device)
            held = min(old_size + self.sink, length)
            away = (torch.arange(length - held, length, device=k.device)[None] - begin[:, None]).clamp(min=0)
            away = torch.cat([torch.arange(self.sink, device=k.device).expand(len(begin), -1), away], 1)
            gone = away < (length - begin)[:, None] - old_size
            source = self.places(away)
            self.size = size
            target = self.places(away).masked_fill(gone & (away >= self.sink), self.sink + size)
            for to, old in zip(new, (old_k, old_v), strict=True):
                wide = (-1, len(self.heads), -1, old.shape[3])
                to.scatter_(2, target[:, None, :, None].expand(*wide), old.gather(2, source[:, None, :, None].expand(*wide)))
        self.size = size
        self.k, self.v = new

    def place_rule(self) -> tuple[int, int, int]:
        """(fixed, ring, shift)."""
        return self.sink, self.size, 0


@dataclass(eq=False)
class Kept(Part):
    """Chosen keys of one key head at the first `count` places, and every key from position `since` on behind them.

    `bits` [B, count] int32: which heads of the group see them, 0 where a sequence has fewer; `tails`: query head -> position from which its
    budget keeps every key.
    """

    since: int = 0
    count: int = 0
    bits: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int32))
    tails: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, part: Full, head: int, chosen: Tensor, bits: Tensor, since: int, length: int) -> Kept:
        """What stays of one key head of a full part: the keys at positions `chosen` [B, count] int64 (-1: none) and from `since` on."""
        assert part.k is not None
        assert part.v is not None
        at = part.heads.index(head)
        made = cls((head,), None, None, since, chosen.shape[1], bits)
        index = chosen.clamp(min=0)[:, None, :, None]
        kept = []
        for x in (part.k, part.v):
            one = x[:, at : at + 1]
            new = x.new_zeros(x.shape[0], 1, room_for(made.count + length - since), x.shape[3])
            new[:, :, : made.count] = one.gather(2, index.expand(-1, 1, -1, x.shape[3]))
            new[:, :, made.count : made.count + length - since] = one[:, :, since:length]
            kept.append(new)
        made.k, made.v = kept
        return made

    def append(self, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """Keys of the positions from `length` on."""
        at = self.count + length - self.since
        self.grown(at + k.shape[2], k, v)
        assert self.k is not None
        assert self.v is not None
        self.k[:, :, at : at + k.shape[2]] = k
        self.v[:, :, at : at + k.shape[2]] = v

    def place_rule(self) -> tuple[int, int, int]:
        """(fixed, ring, shift): lists of this head name places."""
        return -1, 0, self.count - self.since

    def select(self, index: Tensor) -> None:
        """Keep (or repeat) sequences by number."""
        super().select(index)
        self.bits = self.bits.index_select(0, index.to(self.bits.device))
