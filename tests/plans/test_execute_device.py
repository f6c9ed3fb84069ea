"""The device's way of decoding (kernels, choices in tensors) against the plain way: the same tokens and logits.

On a machine without CUDA the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.sparse_decode_host as host
import headscope.plans.execute as execute
from headscope.plans import SparsePlan, Streaming
from headscope.scope import Scope

_spec = importlib.util.spec_from_file_location("free_cases", Path(__file__).with_name("free_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["free_cases"] = cases
_spec.loader.exec_module(cases)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def scope() -> Scope:
    return cases.tiny(torch.float32, DEVICE)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(host, "launch_for", lambda *given: (16, 1, 1))
    monkeypatch.setattr(execute, "on_device", lambda call: True)


def both(scope: Scope, name: str, free: bool, **options: Any) -> tuple[Any, Any]:
    plan = cases.plan_of(scope, cases.PLANS[name])
    with scope.execute(plan, cache="free" if free else "model", fallback=False) as ran:
        found = cases.written(scope, ran.new_cache() if free else None, 3, **options)
    return found, ran


@pytest.mark.parametrize(
    ("name", "free"),
    [*[(name, True) for name in cases.PLANS], *[(name, False) for name in ("mixed", "budgets", "top blocks", "compensation")]],
)
def test_padded_batches_write_the_same(scope: Scope, name: str, free: bool, on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids, logits), ran = both(scope, name, free, **cases.padded())
    monkeypatch.setattr(execute, "on_device", lambda call: False)
    (plain_ids, plain_logits), plain = both(scope, name, free, **cases.padded())
    assert torch.equal(ids, plain_ids)
    assert torch.allclose(logits, plain_logits, atol=2e-4, rtol=0)
    assert ran.ran["decode"] == 2 * cases.LAYERS
    assert "decode" not in plain.ran
    assert ran.report == plain.report


def test_beams_follow_the_cache(scope: Scope, on_device: None) -> None:
    ids, _ = both(scope, "top keys", True, **cases.padded(), num_beams=2)[0]
    with scope.execute(cases.plan_of(scope, cases.PLANS["top keys"]), cache="free") as ran, pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "on_device", lambda call: False)
        expected, _ = cases.written(scope, ran.new_cache(), 3, **cases.padded(), num_beams=2)
    assert torch.equal(ids, expected)


def test_what_dense_attention_finishes_sooner_is_left_to_the_model(scope: Scope, on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "decode_worth_it", lambda call, patterns: "too short")
    plan = SparsePlan.uniform(scope, Streaming(2, 8))
    with scope.execute(plan) as ran:
        scope.generate(cases.ids(30), max_new_tokens=3)
    assert ran.reasons == {"too short": 2 * cases.LAYERS}
    assert ran.report["host"] == 2 * cases.LAYERS
    assert "too short" in repr(ran)
    with scope.execute(plan, fallback=False) as ran:
        scope.generate(cases.ids(30), max_new_tokens=3)
    assert ran.report["host"] == 0
