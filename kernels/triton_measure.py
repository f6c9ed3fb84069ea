"""Entry point of the Triton statistics kernels: which calls they take, and one call's statistics as sums that can be added up.

What runs follows from what is asked for, and nothing else does:

- row statistics need sweep 1 (`triton_rows`); column sums, bands and maps need sweep 2 (`triton_columns`), which needs every row's lse;
- where the host's fused kernel has already returned its lse (`call.facts["lse"]` [B, Hq, Nq], nats, sink logit included), sweep 1 is
  skipped when no row statistic is asked for;
- pairs are gathered, given the lse.

The silent failure this avoids: output buffers are allocated uninitialised for speed, so every element must be written by a kernel. Tests
fill them with NaN first (`POISON`), and a forgotten element fails them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.errors import CaptureError, refusal
from headscope.kernels.triton_columns import columns_kernel
from headscope.kernels.triton_common import INTERPRETED, LOG2E
from headscope.kernels.triton_finish import argmax_kernel, finish_kernel
from headscope.kernels.triton_gather import pairs_kernel, window_kernel
from headscope.kernels.triton_host import (
    broadcast_strides,
    by_position,
    cdiv,
    describable,
    diagonal_range,
    operand,
    padded,
    pooled,
    row_counts,
    zero,
)
from headscope.kernels.triton_launch import Tile, processors, tile_for
from headscope.kernels.triton_rows import rows_kernel
from headscope.kernels.triton_visibility import Visibility, batched, visibility
from headscope.statistics.partial import PartialStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.statistics.request import StatisticsRequest

POISON = False
"""Tests set this: buffers that kernels must fill are then allocated full of NaN."""

FAR = 1 << 30
MOST_LABELS = 128
_SLOTS = ("entropy", "distance", "distance_sq", "waad", "sink_mass", "local_mass")
_ROWS = (*_SLOTS, "lse", "row_max", "argmax", "sink_logit_mass", "class_mass")
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
        out = _empty(call.q, call.q.shape[0], len(queries), len(keys))
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


@dataclass(slots=True, eq=False)
class _Row:
    """What sweep 1 left behind: `raw` [splits, slots, B, H, Nq] finished in place in split 0, and where each statistic is in it."""

    raw: Tensor
    slots: dict[str, int]
    classes: Tensor | None
    argmax: Tensor | None


class _Run:
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

    # what both sweeps need

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

    # the parts

    def statistics(self, output: bool = False) -> PartialStatistics:
        """Everything the request names."""
        call, request = self.call, self.request
        assert request is not None
        names = request.names
        result = PartialStatistics(call.query_offset, call.key_offset)
        row_names = tuple(name for name in _ROWS if name in names)
        column_names = tuple(name for name in _COLUMNS if name in names)
        crossing = tuple(name for name in _CROSSING if name in names)
        lse = self._given()
        hot = set(row_names) - {"lse", "sink_logit_mass"}
        if lse is None or hot or output:
            row = self._sweep_rows(row_names, lse, output)
            lse = row.raw[0, 0]
            self._take_rows(result, row, row_names)
        else:
            if "lse" in names:
                result.rows["lse"] = lse
        if "sink_logit_mass" in names:
            sinks = call.sink_logits
            mass = torch.exp((torch.full_like(lse[0, :, :1], -torch.inf) if sinks is None else sinks.to(lse).view(-1, 1)) - lse)
            result.rows["sink_logit_mass"] = mass
        if column_names or crossing:
            self._take_columns(result, self._sweep_columns(column_names + crossing, lse))
        if request.needs("column_sum", "sink_importance", "fai"):
            # a row that sees no key does not count; where the intervals do not say which those are, its lse does
            counted = ~lse.isnan().all(1) if self.seen.element else self.seen.hi > self.seen.lo
            result.counts = row_counts(call, request, counted if self.counted is None else counted & self.counted)
        if request.needs("pairs"):
            for name, (queries, keys) in request.pairs.items():
                result.pairs[name] = self._pairs(lse, queries, keys)
        return result

    def _given(self) -> Tensor | None:
        """The host kernel's lse, NaN on rows that see nothing; None where there is none,
        or where the intervals do not say which those are."""
        given = self.call.facts.get("lse")
        if not isinstance(given, torch.Tensor) or self.seen.element:
            return None
        lse = given.to(torch.float32).reshape(self.batch, self.heads, self.rows)
        return torch.where((self.seen.hi > self.seen.lo)[:, None], lse, torch.nan)

    def _sweep_rows(self, names: tuple[str, ...], lse: Tensor | None, output: bool) -> _Row:
        call, request = self.call, self.request
        assert request is not None
        if output and call.v is None:
            raise refusal(CaptureError, f"{call!r}", "its values were not kept, and the output is made of them", "pass a call with v")
        tile = tile_for("out" if output else "rows", call.q.device, call.q.dtype, self.width)
        slots = self._slots(names)
        classes = max(16, padded(request.classes)) if "class_mass" in names else 0
        programs = cdiv(self.rows, tile.rows)
        splits = 1 if output else self._splits(programs * self.batch * self.heads, tile)
        raw = _empty(call.q, splits, 2 + len(slots), self.batch, self.heads, self.rows)
        class_raw = _empty(call.q, splits, self.batch, self.heads, self.rows, classes) if classes else None
        if output:
            assert call.v is not None
            self.out = _poisoned(torch.empty(self.batch, self.heads, self.rows, call.v.shape[3], dtype=call.v.dtype, device=call.v.device))
        v, out = (call.q, call.q) if self.out is None or call.v is None else (call.v, self.out)
        tma = tile.descriptors and describable(call.q, call.k, v)
        labels = by_position(request.labels, call.key_offset, self.keys, -1, raw.device).to(torch.int32) if classes else self.seen.lo
        sinks, first = self._sinks(), self._first()
        rows_kernel[(programs, self.batch * self.heads, splits)](
            operand(call.q, tile.rows, tma), operand(call.k, tile.keys, tma), operand(v, tile.keys, tma),
            raw if lse is None else self._reference(lse, None), raw if sinks is None else sinks,
            self.seen.lo, self.seen.hi, self.seen.dense, first, *self.mask_pointers()[2:], labels,
            raw, raw if class_raw is None else class_raw, out, *call.q.stride(), *call.k.stride(), *v.stride(), *out.stride()[:3],
            batched(self.seen.lo), batched(self.seen.dense), batched(first), *self.mask_strides()[1:], batched(labels), raw.shape[1],
            *self.scales, self.heads, call.group, self.rows, self.keys, call.query_offset, call.key_offset, self.near(names),
            request.sink_tokens, request.local_window, request.waad_window, splits,
            GIVEN=lse is not None, **{_FLAGS[name]: slots.get(name, -1) for name in _SLOTS}, ROWMAX="row_max" in names,
            WIN=slots.get("win", -1),
            CLASSES=classes, OUT=output, ELEMENT=self.seen.element, SOFTCAP=self.softcap, CAUSAL=call.mask.causal,
            D=self.width, DP=padded(self.width), DV=v.shape[3], DVP=padded(v.shape[3]), BM=tile.rows, BN=tile.keys,
            SINK_LOGITS=sinks is not None, TMA=tma, UPCAST=self.upcast, **tile.options,
        )  # fmt: skip
        return self._finish(raw, class_raw, slots, splits, lse is not None, tile, tma)

    def _finish(self, raw: Tensor, class_raw: Tensor | None, slots: dict[str, int], splits: int, given: bool, tile: Tile,
                tma: bool) -> _Row:  # fmt: skip
        """Values from accumulators, and the winning keys from the winning tiles."""
        n_rows, block = self.batch * self.heads * self.rows, 128 if class_raw is None else 32
        sinks = self._sinks()
        finish_kernel[(cdiv(n_rows, block),)](
            raw, raw if class_raw is None else class_raw, self.seen.lo, self.seen.hi, raw if sinks is None else sinks,
            batched(self.seen.lo),
            raw.shape[1], self.heads, self.rows, n_rows, splits,
            GIVEN=given, **{_FLAGS[name]: slots.get(name, -1) for name in _SLOTS}, WIN=slots.get("win", -1),
            CLASSES=0 if class_raw is None else class_raw.shape[-1], SINK_LOGITS=sinks is not None, BR=block, num_warps=4,
        )  # fmt: skip
        argmax = None
        if "win" in slots:
            call, win = self.call, raw[0, slots["win"]]
            order = torch.sort(win, dim=-1).indices
            argmax = torch.empty(self.batch, self.heads, self.rows, dtype=torch.int64, device=raw.device)
            if POISON:
                argmax.fill_(-7)
            lo, hi, *element = self.mask_pointers()
            argmax_kernel[(cdiv(self.rows, tile.rows), self.batch * self.heads)](
                call.q, operand(call.k, tile.keys, tma), win, order, argmax, lo, hi, *element,
                *call.q.stride(), *call.k.stride(), *self.mask_strides(), *self.scales, self.heads, call.group, self.rows, self.keys,
                call.key_offset, ELEMENT=self.seen.element, SOFTCAP=self.softcap, D=self.width, DP=padded(self.width),
                BM=tile.rows, BN=tile.keys, TMA=tma, UPCAST=self.upcast, num_warps=tile.warps, num_stages=1,
            )  # fmt: skip
        return _Row(raw, slots, class_raw, argmax)

    def _sweep_columns(self, names: tuple[str, ...], lse: Tensor) -> dict[str, Tensor]:
        call, request = self.call, self.request
        assert request is not None
        tile = tile_for("columns", call.q.device, call.q.dtype, self.width)
        if "diagonal_sum" in names and tile.keys > tile.rows:
            tile = tile._replace(keys=tile.rows)
        cell, q_shift, k_shift, cells_q, cells_k = self.cell(tile, names)
        made = self._column_buffers(names, cells_q, cells_k)
        start, length = diagonal_range(call)
        segments = request.segment_count if "segment_mass" in names else 0
        if "diagonal_sum" in names:
            made["diagonal_sum"] = torch.zeros(self.batch, self.heads, length, device=call.q.device)
        text_q = text_k = self.seen.lo
        if segments:
            made["segment_mass"] = torch.zeros(self.batch, self.heads, segments, segments, device=call.q.device)
            text_q = by_position(request.segments, call.query_offset, self.rows, -1, call.q.device).to(torch.int32)
            text_k = by_position(request.segments, call.key_offset, self.keys, -1, call.q.device).to(torch.int32)
        dummy = lse
        tma = tile.descriptors and describable(call.q, call.k)
        lo, hi = request.fai_band
        key_lo, key_hi, *element = self.mask_pointers(columns=True)
        reference = self._reference(lse, self.counted, q_shift, tile.rows)
        columns_kernel[(cdiv(self.keys + k_shift, tile.keys), self.batch * self.heads)](
            operand(call.q, tile.rows, tma), operand(call.k, tile.keys, tma), reference, key_lo, key_hi, self.seen.dense, *element,
            *(made.get(name, dummy) for name in ("column_sum", "fai", "block_mass", "block_max", "diagonal_sum")), text_q, text_k,
            made.get("segment_mass", dummy),
            *call.q.stride(), *call.k.stride(), reference.shape[2], batched(key_lo), batched(self.seen.dense),
            *self.mask_strides(columns=True)[1:],
            batched(text_q), batched(text_k), *self.scales, self.heads, call.group, self.rows, self.keys, call.query_offset,
            call.key_offset,
            q_shift, k_shift, self.near(names), lo, FAR if hi is None else hi, cells_q, cells_k, start, length, segments,
            COLUMNS="column_sum" in made, FAI=("fai" in made) * (2 if hi is None else 1), MASS="block_mass" in made,
            TOP="block_max" in made,
            CELL=cell, DIAGONAL="diagonal_sum" in made, SEGMENTED=segments > 0, GUARD=call.mask.query_valid is not None,
            ELEMENT=self.seen.element, SOFTCAP=self.softcap,
            CAUSAL=call.mask.causal, D=self.width, DP=padded(self.width), BM=tile.rows, BN=tile.keys, TMA=tma,
            UPCAST=self.upcast, **tile.options,
        )  # fmt: skip
        return made

    def _pairs(self, lse: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        call = self.call
        queries, keys = (torch.atleast_2d(x.to(call.q.device, torch.int64)).contiguous() for x in (queries, keys))
        queries, keys = (x.expand(max(queries.shape[0], keys.shape[0]), -1).contiguous() for x in (queries, keys))
        out = _empty(call.q, self.batch, self.heads, queries.shape[1])
        if out.numel() == 0:
            return out
        block = 64 if self.width <= 128 else 32
        pairs_kernel[(cdiv(queries.shape[1], block), self.batch * self.heads)](
            call.q, call.k, lse.contiguous(), queries, keys, out, *self.mask_pointers(), *call.q.stride(), *call.k.stride(),
            batched(queries),
            *self.mask_strides(), *self.scales, self.heads, call.group, self.rows, self.keys, queries.shape[1], call.query_offset,
            call.key_offset, ELEMENT=self.seen.element, SOFTCAP=self.softcap, D=self.width, DP=padded(self.width), BP=block, num_warps=4,
        )  # fmt: skip
        return out

    # buffers and results

    def _splits(self, programs: int, tile: Tile) -> int:
        """Into how many pieces the keys of a row are cut, so that few rows (decode) still fill the device."""
        wanted = cdiv(2 * processors(self.call.q.device), programs)
        return max(1, min(wanted, self.keys // (4 * tile.keys) + 1, 128))

    def _reference(self, lse: Tensor, counted: Tensor | None, shift: int = 0, multiple: int = 1) -> Tensor:
        """lse in log2 units, +inf on rows that do not count or see nothing, so that their weights are zero. With `shift` such rows in front
        and enough behind for a multiple of `multiple`, so that whole tiles can be read."""
        total = cdiv(self.rows + shift, multiple) * multiple
        out = torch.full((self.batch, self.heads, total), torch.inf, device=lse.device)
        keep = lse == lse if counted is None else (lse == lse) & counted[:, None]
        out[:, :, shift : shift + self.rows] = torch.where(keep, lse * LOG2E, torch.inf)
        return out

    def _slots(self, names: tuple[str, ...]) -> dict[str, int]:
        """Where in `raw` each statistic is accumulated; "win" is the number of the key tile with the row's largest score."""
        slots = {name: 2 + i for i, name in enumerate(name for name in _SLOTS if name in names)}
        return {**slots, "win": 2 + len(slots)} if "argmax" in names else slots

    def _sinks(self) -> Tensor | None:
        sinks = self.call.sink_logits
        return None if sinks is None else sinks.to(self.call.q.device, torch.float32).contiguous()

    def _first(self) -> Tensor:
        """[B or 1, 1] int64: absolute position of each sequence's first real token."""
        first = self.call.first_token
        return zero(self.call.q.device) if first is None else first.to(self.call.q.device).view(-1, 1)

    def _column_buffers(self, names: tuple[str, ...], cells_q: int, cells_k: int) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in ("column_sum", "fai"):
            if name in names or (name == "column_sum" and "sink_importance" in names):
                made[name] = _empty(self.call.q, self.batch, self.heads, self.keys)
        for name in ("block_mass", "block_max"):
            if name in names:
                # tiles in which nothing is visible are never visited: their cells stay zero
                made[name] = torch.zeros(self.batch, self.heads, cells_q, cells_k, device=self.call.q.device)
        return made

    def _take_rows(self, result: PartialStatistics, row: _Row, names: tuple[str, ...]) -> None:
        if "lse" in names:
            result.rows["lse"] = row.raw[0, 0]
        if "row_max" in names:
            result.rows["row_max"] = row.raw[0, 1]
        for name in _SLOTS:
            if name in names:
                result.rows[name] = row.raw[0, row.slots[name]]
        if row.argmax is not None:
            result.rows["argmax"] = row.argmax
        if row.classes is not None and self.request is not None:
            result.rows["class_mass"] = row.classes[0][..., : self.request.classes]

    def _take_columns(self, result: PartialStatistics, made: dict[str, Tensor]) -> None:
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


_FLAGS = {
    "entropy": "ENTROPY", "distance": "DISTANCE", "distance_sq": "SQUARE", "waad": "WAAD", "sink_mass": "SINK", "local_mass": "LOCAL",
}  # fmt: skip


def _empty(like: Tensor, *shape: int) -> Tensor:
    return _poisoned(torch.empty(shape, dtype=torch.float32, device=like.device))


def _poisoned(x: Tensor) -> Tensor:
    return x.fill_(torch.nan) if POISON else x


def _device(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device: make it the tensor's own."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
