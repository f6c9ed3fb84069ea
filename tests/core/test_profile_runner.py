"""A whole profile of a small model: every metric against eager attention matrices, and what is kept, averaged and refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.stats
import torch

from headscope import probes
from headscope.data import bundled
from headscope.errors import DataError, HeadscopeError, ProbeError
from headscope.profile import HeadProfile, profile
from headscope.profile.runner import block_size
from headscope.profile.texts import build_texts
from headscope.scope import Scope

CONTEXT = 200


def word_tokenizer(size: int = 97):
    """A word-level tokenizer of the essays' most frequent words, with a BOS that it puts in front of every text."""
    from collections import Counter

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    counts = Counter(word for text in bundled().values() for word, _ in splitter.pre_tokenize_str(text))
    words = ["<s>", "<unk>", *(word for word, _ in counts.most_common(size - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture
def scope(tiny_llama) -> Scope:
    # Larger weights than the initial ones, so that heads differ and are not nearly uniform.
    with torch.no_grad():
        for name, parameter in tiny_llama.named_parameters():
            if "q_proj" in name or "k_proj" in name or "embed" in name:
                parameter.mul_(12)
    return Scope(tiny_llama, word_tokenizer(), name="tiny")


def eager_matrices(scope: Scope, ids: torch.Tensor) -> np.ndarray:
    """A [L, H, N, N] float64, from a copy of the model that runs eager attention in double precision."""
    model = copy.deepcopy(scope.model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True).attentions
    return torch.stack([a[0] for a in attentions]).double().numpy()


def expected_scores(scope: Scope) -> dict[str, np.ndarray]:
    """Every metric from its formula, [L, H]."""
    texts = {
        kind: build_texts(scope, kind, context=CONTEXT, data=None, texts=1, seed=0, repeats=4, beyond_context=False)[0]
        for kind in ("natural", "repeated_random", "repeated_token")
    }
    out: dict[str, np.ndarray] = {}
    a = eager_matrices(scope, texts["natural"].ids)
    n = a.shape[-1]
    t, s = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = s <= t
    out["sink"] = a[..., 0].mean(-1)
    received = np.stack([a[..., key:, key].mean(-1) for key in range(n)], -1)
    out["sink_peak"] = received[..., : n - 31].max(-1)
    out["sink_beyond_first"] = received[..., 1 : n - 31].max(-1)
    late = (received > 5 / n) & (np.arange(n) > 0)
    out["late_sink_count"] = late.sum(-1)
    out["late_sink_mass"] = (a.sum(-2) * late).sum(-1) / n
    covered = ((s < 4) | (t - s < 64)) & seen
    out["streaming"] = (a * covered).sum(-1)[..., 68:].mean(-1)
    out["distance"] = (a * (t - s)).sum(-1).mean(-1)
    out["distance_beyond_sink"] = (a * (t - s))[..., 1:].sum((-1, -2)) / a[..., 1:].sum((-1, -2))
    out["local_mass"] = (a * (np.abs(t - s) < 64)).sum(-1).mean(-1)
    out["waad"] = (a * np.minimum(t - s, 10) * seen).sum(-1).mean(-1)
    band = np.full((*a.shape[:2], n), np.nan)
    for key in range(n - 10):
        band[..., key] = a[..., key + 10 : min(key + 50, n - 1) + 1, key].mean(-1)
    out["fai_band"] = np.nanmean(band, -1)
    out["fai_peak"] = band[..., 4 : n - 50].max(-1)
    out["fai_end"] = np.stack([a[..., key:, key].mean(-1) for key in range(n)], -1).mean(-1)
    entropy = -(np.where(a > 0, a * np.log(np.where(a > 0, a, 1)), 0)).sum(-1)
    out["entropy"] = entropy.mean(-1)
    out["entropy_normalised"] = (entropy[..., 1:] / np.log(np.arange(2, n + 1))).mean(-1)
    long = entropy[..., 15:].reshape(-1, n - 15)
    out["entropy_slope"] = np.polyfit(np.log(np.arange(16, n + 1)), long.T, 1)[0].reshape(entropy.shape[:2])
    out["entropy_slope_layer"] = np.broadcast_to(out["entropy_slope"].mean(1, keepdims=True), entropy.shape[:2])
    out["previous_token"] = a[..., np.arange(1, n), np.arange(n - 1)].mean(-1)
    first, near, far = (a[..., 128:, :128].sum((-1, -2)), a[..., 128:, 128:].sum((-1, -2)), a[..., :128, :].sum((-1, -2)))
    for share in (90, 95, 99):  # two rows of blocks of 128: the first has one block, the second one or two
        taken = (far > 0) + np.where(np.maximum(first, near) >= share / 100 * (first + near), 1, 2)
        out[f"blocks_{share}"] = taken / 3
    segments = texts["natural"].segments.numpy()
    count = segments.max() + 1
    vertical = np.stack(
        [
            np.mean([a[..., segments == j, :][..., segments == i].mean((-1, -2)) for j in range(i + 4, count)], axis=0)
            for i in range(1, count - 4)
        ],
        axis=-1,
    )
    out["receiver"] = scipy.stats.kurtosis(vertical, axis=-1, fisher=True, bias=True)

    random = texts["repeated_random"]
    a, block, first = eager_matrices(scope, random.ids), random.block, random.first
    assert (first, block) == (1, 40)
    second = np.arange(first + block, first + 2 * block)
    out["induction"] = a[..., second, second - block + 1].mean(-1)
    out["induction_mul"] = a[..., second, second - block + 1].sum(-1) / a[..., : first + 2 * block, :].sum((-1, -2))
    out["duplicate_token"] = a[..., second, second - block].mean(-1)
    rows = np.arange(first + block, first + 4 * block)
    inside = rows[(rows - first) % block != block - 1]
    ids = random.ids.numpy()
    same = [[j for j in range(first, i) if ids[j] == ids[i]] for i in rows]
    out["echo_last"] = a[..., rows, rows - block].mean(-1)
    out["ind_last"] = a[..., inside, inside - block + 1].mean(-1)
    out["echo_sum"] = np.mean([sum(a[..., i, j] for j in keys) for i, keys in zip(rows, same, strict=True)], axis=0)
    out["ind_sum"] = np.mean([sum(a[..., i, j + 1] for j in keys) for i, keys in zip(rows, same, strict=True)], axis=0)
    out["sink_repeated"] = eager_matrices(scope, texts["repeated_token"].ids)[..., 0].mean(-1)
    return out


def test_every_metric_equals_the_one_from_eager_attention(scope: Scope) -> None:
    found = profile(scope, context=CONTEXT, progress=False)
    expected = expected_scores(scope)
    assert set(found.metrics) == set(expected)
    for name, values in expected.items():
        assert np.ptp(values) > 0 or name.startswith("blocks_"), name  # three blocks are needed by every head of a random model
        # Receiver is a quotient of fourth moments of small numbers and magnifies rounding.
        loose = name == "receiver" or name.startswith("entropy_slope")  # a slope is a small difference of large numbers
        np.testing.assert_allclose(found.matrix(name), values, rtol=1e-3 if loose else 2e-5, atol=1e-6 if loose else 1e-7, err_msg=name)


def test_card_says_what_was_run(scope: Scope) -> None:
    found = profile(scope, context=CONTEXT, seed=5, progress=False)
    card = found.card
    assert card.model["name"] == "tiny"
    assert (card.model["layers"], card.model["heads"], card.model["kv_heads"]) == (2, 4, 2)
    assert card.model["parameters"] == sum(p.numel() for p in scope.model.parameters())
    assert card.attention_kernels == ["sdpa"]
    assert card.statistics_kernel
    assert [(row["kind"], row["sequences"], row["tokens"]) for row in card.data] == [
        ("natural", 1, 200),
        ("repeated_random", 1, 161),
        ("repeated_token", 1, 64),
    ]
    assert card.parameters == {
        "context": 200,
        "texts": 1,
        "repeats": 4,
        "map_block": 16,
        "random_block": 40,
        "sink_tokens": 4,
        "local_window": 64,
        "waad_window": 10,
        "fai_band": [10, 50],
    }
    assert card.seeds == {"texts": 5}
    assert {"python", "torch", "transformers"} <= set(card.versions)
    assert {"natural", "repeated_random", "repeated_token", "scores", "total"} == set(card.seconds)
    assert card.numbers["sink_rate"] == pytest.approx((found.matrix("sink") > 0.3).mean())
    assert set(card.metrics) == set(found.metrics)
    assert [row["name"] for row in card.probes] == list(probes.PASSIVE)


def test_same_seed_same_numbers_other_seed_other_random_text(scope: Scope) -> None:
    first, second, third = (profile(scope, ["induction"], context=100, seed=seed, progress=False) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.matrix("induction"), second.matrix("induction"))
    assert first.card.data == second.card.data
    assert first.card.data[0]["sha256"] != third.card.data[0]["sha256"]
    assert not np.array_equal(first.matrix("induction"), third.matrix("induction"))


def test_several_texts_are_averaged(scope: Scope) -> None:
    both = profile(scope, ["previous_token", "duplicate_token"], context=120, texts=2, progress=False)
    natural = build_texts(scope, "natural", context=120, data=None, texts=2, seed=0, repeats=4, beyond_context=False)
    random = build_texts(scope, "repeated_random", context=120, data=None, texts=2, seed=0, repeats=4, beyond_context=False)
    singles = [probes.PreviousToken().run(scope, text)["previous_token"].numpy() for text in natural]
    assert not np.allclose(singles[0], singles[1])
    np.testing.assert_allclose(both.matrix("previous_token"), np.mean(singles, axis=0), rtol=1e-6)  # float32 statistics of separate passes
    singles = [probes.DuplicateToken().run(scope, text)["duplicate_token"].numpy() for text in random]
    np.testing.assert_allclose(both.matrix("duplicate_token"), np.mean(singles, axis=0), rtol=1e-6)
    assert [row["sequences"] for row in both.card.data] == [2, 2]


def test_probes_that_disagree_give_what_each_gives_alone(scope: Scope) -> None:
    asked = [probes.Streaming(recent=20), probes.Locality(window=7), probes.Sink(length=30)]
    together = profile(scope, asked, context=CONTEXT, progress=False)
    for probe in asked:
        alone = probe.run(scope, context=CONTEXT)
        for name, values in alone.scores.items():
            # Not bit for bit: a pass that also measures something else may add up in another order.
            np.testing.assert_allclose(together.matrix(name), values.numpy(), rtol=1e-6)
    assert not np.allclose(together.matrix("local_mass"), profile(scope, "locality", context=CONTEXT, progress=False).matrix("local_mass"))


def test_kept_statistics_and_maps_are_those_of_the_first_natural_text(scope: Scope, tmp_path) -> None:
    path = profile(scope, context=CONTEXT, texts=2, progress=False).save(tmp_path / "run")
    found = HeadProfile.load(path)
    text = build_texts(scope, "natural", context=CONTEXT, data=None, texts=1, seed=0, repeats=4, beyond_context=False)[0]
    assert found.tokens.ids == tuple(text.ids.tolist())
    assert found.tokens.strings[:3] == ("<s>", "Why ", "the ")
    assert found.tokens.text.startswith("Why the sea comes and goes")
    stats = scope.capture(text.ids)
    assert found.statistics == sorted(
        f"{kind}/{name}"
        for kind, names in {
            "row": ("argmax", "distance", "distance_sq", "entropy", "local_mass", "lse", "row_max", "sink_mass", "waad"),
            "column": ("column_sum", "fai", "sink_importance"),
        }.items()
        for name in names
    )
    for name in found.statistics:
        for layer in (0, 1):
            np.testing.assert_allclose(found.statistic(name, layer), stats[name.split("/")[1]][layer][0].numpy(), rtol=2e-6, atol=1e-6)
    assert (found.maps.block, found.maps.tokens, found.maps.causal, found.maps.sizes) == (16, 200, True, (13, 7))
    a = eager_matrices(scope, text.ids)
    padded = np.zeros((2, 4, 208, 208))
    padded[:, :, :200, :200] = a
    blocks = padded.reshape(2, 4, 13, 16, 13, 16)
    for layer in (0, 1):
        for head in range(4):
            np.testing.assert_allclose(found.map("block_mass", layer, head), blocks.sum((3, 5))[layer, head], rtol=2e-5, atol=1e-7)
            np.testing.assert_allclose(found.map("block_max", layer, head), blocks.max((3, 5))[layer, head], rtol=2e-5, atol=1e-7)
            assert found.map("block_mass", layer, head, 1).sum() == pytest.approx(200, rel=1e-5)


def test_nothing_is_kept_that_was_not_asked_for(scope: Scope) -> None:
    bare = profile(scope, "sink", context=100, maps=False, keep_statistics=False, progress=False)
    assert (bare.tokens, bare.maps, bare.statistics) == (None, None, [])
    maps = profile(scope, "sink", context=100, keep_statistics=False, progress=False)
    assert maps.statistics == []
    assert maps.map("block_mass", 1, 3).shape == (7, 7)
    np.testing.assert_allclose(bare.matrix("sink"), maps.matrix("sink"), rtol=1e-6)


def test_block_size_gives_128_cells_a_side_then_blocks_of_128_then_1024_cells() -> None:
    assert [block_size(n) for n in (64, 2048, 2049, 8192, 16384, 16385, 131072, 131073)] == [16, 16, 32, 64, 128, 128, 128, 256]


def test_a_probe_alone(scope: Scope) -> None:
    found = probes.Induction().run(scope, context=150)
    assert found["induction"].shape == (2, 4)
    assert found.texts[0].block == 30
    assert list(found.table.columns) == ["layer", "head", "kv_head", "module", "kind", "induction", "induction_mul"]
    best = np.unravel_index(int(found["induction"].argmax()), (2, 4))
    assert found.top(n=1) == [tuple(int(place) for place in best)]
    assert "\n" not in repr(found)
    with pytest.raises(ProbeError, match="did you mean induction"):
        found["inductoin"]
    assert probes.Sink().run(scope, context=100).numbers.keys() == {"sink_rate"}
    assert probes.PreviousToken().run(scope, "the sea and the land " * 20, context=50).texts[0].name == "given text"
    ids = torch.arange(2, 62)
    assert probes.PreviousToken().run(scope, ids, context=60).texts[0].ids.tolist() == ids.tolist()


def test_context_none_is_the_models_length(scope: Scope) -> None:
    found = profile(scope, "sink", context=None, maps=False, keep_statistics=False, progress=False)
    assert found.card.context == 256


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"context": 300}, DataError, "was made for 256"),
        ({"context": 0}, DataError, "at least 1"),
        ({"context": 60}, ProbeError, "it needs"),
        ({"context": 19, "probes": "induction"}, ProbeError, "a block would have 3 tokens"),
        ({"context": 100, "probes": "receiver"}, ProbeError, "sentences"),
        ({"context": 100, "probes": "razer"}, ProbeError, "did you mean razor"),
        ({"context": 100, "data": "short"}, DataError, "window 0 has 2 tokens"),
        ({"context": 300, "data": "gone.txt"}, DataError, "gone.txt: it cannot be read"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_the_model_runs(scope: Scope, arguments: dict, kind: type, words: str) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    scope.model.forward = never
    with pytest.raises(kind, match=words) as caught:
        profile(scope, progress=False, **arguments)
    assert "\n" not in str(caught.value)


def test_without_a_tokenizer(tiny_llama) -> None:
    scope = Scope(tiny_llama, name="bare")
    with pytest.raises(DataError, match="without a tokenizer"):
        profile(scope, "sink", context=64, progress=False)
    with pytest.raises(ProbeError, match="none marked"):
        profile(scope, "receiver", context=64, data=torch.arange(64), progress=False)
    found = profile(scope, ["sink", "induction"], context=64, data=torch.arange(64), progress=False)
    assert found.tokens.strings[:2] == ("0", "1")
    random = probes.Induction().run(scope, context=64).texts[0]
    assert (random.first, random.block, len(random)) == (0, 12, 48)


def test_a_probe_that_draws_its_text_takes_no_data(scope: Scope) -> None:
    with pytest.raises(ProbeError, match="which is drawn and not given"):
        probes.Induction().run(scope, "some text")


def test_progress_is_silent_off_a_terminal_and_on_stderr_when_asked(scope: Scope, capsys: pytest.CaptureFixture[str]) -> None:
    profile(scope, "sink", context=64, maps=False)
    silent = capsys.readouterr()
    assert (silent.out, silent.err) == ("", "")
    profile(scope, "sink", context=64, maps=False, progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    assert "64/64" in told.err


def test_a_bidirectional_model_is_profiled_by_the_probes_that_fit() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    scope = Scope(BertModel(config, add_pooling_layer=False).eval(), name="bert")
    ids = torch.arange(60)
    found = profile(scope, ["sink", "entropy", "previous_token", "duplicate_token"], context=60, data=ids, progress=False)
    a = eager_matrices(scope, ids)
    np.testing.assert_allclose(found.matrix("sink"), a[..., 0].mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found.matrix("previous_token"), a[..., np.arange(1, 60), np.arange(59)].mean(-1), rtol=1e-5)
    assert (found.matrix("entropy_normalised") > 0.9).all()
    assert found.maps.causal is False
    with pytest.raises(HeadscopeError, match="looks both ways"):
        profile(scope, "induction", context=60, data=ids, progress=False)
