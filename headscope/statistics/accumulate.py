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
from headscope.statistics.offload import Arriving, fetch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall, MaskFacts
    from headscope.statistics.partial import PartialStatistics
    from headscope.statistics.request import LayerCollector, StatisticsRequest

LARGE = 1 << 16
"""Row tensors of at least this many numbers start for the CPU at once; smaller ones (decode rows) wait for `finish`: fewer transfers."""
MANY = 256
"""Calls of at least this many rows (a prefill, its chunks) start their columns and maps for the CPU at once; a decode step's are added up
on the device."""
FOLD = 4
"""Pieces of one grid that may wait on the CPU to be added up."""


class Grid:
    """A tensor whose last dimensions grow as pieces are placed into it, by addition or maximum; cells nobody touched are 0."""

    def __init__(self, how: Literal["add", "max"]) -> None:
        self.how = how
        self.data: Tensor | None = None
        self.size: tuple[int, ...] = ()
        self._away: list[tuple[Arriving, tuple[int, ...]]] = []

    def expect(self, piece: Arriving, *offsets: int) -> None:
        """Combine a piece that is on its way to the CPU."""
        self._away.append((piece, offsets))
        if len(self._away) > FOLD:
            self._fold()

    def _fold(self) -> None:
        """What has arrived becomes one piece: itself where it is alone, else all of them and `data` combined on the CPU."""
        if not self._away:
            return
        offsets = self._away[0][1]
        if len(self._away) == 1 and self.data is None and not any(offsets):
            return
        total = Grid(self.how)
        for piece, at in self._away:
            total.place(piece.result(), *at)
        if self.data is not None:
            total.place(self.data[_cells(*((0, length) for length in self.size))], *(0 for _ in offsets))
        self.data, self.size = None, ()
        assert total.data is not None
        self._away = [(Arriving(total.data[_cells(*((0, length) for length in total.size))].contiguous()), tuple(0 for _ in offsets))]

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
        self._fold()
        if self._away:
            return self._away[0][0].result()
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
        facts = {name: fact for name, fact in call.facts.items() if not isinstance(fact, torch.Tensor)}
        q = call.q.detach().to("cpu", copy=True)
        self.calls.append(replace(call, q=q, k=call.k[:, :, :0], v=None, mask=_mask_to_cpu(call), facts=facts))
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
        self._rows: dict[str, list[Tensor | Arriving]] = {}
        self._means: dict[str, Arriving] = {}
        self._grids: dict[str, Grid] = {}
        self._diagonals: tuple[Tensor, int] | None = None
        self._pairs: dict[str, Tensor] = {}
        self._valid: list[Tensor] = []
        self._handed_over: dict[str, Tensor] | None = None

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
        if self._handed_over is not None:
            why = f"the layer was handed to collect= at {self.end} tokens"
            raise refusal(CaptureError, f"{call!r}", why, "collect the text alone, without generating")
        self.spans.append((call.query_offset, rows))
        self.end += rows
        self.kernels.add(call.kernel)
        valid = call.mask.query_valid
        self._valid.append(torch.ones(batch, rows, dtype=torch.bool) if valid is None else valid.expand(batch, rows).to("cpu"))
        self._means.clear()
        away: dict[str, Tensor] = {}
        far = call.q.is_cuda and rows >= MANY
        for name, value in partial.rows.items():
            if value.is_cuda and value.numel() >= LARGE:
                away[name] = value
            else:
                self._rows.setdefault(name, []).append(value)
        sums = {**partial.columns, **partial.counts}
        for name, value in sums.items():
            if far and value.numel() >= LARGE:
                away[name] = value
            else:
                self._grid(name, "add").place(value, partial.key_offset)
        if partial.counts and call.mask.causal and call.key_offset:
            self._count_for_dropped_keys(call)
        block = self.request.block
        places: dict[str, tuple[int, ...]] = dict.fromkeys(partial.maps, (partial.query_offset // block, partial.key_offset // block))
        if "segment_mass" in places:
            places["segment_mass"] = (0, 0)
        for name, value in partial.maps.items():
            if far and value.numel() >= LARGE:
                away[name] = value
            else:
                self._grid(name, _how(name)).place(value, *places[name])
        # while this is the only call, its means are final: divided where the numbers are
        means = {}
        if far and len(self.spans) == 1 and not call.key_offset:
            for name, (over, count) in _MEANS.items():
                if name in self.request.names and over in away and count in sums:
                    means[name] = _divide(away[over], sums[count])
        for name, one in zip([*away, *means], fetch([*away.values(), *means.values()]), strict=True):
            if name in means:
                self._means[name] = one
            elif name in partial.rows:
                self._rows.setdefault(name, []).append(one)
            else:
                self._grid(name, _how(name)).expect(one, *places.get(name, (partial.key_offset,)))
        if partial.diagonals is not None:
            self._add_diagonals(partial.diagonals.to("cpu"), partial.diagonal_start)
        for name, value in partial.pairs.items():
            old = self._pairs.get(name)
            self._pairs[name] = value if old is None else torch.where(old.isnan(), value.to(old.device), old)
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

    def hand_over(self, collect: LayerCollector) -> None:
        """Gives everything measured to a collector, and keeps only what it gives back."""
        self._handed_over = collect(self.module, self.finish()[0], self.kept)
        self.kept = None
        self._rows.clear()
        self._means.clear()
        self._grids.clear()
        self._diagonals = None

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The statistics asked for (name -> tensor, as HeadStatistics documents) and the pairs (name -> [B, H, P]), on the CPU."""
        if self._handed_over is not None:
            return dict(self._handed_over), {name: pairs.to("cpu") for name, pairs in self._pairs.items()}
        wanted = self.request.names
        out: dict[str, Tensor] = {}
        for name, pieces in self._rows.items():
            if name in wanted:
                here = [piece.result() if isinstance(piece, Arriving) else piece.to("cpu") for piece in pieces]
                out[name] = _front_padded(here[0] if len(here) == 1 else torch.cat(here, 2), self.start)
        sums = {name: grid.value() for name, grid in self._grids.items()}
        if "column_sum" in wanted and "column_sum" in sums:
            out["column_sum"] = sums["column_sum"]
        if "sink_importance" in wanted and "column_sum" in sums:
            out["sink_importance"] = self._mean("sink_importance", sums)
        if "fai" in wanted and "fai_sum" in sums:
            out["fai"] = self._mean("fai", sums)
        out |= {name: sums[name] for name in ("block_mass", "block_max", "segment_mass") if name in wanted and name in sums}
        if "diagonal_sum" in wanted and self._diagonals is not None:
            out["diagonal_sum"] = self._diagonals[0]
        return {name: out[name] for name in wanted if name in out}, {name: pairs.to("cpu") for name, pairs in self._pairs.items()}

    def _mean(self, name: str, sums: dict[str, Tensor]) -> Tensor:
        """A sum over its count: as the device divided it, or now, where several calls make up the sum."""
        over, count = _MEANS[name]
        return self._means[name].result() if name in self._means else _divide(sums[over], sums[count])


_MEANS = {"sink_importance": ("column_sum", "row_count"), "fai": ("fai_sum", "fai_count")}
"""Statistics that are a sum over a count."""


def _how(name: str) -> Literal["add", "max"]:
    return "max" if name == "block_max" else "add"


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
    return (total / parts.clamp_min(1)).masked_fill(parts <= 0, float("nan"))
