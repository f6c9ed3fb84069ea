"""The device's way of decoding (kernels, choices in tensors) against the plain way, on a CPU: the same tokens and logits.

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
from headscope.kernels import sparse_decode_call
from headscope.plans import Dense, Pattern, SparsePlan, Streaming, TopKeys
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


@pytest.fixture(scope="module")
def plain() -> Scope:
    return cases.tiny(torch.float32, "cpu")


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no device, its way is taken on a CPU."""
    if not torch.cuda.is_available():
        import headscope.kernels.sparse_decode_keys as keys

        monkeypatch.setattr(host, "launch_for", lambda *given: (16, 1, 1))
        for name, value in (("SAMPLE", 16), ("ROOM", 64), ("STRETCH", 64)):
            monkeypatch.setattr(keys, name, value)
        monkeypatch.setattr(execute, "on_device", lambda call: True)


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "on_device", lambda call: False)


def both(scope: Scope, name: str, free: bool, count: int = 3, **options: Any) -> tuple[Any, Any]:
    plan = cases.plan_of(scope, cases.PLANS[name])
    with scope.execute(plan, cache="free" if free else "model", fallback=False) as ran:
        found = cases.written(scope, ran.new_cache() if free else None, count, **options)
    return tuple(x.cpu() for x in found), ran


@pytest.mark.parametrize(
    ("name", "free"),
    [*[(name, True) for name in cases.PLANS], *[(name, False) for name in ("mixed", "budgets", "top blocks", "compensation")]],
)
def test_padded_batches_write_the_same(scope: Scope, plain: Scope, name: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids, logits), ran = both(scope, name, free, **cases.padded())
    on_cpu(monkeypatch)
    (plain_ids, plain_logits), expected = both(plain, name, free, **cases.padded())
    assert torch.equal(ids, plain_ids)
    assert torch.allclose(logits, plain_logits, atol=2e-4, rtol=0)
    assert ran.ran["decode"] == 2 * cases.LAYERS
    assert "decode" not in expected.ran
    assert ran.report == expected.report


@pytest.mark.parametrize(
    ("name", "free"),
    [
        *[(name, True) for name in ("strided", "lines", "chosen together", "spans that compensate")],
        *[(name, False) for name in ("lists", "top blocks", "blocks and power")],
    ],
)
def test_one_text_writes_the_same(scope: Scope, plain: Scope, name: str, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding choices are made in two launches, lists are of tiles, and far keys are freed."""
    options = {"input_ids": cases.ids(49, 8)}
    (ids, logits), ran = both(scope, name, free, 4, **options)
    on_cpu(monkeypatch)
    (plain_ids, plain_logits), _ = both(plain, name, free, 4, **options)
    assert torch.equal(ids, plain_ids)
    assert torch.allclose(logits, plain_logits, atol=2e-4, rtol=0)
    assert ran.ran["decode"] == 3 * cases.LAYERS


@pytest.mark.parametrize(
    ("heads", "free"),
    [
        ((TopKeys(9, window=5),) * 4, False),
        ((TopKeys(9, window=5, grouped=True),) * 4, True),
        ((TopKeys(9, window=5), TopKeys(20, sink=0, window=3), Streaming(2, 8), Dense()), True),
        ((TopKeys(16, window=4, block=8, estimate="bounds"),) * 4, False),
        ((TopKeys(16, window=4, block=8, estimate="bounds"),) * 4, True),
        ((TopKeys(16, window=4, block=8, estimate="mean", grouped=True),) * 4, False),
        ((TopKeys(16, refresh=2, window=4, block=8, estimate="bounds", grouped=True),) * 2 + (Streaming(2, 8),) * 2, True),
    ],
    ids=["keys", "keys together", "keys beside others", "blocks", "blocks in a freeing cache", "blocks together", "now and then"],
)
def test_layers_of_one_rule_choose_in_lists(
    scope: Scope, plain: Scope, heads: tuple[Pattern, ...], free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(where: Scope) -> tuple[torch.Tensor, Any]:
        with where.execute(cases.plan_of(where, heads), cache="free" if free else "model", fallback=False) as ran:
            return cases.written(where, ran.new_cache() if free else None, 3, input_ids=cases.ids(41, 8))[1].cpu(), ran

    found, ran = run(scope)
    assert all(state.memory.pick is not None for state in ran._state.values())
    on_cpu(monkeypatch)
    assert torch.allclose(found, run(plain)[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_layers_that_take_blocks_over(scope: Scope, plain: Scope, turned: bool, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of another layer as they are, or worked out head by head where heads take over those of others."""
    rule = {"window": 4, "block": 8, "estimate": "bounds"}
    heads: dict[tuple[int, int], Pattern] = {(0, head): TopKeys(16, full=full, **rule) for head in range(4)}
    heads |= {(1, head): TopKeys(16, source=(0, 3 - head if turned else head), **rule) for head in range(4)}
    plan = SparsePlan(SparsePlan.uniform(scope, Dense()).model, heads)

    def run(where: Scope) -> torch.Tensor:
        with where.execute(plan, fallback=False):
            return cases.written(where, None, 5, input_ids=cases.ids(61, 8))[1].cpu()

    found = run(scope)
    on_cpu(monkeypatch)
    assert torch.allclose(found, run(plain), atol=2e-4, rtol=0)


def test_beams_follow_the_cache(scope: Scope, plain: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _ = both(scope, "top keys", True, **cases.padded(), num_beams=2)[0]
    on_cpu(monkeypatch)
    expected, _ = both(plain, "top keys", True, **cases.padded(), num_beams=2)[0]
    assert torch.equal(ids, expected)


def test_what_dense_attention_finishes_sooner_is_left_to_the_model(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (execute, sparse_decode_call):
        monkeypatch.setattr(place, "decode_worth_it", lambda call, patterns: "too short")
    plan = SparsePlan.uniform(scope, Streaming(2, 8))
    with scope.execute(plan) as ran:
        scope.generate(cases.ids(30), max_new_tokens=3)
    assert ran.reasons == {"too short": 2 * cases.LAYERS}
    assert ran.report["host"] == 2 * cases.LAYERS
    assert "too short" in repr(ran)
    with scope.execute(plan, fallback=False) as ran:
        scope.generate(cases.ids(30), max_new_tokens=3)
    assert ran.report["host"] == 0
