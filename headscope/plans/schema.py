"""The plan file's schema: what `plan.json` must look like, as JSON Schema for other programs, and the check that names the wrong head."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from headscope.errors import PlanError, refusal

VERSION = 1
_COUNTS = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1}

JSON_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "headscope sparse plan",
    "type": "object",
    "required": ["schema", "schema_version", "model", "method", "parameters", "notes", "patterns", "heads"],
    "properties": {
        "schema": {"const": "headscope-plan"},
        "schema_version": {"type": "integer", "minimum": 1},
        "model": {
            "type": "object",
            "required": ["name", "layers", "heads", "kv_heads", "head_dim"],
            "properties": {
                "name": {"type": "string"},
                "fingerprint": {"type": "string"},
                "layers": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                "heads": _COUNTS,
                "kv_heads": _COUNTS,
                "head_dim": _COUNTS,
            },
        },
        "method": {"type": "string"},
        "parameters": {"type": "object"},
        "notes": {"type": "array", "items": {"type": "string"}},
        "patterns": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["kind"], "properties": {"kind": {"type": "string"}}},
            "description": "the distinct patterns",
        },
        "heads": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "description": "per layer, per query head: the number of its pattern",
        },
    },
}
"""The published schema of a plan file."""


def check_plan(given: Any) -> None:
    """Raises PlanError for plain data that is no plan of a version that this code reads, naming what is wrong where."""
    if not isinstance(given, dict) or given.get("schema") != "headscope-plan":
        raise refusal(PlanError, f"{str(given)[:60]}", 'it has no "schema": "headscope-plan"', "pass a plan file of headscope")
    version = given.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise refusal(PlanError, f"schema_version {version!r}", "it is no version", f"versions up to {VERSION} are read")
    if version > VERSION:
        raise refusal(PlanError, f"a plan of schema_version {version}", f"this headscope reads up to {VERSION}", "update headscope")
    for name in JSON_SCHEMA["required"]:
        if name not in given:
            raise refusal(PlanError, f"a plan without {name!r}", "the schema requires it", "see headscope.plans.JSON_SCHEMA")
    model = given["model"]
    lists = ("layers", "heads", "kv_heads", "head_dim")
    if not isinstance(model, dict) or any(
        not isinstance(model.get(name), list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in model[name])
        for name in lists
    ):
        raise refusal(PlanError, "the plan's model", f"{', '.join(lists)} are lists of whole numbers", "see headscope.plans.JSON_SCHEMA")
    for name in ("name", "fingerprint"):
        if not isinstance(model.get(name, "" if name == "fingerprint" else None), str):
            raise refusal(PlanError, f"model.{name} = {str(model.get(name))[:60]}", "it is a text", "see headscope.plans.JSON_SCHEMA")
    count = len(model["layers"])
    for name in lists:
        if len(model[name]) != count or count == 0:
            raise refusal(PlanError, f"model.{name} of {len(model[name])}", f"there are {count} layers", "give one per layer")
    if model["layers"] != sorted({one for one in model["layers"] if one >= 0}):
        raise refusal(PlanError, f"model.layers {str(model['layers'])[:60]}", "they are 0 or more, each once, ascending", "correct them")
    if min(model["head_dim"]) < 1:
        raise refusal(PlanError, f"model.head_dim {min(model['head_dim'])}", "a head has 1 number or more", "correct it")
    for layer, heads, groups in zip(model["layers"], model["heads"], model["kv_heads"], strict=True):
        if groups < 1 or heads < 1 or heads % groups:
            raise refusal(
                PlanError, f"layer {layer} with {heads} heads and {groups} key heads", "heads are shared out evenly", "correct them"
            )
    _check_heads(given, model)
    if not isinstance(given["parameters"], dict) or not isinstance(given["notes"], list) or not isinstance(given["method"], str):
        raise refusal(PlanError, "method, parameters or notes", "they are a text, a table and a list", "see headscope.plans.JSON_SCHEMA")


def _check_heads(given: dict[str, Any], model: dict[str, Any]) -> None:
    rows, patterns = given["heads"], given["patterns"]
    if not isinstance(patterns, list) or not patterns:
        raise refusal(PlanError, "no patterns", "heads name them by number", "list at least one")
    if not isinstance(rows, list) or len(rows) != len(model["layers"]):
        raise refusal(PlanError, "heads", f"there is one row per layer, {len(model['layers'])}", "give one row per layer")
    for layer, heads, row in zip(model["layers"], model["heads"], rows, strict=True):
        if not isinstance(row, list) or len(row) != heads:
            size = len(row) if isinstance(row, list) else 0
            raise refusal(PlanError, f"layer {layer} with {size} patterns", f"it has {heads} heads", "give one per head")
        for head, number in enumerate(row):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(patterns):
                raise refusal(PlanError, f"pattern {number!r} of head {layer}.{head}", f"there are {len(patterns)}", "use their number")


def write_text(path: Path, text: str, overwrite: bool) -> Path:
    """Writes a file whole or not at all. PlanError when it exists and `overwrite` is false, or its folder cannot be written."""
    if path.exists() and not overwrite:
        raise refusal(PlanError, str(path), "it exists", "choose another path, or overwrite it expressly")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise refusal(PlanError, str(path), f"it cannot be written ({error.strerror or error})", "choose another path") from None
    return path
