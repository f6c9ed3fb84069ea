"""Planners of rules that choose per input: what they make of a search, of similarities and of thresholds, against hand-made answers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.errors import PlanError
from headscope.plans import Dense, FlexBlocks, HeldBlocks, PlanModel, Streaming, Stripes, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_curves import Curves, allocate, curves, hull
from headscope.plans.planners import plan
from headscope.plans.planners.base import Evidence
from headscope.plans.planners.hylra import HyLRA, full_layers
from headscope.plans.planners.minference import MInference
from headscope.scope import Scope

SHAPE = PlanModel("shape", tuple(range(6)), (4,) * 6, (2,) * 6, (16,) * 6)


class Shown(Evidence):
    """Evidence with tables that were made by hand."""

    def __init__(self, model: PlanModel, length: int, tables: dict[str, pd.DataFrame]) -> None:
        super().__init__(model, length, "test")
        self.given = tables

    def table(self, name: str) -> pd.DataFrame:
        return self.given[name]


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
    return Scope(LlamaForCausalLM(config).eval(), name="tiny")


TEXT = "the quiet miller carried a copper kettle to the old barn . who had seven lamps ? some heron from the harbour . "


@pytest.fixture(scope="module")
def needle() -> Scope:
    import headscope as hs

    return hs.load("bundled:needle")


def ids(count: int) -> torch.Tensor:
    return torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(1))


# ---- MInference ---------------------------------------------------------------------------------------------------------


def searched(tokens: int) -> tuple[Shown, pd.DataFrame]:
    rows: list[dict[str, Any]] = []
    for layer, head in SHAPE.places:
        won = (layer + head) % 3
        for number, (kind, columns, diagonals, kept) in enumerate(
            (("a_shape", 10, 80, 0.2), ("vertical_slash", 50, 70, 0.3), ("block_sparse", 0, 0, 0.25))
        ):
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "pattern": kind,
                    "columns": columns,
                    "diagonals": diagonals,
                    "kept": kept,
                    "won": number == won,
                }
            )
    table = pd.DataFrame(rows)

    class Facts:
        card = type("Card", (), {"data": [{"tokens": tokens, "kind": "natural"}, {"tokens": 7, "kind": "own"}], "model": {}})()

    shown = Shown(SHAPE, 2 * tokens, {"minference.search": table})
    shown.profile = Facts()
    return shown, table


def test_minference_runs_what_won_with_sizes_in_proportion() -> None:
    shown, _ = searched(1000)
    found = MInference().choose(shown)
    assert found[0, 0] == Streaming(20, 160)
    assert found[0, 1] == VerticalSlash(100, 140, 64, 2, 7)  # forced sizes: 30 and 100 of 30,000, for 2,000 tokens
    assert found[0, 2] == TopBlocks(share=0.25, rule="pooled", block=64)
    half = MInference(scale=0.5).choose(shown)
    assert half[0, 0] == Streaming(10, 80)
    assert half[0, 2] == TopBlocks(share=0.125, rule="pooled", block=64)


def test_minference_meets_a_density() -> None:
    from headscope.plans import SparsePlan

    shown, _ = searched(1000)
    for density in (0.08, 0.2, 0.6):
        kept = SparsePlan(SHAPE, MInference(density=density).choose(shown)).density(2000)
        assert 0.97 * density <= kept <= density
    with pytest.raises(PlanError, match="density beside scale"):
        MInference(scale=0.5, density=0.2)


# ---- layer reuse ----------------------------------------------------------------------------------------------------------


def test_tidal_has_dense_layers_choosers_and_takers() -> None:
    made = plan(SHAPE, "tidal", keep=32, start=1, correction=4, length=512)
    for head in range(4):
        assert made[0, head] == Dense()
        assert made[1, head] == made[4, head] == TopKeys(32, sink=0, window=1, full=True)
        for layer in (2, 3):
            assert made[layer, head] == TopKeys(32, sink=0, window=1, source=(1, head))
        assert made[5, head] == TopKeys(32, sink=0, window=1, source=(4, head))
    as_published = plan(PlanModel("llama", tuple(range(32)), (8,) * 32, (8,) * 32, (64,) * 32), "tidal", length=4096)
    assert [layer for layer in range(32) if getattr(as_published[layer, 0], "full", False)] == [2, 13]
    assert as_published[13, 0].keep == 256
    assert "correction" not in str(plan(SHAPE, "tidal", start=5, length=512).notes)
    with pytest.raises(PlanError, match="as a chooser"):
        plan(SHAPE, "tidal", start=6, length=512)
    with pytest.raises(PlanError, match="layers of 2 to 4 heads"):
        plan(PlanModel("uneven", (0, 1), (4, 2), (2, 2), (16, 16)), "tidal", length=64)


def test_takers_read_what_the_chooser_would_have_read(scope: Scope) -> None:
    """Under a tidal plan, decoding equals decoding by hand: choosers dense, and takers with the largest scores of the chooser's head."""
    from headscope.plans import SparsePlan

    made = SparsePlan(
        PlanModel.of(scope),
        {
            (layer, head): TopKeys(6, sink=0, window=1, full=True)
            if layer == 1
            else TopKeys(6, sink=0, window=1, source=(1, head))
            if layer
            else Dense()
            for layer in range(3)
            for head in range(4)
        },
    )
    from headscope.probes.calls import EachCall, main_modules

    tokens = ids(81)[None]
    seen: dict[int, Any] = {}

    def see(call: Any, output: torch.Tensor) -> None:
        seen[call.layer] = (call, output)

    with torch.no_grad(), scope.execute(made):
        first = scope.model(tokens[:, :80], use_cache=True)
        with scope.intervene(EachCall(see, main_modules(scope))):
            scope.model(tokens[:, 80:], past_key_values=first.past_key_values)
    (chooser, all_keys), (taker, found) = seen[1], seen[2]
    for head in range(4):
        score = chooser.q[0, head, 0].double() @ chooser.k[0, head // 2].double().T * chooser.scale
        dense = torch.softmax(score, -1) @ chooser.v[0, head // 2].double()
        assert torch.allclose(all_keys[0, 0, head].double(), dense, atol=1e-5), "a chooser sees every key"
        keys = sorted({*score[:80].topk(6).indices.tolist(), 80})
        weights = torch.softmax(taker.q[0, head, 0].double() @ taker.k[0, head // 2, keys].double().T * taker.scale, -1)
        assert torch.allclose(found[0, 0, head].double(), weights @ taker.v[0, head // 2, keys].double(), atol=1e-5)


def test_full_layers_are_the_best_of_all_choices() -> None:
    """Against every subset of layers, for thresholds and for counts."""
    generator = np.random.default_rng(0)
    for trial in range(20):
        count = 6
        cosines = generator.random((count, count))
        cosines = (cosines + cosines.T) / 2
        subsets = [(0, *rest) for n in range(count) for rest in itertools.combinations(range(1, count), n)]

        def value(chosen: tuple[int, ...], theta: float, cosines: np.ndarray = cosines) -> float:
            total = 0.0
            for layer in range(len(cosines)):
                if layer not in chosen:
                    source = max(one for one in chosen if one < layer)
                    total += cosines[source, layer] if cosines[source, layer] >= theta else -math.inf
            return total

        theta = (0.2, 0.5, 0.7)[trial % 3]
        fewest = min(len(one) for one in subsets if value(one, theta) > -math.inf)
        best = max((one for one in subsets if len(one) == fewest), key=lambda one: value(one, theta))
        assert full_layers(cosines, theta, None) == list(best)
        for full in (1, 2, 4):
            best = max((one for one in subsets if len(one) == full), key=lambda one: value(one, -1.0))
            assert full_layers(cosines, theta, full) == list(best)


def test_hylra_plans_by_similarity() -> None:
    cosines = np.full((6, 6), 0.1)
    for group in ((0,), (1, 2, 3), (4, 5)):
        cosines[np.ix_(group, group)] = 0.95
    shown = Shown(SHAPE, 512, {"map_similarity.layers": pd.DataFrame(cosines)})
    made = HyLRA(keep=16).choose(shown)
    assert [layer for layer in range(6) if made[layer, 0] == TopKeys(16, sink=0, window=1, full=True)] == [0, 1, 4]
    assert made[3, 2] == TopKeys(16, sink=0, window=1, source=(1, 2))
    assert made[5, 1] == TopKeys(16, sink=0, window=1, source=(4, 1))
    assert "full layers: 0, 1, 4" in shown.notes
    with pytest.raises(PlanError, match="measure map_similarity again"):
        HyLRA().choose(Shown(SHAPE, 512, {"map_similarity.layers": pd.DataFrame(cosines[:3, :3])}))
    with pytest.raises(PlanError, match="each says how many layers"):
        HyLRA(theta=0.5, full=2)


# ---- thresholds -----------------------------------------------------------------------------------------------------------


def test_curves_are_what_the_chosen_masks_keep(scope: Scope) -> None:
    text = ids(96)
    rules = [TopBlocks(mass=0.3, rule="antidiagonal", block=16, stride=4), Stripes(1.0, 8, 2), FlexBlocks(0.4, 0.1, 16), Dense()]
    found = curves(scope, rules, text)
    assert found.places == tuple((layer, head) for layer in range(3) for head in range(4))
    assert np.allclose(found.kept[3], 1.0)
    assert np.allclose(found.mass[3], 1.0)
    from headscope.plans.indices import choose
    from headscope.probes.calls import each_call

    at = torch.arange(96)

    def see(call: Any, output: torch.Tensor) -> None:
        for head in range(4):
            scores = call.q[0, head].double() @ call.k[0, head // 2].double().T * call.scale
            weights = torch.softmax(scores.masked_fill(at[None] > at[:, None], -math.inf), -1)
            for number, rule in enumerate(rules):
                mask = choose(call, head, rule).visible(at, at) & (at[None] <= at[:, None])
                assert found.kept[number, call.layer * 4 + head] == pytest.approx(float(mask.sum()) / (96 * 97 / 2))
                assert found.mass[number, call.layer * 4 + head] == pytest.approx(float((weights * mask).sum()) / 96, abs=1e-5)

    each_call(scope, text, see)
    assert 0.1 < found.kept[:3].mean() < 0.95


def test_allocation_is_near_the_best_of_all() -> None:
    generator = np.random.default_rng(3)
    for _ in range(10):
        kept = np.sort(generator.random((4, 5)), 0)
        mass = np.sort(generator.random((4, 5)), 0)
        found = Curves(tuple((0, head) for head in range(5)), kept, mass, 64)
        kept = np.round(kept, 4)
        density = float(kept[0].mean() + 0.5 * (kept[-1].mean() - kept[0].mean()))
        chosen = allocate(density, found)
        cost = sum(kept[number, head] for head, number in enumerate(chosen))
        assert cost <= density * 5 + 1e-9
        best = max(
            sum(mass[number, head] for head, number in enumerate(one))
            for one in itertools.product(range(4), repeat=5)
            if sum(kept[number, head] for head, number in enumerate(one)) <= density * 5
        )
        steps = [np.diff(mass[hull(kept[:, head], mass[:, head]), head]) for head in range(5)]
        largest = max((float(one.max()) for one in steps if len(one)), default=0.0)
        assert best - sum(mass[number, head] for head, number in enumerate(chosen)) <= largest + 1e-9


@pytest.mark.parametrize("method", ["xattention", "flexprefill", "anchor"])
def test_thresholds_meet_a_density_on_a_live_model(needle: Scope, method: str) -> None:
    text = TEXT * 8
    options: dict[str, Any] = {"text": text, "length": 96, "block": 8}
    options |= {"stride": 4} if method == "xattention" else {"step": 2} if method == "anchor" else {}
    made = plan(needle, method, density=0.5, **options)
    assert 0.3 < made.density(96) <= 0.5
    assert any("measured on 96 tokens" in note for note in made.notes)
    with pytest.raises(PlanError, match="measured on the model"):
        plan(SHAPE, method, density=0.5, **options)
    plain = plan(SHAPE, method, length=4096)
    assert plain.density(4096) == 1.0, "nobody measured, so nothing may be promised"
    kinds = {"xattention": TopBlocks(mass=0.9, rule="antidiagonal"), "flexprefill": FlexBlocks(0.9), "anchor": Stripes()}
    assert set(plain.patterns.values()) == {kinds[method]}


def test_xattention_thresholds_per_head_reach_their_recall(needle: Scope) -> None:
    text = TEXT * 8
    made = plan(needle, "xattention", recall=0.95, text=text, length=64, block=8, stride=4)
    thresholds = {pattern.mass for pattern in made.patterns.values()}
    assert len(thresholds) > 2
    found = curves(
        needle, [TopBlocks(mass=one, rule="antidiagonal", block=8, stride=4) for one in sorted(thresholds)], needle.encode(text)[0][:64]
    )
    for head, place in enumerate(found.places):
        number = sorted(thresholds).index(made[place].mass)
        assert found.mass[number, head] >= 0.95 - 1e-6
        assert number == 0 or found.mass[number - 1, head] < 0.95


# ---- SparseD ----------------------------------------------------------------------------------------------------------------


def test_sparse_d_keeps_its_share_of_the_tiles() -> None:
    made = plan(SHAPE, "sparse-d", steps=10, block=8, length=64)
    assert set(made.patterns.values()) == {HeldBlocks(0.3, 10, 2, 8)}
    assert made.density(64) == pytest.approx((2 + 8 * 3 / 8) / 10)
    half = plan(SHAPE, "sparse-d", steps=10, block=8, length=64, density=0.5)
    assert half.density(64) == pytest.approx((2 + 8 * 3 / 8) / 10)
    exact = plan(SHAPE, "sparse-d", steps=10, block=8, length=64, density=0.6)
    assert exact.density(64) == pytest.approx(0.6)
    with pytest.raises(PlanError, match="not one of 8 tiles"):
        plan(SHAPE, "sparse-d", steps=10, block=8, length=64, density=0.25)


def test_sparse_d_is_for_diffusion(scope: Scope) -> None:
    import headscope as hs

    with pytest.raises(PlanError, match="causal"):
        plan(scope, "sparse-d", length=64)
    made = plan(hs.load("bundled:dit"), "sparse-d", density=0.5, block=1, steps=32, length=64)
    assert made.density(64) == pytest.approx(0.5, abs=0.01)
    assert len(made.patterns) == 36
    with pytest.raises(PlanError, match="not causal"):
        plan(hs.load("bundled:dit"), "xattention", length=64)
