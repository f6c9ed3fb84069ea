"""The attention map: cells against the matrix they were made from, levels, windows, and the badge that says what is shown."""

from __future__ import annotations

import numpy as np
import pytest

from headscope.app.components import block_map
from headscope.app.figures import untyped
from headscope.app.runs import Level

LEVELS = [Level(0, 128, 1024), Level(1, 256, 512), Level(2, 512, 256), Level(3, 1024, 128)]


def expected_cells(matrix: np.ndarray, block: int, plane: str) -> np.ndarray:
    """The map by two plain loops: mass per query row of the block, or the largest weight; NaN where no query sees a key."""
    tokens = len(matrix)
    cells = -(-tokens // block)
    out = np.full((cells, cells), np.nan)
    for row in range(cells):
        queries = range(row * block, min((row + 1) * block, tokens))
        for column in range(row + 1):
            part = matrix[queries.start : queries.stop, column * block : (column + 1) * block]
            out[row, column] = part.sum() / len(queries) if plane == "mass" else part.max()
    return out


@pytest.mark.parametrize("plane", ["mass", "max"])
def test_cells_are_those_of_the_matrix(run, synthetic, plane: str) -> None:
    view = block_map.map_view(run, 1, 2, plane, hide_sink=False)
    np.testing.assert_allclose(view.values, expected_cells(synthetic.attention[1, 2], 16, plane), rtol=2e-6)
    figure = block_map.map_figure(run, view, plane, "linear", "light")
    np.testing.assert_array_equal(untyped(figure["data"][0]["z"]), view.values)
    assert figure["data"][0]["zsmooth"] is False


def test_a_row_of_the_mass_map_adds_up_to_one(run) -> None:
    view = block_map.map_view(run, 0, 0, "mass", hide_sink=False)
    np.testing.assert_allclose(np.nansum(view.values, axis=1), 1, rtol=1e-5)


def test_the_log_scale_is_log10_over_five_decades(run) -> None:
    view = block_map.map_view(run, 2, 0, "max", hide_sink=False)
    heat = block_map.map_figure(run, view, "max", "log", "dark")["data"][0]
    z, known = untyped(heat["z"]), np.isfinite(view.values)
    top = np.log10(np.nanmax(view.values))
    np.testing.assert_allclose(z[known], np.maximum(np.log10(view.values[known]), top - 5), rtol=1e-5)
    assert np.isnan(z[~known]).all()
    assert (heat["zmin"], heat["zmax"]) == pytest.approx((top - 5, top))
    assert set(heat["colorbar"]["tickvals"]) <= set(range(int(np.floor(top - 5)), int(np.ceil(top)) + 1))


def test_hiding_the_first_keys_takes_them_out_of_the_colours(run, synthetic) -> None:
    shown = block_map.map_view(run, 2, 3, "mass", hide_sink=False)
    hidden = block_map.map_view(run, 2, 3, "mass", hide_sink=True)
    assert np.isnan(hidden.values[:, 0]).all()
    np.testing.assert_array_equal(hidden.values[:, 1:], shown.values[:, 1:])
    high = block_map.map_figure(run, hidden, "mass", "linear", "light")["data"][0]["zmax"]
    assert high == pytest.approx(np.nanmax(expected_cells(synthetic.attention[2, 3], 16, "mass")[:, 1:]), rel=1e-5)
    assert "keys 0 to 15 hidden" in block_map.badge(hidden, "mass", 2, True)


def test_the_badge_says_what_a_cell_is(run) -> None:
    view = block_map.map_view(run, 0, 0, "max", hide_sink=False)
    assert block_map.badge(view, "max", 2, False) == ["block max", "16 \u00d7 16 tokens a cell", "level 1 of 2", "13 \u00d7 13 cells"]


@pytest.mark.parametrize(
    ("window", "level"),
    [
        ((0, 131072, 0, 131072), 1),
        ((0, 65536, 0, 65536), 0),
        ((0, 65537, 0, 100), 1),
        ((1, 65537, 0, 100), 1),
        ((0, 65536, 65536, 131072), 0),
        ((500, 501, 0, 1), 0),
    ],
)
def test_the_finest_level_that_fits_is_picked(window: block_map.Window, level: int) -> None:
    assert block_map.pick_level(LEVELS, window).index == level


def test_the_coarsest_level_is_used_where_nothing_fits() -> None:
    assert block_map.pick_level(LEVELS, (0, 131072, 0, 131072), budget=64).index == 3
    assert block_map.pick_level(LEVELS, (0, 131072, 0, 131072), budget=256).index == 2


def test_a_window_shows_its_cells_at_their_place(run, synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_map, "pick_level", lambda levels, window: levels[0] if window[1] - window[0] < 100 else levels[1])
    view = block_map.map_view(run, 1, 1, "mass", hide_sink=False, window=(100, 150, 40, 90))
    assert view.level.block == 16
    assert view.window == (96, 160, 32, 96)
    whole = expected_cells(synthetic.attention[1, 1], 16, "mass")
    np.testing.assert_allclose(view.values, whole[6:10, 2:6], rtol=2e-6)
    heat = block_map.map_figure(run, view, "mass", "linear", "light")["data"][0]
    assert (heat["x0"], heat["dx"], heat["y0"], heat["dy"]) == (40, 16, 104, 16)
    coarse = block_map.map_view(run, 1, 1, "mass", hide_sink=False)
    np.testing.assert_allclose(coarse.values, expected_cells(synthetic.attention[1, 1], 32, "mass"), rtol=2e-6)


def test_a_small_map_keeps_all_cells_when_it_is_zoomed(run) -> None:
    view = block_map.map_view(run, 1, 1, "mass", hide_sink=False, window=(100, 150, 40, 90))
    assert view.values.shape == (13, 13)
    layout = block_map.map_figure(run, view, "mass", "linear", "light")["layout"]
    assert layout["xaxis"]["range"] == [40, 90]
    assert layout["yaxis"]["range"] == [150, 100]


def test_zoom_events_become_windows() -> None:
    event = {"xaxis.range[0]": 10.2, "xaxis.range[1]": 99.1, "yaxis.range[0]": 250.0, "yaxis.range[1]": -4.0}
    assert block_map.window_of(event, 200) == (0, 200, 10, 100)
    assert block_map.window_of({"xaxis.range": [5, 6], "yaxis.range": [3, 2]}, 200) == (2, 3, 5, 6)
    assert block_map.window_of({"xaxis.autorange": True}, 200) is None
    with pytest.raises(KeyError):
        block_map.window_of({"autosize": True}, 200)


def test_the_hover_knows_the_words_of_a_block(run, synthetic) -> None:
    view = block_map.map_view(run, 0, 0, "mass", hide_sink=False)
    meta = block_map.map_figure(run, view, "mass", "log", "light")["layout"]["meta"]
    assert len(meta["rows"]) == len(meta["columns"]) == 13
    assert meta["rows"][0].startswith("␣the␣cat⏎")
    assert len(meta["rows"][0]) <= 24
