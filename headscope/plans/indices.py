"""Choosing keys per input: the rules of dynamic patterns, brought to static patterns of one call.

A rule reads q and k of a call and gives, per sequence and head, a static pattern (`Lines`, `Blocks`, `Chosen`), so that whatever executes
static patterns executes these too, and a test can compare the choice with the rule's definition. Nothing here builds an N x N matrix except
rule "exact", whose block masses come from the statistics kernels.

Chosen blocks of a call that starts in the middle of a text (a chunk of a prefill) are in absolute tiles; rows are those of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from headscope.errors import PlanError, refusal
from headscope.kernels.gather import window_scores
from headscope.plans.dynamic import Budget, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_rules import Choosing
from headscope.plans.patterns import Blocks, Lines, Pattern
from headscope.plans.remembered import Newest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


@dataclass(frozen=True)
class Chosen(Pattern):
    """Keys by list, and every key from `since` on: what decoding sees after keys were chosen once."""

    columns: tuple[int, ...]
    since: int
    kind = "chosen"

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """s in columns, or s >= since."""
        seen = torch.isin(keys, torch.tensor(self.columns, dtype=torch.int64)) | (keys >= self.since)
        return seen[None, :].expand(len(rows), -1)

    def kept(self, length: int) -> float:
        rest = max(0, length - self.since)
        return sum(max(0, length - one) for one in self.columns if one < self.since) + rest * (rest + 1) / 2

    def cached(self, length: int) -> float:
        return len([one for one in self.columns if one < min(self.since, length)]) + max(0, length - self.since)


def element(call: AttentionCall, b: int) -> AttentionCall:
    """One sequence of a call, as a call of its own."""

    def part(value: Tensor | None) -> Tensor | None:
        return None if value is None else value if value.shape[0] == 1 and call.q.shape[0] > 1 else value[b : b + 1]

    mask = call.mask
    return replace(
        call,
        q=call.q[b : b + 1],
        k=call.k[b : b + 1],
        v=part(call.v),
        first_token=None if call.first_token is None else call.first_token[b : b + 1],
        mask=replace(
            mask,
            key_valid=part(mask.key_valid),
            query_valid=part(mask.query_valid),
            query_segments=part(mask.query_segments),
            key_segments=part(mask.key_segments),
            allowed=part(mask.allowed),
            bias=part(mask.bias),
        ),
    )


def choose(call: AttentionCall, head: int, pattern: Pattern) -> Pattern:
    """The static pattern that a rule gives for one head of a call of one sequence; static patterns are returned as they are."""
    rules: dict[type[Pattern], Callable[[AttentionCall, int, Pattern], Pattern]] = {
        VerticalSlash: vertical_slash,
        TopBlocks: top_blocks,
        Budget: budget,
        TopKeys: top_keys,
    }
    if pattern.static:
        return pattern
    if isinstance(pattern, Choosing):
        return pattern.choose(call, head)
    if type(pattern) not in rules:
        raise refusal(PlanError, f"{pattern}", "there is no rule for it", f"use one of {', '.join(cls.kind for cls in rules)}")
    return rules[type(pattern)](call, head, pattern)


def _start(call: AttentionCall) -> int:
    return 0 if call.first_token is None else int(call.first_token[0])


def last_weights(call: AttentionCall, head: int, count: int) -> tuple[Tensor, int]:
    """(A [rows, keys] float64 of the last `count` rows over the keys of the text, position of its first row)."""
    start, rows, keys = _start(call), call.q.shape[2], call.k.shape[2]
    first = max(rows - count, start - call.query_offset, 0)
    skip = max(0, start - call.key_offset)
    at = torch.arange(first, rows, device=call.q.device)
    scores = window_scores(call, head, at, torch.arange(skip, keys, device=call.q.device))[0]
    return torch.softmax(scores, -1).cpu(), first + call.query_offset - start


def _members(call: AttentionCall, head: int, grouped: bool) -> Sequence[int]:
    """The heads whose mean weights a head chooses by."""
    first = head // call.group * call.group
    return range(first, first + call.group) if grouped else [head]


def _largest(values: Tensor, count: int) -> list[int]:
    """The places of the `count` largest values, the first of equals, ascending."""
    order = values.sort(descending=True, stable=True).indices[: max(0, min(count, len(values)))]
    return sorted(order.tolist())


def vertical_slash(call: AttentionCall, head: int, pattern: Pattern) -> Lines:
    """Columns and diagonals with the largest sums over the last rows (MInference); the first columns and the nearest diagonals always."""
    assert isinstance(pattern, VerticalSlash)
    rows, first = last_weights(call, head, pattern.last_q)
    count, length = rows.shape
    columns = rows.sum(0)
    columns[: pattern.sink] = torch.inf
    diagonals = torch.zeros(length, dtype=rows.dtype)
    for place in range(count):
        end = first + place + 1
        diagonals[:end] += rows[place, :end].flip(-1)
    diagonals[: pattern.window] = torch.inf
    return Lines(
        tuple(_largest(columns, max(pattern.vertical, pattern.sink))), tuple(_largest(diagonals, max(pattern.slash, pattern.window)))
    )


def top_blocks(call: AttentionCall, head: int, pattern: Pattern) -> Blocks:
    """Key tiles per row tile by the pattern's estimate of their mass; the first tile and the diagonal one always."""
    assert isinstance(pattern, TopBlocks)
    mass, first = block_estimate(call, head, pattern)
    kept: list[tuple[int, ...]] = [tuple(range(tile + 1)) for tile in range(first)]
    for tile, row in enumerate(mass, start=first):
        visible = row[: tile + 1]
        forced = {0, tile}
        if pattern.rule == "anchor":
            anchor = max(float(visible[0]), float(visible[tile]))
            chosen = {at for at, value in enumerate(visible.tolist()) if value + float(pattern.mass or 0.0) >= anchor}
        elif pattern.share is not None:
            chosen = set(_largest(visible, max(1, round(pattern.share * (tile + 1)))))
        else:
            ranked, order = visible.sort(descending=True, stable=True)
            before = ranked.cumsum(0) - ranked
            chosen = set(order[before < (float(pattern.mass or 1.0) - 1e-9) * visible.sum()].tolist())
        kept.append(tuple(sorted(chosen | forced)))
    return Blocks(tuple(kept), pattern.block)


_newest: Newest[tuple[Tensor, int]] = Newest()


def block_estimate(call: AttentionCall, head: int, pattern: TopBlocks) -> tuple[Tensor, int]:
    """([row tiles of the call, key tiles] float64, number of the first row tile). Each row is a distribution over the tiles that it sees;
    for rule "anchor" it is the largest scaled score of the pooled query in the tile, in nats.
    """
    key = (head, pattern.rule, pattern.block, pattern.stride)
    return _newest.of(call, key, lambda: _block_estimate(call, head, pattern))


def _block_estimate(call: AttentionCall, head: int, pattern: TopBlocks) -> tuple[Tensor, int]:
    start, size = _start(call), pattern.block
    skip_q, skip_k = max(0, start - call.query_offset), max(0, start - call.key_offset)
    origin = call.query_offset + skip_q - start
    if origin % size:
        raise refusal(
            PlanError,
            f"a chunk that starts at position {origin}",
            f"tiles of {size} tokens are chosen whole",
            f"use chunks of a multiple of {size}",
        )
    q = call.q[0, head, skip_q:].double().cpu()
    k = call.k[0, head // call.group, skip_k:].double().cpu()
    first, tiles = origin // size, -(-len(k) // size)
    gap = torch.arange(first, first + -(-len(q) // size))[:, None] - torch.arange(tiles)
    if pattern.rule == "exact":
        return _exact(call, head, size, first, tiles), first
    if pattern.rule == "antidiagonal":
        scores = _antidiagonal(q, k, call.scale, size, pattern.stride)
    elif pattern.rule == "anchor":
        every = _pooled(q, size) @ k.T * call.scale
        missing = -every.shape[1] % size
        return torch.nn.functional.pad(every, (0, missing), value=-torch.inf).unflatten(1, (-1, size)).amax(-1), first
    else:
        scores = _pooled(q, size) @ _pooled(k, size).T * call.scale
    return torch.softmax(scores.masked_fill(gap < 0, -torch.inf), -1), first


def _pooled(values: Tensor, size: int) -> Tensor:
    """[N, D] -> [n, D]: mean of each tile; the last may be shorter."""
    return torch.stack([part.mean(0) for part in values.split(size)])


def _antidiagonal(q: Tensor, k: Tensor, scale: float, size: int, stride: int) -> Tensor:
    """XAttention's estimate: per tile, the log of the summed exponentials of the sums along antidiagonals, every `stride`-th."""

    def strided(values: Tensor, flip: bool) -> Tensor:
        missing = -len(values) % stride
        whole = torch.nn.functional.pad(values, (0, 0, 0, missing)).unflatten(0, (-1, stride))
        return (whole.flip(1) if flip else whole).flatten(1)

    scores = strided(q, True) @ strided(k, False).T * (scale / stride)
    per = max(1, size // stride)
    rows, keys = (-(-n // per) for n in scores.shape)
    origin = scores.shape[1] - scores.shape[0]
    place = torch.arange(scores.shape[0])[:, None] + origin
    weights = torch.softmax(scores.masked_fill(place < torch.arange(scores.shape[1]), -torch.inf), -1)
    padded = torch.nn.functional.pad(weights, (0, keys * per - weights.shape[1], 0, rows * per - weights.shape[0]))
    return torch.log(padded.unflatten(0, (rows, per)).unflatten(2, (keys, per)).sum((1, 3)))


def _exact(call: AttentionCall, head: int, size: int, first: int, tiles: int) -> Tensor:
    """The block masses themselves, each row of tiles as a distribution."""
    from headscope.kernels import measure
    from headscope.statistics import StatisticsRequest

    group = call.group
    one = replace(
        call,
        q=call.q[:, head : head + 1],
        k=call.k[:, head // group : head // group + 1],
        v=None,
        sink_logits=None if call.sink_logits is None else call.sink_logits[head : head + 1],
    )
    mass = measure(one, StatisticsRequest(("block_mass",), block=size)).maps["block_mass"][0, 0].double().cpu()
    mass = mass[-(mass.shape[0] - first) :, :tiles] if mass.shape[0] > first else mass
    return mass / mass.sum(-1, keepdim=True)


def budget(call: AttentionCall, head: int, pattern: Pattern) -> Chosen:
    """After a prefill: the keys before the recent ones that the window's rows weigh most, after a mean filter (SnapKV)."""
    assert isinstance(pattern, Budget)
    found = [last_weights(call, member, pattern.window) for member in _members(call, head, pattern.grouped)]
    rows, first = torch.stack([rows for rows, _ in found]).mean(0), found[0][1]
    since = max(0, first + len(rows) - max(pattern.window, pattern.recent))
    scores = rows[:, :since].sum(0)
    if pattern.pool > 1 and len(scores):
        scores = torch.nn.functional.avg_pool1d(scores[None, None], pattern.pool, 1, pattern.pool // 2)[0, 0, : len(scores)]
    scores[: pattern.sink] = torch.inf
    return Chosen(tuple(_largest(scores, pattern.keep)), since)


def top_keys(call: AttentionCall, head: int, pattern: Pattern) -> Chosen:
    """For a decode row: the keys of largest weight, the first ones and the last ones."""
    assert isinstance(pattern, TopKeys)
    if pattern.block > 1:
        return _top_key_blocks(call, head, pattern)
    found = [last_weights(call, member, 1) for member in _members(call, head, pattern.grouped)]
    rows, first = torch.stack([rows for rows, _ in found]).mean(0), found[0][1]
    since = max(0, first + 1 - pattern.window)
    inside = rows[0, :since].clone()
    inside[: pattern.sink] = torch.inf
    return Chosen(tuple(_largest(inside, pattern.keep)), since)


def _top_key_blocks(call: AttentionCall, head: int, pattern: TopKeys) -> Chosen:
    """The same in whole blocks, by what stands for them; the window reaches back to the end of the last whole block before it."""
    start, size = _start(call), pattern.block
    row = call.query_offset + call.q.shape[2] - 1 - start
    count = max(0, row + 1 - pattern.window) // size
    skip = max(0, start - call.key_offset)
    members = _members(call, head, pattern.grouped)
    q = call.q[0, members[0] : members[-1] + 1, -1].double().cpu().T
    k = call.k[0, head // call.group, skip : skip + count * size].double().cpu().unflatten(0, (count, size)) if count else None
    if k is None:
        return Chosen((), 0)
    scores = k.mean(1) @ q if pattern.estimate == "mean" else k.amax(1) @ q.clamp(min=0) + k.amin(1) @ q.clamp(max=0)
    scores = torch.softmax(scores * call.scale, 0).mean(1) if pattern.grouped else scores[:, 0]
    scores[: -(-pattern.sink // size)] = torch.inf
    chosen = _largest(scores, max(1, pattern.keep // size))
    return Chosen(tuple(one * size + at for one in chosen for at in range(size)), count * size)
