"""What is shown along the text: plots, shades, and the chosen token."""

from __future__ import annotations

import numpy as np
import pytest

from headscope.app.components.token_facts import token_facts
from headscope.app.components.token_series import available, default_series, plot_ceiling, series_figure, thin
from headscope.app.components.token_strip import shades, strip_data, strip_legend
from headscope.app.figures import untyped
from headscope.app.format import number, visible_token, words


def test_plots_hold_the_statistics_of_the_head(run, synthetic) -> None:
    figure = series_figure(run, 1, 3, ["entropy", "column_sum"], "light")
    attention = synthetic.attention[1, 3]
    entropy = -(attention * np.log(np.maximum(attention, 1e-300))).sum(1)
    np.testing.assert_allclose(untyped(figure["data"][0]["y"]), entropy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(untyped(figure["data"][1]["y"]), attention.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(untyped(figure["data"][0]["x"]), np.arange(200))
    assert figure["data"][0]["text"][2] == "⏎"
    assert figure["layout"]["yaxis"]["domain"][0] > figure["layout"]["yaxis2"]["domain"][1]


def test_positions_of_largest_weights_are_not_a_plot(run) -> None:
    assert "argmax" not in available(run)
    assert default_series(run) == ["entropy", "row_max", "distance", "sink_mass", "column_sum"]


def test_no_statistic_gives_a_figure_that_says_so(run) -> None:
    figure = series_figure(run, 0, 0, [], "dark")
    assert figure["data"] == []
    assert "Choose a statistic" in figure["layout"]["annotations"][0]["text"]


def test_thinning_keeps_the_extremes_of_every_stretch() -> None:
    values = np.sin(np.arange(50_000) / 37).astype(np.float32)
    values[12_345], values[33_333], values[7:90] = 9.0, -9.0, np.nan
    kept = thin(values, points=1000)
    assert len(kept) <= 1000
    assert (np.diff(kept) > 0).all()
    assert {12_345, 33_333} <= set(kept.tolist())
    assert thin(values[:1000], points=1000).tolist() == list(range(1000))


def test_a_value_that_dwarfs_the_others_ends_the_axis_early_and_is_named() -> None:
    values = np.ones(1000, dtype=np.float32)
    assert plot_ceiling(values) is None
    values[0] = 500
    assert plot_ceiling(values) == pytest.approx(1.2)
    assert plot_ceiling(np.array([-1.0, 500.0])) is None


def test_shades_end_at_the_98th_percentile() -> None:
    values = np.concatenate([[1000.0], np.linspace(0, 1, 99)])
    shade, low, high = shades(values)
    assert low == 0
    assert high == pytest.approx(np.percentile(values, 98))
    np.testing.assert_array_equal(shade[1:], np.clip(np.floor(values[1:] / high * 10), 0, 9))
    assert shade[0] == 9


def test_shades_of_nothing_and_of_one_value() -> None:
    shade, low, _ = shades(np.full(4, np.nan))
    assert shade.tolist() == [-1, -1, -1, -1]
    assert np.isnan(low)
    assert set(shades(np.full(5, 2.0))[0].tolist()) == {0}
    assert shades(np.array([np.nan, 0.0, 1.0]))[0].tolist() == [-1, 0, 9]


def test_the_strip_carries_text_shades_and_numbers(run, synthetic, plain) -> None:
    data = strip_data(run, 2, 0, "column_sum")
    received = synthetic.attention[2, 0].sum(0)
    assert data["tokens"] == synthetic.strings
    assert data["shades"] == shades(received.astype(np.float32))[0].tolist()
    assert data["shades"][0] == 9
    assert data["numbers"][0] == number(float(received[0]))
    assert data["clipped"]
    assert f"{data['high']} and above" in plain(strip_legend(data, "column_sum"))


def test_long_texts_come_in_pages(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.app.components.token_strip.PAGE", 64)
    data = strip_data(run, 0, 0, "entropy", page=3)
    assert (data["start"], len(data["tokens"]), data["pages"]) == (192, 8, 4)
    assert strip_data(run, 0, 0, "entropy", page=99)["start"] == 192


def test_the_chosen_token_says_where_its_largest_weight_goes(run, synthetic, plain) -> None:
    attention = synthetic.attention[0, 1]
    token = next(token for token in range(50, 200) if 0 < attention[token].argmax() < token)
    key = int(attention[token].argmax())
    text = plain(token_facts(run, 0, 1, token))
    assert f"#{key:,}, {token - key:,} back" in text
    assert number(float(np.float32(attention[:, token].sum())), 4) in text
    assert "Click a token" in plain(token_facts(run, 0, 1, None))
    assert "Click a token" in plain(token_facts(run, 0, 1, 10_000))


def test_numbers_and_names_for_people() -> None:
    assert [number(value) for value in (0.0, 0.8841, 12345.6, 0.00001234, -3.14159, float("nan"), float("inf"))] == [
        "0", "0.884", "12,346", "1.23e-05", "-3.14", "n/a", "∞",
    ]  # fmt: skip
    assert visible_token(" a\n") == "␣a⏎"
    assert len(visible_token("x" * 100)) == 24
    assert words("waad") == "WAAD"
    assert words("fai_band") == "FAI band"
