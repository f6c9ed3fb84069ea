"""Circuit overlap: do two tasks use the same heads?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.activation_patching import ActivationPatching
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric
from headscope.probes.contrast_tasks import check_task
from headscope.probes.logit_attribution import LogitAttribution
from headscope.probes.ov_copying import why_no_unembedding
from headscope.probes.path_patching import PathPatching

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

METHODS = ("activation", "path", "attribution")


@dataclass(frozen=True)
class CircuitOverlap(ActiveProbe):
    """The heads that two tasks share: each head's effect in both, the overlap of the top heads, the agreement of the rankings.

    A method ("activation" patching, "path" patching to the logits, direct logit "attribution") scores every head on `first` and on
    `second`: circuit_first, circuit_second. A task's circuit is its top k heads, k = round(top x heads). circuit_shared of a head is 1 in
    both circuits, 0.5 in one, 0 in none. The numbers: circuit_heads k; circuit_jaccard = |A and B| / |A or B|; circuit_share = |A and B| /
    k, which is what the paper calls overlap; circuit_spearman, the rank correlation over all heads; circuit_chance, the share that two
    random sets of k heads have in common on average, k / heads.

    by: "size" ranks by |effect|, so that heads that work against the answer belong to the circuit too; "value" by the effect itself.

    Data: two of the tasks "ioi", "arithmetic", "repeat", or {"first": pairs, "second": pairs} of your own.

    Departures: the paper's tasks are IOI and Colored Objects on GPT-2 medium, and its circuits are cut by hand.
    """

    first: str = "ioi"
    second: str = "arithmetic"
    method: str = "activation"
    pairs: int = 16
    top: float = 0.05
    by: str = "size"

    name: ClassVar[str] = "circuit_overlap"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("circuit_first", "effect", "matters in the first task", (None, None)),
        Metric("circuit_second", "effect", "matters in the second task", (None, None)),
        Metric("circuit_shared", "share of tasks", "is among the top heads of both tasks"),
    )
    data: ClassVar[str] = "contrast pairs"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "unembedding")
    cost: ClassVar[str] = "twice that of its method"
    source: ClassVar[str] = "Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv:2310.08744, jmerullo/circuit_reuse"

    def __post_init__(self) -> None:
        for task in (self.first, self.second):
            check_task(self.name, task, self.pairs, "swap")
        if self.method not in METHODS:
            raise unknown_name(ProbeError, f"method of probe {self.name!r}", self.method, METHODS)
        if self.by not in ("size", "value"):
            raise unknown_name(ProbeError, f"by= of probe {self.name!r}", self.by, ("size", "value"))
        if not 0 < self.top < 1:
            raise refusal(ProbeError, f"top={self.top}", "it is a share of all heads", "pass e.g. top=0.05")

    def unfit(self, scope: Scope) -> str | None:
        why = super().unfit(scope) or why_no_unembedding(scope)
        return why or (LogitAttribution().unfit(scope) if self.method == "attribution" else None)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        given = self._given(data)
        scores: list[Tensor] = []
        facts: list[dict[str, Any]] = []
        for side, task in (("first", self.first), ("second", self.second)):
            part = Work(work.journal, work.context, work.seed, work.progress, f"{work.name}/{side}")
            probe = {
                "activation": ActivationPatching(task, self.pairs),
                "path": PathPatching(task, self.pairs),
                "attribution": LogitAttribution(task, self.pairs),
            }[self.method]
            found = probe.measure(scope, given.get(side), part)
            scores.append(found.scores[probe.name])
            facts += found.data
        heads = int((~scores[0].isnan()).sum())
        count = max(1, round(self.top * heads))
        numbers = overlap(*scores, top=count, by="size" if self.by == "size" else "value")
        shared = torch.stack([in_top(one, count, self.by) for one in scores]).mean(0)
        table = {"circuit_first": scores[0], "circuit_second": scores[1], "circuit_shared": shared.masked_fill(scores[0].isnan(), math.nan)}
        return Findings(table, numbers=numbers, data=facts)

    def _given(self, data: Any) -> dict[str, Any]:
        if data is None:
            return {}
        if not isinstance(data, dict) or set(data) != {"first", "second"}:
            raise refusal(
                ProbeError,
                f"data for probe {self.name!r}",
                "it compares two tasks",
                'pass {"first": pairs, "second": pairs}, or leave it out',
            )
        return data


def in_top(scores: Tensor, top: int, by: str = "size") -> Tensor:
    """[L, H] float64: 1 for the top heads by |score| ("size") or score ("value"), else 0."""
    values = (scores.abs() if by == "size" else scores).double().nan_to_num(nan=-math.inf).flatten()
    out = torch.zeros_like(values)
    out[values.sort(descending=True, stable=True).indices[:top]] = 1.0
    return out.view_as(scores)


def overlap(first: Tensor, second: Tensor, *, top: int, by: Literal["size", "value"] = "size") -> dict[str, float]:
    """How two score tables [L, H] of one model agree: the top sets' Jaccard index and shared part, and Spearman's rank correlation (with
    ties at their mean rank) over the heads that both have. ProbeError for tables of different shape or a `top` that no set of heads has.
    """
    both = ~(first.isnan() | second.isnan()) if first.shape == second.shape else None
    if both is None:
        raise refusal(
            ProbeError, f"scores {list(first.shape)} and {list(second.shape)}", "they are of different models", "pass one model's"
        )
    heads = int(both.sum())
    if not 1 <= top <= heads:
        raise refusal(ProbeError, f"top={top}", f"there are {heads} heads", f"pass 1..{heads}")
    a, b = (in_top(one.masked_fill(~both, math.nan), top, by).bool() for one in (first, second))
    common = int((a & b).sum())
    values = [(one.abs() if by == "size" else one)[both] for one in (first, second)]
    return {
        "circuit_heads": float(top),
        "circuit_jaccard": common / (2 * top - common),
        "circuit_share": common / top,
        "circuit_spearman": spearman(*values),
        "circuit_chance": top / heads,
    }


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties at their mean rank; NaN where one of them is constant."""
    from headscope.profile.comparison import correlation, mean_ranks

    return float(correlation(mean_ranks(first.numpy()), mean_ranks(second.numpy())))
