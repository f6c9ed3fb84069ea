"""What the launchers of the statistics kernels share about one call: its masks, its rows that count, its buffers.

Buffers that kernels fill are allocated uninitialised for speed, so every element must be written by a kernel. Tests fill them with NaN
first (`POISON`), and a forgotten element fails them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.kernels.triton_common import INTERPRETED, LOG2E
from headscope.kernels.triton_host import broadcast_strides, by_position, cdiv, zero
from headscope.kernels.triton_launch import Tile, processors
from headscope.kernels.triton_visibility import Visibility, batched, visibility

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest

POISON = False
"""Tests set this: buffers that kernels must fill are then allocated full of NaN."""

SLOTS = ("entropy", "distance", "distance_sq", "waad", "sink_mass", "local_mass")
"""Row statistics that have an accumulator of their own, in the order of their slots."""
FLAGS = {
    "entropy": "ENTROPY", "distance": "DISTANCE", "distance_sq": "SQUARE", "waad": "WAAD", "sink_mass": "SINK", "local_mass": "LOCAL",
}  # fmt: skip


class Run:
    """One call and one request on their way through the kernels."""

    def __init__(self, call: AttentionCall, request: StatisticsRequest | None) -> None:
        self.call, self.request = call, request
        self.batch, self.heads, self.rows, self.width = call.q.shape
        self.keys = call.k.shape[2]
        self.seen: Visibility = visibility(call)
        self.softcap = call.softcap is not None
        cap = call.softcap or 1.0
        self.scales = (call.scale * LOG2E, 2.0 * call.scale / cap * LOG2E, cap * LOG2E)
        self.upcast = INTERPRETED and call.q.dtype == torch.bfloat16
        self.out: Tensor | None = None
        self.counted = self._counted()
        self.side = 0

    def _counted(self) -> Tensor | None:
        """[B or 1, Nq] bool: rows that count in column statistics; None: all of them."""
        valid, chosen = self.call.mask.query_valid, None if self.request is None else self.request.rows
        counted = None if valid is None else valid.to(torch.bool)
        if chosen is not None:
            at = by_position(chosen.to(torch.int8), self.call.query_offset, self.rows, 0, self.call.q.device) > 0
            counted = at if counted is None else counted & at
        return counted

    def mask_pointers(self, columns: bool = False) -> tuple[Tensor, ...]:
        """lo, hi and the element masks; a tensor nobody reads stands in for those that are not compiled in."""
        seen, mask = self.seen, self.call.mask
        lo, hi = (seen.key_lo, seen.key_hi) if columns else (seen.lo, seen.hi)
        allowed = lo if mask.allowed is None else mask.allowed.view(torch.int8) if mask.allowed.dtype == torch.bool else mask.allowed
        return (
            lo, hi, *(lo if x is None else x for x in (seen.key_valid, seen.q_segments, seen.k_segments)),
            allowed, lo if mask.bias is None else mask.bias,
        )  # fmt: skip

    def mask_strides(self, columns: bool = False) -> tuple[int, ...]:
        mask = self.call.mask
        return (batched(self.seen.key_lo if columns else self.seen.lo), *broadcast_strides(mask.allowed), *broadcast_strides(mask.bias))

    def near(self, names: tuple[str, ...]) -> int:
        """How far from the diagonal a tile must lie to need no mask: beyond every band that is asked for."""
        request = self.request
        assert request is not None
        lo, hi = request.fai_band
        bands = {
            "waad": request.waad_window, "local_mass": request.local_window, "fai": lo if hi is None else hi + 1,
            "distance": 1, "distance_sq": 1,
        }  # fmt: skip
        # without causality a tile on the diagonal has both signs; with it, distances are one-sided anyway
        plain = {"distance", "distance_sq"} if self.call.mask.causal else set()
        return max((bands[name] for name in names if name in bands and name not in plain), default=0)

    def cell(self, tile: Tile, names: tuple[str, ...]) -> tuple[int, int, int, int, int]:
        """Side of the kernel's map cells, q and k shifts that align tiles to absolute position 0, and the number of cells."""
        assert self.request is not None
        if not {"block_mass", "block_max"} & set(names):
            return min(tile.rows, tile.keys), 0, 0, 1, 1
        cell = min(self.request.block, tile.rows, tile.keys)
        q_shift, k_shift = self.call.query_offset % self.request.block, self.call.key_offset % self.request.block
        self.side = cell
        return cell, q_shift, k_shift, cdiv(self.rows + q_shift, cell), cdiv(self.keys + k_shift, cell)

    def given(self) -> Tensor | None:
        """The host kernel's lse, NaN on rows that see nothing; None where there is none,
        or where the intervals do not say which those are."""
        given = self.call.facts.get("lse")
        if not isinstance(given, torch.Tensor) or self.seen.element:
            return None
        lse = given.to(torch.float32).reshape(self.batch, self.heads, self.rows)
        call = self.call
        if call.mask.causal and call.mask.window is None and call.mask.query_valid is None and call.query_offset >= call.key_offset:
            return lse  # every row sees the first key
        return torch.where((self.seen.hi > self.seen.lo)[:, None], lse, torch.nan)

    def splits(self, programs: int, tile: Tile) -> int:
        """Into how many pieces the keys of a row are cut, so that few rows (decode) still fill the device."""
        wanted = cdiv(2 * processors(self.call.q.device), programs)
        return max(1, min(wanted, self.keys // (4 * tile.keys) + 1, 128))

    def reference(self, lse: Tensor, counted: Tensor | None, shift: int = 0, multiple: int = 1) -> Tensor:
        """lse in log2 units, +inf on rows that do not count or see nothing, so that their weights are zero. With `shift` such rows in front
        and enough behind for a multiple of `multiple`, so that whole tiles can be read."""
        total = cdiv(self.rows + shift, multiple) * multiple
        out = torch.full((self.batch, self.heads, total), torch.inf, device=lse.device)
        keep = lse == lse if counted is None else (lse == lse) & counted[:, None]
        out[:, :, shift : shift + self.rows] = torch.where(keep, lse * LOG2E, torch.inf)
        return out

    def slots(self, names: tuple[str, ...]) -> dict[str, int]:
        """Where in `raw` each statistic is accumulated; "win" is the number of the key tile with the row's largest score."""
        slots = {name: 2 + i for i, name in enumerate(name for name in SLOTS if name in names)}
        return {**slots, "win": 2 + len(slots)} if "argmax" in names else slots

    def sinks(self) -> Tensor | None:
        """[Hq] float32 learned sink logits, or None."""
        sinks = self.call.sink_logits
        return None if sinks is None else sinks.to(self.call.q.device, torch.float32).contiguous()

    def first(self) -> Tensor:
        """[B or 1, 1] int64: absolute position of each sequence's first real token."""
        first = self.call.first_token
        return zero(self.call.q.device) if first is None else first.to(self.call.q.device).view(-1, 1)

    def column_buffers(self, names: tuple[str, ...], cells_q: int, cells_k: int) -> dict[str, Tensor]:
        """What `columns_kernel` fills, by name."""
        made: dict[str, Tensor] = {}
        for name in ("column_sum", "fai"):
            if name in names or (name == "column_sum" and "sink_importance" in names):
                made[name] = empty(self.call.q, self.batch, self.heads, self.keys)
        for name in ("block_mass", "block_max"):
            if name in names:
                # tiles in which nothing is visible are never visited: their cells stay zero
                made[name] = torch.zeros(self.batch, self.heads, cells_q, cells_k, device=self.call.q.device)
        return made


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 tensor on `like`'s device."""
    return poisoned(torch.empty(shape, dtype=torch.float32, device=like.device))


def poisoned(x: Tensor) -> Tensor:
    """The tensor itself, full of NaN where tests want that."""
    return x.fill_(torch.nan) if POISON else x
