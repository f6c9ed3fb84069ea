"""Kinds and clusters: planted heads are told apart, answers are explained, length does not matter, refusals."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import torch

from headscope.errors import ProbeError
from headscope.models.planted import BlockLocal, Duplicate, Induction, Offset, Previous, Sink, Vertical, planted_llama
from headscope.profile import HeadProfile
from headscope.profile.features import FEATURES, features
from headscope.profile.train_kinds import PROBES
from headscope.scope import Scope

HEADS = {
    (0, 0): Previous(),
    (0, 1): Duplicate(),
    (0, 2): Sink(),
    (0, 3): Offset(4),
    (0, 4): Offset(60),
    (1, 0): Induction(),
    (1, 1): BlockLocal(16),
}
TOLD = {
    (0, 0): "previous_token",
    (0, 1): "duplicate_token",
    (0, 2): "sink",
    (0, 3): "local",
    (0, 4): "distant",
    (0, 5): "uniform",
    (1, 0): "induction",
    (1, 1): "local",
    (1, 2): "distant",
}


def profile(length: int, seed: int = 77) -> HeadProfile:
    draw = np.random.default_rng(seed)
    order = draw.permutation(np.arange(2, 300))
    heads = {**HEADS, (1, 2): Vertical(tokens=tuple(order[3:9].tolist()))}
    made = planted_llama(heads, vocab=300, max_positions=1024, sharpness=12, seed=seed)
    scope = Scope(made.model, made.tokenizer(), name="planted")
    ids = torch.tensor([made.bos, *order[np.minimum(draw.zipf(1.3, length - 1) - 1, 297)].tolist()])
    return scope.profile(PROBES, context=length, data=ids, maps=False, keep_statistics=False)


@pytest.fixture(scope="module")
def planted() -> HeadProfile:
    return profile(512)


def test_planted_heads_get_their_kind_at_any_length(planted: HeadProfile) -> None:
    """A seed that the classifier was not trained on, at a length that it was trained on and one that it was not."""
    for one in (planted, profile(900, seed=78)):
        table = one.kinds().set_index(["layer", "head"])
        assert {place: table.loc[place, "kind"] for place in TOLD} == TOLD
        assert table["probability"].between(1 / 7, 1).all()


def test_why_names_what_speaks_for_the_kind(planted: HeadProfile) -> None:
    table = planted.kinds().set_index(["layer", "head"])
    assert table.loc[(1, 0), "why"].startswith("induction ")
    assert "ind_sum 1.00" in table.loc[(1, 0), "why"]
    assert "previous_token 1.00, local_mass" in table.loc[(0, 0), "why"]


def test_what_is_no_kind_is_said_to_be_none(planted: HeadProfile) -> None:
    """A head halfway between two kinds: the classifier abstains and says between which."""
    middle = HeadProfile(planted.table.copy(), planted.card)
    rows = {tuple(place): row for row, place in enumerate(middle.table[["layer", "head"]].to_numpy().tolist())}
    source = middle.table.loc[rows[1, 0], list(FEATURES)].to_numpy(dtype=float)
    other = middle.table.loc[rows[0, 1], list(FEATURES)].to_numpy(dtype=float)
    found = set()
    for part in np.linspace(0, 1, 41):
        middle.table.loc[rows[0, 7], list(FEATURES)] = part * source + (1 - part) * other
        row = middle.kinds().set_index(["layer", "head"]).loc[(0, 7)]
        found.add(row["kind"])
        if row["kind"] == "none":
            assert "< 0.6" in row["why"]
            assert row["probability"] < 0.6
    assert found == {"duplicate_token", "none", "induction"}


def test_the_shipped_classifier_says_how_good_it_was() -> None:
    model = json.loads((resources.files("headscope.profile") / "kinds.json").read_text())
    assert model["held_out"]["accuracy"] >= 0.98
    assert min(model["held_out"]["by_kind"].values()) >= 0.95
    assert model["features"] == list(FEATURES)


def test_smollm2_induction_heads_are_one_kind_and_one_cluster(smollm2: Scope) -> None:
    found = smollm2.profile(PROBES, context=384, maps=False, keep_statistics=False)
    kinds = found.kinds()
    told = {(row.layer, row.head) for row in kinds[kinds["kind"] == "induction"].itertuples()}
    assert {(18, 6), (17, 3)} <= told
    assert len(told) <= 20
    groups = found.clusters()
    places = {place: int(label) for place, label in zip(groups.places, groups.labels, strict=True)}
    label = places[18, 6]
    assert places[17, 3] == places[18, 7] == label
    assert int((groups.labels == label).sum()) <= 20
    why = str(groups.table.set_index("cluster").loc[label, "why"])
    assert "ind_sum +" in why
    assert groups.table["heads"].is_monotonic_decreasing
    assert len(groups.plot().data) == len(groups.table)


def test_clusters_are_the_same_for_a_seed_and_can_be_counted(planted: HeadProfile) -> None:
    first, again = planted.clusters(4, seed=3), planted.clusters(4, seed=3)
    assert np.array_equal(first.labels, again.labels)
    assert len(first.table) == 4
    assert first.table["heads"].sum() == 16
    uniform = [first.labels[place] for place, at in enumerate(first.places) if at in {(0, 5), (0, 6), (0, 7), (1, 3), (1, 7)}]
    assert len(set(uniform)) == 1


def test_refusals(planted: HeadProfile) -> None:
    with pytest.raises(ProbeError, match="clusters are at least 2"):
        planted.clusters(1)
    with pytest.raises(ProbeError, match="fewer than those"):
        planted.clusters(16)
    less = HeadProfile(planted.table.drop(columns=["waad"]), planted.card)
    with pytest.raises(ProbeError, match="waad"):
        less.kinds()
    with pytest.raises(ProbeError, match="passive"):
        less.clusters()


def test_features_do_not_grow_with_the_text(planted: HeadProfile) -> None:
    """Equal weights have a mean distance of a quarter of the text, so their feature is near 1 at every length."""
    at = FEATURES.index("distance")
    for one in (planted, profile(900)):
        rows = one.table[["layer", "head"]].to_numpy().tolist()
        assert features(one)[rows.index([0, 5]), at] == pytest.approx(1.0, abs=0.02)
