"""SparsePlan: costs against brute force, files, and refusals that name the head."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.errors import PlanError
from headscope.models.planted import planted_llama
from headscope.plans import JSON_SCHEMA, Blocks, Dense, Lines, PlanModel, SparsePlan, Streaming, TopKeys
from headscope.scope import Scope

MODEL = PlanModel("tiny", (0, 1, 3), (4, 4, 2), (2, 4, 1), (8, 8, 16), "abc")
CHOICES = (Dense(), Streaming(4, 16), Streaming(0, 1), Lines((0, 5), (0, 1, 2)), Blocks(((0,), (0, 1)), 8))


@st.composite
def plans(draw: st.DrawFn) -> SparsePlan:
    return SparsePlan(MODEL, {place: draw(st.sampled_from(CHOICES)) for place in MODEL.places}, "drawn", {"seed": 1}, ("a note",))


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 60))
def test_costs_are_sums_over_heads(plan: SparsePlan, length: int) -> None:
    kept = {place: pattern.kept(length) for place, pattern in plan.patterns.items()}
    dims = {0: 8, 1: 8, 3: 16}
    assert plan.flops(length) == pytest.approx(sum(4 * dims[place[0]] * count for place, count in kept.items()))
    whole = length * (length + 1) / 2
    assert plan.density(length) == pytest.approx(sum(kept.values()) / (10 * whole))
    groups: dict[tuple[int, int], float] = {}
    for (layer, head), pattern in plan.patterns.items():
        place = (layer, head // {0: 2, 1: 1, 3: 2}[layer])
        groups[place] = max(groups.get(place, 0), pattern.cached(length))
    assert plan.cached_keys(length) == groups
    assert plan.kv_bytes(length) == pytest.approx(sum(4 * dims[layer] * keys for (layer, _), keys in groups.items()))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_json_round_trip_keeps_every_byte(plan: SparsePlan) -> None:
    again = SparsePlan.from_json(plan.to_json())
    assert again.patterns == plan.patterns
    assert again.to_json() == plan.to_json()
    assert (again.model, again.method, again.parameters, again.notes) == (plan.model, "drawn", {"seed": 1}, ("a note",))


def test_a_dense_head_keeps_its_group_in_memory() -> None:
    plan = SparsePlan.uniform(MODEL, Streaming(4, 16)).replace({(0, 1): Dense()})
    assert plan.cached_keys(100)[0, 0] == 100
    assert plan.cached_keys(100)[0, 1] == 20
    assert SparsePlan.uniform(MODEL, Dense()).kv_share(100) == 1.0
    assert plan.counts() == {"streaming": 9, "dense": 1}
    assert "9 streaming, 1 dense" in repr(plan)
    assert plan.densities(100)[2, 2:].tolist() != plan.densities(100)[2, :2].tolist()
    assert plan.plot(100).data[0].z.shape == (3, 4)


def test_files(tmp_path: Path) -> None:
    plan = SparsePlan.uniform(MODEL, Streaming(4, 16))
    path = plan.save(tmp_path / "new" / "plan.json")
    assert SparsePlan.load(path).to_json() == plan.to_json()
    with pytest.raises(PlanError, match="it exists"):
        plan.save(path)
    plan.save(path, overwrite=True)
    assert not [one for one in path.parent.iterdir() if one.name.startswith(".")]
    with pytest.raises(PlanError, match="cannot be read"):
        SparsePlan.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="no JSON"):
        SparsePlan.load(tmp_path / "bad.json")


def test_the_published_schema_accepts_plans() -> None:
    plan = SparsePlan(MODEL, {place: CHOICES[at % 5] for at, place in enumerate(MODEL.places)})
    jsonschema.validate(json.loads(plan.to_json()), JSON_SCHEMA)


def changed(**changes: object) -> dict[str, object]:
    given = SparsePlan.uniform(MODEL, Streaming(4, 16)).to_dict()
    for path, value in changes.items():
        where, *rest = path.split("__")
        if rest:
            given[where] = {**given[where], rest[0]: value}
        else:
            given[where] = value
    return given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (changed(schema="other"), "headscope-plan"),
        (changed(schema_version=99), "update headscope"),
        (changed(heads=[[0] * 4, [0] * 4]), "one row per layer"),
        (changed(heads=[[0] * 4, [0] * 3, [0] * 2]), "layer 1 with 3 patterns"),
        (changed(heads=[[0] * 4, [0, 0, 7, 0], [0] * 2]), "head 1.2"),
        (changed(model__kv_heads=[2, 3, 1]), "layer 1 with 4 heads and 3 key heads"),
        (changed(model__head_dim=[8, 8]), "there are 3 layers"),
        (changed(patterns=[{"kind": "streaming", "sink": 1, "window": 0}]), "window=0"),
        (changed(patterns=[{"kind": "magic"}]), "'magic'"),
        (changed(patterns=[{"kind": []}]), r"unknown pattern '\[\]'"),
        (changed(patterns=[{"kind": "streaming", "sink": 1, "window": 2, "compensate": None}]), "compensate=None: it is true or false"),
        (changed(patterns=[{"kind": "streaming", "sink": 10**30, "window": 2}]), "2,147,483,647 at most"),
        (changed(model__name=7), "model.name = 7: it is a text"),
        (changed(model__fingerprint=[1]), "model.fingerprint"),
        (changed(model__layers=[0, 0, 2]), "each once, ascending"),
        (changed(model__head_dim=[8, 0, 8]), "model.head_dim 0"),
        ([], "headscope-plan"),
    ],
)
def test_damaged_plans_are_refused_by_name(given: object, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        SparsePlan.from_dict(given)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"schema": ' + "9" * 6000 + "}"])
def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="it is no JSON"):
        SparsePlan.from_json(text)


def test_plans_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match=r"head 2\.0"):
        SparsePlan(MODEL, {**dict.fromkeys(MODEL.places, Dense()), (2, 0): Dense()})
    with pytest.raises(PlanError, match=r"without heads 0\.0"):
        SparsePlan(MODEL, {})
    with pytest.raises(PlanError, match="earlier layer"):
        SparsePlan.uniform(MODEL, Dense()).replace({(1, 0): TopKeys(8, source=(1, 1))})
    with pytest.raises(PlanError, match="length=0"):
        SparsePlan.uniform(MODEL, Dense()).density(0)
    scope = Scope(planted_llama({}, n_heads=4).model, name="live")
    plan = SparsePlan.uniform(scope, Dense())
    plan.check(scope)
    with pytest.raises(PlanError, match="live has layers"):
        SparsePlan.uniform(MODEL, Dense()).check(scope)
    other = planted_llama({}, n_heads=4).model
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(PlanError, match="other weights"):
        plan.check(Scope(other, name="other"))
    plan.check(Scope(other, name="other"), force=True)


def test_heads_of_a_group_need_the_union_of_their_sinks_and_windows():
    """A wide sink beside a wide window: together they keep more than either alone."""
    model = PlanModel("m", (0,), (2,), (1,), (8,))
    plan = SparsePlan(model, {(0, 0): Streaming(64, 256), (0, 1): Streaming(4, 512)})
    rows, keys = torch.tensor([4095]), torch.arange(4096)
    union = plan[0, 0].visible(rows, keys) | plan[0, 1].visible(rows, keys)
    assert plan.cached_keys(4096) == {(0, 0): int(union.sum())} == {(0, 0): 64 + 512}
    assert plan.cached_keys(300) == {(0, 0): 300}
