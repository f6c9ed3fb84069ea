"""AnchorAttention's choice: single columns ("stripes") whose scores come near a maximum that is known beforehand, the anchor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.errors import PlanError, refusal
from headscope.plans.dynamic_rules import Choosing, OneHead, tile_means
from headscope.plans.patterns import BLOCK, Pattern
from headscope.plans.remembered import Newest

if TYPE_CHECKING:
    from headscope.call import AttentionCall


@dataclass(frozen=True)
class GroupColumns(Pattern):
    """Columns by group of rows: the rows of group g, `block` x `step` of them, see the first tile, their own group, and the keys
    `columns[g]`; groups past the list see the first two alone.
    """

    columns: tuple[tuple[int, ...], ...]
    block: int = BLOCK
    step: int = 16
    kind = "group_columns"

    def check(self) -> None:
        self._whole(1, "block", "step")
        cleaned = []
        for group, listed in enumerate(self.columns):
            given = tuple(listed)
            whole = all(isinstance(one, int) and not isinstance(one, bool) for one in given)
            if not whole or list(given) != sorted(set(given)) or (given and (given[0] < 0 or given[-1] >= group * self.width)):
                raise refusal(
                    PlanError,
                    f"columns {given[:6]} of group {group}",
                    f"they are distinct, ascending and lie before the group, which begins at {group * self.width}",
                    "leave the others out",
                )
            cleaned.append(given)
        object.__setattr__(self, "columns", tuple(cleaned))

    @property
    def width(self) -> int:
        """Rows of a group."""
        return self.block * self.step

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """s < block, or s in the group of t, or s in columns[group of t]."""
        groups = rows // self.width
        out = (keys < self.block)[None, :] | (keys[None, :] >= (groups * self.width)[:, None])
        for group in groups.unique().tolist():
            if 0 <= group < len(self.columns):
                out[groups == group] |= torch.isin(keys, torch.tensor(self.columns[group], dtype=torch.int64))
        return out

    def kept(self, length: int) -> float:
        total = 0.0
        for group in range(-(-length // self.width)):
            begin = group * self.width
            height = min(self.width, length - begin)
            listed = self.columns[group] if group < len(self.columns) else ()
            before = min(self.block, begin) + sum(one >= self.block for one in listed)
            total += height * before + height * (height + 1) / 2
        return total

    def cached(self, length: int) -> float:
        return length


@dataclass(frozen=True)
class Stripes(Choosing):
    """Columns chosen per input as AnchorAttention does (arXiv:2505.23520). Prefill only.

    The anchor of a row is its largest score over the first tile and its own group of `step` tiles of `block` rows. An earlier key is kept
    for the whole group if, for one of its tiles of rows, mean query . key comes within `theta` of the tile's mean anchor. `theta` is in
    nats: the official code counts in powers of two, where its 12 is 8.3 nats.

    Departures from the official code: it never looks at the tile just before a group, and reads the first tile twice where the group's size
    is taken for the tile's; here every key is judged once. It needs lengths in multiples of block x step; here the last group may be short.
    """

    theta: float = 12 * math.log(2.0)
    block: int = BLOCK
    step: int = 16
    kind = "stripes"

    def check(self) -> None:
        self._whole(1, "block", "step")
        super().check()
        if not math.isfinite(self.theta):
            raise refusal(PlanError, f"{self.kind} with theta={self.theta!r}", "it is a difference of scores", "use theta=8.3")

    def choose(self, call: AttentionCall, head: int) -> GroupColumns:
        """The columns for one head of a call of one sequence. Time O(N block step + N^2 / block), memory O((block step)^2)."""
        groups = _newest.of(call, (head, self.block, self.step), lambda: self._gaps(call, head))
        columns = tuple(() if gap is None else tuple((gap[0][gap[1] >= -self.theta]).tolist()) for gap in groups)
        return GroupColumns(columns, self.block, self.step)

    def _gaps(self, call: AttentionCall, head: int) -> list[tuple[Tensor, Tensor] | None]:
        """Per group of rows (keys between the first tile and the group, how many nats each comes above an anchor at most); None for groups
        before the call's rows.
        """
        one = OneHead.of(call, head, self.block)
        size, width, end = self.block, self.block * self.step, one.origin + len(one.q)
        at = torch.arange(end, device=one.k.device)
        groups: list[tuple[Tensor, Tensor] | None] = [None] * (one.origin // width)
        for begin in range(one.origin // width * width, end, width):
            low, high = max(begin, one.origin), min(begin + width, end)
            q = one.q[low - one.origin : high - one.origin]
            near = torch.cat([at[: min(size, begin)], at[begin:high]])
            scores = (q @ one.k[near].T * one.scale).masked_fill(near > at[low:high, None], -torch.inf)
            anchors = tile_means(scores.amax(-1)[:, None], size)
            between = at[min(size, begin) : begin]
            above = tile_means(q, size) @ one.k[between].T * one.scale - anchors
            groups.append((between.cpu(), above.amax(0).cpu()))
        return groups


_newest: Newest[list[tuple[Tensor, Tensor] | None]] = Newest()
