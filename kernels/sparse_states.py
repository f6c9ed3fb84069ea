"""Which tiles of 128 x 128 a static pattern keeps: nothing of a tile, some, or all of it.

Computed for all tiles of a text at once, on the device where the lists will lie. "All" means that every entry of the tile is causal and
kept; whatever is not surely that is "some", and the kernels look at its entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from headscope.plans.patterns import Blocks, Lines, Power, Strided

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.plans import Pattern

SIDE = 128
"""Rows and keys of a tile."""
CELL = 16
"""Rows and keys of the smallest block that a partial tile can keep."""
PER = SIDE // CELL


@dataclass(frozen=True, eq=False)
class TileStates:
    """`state` [R, R] uint8 of row tiles by key tiles: 0 nothing, 1 some, 2 all. `cells` [R, R] int64 or None: which cells of 16 x 16 the
    blocks of the pattern keep. For `Lines`: `columns` [C] int32 and `diagonals` [128 R] uint8.
    """

    state: Tensor
    cells: Tensor | None = None
    columns: Tensor | None = None
    diagonals: Tensor | None = None

    def with_cells(self) -> Tensor:
        """`cells`; none are kept where a pattern has none."""
        return torch.zeros(self.state.shape, dtype=torch.int64, device=self.state.device) if self.cells is None else self.cells


def states_of(pattern: Pattern, count: int, device: torch.device) -> TileStates:
    """The states of the first `count` row tiles under a pattern that `sparse_lists.supported` lets pass."""
    if isinstance(pattern, Lines):
        return _of_lines(pattern, count, device)
    assert isinstance(pattern, Strided | Power | Blocks)
    rows = torch.arange(count, device=device)[:, None]
    keys = torch.arange(count, device=device)[None, :]
    cells = _cells(pattern, count, device)
    back = SIDE * (rows - keys)
    sink, window = int(getattr(pattern, "sink", 0)), int(getattr(pattern, "window", 1))
    causal = keys < rows
    some = (cells != 0) | (back - SIDE + 1 < window) | (SIDE * keys < sink)
    whole = (cells == -1) | (back + SIDE - 1 < window) | (SIDE * keys + SIDE - 1 < sink)
    state = torch.where(keys > rows, 0, torch.where(whole & causal, 2, some.long())).to(torch.uint8)
    # of whole tiles only the diagonal one is partial, and its mask is causality alone
    return TileStates(state, None if isinstance(pattern, Blocks) and pattern.block % SIDE == 0 else cells)


def _cells(pattern: Strided | Power | Blocks, count: int, device: torch.device) -> Tensor:
    """[count, count] int64: the cells that the blocks keep, causality aside; -1 is all of them."""
    block = pattern.block
    table = _block_table(pattern, -(-count * SIDE // block)).to(device) if isinstance(pattern, Blocks) else None
    if block % SIDE == 0:
        tile = torch.arange(count, device=device) // (block // SIDE)
        return -_kept_blocks(pattern, table, tile, tile).long()
    per = SIDE // block
    cell = torch.arange(count * PER, device=device) // (PER // per)
    out = torch.zeros(count, count, dtype=torch.int64, device=device)
    shift = (torch.arange(PER, device=device)[:, None] * PER + torch.arange(PER, device=device))[None, :, None, :]
    for top in range(0, count, 64):  # strips, so that memory stays O(rows of a strip x keys)
        end = min(count, top + 64)
        kept = _kept_blocks(pattern, table, cell[top * PER : end * PER], cell).view(end - top, PER, count, PER)
        out[top:end] = (kept.long() << shift).sum((1, 3))
    return out


def _kept_blocks(pattern: Strided | Power | Blocks, table: Tensor | None, rows: Tensor, keys: Tensor) -> Tensor:
    """[rows, keys] bool: whether block rows[i] of the rows keeps block keys[j] of the keys."""
    if table is not None:
        return table[rows][:, keys]
    row, key = rows[:, None], keys[None, :]
    if isinstance(pattern, Strided):
        return ((key % pattern.stride) == pattern.offset).expand(len(rows), -1)
    gap = row - key
    return (gap > 0) & ((gap & (gap - 1)) == 0)


def _block_table(pattern: Blocks, total: int) -> Tensor:
    """[blocks, blocks] bool of the first `total` blocks; what `Blocks.row` says, for all rows at once."""
    listed = pattern.kept_blocks
    last = len(listed) - 1
    shown = [listed[min(row, last)] for row in range(total)]
    lengths = np.fromiter(map(len, shown), np.int64, total)
    row = np.repeat(np.arange(total), lengths)
    key = np.fromiter(chain.from_iterable(shown), np.int64, int(lengths.sum())) + np.maximum(0, row - last)
    table = np.zeros((total, total), bool)
    table[row[key < total], key[key < total]] = True
    np.fill_diagonal(table, True)
    return torch.from_numpy(table)


def _of_lines(pattern: Lines, count: int, device: torch.device) -> TileStates:
    """A tile's state under diagonals depends on how far it lies before the diagonal one, and on nothing else."""
    diagonals = torch.zeros(count * SIDE, dtype=torch.uint8)
    kept = torch.tensor([one for one in (0, *pattern.diagonals) if one < count * SIDE], dtype=torch.int64)
    diagonals[kept] = 1
    columns = torch.tensor([one for one in pattern.columns if one < count * SIDE], dtype=torch.int32)
    gap = gap_states(diagonals[None])[0].to(device)
    back = torch.arange(count, device=device)[:, None] - torch.arange(count, device=device)
    state = torch.where(back >= 0, gap[back.clamp(min=0)], 0).to(torch.uint8)
    return TileStates(state, None, columns.to(device), diagonals.to(device))


def gap_states(diagonals: Tensor) -> Tensor:
    """[slots, 128 G] uint8 -> [slots, G] uint8: state of the tile g tiles before the diagonal one. It holds distances 128 g - 127 ..
    128 g + 127, and is full when all of them are kept; the one on the diagonal is never full.
    """
    length = diagonals.shape[1]
    before = torch.nn.functional.pad(diagonals.to(torch.int32).cumsum(1), (1, 0))
    start = torch.arange(0, length, SIDE, device=diagonals.device)
    found = before[:, (start + SIDE).clamp(max=length)] - before[:, (start - SIDE + 1).clamp(min=0)]
    whole = (found == 2 * SIDE - 1) & (start > 0)
    return torch.where(whole, 2, (found > 0).long()).to(torch.uint8)
