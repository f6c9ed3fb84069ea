"""Random plans for the export tests, and whether two plans keep the same keys."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from headscope.export.words import same
from headscope.plans import (
    Blocks,
    Budget,
    Dense,
    Lines,
    Pattern,
    PlanModel,
    Power,
    Span,
    SparsePlan,
    Streaming,
    Strided,
    TopBlocks,
    TopKeys,
    VerticalSlash,
)

LENGTH = 300
GROUPED = PlanModel("tiny", (0, 1, 2), (4, 4, 4), (2, 2, 2), (8, 8, 8), "abc")
WHOLE = PlanModel("whole", (0, 1), (3, 3), (3, 3), (8, 8), "def")

STATIC = st.one_of(
    st.just(Dense()),
    st.builds(Streaming, st.integers(0, 200), st.integers(1, 290)),
    st.builds(Span, st.floats(1, 500), st.floats(0, 1), st.integers(0, 80)),
    st.builds(Strided, st.integers(1, 40), st.integers(2, 4), st.integers(0, 1), st.sampled_from((16, 32))),
    st.builds(Power, st.integers(1, 40), st.sampled_from((16, 32)), st.integers(0, 9)),
    st.builds(Lines, st.sets(st.integers(0, 99), max_size=5).map(lambda one: tuple(sorted(one))), st.just((0, 1, 7))),
    st.sampled_from((Blocks(((0,), (0, 1), (0, 2)), 128), Blocks(((0,), (1,), (0, 2), (1, 3)), 32))),
)
CHOSEN = st.one_of(
    st.builds(VerticalSlash, st.integers(0, 4000), st.integers(1, 7000)),
    st.builds(TopBlocks, mass=st.floats(0.01, 1), rule=st.just("antidiagonal"), block=st.just(128), stride=st.sampled_from((8, 16))),
    st.builds(TopBlocks, share=st.floats(0.01, 1), rule=st.just("exact"), block=st.just(128)),
    st.just(TopBlocks(share=min(1.0, 6400 / 131_072), rule="pooled", block=64)),
    st.builds(Budget, st.integers(1, 4000), st.integers(1, 64), st.sampled_from((1, 5, 63))),
    st.builds(TopKeys, st.integers(1, 256)),
)
ANY = st.one_of(STATIC, CHOSEN)


@st.composite
def plans(draw: st.DrawFn, pattern: st.SearchStrategy[Pattern] = ANY, model: PlanModel | None = None) -> SparsePlan:
    """A plan of few distinct patterns, as plans are."""
    shape = draw(st.sampled_from((GROUPED, WHOLE))) if model is None else model
    few = draw(st.lists(pattern, min_size=1, max_size=4))
    return SparsePlan(shape, {place: draw(st.sampled_from(few)) for place in shape.places}, "drawn", {"seed": 1})


def mask(pattern: Pattern, length: int) -> torch.Tensor:
    """[N, N] bool: what a static pattern keeps in causal attention."""
    at = torch.arange(length)
    return pattern.fixed(length).visible(at, at) & (at[None] <= at[:, None])


def alike(first: Pattern, second: Pattern, length: int = LENGTH) -> bool:
    """True when two patterns keep the same keys: equal up to rounding, or of equal masks at `length`."""
    if same(first, second):
        return True
    return first.static and second.static and torch.equal(mask(first, length), mask(second, length))


def close(first: dict[tuple[int, int], float], second: dict[tuple[int, int], float]) -> bool:
    """True when two tables of scores are equal to the last bit, NaN to NaN."""
    return first.keys() == second.keys() and all(
        one == second[place] or (math.isnan(one) and math.isnan(second[place])) for place, one in first.items()
    )
