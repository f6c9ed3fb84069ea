"""Sparse plans: what every head may skip.

patterns   which keys a head sees (static rules and rules that choose per input)
plan       SparsePlan: one pattern per head of one model, with its costs, as JSON
mass       how much attention a plan keeps, from statistics
planners   from what is known of the heads to a plan, one method a file
schema     the file format
"""

from __future__ import annotations

from headscope.plans.dynamic import Budget, TopBlocks, TopKeys, VerticalSlash
from headscope.plans.dynamic_anchor import GroupColumns, Stripes
from headscope.plans.dynamic_flexprefill import FlexBlocks
from headscope.plans.dynamic_steps import HeldBlocks
from headscope.plans.patterns import Blocks, Dense, Lines, Pattern, Power, Span, Streaming, Strided
from headscope.plans.plan import PlanModel, SparsePlan
from headscope.plans.registry import PATTERNS
from headscope.plans.schema import JSON_SCHEMA

__all__ = [
    "JSON_SCHEMA",
    "PATTERNS",
    "Blocks",
    "Budget",
    "Dense",
    "FlexBlocks",
    "GroupColumns",
    "HeldBlocks",
    "Lines",
    "Pattern",
    "PlanModel",
    "Power",
    "Span",
    "SparsePlan",
    "Streaming",
    "Strided",
    "Stripes",
    "TopBlocks",
    "TopKeys",
    "VerticalSlash",
]
