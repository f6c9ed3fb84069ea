"""What a metric means, its unit and where it comes from: read from the run's card, and from the probes for what the card leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from headscope.app.format import words

_PREFERRED = ("sink", "induction")


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of the heads table, as people should read it; `probe` is what measures it."""

    name: str
    label: str
    meaning: str = ""
    unit: str = ""
    source: str = ""
    probe: str = ""
    text: str = ""


def describe(card: Mapping[str, Any], name: str) -> Metric:
    """The description of a metric of a run; one that neither the card nor a probe describes is shown by its name alone."""
    facts = card.get("metrics", {}).get(name, {})
    if "title" not in facts:  # cards of today say it all; asking the probes imports torch
        facts = {**_known().get(name, {}), **facts}
    probe = str(facts.get("probe", ""))
    sources = {str(row.get("name")): str(row.get("source", "")) for row in card.get("probes", [])}
    large = f"High: {facts['higher_is']}." if facts.get("higher_is") else ""
    meaning = " ".join(part for part in (str(facts.get("title", "")), large) if part)
    kind = str(facts.get("data", ""))
    return Metric(name, words(name), meaning, str(facts.get("unit", "")), sources.get(probe) or str(facts.get("source", "")), probe, kind)


def default_metric(metrics: list[str]) -> str:
    """The metric a page opens with."""
    return next((name for name in _PREFERRED if name in metrics), metrics[0])


def grouped(card: Mapping[str, Any], metrics: list[str]) -> list[dict[str, object]]:
    """The metrics as options of a select: those of a probe with several together, the others first."""
    groups: dict[str, list[dict[str, str]]] = {}
    for name in metrics:
        metric = describe(card, name)
        groups.setdefault(metric.probe, []).append({"value": name, "label": metric.label})
    single: list[dict[str, object]] = [dict(items[0]) for items in groups.values() if len(items) == 1]
    several: list[dict[str, object]] = [
        {"group": words(probe) or "Other", "items": items} for probe, items in groups.items() if len(items) > 1
    ]
    return [{"group": "One number", "items": single}, *several] if single and several else [*single, *several]


@cache
def _known() -> dict[str, dict[str, Any]]:
    from headscope.probes import REGISTRY

    found: dict[str, dict[str, Any]] = {}
    for name, probe in REGISTRY.items():
        about = probe.describe()
        for metric in about["metrics"]:
            found[metric["name"]] = {**metric, "probe": name, "title": about["title"], "source": about["source"], "data": about["data"]}
    return found
