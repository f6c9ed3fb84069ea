"""Token classes, head sets, words, and everything that is refused: specifications, settings, and models that do not fit."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.errors import InterventionError, ProbeError
from headscope.interventions import (
    Add,
    HeadMask,
    HeadSet,
    KeyBias,
    Mix,
    Noise,
    Redistribute,
    Replace,
    ReplaceQueries,
    RescaleRows,
    Scale,
    SetBias,
    SetRows,
    Stack,
    Temperature,
    record_heads,
)
from headscope.scope import Scope

from ..core.tiny_models import bert, gpt2, ids, llama, llava, make, padding
from .dense_edits import Dense
from .edit_cases import Grab
from .edit_table import VALUES, logits, name_of, one_of_each

# ---- token classes ------------------------------------------------------------------------------------------------------------


def test_image_tokens_of_a_vision_language_model_stay_known_in_decoding():
    model = make(llava)
    scope = Scope(model)
    tokens = torch.cat([ids(1, 3, high=80), torch.full((1, 16), 96), ids(1, 5, seed=2, high=80)], 1)
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    kept = []
    edit = KeyBias("0.1", "image", -math.inf)
    with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record, torch.no_grad():
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    steps = [call for call in kept if call.layer == 0]
    assert [call.q.shape[2] for call in steps] == [24, 1, 1, 1]
    at = 0
    for call in steps:
        dense = Dense(call)
        hidden = torch.zeros(call.k.shape[2], dtype=torch.float64)
        hidden[3:19] = -math.inf
        dense.add([1], hidden)
        rows = call.q.shape[2]
        want = dense.output[:, :, 1]
        torch.testing.assert_close(record.z(0)[:, at : at + rows, 1].double(), want.nan_to_num(), rtol=1e-4, atol=1e-4)
        at += rows
    with scope.intervene(HeadMask("0.1", positions="image")), record_heads(scope, sites=("z",)) as record, torch.no_grad():
        model(**inputs)
    assert (~record.z(0)[0, :, 1].any(-1)).nonzero().flatten().tolist() == list(range(3, 19))


def test_a_text_model_has_no_image_tokens():
    scope = Scope(make(llama))
    for edit in (KeyBias("0.1", "image", 1.0), Redistribute("0.1", "image", 0.4), HeadMask("0.1", positions="image")):
        with pytest.raises(InterventionError, match="image tokens"), scope.intervene(edit):
            pytest.fail("the block was entered")


# ---- head sets ----------------------------------------------------------------------------------------------------------------


def test_head_sets(tmp_path):
    import headscope as hs

    scope = Scope(make(llama))
    profile = hs.Scope(scope.model).profile(probes=["sink", "locality"], context=24, data=ids(1, 24))
    best = profile.rank("sink", 2)
    assert list(HeadSet.select(profile, "top 2 distance")) == profile.rank("distance", 2)
    threshold = profile.value(*best[1], "sink")
    assert set(HeadSet.select(profile, f"sink >= {threshold!r}")) == set(best)
    assert len(HeadSet.select(profile, f"sink < {threshold!r}")) == 6
    assert set(HeadSet.select(profile, "local")) == set(profile.top("local", 99))
    a, b = HeadSet.of("0.1,1.3"), HeadSet.of([(1, 3), (0, 0)])
    assert (list(a | b), list(a & b), list(a - b)) == ([(0, 1), (1, 3), (0, 0)], [(1, 3)], [(0, 1)])
    assert HeadMask(a).heads == ((0, 1), (1, 3))
    assert a[0] == (0, 1)
    assert list(a[1:]) == [(1, 3)]
    control = HeadSet.random(scope, 3, 0, without=a)
    assert len(control) == 3
    assert not set(control) & set(a)
    assert list(control) == list(HeadSet.random(scope, 3, 0, without=a)) != list(HeadSet.random(scope, 3, 1, without=a))
    for text, words in (("distance", "every head has a value"), ("sink > 2", "no head"), ("best ones", "no way")):
        with pytest.raises(InterventionError, match=words):
            HeadSet.select(profile, text)
    with pytest.raises(ProbeError, match="unknown"):
        HeadSet.select(profile, "top 3 nothing")
    with pytest.raises(InterventionError, match="8 to draw"):
        HeadSet.random(scope, 9, 0)
    with pytest.raises(InterventionError, match="no head is named"):
        HeadMask(a & HeadSet.of("0.0"))
    with pytest.raises(InterventionError, match=r"HeadSet\.select"):
        HeadMask("top 5 induction")


# ---- words and bad input ------------------------------------------------------------------------------------------------------


def test_what_will_be_done_in_words():
    stack = Stack(
        (HeadMask("18.6", phase="decode"), Redistribute("18.6,17.3", "first", 0.4, positions="last_prompt"), KeyBias("all", [0, 5], -1))
    )
    lines = stack.explain().splitlines()
    assert lines[0].startswith("1. add -1 to the scores of the keys at 0, 5, all heads; cost: exact attention")
    assert lines[1].startswith(
        "2. keep 40% of the attention on the keys of the first token and give the rest to the other keys, heads 18.6, 17.3, at "
    )
    assert "last prompt token; cost: " in lines[1]
    assert lines[2].startswith("3. replace the head's output by zero, head 18.6, in decode only; cost: a copy")
    for edit in one_of_each():
        assert edit.explain().count("cost: ") == 1
        assert type(edit).__name__ not in edit.what()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"intervention": "head_mask", "version": 2, "heads": "0.1"}', "newer headscope.*version 1"),
        ('{"version": 7, "interventions": []}', "newer headscope"),
        ('{"intervention": "head_mask", "version": "x", "heads": "0.1"}', "version 'x'"),
        ('{"interventions": []}', "nothing"),
        ('{"interventions": [{"intervention": "mixx", "heads": "0.1"}]}', "did you mean mix"),
        ('[{"intervention": "mix", "heads": "0.1", "v": 1}]', "field of mix"),
        ("[3]", 'no "intervention"'),
        ("nonsense", "no JSON"),
    ],
)
def test_specifications_that_cannot_be_read(text, words):
    with pytest.raises(InterventionError, match=words):
        Stack.from_json(text)


@pytest.mark.parametrize(
    ("make_edit", "words"),
    [
        (lambda: KeyBias("0.1", "last_prompt", 1.0), "no set of keys"),
        (lambda: KeyBias("0.1", None, 1.0), "no key is named"),
        (lambda: KeyBias("0.1", [0], math.nan), "no number"),
        (lambda: SetBias("0.1", [0]), "bias= or mass="),
        (lambda: SetBias("0.1", [0], mass=1.0), "between 0 and 1"),
        (lambda: Temperature("0.1", 0.0), "positive"),
        (lambda: ReplaceQueries("0.1", "blur"), "width"),
        (lambda: ReplaceQueries("0.1", "blurred"), "did you mean blur"),
        (lambda: ReplaceQueries("0.1", "blur", 1.0, (4, 0)), "height, width"),
        (lambda: Redistribute("0.1", [0], -0.1), "negative"),
        (lambda: Mix("0.1", "identity", 1.5), "0 to 1"),
        (lambda: Mix("0.1", "sink", 0.5), "unknown pattern"),
        (lambda: SetRows("0.1", slice(0, 3)), "key by key"),
        (lambda: SetRows("0.1", [0, 1], [1.0]), "1 weights for 2 keys"),
        (lambda: RescaleRows("0.1", torch.zeros(1, 2, 3)), "one number per row"),
        (lambda: Scale("0.1", torch.zeros(2, 2)), "one per head"),
        (lambda: Replace("0.1", None), "nothing to use"),
        (lambda: Noise("0.1", -1.0), "negative"),
        (lambda: Scale("0.1", 2.0, order=1.5), "order"),
        (lambda: Stack(()), "nothing"),
        (lambda: Stack((3,)), "not an intervention"),
    ],
)
def test_settings_that_make_no_sense(make_edit, words):
    with pytest.raises(InterventionError, match=words):
        make_edit()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Scale("0.1,0.2", [1.0, 2.0, 3.0]), "3 values.*2 heads"),
        (Add("0.1", VALUES), "3, 8"),
        (Mix("0.9", "identity", 0.5), r"heads 0\.\.3"),
        (Redistribute("5.0", [0], 0.5), r"layers are 0\.\.1"),
    ],
    ids=name_of,
)
def test_edits_that_do_not_fit_the_model(edit, words):
    with pytest.raises(InterventionError, match=words), Scope(make(llama)).intervene(edit):
        pytest.fail("the block was entered")


def test_an_encoder_takes_the_bidirectional_ones():
    scope = Scope(make(bert))
    tokens, mask = ids(2, 9), padding("right", 2, 9)
    kept = []
    for edit in (ReplaceQueries("0.1", "mean"), Mix("0.1", "query_mean", 0.5)):
        with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record:
            logits(scope.model, tokens, attention_mask=mask)
        u = 1.0 if isinstance(edit, ReplaceQueries) else 0.5
        dense = Dense(kept[0]).mix([1], "query_mean", u)
        torch.testing.assert_close(record.z(0)[mask.bool()].double(), dense.output[mask.bool()], rtol=1e-4, atol=1e-5)
    causal = Scope(make(gpt2))
    with pytest.raises(InterventionError, match="causal"), causal.intervene(ReplaceQueries("0.1", "mean")):
        logits(causal.model, tokens)
