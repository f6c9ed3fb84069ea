"""HeadHunter: find the heads whose perturbation guides a diffusion model towards what an objective asks for.

Ahn et al. 2025 (arXiv 2506.10978), Algorithm 1. In each round every head that is left is tried together with those already chosen: pictures
are drawn under guidance from that set, and scored; the best k join the set. A head that does little alone may matter beside others, which
is what further rounds are for; a single round of k is the one-shot search.

A search is many generations, so each (set of heads, condition) is a unit in a journal, and a search that was killed goes on where it
stopped. The silent failures this avoids: an objective that gives NaN for one picture, which compares as neither better nor worse; units of
another objective, whose functions look alike, being taken for this one's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from headscope.errors import InterventionError, refusal
from headscope.interventions.base import Head, Intervention
from headscope.interventions.guidance import guided
from headscope.interventions.head_set import HeadSet
from headscope.interventions.soft_pag import SoftPAG
from headscope.profile.journal import Journal, digest

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from headscope.scope import Scope


@dataclass(frozen=True, eq=False)
class Hunt:
    """What a search found. `heads`: HeadSet, in the order chosen. `table`: pandas, one row per candidate and round: round, layer, head,
    score (with the heads chosen before), gain (score - what these gave without it), chosen. `baseline`: the objective without guidance.
    `scores`: the objective after each round. `generations`: how many were drawn in this run; `restored`: units from the journal."""

    heads: HeadSet
    table: pd.DataFrame
    baseline: float
    scores: tuple[float, ...]
    name: str = "objective"
    generations: int = 0
    restored: int = 0

    def ranking(self, round: int = 1) -> list[Head]:
        """The candidates of a round from best to worst, equal ones in the pool's order."""
        part = self.table[self.table["round"] == round].sort_values("score", ascending=False, kind="stable")
        return [(layer, int(head)) for layer, head in zip(part["layer"], part["head"], strict=True)]

    def plot(self) -> go.Figure:
        """Plotly figure: one heat map over heads per round, chosen heads marked, colours centred on the unguided objective."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        rounds = sorted(set(self.table["round"]))
        layers = list(dict.fromkeys(self.table["layer"]))
        figure = make_subplots(1, len(rounds), shared_yaxes=True, subplot_titles=[f"round {one}" for one in rounds])
        reach = float((self.table["score"] - self.baseline).abs().max()) or 1.0
        for column, number in enumerate(rounds, start=1):
            part = self.table[self.table["round"] == number]
            z = part.pivot(index="head", columns="layer", values="score").reindex(columns=layers)
            heat = go.Heatmap(
                z=z.to_numpy(),
                x=[str(one) for one in layers],
                y=list(z.index),
                colorscale="RdBu",
                zmin=self.baseline - reach,
                zmax=self.baseline + reach,
                showscale=column == len(rounds),
                hovertemplate="%{x}.%{y}: %{z:.4g}<extra></extra>",
            )
            figure.add_trace(heat, 1, column)
            won = part[part["chosen"]]
            marks = go.Scatter(
                x=[str(one) for one in won["layer"]],
                y=list(won["head"]),
                mode="markers",
                marker={"symbol": "circle-open", "size": 14, "color": "#1f2430"},
                showlegend=False,
                hoverinfo="skip",
            )
            figure.add_trace(marks, 1, column)
            figure.update_xaxes(title="layer", type="category", row=1, col=column)
        figure.update_yaxes(title="head", autorange="reversed", dtick=1, row=1, col=1)
        figure.update_layout(title=f"{self.name} (without guidance: {self.baseline:.4g})", template="plotly_white")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        rows = self.table.to_dict(orient="records")
        facts = {"objective": self.name, "baseline": self.baseline, "scores": list(self.scores)}
        return {"heads": [list(one) for one in self.heads], **facts, "candidates": rows}

    def __repr__(self) -> str:
        names = ", ".join(f"{layer}.{head}" for layer, head in self.heads)
        return f"Hunt({names}; {self.name} {self.baseline:.4g} -> {self.scores[-1]:.4g})"


@dataclass(frozen=True)
class HeadHunter:
    """The search. `hunt(scope)` runs it.

    - `draw(condition)`: generates with the scope's model or pipeline, from its own seed, whatever `objective` takes. It must give the same
      for the same condition: the paper's (prompt, seed) pairs.
    - `objective(drawn, condition)`: a number, larger is better. A candidate's score is its mean over `conditions`.
    - `conditions`: anything plain, e.g. seeds or (prompt, seed) pairs.
    - `perturb(heads)`: what is done to a set of heads; SoftPAG with u = 1 by default. `w`, `steps`, `branch`: see `guided`.
    - `rounds`, `k`: R rounds of the best k each. rounds=1 is the one-shot search. `pool`: the heads to try, "all" for the main stack.
    - `name`: what the objective is called; a journal needs it, since functions have no content to be known by. Change it with `draw` or
      `objective`.

    Cost: (pool x rounds - what was chosen) x len(conditions) generations, each with two forward passes per step. The paper: rounds=1, k=24,
    20 pairs, w=3 for quality; rounds=5, k=3, 5 pairs for style.
    """

    draw: Callable[[Any], Any]
    objective: Callable[[Any, Any], float]
    conditions: Sequence[Any]
    perturb: Callable[[tuple[Head, ...]], Intervention] = field(default=SoftPAG)
    w: float = 3.0
    rounds: int = 1
    k: int = 3
    pool: Any = "all"
    steps: tuple[int, int] | None = None
    branch: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for what in ("rounds", "k"):
            value = getattr(self, what)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise refusal(InterventionError, f"{what}={value!r}", "it counts from 1", f"pass {what}=3")
        if isinstance(self.conditions, str) or not len(self.conditions):
            given = f"conditions={self.conditions!r}"
            raise refusal(InterventionError, given, "there is nothing to draw", "pass a list, e.g. of seeds or of (prompt, seed)")

    def candidates(self, scope: Scope) -> tuple[Head, ...]:
        """The pool as pairs, checked against the model; InterventionError for an empty one, and for fewer heads than are to be chosen."""
        if not isinstance(self.pool, str) and not len(self.pool):
            raise refusal(InterventionError, "an empty pool", "there is no head to try", "pass pool='all', or heads")
        pairs = SoftPAG(self.pool, stream="all").bind(scope).pairs(scope)
        if len(pairs) < self.rounds * self.k:
            given = f"{self.rounds} rounds of {self.k} heads"
            raise refusal(InterventionError, given, f"the pool holds {len(pairs)}", "ask for fewer, or pass a larger pool")
        return pairs

    def hunt(self, scope: Scope, *, journal: Journal | str | Path | None = None, progress: bool | None = None) -> Hunt:
        """Search. `journal`: a folder that keeps finished units. `progress`: a bar on stderr; None shows it on a terminal.

        InterventionError for an empty pool, an objective that gives no finite number, or a journal without `name`.
        """
        import pandas as pd

        pool = self.candidates(scope)
        if journal is not None and not self.name:
            given = "journal= without name="
            raise refusal(
                InterventionError, given, "an objective is a function, and cannot be told from another", "pass name='what it scores'"
            )
        kept = journal if isinstance(journal, Journal) else Journal(journal)
        run = _Run(self, scope, kept)
        hidden = not sys.stderr.isatty() if progress is None else not progress
        total = 1 + sum(len(pool) - number * self.k for number in range(self.rounds))
        chosen: list[Head] = []
        rows, scores = [], []
        with tqdm(total=total, desc=self.name or "HeadHunter", disable=hidden, file=sys.stderr, unit="set") as bar:
            baseline = before = run.score(())
            bar.update()
            for number in range(1, self.rounds + 1):
                tried: list[tuple[float, Head]] = []
                for head in (one for one in pool if one not in chosen):
                    tried.append((run.score((*chosen, head)), head))
                    bar.update()
                best = [head for _, head in sorted(tried, key=lambda one: -one[0])[: self.k]]
                rows += [
                    {"round": number, "layer": head[0], "head": head[1], "score": score, "gain": score - before, "chosen": head in best}
                    for score, head in tried
                ]
                chosen += best
                before = run.score(tuple(chosen))
                scores.append(before)
        origin = f"HeadHunter, {self.rounds} x {self.k}" + (f", {self.name}" if self.name else "")
        label = self.name or "objective"
        return Hunt(HeadSet(chosen, origin), pd.DataFrame(rows), baseline, tuple(scores), label, run.generations, kept.restored)


class _Run:
    """Scores of sets of heads, each condition a unit of the journal."""

    def __init__(self, hunter: HeadHunter, scope: Scope, journal: Journal) -> None:
        self.hunter, self.scope, self.journal = hunter, scope, journal
        self.generations = 0
        self._model = scope.fingerprint

    def score(self, heads: tuple[Head, ...]) -> float:
        """The mean objective under guidance from these heads; without guidance for none."""
        values = [self._one(heads, index, condition) for index, condition in enumerate(self.hunter.conditions)]
        return math.fsum(values) / len(values)

    def _one(self, heads: tuple[Head, ...], index: int, condition: Any) -> float:
        hunter = self.hunter
        one = hunter.perturb(heads) if heads else None
        if heads and not isinstance(one, Intervention):
            raise refusal(InterventionError, f"perturb gave {one!r}", "it is not an intervention", "return e.g. SoftPAG(heads)")
        try:
            settings = digest([hunter.w, hunter.steps, hunter.branch, condition])
        except TypeError as error:
            raise refusal(InterventionError, f"condition {condition!r}", str(error), "pass plain values, e.g. (prompt, seed)") from None
        what = "none" if one is None else digest([type(one).__qualname__, one.settings()])
        found = self.journal.unit(f"hunt/{self._model}/{hunter.name}/{settings}/{what}", lambda: self._draw(one, condition, heads, index))
        return float(found["value"])

    def _draw(self, one: Intervention | None, condition: Any, heads: tuple[Head, ...], index: int) -> dict[str, Any]:
        hunter = self.hunter
        self.generations += 1
        if one is None:
            drawn = hunter.draw(condition)
        else:
            with guided(self.scope, one, w=hunter.w, steps=hunter.steps, branch=hunter.branch) as report:
                drawn = hunter.draw(condition)
            if not report.steps:
                given = "draw(condition)"
                raise refusal(
                    InterventionError, given, "it did not run the scope's model", "let it generate with scope.model or its pipeline"
                )
        value = hunter.objective(drawn, condition)
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        try:
            number = float(number)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            names = ", ".join(f"{layer}.{head}" for layer, head in heads) or "no head"
            given = f"objective {str(value)[:40]} with {names}, condition {index}"
            raise refusal(InterventionError, given, "it cannot be ranked", "return a finite number; clip or reject pictures that have none")
        return {"value": number}


__all__ = ["HeadHunter", "Hunt"]
