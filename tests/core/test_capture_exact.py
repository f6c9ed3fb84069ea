"""Captured statistics equal those of the model's own eager attention matrix: many architectures, paddings, caches, ways of feeding."""

from __future__ import annotations

import pytest
import torch

from headscope.scope import Scope

from .tiny_models import bert, compare, dense, dinov2, eager_copy, gemma2, gpt2, gpt_oss, ids, llama, make, mistral, padding, phi3, qwen3

PARAMETERS = {"block": 16, "fai_band": (2, 5), "local_window": 4}
LENGTH = 21
DECODERS = [
    (llama, "sdpa"),
    (llama, "eager"),
    (gpt2, "sdpa"),
    (gpt2, "eager"),
    (mistral, "sdpa"),
    (mistral, "eager"),
    (qwen3, "sdpa"),
    (phi3, "sdpa"),
    (gemma2, "eager"),
    (gpt_oss, "eager"),
]
each_decoder = pytest.mark.parametrize(("build", "impl"), DECODERS, ids=[f"{build.__name__}-{impl}" for build, impl in DECODERS])


def eager_weights(model, tokens, mask, **extra):
    with torch.no_grad():
        out = eager_copy(model)(input_ids=tokens, attention_mask=mask, output_attentions=True, **extra)
    return out.attentions


def check(model, stats, tokens, mask, causal=True, **extra):
    for layer, matrix in enumerate(eager_weights(model, tokens, mask, **extra)):
        compare(stats, layer, dense(matrix, causal=causal, row_valid=mask, **PARAMETERS))


def grown(mask, count):
    """The mask of a batch that generated `count` tokens, and the position ids that generate() uses for it."""
    if mask is None:
        return None, {}
    mask = torch.cat([mask, torch.ones(mask.shape[0], count, dtype=mask.dtype)], 1)
    return mask, {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)}


@each_decoder
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_one_pass(build, impl, pad):
    model, tokens, mask = make(build, impl), ids(2, LENGTH), padding(pad, 2, LENGTH)
    stats = Scope(model).capture(tokens, attention_mask=mask, **PARAMETERS)
    check(model, stats, tokens, mask)
    assert stats.kernels == {impl}
    assert torch.equal(stats.tokens, tokens)
    assert torch.equal(stats.valid, torch.ones_like(tokens).bool() if mask is None else mask.bool())


@each_decoder
@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_generation_appends_decode_rows(build, impl, pad, chunk):
    model, tokens, mask = make(build, impl), ids(2, LENGTH), padding(pad, 2, LENGTH)
    stats = Scope(model).capture(tokens, attention_mask=mask, generate=6, chunk=chunk, **PARAMETERS)
    assert stats.tokens.shape == (2, LENGTH + 6)
    assert torch.equal(stats.tokens[:, :LENGTH], tokens)
    whole, extra = grown(mask, 6)
    check(model, stats, stats.tokens, whole, **extra)
    assert stats.segments(0)[-1] == (LENGTH + 5, 1)


@each_decoder
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_chunked_prefill(build, impl, pad):
    model, tokens, mask = make(build, impl), ids(2, LENGTH), padding(pad, 2, LENGTH)
    stats = Scope(model).capture(tokens, attention_mask=mask, chunk=5, **PARAMETERS)
    check(model, stats, tokens, mask)
    assert [rows for _, rows in stats.segments(1)] == [5, 5, 5, 5, 1]


@each_decoder
@pytest.mark.parametrize("pad", ["none", "left"])
def test_static_cache(build, impl, pad):
    """Also the rolling window of a static sliding cache, and masks that generate() makes before the model sees them."""
    model, tokens, mask = make(build, impl), ids(2, LENGTH), padding(pad, 2, LENGTH)
    with torch.no_grad(), Scope(model).observe(**PARAMETERS) as stats:
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, do_sample=False, cache_implementation="static"
        )
    whole, extra = grown(mask, 6)
    assert torch.equal(stats.tokens, out[:, :-1])
    check(model, stats, out[:, :-1], whole, **extra)


def test_a_static_sliding_cache_that_fills_up_in_the_middle():
    """Short prompt, window 8: the cache fills, becomes full in one step, and rolls for twelve more."""
    model, tokens = make(mistral), ids(1, 5)
    with torch.no_grad(), Scope(model).observe(**PARAMETERS) as stats:
        out = model.generate(tokens, max_new_tokens=16, min_new_tokens=16, do_sample=False, cache_implementation="static")
    check(model, stats, out[:, :-1], None)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_bidirectional_encoder(impl, pad):
    model, tokens, mask = make(bert, impl), ids(2, LENGTH), padding(pad, 2, LENGTH)
    stats = Scope(model).capture(tokens, attention_mask=mask, **PARAMETERS)
    check(model, stats, tokens, mask, causal=False)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_vision_encoder(impl):
    model, pixels = make(dinov2, impl), torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    stats = Scope(model).capture({"pixel_values": pixels}, **PARAMETERS)
    with torch.no_grad():
        matrices = eager_copy(model)(pixels, output_attentions=True).attentions
    for layer, matrix in enumerate(matrices):
        compare(stats, layer, dense(matrix, causal=False, **PARAMETERS))


def test_float64_is_exact_to_rounding():
    """Against a float64 softmax over the recorded q and k, since transformers' eager softmax runs in float32."""
    model = make(llama, "recording", num_hidden_layers=1).double()
    tokens = ids(2, LENGTH)
    RECORDED.clear()
    stats = Scope(model).capture(tokens, **PARAMETERS)
    scores = recorded_scores()
    compare(stats, 0, dense(scores.softmax(-1), causal=True, **PARAMETERS), limit=1e-12)
    assert stats["lse"][0].dtype == torch.float64
    torch.testing.assert_close(stats["lse"][0], scores.logsumexp(-1), rtol=1e-13, atol=1e-13)


def test_lse_with_sinks_and_without():
    for build, sinks in ((llama, False), (gpt_oss, True)):
        model = make(build, "recording")
        RECORDED.clear()
        stats = Scope(model).capture(ids(2, 7), statistics=["lse", "sink_logit_mass", "row_max"])
        scores = recorded_scores()
        column = torch.full((2, 4, 7, 1), -torch.inf, dtype=torch.float64)
        if sinks:
            column = model.model.layers[0].self_attn.sinks.detach().double()[None, :, None, None].expand(2, 4, 7, 1)
        whole = torch.cat([scores, column], -1)
        torch.testing.assert_close(stats["lse"][0].double(), whole.logsumexp(-1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats["sink_logit_mass"][0].double(), whole.softmax(-1)[..., -1], rtol=1e-5, atol=1e-7)


RECORDED: list[tuple[torch.Tensor, torch.Tensor, float]] = []


def recording(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """A custom attention in float64 that writes its q and k down; honours sinks."""
    RECORDED.append((query.detach(), key.detach(), scaling))
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1).double(), value.repeat_interleave(group, 1).double()
    scores = (query.double() @ k.transpose(-1, -2) * scaling).masked_fill(~causal(query.shape[2]), -torch.inf)
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).to(query.dtype).transpose(1, 2).contiguous(), None


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def recorded_scores():
    q, k, scale = RECORDED[0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
    return (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~causal(q.shape[2]), -torch.inf)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    from transformers import AttentionInterface

    AttentionInterface.register("recording", recording)
    yield
    del AttentionInterface._global_mapping["recording"]


@pytest.mark.parametrize("chunk", [None, 6])
def test_kept_weights_are_the_eager_entries(chunk):
    model, tokens, mask = make(mistral), ids(2, LENGTH), padding("left", 2, LENGTH)
    stats = Scope(model).capture(tokens, attention_mask=mask, statistics=["entropy"], keep="all", generate=4, chunk=chunk)
    whole, extra = grown(mask, 4)
    matrices = eager_weights(model, stats.tokens, whole, **extra)
    rows, keys = [7, 12, LENGTH - 1, LENGTH + 1, LENGTH + 3], list(range(LENGTH + 4))
    for layer, matrix in enumerate(matrices):
        for head in range(4):
            got = stats.weights(layer, head, rows, keys)
            torch.testing.assert_close(got, matrix[:, head][:, rows], rtol=1e-5, atol=1e-6)


def test_pairs_labels_and_rows_across_chunks():
    model, tokens = make(llama), ids(2, LENGTH)
    labels = torch.arange(LENGTH) % 3
    rows = torch.arange(LENGTH) % 2 == 0
    queries, keys = torch.tensor([4, 9, 20, -1]), torch.tensor([1, 9, 0, 3])
    stats = Scope(model).capture(
        tokens,
        statistics=["class_mass", "pairs", "column_sum", "diagonal_sum", "segment_mass"],
        chunk=4,
        labels=labels,
        segments=torch.arange(LENGTH) // 11,
        rows=rows,
        pairs={"some": (queries, keys)},
    )
    for layer, matrix in enumerate(eager_weights(model, tokens, None)):
        a = matrix.double()
        mass = torch.stack([a[..., labels == c].sum(-1) for c in range(3)], -1)
        torch.testing.assert_close(stats["class_mass"][layer].double(), mass, rtol=1e-5, atol=1e-6)
        counted = a * rows[:, None]
        torch.testing.assert_close(stats["column_sum"][layer].double(), counted.sum(2), rtol=1e-5, atol=1e-6)
        diagonals = torch.stack([counted.diagonal(-d, 2, 3).sum(-1) for d in range(LENGTH)], -1)
        torch.testing.assert_close(stats["diagonal_sum"][layer].double(), diagonals, rtol=1e-5, atol=1e-6)
        halves = torch.stack([torch.stack([counted[:, :, i : i + 11, j : j + 11].sum((2, 3)) for j in (0, 11)], -1) for i in (0, 11)], -2)
        torch.testing.assert_close(stats["segment_mass"][layer].double(), halves, rtol=1e-5, atol=1e-6)
        got = stats.pairs("some")[layer].double()
        torch.testing.assert_close(got[..., :3], a[:, :, queries[:3], keys[:3]], rtol=1e-5, atol=1e-7)
        assert bool(got[..., 3].isnan().all())


@pytest.mark.parametrize("build", [llama, mistral])
def test_observation_may_begin_in_the_middle_of_a_sequence(build):
    """Rows before the first one seen are NaN, and only the rows that were seen count in a column, sliding cache or not."""
    from transformers import DynamicCache

    model, tokens = make(build), ids(1, LENGTH)
    scope, cache = Scope(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :10], past_key_values=cache)
        with scope.observe(statistics=["entropy", "sink_importance"]) as stats:
            model(tokens[:, 10:15], past_key_values=cache)
            model(tokens[:, 15:], past_key_values=cache)
    a = eager_weights(model, tokens, None)[0].double()
    entropy = stats["entropy"][0].double()
    assert bool(entropy[..., :10].isnan().all())
    torch.testing.assert_close(entropy[..., 10:], torch.special.entr(a).sum(-1)[..., 10:], rtol=1e-5, atol=1e-6)
    later = (torch.arange(10, LENGTH)[:, None] >= torch.arange(LENGTH)[None]).sum(0)
    torch.testing.assert_close(stats["sink_importance"][0].double(), a[:, :, 10:].sum(2) / later, rtol=1e-5, atol=1e-6)
