"""Curves: what dynamic rules keep, and how much of the attention that holds, per head, on one text.

A threshold on mass promises no cost: how many tiles it takes is known from the input alone. A plan that is to meet a density therefore
measures its rule at several settings of the dial, on a text, and writes into each pattern what it was measured to keep. The number belongs
to that text and length; the plan's notes say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headscope.errors import PlanError, refusal
from headscope.plans.patterns import Blocks, Dense, Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.plans.plan import Place
    from headscope.plans.planners.base import Evidence
    from headscope.scope import Scope

LONGEST, LONGEST_ON_DEVICE = 2048, 8192
"""Tokens of the text that a dial is set on, at most: on a CPU, and elsewhere."""


@dataclass(frozen=True, eq=False)
class Curves:
    """`kept`, `mass` [candidates, heads] float64: share of the causal entries that each candidate keeps, and of the attention in them (NaN
    where it was not asked for); heads in the order of `places`. `tokens` of the text.
    """

    places: tuple[Place, ...]
    kept: np.ndarray
    mass: np.ndarray
    tokens: int

    def expected(self, candidate: int, head: int) -> float:
        """`kept`, rounded as it goes into a plan, never above 1 or at 0."""
        return float(min(1.0, max(1e-4, round(float(self.kept[candidate, head]), 4))))


def curves(scope: Scope, candidates: Sequence[Pattern], ids: Tensor, *, mass: bool = True) -> Curves:
    """One forward pass over ids [N], with every head's choice by every candidate. Time: candidates x N^2 per head with `mass`."""
    from headscope.plans.indices import choose
    from headscope.probes.calls import each_call

    length = len(ids)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def see(call: AttentionCall, output: Tensor) -> None:
        heads = call.q.shape[1]
        chosen = [[choose(call, head, pattern) for pattern in candidates] for head in range(heads)]
        kept = np.array([[chosen[head][number].density(length) for head in range(heads)] for number in range(len(candidates))])
        found[int(call.layer or 0)] = (kept, held(call, chosen) / length if mass else np.full_like(kept, np.nan))

    each_call(scope, ids, see)
    layers = [found[layer] for layer in scope.topology.layers]
    places = tuple((layer, head) for layer in scope.topology.layers for head in range(scope.topology[layer].heads))
    return Curves(places, np.concatenate([one[0] for one in layers], 1), np.concatenate([one[1] for one in layers], 1), length)


def held(call: AttentionCall, chosen: Sequence[Sequence[Pattern]]) -> np.ndarray:
    """[candidates, heads] float64: the attention weight, summed over the rows, that chosen[head][candidate] keeps, in a call of one text.

    Choices of whole tiles of one size are looked up in the tiles' masses; others are masked entry by entry, N^2 each.
    """
    from headscope.probes.calls import ROWS, row_chunks, weight_rows

    length = call.q.shape[2]
    out = np.zeros((len(chosen[0]), len(chosen)))
    sizes = {one.block for row in chosen for one in row if isinstance(one, Blocks)}
    tiled = len(sizes) == 1 and ROWS % max(sizes) == 0 and all(isinstance(one, Blocks | Dense) for row in chosen for one in row)
    size = max(sizes) if tiled else 1
    count = -(-length // size)
    masses = torch.zeros(len(chosen), count, count, dtype=torch.float64) if tiled else None
    for start, stop in row_chunks(length):
        weights = weight_rows(call, start, stop)[0]
        if masses is not None:
            whole = torch.nn.functional.pad(weights, (0, count * size - length, 0, -(stop - start) % size))
            sums = whole.unflatten(2, (count, size)).unflatten(1, (-1, size)).sum((2, 4), dtype=torch.float64)
            masses[:, start // size : start // size + sums.shape[1]] = sums.cpu()
            continue
        rows, keys = torch.arange(start, stop), torch.arange(length)
        weights = weights.cpu()
        for head, row in enumerate(chosen):
            for number, one in enumerate(row):
                seen = weights[head] if isinstance(one, Dense) else weights[head] * one.visible(rows, keys)
                out[number, head] += float(seen.sum().double())
    if masses is not None:
        for head, row in enumerate(chosen):
            for number, one in enumerate(row):
                tiles = [(tile, at) for tile in range(count) for at in one.row(tile)] if isinstance(one, Blocks) else None
                kept = masses[head] if tiles is None else masses[head][tuple(torch.tensor(tiles).T)]
                out[number, head] = float(kept.sum())
    return out


def curves_of(evidence: Evidence, candidates: Sequence[Pattern], text: str | None, *, mass: bool = True) -> Curves:
    """`curves` on a text of the planner's: `text`, or a bundled essay. Needs a live model."""
    scope = evidence.live("how much a threshold keeps has to be measured on the model")
    ids = calibration_ids(scope, evidence.length, text)
    evidence.note(f"expected densities were measured on {len(ids)} tokens of {'a given text' if text else 'a bundled essay'}")
    known = _known.get()
    if known is None:
        return curves(scope, candidates, ids, mass=mass)
    key = (id(scope), tuple(candidates), tuple(ids.tolist()), mass)
    if key not in known:
        known[key] = curves(scope, candidates, ids, mass=mass)
    return known[key]


_known: ContextVar[dict[Any, Curves] | None] = ContextVar("known curves", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside the block, the same candidates on the same text of the same scope are measured once; the model must stay as it is."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def calibration_ids(scope: Scope, length: int, text: str | None) -> Tensor:
    """Ids [N] of the text that a dial is set on, at most `length` of them and LONGEST (on a device, LONGEST_ON_DEVICE)."""
    from headscope.data import natural_texts

    most = LONGEST if scope.device.type == "cpu" else LONGEST_ON_DEVICE
    limit = min(most, length, scope.max_length or most)
    if text is not None:
        ids = scope.encode(text)[0][:limit].cpu()
        if len(ids) < 2:
            raise refusal(PlanError, f"text={text[:40]!r}", "a dial cannot be set on less than two tokens", "pass a longer text")
        return ids
    if scope.tokenizer is None:
        raise refusal(
            PlanError, f"{scope.name} without a tokenizer", "the bundled essays cannot be read by it", "give the Scope its tokenizer"
        )
    return natural_texts(scope.tokenizer, limit)[0].ids


def largest_dial(density: float, found: Curves) -> int:
    """The number of the last candidate, in ascending order of what they keep, whose mean density is within the bound; else the first."""
    means = [float(np.mean([found.expected(number, head) for head in range(len(found.places))])) for number in range(len(found.kept))]
    return max((number for number, mean in enumerate(means) if mean <= density), default=0)


def allocate(density: float, found: Curves) -> list[int]:
    """Per head the candidate that makes the kept mass, summed over heads, as large as the mean density allows.

    Each head's candidates are reduced to their upper concave hull; steps along the hulls are taken by mass gained per entry, which is the
    optimum of the relaxed problem, and misses that of the whole one by at most one step.
    """
    kept = np.array([[found.expected(number, head) for head in range(len(found.places))] for number in range(len(found.kept))])
    hulls = [hull(kept[:, head], found.mass[:, head]) for head in range(kept.shape[1])]
    chosen = [one[0] for one in hulls]
    spent = sum(kept[number, head] for head, number in enumerate(chosen))
    steps = []
    for head, one in enumerate(hulls):
        for place in range(1, len(one)):
            a, b = one[place - 1], one[place]
            cost = kept[b, head] - kept[a, head]
            steps.append((-(found.mass[b, head] - found.mass[a, head]) / cost, head, place, cost))
    full: set[int] = set()
    for _, head, place, cost in sorted(steps):
        if head in full:
            continue
        if spent + cost > density * kept.shape[1]:
            full.add(head)
            continue
        spent += cost
        chosen[head] = hulls[head][place]
    return chosen


def hull(cost: np.ndarray, value: np.ndarray) -> list[int]:
    """The candidates on the upper concave hull, from the cheapest on, cost and value both rising."""
    out: list[int] = []
    for number in sorted(range(len(cost)), key=lambda n: (cost[n], -value[n])):
        if out and value[number] <= value[out[-1]] + 1e-12:
            continue
        while out and cost[number] <= cost[out[-1]]:
            out.pop()
        while len(out) > 1 and slope(cost, value, out[-2], out[-1]) <= slope(cost, value, out[-1], number):
            out.pop()
        out.append(number)
    return out


def slope(cost: np.ndarray, value: np.ndarray, a: int, b: int) -> float:
    """Value gained per cost from candidate a to candidate b."""
    return float((value[b] - value[a]) / (cost[b] - cost[a]))


Make = Callable[[float, float | None], Pattern]
"""A pattern from the dial's setting and the share that it is expected to keep."""


def dialled(evidence: Evidence, make: Make, settings: Sequence[float], density: float, text: str | None) -> dict[Place, Pattern]:
    """One setting for all heads: the largest of `settings` (ascending) whose mean density is within the bound."""
    found = curves_of(evidence, [make(one, None) for one in settings], text, mass=False)
    number = largest_dial(density, found)
    evidence.note(f"the dial was set to {settings[number]:g}")
    return {place: make(settings[number], found.expected(number, head)) for head, place in enumerate(found.places)}
