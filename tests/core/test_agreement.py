"""Agreement of metrics: equals scipy's Spearman, leaves NaN heads out, constant metrics agree with nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from headscope.errors import ProbeError
from headscope.models.planted import Induction, Previous, Sink, planted_llama
from headscope.profile import HeadProfile
from headscope.scope import Scope


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    made = planted_llama({(0, 0): Previous(), (1, 0): Induction(), (1, 1): Sink()}, n_heads=4)
    found = Scope(made.model, made.tokenizer(), name="planted").profile(
        ["sink", "induction", "razor"], context=58, data=made.prompt(19, 3)[0], maps=False, keep_statistics=False
    )
    table = found.table.copy()
    draw = np.random.default_rng(0)
    table["one"] = draw.normal(size=8)
    table["two"] = table["one"] ** 3 + 5
    table["three"] = draw.normal(size=8)
    table["holes"] = table["three"].where(table.index > 1)
    table["flat"] = 1.0
    return HeadProfile(table, found.card)


def test_equals_scipy(profile: HeadProfile) -> None:
    found = profile.agreement(["one", "two", "three", "induction"])
    for a in found.columns:
        for b in found.columns:
            assert found.loc[a, b] == pytest.approx(spearmanr(profile.table[a], profile.table[b]).statistic)
    assert found.loc["one", "two"] == pytest.approx(1.0)


def test_heads_without_a_number_and_constant_metrics(profile: HeadProfile) -> None:
    found = profile.agreement(["one", "holes", "flat"])
    part = profile.table.iloc[2:]
    assert found.loc["one", "holes"] == pytest.approx(spearmanr(part["one"], part["holes"]).statistic)
    assert pd.isna(found.loc["one", "flat"])


def test_the_figure_keeps_like_metrics_together(profile: HeadProfile) -> None:
    figure = profile.plot_agreement(["one", "three", "two", "flat", "induction", "ind_sum"])
    names = list(figure.data[0].x)
    assert abs(names.index("one") - names.index("two")) == 1
    assert sorted(names) == ["flat", "ind_sum", "induction", "one", "three", "two"]
    assert figure.data[0].z[names.index("one")][names.index("two")] == pytest.approx(1.0)
    assert list(profile.plot_agreement(["one", "two"]).data[0].x) == ["one", "two"]


def test_refusals(profile: HeadProfile) -> None:
    with pytest.raises(ProbeError, match="did you mean induction"):
        profile.agreement(["inductoin", "sink"])
    with pytest.raises(ProbeError, match="at least two"):
        profile.agreement(["sink"])
