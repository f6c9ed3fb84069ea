"""What the form says, as interventions: checked before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from headscope.errors import InterventionError, refusal, unknown_name

if TYPE_CHECKING:
    from headscope.interventions import Stack
    from headscope.interventions.head_mask import Mode
    from headscope.profile import HeadProfile

KINDS = {
    "mask": "Mask heads",
    "act": "Calibrate (ACT)",
    "scale": "Scale heads",
    "noise": "Perturb (noise)",
    "temperature": "Temperature",
    "json": "JSON",
}
MASKS = ("zero", "uniform")


@dataclass(frozen=True)
class Change:
    """The fields of the form. `heads`: pairs "3.0, 4.1", or a choice from a profile ("top 5 induction"); `strength`: gamma of scale, the
    share of noise, tau of temperature, beta of ACT; `spec`: JSON for kind "json".
    """

    kind: str = "mask"
    heads: str = ""
    mode: str = "zero"
    strength: float = 1.0
    spec: str = ""

    def stack(self, profile: HeadProfile | None = None) -> Stack:
        """The interventions. InterventionError for what cannot be one; `profile` is asked for heads chosen by role or metric."""
        from headscope.interventions import ACT, HeadMask, Noise, Scale, Stack, Temperature

        if self.kind not in KINDS:
            raise unknown_name(InterventionError, "change", self.kind, KINDS)
        if self.kind == "json":
            return Stack.from_json(self._json(profile))
        heads = chosen_heads(self.heads, profile)
        made: Any
        if self.kind == "mask":
            made = HeadMask(heads=heads, mode=cast("Mode", self.mode))  # checked by HeadMask
        elif self.kind == "act":
            made = ACT(heads=heads, beta=self.strength)
        elif self.kind == "scale":
            made = Scale(heads=heads, gamma=self.strength)
        elif self.kind == "noise":
            made = Noise(heads=heads, sigma=self.strength)
        else:
            made = Temperature(heads=heads, tau=self.strength)
        return Stack((made,))

    def _json(self, profile: HeadProfile | None) -> str:
        try:
            given = json.loads(self.spec)
        except ValueError as error:
            raise refusal(InterventionError, f"{self.spec[:60]!r}", f"it is no JSON ({error})", "paste what Stack.to_json gave") from None
        listed = given.get("interventions", [given]) if isinstance(given, dict) else given
        for one in listed if isinstance(listed, list) else []:
            if isinstance(one, dict) and isinstance(one.get("heads"), str) and one["heads"] != "all":
                one["heads"] = [list(pair) for pair in chosen_heads(one["heads"], profile)]
        return json.dumps(given)


def chosen_heads(text: str, profile: HeadProfile | None) -> list[tuple[int | str, int]]:
    """Heads from "3.0, 4.1" or, where a profile is given, "top 5 induction". InterventionError for an empty or unreadable choice."""
    from headscope.cli.intervene_cmd import PAIRS
    from headscope.interventions import HeadSet

    if not text.strip():
        raise refusal(InterventionError, "no heads", "there is nothing to change", 'write heads like "3.0, 4.1"')
    if PAIRS.fullmatch(text):
        return list(HeadSet.of(text))
    if profile is None:
        raise refusal(InterventionError, f"heads {text!r}", "they are chosen by a profile, and no run is chosen", "choose a run")
    return list(HeadSet.select(profile, text))
