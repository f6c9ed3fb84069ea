"""Plans in a live model: logits equal eager attention under the same mask; prefill, chunks, padding and decoding agree; rules choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import PlanError
from headscope.plans import Blocks, Budget, Dense, Lines, Pattern, SparsePlan, Streaming, Strided, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.indices import choose, last_weights
from headscope.scope import Scope

HEADS = (Dense(), Streaming(2, 8), Strided(4, 3, 1, 8), Lines((0, 3), (0, 1, 5)))


@pytest.fixture(scope="module")
def scope() -> Scope:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval().double()
    model.set_attn_implementation("sdpa")
    return Scope(model, name="tiny")


def plan_of(scope: Scope, heads: tuple[Pattern, ...] = HEADS) -> SparsePlan:
    return SparsePlan(SparsePlan.uniform(scope, Dense()).model, {(layer, head): heads[head] for layer in range(3) for head in range(4)})


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (1, count), generator=torch.Generator().manual_seed(seed))


def eager(scope: Scope, tokens: torch.Tensor, heads: tuple[Pattern, ...] = HEADS) -> torch.Tensor:
    """The model's logits under an explicit per-head mask."""
    at = torch.arange(tokens.shape[1])
    seen = torch.stack([pattern.visible(at, at) & (at[None] <= at[:, None]) for pattern in heads])[None]
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    scope.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found: torch.Tensor = scope.model(tokens, attention_mask=mask).logits
    finally:
        scope.model.set_attn_implementation("sdpa")
    return found


def run(scope: Scope, plan: SparsePlan, tokens: torch.Tensor, **more: object) -> torch.Tensor:
    with scope.execute(plan), torch.no_grad():
        found: torch.Tensor = scope.model(tokens, **more).logits
    return found


def test_prefill_equals_eager_attention_under_the_same_mask(scope: Scope) -> None:
    tokens = ids(200)
    assert torch.allclose(run(scope, plan_of(scope), tokens), eager(scope, tokens), atol=1e-4)  # eager's softmax is float32
    assert not torch.allclose(run(scope, plan_of(scope), tokens), scope.model(tokens).logits, atol=1e-3)


def test_chunks_and_decoding_equal_one_prefill(scope: Scope) -> None:
    from transformers import DynamicCache

    tokens, plan = ids(150, 1), plan_of(scope)
    whole = run(scope, plan, tokens)
    cache = DynamicCache(config=scope.model.config)
    with scope.execute(plan), torch.no_grad():
        parts = [
            scope.model(tokens[:, a:b], past_key_values=cache, use_cache=True).logits
            for a, b in ((0, 70), (70, 147), (147, 148), (148, 150))
        ]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_padded_batches(scope: Scope) -> None:
    long, short = ids(90, 2), ids(60, 3)
    plan = plan_of(scope)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 30, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :30] = 0
    both = run(scope, plan, batch, attention_mask=mask)
    assert torch.allclose(both[0], run(scope, plan, long)[0], atol=1e-9)
    assert torch.allclose(both[1, 30:], run(scope, plan, short)[0], atol=1e-4)  # float32 rotary at other positions


def test_generate_and_afterwards_the_model_is_as_before(scope: Scope) -> None:
    tokens, plan = ids(80, 4), plan_of(scope)
    before = scope.model(tokens).logits
    with scope.execute(plan) as ran:
        new = scope.generate(tokens, max_new_tokens=6).new_ids[0].tolist()
    expected, grown = [], tokens
    for _ in range(6):
        expected.append(int(eager(scope, grown)[0, -1].argmax()))
        grown = torch.cat([grown, torch.tensor([[expected[-1]]])], 1)
    assert new == expected
    assert ran.report["sparse"] == 3 * 3 * 6
    assert torch.equal(scope.model(tokens).logits, before)
    with pytest.raises(ZeroDivisionError), scope.execute(plan):
        raise ZeroDivisionError
    assert torch.equal(scope.model(tokens).logits, before)


@pytest.mark.parametrize("given", [None, "plan.json"])
def test_what_is_no_plan_is_refused(scope: Scope, given: Any) -> None:
    with pytest.raises(PlanError, match="it is no SparsePlan"), scope.execute(given):
        pass


def test_a_plan_that_drops_nothing_is_left_to_the_host(scope: Scope) -> None:
    tokens = ids(40)
    with scope.execute(SparsePlan.uniform(scope, Streaming(4, 40))) as ran:
        same = scope.model(tokens).logits
    assert torch.equal(same, scope.model(tokens).logits)
    assert dict(ran.report) == {"host": 3}


def test_dynamic_plans_that_keep_everything_are_dense(scope: Scope) -> None:
    tokens = ids(100, 6)
    dense = scope.generate(tokens, max_new_tokens=5).new_ids
    everything = (VerticalSlash(1, 200), TopBlocks(share=1.0, block=16), Budget(200, 8), TopKeys(200))
    with scope.execute(plan_of(scope, everything)) as ran:
        found = scope.generate(tokens, max_new_tokens=5).new_ids
    assert torch.equal(found, dense)
    assert ran.report["sparse"] > 0


def test_reused_keys_are_those_of_the_source(scope: Scope) -> None:
    patterns: dict[tuple[int, int], Pattern] = {(layer, head): TopKeys(6, window=4, sink=1) for layer in range(3) for head in range(4)}
    own = SparsePlan(plan_of(scope).model, patterns)
    reuse = own.replace({(layer, head): TopKeys(6, window=4, sink=1, source=(0, head)) for layer in (1, 2) for head in range(4)})
    with scope.execute(own) as first:
        scope.generate(ids(60, 7), max_new_tokens=3)
    with scope.execute(reuse) as second:
        scope.generate(ids(60, 7), max_new_tokens=3)
    assert first._state[2].chosen.keys() == {(0, head) for head in range(4)}
    assert second._state[2].chosen == {}
    with pytest.raises(PlanError, match="chooses no keys of its own"):
        own.replace({(0, 1): Dense(), (1, 1): TopKeys(6, source=(0, 1))})


# ---- rules ------------------------------------------------------------------------------------------------------


def call_of(length: int, rows: int | None = None, seed: int = 0) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, length, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    rows = length if rows is None else rows
    return AttentionCall("m", 0, q[:, :, length - rows :] * 2, k, v, 0.25, MaskFacts(causal=True), query_offset=length - rows)


def weights(call: AttentionCall) -> torch.Tensor:
    scores = (call.q[0, 0] @ call.k[0, 0].T) * call.scale
    at = torch.arange(call.q.shape[2])[:, None] + call.query_offset
    return torch.softmax(scores.masked_fill(torch.arange(call.k.shape[2])[None] > at, -torch.inf), -1)


def test_vertical_slash_takes_the_largest_sums_of_the_last_rows() -> None:
    call = call_of(300)
    found = choose(call, 0, VerticalSlash(20, 30, last_q=32, sink=4, window=6))
    assert isinstance(found, Lines)
    last = weights(call)[-32:]
    columns = last.sum(0)
    assert set(range(4)) <= set(found.columns)
    assert len(found.columns) == 20
    others = [one for one in found.columns if one >= 4]
    assert set(others) == set((columns[4:].topk(16).indices + 4).tolist())
    diagonals = torch.stack([torch.diagonal(weights(call).flip(0)[:32], 0).new_zeros(1)] * 300).flatten()
    for place in range(32):
        row = 300 - 32 + place
        for key in range(row + 1):
            diagonals[row - key] += last[place, key]
    assert set(found.diagonals) == set(range(6)) | set((diagonals[6:].topk(24).indices + 6).tolist())


@pytest.mark.parametrize("rule", ["pooled", "antidiagonal", "exact", "anchor"])
def test_top_blocks_finds_planted_blocks(rule: str) -> None:
    """Keys of tile 2 answer the queries of tiles 5 and 7; every rule must see that, and keep first and diagonal tiles."""
    call = call_of(160, seed=3)
    code = torch.zeros(16, dtype=torch.float64)
    code[0] = 9.0
    call.k[0, 0, 32:48] = code
    for tile in (5, 7):
        call.q[0, 0, tile * 16 : tile * 16 + 16] = code
    mass = {"anchor": 1.0}.get(rule, 0.9)
    found = choose(call, 0, TopBlocks(mass=mass, rule=rule, block=16, stride=4))
    assert isinstance(found, Blocks)
    for tile in range(10):
        assert {0, tile} <= set(found.row(tile))
    for tile in (5, 7):
        assert {0, 2, tile} <= set(found.row(tile))
        assert len(found.row(tile)) <= 5 < tile + 1
    half = choose(call, 0, TopBlocks(share=0.5, rule="exact", block=16))
    assert isinstance(half, Blocks)
    exact = weights(call)[112:128].sum(0).reshape(10, 16).sum(1)
    assert set(exact.topk(4).indices.tolist()) | {0, 7} == set(half.row(7))


def test_exact_blocks_of_a_mass_are_the_fewest() -> None:
    call = call_of(160, seed=4)
    found = choose(call, 0, TopBlocks(mass=0.7, rule="exact", block=16))
    assert isinstance(found, Blocks)
    for tile in range(10):
        mass = weights(call)[tile * 16 : tile * 16 + 16].sum(0).reshape(10, 16).sum(1)[: tile + 1] / 16
        best = mass.sort(descending=True)
        count = int((best.values.cumsum(0) < 0.7).sum()) + 1
        assert set(found.row(tile)) == set(best.indices[:count].tolist()) | {0, tile}


def test_budget_takes_what_the_window_weighs_most() -> None:
    call = call_of(120, seed=5)
    found = choose(call, 0, Budget(10, window=16, pool=1))
    scores = weights(call)[-16:, :104].sum(0)
    assert set(found.columns) == set(scores.topk(10).indices.tolist())
    assert found.since == 104
    assert found.cached(130) == 10 + 26


def test_top_keys_of_a_decode_row() -> None:
    call = call_of(120, rows=1, seed=6)
    found = choose(call, 0, TopKeys(12, sink=2, window=8))
    row = weights(call)[0]
    assert set(found.columns) == {0, 1} | set((row[2:112].topk(10).indices + 2).tolist())
    assert found.since == 112
    assert torch.allclose(last_weights(call, 0, 1)[0][0], row)


def test_chunks_that_cut_tiles_are_refused() -> None:
    with pytest.raises(PlanError, match="multiple of 16"):
        choose(call_of(100, rows=30), 0, TopBlocks(share=0.5, block=16))
