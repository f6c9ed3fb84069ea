"""Profile -> format -> profile keeps what the format can express, for random plans and scores, for every format."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headscope.errors import ExportError
from headscope.export import FORMATS, JSON_SCHEMA, read
from headscope.export.base import Export, Format
from headscope.export.imported import Found, profile_of
from headscope.export.words import same
from headscope.plans import Dense, PlanModel, SparsePlan, Streaming
from headscope.profile import HeadProfile

from .plan_cases import ANY, GROUPED, LENGTH, STATIC, WHOLE, alike, close, plans

PLANS = [one for one in FORMATS.values() if one.plans]
SCORES = [one for one in FORMATS.values() if one.metrics and one.name != "headscope"]
COUNT = itertools.count()
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fresh(tmp_path: Path) -> Path:
    return tmp_path / f"out{next(COUNT)}"


def fitted(form: Format, plan: SparsePlan) -> SparsePlan:
    found = form.fit(plan, Export(plan.model, plan, length=LENGTH))
    return SparsePlan(plan.model, found.patterns)


def scored(scores: dict[str, dict[tuple[int, int], float]], model: PlanModel = GROUPED) -> HeadProfile:
    """A profile with these metrics."""
    return profile_of(Found(model, None, scores), "headscope", Path("test"), None)


def values(profile: HeadProfile, metric: str, model: PlanModel) -> dict[tuple[int, int], float]:
    return {place: profile.value(*place, metric) for place in model.places}


@pytest.mark.parametrize("form", PLANS, ids=lambda one: one.name)
@QUICK
@given(plan=plans())
def test_what_a_format_holds_comes_back(form: Format, plan: SparsePlan, tmp_path: Path) -> None:
    """decode(encode(fit(plan))) is fit(plan), head by head; fitting it again changes nothing; the file says so without the report, too."""
    out = fresh(tmp_path)
    report = form.write(plan, out, lossy=True, length=LENGTH)
    wanted = fitted(form, plan)
    found = form.read(out).plan_found
    assert found is not None
    assert found.model == plan.model
    for place in plan.model.places:
        assert alike(found[place], wanted[place]), place
    again = fitted(form, found)
    assert all(alike(again[place], found[place]) for place in plan.model.places)
    (out / "headscope.json").unlink()
    alone = form.read(out, like=plan.model, length=LENGTH).plan_found
    assert alone is not None
    assert all(alike(alone[place], wanted[place]) for place in plan.model.places)
    assert [one.changed for one in report.heads] == [not same(wanted[place], plan[place]) for place in plan.model.places]


@pytest.mark.parametrize("form", PLANS, ids=lambda one: one.name)
@QUICK
@given(plan=plans())
def test_rounding_up_loses_no_key(form: Format, plan: SparsePlan) -> None:
    """A target that cannot hold a window gets a larger one; so with sinks, but for transformers, which has none, and MoA, which has 64."""
    wanted = fitted(form, plan)
    for place, pattern in plan.patterns.items():
        asked, now = pattern.fixed(LENGTH), wanted[place].fixed(LENGTH)
        if isinstance(asked, Streaming) and isinstance(now, Streaming):
            assert now.window >= min(asked.window, LENGTH)
            assert now.sink >= asked.sink or form.name in ("transformers", "moa")


@pytest.mark.parametrize("form", PLANS, ids=lambda one: one.name)
def test_equal_exports_have_equal_bytes(form: Format, tmp_path: Path) -> None:
    plan = SparsePlan.uniform(WHOLE, Dense()).replace({(0, 1): Streaming(64, 257), (1, 2): Streaming(4, 30)})
    first, second = tmp_path / "a", tmp_path / "b"
    for out in (first, second):
        form.write(plan, out, lossy=True, length=LENGTH)
    names = sorted(one.name for one in first.iterdir())
    assert names == sorted(one.name for one in second.iterdir())
    assert {"README.md", "loss.txt", "headscope.json", form.main} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("form", SCORES, ids=lambda one: one.name)
@QUICK
@given(data=st.data())
def test_scores_come_back_to_the_last_bit(form: Format, data: st.DataObject, tmp_path: Path) -> None:
    """Formats with a score per key head take the largest of a group, and are refused where heads of one differ unless lossy."""
    metric = form.metrics[0]
    groups = form.name != "retrieval-head"
    numbers = st.floats(0, 1)
    scores = {place: data.draw(numbers) for place in GROUPED.places}
    if groups:
        scores = {(layer, head): scores[layer, head // 2 * 2] for layer, head in GROUPED.places}
    out = fresh(tmp_path)
    report = form.write(scored({metric: scores}), out)
    assert report.lossless
    assert report.content == "scores"
    found = form.read(out)
    if metric in found.metrics:
        assert close(values(found, metric, GROUPED), scores)
    else:
        assert close(values(found, "retrieval", GROUPED), scores)
    once = form.write(found, fresh(tmp_path))
    assert once.lossless


def test_groups_whose_scores_differ_are_refused_unless_lossy(tmp_path: Path) -> None:
    scores = {(layer, head): head / 10 for layer, head in GROUPED.places}
    profile = scored({"duo_gate": scores})
    with pytest.raises(ExportError, match=r"head 0\.0 with 0\.0 as duo-attention.*largest of its query heads.*--lossy"):
        profile.export("duo-attention", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = profile.export("duo-attention", tmp_path / "out", lossy=True)
    found = read(tmp_path / "out", "duo-attention")
    assert values(found, "duo_gate", GROUPED) == {(layer, head): (head // 2 * 2 + 1) / 10 for layer, head in GROUPED.places}
    assert len(report.changed) == 6


@QUICK
@given(plan=plans(ANY), scores=st.lists(st.one_of(st.floats(allow_infinity=False), st.just(float("nan"))), min_size=12, max_size=12))
def test_headscope_json_keeps_everything(plan: SparsePlan, scores: list[float], tmp_path: Path) -> None:
    model = plan.model
    metric = {place: scores[number % 12] for number, place in enumerate(model.places)}
    source = profile_of(Found(model, plan, {"one": metric, "two": dict.fromkeys(model.places, 2.0)}), "headscope", Path("x"), LENGTH)
    out = fresh(tmp_path)
    report = source.export("headscope", out, length=LENGTH)
    assert report.lossless
    document = json.loads((out / "profile.json").read_text())
    jsonschema.validate(document, json.loads((out / "schema.json").read_text()))
    assert json.loads((out / "schema.json").read_text()) == JSON_SCHEMA
    found = read(out, "headscope")
    assert found.plan_found is not None
    assert found.plan_found.patterns == plan.patterns
    assert close(values(found, "one", model), metric)
    assert close(values(found, "two", model), values(source, "two", model))


def test_a_plan_json_is_read_as_headscope_json(tmp_path: Path) -> None:
    plan = SparsePlan.uniform(GROUPED, Streaming(4, 16))
    path = plan.save(tmp_path / "plan.json")
    found = read(path, "headscope", length=LENGTH)
    assert found.plan_found is not None
    assert found.plan_found.to_json() == plan.to_json()


@pytest.mark.parametrize("form", PLANS, ids=lambda one: one.name)
def test_an_import_is_shown_saved_loaded_and_exported_again(form: Format, tmp_path: Path) -> None:
    """The plan travels through a run directory, and the second export has the bytes of the first."""
    plan = SparsePlan.uniform(WHOLE, Streaming(64, 257)).replace({(0, 1): Dense()})
    form.write(plan, tmp_path / "first", lossy=True, length=LENGTH)
    found = form.read(tmp_path / "first")
    assert "<table" in found._repr_mimebundle_()["text/html"]
    assert found.plot("kept_share").data
    found.save(tmp_path / "run")
    loaded = HeadProfile.load(tmp_path / "run")
    assert loaded.card.lines()
    report = loaded.export(form.name, tmp_path / "second", length=LENGTH)
    assert report.lossless
    assert (tmp_path / "second" / form.main).read_bytes() == (tmp_path / "first" / form.main).read_bytes()


@settings(max_examples=30, deadline=None)
@given(pattern=STATIC)
def test_every_static_pattern_is_its_tables(pattern: object) -> None:
    """The three tables that FlexAttention's masks look keys up in are the pattern, entry by entry."""
    import numpy as np

    from headscope.export.masks import tables
    from headscope.plans import Pattern

    from .plan_cases import mask

    assert isinstance(pattern, Pattern)
    found = tables(pattern, LENGTH)
    assert found is not None
    at = np.arange(LENGTH)
    assert np.array_equal(found.visible(at, at), mask(pattern, LENGTH).numpy())
