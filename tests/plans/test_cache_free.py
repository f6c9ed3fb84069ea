"""Freeing caches: the same tokens as with every key, no byte more than the plan keeps, and refusals where they would be wrong."""

from __future__ import annotations

import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from headscope.errors import CaptureError, PlanError
from headscope.plans import Budget, Dense, Lines, Span, SparsePlan, Streaming, Strided
from headscope.plans.cache_far import Far
from headscope.plans.cache_parts import Ring
from headscope.plans.cache_store import LayerStore
from headscope.scope import Scope

_spec = importlib.util.spec_from_file_location("free_cases", Path(__file__).with_name("free_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["free_cases"] = cases
_spec.loader.exec_module(cases)

PLAIN = {"input_ids": cases.ids(50, 4)}
RUNS: dict[str, dict[str, Any]] = {
    "one text": PLAIN,
    "padded batch": cases.padded(),
    "chunks": {**PLAIN, "prefill_chunk_size": 21},
    "chunks of a padded batch": {**cases.padded(), "prefill_chunk_size": 25},
    "beams": {**cases.padded(), "num_beams": 2},
}


@pytest.fixture(scope="module")
def scope() -> Scope:
    return cases.tiny()


@pytest.mark.parametrize(
    ("plan", "run"),
    [
        *[(plan, "padded batch") for plan in cases.PLANS],
        ("streaming", "chunks"),
        ("mixed", "chunks of a padded batch"),
        ("budgets", "chunks"),
        ("budgets", "beams"),
        ("streaming", "beams"),
        ("top keys", "chunks"),
        ("budget beside dense", "one text"),
        *[(plan, "one text") for plan in ("strided", "lines", "spans that compensate", "chosen together")],
        *[(plan, "chunks") for plan in ("strided", "lines")],
        ("strided", "beams"),
    ],
)
def test_writes_what_a_full_cache_writes(scope: Scope, plan: str, run: str) -> None:
    chosen = cases.plan_of(scope, cases.PLANS[plan])
    with scope.execute(chosen):
        full_ids, full_logits = cases.written(scope, **RUNS[run])
    with scope.execute(chosen, cache="free") as ran:
        free_ids, free_logits = cases.written(scope, ran.new_cache(), **RUNS[run])
    assert torch.equal(free_ids, full_ids)
    assert torch.allclose(free_logits, full_logits, atol=1e-9, rtol=0)
    assert ran.report["sparse"] > 0
    assert ran.cache is not None
    whole = plan in ("lists", "top blocks", "chosen together", "blocks and power")  # these need every key, and room to grow
    dense = whole or (plan in ("strided", "lines") and RUNS[run].keys() != PLAIN.keys())  # padded texts keep all, and chunks too few tokens
    assert dense or ran.cache.bytes < ran.cache.dense_bytes


def test_streaming_writes_what_eager_attention_under_the_mask_writes(scope: Scope) -> None:
    heads = cases.PLANS["mixed"]
    with scope.execute(cases.plan_of(scope, heads), cache="free"):
        new = scope.generate(cases.ids(50, 5), max_new_tokens=5).new_ids[0].tolist()
    grown, expected = cases.ids(50, 5), []
    scope.model.set_attn_implementation("eager")
    try:
        for _ in range(5):
            at = torch.arange(grown.shape[1])
            seen = torch.stack([one.visible(at, at) & (at[None] <= at[:, None]) for one in heads])[None]
            mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
            with torch.no_grad():
                expected.append(int(scope.model(grown, attention_mask=mask).logits[0, -1].argmax()))
            grown = torch.cat([grown, torch.tensor([[expected[-1]]])], 1)
    finally:
        scope.model.set_attn_implementation("sdpa")
    assert new == expected


def test_generate_uses_a_fresh_cache_each_time_and_lets_the_old_one_go(scope: Scope) -> None:
    plan = SparsePlan.uniform(scope, Streaming(2, 8))
    with scope.execute(plan, cache="free") as ran:
        first = scope.generate(cases.ids(50), max_new_tokens=4).new_ids
        old = weakref.ref(ran.cache)
        second = scope.generate(cases.ids(50), max_new_tokens=4).new_ids
        assert old() is None  # without the garbage collector: a cache in a circle would hold a GPU's memory
    assert torch.equal(first, second)
    gc.collect()


@pytest.mark.parametrize("window", [None, 24])
def test_layers_with_a_window_of_their_own(window: int | None) -> None:
    """Models with sliding layers: what the layer itself cannot see is dropped whatever the plan says."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        sliding_window=window or 400, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval().double()
    model.set_attn_implementation("eager")
    scope = Scope(model)
    plan = SparsePlan(SparsePlan.uniform(scope, Dense()).model, dict.fromkeys(SparsePlan.uniform(scope, Dense()).patterns, Dense()))
    plan = plan.replace({(1, 0): Streaming(2, 8), (1, 1): Streaming(2, 8)})
    with scope.execute(plan):
        full = cases.written(scope, **RUNS["one text"])
    with scope.execute(plan, cache="free") as ran:
        free = cases.written(scope, ran.new_cache(), **RUNS["one text"])
    assert torch.equal(free[0], full[0])
    assert torch.allclose(free[1], full[1], atol=1e-5, rtol=0)  # the model's own eager softmax is float32
    sliding = [store for store in ran.cache.stores if store.window is not None]
    assert all(isinstance(part, Ring) and part.size <= (window or 400) for store in sliding for part in store.parts)
    assert len(sliding) == 1


# ---- memory -----------------------------------------------------------------------------------------------------


def tensors(length: int, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, heads, length, 16), torch.randn(1, heads, length, 16)


@pytest.mark.parametrize(
    "heads",
    [
        (Dense(), Dense(), Streaming(64, 256), Streaming(64, 256)),
        (Streaming(64, 256), Streaming(64, 512), Streaming(64, 256), Streaming(16, 100)),
        (Streaming(64, 256, True),) * 4,
        (Span(64, 0.1, 32), Span(64, 0.1, 32), Streaming(64, 256), Streaming(64, 256)),
        (Span(0.0, 0.2, 4, 400, True),) * 4,
        (Streaming(4, 400, True), Streaming(16, 300), Span(0.0, 0.1, 4, 100, True), Streaming(4, 400, True)),
        (Strided(256, 8, 3),) * 4,
        (Strided(256, 8, 3, sink=64), Streaming(16, 200), Strided(100, 4, 1, 64), Strided(100, 4, 1, 64)),
        (Lines(tuple(range(0, 8000, 50)), tuple(range(0, 200, 3))),) * 4,
    ],
)
def test_bytes_are_the_plans_share(heads: tuple[Any, ...]) -> None:
    """Measured on the storages, room to grow included, after a prompt and 200 steps: at most the plan's own count and 5 %."""
    store = LayerStore(heads, 2, None)
    store.append(*tensors(8000), None)
    for _ in range(200):
        store.append(*tensors(1), None)
    planned = sum(max(one.cached(8200) for one in heads[g * 2 : g * 2 + 2]) for g in range(2))
    dense = 2 * 2 * 8200 * 16 * 4
    assert store.bytes / dense <= planned / (2 * 8200) * 1.05 + 0.001
    assert store.length == 8200


@pytest.mark.parametrize("chunks", [(50, *(1,) * 40), (7, 30, 1, 1, 20, *(1,) * 31), (90,)])
def test_far_parts_hold_what_their_rules_name(chunks: tuple[int, ...]) -> None:
    """After any cutting of the text: the keys of each listed place, and per head exactly what its pattern sees, each key once."""
    patterns = (Strided(6, 3, 1, 8), Streaming(2, 12), Lines((0, 3, 20, 44, 80), (0, 1, 5, 9)), Lines((), (0, 40)))
    part = Far((0, 1), patterns=patterns)
    values = torch.arange(90.0)[None, None, :, None].expand(1, 2, -1, 4).contiguous()
    length = 0
    for count in chunks:
        part.append(values[:, :, length : length + count], values[:, :, length : length + count], length, None)
        length += count
        places, bits = part.listed()
        assert part.k is not None
        held = part.k[0, 1, places.long(), 0].tolist()
        row = length - 1
        for head, (pattern, window) in enumerate(zip(patterns, part.windows, strict=True)):
            listed = [int(key) for key, seen in zip(held, bits.tolist(), strict=True) if seen >> head & 1]
            seen_keys = sorted(listed + list(range(max(0, length - window), length)))
            expected = pattern.visible(torch.tensor([row]), torch.arange(length))[0].nonzero().flatten().tolist()
            assert seen_keys == expected
    where, at = part.before(length)
    assert part.k[0, 0, at, 0].tolist() == where.tolist()
    assert part.bytes < 2 * values.nbytes


def test_padded_texts_keep_all_of_what_far_heads_see() -> None:
    store = LayerStore((Strided(6, 3, 1, 8),) * 2 + (Streaming(2, 8),) * 2, 2, None)
    store.append(*tensors(50), torch.tensor([3]))
    assert {type(part).__name__ for part in store.parts} == {"Full", "Ring"}


def test_budgets_drop_after_the_prompt() -> None:
    scope = cases.tiny(torch.float32)
    plan = SparsePlan.uniform(scope, Budget(40, 16))
    with scope.execute(plan, cache="free") as ran:
        scope.generate(cases.ids(400), max_new_tokens=4)
    assert ran.cache is not None
    share = ran.cache.bytes / ran.cache.dense_bytes
    assert share <= plan.kv_share(403) + 8 / 403 + 0.01  # 8 places of room
    assert {type(part).__name__ for store in ran.cache.stores for part in store.parts} == {"Kept"}


@pytest.mark.parametrize("starts", [None, [0, 7]])
@pytest.mark.parametrize("chunks", [(30,), (5, 20, 5), (1,) * 30, (2, 27, 1)])
def test_a_ring_holds_the_first_and_the_newest(starts: list[int] | None, chunks: tuple[int, ...]) -> None:
    ring = Ring((0,), sink=3, windows=(Streaming(3, 8),))
    values = torch.arange(30.0)[None, None, :, None].repeat(2, 1, 1, 1)
    begin = None if starts is None else torch.tensor(starts)
    length = 0
    for count in chunks:
        ring.append(values[:, :, length : length + count], values[:, :, length : length + count], length, begin)
        length += count
    assert ring.k is not None
    for b, start in enumerate(starts or [0, 0]):
        away = torch.tensor([*range(3), *range(max(3, 30 - start - 8), 30 - start)])
        assert ring.k[b, 0, ring.places(away), 0].tolist() == (away + start).tolist()


def test_a_growing_span_unrolls_its_ring() -> None:
    ring = Ring((0,), sink=2, windows=(Span(4, 0.5, 2),))
    values = torch.arange(100.0)[None, None, :, None]
    for at in range(100):
        ring.append(values[:, :, at : at + 1], values[:, :, at : at + 1], at, None)
        away = torch.arange(min(at, max(2, at + 1 - ring.window(at + 1))), at + 1)
        assert ring.k is not None
        assert ring.k[0, 0, ring.places(away), 0].tolist() == away.tolist()
    assert ring.size < 66


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_outside_of_its_block_it_is_refused(scope: Scope) -> None:
    with scope.execute(SparsePlan.uniform(scope, Streaming(2, 8)), cache="free") as ran:
        cache = ran.new_cache()
    with pytest.raises(PlanError, match="outside of its"):
        cases.written(scope, cache, **PLAIN)
    with scope.execute(SparsePlan.uniform(scope, Streaming(2, 8))) as ran, pytest.raises(PlanError, match='cache="free"'):
        ran.new_cache()


def test_observers_and_interventions_are_refused_beside_it(scope: Scope) -> None:
    from headscope.interventions import HeadMask

    plan = SparsePlan.uniform(scope, Streaming(2, 8))
    before = scope.model(cases.ids(40)).logits
    with pytest.raises(PlanError, match="an observer beside"), scope.execute(plan, cache="free"), scope.observe(["entropy"]):
        scope.generate(cases.ids(40), max_new_tokens=3)
    edit = HeadMask(heads=[(0, 0)])
    with pytest.raises(PlanError, match="an intervention beside"), scope.execute(plan, cache="free"), scope.intervene(edit):
        scope.generate(cases.ids(40), max_new_tokens=3)
    other = Scope(scope.model)  # a second scope of the same model knows nothing of the first one's plan
    with pytest.raises(CaptureError, match="frees keys"), scope.execute(plan, cache="free"), other.observe(["entropy"]):
        scope.generate(cases.ids(40), max_new_tokens=3)
    assert torch.equal(scope.model(cases.ids(40)).logits, before)


def test_masks_that_are_not_left_padding_are_refused(scope: Scope) -> None:
    given = cases.padded()
    given["attention_mask"] = given["attention_mask"].flip(1)
    with scope.execute(SparsePlan.uniform(scope, Streaming(2, 8)), cache="free") as ran, pytest.raises(PlanError, match="pad on the left"):
        cases.written(scope, ran.new_cache(), **given)


def test_what_was_dropped_cannot_come_back(scope: Scope) -> None:
    with scope.execute(SparsePlan.uniform(scope, Budget(5, 4)), cache="free") as ran, torch.no_grad():
        cache = ran.new_cache()
        cases.written(scope, cache, **PLAIN)
        with pytest.raises(PlanError, match="dropped keys for good"):
            cache.crop(-2)
        with pytest.raises(PlanError, match="tokens at once after decoding"):
            scope.model(cases.ids(5), past_key_values=cache)
    with scope.execute(SparsePlan.uniform(scope, Span(2, 0.5, 0)), cache="free") as ran, torch.no_grad():
        cache = ran.new_cache()
        scope.model(cases.ids(100), past_key_values=cache)
        with pytest.raises(PlanError, match="windows that grow with the text"):
            scope.model(cases.ids(200), past_key_values=cache)


def test_unknown_caches_and_models_without_one(scope: Scope) -> None:
    plan = SparsePlan.uniform(scope, Streaming(2, 8))
    with pytest.raises(PlanError, match="did you mean free"), scope.execute(plan, cache="freed"):
        pass


def test_a_reset_cache_can_be_used_again(scope: Scope) -> None:
    with scope.execute(SparsePlan.uniform(scope, Streaming(2, 8)), cache="free") as ran:
        cache = ran.new_cache()
        first = cases.written(scope, cache, **PLAIN)[0]
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(cases.written(scope, cache, **PLAIN)[0], first)
