"""LayerAccumulator: puts the pieces of one sequence together, by absolute position.

A sequence reaches an attention module as one prefill, or as chunks, then as one row per decoded token, each with more keys than the last.
Every piece says where its rows and keys lie, so the pieces are placed rather than appended in the order they came: rows are joined,
columns and diagonals add up, map cells add or take the maximum, pairs are filled in where their row turned up. Divisions (sink importance,
FAI) happen once, in `finish`; a mean of means would weigh a decoded row like a whole prefill.

The silent failure this avoids: a cache that was cropped, or a second sequence that happens to continue at the same position, averaged into
the first. A piece whose rows do not start where the last one ended is refused here; telling sequences apart is the session's work.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.errors import CaptureError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall, MaskFacts
    from headscope.statistics.partial import PartialStatistics
    from headscope.statistics.request import StatisticsRequest

LARGE = 1 << 16
"""Row tensors of at least this many numbers go to the CPU at once; smaller ones (decode rows) wait for `finish`: fewer transfers."""


class Grid:
    """A tensor whose last dimensions grow as pieces are placed into it, by addition or maximum; cells nobody touched are 0."""

    def __init__(self, how: Literal["add", "max"]) -> None:
        self.how = how
        self.data: Tensor | None = None
        self.size: tuple[int, ...] = ()

    def place(self, piece: Tensor, *offsets: int) -> None:
        """Combine a piece into the cells that start at `offsets` (one per growing dimension, the last ones of the piece)."""
        count = len(offsets)
        need = tuple(offset + length for offset, length in zip(offsets, piece.shape[-count:], strict=True))
        self.size = tuple(map(max, need, self.size or need))
        if self.data is None:
            self.data = piece.new_zeros(*piece.shape[:-count], *self.size)
        capacity = self.data.shape[-count:]
        if any(want > have for want, have in zip(self.size, capacity, strict=True)):
            grown = [max(want, have if want <= have else 2 * have) for want, have in zip(self.size, capacity, strict=True)]
            larger = self.data.new_zeros(*self.data.shape[:-count], *grown)
            larger[_cells(*((0, length) for length in capacity))] = self.data
            self.data = larger
        cells = self.data[_cells(*zip(offsets, piece.shape[-count:], strict=True))]
        piece = piece.to(cells.device)
        if self.how == "add":
            cells += piece
        else:
            torch.maximum(cells, piece, out=cells)

    def value(self) -> Tensor:
        """The cells placed so far, on the CPU."""
        if self.data is None:
            raise RuntimeError("no piece was placed")
        return self.data[_cells(*((0, length) for length in self.size))].to("cpu").contiguous()


def _cells(*spans: tuple[int, int]) -> Any:
    """An index for the last dimensions, from (first cell, number of cells) each."""
    return (..., *(slice(first, first + count) for first, count in spans))


@dataclass(slots=True, eq=False)
class Kept:
    """q, k and the lse of one layer on the CPU: enough to recompute any window of A exactly.

    `calls` hold their q and mask; `keys` [B, Hkv, N, D] is shared by all of them; `lse` is each call's [B, Hq, Nq].
    """

    calls: list[AttentionCall] = field(default_factory=list)
    lse: list[Tensor] = field(default_factory=list)
    pieces: list[Tensor] = field(default_factory=list)
    start: int = 0
    end: int | None = None

    def add(self, call: AttentionCall, lse: Tensor) -> None:
        """Store a call's q and those of its keys that no earlier call brought."""
        if self.end is None:
            self.start = self.end = call.key_offset
        fresh = call.k[:, :, max(self.end - call.key_offset, 0) :]
        if fresh.shape[2]:
            self.pieces.append(fresh.detach().to("cpu", copy=True))
            self.end += fresh.shape[2]
        self.calls.append(replace(call, q=call.q.detach().to("cpu", copy=True), k=call.k[:, :, :0], v=None, mask=_mask_to_cpu(call)))
        self.lse.append(lse.detach().to("cpu", copy=True))

    def restored(self) -> list[tuple[AttentionCall, Tensor]]:
        """Every kept call with its keys back in place, and its lse."""
        if len(self.pieces) > 1:
            self.pieces = [torch.cat(self.pieces, 2)]
        out = []
        for call, lse in zip(self.calls, self.lse, strict=True):
            count = call.facts["kept_keys"]
            first = call.key_offset - self.start
            out.append((replace(call, k=self.pieces[0][:, :, first : first + int(str(count))]), lse))
        return out


def _mask_to_cpu(call: AttentionCall) -> MaskFacts:
    names = ("key_valid", "query_valid", "query_segments", "key_segments", "allowed", "bias")
    tensors = {name: getattr(call.mask, name) for name in names}
    return replace(call.mask, **{name: value.detach().to("cpu") for name, value in tensors.items() if value is not None})


class LayerAccumulator:
    """Everything measured of one attention module over one sequence."""

    def __init__(self, request: StatisticsRequest, module: str, keep: bool) -> None:
        self.request = request
        self.module = module
        self.start = 0
        self.end: int | None = None
        self.batch = 0
        self.spans: list[tuple[int, int]] = []
        self.kernels: set[str] = set()
        self.kept = Kept() if keep else None
        self._rows: dict[str, list[Tensor]] = {}
        self._grids: dict[str, Grid] = {}
        self._diagonals: tuple[Tensor, int] | None = None
        self._pairs: dict[str, Tensor] = {}
        self._valid: list[Tensor] = []

    def add(self, call: AttentionCall, partial: PartialStatistics) -> None:
        """Put one call's statistics in their place. Raises CaptureError when its rows do not follow the last call's."""
        batch, _, rows, _ = call.q.shape
        if self.end is None:
            self.start = self.end = call.query_offset
            self.batch = batch
        if call.query_offset != self.end or batch != self.batch:
            raise refusal(
                CaptureError,
                f"{call!r}",
                f"it does not continue a sequence of batch {self.batch} whose rows end at {self.end}",
                "observe each sequence in its own `with` block",
            )
        self.spans.append((call.query_offset, rows))
        self.end += rows
        self.kernels.add(call.kernel)
        valid = call.mask.query_valid
        self._valid.append(torch.ones(batch, rows, dtype=torch.bool) if valid is None else valid.expand(batch, rows).to("cpu"))
        for name, value in partial.rows.items():
            self._rows.setdefault(name, []).append(value.to("cpu") if value.numel() >= LARGE else value)
        for name, value in {**partial.columns, **partial.counts}.items():
            self._grid(name, "add").place(value, partial.key_offset)
        if partial.counts and call.mask.causal and call.key_offset:
            self._count_for_dropped_keys(call)
        block = self.request.block
        for name, value in partial.maps.items():
            if name == "segment_mass":
                self._grid(name, "add").place(value, 0, 0)
            else:
                how: Literal["add", "max"] = "max" if name == "block_max" else "add"
                self._grid(name, how).place(value, partial.query_offset // block, partial.key_offset // block)
        if partial.diagonals is not None:
            self._add_diagonals(partial.diagonals.to("cpu"), partial.diagonal_start)
        for name, value in partial.pairs.items():
            fresh = value.to("cpu")
            old = self._pairs.get(name)
            self._pairs[name] = fresh if old is None else torch.where(old.isnan(), fresh, old)
        if self.kept is not None:
            call.facts["kept_keys"] = call.k.shape[2]
            self.kept.add(call, partial.rows["lse"])

    def _count_for_dropped_keys(self, call: AttentionCall) -> None:
        """Rows also count for the keys that a sliding cache has dropped before this call: those are earlier, only out of sight."""
        from headscope.kernels.counts import eligible_rows, row_counts

        batch, _, rows, _ = call.q.shape
        dropped = call.k.new_empty(1).expand(batch, 1, call.key_offset, 1)
        counting = eligible_rows(call, self.request)
        if counting is None:
            counting = torch.ones(batch, rows, dtype=torch.bool, device=call.q.device)
        before = replace(call, k=dropped, key_offset=0, mask=replace(call.mask, key_valid=None))
        real = self.valid[:, : call.key_offset]
        real[:, : self.start] = True
        for name, value in row_counts(before, self.request, counting).items():
            self._grid(name, "add").place(value * real.to(value.device), 0)

    def _grid(self, name: str, how: Literal["add", "max"]) -> Grid:
        return self._grids.setdefault(name, Grid(how))

    def _add_diagonals(self, piece: Tensor, start: int) -> None:
        if self._diagonals is None:
            self._diagonals = (piece, start)
            return
        old, first = self._diagonals
        low = min(first, start)
        high = max(first + old.shape[-1], start + piece.shape[-1])
        total = old.new_zeros(*old.shape[:-1], high - low)
        total[..., first - low : first - low + old.shape[-1]] += old
        total[..., start - low : start - low + piece.shape[-1]] += piece
        self._diagonals = (total, low)

    @property
    def valid(self) -> Tensor:
        """[B, N] bool: the row was measured and is a real token; False before `start`."""
        if len(self._valid) > 1:
            self._valid = [torch.cat(self._valid, 1)]
        return torch.cat([torch.zeros(self.batch, self.start, dtype=torch.bool), *self._valid], 1)

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The statistics asked for (name -> tensor, as HeadStatistics documents) and the pairs (name -> [B, H, P]), on the CPU."""
        wanted = self.request.names
        out: dict[str, Tensor] = {}
        for name, pieces in self._rows.items():
            if name in wanted:
                out[name] = _front_padded(torch.cat([piece.to("cpu") for piece in pieces], 2), self.start)
        sums = {name: grid.value() for name, grid in self._grids.items()}
        if "column_sum" in wanted and "column_sum" in sums:
            out["column_sum"] = sums["column_sum"]
        if "sink_importance" in wanted and "column_sum" in sums:
            out["sink_importance"] = _divide(sums["column_sum"], sums["row_count"])
        if "fai" in wanted and "fai_sum" in sums:
            out["fai"] = _divide(sums["fai_sum"], sums["fai_count"])
        out |= {name: sums[name] for name in ("block_mass", "block_max", "segment_mass") if name in wanted and name in sums}
        if "diagonal_sum" in wanted and self._diagonals is not None:
            out["diagonal_sum"] = self._diagonals[0]
        return {name: out[name] for name in wanted if name in out}, dict(self._pairs)


def _front_padded(rows: Tensor, start: int) -> Tensor:
    """Rows moved to their absolute position: NaN (argmax: -1) stands for those before the first one observed."""
    if not start:
        return rows.contiguous()
    shape = list(rows.shape)
    shape[2] = start
    return torch.cat([rows.new_full(shape, float("nan") if rows.is_floating_point() else -1), rows], 2)


def _divide(total: Tensor, count: Tensor) -> Tensor:
    """total [B, H, N] / count [B, N], NaN where nothing was counted."""
    parts = count.unsqueeze(1)
    return torch.where(parts > 0, total / parts.clamp_min(1), total.new_tensor(float("nan")))
