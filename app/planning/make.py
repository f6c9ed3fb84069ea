"""The plan of a form, kept for a while: a slider asks for the same plan again when it comes back."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.app.plan_files import FOLDER
from headscope.app.runs import Run
from headscope.errors import PlanError, refusal

if TYPE_CHECKING:
    from headscope.plans.plan import SparsePlan

PREFERRED = "allocate"
KEPT = 64
LENGTHS = (2048, 8192, 32768, 131072)
_kept: OrderedDict[tuple[Run, str, str, float, int], SparsePlan] = OrderedDict()
_lock = threading.Lock()


def keep(run: Run, plan: SparsePlan, root: Path) -> str:
    """Writes a plan into the folder `plans` of the runs directory, where every page finds it; gives its id.

    The name is made here, from the run and the plan's own words; a plan that is there under it is replaced, since it says the same.
    """
    bound = next((one for one in ("density", "cache") if plan.parameters.get(one) is not None), "own")
    share = plan.parameters.get(bound)
    words = [run.id, plan.method, *([] if share is None else [f"{bound}{round(100 * float(share))}"]), str(plan.parameters["length"])]
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", word) for word in words)
    plan.save(folder / f"{name}.json", overwrite=True)
    return name


def make(run: Run, method: str, bound: str, share: float, length: int) -> SparsePlan:
    """The plan of a run by a method, `bound` ("density" or "cache") at most `share`, stated at `length` tokens.

    PlanError for what cannot be planned, with what to do.
    """
    from headscope.plans.planners import PLANNERS, plan

    if bound not in ("density", "cache"):
        raise refusal(PlanError, f"bound {bound!r}", "a plan is bounded by density or by cache", "choose one of them")
    if method in PLANNERS and bound not in PLANNERS[method].bounds:
        bound = PLANNERS[method].bounds[0]
    key = (run, method, bound, round(share, 4), length)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    options: dict[str, Any] = {bound: round(share, 4), "length": length}
    made = plan(run.profile(), method, **options)
    with _lock:
        _kept[key] = made
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return made
