"""The bundled models as a catalogue: what ships, how large it is, how it loads, and the machinery that found their heads."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import ModelError
from headscope.models import catalog
from headscope.models.bundled import BUNDLED, row_of
from headscope.models.bundled.ablation import ablated, search, streaming_mask
from headscope.models.bundled.training import Trainer
from headscope.models.bundled.words import build_tokenizer

MIB = 2**20
TRANSFORMERS = [name for name, row in BUNDLED.items() if row.library == "transformers"]


def test_every_model_is_small_and_all_of_them_together_too():
    for row in BUNDLED.values():
        assert 0.05 * MIB < row.bytes <= 12 * MIB, row.name
        assert row.bytes == sum(path.stat().st_size for path in row.path.iterdir())
    assert sum(row.bytes for row in BUNDLED.values()) <= 30 * MIB


def test_the_catalogue_lists_them_with_size_source_and_licence():
    listed = {row.name: row for row in catalog() if row.kind == "bundled"}
    assert set(listed) == {f"bundled:{name}" for name in BUNDLED}
    assert all(row.licence == "Apache-2.0" and row.cached and row.size > 0 for row in listed.values())


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_each_has_a_card_with_its_numbers_and_its_training(name):
    row = row_of(name)
    facts = json.loads((row.path / "training.json").read_text())
    assert f"# bundled:{name}" in row.card
    assert f"{facts['steps']} optimiser steps" in row.card
    assert "Apache-2.0" in row.card
    assert "## Numbers" in row.card
    # No number that could not be measured.
    assert " nan" not in row.card


def test_an_unknown_name_is_refused_and_so_is_the_truth_of_a_model_without_one():
    with pytest.raises(ModelError, match="bundled:vlm"):
        row_of("vml")
    with pytest.raises(ModelError, match="no known heads"):
        _ = row_of("dit").truth


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_loads_offline_in_under_five_seconds(name):
    begin = time.process_time()
    scope = hs.load(f"bundled:{name}", device="cpu", offline=True)
    assert time.process_time() - begin < 5
    assert scope.source == f"bundled:{name}"
    assert next(scope.model.parameters()).dtype == torch.float32
    assert not scope.model.training


def test_the_registry_imports_neither_torch_nor_transformers():
    code = "import sys, headscope.models.bundled; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_ablating_a_head_is_the_same_as_zero_columns_of_the_output_projection(llama):
    ids = torch.randint(0, 50, (2, 12))
    before = llama(ids).logits
    with ablated(llama.model.layers, [(0, 1), (1, 3)], 8):
        found = llama(ids).logits
    assert torch.equal(llama(ids).logits, before)
    llama.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
    llama.model.layers[1].self_attn.o_proj.weight[:, 24:32] = 0
    assert (found - llama(ids).logits).abs().max() < 1e-5
    assert (found - before).abs().max() > 1e-3


def test_the_streaming_mask_has_the_sink_and_the_window_and_nothing_else():
    mask = streaming_mask(9, 2, 3, "cpu")[0, 0]
    for query in range(9):
        allowed = {0, 1, query, query - 1, query - 2}
        assert {key for key in range(9) if mask[query, key]} == {key for key in allowed if 0 <= key <= query}


def test_greedy_search_finds_heads_that_stand_in_for_each_other():
    """A task that needs head (0, 0) or (1, 1), and a little of (2, 0): only the pair together destroys it."""

    def accuracy(heads):
        gone = set(heads)
        return (0.0 if {(0, 0), (1, 1)} <= gone else 0.9) + (0.0 if (2, 0) in gone else 0.1) - 0.01 * ((0, 0) in gone)

    heads = [(0, 0), (1, 1), (2, 0), (3, 1)]
    found = search(accuracy, heads, floor=0.05)
    assert found["base"] == 1.0
    assert found["single"] == {"0.0": 0.99, "1.1": 1.0, "2.0": 0.9, "3.1": 1.0}
    assert {tuple(row[:2]) for row in found["greedy"]} == {(0, 0), (1, 1), (2, 0)}
    assert found["greedy"][-1][2] <= 0.05


def test_the_trainer_warms_up_and_ends_at_zero():
    weight = torch.nn.Linear(2, 2)
    trainer = Trainer(weight, 10, 0.5, warm=2, cool=0.5)
    rates = []
    while trainer.progress < 1:
        trainer.step(weight(torch.ones(1, 2)).sum())
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert len(rates) == 10
    assert rates[:3] == [0.25, 0.5, 0.5]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.06


def test_the_tokenizer_has_one_id_per_word_and_refuses_a_word_twice():
    tokenizer = build_tokenizer(["the", "river", ".", "?"], length=10)
    assert tokenizer("The river.  the RIVER ?")["input_ids"] == [1, 4, 5, 6, 4, 5, 7]
    assert tokenizer("the sea")["input_ids"] == [1, 4, 3]
    assert tokenizer.decode([1, 4, 5, 6], skip_special_tokens=True) == "the river ."
    with pytest.raises(ValueError, match="river"):
        build_tokenizer(["river", "river"], length=10)
