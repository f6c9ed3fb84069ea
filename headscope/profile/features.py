"""The metric vector of a head, free of the length of the text, as the classifier and the clusters read it.

A distance in tokens grows with the text, so a classifier that read it raw would call every head of a longer text global. Distances are
therefore divided by what a head of equal weights would have at that length, and everything else here is a share already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headscope.errors import ProbeError, refusal

if TYPE_CHECKING:
    from headscope.profile.head_profile import HeadProfile

SHARES = (
    "sink",
    "streaming",
    "local_mass",
    "entropy_normalised",
    "previous_token",
    "duplicate_token",
    "induction",
    "ind_sum",
    "echo_sum",
)
LENGTHS = ("distance", "distance_beyond_sink")
FEATURES = (*SHARES, *LENGTHS, "waad")
WINDOW = 10
"""W of WAAD, which it is divided by."""


def features(profile: HeadProfile) -> np.ndarray:
    """[heads, len(FEATURES)] float64; NaN becomes 0. ProbeError when the profile lacks a metric, or has no natural text."""
    missing = [name for name in FEATURES if name not in profile.table.columns]
    context = profile.card.context
    if missing or context is None:
        raise refusal(
            ProbeError,
            f"a profile with the metrics {', '.join(profile.metrics[:6])}",
            f"kinds and clusters are read from {', '.join(missing) or 'metrics of natural text'} too",
            "profile with probes='passive'",
        )
    table = profile.table[list(FEATURES)].to_numpy(dtype=np.float64, copy=True)
    for name in LENGTHS:
        table[:, FEATURES.index(name)] /= max(1.0, (context - 1) / 4)  # mean distance of equal weights, over all rows
    table[:, FEATURES.index("waad")] /= WINDOW
    return np.nan_to_num(table, nan=0.0)
