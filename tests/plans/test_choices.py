"""Choosing keys in tensors: the same keys as the rules head by head, and lists that hold exactly them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.plans import Budget, TopKeys
from headscope.plans.choices import Choice, StandIns, choose_budgets, choose_top_keys, lists_of
from headscope.plans.indices import Chosen, choose, element


def call_of(seed: int, rows: int, padded: bool, window: int | None = None, softcap: float | None = None, offset: int = 0) -> AttentionCall:
    gen = torch.Generator().manual_seed(seed)
    keys = 60
    q, k = torch.randn(2, 4, rows, 16, generator=gen) * 2, torch.randn(2, 2, keys, 16, generator=gen)
    first = torch.tensor([0, 23]) if padded else None
    valid = None if first is None else torch.arange(keys)[None] >= first[:, None]
    mask = MaskFacts(causal=True, window=window, key_valid=valid)
    return AttentionCall("m", 0, q, k, k, 0.25, mask, softcap, query_offset=keys - rows, key_offset=offset, first_token=first)


def same(call: AttentionCall, found: Choice, patterns: list[Budget] | list[TopKeys]) -> None:
    for b in range(2):
        start = 0 if call.first_token is None else int(call.first_token[b])
        for at, (head, pattern) in enumerate(zip(found.heads, patterns, strict=True)):
            expected = choose(element(call, b), head, pattern)
            assert isinstance(expected, Chosen)
            own = sorted(one for one in found.columns[b, at].tolist() if one >= 0)
            assert own == [one + start for one in expected.columns if one < expected.since]
            assert int(found.since[b, at]) == expected.since + start


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [60, 20, 3])
def test_budgets(rows: int, padded: bool) -> None:
    patterns = [Budget(10, 8), Budget(6, 4, grouped=False), Budget(5, 8, sink=2, recent=12), Budget(3, 50, pool=1)]
    for window, softcap in ((None, None), (31, 2.0)):
        call = call_of(rows, rows, padded, window, softcap)
        same(call, choose_budgets(call, range(4), patterns), patterns)


@pytest.mark.parametrize("padded", [False, True])
def test_top_keys(padded: bool) -> None:
    patterns = [TopKeys(10, window=4), TopKeys(6, sink=0, window=1), TopKeys(30, window=20), TopKeys(100, sink=9, window=3)]
    call = call_of(5, 1, padded)
    same(call, choose_top_keys(call, range(4), patterns), patterns)


@pytest.mark.parametrize("padded", [False, True])
def test_top_blocks(padded: bool) -> None:
    patterns = [
        TopKeys(16, window=4, block=8, estimate="bounds"),
        TopKeys(12, sink=0, window=1, block=4, estimate="mean"),
        TopKeys(400, window=20, block=8, estimate="bounds"),
        TopKeys(8, sink=9, window=70, block=4, estimate="mean"),
    ]
    stand_ins = StandIns()
    for keys in (25, 41, 60):
        call = call_of(5, 1, padded)
        call = replace(call, k=call.k[:, :, :keys], v=None, query_offset=keys - 1, mask=MaskFacts(True))
        same(call, choose_top_keys(call, range(4), patterns, stand_ins), patterns)


def test_bounds_are_never_below_a_blocks_scores() -> None:
    call = call_of(6, 1, False)
    stands = StandIns().of(call, 4, "bounds", 15)
    for head in range(4):
        q = call.q[0, head, 0]
        bound = stands[0, head // 2] @ torch.cat([q.clamp(min=0), q.clamp(max=0)])
        assert bool((bound + 1e-5 >= (call.k[0, head // 2] @ q).unflatten(0, (15, 4)).amax(1)).all())


def test_kernels_score_and_list_the_same() -> None:
    """In Triton's interpreter: scores, and lists made in three passes over a bit field longer than one stretch."""
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    from headscope.kernels import sparse_decode_choose as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = call_of(7, 1, False)
    call = replace(call, q=call.q.to(device), k=call.k.to(device))
    found = kernels.key_scores(call.q[:, :, 0], call.k, 0.5)
    assert torch.allclose(found, 0.5 * (call.q @ call.k.repeat_interleave(2, 1).transpose(-1, -2))[:, :, 0], atol=1e-5)
    gen = torch.Generator().manual_seed(0)
    keys = 2 * kernels.STRETCH + 700
    columns_of = {head: torch.stack([torch.randperm(keys, generator=gen)[:900] for _ in range(2)]) for head in (0, 1, 3, 4)}
    chosen = {head: (columns, torch.tensor([keys - 90, keys])) for head, columns in columns_of.items()}
    expected = lists_of(chosen, 2, 2, 3, keys, 5)
    columns = torch.full((2, 6, 900), -1)
    since = torch.zeros(2, 6, dtype=torch.int64)
    for head, (one, until) in chosen.items():
        columns[:, head], since[:, head] = one, until
    lists = kernels.lists_from(columns.to(device), since.to(device), 2, keys, 5, expected.entries.shape[2])
    assert torch.equal(lists.counts.cpu(), expected.counts)
    for b in range(2):
        for g in range(2):
            count = int(lists.counts[b, g])
            assert torch.equal(lists.entries[b, g, :count].cpu(), expected.entries[b, g, :count])
            assert torch.equal(lists.bits[b, g, :count].cpu(), expected.bits[b, g, :count])


@pytest.mark.parametrize("seed", range(6))
def test_lists_hold_each_key_once_with_the_bits_of_its_heads(seed: int) -> None:
    rng = random.Random(seed)
    kv_heads, group, keys, origin = rng.choice((1, 2, 3)), rng.choice((1, 2, 5)), 50, rng.choice((0, 7))
    chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    expected: dict[tuple[int, int], dict[int, int]] = {(b, g): {} for b in range(2) for g in range(kv_heads)}
    for head in rng.sample(range(kv_heads * group), max(1, kv_heads * group - 1)):
        since = torch.tensor([rng.randint(20, 50), rng.randint(20, 50)])
        columns = torch.full((2, 15), -1)
        for b in range(2):
            count = rng.randint(0, 15)
            columns[b, :count] = torch.tensor(rng.sample(range(50), count))
            for one in columns[b, :count].tolist():
                if origin <= one < int(since[b]):
                    place = expected[b, head // group]
                    place[one - origin] = place.get(one - origin, 0) | 1 << head % group
        chosen[head] = columns, since
    lists = lists_of(chosen, 2, kv_heads, group, keys, origin)
    for (b, g), found in expected.items():
        count = int(lists.counts[b, g])
        assert dict(zip(lists.entries[b, g, :count].tolist(), lists.bits[b, g, :count].tolist(), strict=True)) == found
        assert count == len(found)


def test_a_choice_of_patterns_counts_from_each_texts_start() -> None:
    choice = Choice.of([[Chosen((0, 3, 9), 5)], [Chosen((1,), 4)]], [7], [0, 10], torch.device("cpu"))
    assert choice.row(7)[0].tolist() == [[0, 3, -1], [11, -1, -1]]
    assert choice.row(7)[1].tolist() == [5, 14]
    assert choice.select(torch.tensor([1, 1])).since.tolist() == [[14], [14]]
