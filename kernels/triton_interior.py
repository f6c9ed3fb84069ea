"""When the Gluon kernels take a call, or its interior, and their launches.

It is made for long causal calls without padding on Hopper, where nearly all of the work is; everything else stays with the two sweeps,
which compute the same numbers. The choice is by what the kernel can do, and never by a try and a fallback. One rule says which tiles are
interior, for all three kernels: key tile j (128 keys) to the 256 rows from row 256 g on, when its last key is at least `near` tokens
before row 256 g. A tile counted by none or by two of them would be a silent hole in the statistics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from headscope.kernels.triton_common import INTERPRETED
from headscope.kernels.triton_host import cdiv, describable, padded
from headscope.kernels.triton_launch import tile_for, triton_version
from headscope.kernels.triton_run import FLAGS, SLOTS, empty

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.kernels.triton_run import Run

ROWS, KEYS = 256, 128
"""Query rows of a program and keys of a tile, as in `gluon_interior`."""
UNIT = 2.0**-44
"""One step of the kernel's integer sums."""
LEAST = 1024
"""Fewest keys for which a third launch pays."""
UNSUITED = frozenset({"class_mass", "diagonal_sum", "segment_mass"})
"""Statistics that need every tile in their own sweep."""

ENABLED = True
"""Tests and benchmarks switch the one-pass kernel off to compare."""
ALONE = True
"""The same for the kernel of column sums alone."""


def plan(run: Run) -> int | None:
    """How far an interior tile must lie behind a row of its program, or None where the two sweeps do all of the call."""
    call, request = run.call, run.request
    if request is None or not suited(run) or UNSUITED & set(request.names) or run.counted is not None:
        return None
    if call.query_offset % KEYS or call.key_offset % KEYS:
        return None
    if request.needs("fai") and request.fai_band[1] is None:
        return None
    if request.needs("block_mass", "block_max") and request.block % KEYS:
        return None
    rows, columns = (tile_for(name, call.q.device, call.q.dtype, run.width) for name in ("rows", "columns"))
    if rows.keys != KEYS or columns.keys != KEYS or ROWS % rows.rows or columns.rows != KEYS:
        return None
    near = max(1, run.near(request.names))
    last = (run.rows - 1) // ROWS * ROWS + call.query_offset - call.key_offset
    return near if last - near + 1 >= LEAST else None


def suited(run: Run) -> bool:
    """Whether the Gluon kernels can read the call at all: half precision on Hopper, causal with nothing else to its mask."""
    call, mask = run.call, run.call.mask
    if not ENABLED or INTERPRETED or not hopper(call.q.device) or call.q.element_size() != 2 or not describable(call.q, call.k):
        return False
    if not mask.causal or mask.window is not None or mask.query_valid is not None or run.seen.element:
        return False
    ahead = call.query_offset - call.key_offset
    return not run.softcap and call.first_token is None and 32 < run.width <= 128 and ahead >= 0 and run.keys == run.rows + ahead


def takes_forward(run: Run, names: tuple[str, ...]) -> bool:
    """Whether `gluon_forward` computes the call's output and the named row statistics."""
    v = run.call.v
    if v is None or not suited(run) or "class_mass" in names or run.call.sink_logits is not None or run.rows < KEYS:
        return False
    same = v.shape[3] == run.width and run.width in (64, 128) and v.dtype == run.call.q.dtype and describable(v)
    return same and tile_for("rows", v.device, v.dtype, run.width).keys == KEYS


def takes_columns(run: Run, names: tuple[str, ...]) -> bool:
    """Whether `gluon_columns` computes the named column statistics, given the lse: the sum alone, of a call long enough to fill tiles."""
    if names != ("column_sum",) or not ALONE or not suited(run) or run.counted is not None or run.rows < KEYS:
        return False
    return tile_for("columns", run.call.q.device, run.call.q.dtype, run.width).keys == KEYS


@lru_cache(maxsize=8)
def hopper(device: torch.device) -> bool:
    """Whether a device has the matrix unit that the kernel is written for, and this Triton has Gluon."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and triton_version() >= (3, 6)


def launch(run: Run, near: int, raw: Tensor | None, slots: dict[str, int], rows: tuple[str, ...], made: dict[str, Tensor],
           reference: Tensor) -> None:  # fmt: skip
    """Adds the interior to `made` (the columns and maps of the edges) and to the edges' rows in `raw` [slots, B, H, Nq].

    `reference` [B, H, tiles * 256]: lse in log2 units, +inf beyond the last row.
    """
    from headscope.kernels.gluon_interior import QUERIES, WARPS, interior_kernel

    call, device = run.call, run.call.q.device
    sums = {name: torch.zeros(made[name].shape, dtype=torch.int64, device=device) for name in ("column_sum", "block_mass") if name in made}
    cells_q, cells_k = made[next(x for x in ("block_mass", "block_max") if x in made)].shape[2:] if run.side else (1, 1)
    nothing = reference
    flags = {FLAGS[name]: slots.get(name, -1) for name in ("entropy", "distance", "distance_sq", "waad")}
    interior_kernel[(cdiv(run.rows, ROWS), run.batch * run.heads)](
        descriptor(call.q, QUERIES), descriptor(call.k, KEYS), reference, nothing if raw is None else raw, sums.get("column_sum", nothing),
        sums.get("block_mass", nothing), made["block_max"].view(torch.int32) if "block_max" in made else nothing, run.scales[0], run.heads,
        call.group, run.rows, run.keys, call.query_offset - call.key_offset, near,
        run.request.waad_window if run.request is not None else 0, cells_q, cells_k, 1 << 30,
        **flags, PEAK="row_max" in rows or "argmax" in rows, WIN=slots.get("win", -1), ROW=raw is not None, COLUMNS="column_sum" in sums,
        MASS="block_mass" in sums, TOP="block_max" in made, DP=max(64, padded(run.width)), STAGES=3, num_warps=WARPS,
    )  # fmt: skip
    for name, total in sums.items():
        made[name].add_(total, alpha=UNIT)


def launch_columns(run: Run, lse: Tensor) -> Tensor:
    """[B, H, Nk] float32: what every key receives. `lse` [B, H, Nq] in nats."""
    from headscope.kernels.gluon_columns import TILE_KEYS, WARPS, columns_only_kernel

    call = run.call
    out = empty(call.q, run.batch, run.heads, run.keys)
    columns_only_kernel[(cdiv(run.keys, ROWS), run.batch * run.heads)](
        descriptor(call.k, TILE_KEYS), descriptor(call.q, KEYS), lse.contiguous(), out, run.scales[0], run.heads, call.group, run.rows,
        run.keys, call.query_offset - call.key_offset, DP=max(64, padded(run.width)), STAGES=3, num_warps=WARPS,
    )  # fmt: skip
    return out


def launch_forward(run: Run, names: tuple[str, ...], raw: Tensor, slots: dict[str, int], out: Tensor) -> None:
    """The attention output into `out` [B, H, Nq, D] and the rows' accumulators into `raw` [slots, B, H, Nq]."""
    from headscope.kernels.gluon_forward import QUERIES, WARPS, forward_kernel

    call, request = run.call, run.request
    assert request is not None
    assert call.v is not None
    forward_kernel[(cdiv(run.rows, KEYS), run.batch * run.heads)](
        descriptor(call.q, QUERIES), descriptor(call.k, KEYS), descriptor(call.v, KEYS), raw, out, *out.stride()[:3], run.scales[0],
        run.heads, call.group, run.rows, call.query_offset - call.key_offset, max(1, run.near(names)),
        request.sink_tokens - call.key_offset, request.waad_window, request.local_window,
        **{FLAGS[name]: slots.get(name, -1) for name in SLOTS}, WIN=slots.get("win", -1), D=run.width, STAGES=2, num_warps=WARPS,
    )  # fmt: skip


def descriptor(x: Tensor, rows: int) -> Any:
    """So many rows of one head at a time, padded with zeros to the width of a swizzle."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    strides = [x.shape[3] * 8 if n == 1 else step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, max(64, padded(x.shape[3]))], layout)
