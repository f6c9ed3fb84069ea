"""SparseD over denoising steps: outputs equal masked dense attention, tiles are chosen once per run, causal plans are refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import PlanError
from headscope.plans import Dense, HeldBlocks, SparsePlan, Streaming
from headscope.plans.execute_steps import StepExecutor
from headscope.statistics.steps import Step

RULE = HeldBlocks(0.3, steps=5, dense=2, block=8)


def call_of(time: float | None, seed: int, length: int = 60, batch: int = 2, **facts: Any) -> AttentionCall:
    """Four query heads on two key heads, of one denoising step."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, length, 16, generator=generator) * 2
    k, v = (torch.randn(batch, 2, length, 16, generator=generator) for _ in range(2))
    step = Step(0, None if time is None else (time,) * batch)
    mask = MaskFacts(causal=False, key_valid=facts.pop("key_valid", None))
    return AttentionCall("m", 0, q, k, v, 0.25, mask, facts={"step": step, **facts})


def dense(call: AttentionCall) -> torch.Tensor:
    """A [B, 4, N, N] float64."""
    scores = call.q.double() @ call.k.double().repeat_interleave(2, 1).transpose(-1, -2) * call.scale
    if call.mask.key_valid is not None:
        scores = scores.masked_fill(~call.mask.key_valid[:, None, None], -torch.inf)
    return torch.softmax(scores, -1)


def tiles_of(call: AttentionCall, size: int, counts: list[tuple[list[int], int]]) -> torch.Tensor:
    """[B, 4, N, N] bool: per row tile the `count` of `members` with the largest mean of A, entry by entry."""
    weights, length = dense(call), call.q.shape[2]
    out = torch.zeros_like(weights, dtype=torch.bool)
    for b in range(len(weights)):
        for head in range(4):
            for top in range(0, length, size):
                rows = weights[b, head, top : top + size]
                for members, count in counts:
                    mean = {n: float(rows[:, n * size : (n + 1) * size].mean()) for n in members}
                    for n in sorted(mean, key=lambda n: -mean[n])[:count]:
                        out[b, head, top : top + size, n * size : (n + 1) * size] = True
    return out


def masked(call: AttentionCall, seen: torch.Tensor) -> torch.Tensor:
    """Dense attention in float64 with only `seen` entries: [B, N, 4, D]."""
    assert call.v is not None
    weights = dense(call) * seen
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights @ call.v.double().repeat_interleave(2, 1)).transpose(1, 2)


def test_sparse_steps_equal_dense_attention_under_the_kept_tiles() -> None:
    executor, report = StepExecutor(), Counter[str]()
    calls = [call_of(1.0 - step / 5, step) for step in range(5)]
    outputs = [executor.execute(call, [RULE] * 4, report) for call in calls]
    assert outputs[0] is None
    assert outputs[1] is None
    seen = tiles_of(calls[1], 8, [(list(range(8)), 3)])
    for call, output in zip(calls[2:], outputs[2:], strict=True):
        assert output is not None
        assert torch.allclose(output.double(), masked(call, seen), atol=2e-5)
        assert not torch.allclose(output.double(), masked(call, torch.ones_like(seen)), atol=1e-2)
    assert executor.density == pytest.approx((2 + 3 * float(seen.double().mean())) / 5)
    assert report == {"host": 2, "sparse": 12, "dense": 0}


def test_mixed_heads_padding_and_half_tiles() -> None:
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 50:] = False
    executor, report = StepExecutor(), Counter[str]()
    patterns = [RULE, Dense(), HeldBlocks(0.5, 5, 2, 8), RULE]
    calls = [call_of(1.0 - step / 5, 10 + step, key_valid=valid) for step in range(3)]
    output = [executor.execute(call, list(patterns), report) for call in calls][-1]
    seen = tiles_of(calls[1], 8, [(list(range(8)), 3)])
    seen[:, 1] = True
    seen[:, 2] = tiles_of(calls[1], 8, [(list(range(8)), 5)])[:, 2]
    assert output is not None
    assert torch.allclose(output.double(), masked(calls[2], seen), atol=2e-5)


def test_prompt_and_generated_tiles_are_chosen_apart() -> None:
    executor = StepExecutor()
    streams = ((0, 0, 48), (1, 48, 60))
    calls = [call_of(1.0 - step / 5, 20 + step, streams=streams) for step in range(3)]
    output = [executor.execute(call, [RULE] * 4, Counter()) for call in calls][-1]
    seen = tiles_of(calls[1], 8, [(list(range(6)), 2), ([6, 7], 1)])
    assert output is not None
    assert torch.allclose(output.double(), masked(calls[2], seen), atol=2e-5)


def test_a_prompt_can_be_kept_whole() -> None:
    """The same total, of which the prompt's two tiles take two."""
    streams = ((0, 0, 48), (1, 48, 60))
    for share, picture in ((0.3, 1), (0.55, 3)):
        rule = HeldBlocks(share, steps=5, dense=2, block=8, prompt="all")
        executor = StepExecutor()
        calls = [call_of(1.0 - step / 5, 20 + step, streams=streams) for step in range(3)]
        output = [executor.execute(call, [rule] * 4, Counter()) for call in calls][-1]
        seen = tiles_of(calls[1], 8, [(list(range(6)), picture), ([6, 7], 2)])
        assert output is not None
        assert torch.allclose(output.double(), masked(calls[2], seen), atol=2e-5)
    with pytest.raises(PlanError, match="half"):
        HeldBlocks(0.3, 5, 2, 8, prompt="half")


def test_dense_steps_can_be_spread_and_choose_anew() -> None:
    """Six steps of which 0 and 3 are dense; steps 1, 2 keep the tiles of step 0, and 4, 5 those of step 3."""
    rule = HeldBlocks(0.3, steps=6, dense=2, block=8, spread=True)
    executor, chosen = StepExecutor(), None
    for step in range(6):
        call = call_of(1.0 - step / 6, 40 + step)
        output = executor.execute(call, [rule] * 4, Counter())
        if step in (0, 3):
            assert output is None
            chosen = tiles_of(call, 8, [(list(range(8)), 3)])
        else:
            assert output is not None
            assert chosen is not None
            assert torch.allclose(output.double(), masked(call, chosen), atol=2e-5)
    assert chosen is not None
    assert executor.density == pytest.approx(rule.density(60), abs=0.02)
    assert [HeldBlocks(0.3, 16, 3, spread=True).dense_at(step) for step in range(16)] == [step in (0, 5, 10) for step in range(16)]
    assert [RULE.dense_at(step) for step in range(5)] == [True, True, False, False, False]


def test_what_is_left_out_can_be_carried_on() -> None:
    """Entry by entry: (1 - d) times the sparse output, and what the weights outside the tiles brought when tiles were chosen."""
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 50:] = False
    rule = HeldBlocks(0.3, steps=5, dense=2, block=8, carry=True)
    executor = StepExecutor()
    calls = [call_of(1.0 - step / 5, 60 + step, key_valid=valid) for step in range(4)]
    outputs = [executor.execute(call, [rule] * 4, Counter()) for call in calls]
    seen = tiles_of(calls[1], 8, [(list(range(8)), 3)])
    outside = dense(calls[1]) * ~seen
    assert calls[1].v is not None
    rest = (outside @ calls[1].v.double().repeat_interleave(2, 1)).transpose(1, 2)
    share = outside.sum(-1, keepdim=True).transpose(1, 2)
    assert share.min() > 0
    for call, output in zip(calls[2:], outputs[2:], strict=True):
        assert output is not None
        assert torch.allclose(output.double(), (1 - share) * masked(call, seen) + rest, atol=2e-5)
    again = StepExecutor()
    same = [call_of(1.0 - step / 5, 60) for step in range(3)]  # a picture that does not change loses nothing at all
    last = [again.execute(call, [rule] * 4, Counter()) for call in same][-1]
    assert last is not None
    assert torch.allclose(last.double(), masked(same[0], torch.ones_like(seen)), atol=2e-5)


def test_a_new_run_chooses_anew_and_branches_keep_their_own() -> None:
    executor = StepExecutor()
    for run in range(2):
        for step in range(4):
            time = 1.0 - step / 5
            conditional, other = call_of(time, 100 * run + step), call_of(time, 100 * run + 50 + step)
            first, second = (executor.execute(call, [RULE] * 4, Counter()) for call in (conditional, other))
            if step == 1:
                seen = [tiles_of(call, 8, [(list(range(8)), 3)]) for call in (conditional, other)]
            if step >= 2:
                assert first is not None
                assert second is not None
                assert torch.allclose(first.double(), masked(conditional, seen[0]), atol=2e-5)
                assert torch.allclose(second.double(), masked(other, seen[1]), atol=2e-5)
            else:
                assert first is None
                assert second is None
    assert executor.execute(call_of(0.1, 0, length=40), [RULE] * 4, Counter()) is None, "another shape is another run"
    untimed = StepExecutor()
    found = [untimed.execute(call_of(None, step), [RULE] * 4, Counter()) is None for step in range(4)]
    assert found == [True, True, False, False]


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(PlanError, match="not causal"):
        StepExecutor().execute(call_of(1.0, 0), [Streaming(4, 8)] * 4, Counter())
    late = StepExecutor()
    for step in range(2):
        late.execute(call_of(1.0 - step / 5, step), [RULE] * 4, Counter())
    late.execute(call_of(0.5, 2), [RULE] * 4, Counter())
    with pytest.raises(PlanError, match="branch 1 did not run"):
        late.execute(call_of(0.5, 2), [RULE] * 4, Counter())


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_bundled_diffusion_runs_under_a_plan(name: str) -> None:
    """A plan that keeps every tile draws the same pictures; one that keeps some draws others, with the density it promised."""
    import headscope as hs
    from headscope.models.bundled.flow import embed, sample

    scope = hs.load(f"bundled:{name}")
    text = embed(["a handwritten digit three"] * 3, _weights(name)) if name == "sd3" else None

    def draw(plan: SparsePlan | None) -> tuple[torch.Tensor, float]:
        if plan is None:
            return sample(scope.model, 3, steps=5, seed=1, text=text), 1.0
        with scope.execute(plan) as run:
            pictures = sample(scope.model, 3, steps=5, seed=1, text=text)
        return pictures, run.steps.density

    plain, _ = draw(None)
    whole, density = draw(SparsePlan.uniform(scope, HeldBlocks(1.0, 5, 1, 8)))
    assert density == 1.0
    assert torch.allclose(whole, plain, atol=1e-3)
    rule = HeldBlocks(0.3, 5, 1, 8)
    some, density = draw(SparsePlan.uniform(scope, rule))
    assert not torch.allclose(some, plain, atol=1e-2)
    if name == "dit":
        assert density == pytest.approx(rule.density(64))
    else:  # 3 of the 8 tiles of pixels and the one of words, of 4 tokens
        assert density == pytest.approx((1 + 4 * (3 * 8 + 4) / 68) / 5)
    assert torch.equal(draw(None)[0], plain)


def _weights(name: str) -> Any:
    from importlib.resources import files
    from pathlib import Path

    return Path(str(files("headscope.models.bundled"))) / "weights" / name
