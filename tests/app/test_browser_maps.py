"""The map, its pair and the pictures in a real browser: what is drawn, read, chosen and saved is what the run holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from headscope.store import open_run

pytestmark = pytest.mark.browser


def test_hovering_the_map_names_queries_keys_and_mass(visit, synthetic) -> None:
    page = visit.page
    visit.go("/run/tiny/head/0/1?scale=linear", visit.MAP)
    visit.sharp()
    page.mouse.move(*visit.middle_of(152, 24))
    visit.until("document.querySelector('.viewer-tip').textContent.includes('cat')")
    tip = page.inner_text(".viewer-tip")
    assert "144 to 159" in tip
    assert "16 to 31" in tip
    shown = float(re.findall(r"mass per query\s+([\d.e-]+)", tip)[0])
    assert shown == pytest.approx(synthetic.attention[0, 1, 144:160, 16:32].sum() / 16, rel=2e-3)
    page.mouse.move(*visit.middle_of(24, 152))  # above the diagonal there is nothing
    visit.until("document.querySelector('.viewer-tip').hidden")


def test_zoom_is_in_the_address_and_double_click_leaves_it(visit) -> None:
    page = visit.page
    visit.go("/run/long/head/0/1?q=500-900&k=300-700", visit.MAP)
    visit.sharp()
    q0, q1, k0, k1 = visit.viewer("v.window()")
    assert q0 <= 500 < 900 <= q1
    assert k0 <= 300 < 700 <= k1
    assert max(q1 - q0, k1 - k0) < 700
    page.mouse.dblclick(*visit.middle_of(700, 500))
    visit.until("document.querySelector('.viewer').hsViewer.isWhole()")
    visit.until("!location.search.includes('q=')")


def test_from_the_whole_map_to_exact_cells_and_to_files(visit, gallery: Path) -> None:
    """The flow of a long text: wheel in until the cells are exact, read one, choose it, see its row, save what is in sight."""
    page = visit.page
    visit.go("/run/long/head/1/0?scale=linear", visit.MAP)
    visit.sharp()
    assert page.inner_text(".map-badge").split("\n")[0] != "exact"
    exact = open_run(gallery / "long").window(1, 0, 1500, 1501, 0, 1501)[0]
    page.mouse.move(*visit.middle_of(1500, 1400))
    for _ in range(40):
        page.mouse.wheel(0, -150)
        page.wait_for_timeout(15)
    visit.until("document.querySelector('.map-badge').textContent === 'exact'")
    visit.sharp()
    visit.wait_for_url(r"q=\d+-\d+&k=\d+-\d+")
    assert visit.viewer("v.cellOf(1500, 1400).value") == pytest.approx(exact[1400], rel=2e-3)
    page.mouse.click(*visit.middle_of(1500, 1400))
    visit.wait_for_url(r"token=1500&key=1400")
    page.wait_for_selector("#lines-of-cell .line-title", timeout=visit.WAIT)
    shown = page.inner_text("#lines-of-cell")
    assert "Query 1,500" in shown
    assert "Key 1,400" in shown
    assert f"{int(exact.argmax()):,}" in shown
    page.locator("#lines-of-cell .link-button").first.click()
    visit.until(f"document.querySelector('.viewer').hsViewer.lock[1] === {int(exact.argmax())}")
    visit.sharp()
    for kind in ("json", "svg", "png"):
        with page.expect_download(timeout=visit.WAIT) as download:
            page.click(f"[data-viewer={kind}]")
        saved = Path(download.value.path())
        assert download.value.suggested_filename.endswith(f".{kind}")
        if kind == "json":
            table = json.loads(saved.read_text())
            assert table["cells"] == "exact weights"
            row = table["values"][1500 - table["first_query"]]
            found = [0 if value is None else value for value in row]
            first = table["first_key"]
            np.testing.assert_allclose(found[: 1501 - first], exact[first : first + len(found)][: 1501 - first], rtol=3e-3, atol=1e-7)
        elif kind == "svg":
            text = saved.read_text()
            assert text.startswith("<svg")
            assert "layer 1, head 0" in text
            assert text.count("<rect") > 500  # few enough cells to be vectors
        else:
            assert saved.read_bytes().startswith(b"\x89PNG")


def test_keys_pan_and_zoom_and_the_first_keys_hide(visit) -> None:
    page = visit.page
    visit.go("/run/long/head/0/0", visit.MAP)
    visit.sharp()
    page.focus(".viewer")
    page.keyboard.press("e")
    visit.until("document.querySelector('.map-badge').textContent.startsWith('exact')")
    before = visit.viewer("v.view.k")
    page.keyboard.press("ArrowLeft")
    visit.until(f"document.querySelector('.viewer').hsViewer.view.k < {before}")
    page.keyboard.press("-")
    page.keyboard.press("0")
    visit.until("document.querySelector('.viewer').hsViewer.isWhole()")
    assert "/run/long/head/0/0" in page.url  # arrows in the map do not leave the head
    page.click("label:has-text('Hide first keys')")
    visit.until("document.querySelector('.map-badge').textContent.includes('keys 0 to')")
    page.click("label:has-text('per row')")
    visit.until("document.querySelector('.map-badge').textContent.includes('largest cell in sight')")
    visit.wait_for_url(r"scale=row&sink=hidden")


def test_a_plan_lies_over_the_map(visit) -> None:
    page = visit.page
    visit.go("/run/long/head/0/1?plan=stream", visit.MAP)
    page.wait_for_selector("#plan-note .tag-strong", timeout=visit.WAIT)
    assert "loses" in page.inner_text("#plan-note")
    visit.until("document.querySelector('.viewer').hsViewer.plan.busy() === 0")
    visit.sharp()
    page.mouse.move(*visit.middle_of(1500, 700))
    visit.until("document.querySelector('.viewer-tip').textContent.includes('plan keeps0 %')")


def test_two_runs_side_by_side(visit) -> None:
    page = visit.page
    visit.go("/", "#pick-go")
    page.goto(visit.base + "/compare?a=tiny&b=after&metric=sink")
    page.wait_for_selector("#compare-difference .heatmaplayer image", state="attached", timeout=visit.WAIT)
    first, second = (visit.z(f"compare-grid-{side}", 3, 2) for side in ("a", "b"))
    assert visit.z("compare-difference", 3, 2) == pytest.approx(second - first, abs=1e-6)
    visit.until("['a', 'b'].every(s => { const v = document.getElementById('viewer-' + s).hsViewer; return v && v.stats.sharp > 0; })")
    page.locator("[data-pair]").nth(2).click()
    name = page.locator("[data-pair]").nth(2).inner_text()
    visit.wait_for_url(rf"head={re.escape(name)}")
    visit.until(f"document.getElementById('pair-view').textContent.includes('Layer {name[0]} · Head {name[2]}')")
    visit.until("['a', 'b'].every(s => { const v = document.getElementById('viewer-' + s).hsViewer; return v && v.stats.sharp > 0; })")
    page.evaluate("document.getElementById('viewer-a').hsViewer.zoom(0.5, 100, 100)")
    visit.until("document.getElementById('viewer-b').hsViewer.view.s === document.getElementById('viewer-a').hsViewer.view.s")
    page.goto(visit.base + "/compare?a=tiny&b=long")
    page.wait_for_selector(".warning-line", timeout=visit.WAIT)
    assert "Heads cannot be matched" in page.inner_text(".warning-line")
    page.wait_for_selector("#compare-depth .scatterlayer .trace", state="attached", timeout=visit.WAIT)


def test_a_head_on_a_picture_and_all_of_them(visit) -> None:
    page = visit.page
    visit.go("/run/seen/head/1/2?frame=1", "#pictures .picture-chosen")
    assert page.inner_text("#pictures .picture-chosen") == "red"
    visit.until("document.querySelector('.picture-say').textContent.includes('word 2 of 3')")
    page.locator(".picture-frame").nth(2).click()
    visit.wait_for_url(r"frame=2")
    page.goto(visit.base + "/run/seen/pictures?frame=2")
    visit.until("((document.getElementById('pictures-all') || {}).hsPictures || {}).data !== undefined")
    page.locator(".picture-all").hover(position={"x": 60, "y": 40})
    page.wait_for_selector(".viewer-tip:not([hidden])", timeout=visit.WAIT)
    assert "Layer 0 · Head 0" in page.inner_text(".viewer-tip")
    page.locator(".picture-all").click(position={"x": 60, "y": 40})
    visit.wait_for_url(r"/run/seen/head/0/0\?frame=2")


def test_a_tile_that_fails_is_named_and_asked_for_again(visit) -> None:
    page = visit.page
    page.route("**/tile/mass/8/**", lambda route: route.fulfill(status=200, body="no tile"))
    visit.go("/run/long/head/0/0", visit.MAP)
    visit.until("document.querySelector('.viewer-note').textContent.length > 0")
    page.unroute("**/tile/mass/8/**")
    page.evaluate("document.querySelector('.viewer').hsViewer.sets.mass.broken.clear()")
    page.evaluate("document.querySelector('.viewer').hsViewer.schedule()")
    visit.sharp()
    visit.until("document.querySelector('.viewer-note').textContent === ''")


def test_the_page_stays_small(visit) -> None:
    """The browser's heap after looking around in a long map."""
    page = visit.page
    visit.go("/run/long/head/0/0", visit.MAP)
    visit.sharp()
    for step in range(30):
        page.evaluate(f"document.querySelector('.viewer').hsViewer.near({50 * step + 60}, {40 * step})")
        page.wait_for_timeout(20)
    visit.sharp()
    assert page.evaluate("performance.memory.usedJSHeapSize") < 300e6
