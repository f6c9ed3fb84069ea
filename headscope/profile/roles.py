"""Roles: names for what a head does, given by documented thresholds.

Every rule says where its threshold comes from. Where a paper gives one it is the paper's; where none does it is ours, says so, and says
why. A share or a quota is always filled, also in a model whose heads do nothing of the kind; the reason given to a head says which sort of
rule it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class RoleRule:
    """One role. `metrics`: the columns it reads; the largest of `ranked_by` (default: of all of them) ranks its heads; `lowest`: small
    values are strong; `rule` and `source` in words.
    """

    name: str
    metrics: tuple[str, ...]
    rule: str
    source: str
    assign: Callable[[pd.DataFrame], dict[int, str]]
    lowest: bool = False
    ranked_by: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """The metric that ranks the role's heads."""
        return self.metrics[0]

    def strength(self, table: pd.DataFrame) -> np.ndarray:
        """[rows] what ranks the heads of this role, larger is stronger."""
        values = table[list(self.ranked_by or self.metrics)].to_numpy(dtype=np.float64).max(axis=1)
        return -values if self.lowest else values

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"name": self.name, "metrics": list(self.metrics), "rule": self.rule, "source": self.source}


def above(metric: str, threshold: float, text: str) -> Callable[[pd.DataFrame], dict[int, str]]:
    """Heads whose metric is greater than a threshold."""

    def assign(table: pd.DataFrame) -> dict[int, str]:
        values = table[metric].to_numpy(dtype=np.float64)
        return {int(row): f"{metric} {values[row]:.2f} > {threshold:g} on {text}" for row in np.flatnonzero(values > threshold)}

    return assign


def share(metric: str, part: float, *, lowest: bool, text: str) -> Callable[[pd.DataFrame], dict[int, str]]:
    """The lowest or highest part of the heads by a metric; equal values go by layer and head."""

    def assign(table: pd.DataFrame) -> dict[int, str]:
        values = table[metric].to_numpy(dtype=np.float64)
        ranked = ranks(values, lowest=lowest)[: int(part * np.isfinite(values).sum())]
        side = "lowest" if lowest else "highest"
        return {int(row): f"{metric} {values[row]:.1f} is among the {side} {part:.0%} on {text}" for row in ranked}

    return assign


def ranks(values: np.ndarray, *, lowest: bool) -> np.ndarray:
    """Row numbers from strongest to weakest; NaN rows are left out."""
    finite = np.flatnonzero(np.isfinite(values))
    order = np.argsort(values[finite] if lowest else -values[finite], kind="stable")
    return finite[order]


def quota(metric: str, count: Callable[[int], int], words: str, text: str) -> Callable[[pd.DataFrame], dict[int, str]]:
    """A fixed number of heads, the highest by a metric."""

    def assign(table: pd.DataFrame) -> dict[int, str]:
        values = table[metric].to_numpy(dtype=np.float64)
        order = ranks(values, lowest=False)
        return {
            int(row): f"{metric} {values[row]:.2f} is rank {place} of {len(order)} on {text} (quota: {words})"
            for place, row in enumerate(order[: count(len(order))], start=1)
        }

    return assign


def razor_quota(table: pd.DataFrame, echo: float = 0.01, induction: float = 0.14) -> dict[int, str]:
    """RazorAttention's retrieval heads: the top 1 % by echo and 14 % by induction score, and every head that shares a key head with one."""
    chosen: dict[int, str] = {}
    for metric, part in (("ind_sum", induction), ("echo_sum", echo)):
        values = table[metric].to_numpy(dtype=np.float64)
        order = ranks(values, lowest=False)
        for place, row in enumerate(order[: max(1, round(part * len(order)))], start=1):
            chosen.setdefault(
                int(row), f"{metric} {values[row]:.2f} is rank {place} of {len(order)} on repeated random tokens (quota: top {part:.0%})"
            )
    layers, heads, groups = (table[name].to_numpy() for name in ("layer", "head", "kv_head"))
    for row, why in list(chosen.items()):
        for other in np.flatnonzero((layers == layers[row]) & (groups == groups[row])):
            chosen.setdefault(int(other), f"shares key head {layers[row]}.{groups[row]} with {layers[row]}.{heads[row]}: {why}")
    return chosen


def retrieval_heads(table: pd.DataFrame, bar: float = 0.1) -> dict[int, str]:
    """Heads that copy at least a tenth of the needle, on average over the accepted trials."""
    score, active = (table[name].to_numpy(dtype=np.float64) for name in ("retrieval", "retrieval_active"))
    return {
        int(row): f"retrieval {score[row]:.2f} >= {bar:g} on needles; it copied in {active[row]:.0%} of the trials"
        for row in np.flatnonzero(score >= bar)
    }


def _receivers(heads: int) -> int:
    return min(20, math.ceil(0.05 * heads))


NATURAL, RANDOM, PICTURES = "natural text", "repeated random tokens", "questions about pictures"

ROLES: tuple[RoleRule, ...] = (
    RoleRule("sink", ("sink",), "sink > 0.3", "arXiv:2410.10781", above("sink", 0.3, NATURAL)),
    RoleRule(
        "streaming",
        ("streaming",),
        "streaming > 0.95",
        "headscope: one twentieth is the weight that a head may lose before its output moves visibly; papers use quotas",
        above("streaming", 0.95, NATURAL),
    ),
    RoleRule(
        "local",
        ("distance",),
        "lowest 30 % by distance",
        "arXiv:2510.13554",
        share("distance", 0.3, lowest=True, text=NATURAL),
        lowest=True,
    ),
    RoleRule("global", ("distance",), "highest 30 % by distance", "arXiv:2510.13554", share("distance", 0.3, lowest=False, text=NATURAL)),
    RoleRule(
        "previous_token",
        ("previous_token",),
        "previous_token > 0.4",
        "headscope: the same bar as induction, which it feeds",
        above("previous_token", 0.4, NATURAL),
    ),
    RoleRule(
        "duplicate_token",
        ("duplicate_token",),
        "duplicate_token > 0.4",
        "headscope: the same bar as induction",
        above("duplicate_token", 0.4, RANDOM),
    ),
    RoleRule(
        "induction",
        ("induction",),
        "induction > 0.4",
        "headscope: two fifths of a row on one key of hundreds; chance is 1 / (K + 1), papers rank and give no bar",
        above("induction", 0.4, RANDOM),
    ),
    RoleRule(
        "retrieval_like",
        ("ind_sum", "echo_sum"),
        "quota: top 14 % by ind_sum, top 1 % by echo_sum, whole key groups",
        "arXiv:2407.15891",
        razor_quota,
    ),
    RoleRule(
        "receiver",
        ("receiver",),
        "quota: the 20 highest by receiver, at most 5 %",
        "arXiv:2506.19143 takes 20; headscope: at most 5 %, since 20 is a large part of a small model",
        quota("receiver", _receivers, "20, at most 5%", NATURAL),
    ),
    RoleRule(
        "uniform",
        ("entropy_normalised",),
        "entropy_normalised > 0.9",
        "headscope: spreads over more than N^0.9 keys",
        above("entropy_normalised", 0.9, NATURAL),
    ),
    RoleRule(
        "retrieval", ("retrieval", "retrieval_active"), "retrieval >= 0.1", "arXiv:2404.15574", retrieval_heads, ranked_by=("retrieval",)
    ),
    RoleRule(
        "full_attention",
        ("duo_gate",),
        "duo_gate > 0.5",
        "headscope: the gate's middle; DuoAttention (arXiv:2410.10819) keeps a quantile, which a plan chooses",
        above("duo_gate", 0.5, "passkeys"),
    ),
    RoleRule(
        "vision",
        ("vhd_chosen",),
        "vhd_chosen > 0.5",
        "arXiv:2412.13949 reinforces heads above their layer's median; headscope: in more than half of the questions",
        above("vhd_chosen", 0.5, PICTURES),
    ),
    RoleRule(
        "image_centric",
        ("image_centric",),
        "image_centric > 0.5",
        "arXiv:2503.03321; headscope: in more than half of the rows",
        above("image_centric", 0.5, PICTURES),
    ),
)
"""Every role, in the order in which a head's roles are listed."""

BY_NAME = {rule.name: rule for rule in ROLES}


def assign_roles(table: pd.DataFrame) -> tuple[list[list[str]], list[dict[str, str]]]:
    """Roles and reasons per row of a heads table; rules whose metrics are not in it are passed over."""
    roles: list[list[str]] = [[] for _ in range(len(table))]
    reasons: list[dict[str, str]] = [{} for _ in range(len(table))]
    for rule in ROLES:
        if not set(rule.metrics) <= set(table.columns):
            continue
        for row, why in rule.assign(table).items():
            roles[row].append(rule.name)
            reasons[row][rule.name] = why
    return roles, reasons
