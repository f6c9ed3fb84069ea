"""Kinds: what sort of head each head is, by a classifier that learned it from heads whose kind is known.

Thresholds ask one question of one metric. The classifier reads all metrics of a head at once and must choose, so it tells apart what
single thresholds confuse: a head that looks one token back from a head that looks at everything near, a sink head from a head that falls
back to the first token for want of anything better. It is a multinomial logistic regression (scikit-learn), trained by
`headscope.profile.train_kinds` on planted models (kind known by construction, at many sharpnesses, mixed with the fallback to the first
token) and on the bundled induction model; its coefficients are a small JSON file, so nothing is unpickled and every answer can be explained
as a sum.

It abstains below a probability of 0.6: a head that is none of the kinds it knows is said to be none.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import RunError, refusal
from headscope.profile.features import FEATURES, features

if TYPE_CHECKING:
    import pandas as pd

    from headscope.profile.head_profile import HeadProfile

ABSTAIN = 0.6
NONE = "none"
FILE = "kinds.json"


@cache
def _model() -> dict[str, Any]:
    given = json.loads((resources.files("headscope.profile") / FILE).read_text())
    if tuple(given["features"]) != FEATURES:
        raise refusal(RunError, FILE, "it was trained on other features than this code reads", "run headscope.profile.train_kinds")
    return {
        name: np.array(value) if isinstance(value, list) and name not in ("features", "kinds") else value for name, value in given.items()
    }


def kinds(profile: HeadProfile) -> pd.DataFrame:
    """One row per head: layer, head, `kind` (one of the classifier's kinds, or "none"), `probability` of the likeliest kind, `why`.

    `why` names the metrics that speak most for the kind against the runner-up, with their values. Raises ProbeError for a profile without
    the passive metrics.
    """
    import pandas as pd

    model = _model()
    values = features(profile)
    scaled = (values - model["mean"]) / model["scale"]
    logits = scaled @ model["coefficients"].T + model["intercepts"]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    names = list(model["kinds"])
    rows = []
    for row in range(len(values)):
        order = np.argsort(-weights[row], kind="stable")
        best, second = int(order[0]), int(order[1])
        chance = float(weights[row, best])
        pull = scaled[row] * (model["coefficients"][best] - model["coefficients"][second])
        told = [f"{FEATURES[at]} {values[row, at]:.2f}" for at in np.argsort(-pull)[:3] if pull[at] > 0]
        kind = names[best] if chance >= ABSTAIN else NONE
        likely = f"{names[best]} {chance:.2f}" if kind != NONE else f"{names[best]} {chance:.2f} < {ABSTAIN:g}"
        rows.append((kind, chance, f"{likely}, before {names[second]} {weights[row, second]:.2f}: {', '.join(told)}"))
    out = profile.table[["layer", "head"]].reset_index(drop=True)
    return pd.concat([out, pd.DataFrame(rows, columns=["kind", "probability", "why"])], axis=1)
