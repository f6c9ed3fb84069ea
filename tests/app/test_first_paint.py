"""The first paint in a real browser: what is there before the application, in which order things come, and that nothing is lost or moves
when the application takes over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from headscope.app.format import TIMES

pytestmark = pytest.mark.browser

LIBRARY = "/_dash-component-suites/"
BOXES = """root => [...document.querySelectorAll(
    root + ' :is(h1, h2, .panel, .control, .viewer, .header, .small-button, .role-badge, .metrics)')].map(e => {
  const r = e.getBoundingClientRect();
  return [e.tagName + '.' + e.className, r.x, r.y + scrollY, r.width, r.height];
})"""


class Held:
    """A page whose application waits: its first script is held back until `let_go`."""

    def __init__(self, visit: Any, path: str) -> None:
        self.visit, self.page = visit, visit.page
        self.asked: list[str] = []
        self.routes: list[Any] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.route(re.compile(r"deps.polyfill"), lambda route: self.routes.append(route))
        self.page.goto(visit.base + path, wait_until="domcontentloaded")
        self.until("performance.getEntriesByName('headscope-first-page').length")

    def until(self, expression: str) -> None:
        self.visit.until(expression)

    def let_go(self) -> None:
        """The application comes and takes over."""
        self.pop(self.routes).continue_()
        self.until("!document.getElementById('first')")

    def pop(self, routes: list[Any]) -> Any:
        """The first route that was caught, when there is one."""
        for _ in range(500):
            if routes:
                return routes.pop(0)
            self.page.wait_for_timeout(20)
        raise AssertionError("nothing was asked for")


@pytest.fixture
def held(visit) -> Iterator[Any]:
    return lambda path: Held(visit, path)


def test_the_first_page_is_the_page_with_its_numbers(held, synthetic) -> None:
    first = held("/run/tiny/head/1/2?scale=linear")
    page = first.page
    assert page.evaluate("typeof React") == "undefined"
    assert page.inner_text("#first h1") == "Layer 1 · Head 2"
    table = synthetic.table
    sink = float(table[(table["layer"] == 1) & (table["head"] == 2)]["sink"].iloc[0])
    shown = float(page.locator("#first .metrics tr", has_text="Sink").first.locator("td").first.inner_text())
    assert shown == pytest.approx(sink, rel=6e-3)
    first.visit.sharp()
    assert page.inner_text("#first .map-badge").split("\n")[:2] == ["block mass", f"16 {TIMES} 16 tokens a cell"]
    value = first.visit.viewer("v.cellOf(150, 20).value")
    assert value == pytest.approx(synthetic.attention[1, 2, 144:160, 16:32].sum() / 16, rel=2e-3)
    pixels = "document.querySelector('#first .viewer-cells').getContext('2d').getImageData(80, 150, 200, 200).data.buffer"
    assert page.evaluate(f"new Set(new Uint32Array({pixels})).size") > 10
    assert page.evaluate("[...document.querySelectorAll('#first [id]')].length") == 0  # ids belong to the application


def test_the_map_comes_before_the_application_and_plotly_after(held) -> None:
    first = held("/run/long/head/0/0")
    tile = next(at for at, url in enumerate(first.asked) if "/tile/" in url)
    assert not [url for url in first.asked[:tile] if LIBRARY in url]
    first.let_go()
    assert not [url for url in first.asked if "plotly.min" in url]
    first.page.wait_for_selector("#lines .scatterlayer .trace", state="attached", timeout=first.visit.WAIT)
    names = [url.split("?")[0] for url in first.asked]
    assert sum("plotly.min" in name for name in names) == 1
    assert not [name for name in names if "dash_ag_grid" in name or "dash_table" in name]


def test_a_hand_zooms_before_the_application_is_there_and_it_goes_on_from_there(held) -> None:
    first = held("/run/long/head/1/1")
    page, visit = first.page, first.visit
    visit.sharp()
    page.mouse.move(*visit.middle_of(1200, 900))
    for _ in range(25):
        page.mouse.wheel(0, -150)
        page.wait_for_timeout(10)
    first.until("document.querySelector('#first .map-badge').textContent.startsWith('exact')")
    page.click("#first label:has-text('max')")
    page.mouse.click(*visit.middle_of(1200, 900))
    visit.wait_for_url(r"plane=max&q=\d+-\d+&k=\d+-\d+&token=1200&key=900")
    page.keyboard.press("Tab")
    before = visit.viewer("(v.mark = 'same', [v.view.q, v.view.k, v.view.s, v.plane, v.lock])")
    assert page.evaluate("typeof React") == "undefined"
    first.let_go()
    assert visit.viewer("v.mark") == "same"  # the viewer itself went over, with its tiles
    assert visit.viewer("[v.view.q, v.view.k, v.view.s, v.plane, v.lock]") == before
    page.wait_for_selector("#lines-of-cell .line-title:has-text('Query 1,200')", timeout=visit.WAIT)
    assert page.evaluate("document.querySelector('#plane input:checked').value") == "max"
    visit.wait_for_url(r"plane=max&q=\d+-\d+&k=\d+-\d+&token=1200&key=900")
    page.mouse.move(*visit.middle_of(1200, 900))
    page.mouse.wheel(0, 300)
    visit.until(f"document.querySelector('.viewer').hsViewer.view.s > {before[2]}")


def test_what_is_done_after_the_application_asked_is_not_lost(held) -> None:
    """The page that the server sends the application is older than the hand: what was chosen since is put over it."""
    first = held("/run/long/head/0/1")
    page, visit = first.page, first.visit
    visit.sharp()
    asked = []

    def late(route: Any) -> None:
        asked.append(route)

    page.route(re.compile("update-component"), late)
    first.pop(first.routes).continue_()
    answer = first.pop(asked)
    page.click("#first label:has-text('per row')")
    page.click("#first label:has-text('Hide first keys')")
    page.mouse.click(*visit.middle_of(1500, 400))
    page.click("#first .st-scheme")
    page.unroute(re.compile("update-component"))
    for one in (answer, *asked):
        one.continue_()
    visit.until("!document.getElementById('first')")
    assert visit.viewer("[v.scale, v.hidden, v.lock[0]]") == ["row", True, visit.viewer("v.lock[0]")]
    visit.wait_for_url(r"scale=row&sink=hidden&token=\d+&key=\d+")
    visit.until("document.querySelector('#map-scale input:checked').value === 'row'")
    visit.until("document.querySelector('#lines-of-cell .line-title')")
    assert page.evaluate("document.documentElement.getAttribute('data-mantine-color-scheme')") == "dark"


def test_nothing_moves_when_the_application_takes_over(held) -> None:
    first = held("/run/long/head/0/0")
    first.visit.sharp()
    before = first.page.evaluate(BOXES, "#first")
    first.let_go()
    first.visit.sharp()
    after = first.page.evaluate(BOXES, "#react-entry-point")
    assert [name for name, *_ in before] == [name for name, *_ in after]
    assert np.abs(np.array([box for _, *box in before]) - np.array([box for _, *box in after])).max() < 1.5


def test_the_page_stays_where_it_was_scrolled_to(held) -> None:
    first = held("/run/long/head/0/0")
    first.page.evaluate("window.scrollTo(0, 300)")
    first.let_go()
    assert first.page.evaluate("window.scrollY") == 300


def test_the_table_of_heads_is_loaded_by_the_page_that_has_it(held) -> None:
    first = held("/run/tiny/head/0/0")
    page, visit = first.page, first.visit
    first.let_go()
    page.click(".crumbs a[href='/run/tiny']")
    page.wait_for_selector(".ag-center-cols-container .ag-row", timeout=visit.WAIT)
    assert sum("dash_ag_grid.v" in url for url in first.asked) == 1
    page.fill("#find", "layer 1")
    visit.until("document.querySelectorAll('.ag-center-cols-container .ag-row').length === 4")
    page.locator(".ag-pinned-left-cols-container .ag-row input[type=checkbox]").first.click()
    visit.until("!document.getElementById('pin-rows').disabled")


def test_typing_before_the_application_is_there(held) -> None:
    first = held("/run/tiny")
    page, visit = first.page, first.visit
    assert page.inner_text("#first h1") == "Synthetic-1B"
    page.fill("#first input[data-first=find]", "layer 1 and induction > 0.3")
    first.let_go()
    assert page.input_value("#find") == "layer 1 and induction > 0.3"
    assert page.evaluate("document.activeElement.id") == "find"
    page.wait_for_selector("#picked-note .head-link", timeout=visit.WAIT)


@pytest.mark.parametrize(("path", "host"), [("/run/seen/head/1/2?frame=1", "pictures"), ("/run/seen/pictures?frame=2", "pictures-all")])
def test_pictures_are_drawn_first_and_go_over(held, path: str, host: str) -> None:
    first = held(path)
    page = first.page
    first.until(f"document.querySelector('#first [data-id={host}] canvas')")
    page.evaluate(f"document.querySelector('#first [data-id={host}] canvas').mark = 'same'")
    first.let_go()
    first.until(f"(document.querySelector('#{host} canvas') || {{}}).mark === 'same'")
    first.until(f"document.getElementById('{host}').hsPictures.host.id === '{host}'")


def test_links_and_arrow_keys_lead_on_at_once(held) -> None:
    first = held("/run/tiny/head/1/1")
    first.page.keyboard.press("ArrowRight")
    first.visit.wait_for_url(r"/run/tiny/head/2/1")
    assert first.page.inner_text("h1").startswith("Layer 2 · Head 1")


def test_a_script_that_fails_is_said(visit) -> None:
    visit.page.route(re.compile(r"react-dom"), lambda route: route.abort())
    visit.page.goto(visit.base + "/run/tiny/head/0/0")
    visit.page.wait_for_selector("#first .notice:has-text('could not be loaded')", timeout=visit.WAIT)
    assert visit.page.inner_text("#first h1") == "Layer 0 · Head 0"
    visit.wrong.clear()  # the failed request itself
