"""The main flows in a real browser: no console message, no request elsewhere, and the picture shows what the run holds."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from waitress import create_server

from headscope.app.factory import create_app

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--disable-gpu",
]
WAIT = 20_000  # ms; the machine may be busy
MAP_DRAWN = "#map .heatmaplayer image"
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
def base(synthetic) -> Iterator[str]:
    address, server = serve(synthetic.path.parent)
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
    page.click(".run-entry")
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
    assert page.inner_text(".map-badge").split("\n")[0] == "block mass"

    page.click("label:has-text('max')")
    page.click("label:has-text('linear')")
    visit.wait_for_url(r"plane=max&scale=linear")
    expected = synthetic.attention[1, 2, 32:48, 16:32].max()
    visit.until(f"Math.abs(document.querySelector('#map .js-plotly-plot').calcdata[0][0].z[2][1] - {expected}) < 1e-5")
    assert "block max" in page.inner_text(".map-badge")

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


def test_hovering_the_map_names_queries_keys_and_mass(visit: Visit, synthetic) -> None:
    page = visit.page
    visit.go("/run/tiny/head/0/1?scale=linear", MAP_DRAWN)
    box = page.locator("#map .nsewdrag").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * (24 / 200), box["y"] + box["height"] * (152 / 200)
    page.mouse.move(x - 8, y)
    page.mouse.move(x, y)
    page.wait_for_selector(".map-tip .tip-row", timeout=WAIT)
    tip = page.inner_text(".map-tip")
    assert "144 to 159" in tip
    assert "16 to 31" in tip
    shown = float(re.findall(r"mass per query\s+([\d.e-]+)", tip)[0])
    assert shown == pytest.approx(synthetic.attention[0, 1, 144:160, 16:32].sum() / 16, rel=1e-3)


def test_zoom_is_in_the_address_and_double_click_leaves_it(visit: Visit) -> None:
    page = visit.page
    visit.go("/run/tiny/head/0/1?q=50-150&k=0-100", MAP_DRAWN)
    ranges = "(() => { const l = document.querySelector('#map .js-plotly-plot').layout; return [...l.xaxis.range, ...l.yaxis.range]; })()"
    assert page.evaluate(ranges) == [0, 100, 150, 50]
    box = page.locator("#map .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.dblclick(box["x"] + 60, box["y"] + 90)
    visit.wait_for_url(r"/head/0/1$")
    assert page.evaluate(ranges) == [0, 200, 200, 0]


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
    assert page.evaluate("document.querySelector('#map .js-plotly-plot').layout.font.color") == "#5d6878"
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
    visit.go("/run/tiny/head/1/1", MAP_DRAWN)
    titles = visit.page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(button => button.getAttribute('data-title'))")
    assert titles
    assert not [title for title in titles if re.search("share|cloud|edit", title, re.IGNORECASE)]
