"""What a sparse prefill costs against the model's own dense kernel, before it is run.

Both costs are counted in tiles of 128 x 128 of the dense kernel: a sparse kernel pays so much for every tile it visits, for every tile of
rows (its queries, its output, a pipeline that starts), and once for the call. The three were fitted to times of the benchmark
(`headscope bench prefill`) and are kept by compute capability and Triton version, never by a card's name. A rule that says "sparse" where
dense is faster costs time, one that says "dense" too early costs the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from headscope.kernels.sparse_states import SIDE

if TYPE_CHECKING:
    from headscope.call import AttentionCall
    from headscope.kernels.sparse_lists import TileLists
    from headscope.plans import Pattern


class Cost(NamedTuple):
    """Cost per tile, per tile of rows, and per call and processor, in tiles of the dense kernel; `line` per masked tile of a plan with
    diagonals, columns or cells.
    """

    tile: float
    row: float
    call: float
    line: float = 1.0


class _Row(NamedTuple):
    backend: str
    capability: tuple[int, int]
    triton: tuple[int, int]
    cost: Cost


_TABLE = (
    _Row("gluon", (9, 0), (3, 6), Cost(0.92, 1.3, 7.0, 1.4)),
    _Row("triton", (9, 0), (3, 4), Cost(1.6, 3.5, 5.0, 4.0)),
    # nobody has measured these: cautious
    _Row("triton", (0, 0), (3, 0), Cost(1.4, 3.5, 7.0, 4.0)),
)
DENSE = Cost(1.0, 2.7, 7.0)
"""What a fused dense kernel pays, in the same units."""


def cost_of(backend: str, device: torch.device) -> Cost:
    """The first line of the table that fits a device."""
    from headscope.kernels.triton_launch import triton_version

    capability, version = torch.cuda.get_device_capability(device), triton_version()
    for row in _TABLE:
        if row.backend == backend and capability >= row.capability and version >= row.triton:
            return row.cost
    return _TABLE[-1].cost


def shares(call: AttentionCall, patterns: Sequence[Pattern], lists: TileLists | None) -> tuple[float, float, float, float]:
    """(tiles that a sparse kernel visits, those of them with looked-up masks, tiles of rows, tiles that a dense kernel visits) over all
    heads of one sequence.

    `lists`: those of a static plan; a dynamic one is counted by what its patterns expect to keep.
    """
    rows, heads, batch = call.q.shape[2], call.q.shape[1], call.q.shape[0]
    begin, end = call.query_offset, call.query_offset + rows
    strips = heads * (-(-end // SIDE) - begin // SIDE)
    dense = sum(-(-min(end, top + SIDE) // SIDE) for top in range(begin - begin % SIDE, end, SIDE)) * float(heads)
    if lists is not None and lists.visits is not None:
        looked = lists.masked if lists.columns is not None or lists.cells is not None else 0
        return lists.visits / batch, looked / batch, strips, dense
    whole = (end * (end + 1) - begin * (begin + 1)) / 2
    per = [dense / heads * (one.kept(end) - (one.kept(begin) if begin else 0.0)) / whole + strips / heads / 2 for one in patterns]
    lined = sum(count for count, one in zip(per, patterns, strict=True) if one.kind in ("lines", "vertical_slash"))
    return sum(per), lined, strips, dense


def slower(call: AttentionCall, patterns: Sequence[Pattern], backend: str, lists: TileLists | None, processors: int) -> str:
    """ "" when the sparse kernel is expected to be faster than a dense one, or by how much it is not."""
    visits, looked, strips, dense = shares(call, patterns, lists)
    batch = call.q.shape[0]

    def total(cost: Cost, plain: float, masked: float) -> float:
        return batch * (cost.tile * plain + cost.line * masked + cost.row * strips) + cost.call * processors

    ratio = total(cost_of(backend, call.q.device), visits - looked, looked) / total(DENSE, dense, 0.0)
    if ratio < 1:
        return ""
    return f"{visits / dense:.0%} of the tiles at {call.q.shape[2]} rows would take {ratio:.2f} of the dense kernel's time"
