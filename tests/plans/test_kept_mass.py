"""Kept attention mass against the dense matrix: exact where q and k are there, inside its bounds from maps, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.errors import PlanError
from headscope.plans import Blocks, Budget, Dense, Lines, Pattern, PlanModel, Power, Span, SparsePlan, Streaming, Strided, VerticalSlash
from headscope.plans.mass import count_cells
from headscope.profile import HeadProfile
from headscope.scope import Scope

LENGTH = 200
PATTERNS = (
    Streaming(1, 20),
    Streaming(4, 33, True),
    Span(0.0, 0.25, 2),
    Strided(16, 3, 1, 16),
    Power(16, 16),
    Lines((0, 5), (0, 1, 9)),
    Blocks(((0,), (0, 1), (0, 2)), 16),
    Dense(),
)


@pytest.fixture(scope="module")
def scope() -> Scope:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
    )
    return Scope(LlamaForCausalLM(config).eval(), name="tiny")


def ids(count: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 97, (count,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def matrices(scope: Scope) -> np.ndarray:
    """[L, H, N, N] float64: A itself, from the eager model."""
    eager = LlamaForCausalLM(scope.model.config).eval()
    eager.load_state_dict(scope.model.state_dict())
    eager.set_attn_implementation("eager")
    found = eager(input_ids=ids()[None], output_attentions=True).attentions
    return torch.cat(found).detach().double().numpy()


@pytest.fixture(scope="module")
def profile(scope: Scope) -> HeadProfile:
    return scope.profile(["entropy"], context=LENGTH, data=ids()[None], keep="all", block=16)


def plans() -> list[SparsePlan]:
    return [SparsePlan(PlanModel("tiny", (0, 1), (4, 4), (2, 2), (16, 16)), dict.fromkeys(_places(), one)) for one in PATTERNS]


def _places() -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(2) for head in range(4)]


def truth(matrices: np.ndarray, pattern: Pattern, length: int) -> np.ndarray:
    """[L, H] share of the weights of the first `length` rows on kept keys."""
    at = torch.arange(length)
    seen = pattern.fixed(length).visible(at, at).numpy()
    part = matrices[:, :, :length, :length]
    return (part * seen).sum((2, 3)) / part.sum((2, 3))


@pytest.mark.parametrize("number", range(len(PATTERNS)))
def test_exact_mass_is_that_of_the_matrix(scope: Scope, profile: HeadProfile, matrices: np.ndarray, number: int) -> None:
    plan, pattern = plans()[number], PATTERNS[number]
    live = plan.kept_mass(scope, data=ids())
    assert live.basis == "exact"
    np.testing.assert_allclose(live.value, truth(matrices, pattern, LENGTH), atol=2e-5)
    kept = plan.kept_mass(profile, exact=True)
    np.testing.assert_allclose(kept.value, live.value, atol=2e-5)
    shorter = plan.kept_mass(profile, 120, exact=True)
    np.testing.assert_allclose(shorter.value, truth(matrices, pattern, 120), atol=2e-5)


@pytest.mark.parametrize("number", range(len(PATTERNS)))
@pytest.mark.parametrize("length", [LENGTH, 96])
def test_maps_bound_the_mass(profile: HeadProfile, matrices: np.ndarray, number: int, length: int) -> None:
    found = plans()[number].kept_mass(profile, length)
    exact = truth(matrices, PATTERNS[number], length)
    assert found.basis == "maps"
    assert (found.lower <= exact + 1e-5).all()
    assert (exact <= found.upper + 1e-5).all()
    assert (found.lower <= found.value).all()
    assert (found.value <= found.upper).all()
    assert np.abs(found.value - exact).mean() < 0.1


def test_maps_are_exact_where_cells_are_kept_whole(profile: HeadProfile, matrices: np.ndarray) -> None:
    """Whole tiles, and a sink whose columns are known: no cell is shared out."""
    tiles = Blocks(((0,), (0, 1), (0, 2), (0, 1, 3)), 16)
    plan = SparsePlan(plans()[0].model, dict.fromkeys(_places(), tiles))
    found = plan.kept_mass(profile)
    np.testing.assert_allclose(found.value, truth(matrices, tiles, LENGTH), atol=1e-5)
    np.testing.assert_allclose(found.upper - found.lower, 0, atol=1e-9)


def test_column_sums_place_the_sink(profile: HeadProfile, matrices: np.ndarray) -> None:
    """With them the bounds are as far apart as the cells that the window cuts, without them the first column of cells as well."""
    plan = plans()[0]
    with_columns = plan.kept_mass(profile)
    stripped = HeadProfile(profile.table, profile.card, _without_columns(profile), tables={})
    without = plan.kept_mass(stripped)
    assert ((with_columns.upper - with_columns.lower) < (without.upper - without.lower)).all()
    exact = truth(matrices, PATTERNS[0], LENGTH)
    assert np.abs(with_columns.value - exact).mean() < np.abs(without.value - exact).mean()


def _without_columns(profile: HeadProfile) -> object:
    from dataclasses import replace

    return replace(profile._content, arrays={})


def test_statistics_alone_are_enough(scope: Scope, profile: HeadProfile) -> None:
    stats = scope.capture(ids(), statistics=["block_mass", "column_sum"], block=16)
    for plan in plans()[:3]:
        np.testing.assert_allclose(plan.kept_mass(stats).value, plan.kept_mass(profile).value, atol=1e-5)
    with pytest.raises(PlanError, match="without block_mass"):
        plans()[0].kept_mass(scope.capture(ids(), statistics=["column_sum"]))


def test_longer_texts_keep_what_the_last_rows_keep(profile: HeadProfile) -> None:
    plan = plans()[0]
    near, far = plan.kept_mass(profile), plan.kept_mass(profile, 4 * LENGTH)
    assert far.basis == "extrapolated"
    assert (far.value <= near.value + 1e-12).all()
    assert far.tokens == LENGTH
    dense = plans()[-1].kept_mass(profile, 4 * LENGTH)
    np.testing.assert_allclose(dense.value, 1.0)


def test_rules_that_choose_need_q_and_k(scope: Scope, profile: HeadProfile, matrices: np.ndarray) -> None:
    rule = SparsePlan(plans()[0].model, dict.fromkeys(_places(), VerticalSlash(20, 10, 16, 1, 4)))
    found = rule.kept_mass(profile)
    assert found.basis == "exact"
    live = rule.kept_mass(scope, data=ids())
    np.testing.assert_allclose(found.value, live.value, atol=2e-5)
    assert (found.value > truth(matrices, Streaming(1, 4), LENGTH)).all()
    budget = SparsePlan(plans()[0].model, dict.fromkeys(_places(), Budget(20, 16, 1)))
    late = budget.kept_mass(profile).value
    last = matrices[:, :, -1]
    assert ((late * LENGTH - (LENGTH - 1)) <= 1 + 1e-4).all()  # all rows but the last are kept whole
    assert ((late * LENGTH - (LENGTH - 1)) >= last[:, :, -16:].sum(-1) - 1e-4).all()
    bare = HeadProfile(profile.table, profile.card, _no_kept(profile), tables={})
    with pytest.raises(PlanError, match=r"vertical_slash of head 0\.0.*--keep all"):
        rule.kept_mass(bare)
    with pytest.raises(PlanError, match="did not keep q and k"):
        plans()[0].kept_mass(bare, exact=True)


def _no_kept(profile: HeadProfile) -> object:
    from dataclasses import replace

    return replace(profile._content, kept={})


def test_another_models_run_is_refused(profile: HeadProfile) -> None:
    other = SparsePlan.uniform(PlanModel("other", (0, 1, 2), (4,) * 3, (2,) * 3, (16,) * 3), Dense())
    with pytest.raises(PlanError, match="run of the plan's model"):
        other.kept_mass(profile)
    with pytest.raises(PlanError, match="without block maps"):
        plans()[0].kept_mass(HeadProfile(profile.table, profile.card, None, tables={}))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda one: one.kind)
@pytest.mark.parametrize(("rows", "block"), [(64, 16), (75, 16), (30, 7)])
def test_cells_count_entries(pattern: Pattern, rows: int, block: int) -> None:
    """Shares of cells times their entries give the pattern's own count."""
    fixed = pattern.fixed(rows)
    cells = count_cells(fixed, rows, block)
    n = len(cells.part)
    sizes = np.zeros((n, n))
    t, s = np.meshgrid(np.arange(rows), np.arange(rows), indexing="ij")
    np.add.at(sizes, (t[t >= s] // block, s[t >= s] // block), 1)
    extra = max(0, rows - fixed.sink - fixed.window) if isinstance(fixed, Streaming) and fixed.compensate else 0
    assert (cells.part * sizes).sum() == pytest.approx(fixed.kept(rows) - extra)


def test_layers_and_lengths_that_are_not_there(profile: HeadProfile) -> None:
    with pytest.raises(PlanError, match="layer 9"):
        plans()[0].layer(9)
    with pytest.raises(PlanError, match="counted up to"):
        count_cells(Power(16, 16), 20_000, 128)
    assert "maps" in repr(plans()[0].kept_mass(profile))
