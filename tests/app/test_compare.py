"""Two runs: what agrees is measured, what cannot be matched is said, and both show the same head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headscope.app.components import compare_figures as figures
from headscope.app.components import compare_tables as tables
from headscope.app.factory import create_app
from headscope.app.figures import untyped
from headscope.app.metrics import describe
from headscope.app.pages import compare
from headscope.app.runs import RunIndex
from headscope.profile.roles import assign_roles
from headscope.store import open_run, write_run
from headscope.store.read import read_card
from headscope.store.synthetic import write_synthetic_run


@pytest.fixture(scope="module")
def pair(synthetic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, the same with other numbers, one of another shape, one without a common metric."""
    import shutil

    root = tmp_path_factory.mktemp("pair")
    shutil.copytree(synthetic.path, root / "before")
    card = {**read_card(synthetic.path), "files": {}}
    table = synthetic.table.copy()
    table["induction"] = table["induction"][::-1].to_numpy()
    table["sink"] = table["sink"] * 0.5
    table["roles"], table["reasons"] = assign_roles(table)
    write_run(root / "after", {**card, "notes": ["heads 1.2 were masked"]}, table, open_run(synthetic.path))
    write_synthetic_run(root / "other", tokens=64, layers=2, heads=2, kv_heads=1, width=8, keep=False)
    bare = synthetic.table[["layer", "head", "kv_head", "module", "kind", "receiver", "roles", "reasons"]].rename(
        columns={"receiver": "mine"}
    )
    write_run(root / "bare", card, bare)
    return root


@pytest.fixture
def inside(pair: Path):
    with create_app(pair).server.test_request_context("/", headers={"Host": "localhost"}):
        yield


def test_the_difference_is_the_second_less_the_first(pair: Path, synthetic) -> None:
    first, second = RunIndex(pair).open("before"), RunIndex(pair).open("after")
    drawn = figures.grids(first, second, describe(first.card, "sink"), (1, 2), "light")
    expected = -0.5 * synthetic.table["sink"].to_numpy().reshape(3, 4).T
    np.testing.assert_allclose(untyped(drawn["difference"]["data"][0]["z"]), expected, rtol=1e-6)
    assert drawn["difference"]["data"][0]["zmin"] == pytest.approx(-np.abs(expected).max())
    assert drawn["grid-a"]["data"][0]["zmax"] == drawn["grid-b"]["data"][0]["zmax"]
    assert (drawn["grid-a"]["data"][1]["x"], drawn["grid-a"]["data"][1]["y"]) == ([1], [2])
    pairs = figures.pairs_figure(first, second, describe(first.card, "sink"), None, "dark")["data"][0]
    np.testing.assert_allclose(untyped(pairs["y"]), 0.5 * untyped(pairs["x"]), rtol=1e-6)


def test_the_page_measures_agreement(inside, plain) -> None:
    text = plain(compare.layout("before", "after", metric="induction"))
    found = compare.Pair.open("before", "after").found
    assert found is not None
    assert found.metrics["induction"].spearman == pytest.approx(-1)
    assert found.metrics["sink"].spearman == pytest.approx(1)
    for part in ("Second less first", "Spearman", "Changed most in Induction", "heads 1.2 were masked", "They move together", "In both"):
        assert part in text, part
    assert '"data-pair":"0.0"' in text


def test_runs_of_other_shapes_say_why_and_show_what_is_left(inside, plain) -> None:
    text = plain(compare.layout("before", "other", metric="distance"))
    assert "Heads cannot be matched" in text
    assert "3 layers and 12 heads, the other 2 and 4" in text
    for part in ("Distance over depth", "Roles", "Cards", "Sink rate"):
        assert part in text
    assert "Second less first" not in text
    figure = compare.update_depth("light", ["before", "other"], "distance")
    assert [len(untyped(trace["y"])) for trace in figure["data"]] == [3, 2, 12, 4]


def test_without_a_common_metric_the_cards_remain(inside, plain) -> None:
    text = plain(compare.layout("before", "bare"))
    assert "no metric in common" in text
    assert "Cards" in text


def test_choosing_and_wrong_addresses(inside, plain) -> None:
    assert "Choose two runs" in plain(compare.layout())
    assert "Choose two runs" in plain(compare.layout("before"))
    assert "cannot be compared" in plain(compare.layout("before", "../before"))
    assert "Both are the same run" in plain(compare.layout("before", "before"))
    assert "No head changed" in plain(compare.layout("before", "before"))


def test_another_head_brings_its_maps(inside, plain) -> None:
    text = plain(compare.update_pair("2.3", ["before", "after"], "sink"))
    assert "/api/run/before/2/3" in text
    assert "/api/run/after/2/3" in text
    assert "Layer 2 · Head 3" in text
    assert "/api/run/before/0/" in plain(compare.update_pair("9.9", ["before", "after"], "induction"))
    drawn = compare.update(["before", "after"], "sink", "2.3", "dark")
    assert len(drawn) == 4
    assert drawn[3]["data"][-1]["marker"]["symbol"] == "square-open"


def test_the_tables_mark_what_differs(pair: Path) -> None:
    rows = {label: (a, b) for label, a, b in tables.card_rows(read_card(pair / "before"), read_card(pair / "other"))}
    assert rows["Shape"] == ("3 layers \u00d7 4 heads, 2 KV heads", "2 layers \u00d7 2 heads, 1 KV head")
    assert rows["Model"] == ("Synthetic-1B", "synthetic")
