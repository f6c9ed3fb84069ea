"""Stacks: one order whoever wrote them first, conflicts refused, and edits that commute."""

from __future__ import annotations

import itertools

import pytest
import torch

from headscope.errors import InterventionError
from headscope.interventions import (
    Add,
    BoostScores,
    HeadMask,
    KeyBias,
    Mix,
    Noise,
    PatchHeads,
    Redistribute,
    ReplaceQueries,
    Scale,
    SetBias,
    Stack,
    Temperature,
    record_heads,
)
from headscope.scope import Scope

from ..core.tiny_models import gemma2, gpt_oss, ids, llama, make
from .dense_edits import Dense
from .edit_cases import Grab
from .edit_table import VALUES, logits

# ---- order and conflicts ------------------------------------------------------------------------------------------------------


def test_the_order_of_writing_does_not_matter_across_sites():
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    edits = (Scale("0.1", 2.0), Redistribute("0.1", [0], 0.4), KeyBias("0.1", [2], 0.5))
    results = []
    for order in itertools.permutations(edits):
        with scope.intervene(*order):
            results.append(logits(scope.model, tokens))
    a, b, c = edits
    with scope.intervene(a), scope.intervene(b), scope.intervene(c):
        results.append(logits(scope.model, tokens))
    assert all(torch.equal(one, results[0]) for one in results)


CONFLICTS = [
    (Redistribute("0.1", [0], 0.4), Redistribute("0.1,1.1", [1], 0.4), "probabilities"),
    (Mix("0.1", "identity", 0.5), Redistribute("0.1", [0], 0.4), "probabilities"),
    (Mix("0.1", "identity", 0.5), Mix("0.1", "uniform", 0.5), "two Mix"),
    (Scale("0.1", 2.0), Add("0.1", VALUES[:1]), "output"),
    (HeadMask("0.1"), Add("0.1", VALUES[:1]), "output"),
    (HeadMask("0.1", "uniform"), HeadMask("0.1", "noise"), "two HeadMask"),
    (Temperature("0.1", 2.0), KeyBias("0.1", [0], 1.0), "scores"),
    (BoostScores("0.1", [0], 1.0), KeyBias("0.1", [0], 1.0), "scores"),
    (PatchHeads("0.1", VALUES[:1], "q"), Temperature("0.1", 2.0), "scores"),
    (HeadMask("0.1", phase="decode"), Add("0.1", VALUES[:1]), "output"),
]


@pytest.mark.filterwarnings("ignore:.*nothing was changed")
@pytest.mark.parametrize(("a", "b", "words"), CONFLICTS, ids=lambda value: getattr(value, "name", None))
def test_edits_whose_order_would_matter_are_refused(a, b, words):
    scope = Scope(make(llama))
    for first, second in ((a, b), (b, a)):
        with pytest.raises(InterventionError, match=rf"{words}.*order=1"), scope.intervene(first, second):
            pytest.fail("the block was entered")
        with scope.intervene(first):
            inner = scope.intervene(second)
            with pytest.raises(InterventionError, match=r"model\.layers\.0\.self_attn\.1"), inner:
                pytest.fail("the block was entered")
        with pytest.raises(InterventionError, match=words):
            Stack((first, second)).check(scope)


COMPATIBLE = [
    (Scale("0.1", 2.0), Scale("0.1", 0.5)),
    (HeadMask("0.1"), HeadMask("0.1")),
    (HeadMask("0.1"), Scale("0.1", 3.0)),
    (HeadMask("0.1", "uniform"), HeadMask("0.1", "uniform")),
    (Add("0.1", VALUES[:1]), Noise("0.1", 0.5)),
    (KeyBias("0.1", [0], 1.0), KeyBias("0.1", [0, 1], -0.5)),
    (KeyBias("0.1", [0], 1.0), SetBias("0.1", [1, 2], bias=0.3)),
    (Temperature("0.1", 2.0), Temperature("0.1", 0.7)),
    (ReplaceQueries("0.1", "zero"), KeyBias("0.1", [0], 1.0)),
    (PatchHeads("0.0,0.1", VALUES[:1], "k", positions=[0]), PatchHeads("0.0,0.1", VALUES[:1], "v", positions=[0])),
    (Redistribute("0.1", [0], 0.4), Redistribute("0.0", [1], 0.4)),
    (HeadMask("0.1", positions=[3]), Add("0.1", VALUES[:1], positions=slice(4, None))),
    (HeadMask("0.1", phase="prefill"), Add("0.1", VALUES[:1], phase="decode")),
]


@pytest.mark.parametrize(("a", "b"), COMPATIBLE, ids=lambda value: value.name)
def test_edits_that_commute_do(a, b):
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    results = []
    for order in ((a, b), (b, a)):
        with scope.intervene(*order):
            results.append(logits(scope.model, tokens))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_an_order_settles_it():
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    results = {}
    for first, second in ((1, 2), (2, 1)):
        edits = (Scale("0.1", 2.0, order=first), Add("0.1", VALUES[:1], order=second))
        with record_heads(scope, "0.1", sites=("z",)) as plain:
            logits(scope.model, tokens)
        for order in (edits, edits[::-1]):
            with scope.intervene(*order), record_heads(scope, "0.1", sites=("z",)) as record:
                logits(scope.model, tokens)
            results.setdefault(first, []).append(record.z(0))
    value = VALUES[0].double()
    for got in results[1]:
        torch.testing.assert_close(got, 2 * plain.z(0) + value)
    for got in results[2]:
        torch.testing.assert_close(got, 2 * (plain.z(0) + value))


def test_redistributions_in_a_given_order_meet_each_other():
    scope, tokens = Scope(make(llama).double()), ids(1, 9)
    kept = []
    edits = (Redistribute("0.1", [0], 0.4, order=2), Redistribute("0.1", [0, 1, 2], 0.5, order=1))
    with scope.intervene(Grab(kept)), scope.intervene(*edits), record_heads(scope, "0.1", sites=("z",)) as record:
        logits(scope.model, tokens)
    keys = torch.arange(9)
    dense = Dense(kept[0]).redistribute([1], keys < 3, None, 0.5).redistribute([1], keys < 1, None, 0.4)
    torch.testing.assert_close(record.z(0)[:, :, 0], dense.output[:, :, 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", [gemma2, gpt_oss], ids=lambda build: build.__name__)
def test_a_temperature_on_some_heads_of_a_capped_model_after_a_bias(build):
    scope, tokens = Scope(make(build)), ids(1, 9)
    kept = []
    edits = (KeyBias("0.1", [0], 1.0, order=1), Temperature("0.1", 2.0, order=2))
    with scope.intervene(Grab(kept)), scope.intervene(*edits), record_heads(scope, "0.1", sites=("z",)) as record:
        logits(scope.model, tokens)
    dense = Dense(kept[0]).add([1], (torch.arange(9) == 0).double()).cool([1], 2.0)
    torch.testing.assert_close(record.z(0)[:, :, 0].double(), dense.output[:, :, 1], rtol=1e-4, atol=1e-4)
    swapped = (KeyBias("0.1", [0], 1.0, order=2), Temperature("0.1", 2.0, order=1))
    with pytest.raises(InterventionError, match="bias would be divided"), scope.intervene(*swapped):
        logits(scope.model, tokens)
