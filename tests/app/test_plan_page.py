"""The plan page: what it draws is the plan, what it exports is what the exporter writes, what it keeps is where heads find it."""

from __future__ import annotations

import io
import json
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope.app.factory import create_app
from headscope.app.figures import untyped
from headscope.app.pages import plan as page
from headscope.app.planning.archive import export_zip
from headscope.app.planning.make import keep, make
from headscope.app.planning.methods import methods_for
from headscope.app.runs import Run
from headscope.errors import ExportError, HeadscopeError, PlanError
from headscope.export.registry import FORMATS
from headscope.plans import SparsePlan
from headscope.plans.planners import PLANNERS, plan


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> Path:
    """A runs directory with a profile of the bundled needle model that planners can stand on."""
    root = tmp_path_factory.mktemp("runs")
    scope = hs.load("bundled:needle")
    scope.profile(["streaming", "sink", "duo_surrogate"], context=256, out=root / "needle", progress=False)
    return root


@pytest.fixture
def run(profiled: Path) -> Run:
    return Run("needle", profiled / "needle")


def test_methods_say_what_a_run_lacks(run: Run) -> None:
    found = {one.name: one.lacks for one in methods_for(run.profile())}
    assert set(found) == set(PLANNERS)
    assert found["duo"] == ""
    assert found["razor"] != ""
    for name, lacks in found.items():
        if not lacks and "density" in PLANNERS[name].bounds:
            try:
                kept = make(run, name, "density", 0.9, 2048).density(2048)
            except PlanError as error:  # a threshold whose effect only the model can tell
                kept = 0.0 if "live scope" in str(error) else 2.0
            assert kept <= 0.9 + 1e-9, name


def test_the_page_draws_the_plan_of_the_planner(run: Run) -> None:
    expected = plan(run.profile(), "duo", density=0.5, length=2048)
    figure, told = page.draw(run, "duo", "density", 50, 2048, "light")
    assert np.array_equal(untyped(figure["data"][0]["z"]), expected.densities(2048).T.astype(np.float32))
    assert f"{expected.density(2048):.1%} of the entries" in str(told)
    assert f"{expected.kv_share(2048):.1%} of dense" in str(told)
    assert f"mean {expected.kept_mass(run.profile(), 2048).mean:.2%}" in str(told)
    assert str(expected.patterns[3, 1]) in figure["data"][0]["hovertext"][1][3]


def test_the_same_question_is_answered_once(run: Run) -> None:
    assert make(run, "duo", "density", 0.5, 2048) is make(run, "duo", "density", 0.5, 2048)
    assert make(run, "duo", "cache", 0.5, 2048) is not make(run, "duo", "density", 0.5, 2048)


def test_a_budget_that_cannot_be_met_is_told_in_place_of_the_facts(run: Run) -> None:
    figure, told = page.draw(run, "duo", "density", 1, 2048, "light")
    assert figure["data"] == []
    assert "the leanest plan" in str(told)
    _, told = page.draw(run, "", "density", 50, 2048, "light")
    assert "no measurement" in str(told)
    with pytest.raises(PlanError):
        make(run, "bogus", "density", 0.5, 2048)
    with pytest.raises(PlanError, match="bounded by"):
        make(run, "duo", "bogus", 0.5, 2048)


@pytest.mark.parametrize("name", sorted(name for name, made in FORMATS.items() if made.plans))
def test_the_archive_holds_what_the_exporter_writes(run: Run, tmp_path: Path, name: str) -> None:
    made = make(run, "duo", "density", 0.5, 2048)
    FORMATS[name].write(made, tmp_path / name, lossy=True, length=2048, profile=run.profile())
    content, report = export_zip(made, run, name, lossy=True, length=2048)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = {entry: archive.read(entry) for entry in archive.namelist()}
    assert found == {
        f"{name}/{file.relative_to(tmp_path / name)}": file.read_bytes() for file in (tmp_path / name).rglob("*") if file.is_file()
    }
    assert report.files[0] in {entry.removeprefix(f"{name}/") for entry in found}
    assert export_zip(made, run, name, lossy=True, length=2048)[0] == content


def test_an_unknown_format_and_a_loss_that_was_not_allowed(run: Run) -> None:
    made = make(run, "duo", "density", 0.5, 2048)
    with pytest.raises(ExportError, match="bogus"):
        export_zip(made, run, "bogus", lossy=True, length=2048)
    with pytest.raises(ExportError, match="lossy"):
        export_zip(made, run, "minference", lossy=False, length=2048)


def test_a_kept_plan_is_the_plan_and_stays_inside_the_runs(run: Run, profiled: Path) -> None:
    made = make(run, "duo", "density", 0.5, 2048)
    name = keep(run, made, profiled)
    path = profiled / "plans" / f"{name}.json"
    assert SparsePlan.load(path).to_json() == made.to_json()
    assert name == "needle-duo-density50-2048"
    assert keep(run, made, profiled) == name
    odd = SparsePlan(made.model, made.patterns, "../../odd name", {"density": 0.5, "length": 64})
    assert (profiled / "plans" / f"{keep(run, odd, profiled)}.json").is_file()


def test_addresses_of_anything(run: Run, profiled: Path) -> None:
    app = create_app(profiled)
    for query in (
        {},
        {"method": "duo", "share": "25"},
        {"method": "razor"},
        {"share": "9999"},
        {"length": "x", "bound": ["a"], "format": "../x"},
    ):
        with app.server.test_request_context("/run/needle/plan"):
            assert "Sparse plan of" in str(page.layout("needle", **query))
    with app.server.test_request_context("/run/none/plan"):
        assert "cannot be shown" in str(page.layout("none"))
    assert [page.percent({"share": given}) for given in ("25", "0", "500", "-3", "x", ["5"])] == [25, 1, 100, 50, 50, 50]


@pytest.mark.browser
def test_plan_to_export_and_to_the_map_in_the_browser(profiled: Path) -> None:
    from playwright.sync_api import sync_playwright
    from waitress import create_server

    server = create_server(create_app(profiled).server, host="127.0.0.1", port=0, threads=4)
    threading.Thread(target=server.run, daemon=True).start()
    wrong: list[str] = []
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-gpu"])
        tab = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(f"http://127.0.0.1:{server.effective_port}/run/needle")
        tab.click("#to-plan", timeout=20_000)
        tab.wait_for_selector("#plan-grid .heatmaplayer image", state="attached", timeout=20_000)
        tab.click("#plan-method")
        tab.click("[role=option]:has-text('duo') >> nth=0")
        tab.wait_for_selector("#plan-facts:has-text('duo')", timeout=20_000)
        tab.click("#plan-format")
        tab.click("[role=option]:has-text('headscope')")
        with tab.expect_download(timeout=20_000) as download:
            tab.click("#plan-export")
        with zipfile.ZipFile(download.value.path()) as archive:
            main = next(name for name in archive.namelist() if name.endswith(FORMATS["headscope"].main))
            assert json.loads(archive.read(main))
        tab.wait_for_selector(".plan-loss", timeout=20_000)
        assert "written as planned" in tab.inner_text("#plan-report")
        tab.click("#plan-keep")
        tab.wait_for_selector("#plan-kept-note code", timeout=20_000)
        kept = tab.inner_text("#plan-kept-note code").removeprefix("plans/").removesuffix(".json")
        box = tab.locator("#plan-grid .nsewdrag").bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] * (2.5 / 6), box["y"] + box["height"] * (1.5 / 8)
        tab.mouse.move(x - 12, y)
        tab.mouse.move(x, y)
        tab.wait_for_selector("#plan-grid .hoverlayer text", timeout=20_000)
        tab.mouse.click(x, y)
        tab.wait_for_selector("h1:has-text('Layer 2 · Head 1')", timeout=20_000)
        assert f"plan={kept}" in tab.url
        tab.wait_for_selector("#plan-note:has-text('duo')", timeout=20_000)
        browser.close()
    server.close()
    assert wrong == []


def test_refusals_become_notices(run: Run, profiled: Path) -> None:
    app = create_app(profiled / "needle")
    with app.server.test_request_context("/"):
        name, told = page.keep_plan(1, "needle", "duo", "density", 50, "2048")
        assert name == ""
        assert "opened on one run" in str(told)
        _, told = page.export(1, "needle", "duo", "density", 50, "2048", "minference", False)
        assert f'round it with "{page.ROUND}" ticked' in str(told)
        assert "lossy" not in str(told)
        with pytest.raises(HeadscopeError):
            page.export(1, "other", "duo", "density", 50, "2048", "minference", False)
