"""Plans in the model's own caches, and on the command line: dynamic and static caches write the same; what cannot be is said."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headscope.errors import PlanError
from headscope.plans import Budget, Dense, SparsePlan, Streaming
from headscope.scope import Scope

_spec = importlib.util.spec_from_file_location("free_cases", Path(__file__).with_name("free_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["free_cases"] = cases
_spec.loader.exec_module(cases)


@pytest.fixture(scope="module")
def scope() -> Scope:
    return cases.tiny()


@pytest.mark.parametrize("name", ["mixed", "budgets", "top keys", "lists"])
def test_static_caches_write_what_dynamic_ones_do(scope: Scope, name: str) -> None:
    plan = cases.plan_of(scope, cases.PLANS[name])
    with scope.execute(plan):
        dynamic = cases.written(scope, **cases.padded())
        static = cases.written(scope, cache_implementation="static", **cases.padded())
    assert torch.equal(static[0], dynamic[0])
    assert torch.allclose(static[1], dynamic[1], atol=1e-9, rtol=0)


def test_texts_of_different_lengths_write_what_they_write_alone(scope: Scope) -> None:
    """Left padding moves every position; what a head keeps must move with its text."""
    plan = cases.plan_of(scope, cases.PLANS["mixed"])
    both = cases.padded()
    for cache in ("model", "free"):
        with scope.execute(plan, cache=cache):
            together = scope.generate(both["input_ids"], attention_mask=both["attention_mask"], max_new_tokens=5).new_ids
            alone = [
                scope.generate(cases.ids(60, 2), max_new_tokens=5).new_ids[0],
                scope.generate(cases.ids(40, 3), max_new_tokens=5).new_ids[0],
            ]
        assert torch.equal(together, torch.stack(alone))


def test_a_static_cache_that_is_too_small_is_an_error_and_leaves_the_model_as_it_was(scope: Scope) -> None:
    from transformers import StaticCache

    before = scope.model(cases.ids(30)).logits
    cache = StaticCache(config=scope.model.config, max_cache_len=20)
    with pytest.raises((IndexError, RuntimeError)), scope.execute(SparsePlan.uniform(scope, Streaming(2, 8))), torch.no_grad():
        scope.model(cases.ids(30), past_key_values=cache)
    assert torch.equal(scope.model(cases.ids(30)).logits, before)


def test_plans_of_another_model_are_refused_with_either_cache(scope: Scope) -> None:
    torch.manual_seed(5)
    other = cases.tiny()
    for parameter in other.model.parameters():
        parameter.data.add_(0.01)
    plan = SparsePlan.uniform(Scope(other.model, name="other"), Streaming(2, 8))
    for cache in ("model", "free"):
        with pytest.raises(PlanError, match="the same shape and other weights"), scope.execute(plan, cache=cache):
            pass


def test_two_plans_at_once_are_refused_and_the_first_goes_on(scope: Scope) -> None:
    plan = SparsePlan.uniform(scope, Streaming(2, 8))
    with scope.execute(plan, fallback=False):
        alone = scope.model(cases.ids(30)).logits
    with scope.execute(plan, fallback=False):
        with pytest.raises(PlanError, match="already"), scope.execute(SparsePlan.uniform(scope, Streaming(1, 2))):
            pass
        assert torch.equal(scope.model(cases.ids(30)).logits, alone)


def test_an_error_in_the_middle_closes_the_cache_and_restores_the_model(scope: Scope) -> None:
    before = scope.model(cases.ids(30)).logits
    caught: list[Any] = []

    def interrupted() -> None:
        with scope.execute(SparsePlan.uniform(scope, Budget(5, 4)), cache="free") as ran:
            caught.append(ran.new_cache())
            scope.generate(cases.ids(30), max_new_tokens=2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert torch.equal(scope.model(cases.ids(30)).logits, before)
    with pytest.raises(PlanError, match="outside of its"):
        scope.model(cases.ids(3), past_key_values=caught[0])


def test_encoders_have_no_cache_to_free() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    encoder = Scope(BertModel(config).eval())
    with (
        pytest.raises(PlanError, match="it is not a causal model that generates"),
        encoder.execute(SparsePlan.uniform(encoder, Dense()), cache="free"),
    ):
        pass


# ---- the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a word tokenizer, saved as a local directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *[f"w{i}" for i in range(96)]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("models") / "tiny"
    cases.tiny(torch.float32).model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: object) -> tuple[int, str, str]:
    from headscope.cli.main import main

    monkeypatch.setattr(sys, "argv", ["headscope", *map(str, given)])
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return int(str(code)), printed.out, printed.err


def test_run_writes_under_a_plan_and_says_what_it_held(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import headscope as hs

    scope = hs.load(str(model_directory))
    plan = SparsePlan.uniform(scope, Streaming(2, 8))
    path = plan.save(tmp_path / "plan.json")
    prompt = " ".join(f"w{i % 90}" for i in range(60))
    given = ("run", model_directory, "--plan", path, "--prompt", prompt, "--max-new-tokens", 5, "--json")
    code, out, _ = run(monkeypatch, capsys, *given, "--baseline")
    found = json.loads(out)
    assert code == 0
    with scope.execute(plan):
        assert found["text"] == scope.generate(prompt, max_new_tokens=5).text
    assert found["baseline"] == scope.generate(prompt, max_new_tokens=5).text
    length = found["prompt"]["tokens"] + found["new_tokens"]
    width = 2 * 2 * 16 * 4 * cases.LAYERS  # bytes of a key and a value of both key heads in all layers
    assert found["cache"]["dense_bytes"] == (length - 1) * width
    assert found["cache"]["bytes"] == 11 * width  # two first keys, a ring of eight, one place for what is lost
    assert found["ran"]["heads"]["sparse"] == 8 * 5
    code, out, _ = run(monkeypatch, capsys, *given, "--cache", "dense")
    assert json.loads(out)["text"] == found["text"]
    assert json.loads(out)["cache"]["bytes"] is None
    code, out, err = run(monkeypatch, capsys, *given[:-1])
    assert code == 0
    assert found["text"] in out
    assert "KV cache" in err


def test_run_refuses_in_one_line(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("run", model_directory, "--prompt", "w1 w2", "--plan")
    code, _, err = run(monkeypatch, capsys, *given, tmp_path / "none.json")
    assert code == 1
    assert "cannot be read" in err
    plan = SparsePlan.uniform(cases.tiny(), Streaming(2, 8)).save(tmp_path / "other.json")
    code, _, err = run(monkeypatch, capsys, *given, plan)
    assert code == 1
    assert "other weights" in err
    code, _, err = run(monkeypatch, capsys, "bench", "decode", "--lengths", "8k")
    assert code == 1
    assert "it lists counts" in err
