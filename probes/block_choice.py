"""Choosing blocks of the attention matrix, and what a choice keeps: shared by the probes that estimate block-sparse attention.

A choice is a bool map [H, n, n] of blocks; what it keeps is measured on the exact mass per block, so that an estimate is judged by the
weights that the model really has and not by its own scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import ProbeError, refusal
from headscope.kernels import measure
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import stack
from headscope.probes.calls import each_call
from headscope.statistics import StatisticsRequest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.text import ProbeText
    from headscope.scope import Scope

Choose = Callable[["AttentionCall"], "tuple[Tensor, list[Tensor]]"]
"""From a call: the chosen blocks [H, n, n] bool, and further numbers [H] that go by name."""


def block_mass(call: AttentionCall, block: int) -> Tensor:
    """[H, n, n] float64 on the CPU: exact sum of A over each block of the call's one sequence."""
    mass = measure(call, StatisticsRequest(("block_mass",), block=block)).maps["block_mass"]
    return mass[0].double().cpu()


def visible_blocks(count: int, block: int, window: int | None = None) -> Tensor:
    """[n, n] bool: blocks that a causal mask (with its sliding window, t - s < window) lets at least one row see."""
    place = torch.arange(count)
    behind = place[:, None] - place
    seen = behind >= 0
    return seen if window is None else seen & ((behind - 1) * block + 1 < window)


def cover(mass: Tensor, share: float, first: Tensor | None = None) -> Tensor:
    """Bool like mass [..., n]: the fewest entries, `first` [..., n] (bool) before all others, that hold `share` of the sum.

    An entry is taken while what was taken before it holds less; entries of 0 are never taken, but for those of `first`.
    """
    rank = mass if first is None else mass.masked_fill(first, torch.inf)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    ranked = mass.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    total = mass.sum(-1, keepdim=True)
    # a hair below the share, so that rounding of the running sum takes no entry more
    taken = (before < share * total - 1e-9 * total) & (ranked > 0)
    out = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, taken)
    return out if first is None else out | first


def pooled(values: Tensor, block: int) -> Tensor:
    """[..., N, D] -> [..., n, D]: mean over each block of positions; the last block may be shorter."""
    *lead, length, width = values.shape
    full = length // block * block
    parts = [values[..., :full, :].reshape(*lead, -1, block, width).mean(-2)]
    if full < length:
        parts.append(values[..., full:, :].mean(-2, keepdim=True))
    return torch.cat(parts, -2)


def summed(values: Tensor, block: int) -> Tensor:
    """[..., N] -> [..., n]: sums over blocks; the last block may be shorter."""
    missing = -values.shape[-1] % block
    return torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, block)).sum(-1)


def kept(choice: Tensor, mass: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(share of the visible blocks that are chosen, share of the mass that they hold), [H] float64 each."""
    choice = choice & seen
    return choice.double().sum((-1, -2)) / seen.sum(), (mass * choice).sum((-1, -2)) / mass.sum((-1, -2))


def check_block(name: str, block: int, length: int) -> None:
    """ProbeError for a text of fewer than four blocks, in which nothing can be left out."""
    if length < 4 * block:
        raise refusal(
            ProbeError,
            f"probe {name!r} on {length} tokens in blocks of {block}",
            f"that is {-(-length // block)} blocks, and 4 are needed to leave any out",
            "raise the context, or pass a smaller block",
        )


def distances(rows: Tensor) -> Tensor:
    """The last rows of A [H, n, N] -> [H, N]: weight at each distance t - s, summed over the rows."""
    heads, count, length = rows.shape
    out = torch.zeros(heads, length, dtype=rows.dtype)
    for place in range(count):
        end = length - count + place + 1
        out[:, :end] += rows[:, place, :end].flip(-1)
    return out


def top(values: Tensor, counts: Tensor) -> Tensor:
    """Bool like values [H, n]: the counts[h] largest of each row, the first of equals."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(values.shape[-1]) < counts[:, None]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, taken)


def measure_blocks(
    probe: ActiveProbe, scope: Scope, texts: list[ProbeText], work: Work, block: int, choose: Choose, names: tuple[str, ...]
) -> Findings:
    """Density, recall and whatever `choose` gives beside its blocks, under `names`, by head, averaged over texts; one unit a text."""

    def one(text: ProbeText) -> dict[str, Any]:
        check_block(probe.name, block, len(text))
        found: dict[str, list[Tensor]] = {}

        def see(call: AttentionCall, output: Tensor) -> None:
            choice, more = choose(call)
            mass = block_mass(call, block)
            seen = visible_blocks(mass.shape[-1], block, call.mask.window)
            found[call.module] = [*kept(choice, mass, seen), *more]

        each_call(scope, text.ids, see)
        order = [module.name for module in scope.topology.main]
        return {name: stack(found[module][place] for module in order) for place, name in enumerate(names)}

    for text in texts:
        check_block(probe.name, block, len(text))
    units = [work.unit(f"text {number}", partial(one, text)) for number, text in work.each(list(enumerate(texts)), probe.name)]
    scores = {name: torch.stack([unit[name] for unit in units]).mean(0) for name in names}
    tokens = {"name": texts[0].name, "kind": texts[0].kind, "sha256": texts[0].sha256, "sequences": len(texts), "tokens": len(texts[0])}
    return Findings(scores, data=[tokens])
