"""hs.sweep: one intervention after another, over heads or over settings, and what each does to a number.

    hs.sweep(scope, lambda head: HeadMask([head]), "all", metric, data=ids)     # every head of the model
    hs.sweep(scope, lambda u: Mix("18.6", "identity", u=u), grid={"u": [0, 0.5, 1]}, metric=metric, data=ids)

With `data` the sweep runs the forward passes itself, and each of them starts at the first block that its intervention touches; what lies
below is taken from one base pass (see `headscope.interventions.prefix`). With a journal every finished number is kept, and a sweep that was
killed goes on where it stopped. A number is kept under everything it depends on: the model's weights, the data, the intervention's own
JSON, and the metric's name, which is asked for because a function has no content to be known by.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from headscope.errors import InterventionError, refusal

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from headscope.interventions.base import Intervention
    from headscope.scope import Scope


@dataclass(frozen=True)
class Sweep:
    """What a sweep found. `table`: pandas, one row per point: layer and head if heads were swept, a column per setting, `value`, `change`
    (value - baseline). `baseline`: the number without an intervention. `restored`: how many came from the journal."""

    table: pd.DataFrame
    baseline: float
    metric: str = "value"
    settings: tuple[str, ...] = ()
    restored: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def top(self, n: int = 10, *, lowest: bool = False) -> list[tuple[Any, int]]:
        """The n heads with the largest values (`lowest`: the smallest), equal ones in the table's order."""
        if "head" not in self.table.columns:
            raise refusal(InterventionError, "top heads", "this sweep was not over heads", "read sweep.table")
        ranked = self.table.sort_values("value", ascending=lowest, kind="stable")
        return [(layer, int(head)) for layer, head in zip(ranked["layer"][:n], ranked["head"][:n], strict=True)]

    def matrix(self) -> Any:
        """[L, H] float64 of the values, layers in the order swept; NaN where a head was not."""
        import numpy as np

        layers = list(dict.fromkeys(self.table["layer"]))
        out = np.full((len(layers), int(self.table["head"].max()) + 1), np.nan)
        for layer, head, value in zip(self.table["layer"], self.table["head"], self.table["value"], strict=True):
            out[layers.index(layer), int(head)] = value
        return out

    def plot(self) -> go.Figure:
        """Plotly figure: a heat map over heads or over two settings, a line over one; the baseline is marked."""
        from headscope.interventions.sweep_plot import sweep_figure

        return sweep_figure(self)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        rows = self.table.to_dict(orient="records")
        return {"metric": self.metric, "baseline": self.baseline, "settings": list(self.settings), "points": rows, **self.facts}

    def __repr__(self) -> str:
        return f"Sweep({self.metric}, {len(self.table)} points, baseline {self.baseline:.4g})"


def sweep(
    scope: Scope,
    factory: Callable[..., Intervention],
    heads: Any = None,
    metric: Callable[..., Any] | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    data: Any = None,
    journal: str | Path | None = None,
    name: str | None = None,
    reuse: bool = True,
) -> Sweep:
    """Run interventions one by one and measure each.

    `factory`: makes the intervention of a point; called with the head (layer, head) if `heads` is given, and with the grid's settings by
    name. `heads`: pairs, "18.6,17.3", a HeadSet, "all". `metric`: with `data`, a function of the model's output [B, N, V]; without, a
    function of the scope, called while the intervention is active (it may generate). Gives a number. With a list of inputs it is a function
    of the output and the input's index, and its mean counts. `journal`: folder of finished points;
    needs `name`, what the metric is called. `reuse=False` runs every block every time.

    Raises InterventionError for a factory that gives no intervention, a metric that gives no number, or nothing to sweep over.
    """
    import pandas as pd

    from headscope.interventions.base import Intervention
    from headscope.interventions.prefix import Prefix
    from headscope.interventions.running import each_input
    from headscope.profile.journal import Journal

    points = _points(scope, heads, grid)
    if metric is None:
        raise refusal(InterventionError, "a sweep without metric", "there is nothing to measure", "pass metric=function")
    if journal is not None and not name:
        raise refusal(
            InterventionError,
            "journal= without name=",
            "a metric is a function, and cannot be told from another",
            "pass name='what it measures'",
        )
    label = name or str(getattr(metric, "__name__", "value"))
    kept = Journal(journal)
    origin = _origin(scope, data, label) if journal is not None else ""
    inputs = [] if data is None else each_input(data)
    prefixes: list[Prefix] = []

    def measure(one: Intervention | None) -> dict[str, Any]:
        if data is None:
            if one is None:
                return {"value": _number(metric(scope))}
            with scope.intervene(one):
                return {"value": _number(metric(scope))}
        if not prefixes:
            prefixes.extend(Prefix(scope, each, reuse=reuse) for each in inputs)
        outputs = (prefix.output if one is None else prefix.run(one) for prefix in prefixes)
        if not isinstance(data, list):
            return {"value": _number(metric(next(outputs)))}
        values = [_number(metric(output, index)) for index, output in enumerate(outputs)]
        return {"value": sum(values) / len(values)}

    baseline = kept.unit(f"{origin}/none", lambda: measure(None))["value"]
    rows: list[dict[str, Any]] = []
    for head, settings in tqdm(points, desc=name or "sweep", unit="point", disable=None if len(points) > 1 else True, leave=False):
        one = factory(head, **settings) if head is not None else factory(**settings)
        if not isinstance(one, Intervention):
            raise refusal(InterventionError, f"factory gave {one!r}", "it is not an intervention", "return e.g. HeadMask([head])")
        key = f"{origin}/{_identity(one)}" if journal is not None else f"{len(rows)}"
        value = kept.unit(key, partial(measure, one))["value"]
        place = {} if head is None else {"layer": head[0], "head": head[1]}
        rows.append({**place, **settings, "value": value, "change": value - baseline})
    facts = {"blocks_run": sum(one.blocks_run for one in prefixes), "blocks": len(prefixes[0].blocks)} if prefixes else {}
    return Sweep(pd.DataFrame(rows), baseline, label, tuple(grid or ()), kept.restored, facts)


def _points(scope: Scope, heads: Any, grid: Mapping[str, Sequence[Any]] | None) -> list[tuple[Any, dict[str, Any]]]:
    from headscope.interventions.head_mask import HeadMask

    listed: Sequence[Any] = (None,)
    if heads is not None:
        bound = HeadMask(heads).bind(scope)  # checks them
        listed = bound.pairs(scope)
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else [{}]
    if (heads is None and not grid) or not settings:
        raise refusal(InterventionError, "a sweep over nothing", "neither heads nor a grid were given", "pass heads='all' or grid={...}")
    return [(head, one) for head in listed for one in settings]


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise refusal(InterventionError, f"metric gave {str(value)[:60]}", "it is no number", "return a float, e.g. a mean") from None


def _origin(scope: Scope, data: Any, name: str) -> str:
    from headscope.profile.journal import digest

    try:
        return f"sweep/{scope.fingerprint}/{digest(data)}/{name}"
    except TypeError as error:
        raise refusal(InterventionError, "data of a sweep with a journal", str(error), "pass texts, ids or a dict of tensors") from None


def _identity(one: Intervention) -> str:
    """All that an intervention is, tensors by content."""
    from headscope.interventions.values import Values
    from headscope.profile.journal import digest

    settings = {key: value.digest if isinstance(value, Values) else value for key, value in one.settings().items()}
    return f"{type(one).__qualname__}/{digest(settings)}"


__all__ = ["Sweep", "sweep"]
