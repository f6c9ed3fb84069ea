"""Queries, layers and maps: each probe against a direct computation on a random model in float64, and against planted heads."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import headscope as hs
from headscope.errors import HeadscopeError, ProbeError
from headscope.models.planted import Duplicate, Offset, Previous, Sink, planted_llama
from headscope.probes import (
    EntropyLength,
    KeyOverlap,
    LayerRedundancy,
    MapSimilarity,
    ProbeText,
    QueryNorm,
    QuerySimilarity,
    SemanticDistance,
)
from headscope.probes.entropy_length import slope
from headscope.probes.query_norm import route
from headscope.probes.query_similarity import similarity
from headscope.scope import Scope

LAYERS, HEADS, GROUP, WIDTH, N = 3, 4, 2, 8, 70


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // GROUP,
            "head_dim": WIDTH,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            **more,
        }
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def scope(model):
    return Scope(model, name="tiny")


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(12)
    return ProbeText.natural(torch.randint(61, (N,)))


@pytest.fixture(scope="module")
def eager(model, text):
    """What transformers computes, its norms and softmax in float32: attentions [L, H, N, N], the stream before each layer, q and v."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=text.ids[None], output_attentions=True, output_hidden_states=True)
        cos, sin = model.model.rotary_emb(out.hidden_states[0], torch.arange(N)[None])
        q, before, v = [], [], []
        for block, hidden in zip(model.model.layers, out.hidden_states, strict=False):
            read = block.input_layernorm(hidden)
            raw = block.self_attn.q_proj(read).view(1, N, HEADS, WIDTH).transpose(1, 2)
            key = block.self_attn.k_proj(read).view(1, N, HEADS // GROUP, WIDTH).transpose(1, 2)
            before.append(raw[0])
            q.append(apply_rotary_pos_emb(raw, key, cos, sin)[0][0])
            v.append(block.self_attn.v_proj(read).view(N, HEADS // GROUP, WIDTH).transpose(0, 1))
    model.set_attn_implementation("sdpa")
    return torch.stack([one[0] for one in out.attentions]), out.hidden_states, q, before, v


def pairwise(q: torch.Tensor) -> float:
    """The mean cosine over all pairs, by the T x T matrix."""
    count = len(q)
    matrix = torch.nn.functional.cosine_similarity(q[:, None], q[None], dim=-1)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))


def test_query_similarity_is_the_mean_over_pairs(scope, text, eager):
    _, _, q, before, _ = eager
    result = QuerySimilarity(window=20, span=32, stride=8).run(scope, text)
    for layer in range(LAYERS):
        for head in range(HEADS):
            assert float(result["query_similarity"][layer, head]) == pytest.approx(pairwise(q[layer][head][-20:]), abs=1e-6)
            windows = [pairwise(before[layer][head][start : start + 32]) for start in range(0, N - 31, 8)]
            assert float(result["query_similarity_pre"][layer, head]) == pytest.approx(sum(windows) / len(windows), abs=1e-5)
    table = result.tables["layers"]
    assert table.budget_share.sum() == pytest.approx(1)
    assert table.preference.tolist() == pytest.approx((1 - result["query_similarity"].mean(1)).tolist())
    whole = QuerySimilarity(window=20, span=4096).run(scope, text)["query_similarity_pre"]
    assert float(whole[1, 2]) == pytest.approx(pairwise(before[1][2]), abs=1e-5), "a text shorter than a window is one window"


def test_query_similarity_in_closed_form():
    """Equal queries 1, queries that cancel -1 / (T - 1), orthogonal ones 0; a zero query is similar to nothing."""
    assert float(similarity(torch.ones(5, 3))) == pytest.approx(1)
    assert float(similarity(torch.tensor([[1.0, 0], [-2.0, 0]]))) == pytest.approx(-1)
    assert float(similarity(torch.eye(6))) == pytest.approx(0, abs=1e-12)
    assert float(similarity(torch.tensor([[1.0, 0], [0, 0], [3.0, 0]]))) == pytest.approx(1 / 3)


def test_queries_before_norms_of_their_own(text):
    """Qwen 3 normalises queries: the pre value is of the projection itself, so a gain of the norm changes the post value only."""
    torch.manual_seed(13)
    config = Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    model = Qwen3ForCausalLM(config).double().eval()
    first = QuerySimilarity(window=16).run(Scope(model), text)
    model.model.layers[0].self_attn.q_norm.weight.data[0] = 9.0
    second = QuerySimilarity(window=16).run(Scope(model), text)
    assert torch.equal(first["query_similarity_pre"][0], second["query_similarity_pre"][0])
    assert not torch.allclose(first["query_similarity"][0], second["query_similarity"][0], atol=1e-3)


def test_query_norms_and_the_router(scope, text, eager):
    _, _, q, _, _ = eager
    result = QueryNorm().run(scope, text)
    for layer in range(LAYERS):
        lengths = q[layer].norm(dim=-1)  # [H, N]
        torch.testing.assert_close(result["query_norm"][layer], lengths.mean(1), rtol=1e-6, atol=1e-6)
        gates = torch.softmax(lengths / lengths.std(0, keepdim=True), 0)
        torch.testing.assert_close(result["moh_gate"][layer], gates.mean(1), rtol=1e-6, atol=1e-6)
        smallest = lengths.argmin(0)
        kept = torch.stack([(smallest != head).double().mean() for head in range(HEADS)])
        torch.testing.assert_close(result["moh_active"][layer], kept)
    official = QueryNorm(shared=0.5, routed=0.25).run(scope, text)
    assert (official["moh_active"][:, :2] == 1).all()
    torch.testing.assert_close(official["moh_active"][:, 2:].sum(1), torch.ones(LAYERS, dtype=torch.float64))


def test_router_by_hand():
    """Lengths 1 2 3 6, first head shared: std of (2, 3, 6) is sqrt(13 / 3); one routed head, the last."""
    gates, on = route(torch.tensor([[1.0, 2, 3, 6]]), 1, 1)
    want = torch.softmax(torch.tensor([2.0, 3, 6]).double() / math.sqrt(13 / 3), 0)
    torch.testing.assert_close(gates[0], torch.cat([torch.ones(1).double(), want]))
    assert on.tolist() == [[1, 0, 0, 1]]
    equal, _ = route(torch.ones(1, 4), 0, 3)
    torch.testing.assert_close(equal[0], torch.full((4,), 0.25).double())


def test_semantic_distance_is_that_of_the_vectors(scope, text, eager):
    maps, _, _, _, v = eager
    result = SemanticDistance(window=6, tokens=9).run(scope, text)
    for layer in range(LAYERS):
        vectors = []
        for head in range(HEADS):
            weights = maps[layer, head, -6:].mean(0)
            best = weights.sort(descending=True).indices[:9]
            vectors.append(sum(weights[s] * v[layer][head // GROUP, s] for s in best.tolist()))
        centre = sum(vectors) / HEADS
        want = torch.stack([(one - centre).norm() for one in vectors])
        torch.testing.assert_close(result["semantic_distance"][layer], want, rtol=1e-6, atol=1e-6)
        order = want.argsort()
        assert result["semantic_rank"][layer][order].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("maps", ["mean", "stacked"])
def test_map_similarity_is_the_cosine_of_the_matrices(scope, text, eager, maps, monkeypatch):
    """In blocks of a few rows, and in one."""
    whole = eager[0]
    flat = whole.mean(1).flatten(1) if maps == "mean" else whole.flatten(1)
    want = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    heads = whole.flatten(0, 1).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(heads[:, None], heads[None], dim=-1)
    for cells in (1 << 25, LAYERS * HEADS * N * 7):
        monkeypatch.setattr("headscope.probes.map_similarity.CELLS", cells)
        result = MapSimilarity(maps).run(scope, text)
        torch.testing.assert_close(torch.tensor(result.tables["layers"].to_numpy()), want, rtol=1e-6, atol=1e-6)
        found = result["map_similarity"]
        assert found[0].isnan().all()
        torch.testing.assert_close(found[1:], torch.tensor([[want[1, 0]] * HEADS, [want[2, 1]] * HEADS]).double(), rtol=1e-6, atol=1e-6)
        twin = result["map_twin"]
        assert twin[0].isnan().all()
        torch.testing.assert_close(twin[1], cosine[4:8, :4].amax(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(twin[2], cosine[8:, :8].amax(1), rtol=1e-6, atol=1e-6)
    row = result.tables["twins"].iloc[-1]
    assert (row["layer"], row["head"]) == (2, 3)
    assert row["earlier_layer"] * HEADS + row["earlier_head"] == int(cosine[11, :8].argmax())


def test_key_overlap_is_that_of_the_sets(scope, text, eager):
    maps = eager[0]
    rows = torch.linspace(N // 2, N - 1, 8).round().long().tolist()
    result = KeyOverlap(share=0.2, rows=8).run(scope, text)

    def top(weights, row):
        order = sorted(range(row + 1), key=lambda s: (-float(weights[s]), s))
        return set(order[: math.ceil(0.2 * (row + 1))])

    def shared(one, other):
        return sum(len(top(one[row], row) & top(other[row], row)) / math.ceil(0.2 * (row + 1)) for row in rows) / len(rows)

    for layer in (1, 2):
        want = shared(maps[layer].sum(0), maps[layer - 1].sum(0))
        assert result["key_overlap"][layer].tolist() == pytest.approx([want] * HEADS)
        for head in range(HEADS):
            best = max(shared(maps[layer, head], maps[layer - 1, other]) for other in range(HEADS))
            assert float(result["key_overlap_head"][layer, head]) == pytest.approx(best)
    assert result["key_overlap"][0].isnan().all()
    between = result.tables["layers"].to_numpy()
    assert between.diagonal().tolist() == pytest.approx([1.0] * LAYERS)
    assert between[2, 0] == pytest.approx(shared(maps[2].sum(0), maps[0].sum(0)))


@torch.no_grad()
def test_layer_redundancy_is_that_of_the_stream(model, scope, text, eager):
    hidden = eager[1]
    result = LayerRedundancy().run(scope, text)
    cosine = torch.nn.functional.cosine_similarity
    for layer, block in enumerate(model.model.layers):
        x = hidden[layer][0]
        cos, sin = model.model.rotary_emb(hidden[0], torch.arange(N)[None])
        attended, _ = block.self_attn(block.input_layernorm(hidden[layer]), position_embeddings=(cos, sin), attention_mask=None)
        middle = x + attended[0]
        out = middle + block.mlp(block.post_attention_layernorm(middle))
        assert float(result["attention_redundancy"][layer, 0]) == pytest.approx(float(cosine(x, middle, dim=-1).mean()), abs=1e-6)
        assert float(result["block_influence"][layer, 0]) == pytest.approx(float((1 - cosine(x, out, dim=-1)).mean()), abs=1e-6)
    table = result.tables["layers"]
    assert table.sort_values("drop_order").attention_redundancy.is_monotonic_decreasing


def test_layer_redundancy_of_a_layer_that_writes_nothing(text):
    model = llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    result = LayerRedundancy().run(Scope(model), text)
    assert result["attention_redundancy"][1].tolist() == pytest.approx([1.0] * HEADS)
    assert result["block_influence"][1].tolist() == pytest.approx([0.0] * HEADS, abs=1e-12)
    assert int(result.tables["layers"].drop_order[1]) == 0


@pytest.fixture(scope="module")
def planted():
    heads = {(0, 0): Previous(), (0, 1): Duplicate(), (0, 2): Sink(), (1, 0): Previous(), (1, 1): Offset(5), (1, 2): Sink()}
    return planted_llama(heads, n_heads=4, sharpness=40.0)


def test_planted_maps(planted):
    """Equal kinds in two layers are twins with cosine 1; one-hot maps that meet in r of N rows have cosine r / N."""
    scope = Scope(planted.model, name="planted")
    ids = planted.prompt(25, 2)[0]
    result = MapSimilarity().run(scope, ProbeText.natural(ids))
    expected = torch.stack(
        [planted.expected(ids[None])[1, head][0] for head in range(4)] + [planted.expected(ids[None])[0, head][0] for head in range(4)]
    )
    flat = expected.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)[:4, 4:]
    torch.testing.assert_close(result["map_twin"][1], cosine.amax(1), rtol=1e-4, atol=1e-4)
    twins = {int(row.head): (int(row.earlier_layer), int(row.earlier_head)) for row in result.tables["twins"].itertuples()}
    assert (twins[0], twins[2], twins[3]) == ((0, 0), (0, 2), (0, 3))
    # offset 5 and the sink meet in the rows that have no key 5 back, and in the row whose fifth key back is the first: 6 of 51
    assert float(cosine[1, 2]) == pytest.approx(6 / 51)
    overlap = KeyOverlap(rows=8).run(scope, ProbeText.natural(ids))
    assert overlap["key_overlap"][1].min() > 0


def test_planted_entropy_grows_as_it_should(planted):
    """A uniform head's entropy is ln n: slope 1. Previous, offset and sink heads look at one key: slope 0."""
    scope = Scope(planted.model, name="planted")
    result = EntropyLength().run(scope, ProbeText.natural(planted.prompt(25, 4)[0]))
    found = result["entropy_slope"]
    for place, kind in planted.heads.items():
        if kind.name == "uniform":
            assert float(found[place]) == pytest.approx(1, abs=1e-4)
        elif kind.name in ("previous", "sink", "offset"):
            assert float(found[place]) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(result["entropy_slope_layer"], found.mean(1, keepdim=True).expand_as(found))
    assert result.numbers["entropy_layers_rising"] == float((found.mean(1) > 0.5).sum())


def test_entropy_slope_is_least_squares(scope, text, eager):
    import numpy as np

    maps = eager[0]
    result = EntropyLength(shortest=10).run(scope, text)
    entropy = -torch.xlogy(maps, maps).sum(-1)
    n = np.arange(1, N + 1)
    for layer in range(LAYERS):
        for head in range(HEADS):
            want = np.polyfit(np.log(n[9:]), entropy[layer, head].numpy()[9:], 1)[0]
            assert float(result["entropy_slope"][layer, head]) == pytest.approx(want, abs=1e-6)
    assert slope(torch.ones(2, 5), torch.ones(5)).isnan().all()


def test_texts_are_averaged_and_kept(scope, tmp_path):
    """Two texts: the mean of one at a time; the second run reads the journal and never runs the model."""
    torch.manual_seed(14)
    rows = torch.randint(61, (2, N))
    for probe in (
        QuerySimilarity(window=8),
        QueryNorm(),
        SemanticDistance(window=4),
        MapSimilarity(),
        KeyOverlap(rows=4),
        LayerRedundancy(),
    ):
        alone = [probe.run(scope, row) for row in rows]
        both = probe.run(scope, rows, journal=tmp_path / probe.name)
        for metric in both.scores:
            if metric in ("semantic_rank", "map_twin"):  # made of means over texts
                continue
            torch.testing.assert_close(both[metric], (alone[0][metric] + alone[1][metric]) / 2, equal_nan=True)
    calls = []
    hook = scope.model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: calls.append(len(args)))
    again = QueryNorm().run(scope, rows, journal=tmp_path / "query_norm")
    hook.remove()
    assert calls == []
    torch.testing.assert_close(again["query_norm"], QueryNorm().run(scope, rows)["query_norm"])


def test_real_text(smollm2):
    """One short essay through all of them: shapes, ranges, and the sink heads' layers are not all alike."""
    for probe in (QuerySimilarity(), QueryNorm(), SemanticDistance(), MapSimilarity(), KeyOverlap(), LayerRedundancy()):
        result = probe.run(smollm2, context=128)
        for metric in probe.metrics:
            values = result[metric.name]
            assert values.shape == (30, 9)
            kept = values[1:] if metric.name in ("map_similarity", "map_twin", "key_overlap", "key_overlap_head") else values
            assert not kept.isnan().any()
            low, high = metric.range
            assert low is None or float(kept.min()) >= low - 1e-9
            assert high is None or float(kept.max()) <= high + 1e-9
            assert float(kept.max() - kept.min()) > 0
        assert result.probe is probe


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda scope: QuerySimilarity(window=1), "pairs need two queries"),
        (lambda scope: QuerySimilarity().run(scope, torch.arange(9)), "on 9 tokens.*needs 32"),
        (lambda scope: QueryNorm(shared=0.8, routed=0.5), "at most 1 together"),
        (lambda scope: QueryNorm(routed=0.1).run(scope, torch.arange(9)), "too few to route"),
        (lambda scope: SemanticDistance(window=0), "they count tokens"),
        (lambda scope: SemanticDistance().run(scope, torch.arange(9)), "needs 32"),
        (lambda scope: MapSimilarity(maps="all"), "known: mean, stacked"),
        (lambda scope: KeyOverlap(share=0), "between 0 and 1"),
        (lambda scope: KeyOverlap().run(scope, torch.arange(9)), "needs 64"),
        (lambda scope: EntropyLength().run(scope, ProbeText.natural(torch.arange(9))), "it needs 32"),
        (lambda scope: MapSimilarity().run(Scope(llama(num_hidden_layers=1))), "it has one layer"),
        (lambda scope: KeyOverlap().run(Scope(llama(num_hidden_layers=1))), "it has one layer"),
    ],
)
def test_refusals(scope, call, words):
    with pytest.raises(HeadscopeError, match=words):
        call(scope)


def test_models_that_look_both_ways_are_refused():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    scope = Scope(BertForMaskedLM(config).eval())
    for probe in (QuerySimilarity(), QueryNorm(), SemanticDistance(), MapSimilarity(), KeyOverlap(), LayerRedundancy()):
        with pytest.raises(ProbeError, match="looks both ways"):
            probe.run(scope, torch.arange(40))
    vision = hs.load("bundled:dit")
    with pytest.raises(ProbeError, match="does not read text"):
        QueryNorm().run(vision)
