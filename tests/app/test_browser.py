"""The main flows in a real browser: no console message, no request elsewhere, and the picture shows what the run holds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser


def test_from_the_list_to_a_head_and_to_its_neighbours(visit, run, synthetic) -> None:
    page = visit.page
    visit.go("/", ".run-entry")
    page.click(".run-entry[href='/run/tiny']")
    visit.see(visit.GRID)
    assert page.inner_text("h1") == "Synthetic-1B"
    assert visit.z("grid", 3, 2) == pytest.approx(run.grid("sink")[2, 3], rel=1e-6)
    page.wait_for_selector(".ag-center-cols-container .ag-row", timeout=visit.WAIT)

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
    page.wait_for_selector("#grid .hoverlayer text", timeout=visit.WAIT)
    assert "Layer 1 · Head 2" in (page.text_content("#grid .hoverlayer") or "")
    page.mouse.click(x, y)
    visit.see(visit.MAP)
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
    page.wait_for_selector("h1:has-text('Layer 2 · Head 2')", timeout=visit.WAIT)
    page.keyboard.press("ArrowRight")  # the border
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("h1:has-text('Layer 2 · Head 1')", timeout=visit.WAIT)
    page.go_back()
    page.wait_for_selector("h1:has-text('Layer 2 · Head 2')", timeout=visit.WAIT)


def test_the_text_shows_shades_and_the_chosen_token(visit, synthetic) -> None:
    page = visit.page
    visit.go("/run/tiny/head/2/0?token=11", "#strip .tok-chosen")
    assert page.inner_text("#token-facts").startswith("␣<b>sat</b>")
    assert page.locator("#strip .tok").count() == 200
    assert page.locator("#strip b").count() == 0  # the text is text, whatever it holds
    assert "s9" in (page.locator("#strip .tok").first.get_attribute("class") or "")
    page.locator("#strip .tok").nth(21).click()
    visit.wait_for_url(r"token=21$")
    page.wait_for_selector("#token-facts:has-text('token 21')", timeout=visit.WAIT)
    page.wait_for_selector("#lines .scatterlayer .trace", state="attached", timeout=visit.WAIT)
    assert page.evaluate("document.querySelector('#lines .js-plotly-plot').layout.shapes[0].x0") == 21


def test_the_finder_picks_pins_and_opens(visit) -> None:
    page = visit.page
    visit.go("/run/tiny", visit.GRID)
    page.fill("#find", "layer 1 and induction > 0.3")
    page.wait_for_selector("#picked-note .head-link", timeout=visit.WAIT)
    count = page.locator("#picked-note .head-link").count()
    visit.until(f"document.querySelectorAll('.ag-center-cols-container .ag-row').length === {count}")
    page.click("#pin-picked")
    page.wait_for_selector(".pins li", timeout=visit.WAIT)
    visit.wait_for_url(r"find=layer\+1.*pins=1\.")
    page.fill("#find", "nonsense")
    page.wait_for_selector("#find-note .warning-line", timeout=visit.WAIT)
    page.locator(".pins .head-link").first.click()
    visit.wait_for_url(r"/head/1/\d\?pins=1\.")
    page.wait_for_selector("#pinned-here .head-here", timeout=visit.WAIT)
    page.click("#pin-here")
    visit.until("!document.querySelector('#pinned-here .head-here')")


def test_a_box_in_the_scatter_plot_picks_heads(visit) -> None:
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
    page.wait_for_selector("#picked-note .head-link", timeout=visit.WAIT)
    page.click("#clear-picked")
    visit.until("!location.search.includes('picked=')")


def test_rows_of_the_table_are_ticked_and_pinned(visit) -> None:
    page = visit.page
    visit.go("/run/tiny", ".ag-pinned-left-cols-container .ag-row input[type=checkbox]")
    assert page.is_disabled("#pin-rows")
    for number in range(2):
        page.locator(".ag-pinned-left-cols-container .ag-row input[type=checkbox]").nth(number).click()
    visit.until("!document.getElementById('pin-rows').disabled")
    page.click("#pin-rows")
    visit.wait_for_url(r"pins=\d\.\d,\d\.\d")
    assert "/head/" not in page.url
    visit.until("document.querySelectorAll('.pins li').length === 2")


def test_no_answer_is_larger_than_two_megabytes(visit) -> None:
    sizes = "performance.getEntriesByType('resource').map(entry => [entry.encodedBodySize, entry.name])"
    for path, drawn in (
        ("/run/long", visit.GRID),
        ("/run/long/head/0/1?token=900&key=10", visit.MAP),
        ("/compare?a=tiny&b=after", visit.MAP),
    ):
        visit.go(path, drawn)
        visit.page.wait_for_load_state("networkidle", timeout=visit.WAIT)
        assert max(visit.page.evaluate(sizes))[0] < 2_000_000


def test_a_run_is_uploaded_and_opened(open_visit, serving, synthetic, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.make_archive(str(tmp_path / "sent"), "zip", synthetic.path)
    visit = open_visit(serving(tmp_path / "runs"))
    visit.go("/", "#upload-button")
    with visit.page.expect_file_chooser() as chooser:
        visit.page.click("#upload-button")
    chooser.value.set_files(tmp_path / "sent.zip")
    visit.wait_for_url(r"/run/sent$")
    visit.see(visit.GRID)


def test_the_scheme_is_kept_and_figures_follow(open_visit, gallery_address: str) -> None:
    visit = open_visit(gallery_address, "dark")
    page = visit.page
    visit.go("/run/tiny", visit.GRID)
    colour = "document.querySelector('#grid .js-plotly-plot').layout.font.color"
    assert page.evaluate(colour) == "#9aa5b5"
    page.click("#scheme")
    visit.until(f"{colour} === '#5d6878'")
    visit.go("/run/tiny/head/0/0", visit.MAP)
    assert page.evaluate("document.documentElement.getAttribute('data-mantine-color-scheme')") == "light"
    visit.sharp()
    assert visit.viewer("v.palette.scheme") == "light"
    page.click("#scheme")
    visit.until("document.querySelector('.viewer').hsViewer.palette.scheme === 'dark'")


def test_damaged_runs_and_wrong_addresses_say_so(open_visit, serving, damaged: Path) -> None:
    visit = open_visit(serving(damaged))
    visit.go("/run/short", ".state h1")
    assert "cut short" in visit.page.inner_text(".state")
    visit.go("/nowhere", ".state h1")
    assert "nothing at this address" in visit.page.inner_text(".state")
    visit.page.click(".state .button")
    visit.page.wait_for_selector(".run-list", timeout=visit.WAIT)
    assert visit.page.locator(".run-entry").count() == 3


def test_no_graph_offers_to_send_its_data_away(visit) -> None:
    visit.go("/run/tiny/head/1/1", "#lines .modebar-btn")
    titles = visit.page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(button => button.getAttribute('data-title'))")
    assert titles
    assert not [title for title in titles if re.search("share|cloud|edit", title, re.IGNORECASE)]
