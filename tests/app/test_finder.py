"""The finder and what it picks: every form against the table, every refusal with what to type instead."""

from __future__ import annotations

import numpy as np
import pytest

from headscope.app.components.head_scatter import other_metric, scatter_figure
from headscope.app.figures import untyped
from headscope.app.finder import find, heads_of, names_of
from headscope.app.pages import heads
from headscope.app.ranks import rank_correlation
from headscope.errors import RunError


def where(table, mask) -> set[tuple[int, int]]:
    rows = table[mask]
    return set(zip(rows["layer"], rows["head"], strict=True))


def test_heads_layers_and_lists(run) -> None:
    assert find(run, "2.1") == find(run, "layer 2 head 1") == find(run, "L2H1".replace("H", ".h")) == [(2, 1)]
    assert find(run, "layer 1") == [(1, head) for head in range(4)]
    assert find(run, "2.1, 0.3,2.1") == [(0, 3), (2, 1)]
    assert find(run, "head = 2 and layer >= 1") == [(1, 2), (2, 2)]


def test_metrics_ranks_and_roles_are_those_of_the_table(run, synthetic) -> None:
    table = synthetic.table
    assert set(find(run, "induction > 0.4")) == where(table, table["induction"] > 0.4)
    assert set(find(run, "induction>40%")) == where(table, table["induction"] > 0.4)
    assert set(find(run, "receiver <= -1e-1")) == where(table, table["receiver"] <= -0.1)
    order = table.sort_values("distance", ascending=False)[:3]
    assert set(find(run, "top 3 distance")) == where(table, table.index.isin(order.index))
    assert set(find(run, "Bottom 3 Distance")).isdisjoint(find(run, "top 3 distance"))
    assert set(find(run, "sink heads")) == set(run.roles["sink"])
    assert set(find(run, "sink and layer 2 and induction > 0.2")) == set(run.roles["sink"]) & where(
        table, (table["layer"] == 2) & (table["induction"] > 0.2)
    )
    assert find(run, "sink > 2") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9.9", "layers 0 to 2"),
        ("inductoin", "did you mean induction"),
        ("nothing > 3", "no head, role or metric"),
        ("sink > 0.5 and", "no head, role or metric"),
        ("retrieval", "no head of this run has it|no head, role or metric"),
        ("x" * 401, "401 characters"),
        ("sink >", "no head, role or metric"),
    ],
)
def test_what_is_not_understood_is_refused_whole(run, text: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        find(run, text)


def test_lists_in_addresses_keep_only_what_the_run_has(run) -> None:
    assert heads_of("2.1,0.3,2.1,7.7,a.b,1,-1.0,\u0661.1", run) == [(2, 1), (0, 3)]
    assert heads_of(["2.1"], run) == []
    assert heads_of(names_of([(1, 2), (0, 0)]), run) == [(1, 2), (0, 0)]
    assert len(heads_of(",".join(["0.0", "0.1", "0.2"]), run, most=2)) == 2


def test_the_scatter_holds_both_metrics_and_marks_what_is_picked(run, synthetic) -> None:
    figure = scatter_figure(run, "sink", "induction", ["induction"], [(1, 2)], [(0, 0)], "light")
    every = figure["data"][0]
    np.testing.assert_array_equal(untyped(every["x"]), synthetic.table["sink"].to_numpy(dtype=np.float32))
    np.testing.assert_array_equal(untyped(every["y"]), synthetic.table["induction"].to_numpy(dtype=np.float32))
    picked, pinned = figure["data"][-2:]
    assert (picked["name"], picked["text"]) == ("picked", ["1.2"])
    assert pinned["x"] == [pytest.approx(synthetic.table["sink"][0])]
    assert other_metric(run, "sink") != "sink"


def test_rank_correlation_is_spearmans(run) -> None:
    from scipy.stats import spearmanr

    a, b = run.grid("sink"), run.grid("receiver")
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


def test_the_finders_callback(request_context, plain) -> None:
    assert heads.find_heads("tiny", "layer 1 and head 2")[0] == "1.2"
    assert "did you mean" in plain(heads.find_heads("tiny", "inducton")[1])
    picked, off, _ = heads.show_picked("tiny", "1.2,0.0", "")
    assert "2 heads" in plain(picked)
    assert off is False
    rows, _, note = heads.fill_table("tiny", "sink", "1.2,0.0")
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (1, 2)]
    assert note.startswith("2 of 12 heads")
    grid = heads.update("tiny", "sink", "value", [], "light", "1.2", "0.0")[0]
    assert [(trace["name"], trace["x"], trace["y"]) for trace in grid["data"][-2:]] == [("picked", [1], [2]), ("pinned", [0], [0])]
    assert "None yet" in plain(heads.show_pins("tiny", "", "sink"))
    assert "0.0" in plain(heads.show_pins("tiny", "0.0", "sink"))
    page = plain(heads.layout("tiny", find="layer 1", pins="2.2"))
    assert '"data":"1.0,1.1,1.2,1.3"' in page
    assert '"data":"2.2"' in page
