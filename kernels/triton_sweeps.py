"""Launches of the two sweeps and of the pair gather for one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.errors import CaptureError, refusal
from headscope.kernels import triton_interior as interior
from headscope.kernels import triton_run
from headscope.kernels.triton_columns import columns_kernel
from headscope.kernels.triton_finish import argmax_kernel, finish_kernel
from headscope.kernels.triton_gather import pairs_kernel
from headscope.kernels.triton_host import by_position, cdiv, describable, diagonal_range, operand, padded
from headscope.kernels.triton_launch import Tile, tile_for
from headscope.kernels.triton_rows import rows_kernel
from headscope.kernels.triton_run import FLAGS, SLOTS, Run, empty, poisoned
from headscope.kernels.triton_visibility import batched

if TYPE_CHECKING:
    from torch import Tensor

FAR = 1 << 30


@dataclass(slots=True, eq=False)
class Row:
    """What sweep 1 left behind: `raw` [splits, slots, B, H, Nq] finished in place in split 0, and where each statistic is in it."""

    raw: Tensor
    slots: dict[str, int]
    classes: Tensor | None
    argmax: Tensor | None


class Sweeps(Run):
    """A call's launches."""

    def sweep_rows(self, names: tuple[str, ...], lse: Tensor | None, output: bool) -> Row:
        """Sweep 1: the named row statistics (and the attention output, into `out`)."""
        call, request = self.call, self.request
        assert request is not None
        if output and call.v is None:
            raise refusal(CaptureError, f"{call!r}", "its values were not kept, and the output is made of them", "pass a call with v")
        tile = tile_for("out" if output else "rows", call.q.device, call.q.dtype, self.width)
        slots = self.slots(names)
        classes = max(16, padded(request.classes)) if "class_mass" in names else 0
        splits = 1 if output else self.splits(cdiv(self.rows, tile.rows) * self.batch * self.heads, tile)
        raw = empty(call.q, splits, 2 + len(slots), self.batch, self.heads, self.rows)
        class_raw = empty(call.q, splits, self.batch, self.heads, self.rows, classes) if classes else None
        if output:
            assert call.v is not None
            self.out = poisoned(torch.empty(self.batch, self.heads, self.rows, call.v.shape[3], dtype=call.v.dtype, device=call.v.device))
        reference = None if lse is None else self.reference(lse, None)
        if output and self.out is not None and reference is None and interior.takes_forward(self, names):
            tile = tile_for("rows", call.q.device, call.q.dtype, self.width)
            tma = tile.descriptors
            interior.launch_forward(self, names, raw[0], slots, self.out)
        else:
            tma = self.launch_rows(names, slots, raw, class_raw, splits, reference, tile, self.near(names), edges=False)
        return self.finish(raw, class_raw, slots, splits, lse is not None, tile, tma)

    def launch_rows(self, names: tuple[str, ...], slots: dict[str, int], raw: Tensor, class_raw: Tensor | None, splits: int,
                    reference: Tensor | None, tile: Tile, near: int, edges: bool) -> bool:  # fmt: skip
        """`rows_kernel` into `raw`; whether it read its operands through descriptors."""
        call, request = self.call, self.request
        assert request is not None
        v, out = (call.q, call.q) if self.out is None or call.v is None else (call.v, self.out)
        tma = tile.descriptors and describable(call.q, call.k, v)
        sinks, first = self.sinks(), self.first()
        labels = self.seen.lo
        if class_raw is not None:
            labels = by_position(request.labels, call.key_offset, self.keys, -1, raw.device).to(torch.int32)
        rows_kernel[(cdiv(self.rows, tile.rows), self.batch * self.heads, splits)](
            operand(call.q, tile.rows, tma), operand(call.k, tile.keys, tma), operand(v, tile.keys, tma),
            raw if reference is None else reference, raw if sinks is None else sinks,
            self.seen.lo, self.seen.hi, self.seen.dense, first, *self.mask_pointers()[2:], labels,
            raw, raw if class_raw is None else class_raw, out, *call.q.stride(), *call.k.stride(), *v.stride(), *out.stride()[:3],
            batched(self.seen.lo), batched(self.seen.dense), batched(first), *self.mask_strides()[1:], batched(labels), raw.shape[1],
            *self.scales, self.heads, call.group, self.rows, self.keys, call.query_offset, call.key_offset, near,
            request.sink_tokens, request.local_window, request.waad_window, splits, 0 if reference is None else reference.shape[2],
            EDGES=edges, GIVEN=reference is not None, **{FLAGS[name]: slots.get(name, -1) for name in SLOTS}, ROWMAX="row_max" in names,
            WIN=slots.get("win", -1), CLASSES=0 if class_raw is None else class_raw.shape[-1], OUT=self.out is not None,
            ELEMENT=self.seen.element, SOFTCAP=self.softcap, CAUSAL=call.mask.causal,
            D=self.width, DP=padded(self.width), DV=v.shape[3], DVP=padded(v.shape[3]), BM=tile.rows, BN=tile.keys,
            SINK_LOGITS=sinks is not None, TMA=tma, UPCAST=self.upcast, **tile.options,
        )  # fmt: skip
        return tma

    def finish(self, raw: Tensor, class_raw: Tensor | None, slots: dict[str, int], splits: int, given: bool, tile: Tile,
                tma: bool) -> Row:  # fmt: skip
        """Values from accumulators, and the winning keys from the winning tiles."""
        n_rows, block = self.batch * self.heads * self.rows, 128 if class_raw is None else 32
        sinks = self.sinks()
        finish_kernel[(cdiv(n_rows, block),)](
            raw, raw if class_raw is None else class_raw, self.seen.lo, self.seen.hi, raw if sinks is None else sinks,
            batched(self.seen.lo),
            raw.shape[1], self.heads, self.rows, n_rows, splits,
            GIVEN=given, **{FLAGS[name]: slots.get(name, -1) for name in SLOTS}, WIN=slots.get("win", -1),
            CLASSES=0 if class_raw is None else class_raw.shape[-1], SINK_LOGITS=sinks is not None, BR=block, num_warps=4,
        )  # fmt: skip
        argmax = None
        if "win" in slots:
            call, win = self.call, raw[0, slots["win"]]
            order = torch.sort(win, dim=-1).indices
            argmax = torch.empty(self.batch, self.heads, self.rows, dtype=torch.int64, device=raw.device)
            if triton_run.POISON:
                argmax.fill_(-7)
            lo, hi, *element = self.mask_pointers()
            argmax_kernel[(cdiv(self.rows, tile.rows), self.batch * self.heads)](
                call.q, operand(call.k, tile.keys, tma), win, order, argmax, lo, hi, *element,
                *call.q.stride(), *call.k.stride(), *self.mask_strides(), *self.scales, self.heads, call.group, self.rows, self.keys,
                call.key_offset, ELEMENT=self.seen.element, SOFTCAP=self.softcap, D=self.width, DP=padded(self.width),
                BM=tile.rows, BN=tile.keys, TMA=tma, UPCAST=self.upcast, num_warps=tile.warps, num_stages=1,
            )  # fmt: skip
        return Row(raw, slots, class_raw, argmax)

    def sweep_columns(self, names: tuple[str, ...], lse: Tensor, near: int | None = None) -> dict[str, Tensor]:
        """Sweep 2: the named column statistics and maps. With `near`, only what `launch_interior` leaves at that distance."""
        call, request = self.call, self.request
        assert request is not None
        tile = tile_for("columns", call.q.device, call.q.dtype, self.width)
        if "diagonal_sum" in names and tile.keys > tile.rows:
            tile = tile._replace(keys=tile.rows)
        cell, q_shift, k_shift, cells_q, cells_k = self.cell(tile, names)
        made = self.column_buffers(names, cells_q, cells_k)
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
        reference = self.reference(lse, self.counted, q_shift, tile.rows)
        columns_kernel[(cdiv(self.keys + k_shift, tile.keys), self.batch * self.heads)](
            operand(call.q, tile.rows, tma), operand(call.k, tile.keys, tma), reference, key_lo, key_hi, self.seen.dense, *element,
            *(made.get(name, dummy) for name in ("column_sum", "fai", "block_mass", "block_max", "diagonal_sum")), text_q, text_k,
            made.get("segment_mass", dummy),
            *call.q.stride(), *call.k.stride(), reference.shape[2], batched(key_lo), batched(self.seen.dense),
            *self.mask_strides(columns=True)[1:],
            batched(text_q), batched(text_k), *self.scales, self.heads, call.group, self.rows, self.keys, call.query_offset,
            call.key_offset,
            q_shift, k_shift, self.near(names) if near is None else near, lo, FAR if hi is None else hi, cells_q, cells_k, start, length,
            segments,
            EDGES=near is not None, COLUMNS="column_sum" in made, FAI=("fai" in made) * (2 if hi is None else 1), MASS="block_mass" in made,
            TOP="block_max" in made,
            CELL=cell, DIAGONAL="diagonal_sum" in made, SEGMENTED=segments > 0, GUARD=call.mask.query_valid is not None,
            ELEMENT=self.seen.element, SOFTCAP=self.softcap,
            CAUSAL=call.mask.causal, D=self.width, DP=padded(self.width), BM=tile.rows, BN=tile.keys, TMA=tma,
            UPCAST=self.upcast, **tile.options,
        )  # fmt: skip
        return made

    def fused(self, rows: tuple[str, ...], columns: tuple[str, ...], lse: Tensor, near: int) -> tuple[Row | None, dict[str, Tensor]]:
        """Rows, columns and maps of a call with an interior: each edge in its own sweep, the rest in one pass over the interior."""
        call = self.call
        slots = self.slots(rows)
        reference = self.reference(lse, None, 0, interior.ROWS)
        raw, tile, tma = None, tile_for("rows", call.q.device, call.q.dtype, self.width), False
        if rows:
            raw = empty(call.q, 1, 2 + len(slots), self.batch, self.heads, self.rows)
            tma = self.launch_rows(rows, slots, raw, None, 1, reference, tile, near, edges=True)
        made = self.sweep_columns(columns, lse, near) if columns else {}
        interior.launch(self, near, None if raw is None else raw[0], slots, rows, made, reference)
        return None if raw is None else self.finish(raw, None, slots, 1, True, tile, tma), made

    def pairs(self, lse: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Exact weights at pairs of positions: [B, H, P]."""
        call = self.call
        queries, keys = (torch.atleast_2d(x.to(call.q.device, torch.int64)).contiguous() for x in (queries, keys))
        queries, keys = (x.expand(max(queries.shape[0], keys.shape[0]), -1).contiguous() for x in (queries, keys))
        out = empty(call.q, self.batch, self.heads, queries.shape[1])
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
