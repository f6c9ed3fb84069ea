"""Scope: inputs are checked before the model sees them, texts are padded rightly, and its facts are the model's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from torch import nn

from headscope.errors import CaptureError, DataError, StatisticError
from headscope.scope import Generation, Scope
from headscope.statistics import StatisticsRequest

from .tiny_models import BASE, bart, bert, gpt2, ids, llama, make

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "the", "cat", "sat", "on", "mat", "and", "dog", "ran"]


def tokenizer(pad=True):
    """One token per word; adds a beginning token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"} | ({"pad_token": "[PAD]"} if pad else {})
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.fixture
def scope():
    return Scope(make(llama, max_position_embeddings=40), tokenizer(), name="toy", source="made here")


# ---- facts ------------------------------------------------------------------------------------------------------


def test_facts(scope):
    assert (scope.name, scope.source, scope.max_length, scope.vocabulary) == ("toy", "made here", 40, 97)
    assert (scope.dtype, scope.device) == (torch.float32, torch.device("cpu"))
    assert "\n" not in repr(scope)
    assert "2 layers x 4 heads" in repr(scope)
    page = scope._repr_mimebundle_()["text/html"]
    assert "toy" in page
    assert "sdpa" in page
    assert "<script" not in page


def test_fingerprint_tells_weights_and_configs_apart():
    model = make(llama)
    first = Scope(model).fingerprint
    assert first == Scope(copy.deepcopy(model)).fingerprint
    assert len(first) == 16
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight += 0.01
    assert Scope(changed).fingerprint != first
    assert Scope(make(llama, rms_norm_eps=1e-4)).fingerprint != first
    assert Scope(copy.deepcopy(model).bfloat16()).fingerprint == first  # a plan made in one type runs in the other
    assert Scope(changed.bfloat16()).fingerprint != first


@pytest.mark.parametrize(
    ("model", "words"),
    [(nn.Linear(2, 2), r"torch\.Linear.*PreTrainedModel"), ("gpt2", r"builtins\.str.*headscope\.load"), (None, "NoneType")],
    ids=["module", "name", "none"],
)
def test_what_is_no_model_is_refused(model, words):
    with pytest.raises(CaptureError, match=words):
        Scope(model)


# ---- data -------------------------------------------------------------------------------------------------------


def test_encode(scope):
    got = scope.encode("the cat sat")
    assert got.tolist() == [[1, 4, 5, 6]]
    assert got.dtype == torch.int64
    stats = scope.capture("the cat sat", statistics=["entropy"])
    assert torch.equal(stats.tokens, got)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", "empty text"),
        ("  \n", "empty text"),
        ([], "no token"),
        (torch.zeros(0, dtype=torch.int64), "no token"),
        (torch.zeros(1, 0, dtype=torch.int64), "no token"),
        (torch.rand(4), "integers"),
        (torch.ones(2, 3, dtype=torch.bool), "integers"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "integers"),
        (torch.tensor([[3, 97]]), r"token id 97.*0\.\.96.*own tokenizer"),
        (torch.tensor([[3, -1]]), "token id -1"),
        (torch.zeros(1, 41, dtype=torch.int64), "41 tokens.*made for 40.*beyond_context"),
        (object(), "neither text nor token ids"),
        (None, "neither text nor token ids"),
        (["the cat", ""], "empty text"),
        ({"input_ids": torch.tensor([[3, 100]])}, "token id 100"),
    ],
    ids=str,
)
def test_unusable_data_is_refused_in_one_line(scope, data, words):
    with pytest.raises(DataError, match=words) as caught:
        scope.capture(data)
    assert "\n" not in str(caught.value)


def test_unusable_masks_and_counts(scope):
    tokens = ids(2, 6)
    for kw, words in (
        ({"attention_mask": torch.ones(2, 5)}, r"\[2, 5\].*\[2, 6\]"),
        ({"attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "every token"),
        ({"generate": 0}, "generate=0"),
        ({"chunk": -1}, "chunk=-1"),
        ({"generate": 40}, "6 tokens and 40 to generate.*made for 40"),
    ):
        with pytest.raises(DataError, match=words):
            scope.capture(tokens, **kw)
    with pytest.raises(DataError, match="put it into the dict"):
        scope.capture({"input_ids": tokens}, attention_mask=torch.ones(2, 6))


def test_a_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="without a tokenizer"):
        Scope(make(llama)).capture("the cat")


def test_beyond_context_is_a_choice_where_the_model_can(scope):
    stats = scope.capture(ids(1, 50), statistics=["entropy"], beyond_context=True)
    assert stats["entropy"][0].shape == (1, 4, 50)
    with pytest.raises(DataError, match="learned table of 64"):
        Scope(make(gpt2)).capture(ids(1, 70), beyond_context=True)


def test_unknown_statistics_parameters_and_layers(scope):
    for kw, error, words in (
        ({"statistics": ["entropi"]}, StatisticError, "did you mean entropy"),
        ({"statistics": []}, StatisticError, "empty list"),
        ({"blok": 64}, StatisticError, "did you mean block"),
        ({"block": 48}, StatisticError, "power of two"),
        ({"layers": (7,)}, CaptureError, r"layer 7.*0\.\.1"),
        ({"keep": (7,)}, CaptureError, r"layer 7.*0\.\.1"),
        ({"keep": (1,), "layers": (0,)}, StatisticError, "keep=1.*add it to layers"),
    ):
        with pytest.raises(error, match=words):
            scope.capture(ids(1, 5), **kw)
    with pytest.raises(StatisticError, match="block beside a StatisticsRequest"):
        scope.capture(ids(1, 5), statistics=StatisticsRequest(), block=16)


def test_layers_can_be_chosen_by_number_and_name(scope):
    for layers in (1, (1,), [1], "model.layers.1.self_attn"):
        stats = scope.capture(ids(1, 5), statistics=["entropy"], layers=layers)
        assert stats.layers == [1]


@pytest.mark.parametrize("pad", [True, False], ids=["pad token", "no pad token"])
def test_texts_of_unlike_length_give_each_its_own_statistics(pad):
    scope = Scope(make(llama), tokenizer(pad))
    texts = ["the cat sat on the mat and ran", "the dog", "on mat and cat"]
    together = scope.capture(texts, statistics=["entropy", "column_sum", "sink_mass"])
    for row, text in enumerate(texts):
        alone = scope.capture(text, statistics=["entropy", "column_sum", "sink_mass"])
        length = alone.tokens.shape[1]
        assert together.valid[row].tolist() == [True] * length + [False] * (9 - length)
        for name in ("entropy", "column_sum", "sink_mass"):
            got = together[name][1][row, :, :length]
            torch.testing.assert_close(got, alone[name][1][0], rtol=1e-5, atol=1e-6)


def test_texts_that_are_continued_are_padded_in_front(scope):
    texts = ["the cat sat on the mat", "the dog"]
    together = scope.capture(texts, statistics=["entropy"], generate=4)
    for row, text in enumerate(texts):
        alone = scope.capture(text, statistics=["entropy"], generate=4)
        length = alone.tokens.shape[1]
        assert torch.equal(together.tokens[row, -length:], alone.tokens[0])
        torch.testing.assert_close(together["entropy"][1][row, :, -length:], alone["entropy"][1][0], rtol=1e-5, atol=1e-6)


def test_an_encoder_decoder_without_decoder_tokens_says_what_it_needs():
    scope = Scope(make(bart))
    with pytest.raises(DataError, match=r"decoder_input_ids.*generate=n"):
        scope.capture(ids(1, 6))
    assert scope.capture(ids(1, 6), generate=3, statistics=["entropy"])["entropy"][0].shape == (1, 4, 4)


def test_chunks_and_generation_need_a_causal_model():
    scope = Scope(make(bert))
    with pytest.raises(CaptureError, match=r"chunk=.*not a causal model"):
        scope.capture(ids(1, 6), chunk=2)
    with pytest.raises(CaptureError, match="cannot generate"):
        scope.capture(ids(1, 6), generate=2)
    with pytest.raises(CaptureError, match="cannot generate"):
        scope.generate(ids(1, 6))


# ---- generation -------------------------------------------------------------------------------------------------


def test_generate_is_the_models_own_greedy_text(scope):
    out = scope.generate("the cat sat", max_new_tokens=5)
    with torch.no_grad():
        want = scope.model.generate(scope.encode("the cat sat"), max_new_tokens=5, do_sample=False)
    assert isinstance(out, Generation)
    assert torch.equal(out.ids, want)
    assert out.prompt_length == 4
    assert out.text == scope.tokenizer.decode(want[0, 4:], skip_special_tokens=True)
    assert torch.equal(out.new_ids, want[:, 4:])


def test_capture_appends_exactly_as_many_tokens_as_asked(scope):
    """End-of-text does not cut the sequence short, and the appended tokens are the greedy ones."""
    tokens = ids(1, 6)
    stats = scope.capture(tokens, statistics=["entropy"], generate=9)
    assert stats["entropy"][0].shape == (1, 4, 15)
    with torch.no_grad():
        logits = scope.model(stats.tokens).logits
    logits[..., BASE["eos_token_id"]] = -torch.inf
    assert torch.equal(logits[0, 5:-1].argmax(-1), stats.tokens[0, 6:])


def test_capture_does_not_touch_the_models_settings(scope):
    before = copy.deepcopy(scope.model.generation_config.to_dict())
    scope.capture(ids(1, 6), generate=3)
    scope.generate(ids(1, 6), max_new_tokens=2)
    assert scope.model.generation_config.to_dict() == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps, lambda scope: pickle.dumps(scope, protocol=0)])
def test_a_scope_is_not_copied(scope, how):
    with pytest.raises(CaptureError, match=r"fastened to one live model; copy or save the model, and make a Scope of it"):
        how(scope)
    assert scope.capture(ids(1, 6), statistics=["entropy"])["entropy"][0].shape == (1, 4, 6)
