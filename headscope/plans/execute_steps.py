"""StepExecutor: runs plans over denoising steps, where nothing is causal and the same tokens come again and again.

A model is told neither how many steps there are nor which one this is; what it is told is the time. A call of a layer with another time
than the layer's call before begins a new step, one with a greater time begins a new run (time falls from noise to picture), and several
calls with one time are the guidance branches of one step, each of which keeps its own tiles. Where a model's time is not known, every call
is a step.

Every row tile of a head keeps the same number of tiles, so that a step gathers them into one dense batch: nothing is computed and masked
away but the padding of a last, shorter tile.

The silent failure this avoids: tiles chosen for one picture and used for the next. A batch of another shape, or a time that rises, begins
a run anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headscope.capture.steps import IMAGE, TEXT
from headscope.errors import PlanError, refusal
from headscope.plans.dynamic_steps import HeldBlocks
from headscope.plans.patterns import Dense, Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

CELLS = 1 << 26
"""Scores that exist at a time."""


@dataclass(frozen=True, eq=False)
class _Held:
    """What was chosen: tiles [B, heads, row tiles, kept], the entries in them, and what the others go on giving (see `left_out`)."""

    tiles: Tensor
    cells: float
    rest: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class _Run:
    """Where a layer stands in a denoising run: the number of its step, the branch within, and per branch and pattern the kept tiles."""

    time: float | None = None
    step: int = -1
    branch: int = 0
    shape: tuple[int, ...] = ()
    tiles: dict[tuple[int, HeldBlocks], _Held] = field(default_factory=dict)


@dataclass(eq=False)
class StepExecutor:
    """Executes the patterns of a layer over denoising steps. `kept`, `entries`: (row, key) entries computed and of dense attention."""

    kept: float = 0.0
    entries: float = 0.0
    _runs: dict[int, _Run] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of the entries that was computed, over every step so far; NaN before the first."""
        return self.kept / self.entries if self.entries else math.nan

    def execute(self, call: AttentionCall, patterns: list[Pattern], report: Counter[str]) -> Tensor | None:
        """[B, Nq, Hq, Dv], or None for a step that all heads run dense. Raises PlanError for patterns of causal text."""
        held: dict[HeldBlocks, list[int]] = {}
        for head, pattern in enumerate(patterns):
            if isinstance(pattern, HeldBlocks):
                held.setdefault(pattern, []).append(head)
            elif not isinstance(pattern, Dense):
                raise refusal(
                    PlanError,
                    f"pattern {pattern.kind!r} of head {call.layer}.{head}",
                    "this layer is not causal, and the pattern says what a row may see of its past",
                    "give it Dense() or HeldBlocks(...)",
                )
        whole = float(call.q.shape[0] * call.q.shape[2] * call.k.shape[2])
        self.entries += whole * len(patterns)
        run = self._step(call)
        rest = [head for head, pattern in enumerate(patterns) if not isinstance(pattern, HeldBlocks) or pattern.dense_at(run.step)]
        self.kept += whole * len(rest)
        for pattern, heads in held.items():
            if pattern.chooses_at(run.step):
                tiles = choose_tiles(call, heads, pattern)
                carried = left_out(call, heads, tiles, pattern.block) if pattern.carry else None
                run.tiles[run.branch, pattern] = _Held(tiles, cells_of(call, tiles, pattern.block), carried)
        if len(rest) == len(patterns):
            report["host"] += 1
            return None
        output = call.q.new_empty(call.q.shape[0], call.q.shape[2], len(patterns), _values(call).shape[-1])
        for pattern, heads in held.items():
            if pattern.dense_at(run.step):
                continue
            found = run.tiles.get((run.branch, pattern))
            if found is None:
                raise refusal(
                    PlanError,
                    f"layer {call.layer} in step {run.step}",
                    f"guidance branch {run.branch} did not run in the step when tiles were chosen",
                    "run every branch in every step",
                )
            sparse = gathered_attention(call, heads, found.tiles, pattern.block)
            if found.rest is not None:
                sparse = ((1 - found.rest[0]) * sparse + found.rest[1]).to(sparse.dtype)
            output[:, :, heads] = sparse
            self.kept += found.cells
        if rest:
            output[:, :, rest] = dense_heads(call, rest)
        report["dense"] += len(rest)
        report["sparse"] += len(patterns) - len(rest)
        return output

    def _step(self, call: AttentionCall) -> _Run:
        """The layer's run, moved on to this call."""
        layer = int(call.layer or 0)
        run = self._runs.setdefault(layer, _Run())
        time, shape = time_of(call), (*call.q.shape, call.k.shape[2])
        if shape != run.shape or (time is not None and run.time is not None and time > run.time):
            run = self._runs[layer] = _Run(shape=shape)
        if time is not None and time == run.time:
            run.branch += 1
        else:
            run.step, run.branch, run.time = run.step + 1, 0, time
        return run


def time_of(call: AttentionCall) -> float | None:
    """The denoising time that the model was told, of the batch's first row; None where it was told none."""
    times = getattr(call.facts.get("step"), "timestep", None)
    if times is None:
        return None
    return float(times[0]) if isinstance(times, tuple | list) else float(times)


def choose_tiles(call: AttentionCall, heads: list[int], pattern: HeldBlocks) -> Tensor:
    """[B, heads, row tiles, kept] int64: the key tiles with the largest mean of A, ascending, for prompt and generated keys apart.

    A tile that holds both kinds counts among those that it holds more of.
    """
    size, keys = pattern.block, call.k.shape[2]
    count = -(-keys // size)
    parts = []
    for weights in _weights(call, heads, size):
        whole = torch.nn.functional.pad(weights, (0, count * size - keys, 0, -weights.shape[2] % size))
        parts.append(whole.unflatten(3, (count, size)).sum(-1).unflatten(2, (-1, size)).sum(3))
    mass = torch.cat(parts, 2) / _sizes(keys, size).to(parts[0])
    kept = []
    kinds = _kinds(call, size, count)
    words = len(kinds[TEXT]) if len(kinds) > 1 and TEXT in kinds else 0
    for label, members in kinds.items():
        number = pattern.tiles(len(members))
        if words and pattern.prompt == "all":
            number = words if label == TEXT else max(1, pattern.tiles(count) - words)
        best = mass[..., members].sort(dim=-1, descending=True, stable=True).indices[..., :number]
        kept.append(torch.tensor(members, device=best.device)[best])
    return torch.cat(kept, -1).sort(-1).values


def cells_of(call: AttentionCall, tiles: Tensor, size: int) -> float:
    """(row, key) entries in tiles [B, heads, row tiles, kept], over all sequences and heads."""
    rows, keys = (_sizes(count, size).double().to(tiles.device) for count in (call.q.shape[2], call.k.shape[2]))
    return float(keys[tiles].sum(-1).sum((0, 1)) @ rows)


def left_out(call: AttentionCall, heads: list[int], tiles: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(d [B, Nq, heads, 1], r [B, Nq, heads, Dv]) float32: the weight of each row outside its tiles, and what that weight brings."""
    rows, keys = call.q.shape[2], call.k.shape[2]
    index = torch.tensor(heads, device=call.q.device)
    values = _values(call)[:, index // call.group].float()
    kept = torch.zeros(*tiles.shape[:3], -(-keys // size), dtype=torch.bool, device=tiles.device).scatter_(-1, tiles, True)
    shares, parts, at = [], [], 0
    for weights in _weights(call, heads, size):
        row = torch.arange(at, at + weights.shape[2], device=kept.device) // size
        outside = weights.masked_fill(kept[:, :, row].repeat_interleave(size, -1)[..., :keys], 0.0)
        shares.append(outside.sum(-1, keepdim=True))
        parts.append(outside @ values)
        at += weights.shape[2]
    assert at == rows
    return torch.cat(shares, 2).transpose(1, 2), torch.cat(parts, 2).transpose(1, 2)


def dense_heads(call: AttentionCall, heads: list[int]) -> Tensor:
    """[B, Nq, heads, Dv]: full attention of some heads."""
    index = torch.tensor(heads, device=call.q.device)
    values = _values(call)[:, index // call.group].float()
    z = torch.cat([weights @ values for weights in _weights(call, heads)], 2)
    return z.transpose(1, 2).to(call.q.dtype)


def gathered_attention(call: AttentionCall, heads: list[int], tiles: Tensor, size: int) -> Tensor:
    """[B, Nq, heads, Dv]: every row tile against its own key tiles [B, heads, row tiles, kept], gathered into one batch."""
    batch, rows, keys = call.q.shape[0], call.q.shape[2], call.k.shape[2]
    index = torch.tensor(heads, device=call.q.device)
    at = (tiles[..., None] * size + torch.arange(size, device=tiles.device)).flatten(-2)  # [B, h, n, m]
    q = torch.nn.functional.pad(call.q[:, index], (0, 0, 0, -rows % size)).unflatten(2, (-1, size)).float()
    k, v = call.k[:, index // call.group].float(), _values(call)[:, index // call.group].float()
    out = torch.empty(*q.shape[:-1], v.shape[-1], device=q.device)
    valid = call.mask.key_valid
    step = max(1, CELLS // max(1, batch * len(heads) * size * at.shape[-1]))
    for first in range(0, q.shape[2], step):
        part = slice(first, first + step)
        place = at[:, :, part]
        reach = place.clamp(max=keys - 1).flatten(2)[..., None]
        near = k.gather(2, reach.expand(-1, -1, -1, k.shape[-1])).unflatten(2, place.shape[2:])
        scores = q[:, :, part] @ near.transpose(-1, -2) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        hidden = place >= keys
        if valid is not None:
            hidden = hidden | ~valid[:, None, :].expand(-1, len(heads), -1).gather(2, reach[..., 0]).view(place.shape)
        weights = torch.softmax(scores.masked_fill(hidden[..., None, :], -math.inf), -1).nan_to_num(nan=0.0)
        out[:, :, part] = weights @ v.gather(2, reach.expand(-1, -1, -1, v.shape[-1])).unflatten(2, place.shape[2:])
    return out.flatten(2, 3)[:, :, :rows].transpose(1, 2).to(call.q.dtype)


def _weights(call: AttentionCall, heads: list[int], size: int = 1) -> Iterator[Tensor]:
    """A [B, heads, rows, Nk] float32 of some heads, so many whole tiles of `size` rows at a time."""
    mask = call.mask
    if mask.bias is not None or mask.allowed is not None or mask.window is not None or mask.query_segments is not None:
        raise refusal(
            PlanError, f"layer {call.layer}", "its mask says more than which keys are padding, and tiles know no more", "give it Dense()"
        )
    index = torch.tensor(heads, device=call.q.device)
    k = call.k[:, index // call.group].float()
    step = max(1, CELLS // (k.shape[0] * k.shape[1] * k.shape[2] * size)) * size
    for first in range(0, call.q.shape[2], step):
        scores = call.q[:, index, first : first + step].float() @ k.transpose(-1, -2) * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if mask.key_valid is not None:
            scores = scores.masked_fill(~mask.key_valid[:, None, None, :], -math.inf)
        yield torch.softmax(scores, -1).nan_to_num(nan=0.0)


def _kinds(call: AttentionCall, size: int, count: int) -> dict[int, list[int]]:
    """The key tiles by what they hold most of: one list for a model with one kind of token."""
    streams = call.facts.get("streams")
    if not isinstance(streams, tuple):
        return {IMAGE: list(range(count))}
    label = torch.zeros(call.k.shape[2], dtype=torch.int64)
    for kind, first, end in streams:
        label[first:end] = kind
    most = [int(part.bincount().argmax()) for part in label.split(size)]
    return {one: [tile for tile, kind in enumerate(most) if kind == one] for one in sorted(set(most))}


def _values(call: AttentionCall) -> Tensor:
    if call.v is None:
        raise refusal(PlanError, repr(call), "it has no values, so there is no output to compute", "capture v as well")
    return call.v


def _sizes(keys: int, size: int) -> Tensor:
    """[tiles] int64: keys of each tile."""
    return torch.tensor([min(size, keys - first) for first in range(0, keys, size)])
