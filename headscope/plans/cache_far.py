"""A part of a freeing cache for heads that come back to some far keys and never to the others: strided tiles, fixed columns, diagonals.

The newest keys lie in a ring as long as the farthest look back; what leaves it is kept only where some head's rule names its position for
good (a first key, a column, a tile of a stride). Which heads see a kept key is a bit each, worked out per step from positions, since a key
in a head's window is counted there and not once more in its list.

Positions are those of texts that begin at 0; a padded batch keeps every key instead, for there the same tile lies elsewhere in each text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.plans.cache_parts import Part
from headscope.plans.patterns import Lines, Pattern, Streaming, Strided

if TYPE_CHECKING:
    from torch import Tensor

WORTH = 0.9
"""Share of far keys from which keeping all is simpler and hardly larger."""
_LOOKED = 1 << 16


def for_good(pattern: Pattern, positions: Tensor) -> Tensor:
    """[n] bool: which positions every later row sees."""
    if isinstance(pattern, Strided):
        return (positions < pattern.sink) | ((positions // pattern.block) % pattern.stride == pattern.offset)
    if isinstance(pattern, Lines):
        return torch.isin(positions, torch.tensor(pattern.columns, dtype=torch.int64))
    return positions < pattern.sink if isinstance(pattern, Streaming) else torch.ones_like(positions, dtype=torch.bool)


def reach(pattern: Pattern) -> int:
    """Keys that a row looks back over, its own included, beside those kept for good."""
    if isinstance(pattern, Lines):
        return max(pattern.diagonals, default=0) + 1
    return int(getattr(pattern, "window", 1))


def can_free(patterns: Sequence[Pattern]) -> bool:
    """Whether a group of these patterns drops keys in such a part."""
    if not all(isinstance(one, Strided | Lines) or (isinstance(one, Streaming) and not one.compensate) for one in patterns):
        return False
    positions = torch.arange(_LOOKED)
    kept = torch.stack([for_good(one, positions) for one in dict.fromkeys(patterns)]).any(0)
    return float(kept.float().mean()) < WORTH


@dataclass(eq=False)
class Far(Part):
    """`patterns`: of each query head of a group. Position p lies in the ring at place (p + 1) % `size`; what left the ring behind it.

    `where` [n] int32 the positions kept for good, ascending, on the device; `member` [n] int32: bit h where head h is one that keeps it;
    `stored`: how many of them have left the ring.
    """

    patterns: tuple[Pattern, ...] = ()
    size: int = 0
    where: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    member: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    stored: int = 0
    length: int = 0
    _windows: Tensor | None = None
    _diagonals: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.size = max(reach(one) for one in self.patterns)

    @property
    def windows(self) -> list[int]:
        """Keys of each head's last ones that a range says: lists have the rest of what `Lines` sees."""
        return [1 if isinstance(one, Lines) else reach(one) for one in self.patterns]

    def rules(self) -> list[Pattern]:
        """The ranges that lists are put beside."""
        return [Streaming(0, window) for window in self.windows]

    def append(self, k: Tensor, v: Tensor, length: int, starts: Tensor | None) -> None:
        """Keys of the positions from `length` on; what no later row can see is overwritten."""
        count = k.shape[2]
        end = length + count
        positions = torch.arange(length, end)
        member = torch.zeros(count, dtype=torch.int32)
        for head, one in enumerate(self.patterns):
            member |= for_good(one, positions).int() << head
        kept = member.nonzero().flatten()
        if self.where.device != k.device:
            self.where, self.member = self.where.to(k.device), self.member.to(k.device)
        if len(kept):
            self.where = torch.cat([self.where, positions[kept].int().to(k.device)])
            self.member = torch.cat([self.member, member[kept].to(k.device)])
        leaving = self._leaving(end - self.size)
        self.grown(self.size + self.stored + len(leaving), k, v)
        assert self.k is not None
        assert self.v is not None
        if len(leaving):
            at = torch.tensor(leaving, device=k.device)
            old, fresh = at[at < length], at[at >= length] - length
            first = self.size + self.stored
            for to, new in ((self.k, k), (self.v, v)):
                to[:, :, first : first + len(old)] = to[:, :, (old + 1) % self.size]
                to[:, :, first + len(old) : first + len(leaving)] = new[:, :, fresh]
            self.stored += len(leaving)
        newest = slice(max(0, count - self.size), count)
        places = (positions[newest].to(k.device) + 1) % self.size
        self.k.index_copy_(2, places, k[:, :, newest])
        self.v.index_copy_(2, places, v[:, :, newest])
        self.length = end

    def _leaving(self, end: int) -> list[int]:
        """The positions kept for good that leave the ring when it ends before `end`."""
        low = max(0, self.length - self.size)
        if end <= low:
            return []
        positions = torch.arange(low, end)
        kept = torch.stack([for_good(one, positions) for one in dict.fromkeys(self.patterns)]).any(0)
        return [int(one) for one in positions[kept]]

    def place_rule(self) -> tuple[int, int, int]:
        """(fixed, ring, shift): lists of these heads name places."""
        return -1, self.size, 1

    def listed(self) -> tuple[Tensor, Tensor]:
        """(places [n] int32, bits [n] int32) of what the newest row sees beside its ranges."""
        device, row = self.where.device, self.length - 1
        if self._windows is None or self._windows.device != device:
            self._windows = torch.tensor(self.windows, dtype=torch.int32).to(device)[:, None]
        number = torch.arange(len(self.where), dtype=torch.int32, device=device)
        gone = self.where <= row - self.size
        places = torch.where(gone, self.size + number, (self.where + 1) % self.size)
        behind = (self.where[None] + self._windows <= row).int() << torch.arange(len(self.patterns), device=device)[:, None]
        bits = self.member & behind.sum(0, dtype=torch.int32)
        if not any(isinstance(one, Lines) for one in self.patterns):
            return places, bits
        back, seen = self._looks_back(device)
        at = row - back
        if len(self.where):  # a column that a diagonal meets is in the list already
            near = torch.searchsorted(self.where, at).clamp(max=len(self.where) - 1)
            seen = seen & ~torch.where(self.where[near] == at, self.member[near], 0)
        seen = torch.where(at >= 0, seen, 0)
        return torch.cat([places, ((at + 1) % self.size).int()]), torch.cat([bits, seen])

    def _looks_back(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(distances [n] int32 of at least 1, bits [n] int32 of the heads whose diagonals they are)."""
        if self._diagonals is None or self._diagonals[0].device != device:
            found: dict[int, int] = {}
            for head, one in enumerate(self.patterns):
                for back in one.diagonals if isinstance(one, Lines) else ():
                    if back:
                        found[back] = found.get(back, 0) | 1 << head
            pair = (torch.tensor(list(x), dtype=torch.int32).to(device) for x in (found.keys(), found.values()))
            self._diagonals = next(pair), next(pair)
        return self._diagonals

    def before(self, old: int) -> tuple[Tensor, Tensor]:
        """(positions, places) int64 of the keys held of the first `old` tokens, of which the part has seen no more."""
        low = max(0, old - self.size)
        far = self.where[: self.stored].long()
        near = torch.arange(low, old, device=far.device)
        return torch.cat([far, near]), torch.cat([self.size + torch.arange(self.stored, device=far.device), (near + 1) % self.size])
