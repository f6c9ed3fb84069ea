"""Rules that choose per input equal a naive selection on the dense matrix: FlexPrefill's tiles, AnchorAttention's stripes."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import PlanError
from headscope.plans import PATTERNS, FlexBlocks, GroupColumns, HeldBlocks, Pattern, Stripes, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_rules import fewest
from headscope.plans.indices import choose, element
from headscope.plans.registry import pattern_from


def call_of(length: int, rows: int | None = None, seed: int = 0, padding: int = 0, sharp: float = 3.0) -> AttentionCall:
    """Two query heads on one key head; the text proper is the same whatever the padding and the number of rows."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, length, 16, generator=generator, dtype=torch.float64) * sharp
    k, v = (torch.randn(1, 1, length, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    k[:, :, ::7] += 0.4
    rows = length if rows is None else rows
    q = q[:, :, length - rows :]
    if not padding:
        return AttentionCall("m", 0, q, k, v, 0.25, MaskFacts(causal=True), query_offset=length - rows)
    junk = torch.full((1, 1, padding, 16), 5.0, dtype=torch.float64)
    q, k, v = torch.cat([junk.expand(1, 2, -1, -1), q], 2), torch.cat([junk, k], 2), torch.cat([junk, v], 2)
    valid = (torch.arange(length + padding) >= padding)[None]
    return AttentionCall("m", 0, q, k, v, 0.25, MaskFacts(causal=True, key_valid=valid), first_token=torch.tensor([padding]))


def dense(call: AttentionCall, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [Nq, Nk] with -inf in the future, A)."""
    scores = call.q[0, head] @ call.k[0, 0].T * call.scale
    at = torch.arange(call.q.shape[2])[:, None] + call.query_offset
    scores = scores.masked_fill(torch.arange(call.k.shape[2]) > at, -torch.inf)
    return scores, torch.softmax(scores, -1)


def smallest_set(values: list[float], share: float) -> set[int]:
    """The fewest places that hold `share`, one at a time, the largest first."""
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))
    taken: set[int] = set()
    while sum(values[at] for at in taken) < share * sum(values) - 1e-9 and len(taken) < len(values):
        taken.add(order[len(taken)])
    return taken


def naive_flex(call: AttentionCall, head: int, rule: FlexBlocks) -> tuple[list[set[int]], bool]:
    """FlexPrefill's choice from the whole matrix, entry by entry."""
    length, size = call.k.shape[2], rule.block
    count = math.ceil(length / size)
    _, weights = dense(call, head)
    last = weights[-size:]
    vertical = [float(last[:, s].sum()) / size for s in range(length)]
    slash = [0.0] * length
    for i in range(size):
        for s in range(length - size + i + 1):
            slash[length - size + i - s] += float(last[i, s]) / size
    q, k = call.q[0, head], call.k[0, 0]
    mean_k = torch.stack([k[n * size : (n + 1) * size].mean(0) for n in range(count)])
    estimate = torch.softmax(q[-size:].mean(0) @ mean_k.T * call.scale, -1).tolist()
    truth = [sum(vertical[n * size : (n + 1) * size]) for n in range(count)]
    divergence = 0.0
    for p, r in zip(estimate, truth, strict=True):
        for one in (p, r):
            divergence += 0.5 * one * math.log(one / ((p + r) / 2)) if one > 0 else 0.0
    aware = math.sqrt(divergence) < rule.tau
    budgets = [
        rule.least if aware else max(rule.least, min(count, len(smallest_set(part, rule.gamma)) // size + 1)) for part in (vertical, slash)
    ]
    by_distance = [sum(slash[n * size : (n + 1) * size]) for n in range(count)]
    columns = set(sorted(range(count), key=lambda n: -truth[n])[: budgets[0]]) | {0}
    diagonals = set(sorted(range(count), key=lambda n: -by_distance[n])[: budgets[1]]) | {0}
    mean_q = torch.stack([q[n * size : (n + 1) * size].mean(0) for n in range(count)])
    pooled = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        pooled[i, : i + 1] = torch.softmax(mean_q[i] @ mean_k[: i + 1].T * call.scale, -1)
    tiles = smallest_set(pooled.flatten().tolist(), rule.gamma) if aware else set()
    return [{j for j in range(i + 1) if j in columns or i - j in diagonals or i * count + j in tiles} for i in range(count)], aware


@pytest.mark.parametrize("length", [160, 150])
@pytest.mark.parametrize("tau", [0.0, 2.0], ids=["vertical-slash", "query-aware"])
@pytest.mark.parametrize("head", [0, 1])
def test_flex_blocks_equal_the_naive_choice(length: int, tau: float, head: int) -> None:
    rule = FlexBlocks(gamma=0.7, tau=tau, block=16)
    call = call_of(length, seed=length)
    expected, aware = naive_flex(call, head, rule)
    assert aware == (tau > 0)
    found = choose(call, head, rule)
    assert [set(found.row(tile)) for tile in range(10)] == expected
    assert sum(map(len, expected)) < 55, "nothing was left out, so nothing was tested"


def naive_stripes(call: AttentionCall, head: int, rule: Stripes) -> torch.Tensor:
    """[N, N] bool: AnchorAttention's mask, row by row, from the dense scores."""
    length, size, width = call.k.shape[2], rule.block, rule.block * rule.step
    scores, _ = dense(call, head)
    out = torch.zeros(length, length, dtype=torch.bool)
    for group in range(math.ceil(length / width)):
        begin, end = group * width, min(length, (group + 1) * width)
        picked = set()
        for top in range(begin, end, size):
            rows = range(top, min(top + size, end))
            anchors = [max(float(scores[t, s]) for s in range(t + 1) if s < size or s >= begin) for t in rows]
            mean = call.q[0, head, list(rows)].mean(0)
            for s in range(size, begin):
                if float(mean @ call.k[0, 0, s]) * call.scale + rule.theta >= sum(anchors) / len(anchors):
                    picked.add(s)
        for t in range(begin, end):
            out[t, [s for s in range(t + 1) if s < size or s >= begin or s in picked]] = True
    return out


@pytest.mark.parametrize("length", [192, 170])
@pytest.mark.parametrize("theta", [2.0, 3.0])
def test_stripes_equal_the_naive_choice(length: int, theta: float) -> None:
    rule = Stripes(theta, block=8, step=4)
    call = call_of(length, seed=length)
    found = choose(call, 1, rule)
    at = torch.arange(length)
    expected = naive_stripes(call, 1, rule)
    assert torch.equal(found.visible(at, at) & (at <= at[:, None]), expected)
    assert found.kept(length) == float(expected.sum())
    always = GroupColumns((), 8, 4).kept(length)
    assert always < found.kept(length) < length * (length + 1) / 2


@pytest.mark.parametrize("rule", [FlexBlocks(0.7, 0.0, 16), FlexBlocks(0.7, 2.0, 16), Stripes(1.0, 16, 2)], ids=str)
def test_rules_see_the_text_and_not_its_padding(rule: Pattern) -> None:
    assert choose(call_of(160, padding=23), 0, rule) == choose(call_of(160), 0, rule)


def test_chunks_choose_for_their_rows() -> None:
    """The last chunk of a text chooses for its own rows what the whole text chooses for them, where the rule reads nothing else."""
    rule = Stripes(1.0, 16, 2)
    whole, part = choose(call_of(160), 0, rule), choose(call_of(160, rows=64), 0, rule)
    at, rows = torch.arange(160), torch.arange(96, 160)
    assert torch.equal(whole.visible(rows, at), part.visible(rows, at))
    flex = FlexBlocks(0.7, 0.0, 16)
    assert [choose(call_of(160, rows=64), 0, flex).row(n) for n in range(6, 10)] == [
        choose(call_of(160), 0, flex).row(n) for n in range(6, 10)
    ]
    for one in (rule, flex):
        with pytest.raises(PlanError, match="multiple of 16"):
            choose(call_of(160, rows=30), 0, one)


def test_stripes_keep_what_scores_near_the_anchor() -> None:
    """A planted key far back that the last group's rows ask for is the only stripe."""
    call = call_of(128, sharp=0.1)
    call.q[0, 0, 96:] = 0
    call.q[0, 0, 96:, 0] = 4.0
    call.k[0, 0, :, 0] = 0
    call.k[0, 0, 41, 0] = 9.0
    found = choose(call, 0, Stripes(-1.0, block=16, step=2))
    assert found.columns[3] == (41,)


@pytest.mark.parametrize(
    "pattern", [FlexBlocks(), Stripes(), HeldBlocks(0.3, 10, 2), TopKeys(8, full=True), TopBlocks(mass=0.9, expected=0.3)], ids=str
)
def test_patterns_are_registered_and_count_as_dense_until_measured(pattern: Pattern) -> None:
    assert type(pattern) in PATTERNS.values()
    assert pattern_from(pattern.to_dict()) == pattern
    with pytest.raises(PlanError, match="chosen per input"):
        pattern.visible(torch.arange(3), torch.arange(3))
    expected = {"held_blocks": (2 + 8 * 10 / 32) / 10, "top_blocks": 0.3}.get(pattern.kind, 1.0)
    assert pattern.density(1024) == pytest.approx(expected)
    measured = FlexBlocks(expected=0.25)
    assert measured.density(500) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: FlexBlocks(gamma=0.0), "share"),
        (lambda: FlexBlocks(tau=-1.0), "not negative"),
        (lambda: FlexBlocks(tau=math.nan), "not negative"),
        (lambda: FlexBlocks(expected=1.5), "share"),
        (lambda: Stripes(theta=math.inf), "difference of scores"),
        (lambda: Stripes(block=0), "1 or more"),
        (lambda: GroupColumns(((3,),)), "lie before the group"),
        (lambda: GroupColumns(((), (5, 2)), 8, 1), "ascending"),
        (lambda: HeldBlocks(0.0, 10, 2), "part of the tiles"),
        (lambda: HeldBlocks(0.5, 10, 11), "dense <= steps"),
        (lambda: TopKeys(4, full=True, source=(0, 0)), "cannot see all"),
        (lambda: TopBlocks(mass=0.9, expected=0.0), "part of the entries"),
    ],
)
def test_values_that_describe_no_pattern_are_refused(make: object, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        make()


def test_fewest_is_the_smallest_set() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9, 1.0):
        values = torch.rand(40, generator=generator, dtype=torch.float64).round(decimals=1)
        assert set(fewest(values, share).nonzero().flatten().tolist()) == smallest_set(values.tolist(), share)


def test_minference_indices_follow_the_paper() -> None:
    """The last 64 rows choose; the first 30 columns and the last 100 diagonals are always there, within the budgets of 1000 and 6096."""
    call = call_of(700, seed=5)
    found = choose(call, 0, VerticalSlash(90, 180))
    _, weights = dense(call, 0)
    last = weights[-64:]
    columns = last.sum(0)
    expected = set(range(30)) | set((columns[30:].topk(60).indices + 30).tolist())
    assert set(found.columns) == expected
    slash = torch.zeros(700, dtype=torch.float64)
    for i in range(64):
        for s in range(637 + i):
            slash[636 + i - s] += last[i, s]
    assert set(found.diagonals) == set(range(100)) | set((slash[100:].topk(80).indices + 100).tolist())
    assert element(call, 0).q.shape == call.q.shape
