"""Clusters: which heads of one model are alike, without any name given beforehand.

k-means on the standardised metric vectors. The number of clusters is the one with the largest mean silhouette between 2 and 10, unless the
user gives it; a silhouette near 0 means that the heads form no groups, and the result says so rather than drawing borders through a cloud.
A cluster is described by the metrics in which it lies furthest from the model's mean, in standard deviations, and by the head nearest to
its centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import ProbeError, refusal
from headscope.profile.features import FEATURES, features

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from headscope.profile.head_profile import HeadProfile

MOST = 10
GROUPLESS = 0.25
"""Below this mean silhouette the structure may be artificial (Kaufman and Rousseeuw 1990)."""


@dataclass(frozen=True, eq=False)
class HeadClusters:
    """`labels` [heads] int, in order of the profile's table, largest cluster 0. `silhouette`: mean over heads, -1 .. 1. `table`: one row
    per cluster: cluster, heads, nearest (layer, head), why. `plane` [heads, 2]: the first two principal components; `explained`: their
    shares of the variance.
    """

    labels: np.ndarray
    silhouette: float
    table: pd.DataFrame
    plane: np.ndarray
    explained: tuple[float, float]
    places: tuple[tuple[int, int], ...]

    @property
    def grouped(self) -> bool:
        """False when the heads form no clear groups."""
        return self.silhouette >= GROUPLESS

    def plot(self) -> go.Figure:
        """The heads in the plane of the first two principal components, coloured by cluster."""
        import plotly.graph_objects as go

        figure = go.Figure()
        for row in self.table.itertuples():
            at = np.flatnonzero(self.labels == row.cluster)
            figure.add_scatter(
                x=self.plane[at, 0],
                y=self.plane[at, 1],
                mode="markers",
                name=f"{row.cluster} ({row.heads} heads)",
                text=[f"{self.places[one][0]}.{self.places[one][1]}" for one in at],
                hovertemplate="%{text}<extra>" + str(row.why) + "</extra>",
            )
        first, second = self.explained
        figure.update_layout(
            xaxis_title=f"component 1 ({first:.0%} of variance)",
            yaxis_title=f"component 2 ({second:.0%} of variance)",
            title=f"{len(self.table)} clusters of heads, silhouette {self.silhouette:.2f}",
        )
        return figure

    def __repr__(self) -> str:
        words = "" if self.grouped else ", no clear groups"
        return f"HeadClusters({len(self.table)} clusters of {len(self.labels)} heads, silhouette {self.silhouette:.2f}{words})"


def clusters(profile: HeadProfile, n: int | None = None, *, seed: int = 0) -> HeadClusters:
    """Clusters the heads of a profile by their passive metrics. `n`: how many; None takes the best silhouette.

    Raises ProbeError for a profile without those metrics, too few heads, or an `n` that is no number of clusters.
    """
    import pandas as pd
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_samples
    from sklearn.preprocessing import StandardScaler

    raw = features(profile)
    different = len(np.unique(raw.round(9), axis=0))
    most = min(MOST, different - 1)
    if (n is not None and not 2 <= n < different) or most < 2:
        raise refusal(
            ProbeError,
            f"n={n} clusters of {len(raw)} heads",
            f"{different} of them differ, and clusters are at least 2 and fewer than those",
            "pass a smaller n, or None" if different > 2 else "profile a larger model",
        )
    scaled = StandardScaler().fit_transform(raw)
    best: tuple[float, Any] | None = None
    for count in [n] if n is not None else range(2, most + 1):
        labels = KMeans(count, n_init=10, random_state=seed).fit_predict(scaled)
        quality = float(silhouette_samples(scaled, labels).mean())
        if best is None or quality > best[0]:
            best = (quality, labels)
    quality, labels = best if best is not None else (0.0, np.zeros(len(raw), dtype=int))
    order = np.argsort(-np.bincount(labels), kind="stable")
    labels = np.argsort(order)[labels]
    places = tuple((int(a), int(b)) for a, b in zip(profile.table["layer"], profile.table["head"], strict=True))
    rows = []
    for cluster in range(labels.max() + 1):
        at = np.flatnonzero(labels == cluster)
        centre = scaled[at].mean(axis=0)
        nearest = at[np.argmin(((scaled[at] - centre) ** 2).sum(axis=1))]
        told = [f"{FEATURES[i]} {centre[i]:+.1f} sd" for i in np.argsort(-abs(centre), kind="stable")[:3]]
        rows.append((cluster, len(at), places[nearest], ", ".join(told)))
    pca = PCA(2, random_state=seed).fit(scaled)
    first, second = (float(value) for value in pca.explained_variance_ratio_)
    table = pd.DataFrame(rows, columns=["cluster", "heads", "nearest", "why"])
    return HeadClusters(labels, quality, table, pca.transform(scaled), (first, second), places)
