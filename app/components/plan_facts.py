"""What a plan costs and keeps, and which patterns it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dash import html
from dash.development.base_component import Component

from headscope.app.components.panel import facts
from headscope.app.format import TIMES, count

if TYPE_CHECKING:
    from headscope.plans.mass import KeptMass
    from headscope.plans.plan import SparsePlan

BASES = {
    "exact": "exact, from the run's q and k",
    "maps": "from the run's block maps",
    "extrapolated": "extrapolated from a shorter text",
}


def plan_facts(plan: SparsePlan, length: int, kept: KeptMass | None, why: str) -> Component:
    """The numbers at a length; `why` the kept mass is missing."""
    density = plan.density(length)
    if kept is None:
        mass: list[str] | str = f"not known: {why}"
    else:
        mass = f"mean {kept.mean:.2%}, least {kept.least:.2%} ({BASES[kept.basis]}, {count(kept.tokens, 'token')})"
    return html.Div(
        [
            facts(
                ("Computed", f"{density:.1%} of the entries of a prefill of {length:,} tokens"),
                ("Attention speed", f"at most {1 / max(density, 1e-9):.1f}{TIMES} dense: the kept entries alone, no overhead counted"),
                ("KV cache", f"{plan.kv_share(length):.1%} of dense: {_bytes(plan.kv_bytes(length))} a sequence in 16 bits"),
                ("Attention kept", mass),
                ("Patterns", ", ".join(f"{number} {kind}" for kind, number in plan.counts().items())),
                ("Method", f"{plan.method}"),
            ),
            html.Ul([html.Li(note) for note in plan.notes], className="plan-notes") if plan.notes else None,
        ]
    )


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return ""
