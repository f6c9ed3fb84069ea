"""Planners: from what is known of the heads to a sparse plan. One file per method.

base       Planner, what it may look at (Evidence), and what `density` means
registry   the planners by name; `plan(source, method, **options)`
"""

from __future__ import annotations

from headscope.plans.planners.base import Evidence, Planner, Requires
from headscope.plans.planners.registry import PLANNERS, plan, planner

__all__ = ["PLANNERS", "Evidence", "Planner", "Requires", "plan", "planner"]
