"""Patterns by the name that they have in JSON, and reading one back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from headscope.errors import PlanError, refusal, unknown_name
from headscope.plans.dynamic import Budget, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_anchor import GroupColumns, Stripes
from headscope.plans.dynamic_flexprefill import FlexBlocks
from headscope.plans.dynamic_steps import HeldBlocks
from headscope.plans.patterns import Blocks, Dense, Lines, Pattern, Power, Span, Streaming, Strided

PATTERNS: dict[str, type[Pattern]] = {
    cls.kind: cls
    for cls in (
        *(Dense, Streaming, Span, Strided, Power, Lines, Blocks, GroupColumns),
        *(VerticalSlash, TopBlocks, Budget, TopKeys, FlexBlocks, Stripes, HeldBlocks),
    )
}
"""Every pattern by its name in JSON."""


def pattern_from(given: Any) -> Pattern:
    """A pattern from plain data. Raises PlanError for an unknown kind or field, or values that describe no pattern."""
    if not isinstance(given, dict) or "kind" not in given:
        raise refusal(PlanError, f"{str(given)[:60]}", 'a pattern is {"kind": ..., its fields}', "see headscope.plans.PATTERNS")
    if not isinstance(given["kind"], str) or given["kind"] not in PATTERNS:
        raise unknown_name(PlanError, "pattern", str(given["kind"]), PATTERNS)
    cls = PATTERNS[given["kind"]]
    known = {item.name for item in fields(cls)}
    values = {name: _frozen(value) for name, value in given.items() if name != "kind"}
    for name in values:
        if name not in known:
            raise unknown_name(PlanError, f"field of {cls.kind}", name, known)
    for item in fields(cls):
        if item.type == "bool" and not isinstance(values.get(item.name, False), bool):
            raise refusal(PlanError, f"{cls.kind} with {item.name}={str(values[item.name])[:60]}", "it is true or false", "correct it")
    try:
        return cls(**values)
    except TypeError as error:
        raise refusal(PlanError, f"{str(given)[:60]}", str(error), f"{cls.kind} takes {', '.join(sorted(known))}") from None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value
