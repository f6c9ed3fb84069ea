"""VisionScale: louder or softer outputs of the heads that see the picture, a fixed set of them.

VHR chooses heads anew for every prompt; this takes the same ones always, as its authors' ablation does, and as one would after a profile.
It is Scale in text rows only: image tokens' own rows have no question to answer, and scaling them would change what the picture says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import register
from headscope.interventions.output_edits import Scale
from headscope.interventions.prompts import refuse_blind

if TYPE_CHECKING:
    from headscope.scope import Scope

METRICS = ("vhd", "vhd_raw", "vision_mass", "vision_mass_question")


@register("vision_scale")
@dataclass(frozen=True)
class VisionScale(Scale):
    """z := `gamma` z for vision heads in text rows; gamma one number or one per head.

    `VisionScale.chosen(scope, data)` finds heads by a probe. The fixed-head control of VHR (arXiv 2412.13949), which in its ablation
    helped less than heads chosen per prompt. gamma = 0 takes away what these heads write, whether of the picture or of the text.
    """

    positions: Any = field(default="text", kw_only=True)

    @classmethod
    def chosen(cls, scope: Scope, data: Any = None, *, metric: str = "vhd", count: int = 8, gamma: Any = 1.5, **probe: Any) -> VisionScale:
        """The `count` heads with the largest `metric` over questions about pictures: "vhd", "vhd_raw", "vision_mass" or
        "vision_mass_question". `data` and `probe`: what the probe of that metric takes (see `headscope.probes.Vhd`, `VisionMass`)."""
        from headscope.probes import Vhd, VisionMass

        refuse_blind(scope, "VisionScale")
        if metric not in METRICS:
            raise unknown_name(InterventionError, "metric", metric, METRICS)
        found = (Vhd if metric.startswith("vhd") else VisionMass)(**probe).run(scope, data)
        total = sum(module.heads for module in scope.topology.main)
        if not 1 <= count <= total:
            raise refusal(InterventionError, f"count={count}", f"the model has {total} heads", "ask for fewer")
        return cls(found.top(metric, count), gamma)

    def bind(self, scope: Scope) -> VisionScale:
        """A copy that knows its heads; InterventionError for a model that reads no pictures."""
        refuse_blind(scope, "VisionScale")
        return cast("VisionScale", super().bind(scope))


__all__ = ["VisionScale"]
