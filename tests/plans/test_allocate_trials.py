"""Trials and second thoughts of planner "allocate": against plans that really run, finite differences and brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.call import AttentionCall
from headscope.errors import PlanError
from headscope.interventions.base import Intervention
from headscope.plans import Budget, Dense, Pattern, Span, SparsePlan, Streaming, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_anchor import Stripes
from headscope.plans.dynamic_flexprefill import FlexBlocks
from headscope.plans.indices import choose
from headscope.plans.plan import PlanModel
from headscope.plans.planners import plan
from headscope.plans.planners.allocate_others import others
from headscope.plans.planners.allocate_refine import Refiner, rule
from headscope.plans.planners.allocate_solve import solved
from headscope.plans.planners.base import Evidence
from headscope.plans.planners.planned import Planned
from headscope.plans.planners.trial import FLOOR, Trials, best, logits_of, score
from headscope.probes.calls import each_call
from headscope.probes.pattern_cost import PatternCost
from headscope.probes.pattern_masks import Masks
from headscope.scope import Scope

LENGTH, START = 90, 70
IDS = torch.randint(1, 97, (LENGTH,), generator=torch.Generator().manual_seed(0))


def build(device: str = "cpu") -> Scope:
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
    return Scope(LlamaForCausalLM(config).double().to(device).eval(), name="tiny")


@pytest.fixture(scope="module")
def scope() -> Scope:
    return build()


@pytest.mark.parametrize(
    "pattern",
    [
        Span(0.0, 0.25, 2),
        VerticalSlash(8, 6, 16, 2, 4),
        TopBlocks(share=0.3, block=20),
        TopBlocks(mass=0.6, rule="antidiagonal", block=16, stride=4),
        TopBlocks(mass=0.8, rule="antidiagonal", block=20, stride=5),
        Stripes(0.1, 8, 2),
        Stripes(1.0, 20, 2),
        FlexBlocks(0.8, 0.1, 16, 1),
    ],
)
def test_masks_of_all_heads_are_those_of_each(scope: Scope, pattern: Pattern) -> None:
    rows = torch.arange(LENGTH)
    causal = rows <= rows[:, None]

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        masks = Masks(call)
        found = masks.of(pattern, rows).expand(4, -1, -1)
        for head in range(4):
            expected = choose(call, head, pattern.fixed(LENGTH)).visible(rows, rows)
            assert torch.equal(found[head] & causal, expected & causal)
            share = float((expected & causal).sum() / causal.sum())
            assert float(masks.shares(pattern, rows)[head]) == pytest.approx(share)
        assert 0.1 < float((found & causal).sum() / causal.sum() / 4) < 0.99

    each_call(scope, IDS, see)


MIXED: tuple[tuple[Pattern, ...], ...] = (
    (Streaming(2, 9), Streaming(0, 30), Budget(11, 8, 3), Budget(11, 8, 3)),
    (VerticalSlash(8, 6, 16, 2, 4), Dense(), TopBlocks(share=0.4, block=16), Streaming(4, 4)),
    (TopKeys(6, 2, window=5), TopKeys(9, full=True), Stripes(0.5, 8, 2), Budget(5, 8, 1, sink=2, recent=12)),
)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_one_pass_is_what_prefill_and_decoding_give(scope: Scope, first: int) -> None:
    patterns = {(layer, head): MIXED[(first + layer) % 3][head] for layer in (0, 1) for head in range(4)}
    if first == 2:  # a head of the second layer takes keys over
        patterns[1, 0] = TopKeys(9, source=(0, 1))
    made = SparsePlan(PlanModel.of(scope), patterns)
    with scope.executing(Planned(patterns, START)), torch.no_grad():
        found = logits_of(scope, IDS)
    rows = []
    with scope.execute(made, fallback=False), torch.no_grad():
        out = scope.model(input_ids=IDS[None, :START], use_cache=True)
        rows.append(out.logits[0])
        for word in IDS[START:]:
            out = scope.model(input_ids=word.reshape(1, 1), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    torch.testing.assert_close(found, torch.cat(rows), atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        dense = logits_of(scope, IDS)
    assert (found - dense).abs().max() > 0.05


def test_a_batch_is_refused(scope: Scope) -> None:
    patterns = dict.fromkeys(PlanModel.of(scope).places, Streaming(2, 9))
    with scope.executing(Planned(patterns)), pytest.raises(PlanError, match="single texts"):
        scope.model(input_ids=IDS.expand(2, -1))


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
        patterns = {(int(call.layer or 0), head): self.pattern for head in range(4)}
        with torch.no_grad():
            target = Planned(patterns, START).execute(call)
        assert target is not None
        moved = output.clone()
        moved[:, :, self.head] += self.part * (target[:, :, self.head] - output[:, :, self.head])
        return moved


def test_slopes_are_the_change_of_the_loss_under_the_plan(scope: Scope) -> None:
    now: dict[tuple[int, int], Pattern] = {(layer, head): MIXED[layer][head] for layer in (0, 1) for head in range(4)}
    trials = Trials.of(scope, 128, 1, kinds=("recall",))
    text = replace(trials.texts[0], ids=IDS, rows=torch.arange(START - 1, LENGTH - 1), start=START)
    with torch.no_grad():
        text = replace(text, dense=torch.log_softmax(logits_of(scope, IDS)[text.rows].float(), -1))
    trials = replace(trials, texts=(text,))
    others_ = (Streaming(4, 24), Dense())
    listed = {place: [now[place], *others_] for place in now}
    slopes, bends = Refiner(trials, trials, listed, lambda *_: now).measure(now, listed)

    @torch.no_grad()
    def value(*edits: Intervention) -> float:
        with scope.executing(Planned(now, START)):
            if not edits:
                return float(text.cost(logits_of(scope, IDS)))
            with scope.intervene(*edits):
                return float(text.cost(logits_of(scope, IDS)))

    weight = 1 / (FLOOR + value())
    modules = {int(module.layer or 0): module.name for module in scope.topology.main}
    for layer, head, place in ((0, 0, 1), (0, 2, 2), (1, 1, 1), (1, 3, 2)):
        step = 3e-3
        up, down = (value(_Nudge(modules[layer], head, others_[place - 1], sign * step)) for sign in (1, -1))
        assert slopes[layer, head][place] == pytest.approx(weight * (up - down) / (2 * step), rel=2e-2, abs=2e-3 * weight)
    for place in now:
        assert slopes[place][0] == bends[place][0] == 0.0
        assert (bends[place] >= 0).all()
    assert max(float(one.max()) for one in bends.values()) > 0


@pytest.mark.gpu
def test_a_device_gives_the_same_terms(scope: Scope) -> None:
    now: dict[tuple[int, int], Pattern] = {(layer, head): MIXED[layer][head] for layer in (0, 1) for head in range(4)}
    extra = (
        Streaming(4, 24),
        TopBlocks(mass=0.6, rule="antidiagonal", block=16, stride=4),
        Stripes(0.5, 8, 2),
        FlexBlocks(0.8, 0.1, 16, 1),
    )
    listed = {place: [now[place], *extra] for place in now}
    found = []
    for one in (scope, build("cuda")):
        trials = Trials.of(one, 128, 1, kinds=("recall", "written"))
        found.append(Refiner(trials, trials, listed, lambda *_: now).measure(now, listed))
    for mine, its in zip(*found, strict=True):
        for place in now:
            np.testing.assert_allclose(its[place], mine[place], rtol=2e-3, atol=2e-3 * np.abs(mine[place]).max() + 1e-9)


def test_solving_is_brute_force() -> None:
    model = PlanModel("made", (0, 1), (4, 4), (2, 2), (8, 8))
    rng = np.random.default_rng(3)
    sizes = (4, 16, 40, 100)
    patterns = {place: [Streaming(0, size + place[1] // 2) for size in sizes] for place in model.places}
    losses = {place: np.sort(rng.random(4))[::-1].copy() for place in model.places}
    for bound in ({"cache": 0.3}, {"cache": 0.4, "density": 0.45}):
        evidence = Evidence(model, 100, "allocate", **bound)
        found = solved(evidence, patterns, losses)
        assert evidence.fits(found)

        def total(made: dict[tuple[int, int], Pattern]) -> float:
            return sum(losses[place][patterns[place].index(made[place])] for place in model.places)

        least = math.inf
        for chosen in itertools.product(range(4), repeat=4):
            made = {place: patterns[place][chosen[2 * place[0] + place[1] // 2]] for place in model.places}
            if evidence.fits(made):
                least = min(least, total(made))
        assert total(found) == pytest.approx(least)


def test_the_best_of_several_plans_comes_first(scope: Scope) -> None:
    trials = Trials.of(scope, 128, 3, kinds=("recall",))
    places = PlanModel.of(scope).places
    made = [dict.fromkeys(places, Streaming(0, window)) for window in (2, 3, 1, 200, 2, 1, 60, 3)]
    order, losses = best(trials, made)
    assert order[0] == 3
    assert losses[3]["recall"] == pytest.approx(0.0, abs=1e-6)
    assert sorted(order) == list(range(8))
    full = trials.loss(made[3])
    assert full["recall"] == pytest.approx(losses[3]["recall"])
    assert score({"a": 0.2, "b": 0.05}) < score({"a": 0.2, "b": 0.06})
    assert score({"a": 0.0}) == pytest.approx(math.log(FLOOR))
    assert score({"a": -1e-4}) < score({"a": 0.0})
    with pytest.raises(PlanError, match="spells no prose"):
        Trials.of(scope, 128, 1, kinds=("prose",))


def test_other_planners_plans_keep_the_bounds(scope: Scope) -> None:
    evidence = Evidence(PlanModel.of(scope), 256, "allocate", scope=scope, density=0.6)
    found = others(evidence)
    assert "power" in found
    assert not {"allocate", "duo"} & set(found)  # duo's gates were not measured
    assert all(evidence.fits(made) for made in found.values())
    cached = Evidence(PlanModel.of(scope), 256, "allocate", scope=scope, cache=0.4)
    assert "snapkv" in others(cached)


@pytest.mark.parametrize("bound", [{"density": 0.4}, {"cache": 0.4}])
def test_allocate_ends_no_worse_than_what_it_tried(scope: Scope, bound: dict[str, float]) -> None:
    profile = scope.profile([PatternCost(texts=1, kinds=("recall",))], context=128, maps=False)
    made = plan(profile, "allocate", scope=scope, length=128, trials=2, rounds=2, **bound)
    assert made.density(128) <= bound.get("density", 1.0)
    assert made.kv_share(128) <= bound.get("cache", 1.0)
    told = [note for note in made.notes if note.startswith("shared out anew")]
    path = [float(one) for one in told[0].partition("times: ")[2].removesuffix(" nats per token").split(" -> ")]
    assert path == sorted(path, reverse=True)
    judge = Trials.of(scope, 128, 2, kinds=("recall", "prose" if "density" in bound else "written"))
    assert math.exp(score(judge.loss(made.patterns))) == pytest.approx(path[-1], rel=2e-3)
    for objective in ("squares", "error"):
        alone = plan(profile, "allocate", objective=objective, length=128, **bound)
        assert score(judge.loss(made.patterns)) <= score(judge.loss(alone.patterns)) + 1e-9
    assert rule(TopBlocks(mass=0.5, rule="antidiagonal", expected=0.2)) == TopBlocks(mass=0.5, rule="antidiagonal")
