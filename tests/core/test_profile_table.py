"""HeadProfile: questions to the table, comparison by hand, the figure and the reprs."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from headscope.errors import HeadscopeError
from headscope.profile import HeadProfile, RunCard, compare
from headscope.profile.comparison import correlation, mean_ranks
from headscope.profile.roles import assign_roles
from headscope.store.files import canonical_heads

LAYERS, HEADS = 3, 4


def profile_of(
    tokens: int = 100, layers: int = LAYERS, heads: int = HEADS, dtype: str = "float32", sha: str = "aa", **metrics: object
) -> HeadProfile:
    rows = [(layer, head, head // 2) for layer in range(layers) for head in range(heads)]
    table = pd.DataFrame(rows, columns=["layer", "head", "kv_head"])
    table["module"], table["kind"] = [f"layers.{layer}.attn" for layer, _, _ in rows], "full"
    for name, values in metrics.items():
        table[name] = np.asarray(values, dtype=float).reshape(-1)
    table["roles"], table["reasons"] = assign_roles(table)
    facts = {
        name: {"probe": name, "unit": "probability", "higher_is": "<high>", "range": [0.0, 1.0], "data": "natural"} for name in metrics
    }
    card = RunCard(
        model={
            "name": "tiny <b>",
            "class": "Tiny",
            "layers": layers,
            "heads": heads,
            "kv_heads": 2,
            "head_dim": 8,
            "parameters": 1e6,
            "dtype": dtype,
            "device": "cpu",
        },
        data=[{"name": "text", "kind": "natural", "sha256": sha, "sequences": 1, "tokens": tokens}],
        probes=[],
        metrics=facts,
        numbers={"sink_rate": 0.25},
        attention_kernels=["sdpa"],
        statistics_kernel="blocked",
        parameters={"sink_tokens": 4, "context": tokens},
        seeds={},
    )
    return HeadProfile(canonical_heads(table), card)


@pytest.fixture
def small() -> HeadProfile:
    sink = [0.1, 0.9, 0.2, 0.4, 0.5, 0.0, np.nan, 0.9, 0.3, 0.31, 0.2, 0.2]
    return profile_of(sink=sink, waad=np.arange(12))


def test_top_of_a_role_and_of_a_metric(small: HeadProfile) -> None:
    assert small.roles == ["sink"]
    assert small.metrics == ["sink", "waad"]
    assert small.top("sink", 3) == [(0, 1), (1, 3), (1, 0)]
    assert small.top("sink", 99) == [(0, 1), (1, 3), (1, 0), (0, 3), (2, 1)]
    assert small.count("sink") == 5
    assert small.top("waad", 2) == [(2, 3), (2, 2)]
    assert small.rank("sink", 6)[-1] == (2, 0)
    assert len(small.rank("sink", 99)) == 11
    assert small.why(2, 1, "sink") == "sink 0.31 > 0.3 on natural text"
    assert small.roles_of(0, 0) == []
    assert small.value(1, 3, "sink") == 0.9


def test_matrix_is_layers_by_heads(small: HeadProfile) -> None:
    assert small.matrix("waad").tolist() == np.arange(12.0).reshape(3, 4).tolist()
    assert math.isnan(small.matrix("sink")[1, 2])


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda p: p.top("sinc", 3), "did you mean sink"),
        (lambda p: p.top("sink", 0), "at least 1"),
        (lambda p: p.count("waad"), "unknown role 'waad'"),
        (lambda p: p.why(0, 0, "sink"), "its roles are: none"),
        (lambda p: p.value(3, 0, "sink"), "layers 0..2"),
        (lambda p: p.value(0, 0, "nope"), "unknown metric or role 'nope'"),
        (lambda p: p.plot("nope"), "unknown metric or role 'nope'"),
        (lambda p: p.plot("sink", mark="induction"), "no such role"),
        (lambda p: p.statistic("row/entropy"), "keeps none"),
        (lambda p: compare(p, p, top=0), "at least 1"),
        (lambda p: compare(p, p).changed("nope"), "unknown metric"),
        (lambda p: compare(p, profile_of(layers=2, sink=np.zeros(8))), "3 layers and 12 heads, the other 2 and 8"),
        (lambda p: compare(p, profile_of(fai_end=np.zeros(12))), "no metric in common"),
    ],
)
def test_refusals_are_one_line(small: HeadProfile, ask, words: str) -> None:
    with pytest.raises(HeadscopeError, match=re.escape(words)) as caught:
        ask(small)
    assert "\n" not in str(caught.value)


def test_compare_by_hand() -> None:
    first = profile_of(sink=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    second = profile_of(sink=[1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 10.5])
    found = compare(first, second, top=2).metrics["sink"]
    # Two neighbouring swaps: sum d^2 = 4, so rho = 1 - 6 * 4 / (12 * 143).
    assert found.spearman == pytest.approx(1 - 24 / (12 * 143))
    assert found.pearson == pytest.approx(np.corrcoef(first.table["sink"], second.table["sink"])[0, 1])
    assert found.overlap == 1.0
    assert found.changes[:4] == ((0, 0, 0.0, 1.0), (0, 1, 1.0, 0.0), (2, 2, 10.0, 11.0), (2, 3, 11.0, 10.5))
    row = compare(first, second, top=1).rows()[0]
    assert row["overlap"] == 0.0
    assert row["most_changed"] == "0.0 (+1.000), 0.1 (-1.000), 2.2 (+1.000)"


def test_compare_with_itself_and_with_a_constant(small: HeadProfile) -> None:
    same = compare(small, small)
    assert [row["spearman"] for row in same.rows()] == pytest.approx([1.0, 1.0])
    assert [row["most_changed"] for row in same.rows()] == ["none", "none"]
    assert same.notes == ()
    flat = compare(small, profile_of(sink=np.full(12, 0.2), waad=np.arange(12)))
    assert math.isnan(flat.metrics["sink"].spearman)
    assert flat.to_dict()["metrics"][0]["pearson"] is None
    assert len(flat.metrics["sink"].changes) == 11  # the head without a value is not compared


def test_compare_pairs_heads_by_name_and_not_by_row(small: HeadProfile) -> None:
    turned = HeadProfile(canonical_heads(small.table.iloc[::-1].reset_index(drop=True)), small.card)
    assert compare(small, turned).metrics["waad"].pearson == pytest.approx(1.0)
    assert turned.matrix("waad").tolist() == small.matrix("waad").tolist()


def test_compare_says_what_makes_numbers_differ(small: HeadProfile) -> None:
    longer = profile_of(tokens=200, dtype="bfloat16", sink=np.zeros(12))
    assert compare(small, longer).notes == (
        "natural text has 100 and 200 tokens: distance and entropy grow with the length",
        "dtype is float32 and bfloat16",
    )
    assert compare(small, profile_of(sha="bb", sink=np.zeros(12))).notes == ("natural text differs",)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=20))
def test_rank_correlation_is_scipys(values: list[tuple[int, int]]) -> None:
    a, b = (np.array(side, dtype=float) for side in zip(*values, strict=True))
    found = correlation(mean_ranks(a), mean_ranks(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    np.testing.assert_array_equal(mean_ranks(a), scipy.stats.rankdata(a))


def test_figure_has_every_head_in_its_place(small: HeadProfile) -> None:
    figure = small.plot("sink", mark="sink")
    heat = figure.data[0]
    assert np.asarray(heat.z).shape == (HEADS, LAYERS)
    np.testing.assert_array_equal(np.asarray(heat.z), small.matrix("sink").T)
    assert (heat.zmin, heat.zmax) == (0.0, 1.0)
    assert list(heat.customdata[3, 1]) == ["1.3", "key head 1<br>sink"]
    assert figure.layout.yaxis.scaleanchor == "x"
    title = figure.layout.title.text
    assert "tiny &lt;b&gt;" in title
    assert "100 tokens" in title
    assert "sdpa" in title
    boxes = {(shape.x0 + 0.5, shape.y0 + 0.5) for shape in figure.layout.shapes if shape.type == "rect"}
    assert boxes == {(0, 1), (0, 3), (1, 0), (1, 3), (2, 1)}
    assert [shape.y0 for shape in figure.layout.shapes if shape.type == "line"] == [1.5]


def test_colour_scale_of_an_unbounded_metric_ends_at_its_largest(small: HeadProfile) -> None:
    small.card.metrics["waad"]["range"] = [0.0, None]
    heat = small.plot("waad").data[0]
    assert (heat.zmin, heat.zmax) == (0.0, 11.0)


def test_reprs_are_one_line_and_html_is_static(small: HeadProfile) -> None:
    both = compare(small, small)
    for thing in (small, small.card, both):
        assert "\n" not in repr(thing)
    for thing in (small, both):
        bundle = thing._repr_mimebundle_()
        assert bundle["text/plain"] == repr(thing)
        page = bundle["text/html"].replace("http://www.w3.org/2000/svg", "")
        assert "<script" not in page
        assert "http" not in page
        assert "tiny <b>" not in page
    assert page_cells(small) == LAYERS * HEADS


def page_cells(profile: HeadProfile) -> int:
    return profile._repr_mimebundle_()["text/html"].count("<rect")


def test_card_lines_say_what_the_numbers_are_about(small: HeadProfile) -> None:
    text = "\n".join(small.card.lines())
    for words in ("tiny <b>", "3 layers x 4 heads", "1 x 100 tokens", "sdpa", "sink_rate 0.250"):
        assert words in text
    assert small.card.context == 100


def test_card_survives_plain_data(small: HeadProfile) -> None:
    again = RunCard.from_dict(small.card.to_dict())
    assert again == small.card
    with pytest.raises(TypeError):
        RunCard.from_dict({"model": {}})
    with pytest.raises(TypeError, match="metrics"):
        RunCard.from_dict({**small.card.to_dict(), "metrics": []})
