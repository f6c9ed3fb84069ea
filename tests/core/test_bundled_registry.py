"""The bundled models as a catalogue: what ships, how large it is, how it loads, and the machinery that found their heads."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import ModelError
from headscope.models import catalog
from headscope.models.bundled import BUNDLED, card, row_of, training
from headscope.models.bundled.ablation import ablated, search, streaming_mask
from headscope.models.bundled.retrain import compare
from headscope.models.bundled.training import Trainer, write_json
from headscope.models.bundled.words import build_tokenizer
from headscope.models.catalog import verify_bundled
from headscope.models.checksum import sha256_file

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


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_the_shipped_weights_are_the_ones_of_the_record_and_training_again_gave_their_numbers(name):
    """Every number within 0.02 of the card's, by the script with the same seed on the same kind of device; here they are equal."""
    where = row_of(name).path
    facts = json.loads((where / "training.json").read_text())
    (weights,) = (path for path in where.glob("*.safetensors") if path.stem.endswith("model"))
    assert sha256_file(weights) == facts["sha256"]
    runs = json.loads((where / "retraining.json").read_text())
    again = [run for run in runs if (run["seed"], run["device"], run["torch"]) == (facts["seed"], facts["device"], facts["torch"])]
    assert again
    for run in again:
        assert run["largest_difference"] <= 0.02
        assert run["numbers"] >= 5
    assert card.again_lines(where).strip() in row_of(name).card


def test_a_retrained_model_is_compared_number_by_number(tmp_path):
    found = {"count": {"real": 0.9, "constant": 0.4}, "counts": {"8": 64}, "halves": [0.5, 0.75], "noise": {"distance": 7.0}, "few": 3}
    for name, sha, value in (("a", "1", 0.9), ("b", "1", 0.9), ("c", "2", 0.8)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "training.json", {"seed": 0, "device": "CPU", "torch": "2", "sha256": sha})
        write_json(tmp_path / name / "evaluation.json", found | {"count": {"real": value, "constant": 0.1}, "few": 9})
    same, other = (compare(tmp_path / "a", tmp_path / name) for name in ("b", "c"))
    assert (same["same_weights"], same["largest_difference"], same["numbers"]) == (True, 0.0, 3)
    assert (other["same_weights"], other["largest_difference"], other["where"]) == (False, 0.1, "count.real")
    write_json(tmp_path / "a" / "retraining.json", [same, same, other])
    said = card.again_lines(tmp_path / "a")
    assert "bit for bit. (2 runs)" in said
    assert "largest difference 0.100 (count.real)" in said
    write_json(tmp_path / "c" / "evaluation.json", {"count": {"real": 0.9}})
    with pytest.raises(ValueError, match="other rows"):
        compare(tmp_path / "a", tmp_path / "c")


@pytest.fixture
def free_kernels():
    """The training scripts switch the process to deterministic kernels; other tests are not meant to run under them."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_needle", ["--steps", "2", "--last", "1", "--scale", "0.02"]),
        ("train_vlm", ["--steps", "2", "--batch", "2"]),
        ("train_dit", ["--kind", "dit", "--steps", "2", "--batch", "4"]),
        ("train_dit", ["--kind", "sd3", "--steps", "2", "--batch", "4"]),
        ("train_induction", ["--steps", "2"]),
    ],
    ids=["needle", "vlm", "dit", "sd3", "induction"],
)
def test_a_script_gives_the_same_weights_twice_however_slow_the_machine(tmp_path, monkeypatch, free_kernels, script, options):
    """The second run has a clock that races: nothing in a schedule may hang on time."""
    module = importlib.import_module(f"headscope.models.bundled.{script}")
    shas = []
    for name, pace in (("one", 1.0), ("two", 1000.0)):
        clock = time.perf_counter
        monkeypatch.setattr(training.time, "perf_counter", lambda clock=clock, pace=pace: pace * clock())
        monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path / name), "--device", "cpu", *options])
        if script == "train_needle":
            monkeypatch.setattr(module, "MIXED", ((module.STAGES[0], 0.5), (module.STAGES[1], 0.5)))  # 16,384 tokens take a minute here
        module.main()
        monkeypatch.undo()
        facts = json.loads((tmp_path / name / "training.json").read_text())
        shas.append((facts["sha256"], facts["steps"]))
    assert shas[0] == shas[1]


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


@pytest.mark.parametrize("name", ["induction", "sd3"])
def test_weights_that_changed_are_not_loaded(name, tmp_path, monkeypatch, capsys):
    """One flipped bit still loads everywhere else, and its known heads are those of another model."""
    row = row_of(name)
    where = shutil.copytree(row.path, tmp_path / name)
    monkeypatch.setitem(BUNDLED, name, dataclasses.replace(row, path=where))
    assert row_of(name).damage() == ""
    (weights,) = (path for path in where.glob("*.safetensors") if path.stem.endswith("model"))
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match=f"{weights.name} is not the file that shipped"):
        hs.load(f"bundled:{name}")
    assert verify_bundled()[f"bundled:{name}"].startswith("damaged")
    weights.unlink()
    with pytest.raises(ModelError, match="install headscope again"):
        hs.load(f"bundled:{name}")
