"""headscope's own JSON: every metric and the plan, with a JSON Schema beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, PlanError, refusal
from headscope.export.base import Export, Format
from headscope.export.files import dump, read_json
from headscope.export.fitting import Fitted
from headscope.export.imported import Found, Hints, facts_of, model_from, plan_of
from headscope.export.loss import HeadLoss
from headscope.plans.plan import Place, PlanModel, SparsePlan
from headscope.plans.schema import JSON_SCHEMA as PLAN_SCHEMA
from headscope.profile.head_profile import HeadProfile

VERSION = 1
_COUNTS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

JSON_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "headscope head profile",
    "type": "object",
    "required": ["schema", "schema_version", "model", "metrics", "roles", "plan"],
    "properties": {
        "schema": {"const": "headscope-profile"},
        "schema_version": {"type": "integer", "minimum": 1},
        "model": {
            "type": "object",
            "required": ["name", "fingerprint", "layers", "heads", "kv_heads", "head_dim"],
            "properties": {
                "name": {"type": "string"},
                "fingerprint": {"type": "string"},
                "layers": _COUNTS,
                "heads": _COUNTS,
                "kv_heads": _COUNTS,
                "head_dim": _COUNTS,
            },
        },
        "metrics": {
            "type": "object",
            "description": "per metric: its unit, and per layer, per query head, the value; null where there is none",
            "additionalProperties": {
                "type": "object",
                "required": ["unit", "values"],
                "properties": {
                    "unit": {"type": "string"},
                    "values": {"type": "array", "items": {"type": "array", "items": {"type": ["number", "null"]}}},
                },
            },
        },
        "roles": {
            "type": "object",
            "description": "per role: its heads as [layer, head]",
            "additionalProperties": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
            },
        },
        "plan": {"oneOf": [{"type": "null"}, {key: value for key, value in PLAN_SCHEMA.items() if key != "$schema"}]},
    },
}
"""The published schema of `profile.json`."""


class Headscope(Format):
    """`profile.json`: every metric of every head, the roles, and the plan where there is one, as `schema.json` beside it says. Nothing is
    lost but what a run directory holds besides its table (statistics, maps, text).
    """

    name: ClassVar[str] = "headscope"
    title: ClassVar[str] = "headscope profile as JSON"
    engine: ClassVar[str] = "headscope, and anything that reads JSON"
    reader: ClassVar[str] = "headscope.export.read, or a JSON Schema validator"
    main: ClassVar[str] = "profile.json"
    holds: ClassVar[tuple[str, ...]] = ("every metric of every head", "roles", "a plan with any pattern")
    lacks: ClassVar[tuple[str, ...]] = ("statistics, maps, text and tables of a run directory",)
    metrics: ClassVar[tuple[str, ...]] = ("every metric",)

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Every pattern as it is."""
        return Fitted(dict(plan.patterns))

    def encode(self, export: Export) -> dict[str, bytes]:
        """The document and its schema."""
        return self._files(export)

    def decode(self, path: Path, hints: Hints) -> Found:
        """The document."""
        given = read_json(path)
        if isinstance(given, dict) and given.get("schema") == "headscope-plan":
            plan = _plan(given, path)
            return Found(plan.model, plan)
        if not isinstance(given, dict) or given.get("schema") != "headscope-profile":
            raise refusal(
                ExportError, str(path), 'it has no "schema": "headscope-profile"', "pass a profile.json or plan.json of headscope"
            )
        version = given.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
            raise refusal(ExportError, str(path), f"schema_version {version!r}", f"this headscope reads up to {VERSION}; update it")
        model = model_from(given.get("model"), path)
        metrics = given.get("metrics")
        if not isinstance(metrics, dict):
            raise refusal(ExportError, str(path), "metrics is no table", "see schema.json")
        scores = {str(name): _values(name, entry, model, path) for name, entry in metrics.items() if name != "kept_share"}
        plan_given = given.get("plan")
        return Found(model, None if plan_given is None else _plan(plan_given, path), scores)

    def load(self, export: Export) -> str:
        """With headscope, or as JSON."""
        return f'import json\nprofile = json.load(open("{self.main}"))  # or headscope.export.read(".", "headscope")'

    def _resolve(
        self, source: SparsePlan | HeadProfile, metric: str | None, length: int | None, profile: HeadProfile | None
    ) -> tuple[Export, SparsePlan | None]:
        if isinstance(source, SparsePlan):
            if metric is not None:
                raise refusal(ExportError, f"metric {metric!r} beside a plan", "a plan has no scores", "export the profile that has them")
            return Export(source.model, source, length=length, profile=profile), source
        carried = plan_of(source)
        model = PlanModel.of(source) if carried is None else carried.model
        names = [one for one in source.metrics if carried is None or one != "kept_share"] if metric is None else [metric]
        if metric is not None and metric not in source.metrics:
            raise refusal(ExportError, f"metric {metric!r}", f"this profile has {', '.join(source.metrics[:8])}", "name one of them")
        facts = {"length": facts_of(source).get("length"), "metrics": list(names)}
        export = Export(model, None, {}, ", ".join(names), length, source, {key: one for key, one in facts.items() if one is not None})
        if carried is not None:
            export.plan = carried
            return export, carried
        return export, None

    def _scores(self, export: Export) -> tuple[dict[str, bytes], list[HeadLoss]]:
        count = len(export.facts["metrics"])
        said = f"{count} metrics"
        return self._files(export), [HeadLoss(*place, said, said, False, "", 0.0) for place in export.model.places]

    def _files(self, export: Export) -> dict[str, bytes]:
        model, profile = export.model, export.profile
        metrics: dict[str, Any] = {}
        roles: dict[str, list[list[int]]] = {}
        if profile is not None:
            for name in export.facts.get("metrics", []):
                values = [
                    [_finite(profile.value(layer, head, name)) for head in range(heads)]
                    for layer, heads in zip(model.layers, model.heads, strict=True)
                ]
                metrics[name] = {"unit": str(profile.card.metrics.get(name, {}).get("unit", "")), "values": values}
            for layer, head in model.places:
                for role in profile.roles_of(layer, head):
                    roles.setdefault(role, []).append([layer, head])
        document = {
            "schema": "headscope-profile",
            "schema_version": VERSION,
            "model": model.to_dict(),
            "metrics": metrics,
            "roles": roles,
            "plan": None if export.plan is None else export.plan.to_dict(),
        }
        return {self.main: dump(document), "schema.json": dump(JSON_SCHEMA, indent=2)}

    def checked(self, metric: str) -> bool:
        """A missing value is null here, and stays missing."""
        return False


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plan(given: Any, path: Path) -> SparsePlan:
    try:
        return SparsePlan.from_dict(given)
    except PlanError as error:
        raise refusal(ExportError, str(path), f"its plan is wrong ({error})", "write it again") from None


def _values(name: str, entry: Any, model: PlanModel, path: Path) -> dict[Place, float]:
    rows = entry.get("values") if isinstance(entry, dict) else None
    if not isinstance(rows, list) or [len(row) if isinstance(row, list) else -1 for row in rows] != list(model.heads):
        raise refusal(ExportError, str(path), f"{name} does not have a value for every head", "it is ragged; see schema.json")
    out: dict[Place, float] = {}
    for layer, row in zip(model.layers, rows, strict=True):
        for head, value in enumerate(row):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise refusal(ExportError, str(path), f"{name} of head {layer}.{head} is {value!r}", "numbers and null are read")
            out[layer, head] = math.nan if value is None else float(value)
    return out
