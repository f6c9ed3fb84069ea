"""Roles: every rule at its threshold, quotas and shares by hand, and the group rule of grouped queries."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from headscope.probes import REGISTRY
from headscope.profile.roles import BY_NAME, ROLES, assign_roles, razor_quota


def heads(layers: int = 4, per_layer: int = 6, group: int = 3, **metrics: object) -> pd.DataFrame:
    rows = [(layer, head, head // group) for layer in range(layers) for head in range(per_layer)]
    table = pd.DataFrame(rows, columns=["layer", "head", "kv_head"])
    for name, values in metrics.items():
        table[name] = values
    return table


def having(table: pd.DataFrame, role: str) -> list[int]:
    roles, reasons = assign_roles(table)
    rows = [row for row, names in enumerate(roles) if role in names]
    assert all(bool(reasons[row][role]) for row in rows)
    assert all(role not in reasons[row] for row in range(len(table)) if row not in rows)
    return rows


@pytest.mark.parametrize(
    ("role", "threshold"),
    [("sink", 0.3), ("streaming", 0.95), ("previous_token", 0.4), ("duplicate_token", 0.4), ("induction", 0.4), ("uniform", 0.9)],
)
def test_thresholds_are_strict(role: str, threshold: float) -> None:
    metric = BY_NAME[role].metric
    values = np.zeros(24)
    values[[3, 7, 11]] = [threshold, np.nextafter(threshold, 1), 1.0]
    values[5] = np.nan
    assert having(heads(**{metric: values}), role) == [7, 11]


def test_reason_names_value_threshold_and_text() -> None:
    _, reasons = assign_roles(heads(induction=[0.884] + [0.0] * 23))
    assert reasons[0]["induction"] == "induction 0.88 > 0.4 on repeated random tokens"
    _, reasons = assign_roles(heads(sink=[0.5] + [0.0] * 23))
    assert reasons[0]["sink"] == "sink 0.50 > 0.3 on natural text"


def test_local_and_global_are_three_tenths_each() -> None:
    distance = np.arange(24)[::-1].astype(float)
    table = heads(distance=distance)
    assert having(table, "local") == list(range(17, 24))  # int(.3 * 24) = 7
    assert having(table, "global") == list(range(7))
    distance[0] = np.nan
    assert having(heads(distance=distance), "global") == list(range(1, 7))  # int(.3 * 23) = 6


def test_equal_values_go_by_layer_and_head() -> None:
    assert having(heads(distance=np.ones(24)), "local") == list(range(7))


def test_razor_quota_takes_whole_groups() -> None:
    """50 heads: 7 by induction and 1 by echo. With groups of 5, every group of a chosen head is flagged, and nothing else."""
    layers, per_layer, group = 5, 10, 5
    induction = np.zeros(50)
    induction[[1, 2, 13, 21, 22, 36, 47]] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    echo = np.zeros(50)
    echo[29] = 0.95
    table = heads(layers, per_layer, group, ind_sum=induction, echo_sum=echo)
    groups = {(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (2, 1)}
    expected = [row for row in range(50) if (row // 10, row % 10 // 5) in groups]
    assert having(table, "retrieval_like") == expected
    reasons = razor_quota(table)
    assert reasons[1] == "ind_sum 0.90 is rank 1 of 50 on repeated random tokens (quota: top 14%)"
    assert reasons[29] == "echo_sum 0.95 is rank 1 of 50 on repeated random tokens (quota: top 1%)"
    assert reasons[25].startswith("shares key head 2.1 with 2.9: echo_sum")


def test_razor_quota_is_filled_without_any_induction_head() -> None:
    """270 heads that do nothing: round(2.7) by echo and round(37.8) by induction all the same; the reason says it is a quota."""
    rng = np.random.default_rng(0)
    table = heads(30, 9, 1, ind_sum=rng.random(270) * 1e-3, echo_sum=np.zeros(270))
    chosen = having(table, "retrieval_like")
    best = np.argsort(-table["ind_sum"].to_numpy())[:38]
    assert set(best) <= set(chosen)
    assert len(set(chosen) - set(best)) <= 3
    _, reasons = assign_roles(table)
    assert all("quota" in reasons[row]["retrieval_like"] for row in chosen)


def test_receiver_quota_is_twenty_or_five_percent() -> None:
    values = np.arange(24, dtype=float)
    assert having(heads(receiver=values), "receiver") == [22, 23]  # ceil(.05 * 24) = 2
    many = heads(50, 20, 4, receiver=np.arange(1000, dtype=float))
    assert having(many, "receiver") == list(range(980, 1000))


def test_rules_without_their_metric_are_passed_over() -> None:
    roles, _ = assign_roles(heads(sink=np.ones(24), ind_sum=np.ones(24)))
    assert roles == [["sink"]] * 24


def test_every_rule_reads_metrics_that_a_probe_gives_and_names_its_source() -> None:
    metrics = {metric.name for probe in REGISTRY.values() for metric in probe.metrics}
    for rule in ROLES:
        assert set(rule.metrics) <= metrics, rule.name
        assert rule.source.startswith(("arXiv:", "headscope:")), rule.name
        assert rule.to_dict()["rule"]
    assert len(BY_NAME) == len(ROLES)


def test_strength_orders_local_heads_by_small_distance() -> None:
    table = heads(distance=np.arange(24, dtype=float), ind_sum=np.zeros(24), echo_sum=np.arange(24, dtype=float))
    assert BY_NAME["local"].strength(table).argmax() == 0
    assert BY_NAME["global"].strength(table).argmax() == 23
    assert BY_NAME["retrieval_like"].strength(table).tolist() == list(range(24))


def test_a_retrieval_head_says_in_how_many_trials_it_copied() -> None:
    score, active = np.zeros(24), np.zeros(24)
    score[[3, 7, 9]] = [0.43, 0.1, 0.099]
    active[[3, 7, 9]] = [0.9, 0.5, 1.0]
    table = heads(retrieval=score, retrieval_active=active)
    assert having(table, "retrieval") == [3, 7]
    _, reasons = assign_roles(table)
    assert reasons[3]["retrieval"] == "retrieval 0.43 >= 0.1 on needles; it copied in 90% of the trials"
    assert BY_NAME["retrieval"].strength(table).argmax() == 3, "ranked by the score, not by the trials"
