"""MInference's search: planted heads get their pattern, kept mass is that of masks written out, ties go to the simpler pattern."""

from __future__ import annotations

import pytest
import torch

from headscope import Scope
from headscope.call import AttentionCall, MaskFacts
from headscope.errors import ProbeError
from headscope.models.planted import BlockLocal, Offset, Sink, Vertical, planted_llama
from headscope.probes import MInference, ProbeText
from headscope.probes.block_choice import distances, top
from headscope.probes.minference import FAMILIES, LAST_ROWS, POOL, Candidate, Mask, judge, scaled

N = 1024


@pytest.fixture(scope="module")
def planted():
    heads = {(1, 0): Sink(), (1, 1): Offset(5), (1, 2): Offset(300), (1, 3): Vertical(positions=(301, 302)), (1, 4): BlockLocal(128)}
    return planted_llama(heads, layers=2, n_heads=8, vocab=128, max_positions=N)


@pytest.fixture(scope="module")
def ids(planted) -> torch.Tensor:
    return planted.prompt(block=93, repeats=11, seed=1)[0]


@pytest.mark.parametrize("scoring", ["mass", "outputs"])
def test_planted_heads_get_their_pattern(planted, ids: torch.Tensor, scoring: str) -> None:
    values(planted.model)
    found = MInference(scoring=scoring).run(Scope(planted.model), data=ids)
    names = [FAMILIES[int(number)] for number in found["minference_pattern"][1, :5]]
    assert names == ["a_shape", "a_shape", "vertical_slash", "vertical_slash", "block_sparse"]
    # kept mass from the closed forms, with the masks written out
    expected = {place: matrix[0] for place, matrix in planted.expected(ids[None]).items()}
    first = round(2500 * N / 30_000)
    place = torch.arange(N)
    behind = place[:, None] - place
    a_shape = (place < scaled(100, N)) | (behind < scaled(800, N))
    for head in range(5):
        kept = (expected[1, head] * (a_shape & (behind >= 0))).sum(-1)[first:].mean()
        assert float(found["a_shape_mass"][1, head]) == pytest.approx(float(kept), abs=1e-4)
    assert float(found["vertical_slash_mass"][1, 2]) == pytest.approx(1.0, abs=1e-4)
    assert float(found["vertical_slash_mass"][1, 3]) == pytest.approx(1.0, abs=1e-4)
    assert float(found["block_sparse_mass"][1, 4]) == pytest.approx(1.0, abs=1e-4)
    table = found.tables["search"]
    assert table.groupby(["layer", "head"])["won"].sum().eq(1).all()
    assert set(table["pattern"]) == set(FAMILIES)
    assert found.numbers["minference_a_shape"] == float((found["minference_pattern"] == 0).double().mean())


def values(model) -> None:
    """Gives every planted head values of its own, so that outputs tell which keys were kept."""
    torch.manual_seed(0)
    with torch.no_grad():
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight.copy_(torch.randn_like(attention.v_proj.weight) * (model.model.embed_tokens.weight.abs().amax(0) < 2))


def call_of(n: int = 192, heads: int = 2, sinks: bool = False) -> AttentionCall:
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, count, n, 16, generator=source) for count in (heads, 1, 1))
    return AttentionCall("m", 0, q, k, v, 0.5, MaskFacts(True), sink_logits=torch.tensor([0.5, 2.0]) if sinks else None)


@pytest.mark.parametrize("sinks", [False, True])
def test_kept_mass_density_and_deviations_are_those_of_dense_masks(sinks: bool) -> None:
    call, n, first = call_of(sinks=sinks), 192, 20
    scores = (call.q[0] @ call.k[0].transpose(-1, -2)).double() * 0.5
    place = torch.arange(n)
    behind = place[:, None] - place
    scores = scores.masked_fill(behind < 0, -torch.inf)
    extra = call.sink_logits.double()[:, None, None] if sinks else torch.full((2, 1, 1), -torch.inf).double()
    weights = torch.softmax(torch.cat([scores, extra.expand(-1, n, 1)], -1), -1)[..., :n]
    sizes = [("a_shape", 4, 9), ("vertical_slash", 11, 23), ("block_sparse", 0, 0)]
    masks = [Candidate(*one).mask(call, 2) for one in sizes]
    last = weights[:, -LAST_ROWS:]
    slash = torch.stack([torch.stack([torch.diagonal(row, n - LAST_ROWS - d).sum() for d in range(n)]) for row in last])
    torch.testing.assert_close(distances(last), slash, atol=1e-12, rtol=0)
    column, diagonal = last.sum(1), slash.clone()
    column[:, : scaled(30, n)] = diagonal[:, : scaled(30, n)] = torch.inf
    pooled_q, pooled_k = (part[0].unflatten(1, (-1, POOL)).mean(2) for part in (call.q, call.k))
    product = (pooled_q @ pooled_k.transpose(-1, -2)).masked_fill(torch.arange(6)[:, None] < torch.arange(6), -torch.inf)
    dense = [
        ((place < 4) | (behind < 9)).expand(2, -1, -1),
        torch.stack(
            [torch.isin(place, c.topk(11).indices) | torch.isin(behind, d.topk(23).indices) for c, d in zip(column, diagonal, strict=True)]
        ),
        torch.zeros(2, 6, 6, dtype=torch.bool)
        .scatter(-1, product.topk(3).indices, True)
        .repeat_interleave(POOL, 1)
        .repeat_interleave(POOL, 2),
    ]
    found = judge(call, masks, first, outputs=True)
    v = call.v[0, 0].double()
    for number, mask in enumerate(dense):
        kept = weights * (mask & (behind >= 0))
        torch.testing.assert_close(found[0, number], kept.sum(-1)[:, first:].mean(-1), atol=1e-6, rtol=0)
        torch.testing.assert_close(found[1, number], (mask & (behind >= 0)).double().sum((-1, -2)) / (n * (n + 1) / 2))
        rest = torch.softmax(torch.cat([scores.masked_fill(~mask, -torch.inf), extra.expand(-1, n, 1)], -1), -1)[..., :n].nan_to_num()
        far = ((weights @ v - rest @ v).abs() > 5e-3)[:, first:].double().sum((-1, -2))
        assert ((found[2, number] - far).abs() <= 2).all()  # numbers that sit on the threshold in float32
    assert float(found[2].max()) > 100


def test_masks_by_rows_are_the_whole_mask() -> None:
    source = torch.Generator().manual_seed(1)
    columns, diagonals = (torch.rand(3, 100, generator=source) < 0.2 for _ in range(2))
    place = torch.arange(100)
    whole = columns[:, None] | diagonals[:, (place[:, None] - place).clamp_min(0)]
    rows = Mask(columns, diagonals).rows(40, 71)
    causal = place[40:71, None] >= place[:71]
    assert torch.equal(rows & causal, whole[:, 40:71, :71] & causal)


def test_top_takes_the_first_of_equals() -> None:
    assert top(torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]]), torch.tensor([2, 1])).tolist() == [
        [False, True, True, False],
        [True, False, False, False],
    ]


def test_ties_go_to_the_simpler_and_then_the_smaller_pattern() -> None:
    candidates = [
        Candidate("a_shape", 1, 9),
        Candidate("vertical_slash", 5, 9),
        Candidate("vertical_slash", 1, 3),
        Candidate("block_sparse", 0, 0),
    ]
    density = torch.tensor([0.4, 0.3, 0.1, 0.05])[:, None, None]
    mass = torch.tensor([[0.9, 0.9995, 1.0, 0.99], [0.9999, 1.0, 1.0, 1.0], [0.2, 0.3, 0.4, 0.7]]).T[:, None]
    chosen = MInference()._choose(candidates, mass, density, mass)
    assert chosen.tolist() == [[2, 0, 3]]


def test_sizes_shrink_with_the_text() -> None:
    assert [scaled(size, 30_000) for size in (100, 800)] == [100, 800]
    assert [scaled(size, 3_000) for size in (100, 800, 3)] == [10, 80, 1]
    assert scaled(800, 100_000) == 800
    assert MInference().candidates(30_000) == [
        Candidate("a_shape", 100, 800),
        *(Candidate("vertical_slash", *one) for one in ((30, 800), (100, 750), (500, 700), (3500, 100))),
        Candidate("block_sparse", 0, 0),
    ]


def test_refusals(planted) -> None:
    scope = Scope(planted.model)
    with pytest.raises(ProbeError, match="raise the context"):
        MInference().run(scope, data=torch.arange(2, 102))
    with pytest.raises(ProbeError, match="did you mean mass"):
        MInference(scoring="mas").run(scope)
    with pytest.raises(ProbeError, match="runs on one"):
        MInference().run(scope, data=[ProbeText.natural(torch.arange(300))] * 2)
    with pytest.raises(ProbeError, match="each family needs"):
        MInference(a_shape=()).run(scope)
