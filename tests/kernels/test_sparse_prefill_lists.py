"""The lists entry by entry: every kept (row, key) pair is visited exactly once, nothing else is, each tile of rows is somebody's work."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels import sparse_cost, sparse_lists
from headscope.kernels.sparse_lists import ENDLESS, TileLists, dealt, range_counts, ranges, static_lists, supported
from headscope.plans import Blocks, Dense, Lines, Pattern, Power, Span, Streaming, Strided, TopBlocks
from headscope.plans.indices import Chosen


def visits(lists: TileLists, head: int, row: int, line: list[int], limit: int | None) -> torch.Tensor:
    """How often the kernels visit each (row, key) entry of a tile of rows, [128, keys], written down from what the lists promise."""
    _, _, partial, full, start, gathered, slot, _ = line
    t = 128 * row + torch.arange(128)[:, None]
    counts = torch.zeros(128, 128 * (row + 1), dtype=torch.int64)
    sink, window = lists.rules[head].tolist()
    if start >= 0:
        tiles = lists.tiles[start : start + partial + full].tolist()
    else:
        a, b, w0, w1 = (int(x) for x in ranges(torch.tensor(row), torch.tensor(sink), torch.tensor(window), limit))
        tiles = [row, *range(w0, w1), *range(b, a), *range(b), *range(w1, row)]
    assert tiles[0] == row, "the diagonal tile comes first"
    assert len(set(tiles)) == len(tiles) == partial + full
    for place, tile in enumerate(tiles):
        s = 128 * tile + torch.arange(128)[None, :]
        if place >= partial:
            seen = torch.ones(128, 128, dtype=torch.bool)
            assert tile < row, "a full tile is causal"
        else:
            seen = (s < sink) | (t - s < window)
            if lists.cells is not None and start >= 0:
                bits = int(lists.cells[start + place])
                cell = (t % 128 // 16) * 8 + s % 128 // 16
                seen = seen | ((torch.tensor(bits) >> cell) & 1).bool()
            if lists.diagonals is not None and lists.marked is not None and start >= 0:
                seen = seen | lists.diagonals[slot, (t - s).clamp(min=0)].bool() | lists.marked[slot, s].bool()
            seen = seen & (s <= t)
            if limit is not None:
                seen = seen & (t - s < limit)
        counts[:, 128 * tile : 128 * tile + 128] += seen
    if gathered:
        assert lists.columns is not None
        assert lists.gaps is not None
        for s in lists.columns[slot, : 128 * gathered].tolist():
            if s <= 128 * row + 127 and not lists.gaps[slot, row - s // 128]:
                counts[:, s] += (t[:, 0] >= s) & (torch.full_like(t[:, 0], limit is None) | (t[:, 0] - s < (limit or 0)).long()).bool()
    return counts


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    sink, window = draw(st.sampled_from([0, 3, 127, 128, 129, 260])), draw(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257, 700]))
    block = draw(st.sampled_from([16, 32, 64, 128, 256, 384]))
    rng = random.Random(draw(st.integers(0, 10**6)))
    return draw(
        st.sampled_from(
            [
                Dense(),
                Streaming(sink, window),
                Strided(window, 3, 1, block, sink),
                Power(window, block, sink),
                Blocks(
                    tuple(tuple(sorted(rng.sample(range(row + 1), rng.randint(0, row + 1)))) for row in range(rng.randint(1, 9))), block
                ),
                Lines(tuple(sorted(rng.sample(range(600), rng.choice([0, 1, 300])))), tuple(sorted(rng.sample(range(600), 9)))),
                Lines(tuple(range(0, 600, 50)), tuple(range(rng.choice([1, 128, 255, 256, 400])))),
            ]
        )
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(patterns(), min_size=1, max_size=3), st.integers(1, 600), st.integers(0, 400),
    st.sampled_from([None, None, 1, 2, 128, 130, 200]), st.integers(1, 2),
)  # fmt: skip
def test_every_kept_entry_is_visited_once(heads: list[Pattern], rows: int, offset: int, limit: int | None, batch: int) -> None:
    q = torch.zeros(batch, len(heads), rows, 1)
    k = torch.zeros(batch, 1, rows + offset, 1)
    call = AttentionCall("attention", 0, q, k, k, 1.0, MaskFacts(True, window=limit), query_offset=offset)
    lists = static_lists(call, heads)
    first, last = offset // 128, (offset + rows - 1) // 128
    work = lists.work.tolist()
    assert sorted((line[0], line[1]) for line in work) == [(bh, row) for bh in range(batch * len(heads)) for row in range(first, last + 1)]
    for line in work:
        if line[0] >= len(heads):
            assert line[2:] == next(one for one in work if one[0] == line[0] % len(heads) and one[1] == line[1])[2:]
            continue
        row, pattern = line[1], heads[line[0]]
        assert line[7] == line[2] + line[3] + line[5]
        t, s = 128 * row + torch.arange(128), torch.arange(128 * (row + 1))
        kept = pattern.visible(t, s) & (s[None, :] <= t[:, None])
        if limit is not None:
            kept &= t[:, None] - s[None, :] < limit
        counts = visits(lists, line[0], row, line, limit)
        assert torch.equal(counts, kept.long()), (pattern, row)


EDGES = st.builds(lambda tiles, more: max(0, 128 * tiles + more), st.integers(0, 40), st.integers(-2, 2))
"""Counts at and beside multiples of a tile."""


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), EDGES, EDGES.map(lambda n: max(1, n)), st.one_of(st.none(), EDGES.map(lambda n: max(1, n))))
def test_ranges_are_the_tiles_of_sink_and_window(row: int, sink: int, window: int, limit: int | None) -> None:
    """Counted entry by entry: a tile is visited when something of it is kept, full when all of it is; a limit only takes away."""
    partial, full = (int(x) for x in range_counts(torch.tensor(row), torch.tensor(sink), torch.tensor(window), limit))
    a, b, w0, w1 = (int(x) for x in ranges(torch.tensor(row), torch.tensor(sink), torch.tensor(window), limit))
    visited = {row, *range(w0, w1), *range(b, a), *range(b), *range(w1, row)}
    assert len(visited) == partial + full
    for tile in range(row):
        nearest, furthest = 128 * (row - tile) - 127, 128 * (row - tile) + 127
        inside = limit is None or nearest < limit
        some = (128 * tile < sink or nearest < window) and inside
        whole = (128 * tile + 127 < sink or furthest < window) and (limit is None or furthest < limit)
        assert not some or tile in visited
        if tile in {*range(b), *range(w1, row)}:
            assert whole


def test_longest_work_comes_first(monkeypatch) -> None:
    """All together where the keys fit the cache; else key head by key head, the busiest one first."""
    q, k = torch.zeros(1, 4, 1000, 1), torch.zeros(1, 2, 1000, 1)
    call = AttentionCall("attention", 0, q, k, k, 1.0, MaskFacts(True))
    heads = [Streaming(4, 100), Streaming(4, 100), Dense(), Streaming(4, 100)]
    lines = static_lists(call, heads).work
    owners = (lines[:, 0] // 2).tolist()
    assert owners == [1] * 16 + [0] * 16
    assert all((part[:-1, 7] >= part[1:, 7]).all() for part in lines.split(16))
    monkeypatch.setattr(sparse_lists, "cache_bytes", lambda device: 1 << 30)
    costs = sparse_lists._static(call, heads).work[:, 7]
    assert (costs[:-1] >= costs[1:]).all()


def test_padding_shifts_the_rows() -> None:
    """Tiles count from each sequence's first token; one before it is nobody's work."""
    q = torch.zeros(2, 1, 300, 1)
    first = torch.tensor([0, 130])
    call = AttentionCall("attention", 0, q, q, q, 1.0, MaskFacts(True, key_valid=torch.arange(300) >= first[:, None]), first_token=first)
    lines = static_lists(call, [Dense()]).work
    tiles = {(int(line[0]), int(line[1])): int(line[2] + line[3]) for line in lines}
    assert {row: count for (b, row), count in tiles.items() if b == 0 and count} == {0: 1, 1: 2, 2: 3}
    # rows 0 .. 129 of the second sequence are padding: tiles -2 and -1; its text fills tiles 0 and 1
    assert {row for (b, row) in tiles if b == 1} == {-2, -1, 0, 1}
    assert tiles[1, -2] == tiles[1, -1] == 0


def test_lists_are_remembered_by_pattern_and_length() -> None:
    q = torch.zeros(1, 2, 300, 1)
    call = AttentionCall("attention", 0, q, q, q, 1.0, MaskFacts(True))
    heads = [Blocks(((0,),)), Dense()]
    made = static_lists(call, heads)
    assert static_lists(call, heads) is made
    assert static_lists(call, [heads[0], Streaming(0, ENDLESS)]) is made  # the same rule
    assert static_lists(call, [Blocks(((0,), (0,))), Dense()]) is not made
    assert static_lists(AttentionCall("attention", 0, q[:, :, :200], q, q, 1.0, MaskFacts(True), query_offset=100), heads) is not made


@pytest.mark.parametrize("pattern", [Span(3, 0.1), Chosen((1, 2), 3), Blocks(((0,),), 100), Strided(3, 2, 0, 8)])
def test_patterns_without_lists(pattern: Pattern) -> None:
    assert supported([Dense(), pattern])


def test_what_a_call_costs(monkeypatch) -> None:
    """Tiles of a plan and of a dense kernel, and the rule that leaves a call to the dense one."""
    q, k = torch.zeros(2, 4, 1000, 1), torch.zeros(2, 2, 1000, 1)
    call = AttentionCall("attention", 0, q, k, k, 1.0, MaskFacts(True))
    assert sparse_cost.shares(call, [Dense()] * 4, static_lists(call, [Dense()] * 4)) == (4 * 36, 0, 4 * 8, 4 * 36)
    heads: list[Pattern] = [Streaming(0, 1)] * 2 + [Dense()] * 2
    assert sparse_cost.shares(call, heads, static_lists(call, heads)) == (2 * 36 + 2 * 8, 0, 4 * 8, 4 * 36)
    chunk = AttentionCall("attention", 0, q[:, :, :300], k, k, 1.0, MaskFacts(True), query_offset=700)
    assert sparse_cost.shares(chunk, heads, static_lists(chunk, heads)) == (2 * (6 + 7 + 8) + 2 * 3, 0, 4 * 3, 4 * (6 + 7 + 8))
    dynamic: list[Pattern] = [TopBlocks(share=0.25)] * 4
    visits, looked, strips, dense = sparse_cost.shares(call, dynamic, None)
    assert looked == 0
    assert visits == pytest.approx(0.25 * dense + strips / 2)
    lines: list[Pattern] = [Lines((0,), (0, 500))] * 4
    # the diagonal tiles, 500 keys back in two tiles, and a tile of gathered columns for every row
    assert sparse_cost.shares(call, lines, static_lists(call, lines))[:2] == (4 * (8 + 5 + 4 + 8),) * 2
    monkeypatch.setattr(sparse_cost, "cost_of", lambda backend, device: sparse_cost.Cost(1.5, 3.0, 2.0))
    assert sparse_cost.slower(call, heads, "gluon", static_lists(call, heads), 4) == ""
    assert "100% of the tiles" in sparse_cost.slower(call, heads[2:] * 2, "gluon", static_lists(call, [Dense()] * 4), 4)


def test_work_is_dealt_out_evenly() -> None:
    """Processor i takes lines i, i + many, ...: the busiest of them has little more than the mean, and every line is somebody's."""
    cost = np.tile(np.repeat(np.arange(256, 0, -1) * 0.1 + 2.6, 4), 8)
    order = dealt(cost, 132)
    assert sorted(order.tolist()) == list(range(len(cost)))
    loads = np.array([cost[order][one::132].sum() for one in range(132)])
    assert loads.max() < 1.01 * cost.sum() / 132
    assert max(cost[one::132].sum() for one in range(132)) > 1.02 * cost.sum() / 132  # as the lines come
    assert all(abs(int(at) - place) < 132 for place, at in enumerate(order)), "nobody leaves the key head that is at hand"
    assert dealt(np.array([3.0, 1.0]), 5).tolist() == [0, 1]


def test_lists_are_remembered_until_they_are_given_up() -> None:
    q = torch.zeros(1, 2, 300, 1)
    call, heads = AttentionCall("attention", 0, q, q, q, 1.0, MaskFacts(True)), [Dense(), Dense()]
    made = static_lists(call, heads)
    assert static_lists(call, heads) is made
    sparse_lists.forget()
    again = static_lists(call, heads)
    assert again is not made
    assert torch.equal(again.work, made.work)
