"""The main flows in a real browser: no console message, no request elsewhere, and the picture shows what the run holds."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from waitress import create_server

from headscope.app.factory import create_app
from headscope.plans import SparsePlan
from headscope.plans.patterns import Streaming
from headscope.plans.plan import PlanModel
from headscope.store import PictureFacts, Pictures, RunContent, open_run, write_run
from headscope.store.read import read_card
from headscope.store.synthetic import write_synthetic_run

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--enable-precise-memory-info",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--disable-gpu",
]
LAYERS, HEADS = 3, 4
WAIT = 20_000  # ms; the machine may be busy
MAP_DRAWN = ".viewer canvas"
SHARP = "(() => { const v = document.querySelector('.viewer').hsViewer; return v && v.stats.sharp > 0; })()"
GRID_DRAWN = "#grid .heatmaplayer image"
Z_OF_CELL = "([id, row, column]) => document.querySelector(`#${id} .js-plotly-plot`).calcdata[0][0].z[row][column]"


@dataclass
class Visit:
    """A page, the address of the server, and everything that went wrong."""

    page: Page
    base: str
    wrong: list[str] = field(default_factory=list)

    def go(self, path: str, drawn: str) -> None:
        self.page.goto(self.base + path)
        self.page.wait_for_selector(drawn, state="attached", timeout=WAIT)

    def sharp(self) -> None:
        """Waits until every tile in sight is there."""
        self.until(SHARP)

    def viewer(self, expression: str) -> Any:
        """An expression of the viewer `v`."""
        return self.page.evaluate(f"(() => {{ const v = document.querySelector('.viewer').hsViewer; return {expression}; }})()")

    def z(self, graph: str, row: int, column: int) -> float:
        return float(self.page.evaluate(Z_OF_CELL, [graph, row, column]))

    def until(self, expression: str) -> None:
        """Waits until an expression is true in the page; asked from here, since the page's policy forbids it to evaluate strings."""
        end = time.monotonic() + WAIT / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(30)

    def wait_for_url(self, pattern: str) -> None:
        self.page.wait_for_url(re.compile(pattern), timeout=WAIT)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        launched.close()


def serve(path: Path) -> tuple[str, object]:
    server = create_server(create_app(path).server, host="127.0.0.1", port=0, threads=4)
    threading.Thread(target=server.run, daemon=True).start()
    return f"http://127.0.0.1:{server.effective_port}", server


def visit_of(browser: Browser, base: str, scheme: str = "light") -> Visit:
    page = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme).new_page()
    visit = Visit(page, base)
    page.on("console", lambda message: visit.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((base, "data:", "blob:")) else visit.wrong.append(request.url))
    page.on("response", lambda answer: visit.wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    return visit


@pytest.fixture(scope="module")
def root(synthetic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs to look at: a small one, the same with other numbers, one of 2,000 tokens with q and k, one with pictures; and a plan."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(synthetic.path, folder / "tiny")
    card, table = {**read_card(synthetic.path), "files": {}}, synthetic.table.copy()
    table["sink"] = table["sink"][::-1].to_numpy()
    write_run(folder / "after", card, table, open_run(synthetic.path))
    write_synthetic_run(folder / "long", tokens=2000, layers=2, heads=2, kv_heads=1, width=16, block=16)
    model = PlanModel("synthetic", (0, 1), (2, 2), (1, 1), (16, 16))
    SparsePlan.uniform(model, Streaming(4, 100)).save(folder / "stream.json")
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(24), (LAYERS, HEADS, 3)).astype(np.float32)
    facts = PictureFacts("answer", ("two", "red", "cats"), (4, 6), "what is there?", "two red cats")
    picture = Pictures(facts, rng.integers(0, 255, (1, 40, 60, 3), dtype=np.uint8), weights)
    write_run(folder / "seen", card, synthetic.table, RunContent(tuple(range(LAYERS)), pictures=picture))
    return folder


@pytest.fixture(scope="module")
def base(root: Path) -> Iterator[str]:
    address, server = serve(root)
    yield address
    server.close()


@pytest.fixture
def visit(browser: Browser, base: str) -> Iterator[Visit]:
    opened = visit_of(browser, base)
    yield opened
    opened.page.context.close()
    assert opened.wrong == []


def test_from_the_list_to_a_head_and_to_its_neighbours(visit: Visit, run, synthetic) -> None:
    page = visit.page
    visit.go("/", ".run-entry")
    page.click(".run-entry[href='/run/tiny']")
    page.wait_for_selector(GRID_DRAWN, state="attached", timeout=WAIT)
    assert page.inner_text("h1") == "Synthetic-1B"
    assert visit.z("grid", 3, 2) == pytest.approx(run.grid("sink")[2, 3], rel=1e-6)
    page.wait_for_selector(".ag-center-cols-container .ag-row", timeout=WAIT)

    page.click("#metric")
    page.click("[role=option]:has-text('Induction')")
    visit.wait_for_url(r"metric=induction")
    visit.until("document.querySelector('#grid .js-plotly-plot').calcdata[0][0].z[3][2] > 0.89")
    page.click("label:has-text('Induction')")
    visit.wait_for_url(r"roles=induction")

    box = page.locator("#grid .nsewdrag").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * (1.5 / 3), box["y"] + box["height"] * (2.5 / 4)
    page.mouse.move(x - 12, y)
    page.mouse.move(x, y)
    page.wait_for_selector("#grid .hoverlayer text", timeout=WAIT)
    assert "Layer 1 · Head 2" in (page.text_content("#grid .hoverlayer") or "")
    page.mouse.click(x, y)
    page.wait_for_selector(MAP_DRAWN, state="attached", timeout=WAIT)
    visit.wait_for_url(r"/run/tiny/head/1/2$")
    assert page.inner_text("h1") == "Layer 1 · Head 2"
    visit.sharp()
    assert page.inner_text(".map-badge").split("\n")[0] == "block mass"

    page.click("label:has-text('max')")
    page.click("label:has-text('linear')")
    visit.wait_for_url(r"plane=max&scale=linear")
    visit.until("document.querySelector('.map-badge').textContent.startsWith('block max')")
    visit.sharp()
    assert visit.viewer("v.cellOf(40, 20).value") == pytest.approx(synthetic.attention[1, 2, 32:48, 16:32].max(), rel=1e-3)

    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    visit.wait_for_url(r"/head/2/2\?plane=max&scale=linear$")
    page.wait_for_selector("h1:has-text('Layer 2 · Head 2')", timeout=WAIT)
    page.keyboard.press("ArrowRight")  # the border
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("h1:has-text('Layer 2 · Head 1')", timeout=WAIT)
    page.go_back()
    page.wait_for_selector("h1:has-text('Layer 2 · Head 2')", timeout=WAIT)


def test_the_text_shows_shades_and_the_chosen_token(visit: Visit, synthetic) -> None:
    page = visit.page
    visit.go("/run/tiny/head/2/0?token=11", "#strip .tok-chosen")
    assert page.inner_text("#token-facts").startswith("␣<b>sat</b>")
    assert page.locator("#strip .tok").count() == 200
    assert page.locator("#strip b").count() == 0  # the text is text, whatever it holds
    assert "s9" in (page.locator("#strip .tok").first.get_attribute("class") or "")
    page.locator("#strip .tok").nth(21).click()
    visit.wait_for_url(r"token=21$")
    page.wait_for_selector("#token-facts:has-text('token 21')", timeout=WAIT)
    page.wait_for_selector("#lines .scatterlayer .trace", state="attached", timeout=WAIT)
    assert page.evaluate("document.querySelector('#lines .js-plotly-plot').layout.shapes[0].x0") == 21


def middle_of(visit: Visit, query: float, key: float) -> tuple[float, float]:
    """Where a cell is on the page."""
    box = visit.page.locator(".viewer").first.bounding_box()
    assert box is not None
    x, y = visit.viewer(f"[v.box.x + ({key} + 0.5 - v.view.k) / v.view.s, v.box.y + ({query} + 0.5 - v.view.q) / v.view.s]")
    return box["x"] + x, box["y"] + y


def test_hovering_the_map_names_queries_keys_and_mass(visit: Visit, synthetic) -> None:
    page = visit.page
    visit.go("/run/tiny/head/0/1?scale=linear", MAP_DRAWN)
    visit.sharp()
    page.mouse.move(*middle_of(visit, 152, 24))
    visit.until("document.querySelector('.viewer-tip').textContent.includes('cat')")
    tip = page.inner_text(".viewer-tip")
    assert "144 to 159" in tip
    assert "16 to 31" in tip
    shown = float(re.findall(r"mass per query\s+([\d.e-]+)", tip)[0])
    assert shown == pytest.approx(synthetic.attention[0, 1, 144:160, 16:32].sum() / 16, rel=2e-3)
    page.mouse.move(*middle_of(visit, 24, 152))  # above the diagonal there is nothing
    visit.until("document.querySelector('.viewer-tip').hidden")


def test_zoom_is_in_the_address_and_double_click_leaves_it(visit: Visit) -> None:
    page = visit.page
    visit.go("/run/long/head/0/1?q=500-900&k=300-700", MAP_DRAWN)
    visit.sharp()
    q0, q1, k0, k1 = visit.viewer("v.window()")
    assert q0 <= 500 < 900 <= q1
    assert k0 <= 300 < 700 <= k1
    assert max(q1 - q0, k1 - k0) < 700
    page.mouse.dblclick(*middle_of(visit, 700, 500))
    visit.until("document.querySelector('.viewer').hsViewer.isWhole()")
    visit.until("!location.search.includes('q=')")


def test_from_the_whole_map_to_exact_cells_and_to_files(visit: Visit, root: Path) -> None:
    """The flow of a long text: wheel in until the cells are exact, read one, choose it, see its row, save what is in sight."""
    page = visit.page
    visit.go("/run/long/head/1/0?scale=linear", MAP_DRAWN)
    visit.sharp()
    assert page.inner_text(".map-badge").split("\n")[0] != "exact"
    exact = open_run(root / "long").window(1, 0, 1500, 1501, 0, 1501)[0]
    page.mouse.move(*middle_of(visit, 1500, 1400))
    for _ in range(40):
        page.mouse.wheel(0, -150)
        page.wait_for_timeout(15)
    visit.until("document.querySelector('.map-badge').textContent === 'exact'")
    visit.sharp()
    visit.wait_for_url(r"q=\d+-\d+&k=\d+-\d+")
    assert visit.viewer("v.cellOf(1500, 1400).value") == pytest.approx(exact[1400], rel=2e-3)
    page.mouse.click(*middle_of(visit, 1500, 1400))
    visit.wait_for_url(r"token=1500&key=1400")
    page.wait_for_selector("#lines-of-cell .line-title", timeout=WAIT)
    shown = page.inner_text("#lines-of-cell")
    assert "Query 1,500" in shown
    assert "Key 1,400" in shown
    assert f"{int(exact.argmax()):,}" in shown
    page.locator("#lines-of-cell .link-button").first.click()
    visit.until(f"document.querySelector('.viewer').hsViewer.lock[1] === {int(exact.argmax())}")
    visit.sharp()
    for kind in ("json", "svg", "png"):
        with page.expect_download(timeout=WAIT) as download:
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


def test_keys_pan_and_zoom_and_the_first_keys_hide(visit: Visit) -> None:
    page = visit.page
    visit.go("/run/long/head/0/0", MAP_DRAWN)
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


def test_a_plan_lies_over_the_map(visit: Visit) -> None:
    page = visit.page
    visit.go("/run/long/head/0/1?plan=stream", MAP_DRAWN)
    page.wait_for_selector("#plan-note .tag-strong", timeout=WAIT)
    assert "loses" in page.inner_text("#plan-note")
    visit.until("document.querySelector('.viewer').hsViewer.plan.busy() === 0")
    visit.sharp()
    page.mouse.move(*middle_of(visit, 1500, 700))
    visit.until("document.querySelector('.viewer-tip').textContent.includes('plan keeps0 %')")


def test_the_finder_picks_pins_and_opens(visit: Visit) -> None:
    page = visit.page
    visit.go("/run/tiny", GRID_DRAWN)
    page.fill("#find", "layer 1 and induction > 0.3")
    page.wait_for_selector("#picked-note .head-link", timeout=WAIT)
    count = page.locator("#picked-note .head-link").count()
    visit.until(f"document.querySelectorAll('.ag-center-cols-container .ag-row').length === {count}")
    page.click("#pin-picked")
    page.wait_for_selector(".pins li", timeout=WAIT)
    visit.wait_for_url(r"find=layer\+1.*pins=1\.")
    page.fill("#find", "nonsense")
    page.wait_for_selector("#find-note .warning-line", timeout=WAIT)
    page.locator(".pins .head-link").first.click()
    visit.wait_for_url(r"/head/1/\d\?pins=1\.")
    page.wait_for_selector("#pinned-here .head-here", timeout=WAIT)
    page.click("#pin-here")
    visit.until("!document.querySelector('#pinned-here .head-here')")


def test_a_box_in_the_scatter_plot_picks_heads(visit: Visit) -> None:
    page = visit.page
    visit.go("/run/tiny?x=sink&y=induction", "#scatter .scatterlayer .trace")
    box = page.locator("#scatter .nsewdrag").bounding_box()
    assert box is not None
    page.locator("#scatter").scroll_into_view_if_needed()
    box = page.locator("#scatter .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3, steps=4)
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    visit.wait_for_url(r"picked=\d\.\d")
    page.wait_for_selector("#picked-note .head-link", timeout=WAIT)
    page.click("#clear-picked")
    visit.until("!location.search.includes('picked=')")


def test_two_runs_side_by_side(visit: Visit) -> None:
    page = visit.page
    visit.go("/", "#pick-go")
    page.goto(visit.base + "/compare?a=tiny&b=after&metric=sink")
    page.wait_for_selector("#compare-difference .heatmaplayer image", state="attached", timeout=WAIT)
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
    page.wait_for_selector(".warning-line", timeout=WAIT)
    assert "Heads cannot be matched" in page.inner_text(".warning-line")
    page.wait_for_selector("#compare-depth .scatterlayer .trace", state="attached", timeout=WAIT)


def test_a_head_on_a_picture_and_all_of_them(visit: Visit) -> None:
    page = visit.page
    visit.go("/run/seen/head/1/2?frame=1", "#pictures .picture-chosen")
    assert page.inner_text("#pictures .picture-chosen") == "red"
    visit.until("document.querySelector('.picture-say').textContent.includes('word 2 of 3')")
    page.locator(".picture-frame").nth(2).click()
    visit.wait_for_url(r"frame=2")
    page.goto(visit.base + "/run/seen/pictures?frame=2")
    visit.until("((document.getElementById('pictures-all') || {}).hsPictures || {}).data !== undefined")
    page.locator(".picture-all").hover(position={"x": 60, "y": 40})
    page.wait_for_selector(".viewer-tip:not([hidden])", timeout=WAIT)
    assert "Layer 0 · Head 0" in page.inner_text(".viewer-tip")
    page.locator(".picture-all").click(position={"x": 60, "y": 40})
    visit.wait_for_url(r"/run/seen/head/0/0\?frame=2")


def test_a_run_is_uploaded_and_opened(browser: Browser, synthetic, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.make_archive(str(tmp_path / "sent"), "zip", synthetic.path)
    base, server = serve(tmp_path / "runs")
    visit = visit_of(browser, base)
    visit.go("/", "#upload-button")
    with visit.page.expect_file_chooser() as chooser:
        visit.page.click("#upload-button")
    chooser.value.set_files(tmp_path / "sent.zip")
    visit.wait_for_url(r"/run/sent$")
    visit.page.wait_for_selector(GRID_DRAWN, state="attached", timeout=WAIT)
    visit.page.context.close()
    server.close()
    assert visit.wrong == []


def test_the_page_stays_small(visit: Visit) -> None:
    """The browser's heap after looking around in a long map."""
    page = visit.page
    visit.go("/run/long/head/0/0", MAP_DRAWN)
    visit.sharp()
    for step in range(30):
        page.evaluate(f"document.querySelector('.viewer').hsViewer.near({50 * step + 60}, {40 * step})")
        page.wait_for_timeout(20)
    visit.sharp()
    assert page.evaluate("performance.memory.usedJSHeapSize") < 300e6


def test_the_scheme_is_kept_and_figures_follow(browser: Browser, base: str) -> None:
    visit = visit_of(browser, base, "dark")
    page = visit.page
    visit.go("/run/tiny", GRID_DRAWN)
    colour = "document.querySelector('#grid .js-plotly-plot').layout.font.color"
    assert page.evaluate(colour) == "#9aa5b5"
    page.click("#scheme")
    visit.until(f"{colour} === '#5d6878'")
    visit.go("/run/tiny/head/0/0", MAP_DRAWN)
    assert page.evaluate("document.documentElement.getAttribute('data-mantine-color-scheme')") == "light"
    visit.sharp()
    assert visit.viewer("v.palette.scheme") == "light"
    page.click("#scheme")
    visit.until("document.querySelector('.viewer').hsViewer.palette.scheme === 'dark'")
    page.context.close()
    assert visit.wrong == []


def test_damaged_runs_and_wrong_addresses_say_so(browser: Browser, damaged: Path) -> None:
    base, server = serve(damaged)
    visit = visit_of(browser, base)
    visit.go("/run/short", ".state h1")
    assert "cut short" in visit.page.inner_text(".state")
    visit.go("/nowhere", ".state h1")
    assert "nothing at this address" in visit.page.inner_text(".state")
    visit.page.click(".state .button")
    visit.page.wait_for_selector(".run-list", timeout=WAIT)
    assert visit.page.locator(".run-entry").count() == 3
    visit.page.context.close()
    server.close()
    assert visit.wrong == []


def test_no_graph_offers_to_send_its_data_away(visit: Visit) -> None:
    visit.go("/run/tiny/head/1/1", "#lines .modebar-btn")
    titles = visit.page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(button => button.getAttribute('data-title'))")
    assert titles
    assert not [title for title in titles if re.search("share|cloud|edit", title, re.IGNORECASE)]
