"""The layer x head grid and the ordered heads: the numbers that the figures hold."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from headscope.app import theme
from headscope.app.components import role_legend
from headscope.app.components.head_grid import colour_range, grid_figure, uncommon
from headscope.app.components.head_table import table_columns, table_metrics, table_rows
from headscope.app.components.sorted_heads import sorted_figure
from headscope.app.figures import typed, untyped
from headscope.app.metrics import describe, grouped
from headscope.app.ranks import descending_ranks, rank_share


def test_the_grid_shows_the_metric_with_layers_across(run, synthetic) -> None:
    figure = grid_figure(run, describe(run.card, "distance"), "value", [], "light")
    heat = figure["data"][0]
    expected = synthetic.table["distance"].to_numpy(dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(untyped(heat["z"]), expected)
    assert heat["x"] == [0, 1, 2]
    assert heat["y"] == [0, 1, 2, 3]
    assert (heat["zmin"], heat["zmax"]) == pytest.approx((expected.min(), expected.max()))


def test_ranks_colour_by_place_among_all_heads(run) -> None:
    heat = grid_figure(run, describe(run.card, "induction"), "rank", [], "dark")["data"][0]
    expected = scipy.stats.rankdata(run.grid("induction").T) / 12
    np.testing.assert_allclose(untyped(heat["z"]), expected.reshape(4, 3), rtol=1e-6)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [1.0, 1.0, 0.0, 5.0], [float("nan"), 2.0, float("nan"), 2.0]])
def test_ranks_count_from_the_largest_and_leave_nan(values: list[float]) -> None:
    array = np.array(values)
    known = ~np.isnan(array)
    np.testing.assert_array_equal(descending_ranks(array)[known], scipy.stats.rankdata(-array[known], method="min"))
    assert np.isnan(descending_ranks(array)[~known]).all()
    assert np.nanmax(rank_share(array)) == 1.0


def test_choosing_a_role_fades_exactly_the_other_heads(run) -> None:
    figure = grid_figure(run, describe(run.card, "sink"), "value", ["induction"], "light")
    fade = np.array(figure["data"][1]["z"], dtype=float)  # [heads, layers], NaN where nothing is drawn
    kept = {(layer, head) for head, layer in zip(*np.nonzero(np.isnan(fade)), strict=True)}
    assert kept == set(run.roles["induction"])
    symbols = figure["data"][2]
    assert [trace["name"] for trace in figure["data"][2:]] == ["induction"]
    assert list(zip(symbols["x"], symbols["y"], strict=True)) == [place for place in run.reasons if place in kept]


def test_symbols_of_several_roles_stay_in_their_cell(run) -> None:
    roles = list(run.roles)
    traces = grid_figure(run, describe(run.card, "sink"), "value", roles, "light")["data"][2:]
    drawn = {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in traces}
    for role, places in drawn.items():
        assert {(round(x), round(y)) for x, y in places} == set(run.roles[role])
    everything = [place for places in drawn.values() for place in places]
    assert len(set(everything)) == len(everything)


def test_only_uncommon_roles_are_drawn_until_one_is_chosen(run) -> None:
    traces = grid_figure(run, describe(run.card, "sink"), "value", [], "light")["data"][1:]
    assert [trace["name"] for trace in traces] == uncommon(run)
    for role in uncommon(run):
        assert len(run.roles[role]) <= 0.15 * 12
    assert "induction" not in uncommon(run)


def test_hover_tells_value_rank_roles_and_why(run) -> None:
    text = grid_figure(run, describe(run.card, "induction"), "value", [], "light")["data"][0]["hovertext"][3][2]
    assert "Layer 2 · Head 3" in text
    assert "Induction <b>0.900</b> · rank 1 of 12" in text
    assert "induction 0.90 > 0.4" in text


def test_colours_are_symmetric_for_signed_metrics_and_start_at_zero_for_shares() -> None:
    assert colour_range(np.array([0.2, 0.8])) == (0.0, 0.8, False)
    assert colour_range(np.array([-3.0, 1.0, np.nan])) == (-3.0, 3.0, True)
    assert colour_range(np.array([3.0, 7.0])) == (3.0, 7.0, False)
    assert colour_range(np.array([np.nan])) == (0.0, 1.0, False)
    low, high, _ = colour_range(np.array([5.0, 5.0]))
    assert low < high


def test_ordered_heads_fall_and_know_their_place(run) -> None:
    figure = sorted_figure(run, describe(run.card, "receiver"), ["induction"], "light")
    values = untyped(figure["data"][0]["y"])
    assert (np.diff(values) <= 0).all()
    for rank, (layer, head) in enumerate(figure["data"][0]["customdata"]):
        assert values[rank] == np.float32(run.grid("receiver")[layer, head])
    marked = figure["data"][1]
    assert len(marked["x"]) == len(run.roles["induction"])
    assert all(values[x - 1] == np.float32(y) for x, y in zip(marked["x"], marked["y"], strict=True))


def test_the_table_holds_every_head_with_the_chosen_metric_first(run, synthetic) -> None:
    metrics = table_metrics(run, "induction")
    assert metrics == ["induction", "sink", "distance", "receiver"]
    rows = table_rows(run, metrics)
    assert len(rows) == 12
    assert [row["m0"] for row in rows] == pytest.approx(synthetic.table["induction"].to_numpy(), rel=1e-3)
    assert rows[-1]["roles"].split(", ") == [role.replace("_", " ") for role in run.reasons[2, 3]]
    columns = {column["headerName"]: column for column in table_columns(run, metrics)}
    assert columns["Induction"]["sort"] == "desc"
    assert columns["Sink"]["sort"] is None


def test_a_metric_is_described_by_the_card_and_its_probe(run) -> None:
    sink = describe(run.card, "sink")
    assert sink.unit == "probability"
    assert sink.source == "arXiv:2410.10781"
    assert "High: a sink." in sink.meaning
    assert describe(run.card, "fai_band").label == "FAI band"
    assert describe({}, "something_new") == describe({"metrics": {}}, "something_new")
    names = [item["value"] for group in grouped(run.card, run.metrics) for item in group.get("items", [group])]
    assert sorted(names) == sorted(run.metrics)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8"])
def test_typed_arrays_are_exact(dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    np.testing.assert_array_equal(untyped(typed(array)), array)
    assert typed(array)["shape"] == "3, 4"
    assert "shape" not in typed(array[0])


def lightness(colour: str) -> float:
    """CIE L* of a colour."""
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


@pytest.mark.parametrize(("scheme", "sign"), [("light", -1), ("dark", 1)])
def test_the_sequential_scale_reads_in_grey(scheme: theme.Scheme, sign: int) -> None:
    steps = np.diff([lightness(colour) for _, colour in theme.colourscale(scheme)]) * sign
    assert (steps > 3).all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_signed_scale_is_extreme_at_both_ends(scheme: theme.Scheme) -> None:
    values = [lightness(colour) for _, colour in theme.colourscale(scheme, signed=True)]
    middle = values[len(values) // 2]
    distances = [abs(value - middle) for value in values]
    assert distances[:4] == sorted(distances[:4], reverse=True)
    assert distances[3:] == sorted(distances[3:])


def test_roles_differ_in_symbol_and_in_colour() -> None:
    assert len({theme.role_symbol(index) for index in range(10)}) == 10
    assert len({theme.role_colour(index) for index in range(10)}) == 10


def test_no_two_roles_share_symbol_and_colour() -> None:
    """More roles than colours: the thirteenth must not look like the third."""
    assert len({(theme.role_symbol(at), theme.role_colour(at)) for at in range(130)}) == 130
    assert set(role_legend._GLYPHS) == set(theme.ROLE_SYMBOLS)
