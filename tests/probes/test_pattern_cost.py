"""What patterns cost heads: against dense attention under the same mask, and against finite differences of the loss."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.call import AttentionCall
from headscope.errors import ProbeError
from headscope.interventions.base import Intervention
from headscope.kernels.sparse_naive import naive_sparse_attention
from headscope.plans import Budget, Pattern, Span, Streaming, TopBlocks, VerticalSlash
from headscope.plans.indices import choose
from headscope.plans.planners import plan
from headscope.probes.calls import each_call
from headscope.probes.passkeys import PasskeyText
from headscope.probes.pattern_cost import PatternCost, judge, need, objective, traced
from headscope.scope import Scope

LENGTH = 96
PATTERNS: tuple[Pattern, ...] = (
    Streaming(2, 10),
    Streaming(2, 10, True),
    Span(0.0, 0.25, 2),
    VerticalSlash(8, 6, 16, 2, 4),
    TopBlocks(share=0.5, block=16),
)


@pytest.fixture(scope="module")
def scope() -> Scope:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return Scope(LlamaForCausalLM(config).double().eval(), name="tiny")


IDS = torch.randint(1, 97, (LENGTH,), generator=torch.Generator().manual_seed(0))
ANSWER = torch.arange(LENGTH) >= 80


def calls_of(scope: Scope) -> dict[str, AttentionCall]:
    found: dict[str, AttentionCall] = {}
    each_call(scope, IDS, lambda call, output: found.__setitem__(call.module, call))
    return found


def test_numbers_are_those_of_the_dense_twin(scope: Scope) -> None:
    calls, gradients = traced(scope, IDS, ANSWER, margins=False)
    for module in scope.topology.main:
        call, gradient = calls[module.name], gradients[module.name]
        rows = torch.arange(0, LENGTH, 3)
        found = judge(scope, call, gradient, rows, PATTERNS, 80)
        full, lse = naive_sparse_attention(call, [Streaming(0, LENGTH)] * 4)
        o = scope.model.get_submodule(module.output).weight.detach().T.view(4, -1, 32)
        for place, pattern in enumerate(PATTERNS):
            chosen = [choose(call, head, pattern) for head in range(4)]
            sparse, _ = naive_sparse_attention(call, chosen)
            plain = [replace(one, compensate=False) if isinstance(one, Streaming) else one for one in chosen]
            _, kept = naive_sparse_attention(call, plain)
            delta = (full - sparse)[0, rows]
            written = torch.einsum("rhd,hde->rhe", delta, o)
            torch.testing.assert_close(found[:, place, 2], written.square().sum((0, 2)))
            torch.testing.assert_close(found[:, place, 3], torch.einsum("rhd,hde->rhe", full[0, rows], o).square().sum((0, 2)))
            torch.testing.assert_close(found[:, place, 4], (kept - lse).exp()[0, :, rows].mean(-1))
            shares = torch.tensor([one.density(LENGTH) for one in chosen], dtype=torch.float64)
            torch.testing.assert_close(found[:, place, 5], shares, atol=0.03, rtol=0)
            change = (gradient[0, rows] * delta).sum(-1)
            torch.testing.assert_close(found[:, place, 0], -change.sum(0))
            torch.testing.assert_close(found[:, place, 1], change.square().sum(0))


@dataclass(frozen=True)
class _Nudge(Intervention):
    """Moves one head's output a part of the way to its output under a pattern."""

    module: str
    head: int
    pattern: Pattern
    part: float

    def after(self, call: AttentionCall, output: torch.Tensor) -> torch.Tensor:
        if call.module != self.module:
            return output
        target, _ = naive_sparse_attention(call, [choose(call, head, self.pattern) for head in range(call.q.shape[1])])
        moved = output.clone()
        moved[:, :, self.head] += self.part * (target[:, :, self.head] - output[:, :, self.head])
        return moved


@pytest.mark.parametrize("margins", [True, False])
def test_loss_is_the_first_order_change(scope: Scope, margins: bool) -> None:
    calls, gradients = traced(scope, IDS, ANSWER, margins=margins)

    @torch.no_grad()
    def value(*edits: Intervention) -> float:
        def run() -> float:
            logits = scope.model(input_ids=IDS[None], use_cache=False).logits[0, :-1]
            return float(objective(logits, IDS[1:], ANSWER[1:], margins=margins))

        if not edits:
            return run()
        with scope.intervene(*edits):
            return run()

    for module in scope.topology.main:
        found = judge(scope, calls[module.name], gradients[module.name], torch.arange(LENGTH), PATTERNS[:2], 80)
        for head, place in ((0, 0), (3, 1)):
            step = 3e-3  # the model's norms are in float32
            up, down = (value(_Nudge(module.name, head, PATTERNS[place], sign * step)) for sign in (1, -1))
            assert float(found[head, place, 0]) == pytest.approx((up - down) / (2 * step), rel=5e-3, abs=1e-3)


def test_objective_counts_the_answers_that_are_right() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    wanted, answer = torch.tensor([0, 1, 2]), torch.tensor([True, True, True])
    odds = torch.tensor([2.0 - torch.log(torch.tensor(2.0)), 3.0 - torch.log(torch.tensor(2.0))], dtype=torch.float64)
    assert float(objective(logits, wanted, answer, margins=True)) == pytest.approx(-float(odds.sum()))
    none = objective(logits, torch.tensor([1, 0, 2]), answer, margins=True)
    assert float(none) > 0  # none is right, so all count
    expected = torch.nn.functional.cross_entropy(logits[:1], wanted[:1], reduction="sum")
    assert float(objective(logits, wanted, torch.tensor([True, False, False]), margins=False)) == pytest.approx(float(expected))


def test_budgets_change_the_rows_after_the_choice_alone(scope: Scope) -> None:
    module = scope.topology.main[1]
    calls, gradients = traced(scope, IDS, ANSWER, margins=False)
    call, gradient = calls[module.name], gradients[module.name]
    before = judge(scope, call, gradient, torch.arange(80), [Budget(4, 8, 1)], 80)
    assert before[:, 0, :3].abs().max() < 1e-20
    torch.testing.assert_close(before[:, 0, 4], torch.ones(4, dtype=torch.float64))
    after = judge(scope, call, gradient, torch.arange(80, LENGTH), [Budget(4, 8, 1), Budget(72, 8, 1)], 80)
    assert (after[:, 0, 2] > 0).all()
    assert after[:, 1, 2].max() < 1e-20  # 72 + 8 of the 80 keys: nothing was dropped
    part = replace(call, q=call.q[:, :, :80], k=call.k[:, :, :80], v=None)
    chosen = choose(part, 0, Budget(4, 8, 1))
    assert chosen.since == 72
    assert chosen == choose(part, 1, Budget(4, 8, 1))  # the heads of a key head choose together
    own = choose(part, 0, Budget(4, 8, 1, grouped=False))
    weights = torch.softmax(part.q[0, :2, 72:] @ part.k[0, 0].T * part.scale + _causal(72, 80), -1)
    assert set(own.columns) == set(weights[0].sum(0)[:72].topk(4).indices.tolist())
    assert set(chosen.columns) == set(weights.mean(0).sum(0)[:72].topk(4).indices.tolist())
    assert choose(part, 0, Budget(4, 8, 1, sink=4, recent=40)).columns == (0, 1, 2, 3)
    assert choose(part, 0, Budget(4, 8, 1, sink=4, recent=40)).since == 40


def _causal(start: int, stop: int) -> torch.Tensor:
    at = torch.arange(start, stop)[:, None]
    return torch.where(torch.arange(stop) <= at, 0.0, -torch.inf).double()


def test_the_leanest_sufficient_candidate() -> None:
    words = [json.dumps(one.to_dict()) for one in (Streaming(2, 10), Streaming(2, 40))]
    losses = ((0.01, 0.0), (0.2, 0.01), (0.2, 0.2), (0.04, 0.0))
    rows = [
        (0, head, word, "recall", 0, 100, 0.0, 0.0, error, 1.0, 0.9, kept)
        for head, errors in enumerate(losses)
        for word, error, kept in zip(words, errors, (0.2, 0.6), strict=True)
    ]
    table = pd.DataFrame(
        rows, columns=["layer", "head", "pattern", "kind", "text", "tokens", "loss", "squares", "error", "whole", "mass", "kept"]
    )

    class _Module:
        layer, heads = 0, 4

    class _Scope:
        class topology:
            main = (_Module(),)

    torch.testing.assert_close(need(_Scope(), table), torch.tensor([[0.2, 0.6, 1.0, 0.2]], dtype=torch.float64))


def test_a_profile_carries_the_table(scope: Scope) -> None:
    found = scope.profile([PatternCost(texts=1, kinds=("recall",))], context=128, maps=False)
    table = found.tables["pattern_cost.candidates"]
    patterns = PatternCost().candidates(int(table["tokens"].max()))
    assert len(table) == 8 * len(patterns)
    assert not found.table["pattern_need"].isna().any()
    assert ((table["mass"] > 0) & (table["mass"] <= 1 + 1e-9)).all()
    made = plan(found, "allocate", density=0.5, length=128)
    assert made.density(128) <= 0.5
    kept = plan(found, "allocate", cache=0.5, length=128)
    assert kept.kv_share(128) <= 0.5


def test_every_text_is_judged_under_the_same_candidates(scope: Scope) -> None:
    """Of texts of two lengths: a pattern that only one of them was judged under would lose half as much as the others."""
    texts = [PasskeyText(IDS[:count], torch.arange(count) >= count - 10, "repeats") for count in (64, 96)]
    found = PatternCost(kinds=("recall",), rows=8).run(scope, texts)
    table = found.tables["candidates"]
    counts = table.groupby(["layer", "head", "pattern"])["text"].nunique()
    assert (counts == 2).all()
    assert len(counts) == 8 * len(PatternCost().candidates(96))
    assert sorted(table["tokens"].unique()) == [64, 96]
    sums = table.groupby("text")["whole"].max()
    assert (sums > 0).all()


def test_parameters_that_describe_nothing_are_refused(scope: Scope) -> None:
    for probe, words in (
        (PatternCost(kinds=("poems",)), "unknown kind"),
        (PatternCost(texts=0), "texts, rows"),
        (PatternCost(kinds=("prose",), task="repeats"), "prose"),
    ):
        with pytest.raises(ProbeError, match=words):
            probe.run(scope, context=128)
