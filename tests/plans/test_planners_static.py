"""Planners that rank heads or share out budgets: hand-made scores, and the plans that the methods' own formulas give for them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog

from headscope.errors import PlanError
from headscope.plans import Budget, Dense, PlanModel, Power, Span, SparsePlan, Streaming, Strided, TopBlocks
from headscope.plans.planners import PLANNERS, plan, planner
from headscope.plans.planners.headkv import HeadKV
from headscope.plans.planners.moa import MoaPlanner
from headscope.plans.planners.tca import held

from .made_profiles import made

GATES = [[0.9, 0.1], [0.4, 0.8]]


def dense_groups(found: SparsePlan) -> set[tuple[int, int]]:
    """(layer, key head) whose query heads are all dense."""
    groups: dict[tuple[int, int], bool] = {}
    for (layer, head), pattern in found.patterns.items():
        place = (layer, found.model.kv_head(layer, head))
        groups[place] = groups.get(place, True) and isinstance(pattern, Dense)
    return {place for place, whole in groups.items() if whole}


# ---- DuoAttention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "full"), [(0.5, {(0, 0), (1, 1)}), (0.75, {(0, 0)}), (0.0, {(0, 0), (0, 1), (1, 0), (1, 1)}), (1.0, set())]
)
def test_duo_keeps_the_largest_gates(sparsity: float, full: set[tuple[int, int]]) -> None:
    found = plan(made({"duo_gate": GATES}), "duo", sparsity=sparsity, sink=4, recent=16)
    assert dense_groups(found) == full
    assert set(found.patterns.values()) <= {Dense(), Streaming(4, 16)}


def test_duo_fills_a_density_and_never_passes_it() -> None:
    """The brute force over all numbers of full key heads."""
    profile = made({"duo_gate": GATES})
    order = [(0, 0), (1, 1), (1, 0), (0, 1)]
    for density in (0.1, 0.3, 0.34, 0.5, 0.8, 1.0):
        found = plan(profile, "duo", density=density, sink=4, recent=16)
        lean = Streaming(4, 16).density(1024)
        most = max(count for count in range(5) if (count + (4 - count) * lean) / 4 <= density)
        assert dense_groups(found) == set(order[:most])
        assert found.density(1024) <= density
    cached = plan(profile, "duo", cache=0.5, sink=4, recent=16)
    assert cached.kv_share(1024) <= 0.5
    assert dense_groups(cached) == {(0, 0)}


def test_duo_cuts_ties_by_place_and_prefers_gates_to_the_surrogate() -> None:
    flat = plan(made({"duo_gate": np.ones((2, 2))}), "duo", sparsity=0.5)
    assert dense_groups(flat) == {(0, 0), (0, 1)}
    both = made({"duo_gate": GATES, "duo_change_group": [[0.0, 1.0], [2.0, 0.0]]})
    assert dense_groups(plan(both, "duo", sparsity=0.75)) == {(0, 0)}
    assert dense_groups(plan(both, "duo", sparsity=0.75, score="duo_change_group")) == {(1, 0)}
    stand_in = plan(made({"duo_change_group": [[0.0, 1.0], [2.0, 0.0]]}), "duo", sparsity=0.75)
    assert dense_groups(stand_in) == {(1, 0)}
    assert "stand-in" in stand_in.notes[0]
    assert {pattern for pattern in stand_in.patterns.values() if pattern != Dense()} == {Streaming(64, 128)}


# ---- RazorAttention -----------------------------------------------------------------------------------------------------


def razor_profile() -> object:
    induction, echo = np.zeros((5, 10)), np.zeros((5, 10))
    induction[1, 3], induction[2, 5], induction[4, 9], echo[3, 0] = 0.9, 0.8, 0.7, 0.6
    return made({"echo_sum": echo, "ind_sum": induction}, layers=5, heads=10, kv_heads=5, tokens=8192)


def test_razor_takes_quotas_and_whole_groups() -> None:
    """50 heads: 1 % are rounded up to one echo head, 6 % are three induction heads; each brings the other head of its key head."""
    found = plan(razor_profile(), "razor", induction=0.06)
    assert dense_groups(found) == {(3, 0), (1, 1), (2, 2), (4, 4)}
    rest = next(pattern for pattern in found.patterns.values() if isinstance(pattern, Span))
    assert rest.compensate
    assert [rest.at(length) for length in (8192, 40_000)] == [Streaming(4, 4000, True), Streaming(4, 8000, True)]
    longer = plan(razor_profile(), "razor", induction=0.06, window=100, divisor=8.0, compensate=False)
    assert {p.at(1600) for p in longer.patterns.values() if isinstance(p, Span)} == {Streaming(4, 200)}


def test_razor_fits_the_window_to_a_density() -> None:
    for density in (0.2, 0.35, 0.6):
        found = plan(razor_profile(), "razor", induction=0.06, density=density)
        assert found.density(8192) <= density
        window = next(pattern for pattern in found.patterns.values() if isinstance(pattern, Span)).at(8192).window
        wider = SparsePlan(
            found.model,
            {place: Dense() if one == Dense() else Streaming(4, window + 1, True) for place, one in found.patterns.items()},
        )
        assert wider.density(8192) > density
    poor = plan(razor_profile(), "razor", induction=0.06, density=0.05)
    assert len(dense_groups(poor)) == 1
    assert "1 of 4 key heads" in poor.notes[0]


# ---- budgets of keys ----------------------------------------------------------------------------------------------------


def test_snapkv_keeps_the_same_budget_everywhere() -> None:
    found = plan(made(), "snapkv", capacity=320, window=64)
    assert set(found.patterns.values()) == {Budget(256, 64, 5)}
    assert found.kv_share(1024) == 320 / 1024
    bound = plan(made(), "snapkv", cache=0.25)
    assert bound.kv_share(1024) == 0.25
    with pytest.raises(PlanError, match="prefill is dense"):
        plan(made(), "snapkv", density=0.25)


def test_headkv_shares_out_the_pool_by_score() -> None:
    """capacity = round(p * (base // beta) * heads + base - base // beta), p the score's share over the key heads."""
    scores = np.array([[[0.6, 0.2], [0.0, 0.0]], [[0.1, 0.1], [0.8, 0.2]]]).reshape(2, 4)
    found = plan(made({"retrieval": scores}), "headkv", base=128, beta=1.2)
    means = {(0, 0): 0.4, (0, 1): 0.0, (1, 0): 0.1, (1, 1): 0.5}
    for (layer, head), pattern in found.patterns.items():
        part = means[layer, head // 2] / 1.0
        assert pattern == Budget(round(part * 106 * 4 + 128 - 106), 32, 7)
    assert sum(HeadKV().capacities(np.array([0.25] * 4), 128)) == 4 * 128
    hot = plan(made({"retrieval": scores}), "headkv", base=128, temperature=0.0)
    assert {pattern.keep for pattern in hot.patterns.values()} == {128}
    bound = plan(made({"retrieval_reasoning": scores}), "headkv", scores="reasoning", cache=0.2)
    assert 0.19 < bound.kv_share(1024) <= 0.2
    with pytest.raises(PlanError, match="all 0"):
        plan(made({"retrieval": np.zeros((2, 4))}), "headkv", base=128)


def test_task_kv_keeps_the_farthest_and_the_nearest() -> None:
    distance = np.array([[3.0, 1.0, 2.0, 0.5], [0.1, 0.4, 0.3, 0.2]])
    profile = made({"semantic_distance": distance}, heads=4, kv_heads=4)
    found = plan(profile, "task_kv", beta=0.5, least=1, sink=16, recent=64, budget=0.9)
    # layer 0: f = n beta = 2 farthest (0, 2) and the nearest (3); last layer: f = least = 1 farthest (1) and the nearest (0)
    assert dense_groups(found) == {(0, 0), (0, 2), (0, 3), (1, 1), (1, 0)}
    rest = found[0, 1]
    # layer 0: 0.9 * 4 - 3 full heads leave 0.6 of the text for one head
    assert rest == Budget(16 + int(0.6 * 1024) - 80, 32, 1, 16, 64)
    # layer 1: (3.6 - 2) / 2 = 0.8 of the text for each of two heads
    assert found[1, 2] == Budget(16 + int(0.8 * 1024) - 80, 32, 1, 16, 64)
    bound = plan(profile, "task_kv", beta=0.0, least=0, sink=16, recent=64, cache=0.5)
    assert bound.kv_share(1024) == 0.5
    assert dense_groups(bound) == set()


# ---- masks without a measurement ----------------------------------------------------------------------------------------


def test_power_and_s2_need_no_measurement() -> None:
    shape = PlanModel("shape", (0, 1, 2), (4, 4, 4), (2, 2, 2), (8, 8, 8))
    found = plan(shape, "power", length=2048, window=100, block=64)
    assert set(found.patterns.values()) == {Power(100, 64)}
    bound = plan(shape, "power", length=2048, block=64, density=0.4)
    window = bound[0, 0].window
    assert Power(window, 64).density(2048) <= 0.4 < Power(window + 1, 64).density(2048)
    with pytest.raises(PlanError, match="leanest plan of 'power'"):
        plan(shape, "power", length=2048, block=64, density=0.05)


def test_s2_heads_cover_the_text_together() -> None:
    shape = PlanModel("shape", (0, 1, 2), (4, 4, 4), (2, 2, 2), (8, 8, 8))
    found = plan(shape, "s2", length=2048, stride=4, block=64, dense_layers=(1,))
    assert [found[layer, head].offset for layer in (0, 2) for head in range(4)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found[1, 0] == Dense()
    by_head = plan(shape, "s2", length=2048, stride=4, block=64, per="head")
    assert [by_head[0, head].offset for head in range(4)] == [0, 1, 2, 3]
    bound = plan(shape, "s2", length=2048, block=64, density=0.2)
    stride = bound[0, 0].stride
    assert bound.density(2048) <= 0.2
    smaller = SparsePlan(shape, {p: Strided(64, stride - 1, one.offset % (stride - 1), 64) for p, one in bound.patterns.items()})
    assert smaller.density(2048) > 0.2
    with pytest.raises(PlanError, match="dense layer 7"):
        plan(shape, "s2", length=2048, dense_layers=(7,))


# ---- kept mass ----------------------------------------------------------------------------------------------------------


def test_tca_takes_the_smallest_share_that_holds_the_mass() -> None:
    generator = np.random.default_rng(0)
    raw = np.tril(generator.random((2, 4, 16, 16)) ** np.array([1, 4, 16, 64])[None, :, None, None])
    maps = (raw / raw.sum(-1, keepdims=True) * 16).astype(np.float32)
    profile = made({}, maps=maps, tokens=256, block=16)
    found = plan(profile, "tca", mass=0.9)
    for (layer, head), pattern in found.patterns.items():
        share = 1.0 if isinstance(pattern, Dense) else pattern.share
        smaller = [one for one in PLANNERS["tca"]().shares if one < share]
        assert share == 1.0 or held(maps[layer, head], share) >= 0.9
        assert all(held(maps[layer, head], one) < 0.9 for one in smaller[-1:])
    # peaked heads need less than flat ones
    kept = [1.0 if isinstance(found[0, head], Dense) else found[0, head].share for head in range(4)]
    assert kept == sorted(kept, reverse=True)
    bound = plan(profile, "tca", density=0.4)
    assert bound.density(256) <= 0.4
    assert all(isinstance(one, TopBlocks | Dense) for one in bound.patterns.values())


def test_held_counts_the_heaviest_blocks_of_each_row() -> None:
    mass = np.array([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.7, 0.2, 0], [0.1, 0.5, 0.3, 0.1]])
    # share .5: rows keep 1, 1, 2, 2 blocks, the first and the diagonal one always
    assert held(mass, 0.5) == pytest.approx((1.0 + 1.0 + 1.0 + 1.0) / 4)
    assert held(mass, 0.25) == pytest.approx((1.0 + 1.0 + 1.0 + 0.7) / 4)


# ---- MoA ----------------------------------------------------------------------------------------------------------------


def moa_profile(losses: np.ndarray, tokens: int = 1024) -> object:
    """losses [L, H, n]: influence lost at windows tokens / n, 2 tokens / n, ..."""
    layers, heads, count = losses.shape
    whole = losses.max(-1) + 1.0
    rows = [
        (layer, head, (place + 1) * tokens // count, losses[layer, head, place] / whole[layer, head])
        for layer, head, place in product(range(layers), range(heads), range(count))
    ]
    table = pd.DataFrame(rows, columns=["layer", "head", "span", "lost"])
    return made({"moa_influence": whole}, layers=layers, heads=heads, kv_heads=heads, tokens=tokens, tables={"moa.spans": table})


def test_moa_solves_its_program() -> None:
    """Against brute force over every choice of candidates for three heads."""
    generator = np.random.default_rng(1)
    losses = np.sort(generator.random((1, 3, 16)), -1)[..., ::-1].copy()
    losses[..., -1] = 0.0
    profile = moa_profile(losses)
    method = MoaPlanner(density=0.4, betas=(0.0, 0.25, 0.5, 0.75, 1.0))
    spans = method.candidates([1024])
    found = method.plan(profile)

    def lost(pattern: object, head: int) -> float:
        window = 1024 if isinstance(pattern, Dense) else pattern.at(1024).window
        return float(losses[0, head, max(0, window // 64 - 1)])

    best = min(
        sum(lost(span, head) for head, span in enumerate(chosen))
        for chosen in product(spans, repeat=3)
        if sum(span.density(1024) for span in chosen) / 3 <= 0.4
    )
    assert sum(lost(found[0, head], head) for head in range(3)) == pytest.approx(best)
    assert found.density(1024) <= 0.4


def test_moa_reads_several_lengths(tmp_path) -> None:
    """A head with a constant reach and one that scales: two lengths tell them apart."""
    short, long = np.zeros((1, 2, 16)), np.zeros((1, 2, 16))
    short[0, 0, :4], short[0, 1, :8] = 5.0, 5.0  # at 1,024: reaches of 4/16 = 256 and 8/16 = 512 tokens
    long[0, 0, :2], long[0, 1, :8] = 5.0, 5.0  # at 2,048: reaches of 256 and 1,024 tokens
    run = tmp_path / "long"
    moa_profile(long, 2048).save(run)
    found = plan(moa_profile(short), "moa", runs=(str(run),), density=0.82)
    for length, losses in ((1024, short), (2048, long)):
        for head in range(2):
            pattern = found[0, head]
            window = length if isinstance(pattern, Dense) else pattern.at(length).window
            assert losses[0, head, max(0, window * 16 // length - 1)] == 0.0
    assert found[0, 0].at(65_536).window < found[0, 1].at(65_536).window / 8
    assert found.density(1024) <= 0.82
    assert found.density(2048) <= 0.82
    with pytest.raises(PlanError, match="one model"):
        plan(moa_profile(short), "moa", runs=(str(_other(tmp_path)),))


def _other(tmp_path) -> object:
    return moa_profile(np.zeros((2, 2, 4)), 512).save(tmp_path / "other")


def test_moa_beats_no_linear_relaxation() -> None:
    """The integer program's loss is at least the linear program's, and close to it for many heads."""
    generator = np.random.default_rng(2)
    losses = np.sort(generator.random((4, 8, 16)), -1)[..., ::-1].copy()
    losses[..., -1] = 0.0
    method = MoaPlanner(density=0.3)
    found = method.plan(moa_profile(losses))
    spans = method.candidates([1024])
    cost = np.array([span.density(1024) for span in spans])
    table = np.array(
        [[losses[layer, head, max(0, span.at(1024).window // 64 - 1)] for span in spans] for layer in range(4) for head in range(8)]
    )
    relaxed = linprog(
        table.ravel(),
        A_ub=np.tile(cost, 32)[None],
        b_ub=[0.3 * 32],
        A_eq=np.kron(np.eye(32), np.ones(len(spans))),
        b_eq=np.ones(32),
        bounds=(0, 1),
    ).fun
    mine = sum(
        losses[layer, head, max(0, (1024 if found[layer, head] == Dense() else found[layer, head].at(1024).window) // 64 - 1)]
        for layer in range(4)
        for head in range(8)
    )
    assert relaxed - 1e-9 <= mine <= relaxed + table.max(1).max()


# ---- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "metric", "probe"),
    [
        ("duo", "duo_gate", "duo_gates"),
        ("razor", "echo_sum", "razor"),
        ("headkv", "retrieval", "retrieval"),
        ("task_kv", "semantic_distance", "semantic_distance"),
        ("moa", "moa.spans", "moa"),
        ("allocate", "pattern_cost.candidates", "pattern_cost"),
    ],
)
def test_a_missing_measurement_names_its_command(method: str, metric: str, probe: str) -> None:
    with pytest.raises(PlanError, match=f"{metric}.*headscope profile pypi:made --probes {probe} --out RUN"):
        plan(made({"sink": np.zeros((2, 4))}), method)


def test_maps_that_are_missing_are_named() -> None:
    with pytest.raises(PlanError, match=r"block maps.*headscope profile pypi:made"):
        plan(made(), "tca")


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan"), True, "half"])
def test_a_density_that_is_none_is_refused(density: object) -> None:
    with pytest.raises(PlanError, match=r"it is a share"):
        plan(made({"duo_gate": GATES}), "duo", density=density)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("duo", {"density": 0.5, "sparsity": 0.5}, "density beside sparsity"),
        ("duo", {"sink": -1}, "sink=-1"),
        ("duo", {"score": "gate"}, "unknown score"),
        ("duo", {"gate": 1}, "unknown option of planner 'duo'"),
        ("duoo", {}, "unknown planner 'duoo': did you mean duo"),
        ("razor", {"echo": 1.2}, "echo=1.2"),
        ("razor", {"divisor": 0.5}, "divisor"),
        ("snapkv", {"capacity": 10}, "window=32"),
        ("headkv", {"beta": 0.5}, "beta"),
        ("moa", {"betas": (2.0,)}, "betas"),
        ("tca", {"shares": (0.5, 0.1)}, "smallest"),
        ("s2", {"per": "layer"}, "unknown per"),
        ("power", {"cache": 0.5}, "drops no keys"),
        ("allocate", {"objective": "best"}, "unknown objective"),
        ("duo", {"length": 0}, "length=0"),
    ],
)
def test_bad_parameters_are_refused(method: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(made({"duo_gate": GATES}), method, **options)


def test_a_score_that_is_no_number_names_its_head() -> None:
    with pytest.raises(PlanError, match=r"duo_gate of head 1\.2: it is not a number"):
        plan(made({"duo_gate": [[0.9, 0.1], [0.4, float("nan")]]}), "duo")


def test_sources_that_say_too_little() -> None:
    shape = PlanModel("shape", (0,), (2,), (1,), (8,))
    with pytest.raises(PlanError, match="length=32768"):
        plan(shape, "power")
    with pytest.raises(PlanError, match="shape of a model has no measurements"):
        plan(shape, "duo", length=1024)
    with pytest.raises(PlanError, match="Scope or a HeadProfile"):
        plan("a run", "duo")


def test_every_planner_says_what_it_needs() -> None:
    for name, cls in PLANNERS.items():
        told = cls.describe()
        assert told["name"] == name
        assert told["title"].endswith(".")
        assert told["source"]
        assert set(told["parameters"]) >= {"density", "cache", "length"}
    assert planner("duo", sink=8).sink == 8
    length = plan(made({"duo_gate": GATES}, max_length=4096), "duo").parameters["length"]
    assert length == 4096
