"""Sharing out a budget against brute force, and headscope's own planner on hand-made measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.errors import PlanError
from headscope.plans import Dense, Span, Streaming, VerticalSlash
from headscope.plans.planners import plan
from headscope.plans.planners.allocation import Options, allocate, greedy, hull

from .made_profiles import made


def brute(items: list[Options], budgets: np.ndarray) -> float:
    """The least loss over every choice, infinite where none fits."""
    best = np.inf
    for chosen in product(*(range(len(item.loss)) for item in items)):
        cost = sum(item.costs[:, at] for item, at in zip(items, chosen, strict=True))
        if (cost <= budgets * (1 + 1e-9)).all():
            best = min(best, sum(item.loss[at] for item, at in zip(items, chosen, strict=True)))
    return float(best)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2))
def test_allocation_is_optimal(seed: int, count: int, options: int, bounds: int) -> None:
    generator = np.random.default_rng(seed)
    items = [Options(generator.random(options), generator.integers(0, 12, (bounds, options)).astype(float)) for _ in range(count)]
    budgets = generator.integers(0, 8 * count, bounds).astype(float)
    best = brute(items, budgets)
    if not np.isfinite(best):
        with pytest.raises(PlanError, match="budget"):
            allocate(items, budgets)
        return
    taken = allocate(items, budgets)
    used = sum(item.costs[:, at] for item, at in zip(items, taken, strict=True))
    assert (used <= budgets * (1 + 1e-9)).all()
    assert sum(item.loss[at] for item, at in zip(items, taken, strict=True)) == pytest.approx(best, abs=1e-6)


def test_the_solver_prints_nothing_to_stdout(capfd) -> None:
    """Its library does, where it repairs a solution; what is printed beside it, before and after, stays."""
    import os

    from headscope.plans.planners.allocation import _stdout_to_stderr

    os.write(1, b"before ")
    with _stdout_to_stderr():
        os.write(1, b"inside")
    os.write(1, b"after")
    printed = capfd.readouterr()
    assert printed.out == "before after"
    assert printed.err == "inside"


def test_greedy_is_the_lagrangian_solution() -> None:
    """Within the one step that did not fit of the linear bound, for many items."""
    generator = np.random.default_rng(0)
    items = []
    for _ in range(200):
        cost = np.sort(generator.random(6))
        items.append(Options(np.sort(generator.random(6))[::-1].copy(), cost[None]))
    budget = 0.4 * 200
    taken = greedy(items, np.array([budget]))
    mine = sum(item.loss[at] for item, at in zip(items, taken, strict=True))
    # the dual bound: max over multipliers of sum_i min_j (loss + m cost) - m budget
    losses, costs = np.stack([item.loss for item in items]), np.stack([item.costs[0] for item in items])
    dual = max((losses + m * costs).min(1).sum() - m * budget for m in np.linspace(0, 5, 2001))
    assert dual - 1e-9 <= mine <= dual + 1.0
    assert mine - dual < 0.02 * dual


def test_hull_is_convex_and_holds_the_cheapest_and_the_best() -> None:
    cost, loss = np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([10.0, 9.0, 3.0, 2.5, 2.0])
    assert hull(cost, loss) == [0, 2, 4]
    assert hull(cost, np.array([1.0, 2.0, 3.0, 0.5, 0.9])) == [0, 3]
    assert hull(np.zeros(3), np.array([2.0, 1.0, 3.0])) == [1]


def test_items_that_make_no_sense_are_refused() -> None:
    good = Options(np.array([1.0, 0.0]), np.array([[0.0, 1.0]]))
    with pytest.raises(PlanError, match="not a number"):
        allocate([good, Options(np.array([np.nan, 0.0]), np.array([[0.0, 1.0]]))], [1.0])
    with pytest.raises(PlanError, match="there are 2 budgets"):
        allocate([good], [1.0, 1.0])
    with pytest.raises(PlanError, match="cheapest choices cost 2"):
        allocate([Options(np.array([1.0]), np.array([[2.0]]))], [1.0])
    assert allocate([], [1.0]) == []


# ---- the planner --------------------------------------------------------------------------------------------------------

CANDIDATES = (Streaming(4, 16), Streaming(4, 64), Span(0.0, 0.25, 4), VerticalSlash(16, 16, 64, 4, 16), Streaming(4, 64, True))


def measured(squares: np.ndarray, *, error: np.ndarray | None = None, kind: str = "recall", kv_heads: int = 2) -> object:
    """A profile whose pattern_cost table has `squares` [L, H, candidates]."""
    error = squares if error is None else error
    rows = []
    for layer, head, number in product(*(range(n) for n in squares.shape)):
        word = json.dumps(CANDIDATES[number].to_dict())
        value, other = float(squares[layer, head, number]), float(error[layer, head, number])
        kept = CANDIDATES[number].density(1024)
        rows.append((layer, head, word, kind, 0, 1024, 0.0, value, other, 1.0, 1 - min(other, 1.0), kept))
    columns = ["layer", "head", "pattern", "kind", "text", "tokens", "loss", "squares", "error", "whole", "mass", "kept"]
    table = pd.DataFrame(rows, columns=columns)
    layers, heads, _ = squares.shape
    return made(layers=layers, heads=heads, kv_heads=kv_heads, tables={"pattern_cost.candidates": table})


def brute_plan(squares: np.ndarray, density: float, usable: tuple[int, ...]) -> float:
    """The least summed loss over all choices of candidates (dense too) for every head, at 1,024 tokens."""
    layers, heads, _ = squares.shape
    patterns = [*(CANDIDATES[at] for at in usable), Dense()]
    curves = [np.append(squares[layer, head, list(usable)], 0.0) for layer in range(layers) for head in range(heads)]
    cost = np.array([pattern.density(1024) for pattern in patterns])
    best = np.inf
    for chosen in product(range(len(patterns)), repeat=len(curves)):
        if cost[list(chosen)].sum() <= density * len(curves):
            best = min(best, sum(curve[at] for curve, at in zip(curves, chosen, strict=True)))
    return float(best)


def loss_of(found: object, squares: np.ndarray) -> float:
    total = 0.0
    for (layer, head), pattern in found.patterns.items():
        plain = replace(pattern, expected=None) if isinstance(pattern, VerticalSlash) else pattern
        total += 0.0 if pattern == Dense() else float(squares[layer, head, CANDIDATES.index(plain)])
    return total


@pytest.mark.parametrize("density", [0.08, 0.2, 0.45, 0.9])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_plan_is_the_best_of_all(density: float, dynamic: bool) -> None:
    generator = np.random.default_rng(int(density * 100))
    squares = np.sort(generator.random((1, 4, 5)), -1)[..., ::-1].copy()
    usable = (0, 1, 2, 3, 4) if dynamic else (0, 1, 2, 4)
    found = plan(measured(squares), "allocate", objective="squares", density=density, dynamic=dynamic, compensate=True)
    assert found.density(1024) <= density
    assert loss_of(found, squares) == pytest.approx(brute_plan(squares, density, usable))


def test_a_head_whose_output_matters_gets_more() -> None:
    squares = np.ones((2, 4, 5)) * np.array([1.0, 0.5, 0.2, 0.3, 0.5])
    squares[1, 2] *= 100
    found = plan(measured(squares), "allocate", objective="squares", density=0.2)
    assert found[1, 2] == Dense()
    assert max(found.densities(1024).flatten()[:-2]) < 1


def test_two_kinds_of_text_weigh_the_same_whatever_their_scale() -> None:
    """Recall in units a thousand times larger must not drown prose: heads 0 and 1 matter for one kind each, and both stay dense."""
    recall, prose = np.full((1, 4, 5), 1e-3), np.full((1, 4, 5), 1e-6)
    recall[0, 0], prose[0, 1] = 1e3, 1.0
    both = measured(recall, kind="recall")
    both.tables["pattern_cost.candidates"] = pd.concat(
        [both.tables["pattern_cost.candidates"], measured(prose, kind="prose").tables["pattern_cost.candidates"]], ignore_index=True
    )
    found = plan(both, "allocate", objective="squares", density=0.55)
    assert [found[0, head] == Dense() for head in range(4)] == [True, True, False, False]


def test_a_cache_budget_is_kept_by_key_heads() -> None:
    """Both query heads of a key head have one pattern, no rule that keeps all keys is taken, and the bytes stay within the bound."""
    generator = np.random.default_rng(3)
    squares = np.sort(generator.random((3, 4, 5)), -1)[..., ::-1].copy()
    squares[1, 0] = 100.0
    profile = measured(squares)
    for cache in (0.1, 0.3, 0.5):
        found = plan(profile, "allocate", objective="squares", cache=cache)
        assert found.kv_share(1024) <= cache
        assert all(found[layer, head] == found[layer, head ^ 1] for layer, head in found.patterns)
        assert not found.dynamic
        if cache > 0.1:
            assert found[1, 0] == Dense()
    both = plan(profile, "allocate", objective="squares", cache=0.5, density=0.2)
    assert both.kv_share(1024) <= 0.5
    assert both.density(1024) <= 0.2
    free = plan(profile, "allocate", cache=0.3, compensate=True)
    assert not any(getattr(one, "compensate", False) for one in free.patterns.values())


def test_what_the_objectives_read() -> None:
    """squares and error rank heads differently; roots move budget from many medium heads to few large ones."""
    squares, error = np.full((1, 4, 5), 0.1), np.full((1, 4, 5), 0.1)
    squares[0, 0], error[0, 3] = 5.0, 5.0
    profile = measured(squares, error=error)
    assert plan(profile, "allocate", objective="squares", density=0.3)[0, 0] == Dense()
    assert plan(profile, "allocate", objective="error", density=0.3)[0, 3] == Dense()
    assert plan(profile, "allocate", objective="mass", density=0.3)[0, 3] == Dense()
    blind = plan(profile, "allocate", density=0.3)
    assert "not tried out" in blind.notes[0]
    default = plan(profile, "allocate")
    assert default.density(1024) <= 0.25
    assert "density 0.25" in default.notes[0]


def test_missing_heads_and_numbers_are_named() -> None:
    profile = measured(np.ones((2, 4, 5)))
    table = profile.tables["pattern_cost.candidates"]
    profile.tables["pattern_cost.candidates"] = table[~((table["layer"] == 1) & (table["head"] == 2))]
    with pytest.raises(PlanError, match=r"head 1\.2: pattern_cost.candidates has no row"):
        plan(profile, "allocate", density=0.3)
    bad = measured(np.ones((2, 4, 5)))
    bad.tables["pattern_cost.candidates"].loc[7, "squares"] = np.nan
    with pytest.raises(PlanError, match=r"head 0\.1: it is not a number"):
        plan(bad, "allocate", objective="squares", density=0.3)
    half = measured(np.ones((2, 4, 5)))
    table = half.tables["pattern_cost.candidates"]
    half.tables["pattern_cost.candidates"] = table.drop(index=3)
    with pytest.raises(PlanError, match="not every candidate"):
        plan(half, "allocate", objective="squares", density=0.3)
    old = measured(np.ones((2, 4, 5)))
    old.tables["pattern_cost.candidates"] = table.drop(columns="kept")
    with pytest.raises(PlanError, match="older version"):
        plan(old, "allocate", objective="squares", density=0.3)
    with pytest.raises(PlanError, match="cheapest choices"):
        plan(measured(np.ones((2, 4, 5))), "allocate", density=0.001)
