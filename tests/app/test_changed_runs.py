"""Runs about pictures from the command line, and runs of a changed model: what the card says is what was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import headscope as hs
from headscope.cli.main import app as command
from headscope.cli.profile_pictures import PictureRun
from headscope.errors import ProbeError
from headscope.interventions import HeadMask, Noise
from headscope.profile import RunCard, compare
from headscope.profile.card import intervention_facts
from headscope.store import open_run
from headscope.store.read import read_card


@pytest.fixture(scope="module")
def needle() -> Any:
    return hs.load("bundled:needle")


def test_a_card_names_what_was_changed_and_the_numbers_are_the_changed_models(needle, tmp_path: Path) -> None:
    ids = torch.arange(5, 165) % 120
    mask = HeadMask(heads=[(2, 0), (3, 1)], mode="zero")
    plain = needle.profile(["sink"], context=160, data=ids, maps=False, progress=False)
    with needle.intervene(mask):
        assert [one.name for one in needle.interventions] == ["head_mask"]
        changed = needle.profile(["sink"], context=160, data=ids, maps=False, out=tmp_path / "masked", progress=False)
    assert needle.interventions == ()
    assert plain.card.interventions == []
    assert [row["name"] for row in changed.card.interventions] == ["head_mask"]
    kept = RunCard.from_dict(read_card(tmp_path / "masked"))
    again = hs.interventions.Intervention.from_json(json.dumps(kept.interventions[0]["specification"]))
    with needle.intervene(again):
        stats = needle.capture(ids, statistics=["sink_importance"])
    layer, head = 3, 0
    row = changed.table[(changed.table["layer"] == layer) & (changed.table["head"] == head)].iloc[0]
    assert row["sink"] == pytest.approx(float(stats["sink_importance"][layer][0, head, 0]), abs=1e-5)
    assert any("head_mask" in line for line in kept.lines())
    assert "measured under no intervention, and under head_mask" in compare(plain, changed).notes


def test_several_interventions_are_named_from_the_outside_in(needle) -> None:
    with needle.intervene(HeadMask(heads=[(1, 0)])), needle.intervene(Noise(heads=[(2, 0)], sigma=0.1)):
        facts = intervention_facts(needle)
        needle.capture(torch.arange(5, 40), statistics=["lse"])
    assert [row["name"] for row in facts] == ["head_mask", "noise"]
    assert all(row["what"] for row in facts)


def test_a_digit_grid_and_its_answer_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "seen"
    done = CliRunner().invoke(command, ["profile", "bundled:vlm", "--pictures", "--answer-tokens", "2", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    found = open_run(out)
    assert found.pictures is not None
    assert found.pictures.facts.kind == "answer"
    assert len(found.pictures.facts.labels) <= 2
    assert {"vision_mass", "vision_focus"} <= set(found.heads.columns)
    assert json.loads(done.stdout)["run"] == str(out)


def test_denoising_steps_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "steps"
    done = CliRunner().invoke(command, ["profile", "bundled:dit", "--pictures", "--steps", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = open_run(out).pictures
    assert found is not None
    assert found.facts.kind == "step"
    assert len(found.facts.labels) == 2


def test_a_specification_from_the_command_line_is_on_the_card(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(HeadMask(heads=[(2, 0)]).to_json())
    text = tmp_path / "text.txt"
    text.write_text("the old tree sleeps . the code of alice is amber falcon river . " * 6)
    arguments = ["profile", "bundled:needle", "--probes", "sink", "--context", "64", "--data", str(text), "--no-maps"]
    done = CliRunner().invoke(command, [*arguments, "--spec", str(spec), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert read_card(tmp_path / "run")["interventions"][0]["specification"]["heads"] == [[2, 0]]


def test_pictures_that_cannot_be_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    here = tmp_path / "a.png"
    here.write_bytes(b"")
    with pytest.raises(ProbeError, match="come together"):
        PictureRun(here, None, 8, 8, 0).check({})
    with pytest.raises(ProbeError, match="no such file"):
        PictureRun(tmp_path / "b.png", "what?", 8, 8, 0).check({})
    with pytest.raises(ProbeError, match="--context, --keep"):
        PictureRun(None, None, 8, 8, 0).check({"--context": True, "--data": False, "--keep": True})
    with pytest.raises(ProbeError, match="count from 1"):
        PictureRun(None, None, 0, 8, 0).check({})


def test_a_language_model_has_no_pictures(needle) -> None:
    with pytest.raises(ProbeError, match="reads no images"):
        PictureRun(None, None, 8, 8, 0).profile(needle)


def test_the_live_page_captures_under_a_change(needle, tmp_path: Path) -> None:
    from headscope.app.live.capture import capture_prompt
    from headscope.app.live.change import Change
    from headscope.app.live.owner import ModelOwner

    owner = ModelOwner(needle)
    try:
        prompt = "the old tree sleeps . the code of alice is amber falcon river . " * 2
        jobs = [
            owner.submit("capture", capture_prompt(prompt, tmp_path / name, stack))
            for name, stack in (("plain", None), ("changed", Change("scale", "2.0, 2.1", strength=0.0).stack()))
        ]
        for job in jobs:
            assert _ended(job)
            assert job.state == "done", job.error
        runs = [open_run(tmp_path / name / job.result) for name, job in zip(("plain", "changed"), jobs, strict=True)]
    finally:
        owner.close()
    assert [len(read_card(run.path)["interventions"]) for run in runs] == [0, 1]
    ours = runs[1].statistic("row/entropy", 3, 0)
    assert not np.allclose(ours, runs[0].statistic("row/entropy", 3, 0))
    np.testing.assert_allclose(runs[1].statistic("row/entropy", 2, 0), runs[0].statistic("row/entropy", 2, 0), atol=1e-5)


def _ended(job: Any) -> bool:
    import time

    until = time.monotonic() + 120
    while not job.ended and time.monotonic() < until:
        time.sleep(0.02)
    return bool(job.ended)
