"""bundled:induction: it continues repeats, and the heads that do it are the ones on record."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import headscope as hs
from headscope.models import directory
from headscope.models.bundled import data_induction, row_of, train_induction
from headscope.models.bundled.evaluate_induction import accuracy
from headscope.models.bundled.training import generator


@pytest.fixture(scope="module")
def scope():
    return hs.load("bundled:induction", device="cpu")


@pytest.fixture(scope="module")
def truth():
    return row_of("induction").truth


def test_the_second_copy_is_predicted_as_the_card_says(scope):
    table = json.loads((row_of("induction").path / "evaluation.json").read_text())["second_copy"]
    for period in (16, 64):
        found = accuracy(scope.model, period=period, count=64, seed=777)
        assert found == pytest.approx(table[str(period)], abs=0.02)
        assert found > 0.97


def test_nothing_is_predicted_where_nothing_was_said_before(scope):
    """First copies are random words: chance is 1 in 124."""
    ids, _ = data_induction.batch(64, 32, generator(5, "cpu"))
    with torch.no_grad():
        guess = scope.model(ids).logits.argmax(-1)
    assert (guess[:, 1:31] == ids[:, 2:32]).double().mean() < 0.03


def test_the_known_circuit_is_there(scope, truth):
    """Weights recomputed from an eager pass: previous-token heads in layer 0, induction heads in layer 1."""
    ids, _ = data_induction.batch(16, 40, generator(6, "cpu"))
    scope.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = scope.model(ids, output_attentions=True).attentions
    finally:
        scope.model.set_attn_implementation("sdpa")
    queries = torch.arange(42, 80)
    previous = weights[0][:, :, queries, queries - 1].mean((0, 2))
    induction = weights[1][:, :, queries, queries - 39].mean((0, 2))
    assert truth["previous_token"] == [[0, head] for head in range(4) if previous[head] > 0.5] == [[0, 3]]
    assert truth["induction"] == [[1, head] for head in range(4) if induction[head] > 0.3]
    assert previous[3] > 0.95
    assert induction.min() > 0.8


def test_ablation_destroys_the_task_where_the_record_says_so(scope, truth):
    single = truth["single"]
    assert accuracy(scope.model, heads=[(0, 3)]) == pytest.approx(single["0.3"], abs=0.02)
    assert single["0.3"] < 0.1
    assert accuracy(scope.model, heads=[(1, 1)]) > 0.95
    every = [(layer, head) for layer, head, _ in truth["greedy_layer1"]]
    assert accuracy(scope.model, heads=every) < 0.1 < accuracy(scope.model, heads=every[:1])


def test_the_mlps_write_nothing(scope):
    assert all(layer.mlp.down_proj.weight.abs().max() == 0 for layer in scope.model.model.layers)
    assert 90_000 < sum(weight.numel() for weight in scope.model.parameters()) < 110_000


def test_a_text_is_continued(scope):
    words = ["acorn", "kettle", "heron", "almond", "fiddle", "easel", "copper", "anchor", "iron"]
    text = " ".join(words + words[:4])
    ids = scope.tokenizer(text, return_tensors="pt")["input_ids"]
    out = scope.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert scope.tokenizer.decode(out).split() == words[4:8]


def test_the_script_trains_and_writes_a_checkpoint_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(train_induction, "settle", lambda seed, strict: torch.manual_seed(seed))  # for this process stays as it is
    monkeypatch.setattr(sys, "argv", ["train_induction", "--out", str(tmp_path), "--device", "cpu", "--steps", "3"])
    train_induction.main()
    model, tokenizer = directory.read(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert model.config.num_hidden_layers == 2
    assert len(tokenizer) == 128
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 3
