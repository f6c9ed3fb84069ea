"""HeadProfile: the table of heads, its card, and the shown text's statistics and maps, just measured or on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import ProbeError, RunError, refusal, unknown_name
from headscope.profile.card import RunCard
from headscope.profile.roles import BY_NAME, ROLES
from headscope.store import MapInfo, Run, RunContent, Tokens, open_run, write_run
from headscope.store.files import INTEGERS, STRINGS

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from headscope.export import LossReport
    from headscope.plans import SparsePlan
    from headscope.profile.clusters import HeadClusters


class HeadProfile:
    """One row per (layer, head).

    - `table`: pandas, columns layer, head, kv_head, module, kind, one float64 column per metric, `roles` (list), `reasons` (dict
      role -> why).
    - `tables`: what active probes found that is no number per head, "probe.name" -> data frame.
    - `card`: the RunCard. `tokens`, `statistics`, `statistic(...)`, `maps`, `map(...)`: the shown text, as in `headscope.store.Run`.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        card: RunCard,
        content: RunContent | Run | None = None,
        path: Path | None = None,
        *,
        tables: dict[str, pd.DataFrame] | None = None,
    ) -> None:
        self.tables = {} if tables is None else tables
        self.table = table
        self.card = card
        self.path = path
        self._content = content
        self._rows = {(int(layer), int(head)): row for row, (layer, head) in enumerate(zip(table["layer"], table["head"], strict=True))}

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Opens a run directory; statistics and maps are read when asked for. RunError when it is missing, damaged or newer than this
        code.
        """
        run = open_run(path)
        return cls(run.heads, run.card, run, run.path, tables=run.tables)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes a run directory, whole or not at all, and returns its path. RunError when it exists and `overwrite` is false."""
        self.path = write_run(path, self.card.to_dict(), self.table, self._content, tables=self.tables, overwrite=overwrite)
        return self.path

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of the table."""
        return [name for name in self.table.columns if name not in {*INTEGERS, *STRINGS, "roles", "reasons"}]

    @property
    def roles(self) -> list[str]:
        """Names of the roles that this profile's metrics can give, whether or not a head has them."""
        known = [rule.name for rule in ROLES if set(rule.metrics) <= set(self.table.columns)]
        stored = {role for roles in self.table["roles"] for role in roles}
        return [*known, *sorted(stored - set(known))]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer numbers, ascending."""
        return tuple(sorted({layer for layer, _ in self._rows}))

    @property
    def heads(self) -> int:
        """How many heads there are in all."""
        return len(self.table)

    def top(self, name: str, n: int = 10) -> list[tuple[int, int]]:
        """The n strongest heads (layer, head) of a role, or those with the largest values of a metric; equal ones in order of the table.

        A role that shares its name with a metric (sink, induction, ...) gives the heads that have the role; `matrix(name)` and the table
        have the metric of every head. ProbeError for a name that is neither.
        """
        if n < 1:
            raise refusal(ProbeError, f"top {n}", "it counts heads and must be at least 1", "pass n=10")
        if name not in self.roles:
            return self.rank(name, n)
        rows = np.flatnonzero([name in roles for roles in self.table["roles"]])
        rule = BY_NAME.get(name)
        if rule is not None and set(rule.metrics) <= set(self.table.columns):
            strength = rule.strength(self.table)[rows]
            rows = rows[np.argsort(-strength, kind="stable")]
        layers, heads = self.table["layer"].to_numpy(), self.table["head"].to_numpy()
        return [(int(layers[row]), int(heads[row])) for row in rows[:n]]

    def rank(self, metric: str, n: int = 10) -> list[tuple[int, int]]:
        """The n heads with the largest values of a metric, whether or not there is a role of that name."""
        values = self._column(metric)
        rows = np.flatnonzero(np.isfinite(values))
        rows = rows[np.argsort(-values[rows], kind="stable")][:n]
        return [(int(self.table["layer"].iloc[row]), int(self.table["head"].iloc[row])) for row in rows]

    def count(self, role: str) -> int:
        """How many heads have a role."""
        self._role(role)
        return sum(role in roles for roles in self.table["roles"])

    def why(self, layer: int, head: int, role: str) -> str:
        """Why a head has a role; ProbeError when it does not."""
        self._role(role)
        reasons = self.table["reasons"].iloc[self._row(layer, head)]
        if role not in reasons:
            have = ", ".join(reasons) or "none"
            raise refusal(ProbeError, f"head {layer}.{head} as {role!r}", f"its roles are: {have}", f"see profile.top({role!r})")
        return str(reasons[role])

    def roles_of(self, layer: int, head: int) -> list[str]:
        """The roles of a head."""
        return list(self.table["roles"].iloc[self._row(layer, head)])

    def value(self, layer: int, head: int, metric: str) -> float:
        """One number. ProbeError for a head or metric that is not there."""
        return float(self._column(metric)[self._row(layer, head)])

    def matrix(self, metric: str) -> np.ndarray:
        """[L, H] float64 of a metric, layers ascending; NaN where a layer has fewer heads."""
        values = self._column(metric)
        index = {layer: place for place, layer in enumerate(self.layers)}
        out = np.full((len(index), int(self.table["head"].max()) + 1), math.nan)
        for (layer, head), row in self._rows.items():
            out[index[layer], head] = values[row]
        return out

    @property
    def tokens(self) -> Tokens | None:
        """The shown text; None when none was kept."""
        return None if self._content is None else self._content.tokens

    @property
    def statistics(self) -> list[str]:
        """Names of the shown text's statistics, "row/<name>" and "column/<name>"."""
        return [] if self._content is None else self._content.statistics

    def statistic(self, name: str, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """[L, H, N] float32 of the shown text, or [H, N] of a layer, or [N] of a head."""
        return self._kept().statistic(name, layer, head)

    @property
    def maps(self) -> MapInfo | None:
        """What the block maps are; None when none were kept."""
        return None if self._content is None else self._content.maps

    def map(self, plane: str, layer: int, head: int, level: int = 0) -> np.ndarray:
        """[n, n] float32: one head's block map, plane "block_mass" or "block_max"."""
        return self._kept().map(plane, layer, head, level)

    def tile(self, plane: str, level: int, layer: int, head: int, i: int, j: int) -> np.ndarray:
        """[rows, columns] float32: tile row `i`, tile column `j` of a head's map, 256 cells a side except at the edges."""
        return self._kept().tile(plane, level, layer, head, i, j)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers whose q and k were kept (`profile(keep=...)`), so that `window` can recompute them."""
        return () if self._content is None else self._content.kept_layers

    def window(self, layer: int, head: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
        """[q1 - q0, k1 - k0] float32: exact weights of queries q0..q1-1 on keys k0..k1-1. RunError where q and k were not kept."""
        return self._kept().window(layer, head, q0, q1, k0, k1)

    def kinds(self) -> pd.DataFrame:
        """What sort of head each head is, by a trained classifier: see `headscope.profile.kinds`."""
        from headscope.profile.kinds import kinds

        return kinds(self)

    def clusters(self, n: int | None = None, *, seed: int = 0) -> HeadClusters:
        """Which heads are alike: see `headscope.profile.clusters`."""
        from headscope.profile.clusters import clusters

        return clusters(self, n, seed=seed)

    def agreement(self, metrics: Iterable[str] | None = None) -> pd.DataFrame:
        """Spearman's rank correlation of every two metrics over the heads: see `headscope.profile.agreement`."""
        from headscope.profile.agreement import agreement

        return agreement(self, metrics)

    def plot_agreement(self, metrics: Iterable[str] | None = None) -> go.Figure:
        """The rank correlations as a heat map, like metrics side by side."""
        from headscope.profile.agreement import plot_agreement

        return plot_agreement(self, metrics)

    def plan(self, method: str, **options: Any) -> SparsePlan:
        """A sparse plan from what this profile knows: `profile.plan("duo", density=0.25)`; see `headscope.plans.planners`."""
        from headscope.plans.planners import plan

        return plan(self, method, **options)

    def export(self, format: str, path: str | Path, **options: Any) -> LossReport:
        """Writes scores, or an imported plan, as another engine's files: `profile.export("duo-attention", "out/")`; see
        `headscope.export.Format.write` for `lossy`, `force`, `length` and `metric`.
        """
        from headscope.export import write

        return write(self, format, path, **options)

    def plot(self, metric: str | None = None, *, mark: str | None = None) -> go.Figure:
        """Heat map of a metric over layers and heads; `mark` outlines the heads of a role. See `headscope.profile.plot`."""
        from headscope.profile.plot import heat_map

        return heat_map(self, metric, mark=mark)

    def _kept(self) -> RunContent | Run:
        if self._content is None:
            raise refusal(RunError, "statistics and maps", "this profile keeps none", "profile with keep_statistics=True, maps=True")
        return self._content

    def _column(self, metric: str) -> np.ndarray:
        if metric not in self.metrics:
            raise unknown_name(ProbeError, "metric or role", metric, [*self.metrics, *self.roles])
        return self.table[metric].to_numpy(dtype=np.float64)

    def _role(self, role: str) -> None:
        if role not in self.roles:
            raise unknown_name(ProbeError, "role", role, self.roles)

    def _row(self, layer: int, head: int) -> int:
        if (layer, head) not in self._rows:
            last, heads = max(self.layers), int(self.table["head"].max())
            raise refusal(ProbeError, f"head {layer}.{head}", f"this profile has layers 0..{last} and heads 0..{heads}", "pass one of them")
        return self._rows[layer, head]

    def __repr__(self) -> str:
        where = f", path={self.path.name!r}" if self.path else ""
        return (
            f"HeadProfile({self.card.model['name']!r}, {len(self.layers)} layers, {self.heads} heads, {len(self.metrics)} metrics{where})"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from headscope.profile.html import profile_html

        return {"text/plain": repr(self), "text/html": profile_html(self)}
