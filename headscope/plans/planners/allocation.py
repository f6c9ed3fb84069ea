"""Sharing out a budget: one option for every item, so that the summed loss is least and no summed cost passes its bound.

The multiple-choice knapsack. A greedy walk along the convex hull of every item's (cost, loss) curve is the Lagrangian solution: it is
optimal for the budget that it ends at, and never further from the optimum of the budget asked for than the one step that did not fit. An
integer program (HiGHS, through scipy) then closes that gap; the better of the two is returned, so that a solver that stops early can only
fail to improve. Both are deterministic: the program is limited by nodes, not by time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from headscope.errors import PlanError, refusal

NODES = 2000
"""Branch-and-bound nodes of the integer program, at most."""
GAP = 1e-6
"""Relative gap at which the program is solved."""


@dataclass(frozen=True, eq=False)
class Options:
    """Of one item: `loss` [n] and `costs` [bounds, n], one column an option."""

    loss: np.ndarray
    costs: np.ndarray


def allocate(items: Sequence[Options], budgets: Sequence[float]) -> list[int]:
    """The number of the option taken for every item: least sum of losses with every sum of costs within its budget.

    Raises PlanError for losses or costs that are not finite, and where no choice fits (under several budgets: where the program finds
    none).
    """
    bounds = np.asarray(budgets, dtype=np.float64)
    for number, item in enumerate(items):
        if item.loss.ndim != 1 or item.costs.shape != (len(bounds), len(item.loss)) or not len(item.loss):
            shapes = f"{item.loss.shape} losses and {item.costs.shape} costs"
            raise refusal(PlanError, f"item {number} with {shapes}", f"there are {len(bounds)} budgets", "give [n] and [budgets, n]")
        if not (np.isfinite(item.loss).all() and np.isfinite(item.costs).all()):
            raise refusal(PlanError, f"item {number}", "a loss or cost of it is not a number", "measure it again")
    if not items:
        return []
    better = _program(items, bounds)
    try:
        start = greedy(items, bounds)
    except PlanError:
        if better is None or len(bounds) == 1:
            raise
        return better  # under several bounds the choices that are cheapest in sum may pass one of them, and others fit
    return start if better is None or _sum(items, better) >= _sum(items, start) - 1e-12 * abs(_sum(items, start)) else better


def greedy(items: Sequence[Options], bounds: np.ndarray) -> list[int]:
    """Up the convex hulls by loss saved per share of the budgets spent, then single exchanges while one helps."""
    scale = np.where(bounds > 0, bounds, 1.0)
    paid = [(item.costs / scale[:, None]).sum(0) for item in items]
    chosen = [int(np.lexsort((item.loss, cost))[0]) for item, cost in zip(items, paid, strict=True)]
    used = _used(items, chosen)
    if bool((used > bounds * (1 + 1e-9) + 1e-12).any()):
        worst = int(np.argmax(used / scale))
        raise refusal(
            PlanError,
            f"a budget of {bounds[worst]:.6g}",
            f"the cheapest choices cost {float(used[worst]):.6g}",
            "allow more, or offer cheaper candidates",
        )
    steps: list[tuple[float, int, int, int]] = []
    for number, (item, cost) in enumerate(zip(items, paid, strict=True)):
        path = hull(cost, item.loss)
        for place, (before, after) in enumerate(pairwise(path)):
            gain = (item.loss[before] - item.loss[after]) / max(cost[after] - cost[before], 1e-300)
            steps.append((-gain, number, place, after))
        if path[0] != chosen[number]:
            used = used + item.costs[:, path[0]] - item.costs[:, chosen[number]]
            chosen[number] = path[0]
    stopped: set[int] = set()
    for _, number, _, after in sorted(steps):
        new = used + items[number].costs[:, after] - items[number].costs[:, chosen[number]]
        if number in stopped or bool((new > bounds * (1 + 1e-12)).any()):
            stopped.add(number)
            continue
        used, chosen[number] = new, after
    return _exchange(items, bounds, chosen, used)


def hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Options on the lower convex hull of (cost, loss), by rising cost and falling loss, from the cheapest."""
    path: list[int] = []
    for at in np.lexsort((loss, cost)).tolist():
        if path and loss[at] >= loss[path[-1]]:
            continue
        while len(path) > 1 and (loss[path[-2]] - loss[path[-1]]) * (cost[at] - cost[path[-1]]) <= (loss[path[-1]] - loss[at]) * (
            cost[path[-1]] - cost[path[-2]]
        ):
            path.pop()
        path.append(at)
    return path


def _exchange(items: Sequence[Options], bounds: np.ndarray, chosen: list[int], used: np.ndarray) -> list[int]:
    """Takes the single change that saves most, until none that fits saves anything."""
    while True:
        best: tuple[float, int, int] | None = None
        for number, item in enumerate(items):
            room = (bounds - used)[:, None] + item.costs[:, [chosen[number]]]
            fitting = (item.costs <= room + 1e-12).all(0)
            saved = np.where(fitting, item.loss[chosen[number]] - item.loss, -np.inf)
            at = int(saved.argmax())
            if saved[at] > 1e-12 * max(1.0, abs(float(item.loss[chosen[number]]))) and (best is None or saved[at] > best[0]):
                best = (float(saved[at]), number, at)
        if best is None:
            return chosen
        _, number, at = best
        used = used + items[number].costs[:, at] - items[number].costs[:, chosen[number]]
        chosen[number] = at


def _program(items: Sequence[Options], bounds: np.ndarray) -> list[int] | None:
    """The integer program's answer, or None where it found none in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    useful = [_undominated(item) for item in items]
    counts = [len(one) for one in useful]
    size = sum(counts)
    # every bound as a mean over the items: with coefficients far below 1, the solver's tolerances let choices pass the bound
    scale = np.where(bounds > 0, bounds, 1.0) / len(items)
    ones = csr_array((np.ones(size), (np.repeat(np.arange(len(items)), counts), np.arange(size))), shape=(len(items), size))
    costs = np.concatenate([item.costs[:, kept] for item, kept in zip(items, useful, strict=True)], 1) / scale[:, None]
    losses = np.concatenate([item.loss[kept] for item, kept in zip(items, useful, strict=True)])
    unit = float(np.abs(losses).max()) or 1.0
    with _stdout_to_stderr():
        answer = milp(
            losses / unit,
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(ones, 1, 1), LinearConstraint(csr_array(costs), -np.inf, bounds / scale)],
            options={"node_limit": NODES, "mip_rel_gap": GAP},
        )
    if answer.x is None:
        return None
    parts = np.split(answer.x, np.cumsum(counts)[:-1])
    chosen = [int(kept[part.argmax()]) for part, kept in zip(parts, useful, strict=True)]
    used = _used(items, chosen)
    return chosen if bool((used <= bounds * (1 + 1e-9) + 1e-12).all()) else None


def _undominated(item: Options) -> np.ndarray:
    """Numbers of the options that no other is at least as good as in loss and every cost; of equal ones the first."""
    table = np.concatenate([item.loss[None], item.costs])
    never_worse = (table[:, :, None] <= table[:, None, :]).all(0)
    better = never_worse & (table[:, :, None] < table[:, None, :]).any(0)
    twin = never_worse & never_worse.T & (np.arange(len(item.loss))[:, None] < np.arange(len(item.loss)))
    return np.flatnonzero(~(better | twin).any(0))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS prints a line where it repairs a solution, whatever it is told, and one such line makes `--json` output no JSON."""
    sys.stdout.flush()
    try:
        flush = ctypes.CDLL(None).fflush
        kept = os.dup(1)
    except (OSError, TypeError, AttributeError):  # no C library to ask (Windows), or no standard output
        yield
        return
    flush(None)
    try:
        os.dup2(2, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _used(items: Sequence[Options], chosen: Sequence[int]) -> np.ndarray:
    """[bounds] what the choices cost."""
    return np.sum([item.costs[:, at] for item, at in zip(items, chosen, strict=True)], axis=0)


def _sum(items: Sequence[Options], chosen: Sequence[int]) -> float:
    return float(sum(item.loss[at] for item, at in zip(items, chosen, strict=True)))
