"""Patterns: counts equal the masks they describe, every row keeps its own key, wrong values are refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.errors import PlanError
from headscope.plans import (
    PATTERNS,
    Blocks,
    Budget,
    Dense,
    Lines,
    Pattern,
    Power,
    Span,
    Streaming,
    Strided,
    TopBlocks,
    TopKeys,
    VerticalSlash,
)
from headscope.plans.registry import pattern_from

SMALL = st.integers(1, 40)


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    rows = draw(st.integers(1, 6))
    kept = tuple(tuple(sorted(draw(st.sets(st.integers(0, row))))) for row in range(rows))
    return Blocks(kept, draw(st.sampled_from([4, 16])))


@st.composite
def strided(draw: st.DrawFn) -> Strided:
    stride = draw(st.integers(1, 5))
    return Strided(draw(SMALL), stride, draw(st.integers(0, stride - 1)), draw(st.sampled_from([4, 16])), draw(st.integers(0, 8)))


STATIC = st.one_of(
    st.just(Dense()),
    st.builds(Streaming, st.integers(0, 20), SMALL),
    st.builds(Span, st.floats(1, 30), st.floats(0, 1), st.integers(0, 9)),
    strided(),
    st.builds(Power, SMALL, st.sampled_from([4, 16]), st.integers(0, 9)),
    st.builds(
        Lines,
        st.sets(st.integers(0, 90), max_size=8).map(lambda found: tuple(sorted(found))),
        st.sets(st.integers(0, 90), max_size=8).map(lambda found: tuple(sorted(found))),
    ),
    blocks(),
)
DYNAMIC = (VerticalSlash(100, 200), TopBlocks(share=0.2), TopBlocks(mass=0.9, rule="exact"), Budget(64), TopKeys(32, source=(0, 1)))


def mask(pattern: Pattern, length: int) -> torch.Tensor:
    at = torch.arange(length)
    return pattern.visible(at, at) & (at[None, :] <= at[:, None])


@settings(max_examples=150, deadline=None)
@given(STATIC, st.integers(1, 90))
def test_counts_equal_the_mask(pattern: Pattern, length: int) -> None:
    whole = mask(pattern, length)
    assert pattern.kept(length) == float(whole.sum())
    assert pattern.density(length) == pytest.approx(float(whole.sum()) / math.comb(length + 1, 2))
    assert bool(whole.diagonal().all()), "a row without its own key"


@settings(max_examples=100, deadline=None)
@given(STATIC, st.integers(1, 90))
def test_what_stays_cached_is_what_later_rows_still_read(pattern: Pattern, length: int) -> None:
    """No later row reads a key that `cached` does not count, except where the pattern says that all stay."""
    if isinstance(pattern, Span):  # its window grows: keys that come back into sight are what `at` a length rules out
        return
    later = torch.arange(length, length + 60)
    read = pattern.visible(later, torch.arange(length)).any(0)
    assert float(read.sum()) <= pattern.cached(length) <= length


@settings(max_examples=100, deadline=None)
@given(STATIC)
def test_plain_data_round_trip(pattern: Pattern) -> None:
    assert pattern_from(pattern.to_dict()) == pattern
    assert hash(pattern_from(pattern.to_dict())) == hash(pattern)


def test_every_kind_is_registered_and_round_trips() -> None:
    for pattern in DYNAMIC:
        assert pattern_from(pattern.to_dict()) == pattern
        assert not pattern.static
        with pytest.raises(PlanError, match="chosen per input"):
            pattern.visible(torch.arange(3), torch.arange(3))
        assert 0 < pattern.density(4096) <= 1
    assert len(PATTERNS) == 15


def test_closed_forms() -> None:
    assert Streaming(128, 1024).kept(32768) == 1152 * 1153 / 2 + (32768 - 1152) * 1152
    assert Streaming(128, 1024).density(32768) == pytest.approx(0.0691, abs=1e-4)
    assert Streaming(4, 8).cached(1000) == 12
    assert Span(10.0, 0.25, sink=0).at(100) == Streaming(0, 35)
    assert VerticalSlash(1000, 6096).density(131072) == pytest.approx(0.1083, abs=1e-3)
    assert Dense().density(77) == 1.0
    assert Blocks(((0,), (0,), (0, 1)), 16).row(5) == (3, 4, 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Streaming(0, 0), "window=0"),
        (lambda: Streaming(-1, 4), "sink=-1"),
        (lambda: Streaming(True, 4), "sink=True"),
        (lambda: Strided(4, 2, 2), "modulo stride=2"),
        (lambda: Lines((3, 1)), "ascending"),
        (lambda: Lines((1, 1)), "distinct"),
        (lambda: Blocks(((0,), (1, 0))), "row tile 1"),
        (lambda: Blocks(((0,), (0, 2))), "tiles 0..1"),
        (lambda: Blocks(()), "nothing to keep"),
        (lambda: TopBlocks(), "exactly one"),
        (lambda: TopBlocks(share=0.0), "0 < share"),
        (lambda: TopBlocks(mass=0.9, rule="best"), "'best'"),
        (lambda: Span(0.5, 0.0), "empty"),
        (lambda: pattern_from({"kind": "streming", "sink": 1, "window": 2}), "did you mean streaming"),
        (lambda: pattern_from({"kind": "streaming", "sink": 1, "windw": 2}), "did you mean window"),
        (lambda: pattern_from({"kind": "streaming", "sink": 1}), "window"),
        (lambda: pattern_from([1]), "a pattern is"),
    ],
)
def test_refusals(make: object, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make()
