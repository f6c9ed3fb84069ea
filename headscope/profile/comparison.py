"""Comparing two profiles of models with the same layers and heads, metric by metric."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import ProbeError, refusal, unknown_name

if TYPE_CHECKING:
    from headscope.profile.head_profile import HeadProfile

Change = tuple[int, int, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class MetricComparison:
    """One metric in both profiles.

    `spearman` and `pearson`: correlation over heads, NaN where a metric is constant. `overlap`: share of the top k heads of the first that
    are among the top k of the second. `changes`: (layer, head, first, second), the largest |second - first| first.
    """

    metric: str
    spearman: float
    pearson: float
    overlap: float
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two profiles side by side. `notes`: what makes the numbers less comparable than they look."""

    first: str
    second: str
    top: int
    metrics: dict[str, MetricComparison]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per metric: metric, spearman, pearson, overlap, most_changed (in words)."""
        return [
            {
                "metric": row.metric,
                "spearman": row.spearman,
                "pearson": row.pearson,
                "overlap": row.overlap,
                "most_changed": ", ".join(f"{layer}.{head} ({_difference(b - a)})" for layer, head, a, b in row.changes[:3] if b != a)
                or "none",
            }
            for row in self.metrics.values()
        ]

    def changed(self, metric: str, n: int = 10) -> list[Change]:
        """The n heads that changed most in a metric: (layer, head, first, second)."""
        if metric not in self.metrics:
            raise unknown_name(ProbeError, "metric of both profiles", metric, self.metrics)
        return list(self.metrics[metric].changes[:n])

    def to_dict(self) -> dict[str, Any]:
        """As plain data; NaN as None."""
        rows = [
            {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()} for row in self.rows()
        ]
        return {"first_name": self.first, "second_name": self.second, "top": self.top, "metrics": rows, "notes": list(self.notes)}

    def __repr__(self) -> str:
        return f"Comparison({self.first!r}, {self.second!r}, {len(self.metrics)} metrics, {len(self.notes)} notes)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        columns = ("metric", "spearman", "pearson", "overlap", "most_changed")
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(_cell(row[name]))}</td>" for name in columns) + "</tr>"
            for row in self.rows()
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return {"text/plain": repr(self), "text/html": f"<div><p>{html.escape(repr(self))}</p>{table}<ul>{notes}</ul></div>"}


def compare(first: HeadProfile, second: HeadProfile, top: int = 10) -> Comparison:
    """Compares every metric that both profiles have. ProbeError when their layers and heads differ or no metric is common."""
    if top < 1:
        raise refusal(ProbeError, f"top={top}", "it counts heads and must be at least 1", "pass top=10")
    heads = [(int(layer), int(head)) for layer, head in zip(first.table["layer"], first.table["head"], strict=True)]
    others = {
        (int(layer), int(head)): row for row, (layer, head) in enumerate(zip(second.table["layer"], second.table["head"], strict=True))
    }
    if set(heads) != set(others):
        raise refusal(
            ProbeError,
            f"{first.card.model['name']} and {second.card.model['name']}",
            f"one has {len(first.layers)} layers and {first.heads} heads, the other {len(second.layers)} and {second.heads}",
            "compare models with the same layers and heads",
        )
    common = [name for name in first.metrics if name in second.metrics]
    if not common:
        raise refusal(ProbeError, "the two profiles", "they have no metric in common", "profile both with the same probes")
    order = [others[place] for place in heads]
    metrics = {}
    for name in common:
        a = first.table[name].to_numpy(dtype=np.float64)
        b = second.table[name].to_numpy(dtype=np.float64)[order]
        metrics[name] = _compare_metric(name, a, b, heads, min(top, len(heads)))
    return Comparison(str(first.card.model["name"]), str(second.card.model["name"]), top, metrics, tuple(_notes(first, second)))


def _compare_metric(name: str, a: np.ndarray, b: np.ndarray, heads: list[tuple[int, int]], top: int) -> MetricComparison:
    both = np.isfinite(a) & np.isfinite(b)
    rows = np.flatnonzero(both)
    change = rows[np.argsort(-np.abs(b[rows] - a[rows]), kind="stable")]
    best_a, best_b = (set(rows[np.argsort(-values[rows], kind="stable")][:top].tolist()) for values in (a, b))
    return MetricComparison(
        name,
        spearman=correlation(mean_ranks(a[both]), mean_ranks(b[both])),
        pearson=correlation(a[both], b[both]),
        overlap=len(best_a & best_b) / len(best_a) if best_a else math.nan,
        changes=tuple((*heads[row], float(a[row]), float(b[row])) for row in change),
    )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; NaN for fewer than two values or where either side is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt(float((a * a).sum()) * float((b * b).sum())))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _notes(first: HeadProfile, second: HeadProfile) -> list[str]:
    notes = []
    texts = {row["kind"]: row for row in second.card.data}
    for row in first.card.data:
        other = texts.get(row["kind"])
        if other is None:
            continue
        if row["tokens"] != other["tokens"]:
            notes.append(f"{row['kind']} text has {row['tokens']} and {other['tokens']} tokens: distance and entropy grow with the length")
        elif row["sha256"] != other["sha256"]:
            notes.append(f"{row['kind']} text differs")
    changed = [" and ".join(str(row.get("name")) for row in one.card.interventions) or "no intervention" for one in (first, second)]
    if first.card.interventions != second.card.interventions:
        notes.append(f"measured under {changed[0]}, and under {changed[1]}")
    for name in ("dtype",):
        a, b = first.card.model.get(name), second.card.model.get(name)
        if a != b:
            notes.append(f"{name} is {a} and {b}")
    for name in sorted({*first.card.parameters} & {*second.card.parameters} - {"context", "random_block", "map_block", "texts"}):
        a, b = first.card.parameters[name], second.card.parameters[name]
        if a != b:
            notes.append(f"{name} is {a} and {b}")
    return notes


def _difference(value: float) -> str:
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.0f}"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
