"""What an executor knows of a layer's patterns beforehand, against the patterns asked one by one."""

from __future__ import annotations

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels.sparse_decode_call import rules_and_lists
from headscope.kernels.sparse_decode_host import KeyLists
from headscope.plans import Blocks, Budget, Dense, Lines, Pattern, Power, Span, Streaming, Strided, TopKeys
from headscope.plans.execute_heads import Heads

STATIC: tuple[Pattern, ...] = (
    *(Dense(), Streaming(3, 20), Streaming(0, 90, True), Span(2, 0.3, 4), Span(0.0, 1.0, 0), Strided(10, 3, 1, 8, 2), Power(9, 8, 1)),
    *(Lines((0, 5, 9), (0, 3, 7)), Blocks(((0,), (0, 1), (1, 2)), 16), Blocks(((0,), (0, 1)), 64)),
)


@pytest.mark.parametrize("pattern", STATIC, ids=str)
def test_from_where_on_a_plan_drops_something(pattern: Pattern) -> None:
    expected = [pattern.kept(length) < length * (length + 1) / 2 for length in range(1, 300)]
    heads = Heads((Dense(), pattern))
    assert [heads.drop_at(length) for length in range(1, 300)] == expected
    back = Heads((Dense(), pattern))
    assert [back.drop_at(length) for length in range(299, 0, -1)] == expected[::-1]


def test_heads_are_their_patterns() -> None:
    one, other = Heads((Dense(), TopKeys(5, full=True), TopKeys(4, source=(0, 1)), Budget(3))), Heads((Dense(), TopKeys(5, full=True)))
    assert hash(one) == hash(tuple(one))
    assert one == tuple(one)
    assert one != other
    assert one[:2] == other
    assert one.part((0, 1)) == other
    assert one.part((0, 1)) is one.part((0, 1))
    assert (one.listed, one.choosing, one.budgets, one.sources) == ((2, 3), (1,), (3,), None)
    assert one.rules == (Dense(), Dense(), Streaming(0, 1), Streaming(0, 1))
    assert Heads((TopKeys(4, source=(2, 0)), TopKeys(4, source=(2, 1)))).sources == 2
    assert Heads((TopKeys(4, source=(2, 1)), TopKeys(4, source=(2, 1)))).sources is None
    assert one.prefill == (Dense(),) * 4
    assert not one.static


def test_lists_of_tiles_are_made_once_a_tile() -> None:
    """The same tensors until the row enters another tile; lists that go by rows are others at every row."""
    tiles = (Strided(10, 3, 1, 16), Power(9, 32, 1), Blocks(((0,), (0, 1), (1, 2)), 16), Dense())

    def lists(patterns: tuple[Pattern, ...], length: int) -> KeyLists:
        q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, length, 8)
        made = rules_and_lists(AttentionCall("m", 0, q, k, k, 1.0, MaskFacts(True), query_offset=length - 1), patterns)
        assert made[1] is not None
        return made[1]

    first = lists(tiles, 97)
    assert all(lists(tiles, length) is first for length in range(98, 113))
    assert lists(tiles, 113) is not first
    assert first.block == 16
    lines = (Lines((0, 5), (0, 3)), *tiles[1:])
    assert lists(lines, 97) is not lists(lines, 98)
