"""HeadStatistics and its accumulator: places, passes, means, errors, reprs."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import CaptureError, StatisticError
from headscope.statistics import HeadStatistics, StatisticsRequest
from headscope.statistics.accumulate import Grid, LayerAccumulator
from headscope.statistics.partial import PartialStatistics
from headscope.topology import AttentionModule, Topology


def topology(*heads):
    modules = [AttentionModule(f"layers.{i}.attn", i, "full", count, count, 4, True) for i, count in enumerate(heads)]
    return Topology((*modules, AttentionModule("vision.0.attn", None, "vision", 2, 2, 4, False)), "Toy")


def statistics(values, shape=(2, 2), **kw):
    names = tuple(values)
    return HeadStatistics(StatisticsRequest(names=names), topology(*shape), values=values, **kw)


def test_a_grid_grows_adds_and_takes_maxima():
    generator = torch.Generator().manual_seed(0)
    for how in ("add", "max"):
        grid, whole = Grid(how), torch.zeros(2, 9, 11)
        for row, column, height, width in ((0, 0, 2, 3), (2, 1, 1, 4), (1, 2, 3, 3), (4, 0, 5, 11)):
            piece = torch.rand(2, height, width, generator=generator)
            grid.place(piece, row, column)
            cells = whole[:, row : row + height, column : column + width]
            cells.copy_(cells + piece if how == "add" else torch.maximum(cells, piece))
        torch.testing.assert_close(grid.value(), whole)


def call(start, rows, keys, first_key=0, batch=1, valid=None):
    q, k = torch.zeros(batch, 1, rows, 4), torch.zeros(batch, 1, keys, 4)
    return AttentionCall(
        "layers.0.attn", 0, q, k, None, 1.0, MaskFacts(True, query_valid=valid), query_offset=start, key_offset=first_key, kernel="toy"
    )


def partial(start, rows, first_key=0, **columns):
    return PartialStatistics(start, first_key, rows={"entropy": torch.full((1, 1, rows), float(start))}, **columns)


def test_rows_must_follow_one_another():
    layer = LayerAccumulator(StatisticsRequest(names=("entropy",)), "layers.0.attn", keep=False)
    layer.add(call(3, 2, 5), partial(3, 2))
    layer.add(call(5, 1, 6), partial(5, 1))
    rows, _ = layer.finish()
    torch.testing.assert_close(rows["entropy"][0, 0], torch.tensor([math.nan] * 3 + [3.0, 3.0, 5.0]), equal_nan=True)
    assert layer.valid.tolist() == [[False, False, False, True, True, True]]
    for again in (call(5, 1, 6), call(9, 1, 10), call(6, 1, 7, batch=2)):
        with pytest.raises(CaptureError, match="rows end at 6"):
            layer.add(again, partial(again.query_offset, 1))


def test_sums_are_divided_once():
    """Ten prefill rows and one decoded row weigh as eleven rows, not as two calls."""
    layer = LayerAccumulator(StatisticsRequest(names=("sink_importance",)), "layers.0.attn", keep=False)
    first = PartialStatistics(0, 0, columns={"column_sum": torch.full((1, 1, 1), 10.0)}, counts={"row_count": torch.tensor([[10]])})
    last = PartialStatistics(10, 0, columns={"column_sum": torch.full((1, 1, 2), 0.5)}, counts={"row_count": torch.tensor([[1, 0]])})
    layer.add(call(0, 10, 1), first)
    layer.add(call(10, 1, 2), last)
    out, _ = layer.finish()
    assert out["sink_importance"][0, 0, 0].item() == pytest.approx(10.5 / 11)
    assert math.isnan(out["sink_importance"][0, 0, 1].item())
    assert "column_sum" not in out


def test_mean_counts_valid_positions_only_and_pools_passes():
    entropy = torch.tensor([[[1.0, 3.0, math.nan], [2.0, 2.0, math.nan]], [[5.0, 5.0, 5.0], [0.0, 0.0, 3.0]]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    column = torch.ones(2, 2, 3)
    column[0, :, 2] = 100  # a padded key
    values = {"entropy": {"layers.0.attn": entropy}, "column_sum": {"layers.0.attn": column}}
    stats = statistics(values, valid={"layers.0.attn": valid})
    mean = stats.mean("entropy")
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean[0], torch.tensor([19 / 5, 7 / 5], dtype=torch.float64))
    assert bool(mean[1].isnan().all())
    torch.testing.assert_close(stats.mean("column_sum")[0], torch.ones(2, dtype=torch.float64))
    other = statistics({"entropy": {"layers.0.attn": torch.full((1, 2, 1), 9.0)}, "column_sum": {}})
    both = HeadStatistics(stats.request, stats.topology)
    both._fill([stats, other])
    torch.testing.assert_close(both.mean("entropy")[0], torch.tensor([28 / 6, 16 / 6], dtype=torch.float64))
    assert both.passes == [stats, other]
    assert stats.passes == [stats]


def test_mean_of_classes_and_of_layers_with_fewer_heads():
    mass = torch.arange(12.0).reshape(1, 2, 3, 2)
    request = StatisticsRequest(names=("class_mass",), labels=torch.tensor([0, 1, 0]))
    values = {"class_mass": {"layers.0.attn": mass, "layers.1.attn": mass[:, :1]}}
    mean = HeadStatistics(request, topology(2, 1), values=values).mean("class_mass")
    assert mean.shape == (2, 2, 2)
    torch.testing.assert_close(mean[0], mass.double().mean((0, 2)))
    assert bool(mean[1, 1].isnan().all())


@pytest.mark.parametrize("name", ["argmax", "block_mass", "diagonal_sum"])
def test_what_has_no_mean_says_so(name):
    with pytest.raises(StatisticError, match=f"mean of '{name}'.*means exist for: lse"):
        statistics({name: {"layers.0.attn": torch.zeros(1, 2, 3)}}).mean(name)


def test_access_by_number_and_by_name_and_the_errors():
    one = torch.zeros(1, 2, 3)
    stats = statistics({"entropy": {"layers.1.attn": one, "vision.0.attn": one}})
    assert stats.layers == [1, "vision.0.attn"]
    assert list(stats["entropy"]) == [1, "vision.0.attn"]
    assert stats["entropy"][1] is stats["entropy"]["layers.1.attn"]
    assert "layers.1.attn" in stats["entropy"]
    assert 0 not in stats["entropy"]
    for act, words in (
        (lambda: stats["entropie"], "did you mean entropy"),
        (lambda: stats["waad"], r"not asked for.*measured: entropy"),
        (lambda: stats["entropy"][0], r"layer 0.*not measured.*1, vision"),
        (lambda: stats["pairs"], r"stats\.pairs"),
        (lambda: stats.pairs("x"), "none were asked for"),
        (lambda: stats.weights(1, 0, [0], [0]), r"keep=\(1,\)"),
    ):
        with pytest.raises(StatisticError, match=words):
            act()
    with pytest.raises(CaptureError, match=r"layer 5.*0\.\.1"):
        stats["entropy"][5]


def test_reprs_are_one_line_and_static_html():
    stats = statistics({"entropy": {"layers.0.attn": torch.full((1, 2, 3), 2.5)}}, kernels=frozenset({"sdpa"}))
    assert "\n" not in repr(stats)
    assert "sdpa" in repr(stats)
    page = stats._repr_mimebundle_()
    assert page["text/plain"] == repr(stats)
    assert "2.5" in page["text/html"]
    assert "<script" not in page["text/html"]
    assert "http" not in page["text/html"]
    assert "empty" in repr(HeadStatistics(stats.request, stats.topology))
