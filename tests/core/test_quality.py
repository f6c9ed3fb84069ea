"""The quality bench: dense rows equal the model's own evaluation, what is kept is what ran, plans that keep everything change nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import headscope as hs
from headscope.bench import quality
from headscope.bench.quality_figure import draw, tables, value
from headscope.errors import PlanError
from headscope.plans import Budget, Dense, PlanModel, SparsePlan, Streaming, TopKeys, VerticalSlash
from headscope.scope import Scope

LENGTH, COUNT = 192, 3


@pytest.fixture(scope="module")
def needle() -> Scope:
    return hs.load("bundled:needle")


@pytest.fixture(scope="module")
def task() -> quality.Task:
    return quality.needle_task(LENGTH, COUNT)


def test_dense_accuracy_is_that_of_the_models_own_evaluation(needle: Scope, task: quality.Task) -> None:
    from headscope.models.bundled.evaluate_needle import right

    row = quality.run(needle, task, None, size=2)
    for kind in ("code", "entry"):
        hits, _ = right(needle.model, kind, LENGTH, COUNT)
        assert row[kind] == pytest.approx(float(hits.double().mean()))
    assert row["haystacks"] == 2 * COUNT
    assert row["density"] == row["read"] == row["cache"] == 1.0


def test_plans_that_keep_everything_change_nothing_and_streaming_does(needle: Scope, task: quality.Task) -> None:
    dense = quality.run(needle, task, None, size=3)
    for pattern in (TopKeys(LENGTH), Budget(LENGTH)):
        row = quality.run(needle, task, SparsePlan.uniform(needle, pattern), size=3)
        assert row["accuracy"] == dense["accuracy"]
        assert row["density"] == pytest.approx(1.0)
        assert row["read"] == pytest.approx(1.0)
    short = quality.run(needle, task, SparsePlan.uniform(needle, Streaming(2, 8)), size=3)
    assert short["accuracy"] == 0.0, "no head can see the needle, so no answer can be right"
    assert short["density"] < 0.15
    assert short["read"] == pytest.approx(10 / LENGTH, rel=0.05)


def test_what_ran_is_what_is_counted(needle: Scope, task: quality.Task) -> None:
    """Densities of the first sequence, by hand from the patterns."""
    model = PlanModel.of(needle)
    patterns = {place: Streaming(4, 20) if place[1] % 2 else Dense() for place in model.places}
    row = quality.run(needle, quality.Task("one", task.prompts[:1], task.answers[:1], ("code",), LENGTH), SparsePlan(model, patterns))
    tokens, words = len(task.prompts[0]), len(task.answers[0])
    assert row["density"] == pytest.approx((1 + Streaming(4, 20).density(tokens)) / 2)
    steps = range(tokens + 1, tokens + words)  # the last word of an answer is never fed
    assert row["read"] == pytest.approx(sum(n + 24 for n in steps) / sum(2 * n for n in steps))
    assert row["cache"] == pytest.approx(1.0), "each key head has a query head that needs every key"


def test_keys_read() -> None:
    assert quality.keys_read(Dense(), 100) == 100
    assert quality.keys_read(Streaming(4, 20), 100) == 24
    assert quality.keys_read(TopKeys(10, window=5), 100) == 15
    assert quality.keys_read(TopKeys(10, full=True), 100) == 100
    assert quality.keys_read(VerticalSlash(10, 20), 100) == 100
    assert quality.keys_read(Budget(10, window=8), 100) == 18


def test_padded_batches_answer_like_single_ones(needle: Scope, task: quality.Task) -> None:
    plan = SparsePlan.uniform(needle, VerticalSlash(40, 60, sink=4, window=16))
    one, many = (quality.run(needle, task, plan, size=size) for size in (1, 3))
    assert len({len(prompt) for prompt in task.prompts[:COUNT]}) > 1, "without padding there is nothing to test"
    assert (one["code"], one["entry"]) == (many["code"], many["entry"])


def test_perplexity_is_the_models_loss(smollm2: Scope) -> None:
    task = quality.text_task(smollm2, 96, 1)
    row = quality.run(smollm2, task, None)
    ids = torch.cat([task.prompts[0], task.answers[0]])[None]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(smollm2.model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
    prompt = len(task.prompts[0])
    assert (prompt, len(task.answers[0])) == (72, 24)
    assert row["nll_decode"] == pytest.approx(float(losses[prompt - 1 :].mean()), abs=1e-4)
    assert row["nll_prefill"] == pytest.approx(float(losses[prompt // 2 - 1 : prompt - 1].mean()), abs=1e-4)


def test_points_say_why_there_is_none(needle: Scope, task: quality.Task) -> None:
    bench = quality.Bench(needle, task)
    assert "does not act" in bench.point("power", "decode", 0.5)["reason"]
    assert "keeps" in bench.point("power", "prefill", 0.01)["reason"]
    assert "every key" in bench.point("tidal", "decode", 0.1)["reason"]
    row = bench.point("tidal", "decode", 0.6)
    assert row["read"] == pytest.approx(0.6, abs=0.02)
    assert row["density"] == 1.0
    with pytest.raises(PlanError, match="duoo"):
        quality.check_methods(["duoo"])
    with pytest.raises(PlanError, match="sparse-d"):
        quality.check_methods(["sparse-d"])


def test_figure_and_tables_hold_every_point(needle: Scope, task: quality.Task) -> None:
    rows = quality.Bench(needle, task).table(["power", "tidal"], (0.9,))
    result = {"results": [{"model": "bundled:needle", "task": task.name, "length": LENGTH, "count": COUNT, "device": "cpu", "rows": rows}]}
    figure = draw(result)
    drawn = {(trace.name, x, y) for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True)}
    expected = {
        (row["method"], row["density" if row["phase"] == "prefill" else "read"], row["accuracy"])
        for row in rows
        if row["method"] != "dense" and "reason" not in row
    }
    assert drawn == expected
    assert len(expected) == 2
    (block,) = tables(result)
    assert len(block["rows"]) == len(rows) == 2 + 4
    assert value({"phase": "decode", "nll_decode": 2.0, "nll_prefill": 1.0}, {}) == pytest.approx(math.exp(2.0))


def test_the_command(tmp_path: Path) -> None:
    from headscope.cli.main import app

    asked = "--methods power --densities 0.6 --phases prefill --length 256 --count 1 --json".split()  # noqa: SIM905
    files = ["--out", str(tmp_path / "q.json"), "--figure", str(tmp_path / "q.html")]
    ran = CliRunner().invoke(app, ["bench", "quality", "bundled:needle", *asked, *files])
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    (one,) = result["results"]
    assert [(row["method"], row["phase"]) for row in one["rows"]] == [("dense", "prefill"), ("power", "prefill")]
    assert one["rows"][1]["density"] <= 0.66  # of the prompt, which is shorter than the text that the plan is for
    assert json.loads((tmp_path / "q.json").read_text()) == result
    assert "plotly" in (tmp_path / "q.html").read_text()
