"""Query norm: how loudly does a head ask?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import each_call, not_readable, texts_of
from headscope.profile.texts import data_facts

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.active import Unit
    from headscope.scope import Scope


@dataclass(frozen=True)
class QueryNorm(ActiveProbe):
    """The length of a head's queries, and how often MoH's router, which has no other input, would keep the head.

    Per token, n_h = |q_h| (rotary embedding keeps lengths). The router's gates are softmax over heads of n_h / std(n), std over the token's
    heads (unbiased). With `shared` the first heads are always on and the router sees the others only; of these the top `routed` x heads are
    on.

    query_norm is the mean of n_h over tokens; moh_gate that of the gate (a shared head's is NaN in the formula and given as 1); moh_active
    the share of tokens at which the head is on. moh_active below routed / (1 - shared) means a head that the router tends to switch off.

    Defaults route over all heads (shared 0, three quarters on), so that every head is judged; MoH-LLaMA3 has shared=0.5, routed=0.25, where
    the shared heads are the first half by number, as training made them. In a model that was not trained so the router is a statistic, not
    a recommendation. Departures: the official code takes the projection's output, which differs where queries are normalised or rotary
    embedding is scaled.
    """

    shared: float = 0.0
    routed: float = 0.75

    name: ClassVar[str] = "query_norm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("query_norm", "length of q", "asks loudly, so that its scores can be sharp", (0.0, None)),
        Metric("moh_gate", "probability", "the router prefers it"),
        Metric("moh_active", "share of tokens", "the router keeps it"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass"
    source: ClassVar[str] = "MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv:2410.11842, SkyworkAI/MoH"

    def __post_init__(self) -> None:
        if not (0 <= self.shared < 1 and 0 < self.routed <= 1 - self.shared + 1e-9):
            given = f"shared={self.shared}, routed={self.routed}"
            raise refusal(ProbeError, given, "both are shares of the heads, at most 1 together", "pass e.g. shared=0.5, routed=0.25")

    def unfit(self, scope: Scope) -> str | None:
        few = next((module for module in scope.topology.main if self._too_few(module.heads)), None)
        why = super().unfit(scope) or not_readable(scope)
        return why or (f"{few.name} has {few.heads} heads, too few to route" if few is not None else None)

    def _too_few(self, heads: int) -> bool:
        shared, routed = self._counts(heads)
        return routed < 1 or heads - shared < 2

    def _counts(self, heads: int) -> tuple[int, int]:
        """(always on, routed), rounded down as MoH does."""
        return int(heads * self.shared), int(heads * self.routed + 1e-9)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        texts = texts_of(scope, data, work)
        units = [work.unit(f"text {i} {text.sha256}", partial(self._one, scope, text.ids)) for i, text in enumerate(texts)]
        scores = {
            metric.name: stack([torch.stack([unit[f"{metric.name} {layer}"] for unit in units]).mean(0) for layer in scope.topology.layers])
            for metric in self.metrics
        }
        return Findings(scores, data=[data_facts(texts[0].kind, texts)])

    def _one(self, scope: Scope, ids: Tensor) -> Unit:
        out: Unit = {}

        def see(call: AttentionCall, output: Tensor) -> None:
            norms = call.q[0].double().norm(dim=-1).T  # [N, H]
            gates, on = route(norms, *self._counts(norms.shape[1]))
            for name, values in (("query_norm", norms), ("moh_gate", gates), ("moh_active", on)):
                out[f"{name} {call.layer}"] = values.mean(0).cpu()

        each_call(scope, ids, see)
        return out


def route(norms: Tensor, shared: int, routed: int) -> tuple[Tensor, Tensor]:
    """(gates, on) [N, H] float64 of query lengths [N, H]: the first `shared` heads are 1; of the others the `routed` largest are on."""
    free = norms[:, shared:].double()
    spread = free.std(dim=1, keepdim=True)
    gates = torch.softmax(free / spread.clamp_min(torch.finfo(torch.float64).tiny ** 0.5), dim=1)
    kept = torch.zeros_like(gates).scatter_(1, free.topk(routed, dim=1).indices, 1.0)
    always = torch.ones(len(norms), shared, dtype=torch.float64, device=norms.device)
    return torch.cat([always, gates], 1), torch.cat([always, kept], 1)
