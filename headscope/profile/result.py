"""ProbeResult: what one probe said, without a profile around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headscope.errors import ProbeError, unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.probes import ProbeText
    from headscope.probes.active import AnyProbe
    from headscope.topology import Topology


@dataclass(frozen=True, slots=True, eq=False)
class ProbeResult:
    """Scores of one probe: `scores` metric -> [L, H] float64, the mean over `texts` or trials; `numbers` about the whole model; `tables`:
    what is no number per head; `notes`: what a reader must know.
    """

    probe: AnyProbe
    scores: dict[str, Tensor]
    topology: Topology
    texts: tuple[ProbeText, ...]
    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, metric: str) -> Tensor:
        """[L, H] of a metric."""
        if metric not in self.scores:
            raise unknown_name(ProbeError, f"metric of probe {self.probe.name!r}", metric, self.scores)
        return self.scores[metric]

    @property
    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, kv_head, module, kind, the metrics."""
        return head_table(self.topology, self.scores)

    def top(self, metric: str | None = None, n: int = 10) -> list[tuple[int, int]]:
        """The n heads (layer, head) with the largest values; the probe's first metric by default."""
        name = metric or next(iter(self.scores))
        self[name]
        table = self.table.dropna(subset=[name]).sort_values(name, ascending=False, kind="stable").head(n)
        return [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]

    def __repr__(self) -> str:
        best = ", ".join(f"{layer}.{head}" for layer, head in self.top(n=3))
        return f"ProbeResult({self.probe!r}, metrics={list(self.scores)}, top={best})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.table.to_html(index=False, max_rows=20, float_format=lambda x: f"{x:.3f}")}


def head_table(topology: Topology, scores: dict[str, Tensor]) -> pd.DataFrame:
    """One row per (layer, head) of the main stack, with a column per metric."""
    import pandas as pd

    rows: dict[str, list[Any]] = {name: [] for name in ("layer", "head", "kv_head", "module", "kind", *scores)}
    for index, module in enumerate(topology.main):
        for head in range(module.heads):
            rows["layer"].append(module.layer)
            rows["head"].append(head)
            rows["kv_head"].append(module.kv_head(head))
            rows["module"].append(module.name)
            rows["kind"].append(module.kind)
            for name, values in scores.items():
                rows[name].append(float(values[index, head]))
    return pd.DataFrame(rows)
