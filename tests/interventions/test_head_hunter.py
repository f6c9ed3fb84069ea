"""HeadHunter: the greedy search against a search written out by hand, resuming, refusals, and the bundled diffusion model."""

from __future__ import annotations

import json
import math

import pytest
import torch

import headscope as hs
from headscope.errors import InterventionError
from headscope.interventions import HeadHunter, HeadMask, SoftPAG, guided
from headscope.models.bundled.evaluate_dit import quality
from headscope.models.bundled.flow import sample
from headscope.scope import Scope

from ..core.diffusion_models import MODELS, inputs, noise

POOL = [(layer, head) for layer in range(2) for head in range(4)]


@pytest.fixture(scope="module")
def scope():
    return Scope(MODELS["dit"]())


def case(scope, w=2.0):
    """(draw, objective, by_hand): the model once on seeded noise, compared with a fixed target; `by_hand` scores a set without `guided`."""
    target = noise(2, 4, 8, 8, seed=50)

    def given(seed):
        return {**inputs("dit"), "hidden_states": noise(2, 4, 8, 8, seed=seed)}

    def draw(seed):
        with torch.no_grad():
            return scope.model(**given(seed)).sample

    def objective(drawn, seed):
        return -float((drawn - target).norm()) + seed

    def by_hand(heads, seeds):
        values = []
        for seed in seeds:
            out = plain = draw(seed)
            if heads:
                with scope.intervene(SoftPAG(heads)):
                    out = plain + w * (plain - draw(seed))
            values.append(objective(out, seed))
        return math.fsum(values) / len(values)

    return draw, objective, by_hand


def test_the_greedy_search_of_algorithm_1(scope):
    draw, objective, by_hand = case(scope)
    seeds = [3, 4]
    hunt = HeadHunter(draw, objective, seeds, w=2.0, rounds=2, k=2, name="closeness").hunt(scope)
    chosen, scores, rows = [], [], []
    for number in (1, 2):
        tried = {head: by_hand([*chosen, head], seeds) for head in POOL if head not in chosen}
        before = by_hand(chosen, seeds)
        best = sorted(tried, key=lambda head: -tried[head])[:2]
        rows += [(number, *head, score, score - before, head in best) for head, score in tried.items()]
        chosen += best
        scores.append(by_hand(chosen, seeds))
    assert list(hunt.heads) == chosen
    assert hunt.baseline == by_hand([], seeds)
    assert list(hunt.scores) == scores
    assert [tuple(row) for row in hunt.table.itertuples(index=False)] == rows
    # one unit per set and condition; the chosen pair was not among the sets tried
    assert hunt.generations == 2 * (1 + 8 + 1 + 6 + 1)
    assert hunt.ranking(1)[:2] == chosen[:2]
    once = HeadHunter(draw, objective, seeds, w=2.0, rounds=1, k=4).hunt(scope)
    assert list(once.heads) == hunt.ranking(1)[:4]
    assert json.loads(json.dumps(hunt.to_dict()))["heads"] == [list(one) for one in chosen]


def test_a_pool_a_window_and_another_perturbation(scope):
    draw, objective, _ = case(scope)
    pool = [(1, 3), (0, 2)]
    hunter = HeadHunter(draw, objective, [1], HeadMask, w=1.0, k=1, pool=pool, steps=(0, 1))
    hunt = hunter.hunt(scope)
    values = []
    for head in pool:
        with guided(scope, HeadMask([head]), w=1.0):
            values.append(objective(draw(1), 1))
    assert list(hunt.table["score"]) == values
    assert list(hunt.heads) == [pool[values.index(max(values))]]


def test_a_search_that_was_killed_goes_on(scope, tmp_path):
    draw, objective, _ = case(scope)
    drawn = []

    def counted(seed):
        drawn.append(seed)
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return draw(seed)

    whole = HeadHunter(draw, objective, [1], rounds=2, k=1).hunt(scope)
    settings = {"rounds": 2, "k": 1, "name": "closeness"}
    with pytest.raises(KeyboardInterrupt):
        HeadHunter(counted, objective, [1], **settings).hunt(scope, journal=tmp_path / "j")
    resumed = HeadHunter(counted, objective, [1], **settings).hunt(scope, journal=tmp_path / "j")
    assert resumed.restored == 6
    assert resumed.generations == whole.generations - 6
    assert list(resumed.heads) == list(whole.heads)
    assert resumed.table.equals(whole.table)
    again = HeadHunter(counted, objective, [1], **settings).hunt(scope, journal=tmp_path / "j")
    assert again.generations == 0
    # another strength, window, name or perturbation is another search
    for other, drawn_anew in (({"w": 1.0}, 3), ({"steps": (0, 1)}, 3), ({"name": "other"}, 3), ({"perturb": HeadMask}, 2)):
        options = {**settings, "pool": [(0, 0), (0, 1)], "rounds": 1, **other}
        assert HeadHunter(counted, objective, [1], **options).hunt(scope, journal=tmp_path / "j").generations == drawn_anew


def test_refusals(scope, tmp_path):
    draw, objective, _ = case(scope)

    def hunt(**options):
        given = {"draw": draw, "objective": objective, "conditions": [1], "k": 1, **options}
        journal = given.pop("journal", None)
        return HeadHunter(**given).hunt(scope, journal=journal)

    for options, message in (
        ({"pool": []}, "an empty pool"),
        ({"pool": [(0, 9)]}, "heads 0..3"),
        ({"pool": [(0, 0)], "k": 2}, r"1 rounds of 2 heads.*holds 1"),
        ({"rounds": 0}, "counts from 1"),
        ({"k": True}, "counts from 1"),
        ({"conditions": []}, "nothing to draw"),
        ({"conditions": "seed"}, "nothing to draw"),
        ({"conditions": [object()]}, "pass plain values"),
        ({"objective": lambda *_: math.nan}, r"objective nan with no head, condition 0.*cannot be ranked"),
        ({"objective": lambda *_: None}, "cannot be ranked"),
        ({"objective": lambda x, _: math.inf if float(x.sum()) != float(draw(1).sum()) else 0.0}, r"objective inf with 0\.0"),
        ({"perturb": lambda heads: heads}, "not an intervention"),
        ({"journal": tmp_path}, "pass name="),
    ):
        with pytest.raises(InterventionError, match=message):
            hunt(**options)
    with pytest.warns(UserWarning, match="never ran"), pytest.raises(InterventionError, match="did not run the scope's model"):
        hunt(draw=lambda seed: torch.zeros(1), objective=lambda x, _: 0.0)


def test_the_figure(scope):
    draw, objective, _ = case(scope)
    hunt = HeadHunter(draw, objective, [1], rounds=2, k=1, name="closeness").hunt(scope)
    figure = hunt.plot()
    heats = [one for one in figure.data if one.type == "heatmap"]
    marks = [one for one in figure.data if one.type == "scatter"]
    assert len(heats) == len(marks) == 2
    for number, (heat, mark) in enumerate(zip(heats, marks, strict=True), start=1):
        part = hunt.table[hunt.table["round"] == number]
        for _, row in part.iterrows():
            assert heat.z[list(heat.y).index(row["head"])][list(heat.x).index(str(row["layer"]))] == row["score"]
        assert (int(mark.x[0]), mark.y[0]) == hunt.heads[number - 1]
        middle = (heat.zmin + heat.zmax) / 2
        assert middle == pytest.approx(hunt.baseline)
    assert "closeness" in figure.layout.title.text


# ---- the bundled diffusion transformer ---------------------------------------------------------------------------------------------


def test_hunted_heads_guide_the_bundled_model_towards_digits():
    """Two rounds over a pool of three heads, on 16 pictures of 4 steps; judged on a seed the search never saw.

    Distance to the nearest held-out digit, w = 3, unconditional. Frechet distance beside it: guidance buys nearness with variety.
    """
    scope = hs.load("bundled:dit")

    def draw(seed):
        return sample(scope.model, 16, steps=4, seed=seed)

    def objective(pictures, seed):
        return -quality(pictures)["distance"]

    hunt = HeadHunter(draw, objective, [7], rounds=2, k=1, pool=[(4, 5), (2, 0), (5, 4)]).hunt(scope)
    assert set(hunt.heads) == {(4, 5), (5, 4)}
    plain, found = draw(1000), {}
    for name, edit in (("hunted", SoftPAG(hunt.heads)), ("half", SoftPAG(hunt.heads, 0.5)), ("worst", SoftPAG([(2, 0)]))):
        with guided(scope, edit, w=3.0):
            found[name] = quality(draw(1000))
    with guided(scope, SoftPAG(hunt.heads, 0.0), w=3.0):
        assert torch.equal(draw(1000), plain)
    base = quality(plain)
    assert max(found["hunted"]["distance"], found["half"]["distance"]) < base["distance"] < found["worst"]["distance"] - 0.3
    assert found["hunted"]["frechet"] > base["frechet"]
