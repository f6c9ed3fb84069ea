"""Entry point of the Triton statistics kernels: which calls they take, and one call's statistics as sums that can be added up.

What runs follows from what is asked for, and nothing else does:

- row statistics need sweep 1 (`triton_rows`); column sums, bands and maps need sweep 2 (`triton_columns`), which needs every row's lse;
- where the host's fused kernel has already returned its lse (`call.facts["lse"]` [B, Hq, Nq], nats, sink logit included), sweep 1 is
  skipped when no row statistic is asked for;
- column sums alone, of a plain causal call on Hopper, have a sweep of their own (`gluon_columns`);
- where most of a causal call lies far from its diagonal, one pass over that interior serves rows, columns and maps (`triton_interior`), and
  the sweeps only see the edges;
- pairs are gathered, given the lse.

The silent failure this avoids: output buffers are allocated uninitialised for speed, so every element must be written by a kernel. Tests
fill them with NaN first (`triton_run.POISON`), and a forgotten element fails them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.kernels import triton_interior
from headscope.kernels.triton_common import INTERPRETED
from headscope.kernels.triton_gather import window_kernel
from headscope.kernels.triton_host import cdiv, diagonal_range, padded, pooled, row_counts
from headscope.kernels.triton_launch import Tile
from headscope.kernels.triton_run import SLOTS, empty
from headscope.kernels.triton_sweeps import Row, Sweeps
from headscope.statistics.partial import PartialStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest

MOST_LABELS = 128
_ROWS = (*SLOTS, "lse", "row_max", "argmax", "sink_logit_mass", "class_mass")
_COLUMNS = ("column_sum", "sink_importance", "fai", "block_mass", "block_max")
_CROSSING = ("diagonal_sum", "segment_mass")


def supports(call: AttentionCall, request: StatisticsRequest) -> str:
    """The empty string when these kernels can measure the call, else the reason why not."""
    width = call.q.shape[3]
    if not (INTERPRETED or call.q.is_cuda):
        return f"the tensors are on {call.q.device}, and Triton compiles for CUDA"
    if call.q.dtype not in {torch.bfloat16, torch.float16, torch.float32} or call.k.dtype != call.q.dtype:
        return f"q is {call.q.dtype} and k is {call.k.dtype}; the kernels take bfloat16, float16 or float32, both alike"
    if width > 256:
        return f"head_dim is {width}, and a tile wider than 256 does not fit the registers"
    if call.scale <= 0:
        return f"scale is {call.scale}; the running maximum assumes a positive one"
    if request.needs("class_mass") and request.classes > MOST_LABELS:
        return f"{request.classes} labels; a row keeps at most {MOST_LABELS} in registers"
    if 0 in call.q.shape or 0 in call.k.shape:
        return "there is no query or no key"
    return ""


def measure(call: AttentionCall, request: StatisticsRequest) -> PartialStatistics:
    """Statistics of one call by the Triton kernels: float32 on the call's device; see PartialStatistics for shapes and meaning."""
    with torch.no_grad(), _device(call.q):
        return _Run(call, request).statistics()


def attention(call: AttentionCall, request: StatisticsRequest) -> tuple[Tensor, PartialStatistics]:
    """The row-statistics forward: attention output [B, Hq, Nq, Dv] in v's dtype and the request's statistics; the output comes from
    the same pass as the row statistics. Raises CaptureError when the call has no v."""
    with torch.no_grad(), _device(call.q):
        run = _Run(call, request)
        statistics = run.statistics(output=True)
        assert run.out is not None  # made by statistics(output=True)
        return run.out, statistics


def window(call: AttentionCall, lse: Tensor, head: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Exact weights A[queries, keys] of one query head, float32 [B, len(queries), len(keys)], by indices into this call."""
    with torch.no_grad(), _device(call.q):
        run = _Run(call, None)
        queries, keys = (x.to(call.q.device, torch.int64).contiguous() for x in (queries, keys))
        out = empty(call.q, call.q.shape[0], len(queries), len(keys))
        if out.numel() == 0:
            return out
        tile = Tile(32, 32) if run.width > 128 or call.q.dtype == torch.float32 else Tile(64, 64)
        grid = (cdiv(len(queries), tile.rows), cdiv(len(keys), tile.keys), call.q.shape[0])
        window_kernel[grid](
            call.q, call.k, lse.to(torch.float32).contiguous(), queries, keys, out, *run.mask_pointers(),
            *call.q.stride(), *call.k.stride(), *run.mask_strides(), *run.scales, head, run.heads, call.group, run.rows, run.keys,
            len(queries), len(keys), ELEMENT=run.seen.element, SOFTCAP=run.softcap, D=run.width, DP=padded(run.width),
            BM=tile.rows, BN=tile.keys, UPCAST=run.upcast, num_warps=4, num_stages=1,
        )  # fmt: skip
        return out


class _Run(Sweeps):
    """One call and one request on their way through the kernels."""

    def statistics(self, output: bool = False) -> PartialStatistics:
        """Everything the request names."""
        call, request = self.call, self.request
        assert request is not None
        names = request.names
        result = PartialStatistics(call.query_offset, call.key_offset)
        row_names = tuple(name for name in _ROWS if name in names)
        column_names = tuple(name for name in _COLUMNS if name in names)
        crossing = tuple(name for name in _CROSSING if name in names)
        lse = self.given()
        hot = set(row_names) - {"lse", "sink_logit_mass"}
        alone = not (hot or output or crossing) and triton_interior.takes_columns(self, column_names)
        near = None if output or alone else triton_interior.plan(self)
        row: Row | None = None
        made: dict[str, Tensor] = {}
        if alone:
            lse = self.sweep_rows(("lse",), None, False).raw[0, 0] if lse is None else lse
            made = {"column_sum": triton_interior.launch_columns(self, lse)}
        elif near is not None and (column_names or (hot and lse is not None)):
            if lse is None:
                lse = self.sweep_rows(("lse",), None, False).raw[0, 0]
            row, made = self.fused(row_names if hot else (), column_names, lse, near)
        else:
            if lse is None or hot or output:
                row = self.sweep_rows(row_names, lse, output)
                lse = row.raw[0, 0]
            if column_names or crossing:
                made = self.sweep_columns(column_names + crossing, lse)
        if row is not None:
            self.take_rows(result, row, row_names)
        elif "lse" in names:
            result.rows["lse"] = lse
        self.take_columns(result, made)
        if "sink_logit_mass" in names:
            sinks = call.sink_logits
            mass = torch.exp((torch.full_like(lse[0, :, :1], -torch.inf) if sinks is None else sinks.to(lse).view(-1, 1)) - lse)
            result.rows["sink_logit_mass"] = mass
        if request.needs("column_sum", "sink_importance", "fai"):
            # a row that sees no key does not count; where the intervals do not say which those are, its lse does
            counted = ~lse.isnan().all(1) if self.seen.element else self.seen.hi > self.seen.lo
            result.counts = row_counts(call, request, counted if self.counted is None else counted & self.counted)
        if request.needs("pairs"):
            for name, (queries, keys) in request.pairs.items():
                result.pairs[name] = self.pairs(lse, queries, keys)
        return result

    def take_rows(self, result: PartialStatistics, row: Row, names: tuple[str, ...]) -> None:
        if "lse" in names:
            result.rows["lse"] = row.raw[0, 0]
        if "row_max" in names:
            result.rows["row_max"] = row.raw[0, 1]
        for name in SLOTS:
            if name in names:
                result.rows[name] = row.raw[0, row.slots[name]]
        if row.argmax is not None:
            result.rows["argmax"] = row.argmax
        if row.classes is not None and self.request is not None:
            result.rows["class_mass"] = row.classes[0][..., : self.request.classes]

    def take_columns(self, result: PartialStatistics, made: dict[str, Tensor]) -> None:
        request = self.request
        assert request is not None
        if "column_sum" in made:
            result.columns["column_sum"] = made["column_sum"]
        if "fai" in made:
            result.columns["fai_sum"] = made["fai"]
        for name in ("block_mass", "block_max"):
            if name in made:
                result.maps[name] = pooled(made[name], request.block // self.side, name == "block_max")
        if "segment_mass" in made:
            result.maps["segment_mass"] = made["segment_mass"]
        if "diagonal_sum" in made:
            result.diagonals = made["diagonal_sum"]
            result.diagonal_start = diagonal_range(self.call)[0]


def _device(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device: make it the tensor's own."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
