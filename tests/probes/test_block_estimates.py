"""Block sparsity, FlexPrefill and XAttention: planted heads in closed form, estimators against loops, kept mass against dense masks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from headscope import Scope
from headscope.call import AttentionCall, MaskFacts
from headscope.errors import ProbeError
from headscope.models.planted import Offset, Sink, planted_llama
from headscope.probes import BlockSparsity, FlexPrefill, Needs, ProbeText, Streaming, XAttention
from headscope.probes.block_choice import block_mass, cover, kept, pooled, summed, visible_blocks
from headscope.probes.block_sparsity import coarser
from headscope.probes.flexprefill import root_divergence
from headscope.profile.passes import plan_passes

N, BLOCK = 512, 32
COUNT = N // BLOCK
CAUSAL = COUNT * (COUNT + 1) // 2


@pytest.fixture(scope="module")
def planted():
    return planted_llama({(0, 0): Sink(), (0, 1): Offset(64)}, layers=1, n_heads=4, vocab=128, max_positions=N)


@pytest.fixture(scope="module")
def ids(planted) -> torch.Tensor:
    return planted.prompt(block=73, repeats=7)[0]  # 512 tokens


def fewest(mass: list[float], share: float) -> int:
    """The fewest entries that hold a share, by trying every subset."""
    for size in range(1, len(mass) + 1):
        if any(sum(some) >= share * sum(mass) - 1e-9 for some in itertools.combinations(mass, size)):
            return size
    return 0


def test_cover_is_the_smallest_set() -> None:
    source = torch.Generator().manual_seed(0)
    for share in (0.3, 0.9, 0.99, 1.0):
        mass = torch.rand(20, 8, generator=source, dtype=torch.float64) ** 4
        chosen = cover(mass, share)
        for row, taken in zip(mass, chosen, strict=True):
            assert int(taken.sum()) == fewest(row.tolist(), share)
            assert float(row[taken].sum()) >= share * float(row.sum()) - 1e-9
    first = torch.tensor([False, False, True, False])
    assert cover(torch.tensor([0.5, 0.3, 0.0, 0.2]), 0.8, first).tolist() == [True, True, True, False]
    assert cover(torch.zeros(3), 0.9).tolist() == [False] * 3


def test_block_sparsity_of_planted_heads(planted, ids: torch.Tensor) -> None:
    found = BlockSparsity(block=BLOCK).run(Scope(planted.model), ProbeText.natural(ids))
    for share, name in ((0.9, "blocks_90"), (0.95, "blocks_95"), (0.99, "blocks_99")):
        values = found[name][0]
        assert float(values[0]) == COUNT / CAUSAL  # the sink: one block a row of blocks
        # offset 64: two blocks back, the first two rows of blocks fall back to BOS
        assert float(values[1]) == COUNT / CAUSAL
        # uniform: row t gives 1 / (t + 1) to every key
        taken = 0
        for row in range(COUNT):
            rows = range(row * BLOCK, (row + 1) * BLOCK)
            whole = sum(BLOCK / (t + 1) for t in rows)
            last = sum((t - row * BLOCK + 1) / (t + 1) for t in rows)
            taken += greedy([whole] * row + [last], share)
        assert float(values[2]) == taken / CAUSAL


def greedy(mass: list[float], share: float) -> int:
    total, held = sum(mass), 0.0
    for number, one in enumerate(sorted(mass, reverse=True)):
        if held >= share * total - 1e-6:
            return number
        held += one
    return len(mass)


def test_block_sparsity_reads_the_profiles_map() -> None:
    """Its pass is the one that the map of a profile needs anyway, and a finer map gives the same numbers."""
    from headscope.topology import AttentionModule, Topology

    text = ProbeText.natural(torch.arange(2048))
    topology = Topology((AttentionModule("a", 0, "full", 2, 2, 8, True),), "Tiny")
    base = Needs(("block_mass", "block_max"), {"block": 16})
    (one,) = plan_passes([Streaming(), BlockSparsity()], text, topology, base)
    assert one.request()["block"] == 16
    maps = torch.rand(2, 10, 10, generator=torch.Generator().manual_seed(0))
    coarse = coarser(maps, 4)
    assert coarse.shape == (2, 3, 3)
    assert float(coarse[1, 2, 0]) == pytest.approx(float(maps[1, 8:, :4].sum()))


def test_a_finer_map_gives_the_same_numbers(planted, ids: torch.Tensor) -> None:
    scope = Scope(planted.model)
    stats = scope.capture(ids, statistics=["block_mass"], block=16)
    text = ProbeText.natural(ids)
    fine = BlockSparsity(block=BLOCK).score(stats, text)["blocks_95"]
    assert torch.equal(fine, BlockSparsity(block=BLOCK).run(scope, text)["blocks_95"])
    coarse = scope.capture(ids, statistics=["block_mass"], block=64)
    with pytest.raises(ProbeError, match="a map in blocks of 64"):
        BlockSparsity(block=BLOCK).score(coarse, text)


def test_visible_blocks_of_a_window() -> None:
    for window in (None, 1, 31, 32, 33, 34, 65, 500):
        place = torch.arange(6 * BLOCK)
        behind = place[:, None] - place
        seen = (behind >= 0) & (behind < (window or 10_000))
        blocks = seen.unflatten(0, (6, BLOCK)).unflatten(2, (6, BLOCK)).any(3).any(1)
        assert torch.equal(visible_blocks(6, BLOCK, window), blocks), window


def test_planted_estimates(planted, ids: torch.Tensor) -> None:
    scope = Scope(planted.model)
    flex = FlexPrefill(block=BLOCK).run(scope, data=ids)
    # the sink: its first column of blocks, and the main diagonal, which is always kept
    assert float(flex["flexprefill_density"][0, 0]) == (2 * COUNT - 1) / CAUSAL
    assert float(flex["flexprefill_recall"][0, 0]) == pytest.approx(1.0, abs=1e-5)
    # offset 64: the diagonal two blocks back holds all but the rows that fall back to BOS, in the first column
    slash = FlexPrefill(block=BLOCK, tau=0.0).run(scope, data=ids)
    assert float(slash["flexprefill_recall"][0, 1]) == pytest.approx(1.0, abs=1e-5)
    # ... the block of columns that the last rows looked at adds one block that is on neither diagonal
    assert float(slash["flexprefill_density"][0, 1]) == (2 * COUNT - 1 + COUNT - 3 + 1) / CAUSAL
    assert float(flex["flexprefill_recall"][0, 1]) >= 0.9
    # an untouched uniform head is what block means describe exactly
    assert float(flex["flexprefill_query_aware"][0, 2]) == 1.0
    cross = XAttention(block=BLOCK, stride=8).run(scope, data=ids)
    assert float(cross["xattention_recall"][0, 0]) == pytest.approx(1.0, abs=1e-5)
    uniform = float(cross["xattention_density"][0, 2])
    assert 0.8 < uniform <= 1.0
    assert float(cross["xattention_recall"][0, 2]) >= 0.85


def random_call(n: int = 150, kv: int = 1) -> AttentionCall:
    source = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, heads, n, 8, generator=source) for heads in (2, kv))
    return AttentionCall("m", 0, q, k, k, 0.9, MaskFacts(True))


@pytest.mark.parametrize(("n", "stride"), [(160, 8), (150, 8), (131, 4), (128, 16)])
def test_antidiagonal_scores_are_those_of_loops(n: int, stride: int) -> None:
    call = random_call(n)
    chosen, _ = XAttention(block=32, stride=stride, threshold=0.7)._layer(call)
    count, tiles = -(-n // 32), n // stride
    for head in range(2):
        q, k = call.q[0, head].double(), call.k[0, 0].double()
        estimate = torch.zeros(count, count, dtype=torch.float64)
        for row in range(tiles):
            scores = []
            for column in range(row + 1):
                total = sum(float(q[row * stride + stride - 1 - m] @ k[column * stride + m]) for m in range(stride))
                scores.append(total * 0.9 / stride)
            top = max(scores)
            weights = [math.exp(one - top) for one in scores]
            for column, weight in enumerate(weights):
                estimate[row * stride // 32, column * stride // 32] += weight / sum(weights)
        for row in range(count):
            forced = {0, row}
            taken = set(forced)
            held = sum(float(estimate[row, column]) for column in forced)
            for column in sorted(set(range(row)) - forced, key=lambda c: -float(estimate[row, c])):
                if held >= 0.7 * float(estimate[row].sum()):
                    break
                taken.add(column)
                held += float(estimate[row, column])
            assert set(chosen[head, row].nonzero().flatten().tolist()) == taken, (head, row)


def test_flexprefill_on_random_heads_follows_its_definition() -> None:
    call = random_call(160)
    probe = FlexPrefill(block=32, gamma=0.6, tau=0.0)
    chosen, (aware, divergence) = probe._layer(call)
    assert not bool(aware.any())
    q, k = call.q[0].double(), call.k[0, 0].double()
    rows = torch.softmax((q[:, 128:] @ k.T * 0.9).masked_fill(torch.arange(128, 160)[:, None] < torch.arange(160), -torch.inf), -1)
    for head in range(2):
        vertical = rows[head].mean(0)
        slash = torch.stack([torch.diagonal(rows[head], 128 - d).sum() for d in range(160)]) / 32
        picked = []
        for weights in (vertical, slash):
            entries = int((weights.sort(descending=True).values.cumsum(0) < 0.6 * weights.sum()).sum()) + 1
            blocks = weights.unflatten(0, (5, 32)).sum(1)
            picked.append({0, *blocks.topk(entries // 32 + 1).indices.tolist()})
        expected = {(i, j) for i in range(5) for j in range(i + 1) if j in picked[0] or i - j in picked[1]}
        assert {tuple(place) for place in chosen[head].nonzero().tolist()} == expected
        means = k.unflatten(0, (5, 32)).mean(1)
        estimate = torch.softmax(q[head, 128:].mean(0) @ means.T * 0.9, -1)
        from scipy.spatial.distance import jensenshannon

        truth = vertical.unflatten(0, (5, 32)).sum(1)
        assert float(divergence[head]) == pytest.approx(float(jensenshannon(estimate.numpy(), truth.numpy())), abs=1e-5)
    everything, (aware, _) = FlexPrefill(block=32, gamma=0.6, tau=1.0)._layer(call)
    assert bool(aware.all())
    q_means = q.unflatten(1, (5, 32)).mean(2)
    for head in range(2):
        weights = torch.softmax((q_means[head] @ means.T * 0.9).masked_fill(torch.arange(5)[:, None] < torch.arange(5), -torch.inf), -1)
        held = sum(float(weights[i, j]) for i, j in everything[head].nonzero().tolist())
        assert held >= 0.6 * 5
        assert bool(everything[head].diagonal().all())
        assert bool(everything[head][:, 0].all())


def test_divergence_of_distributions_with_empty_blocks() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).double(), torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]).double()
    assert root_divergence(p, q).tolist() == pytest.approx([math.sqrt(0.5 * math.log(2)), 0.0])


def test_kept_is_the_mass_of_a_dense_mask() -> None:
    call = random_call(150)
    mass = block_mass(call, 32)
    scores = (call.q[0] @ call.k[0].transpose(-1, -2)).double() * 0.9
    weights = torch.softmax(scores.masked_fill(torch.arange(150)[:, None] < torch.arange(150), -torch.inf), -1)
    choice = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    density, recall = kept(choice, mass, visible_blocks(5, 32))
    whole = choice.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :150, :150]
    torch.testing.assert_close(recall, (weights * whole).sum((-1, -2)) / 150, atol=1e-6, rtol=0)
    torch.testing.assert_close(density, choice.tril().double().sum((-1, -2)) / 15)


def test_pooling_of_a_partial_block() -> None:
    values = torch.arange(10.0).view(1, 10, 1)
    assert pooled(values, 4).flatten().tolist() == [1.5, 5.5, 8.5]
    assert summed(values[..., 0], 4).flatten().tolist() == [6.0, 22.0, 17.0]


def test_refusals(tiny_llama) -> None:
    scope = Scope(tiny_llama)
    for probe in (FlexPrefill(), XAttention()):
        with pytest.raises(ProbeError, match="4 are needed to leave any out"):
            probe.run(scope, context=250)
    with pytest.raises(ProbeError, match="whole tiles"):
        XAttention(stride=24).run(scope)
    with pytest.raises(ProbeError, match="gamma is a share"):
        FlexPrefill(gamma=1.5).run(scope)
    with pytest.raises(ProbeError, match="power of two"):
        BlockSparsity(block=100).run(scope, ProbeText.natural(torch.arange(90)))
