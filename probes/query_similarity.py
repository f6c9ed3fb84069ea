"""Query similarity: does a head ask the same thing at every token?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import each_call, long_enough, not_readable, texts_of
from headscope.probes.stream import all_weights, watching
from headscope.profile.texts import data_facts

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.circuits import HeadWeights
    from headscope.probes.active import Unit
    from headscope.scope import Scope


@dataclass(frozen=True)
class QuerySimilarity(ActiveProbe):
    """Mean cosine of a head's queries at different tokens: high where it asks the same whatever it stands on, and its pattern is stable.

    Over T queries the mean of cos(q_i, q_j) over all pairs i != j is, in closed form, with q^ = q / |q|:

        (|sum_t q^_t|^2 - T) / (T (T - 1))                                                       O(T d), no T x T matrix

    query_similarity takes queries as attention sees them (after rotary embedding), the last `window` of the text: what the paper's cache
    allocation reads. query_similarity_pre takes the query projection's output (before rotary embedding and query norms), over windows of
    `span` tokens every `stride` tokens, averaged: what its layer pruning reads; a text shorter than `span` is one window. A query that is
    zero has similarity 0 to all.

    The table "layers" has the mean over heads, preference = 1 - query_similarity and each layer's share of it, the paper's budget for
    alpha = infinity.

    High: the queries agree, the pattern is predictable, and the layer can do with a smaller cache; low: the head retrieves by content.
    Departures: the official code makes the T x T matrix and keeps the mean over heads only; numbers here are per head.
    """

    window: int = 32
    span: int = 1024
    stride: int = 256

    name: ClassVar[str] = "query_similarity"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("query_similarity", "cosine", "asks the same at every token", (-1.0, 1.0)),
        Metric("query_similarity_pre", "cosine", "asks the same at every token, position aside", (-1.0, 1.0)),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass, and the query projections again"
    source: ClassVar[str] = "TAPPA, arXiv:2601.21709"

    def __post_init__(self) -> None:
        if self.window < 2 or self.span < 2 or self.stride < 1:
            given = f"window={self.window}, span={self.span}, stride={self.stride}"
            raise refusal(ProbeError, given, "pairs need two queries", "pass window and span of 2 or more, stride of 1 or more")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or not_readable(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        import pandas as pd

        texts = texts_of(scope, data, work)
        for text in texts:
            long_enough(self.name, text, self.window, "it compares the queries of a window")
        weights = all_weights(scope)
        units = [work.unit(f"text {i} {text.sha256}", partial(self._one, scope, text.ids, weights)) for i, text in enumerate(texts)]
        scores = {
            metric.name: stack([torch.stack([unit[f"{metric.name} {layer}"] for unit in units]).mean(0) for layer in scope.topology.layers])
            for metric in self.metrics
        }
        mean = scores["query_similarity"].nanmean(1)
        wish = 1 - mean
        table = {
            "layer": list(scope.topology.layers),
            "query_similarity": mean.tolist(),
            "query_similarity_pre": scores["query_similarity_pre"].nanmean(1).tolist(),
            "preference": wish.tolist(),
            "budget_share": (wish / wish.sum()).tolist(),
        }
        return Findings(scores, data=[data_facts(texts[0].kind, texts)], tables={"layers": pd.DataFrame(table)})

    def _one(self, scope: Scope, ids: Tensor, weights: dict[int, HeadWeights]) -> Unit:
        out: Unit = {}
        layers = {module.name: module.layer for module in scope.topology.main if module.layer is not None}

        def see_call(call: AttentionCall, output: Tensor) -> None:
            out[f"query_similarity {layers[call.module]}"] = similarity(call.q[0, :, -self.window :]).cpu()

        def see_input(name: str, given: Tensor | None, made: Tensor | None) -> None:
            if given is None:
                raise refusal(ProbeError, name, "its input is no hidden state", "name other probes")
            out[f"query_similarity_pre {layers[name]}"] = self._before(given[0], weights[layers[name]]).cpu()

        with watching(scope.model, list(layers), see_input):
            each_call(scope, ids, see_call)
        return out

    def _before(self, hidden: Tensor, heads: HeadWeights) -> Tensor:
        """[H] from the layer's input [N, d]."""
        q = torch.einsum("nd,hde->hne", hidden.float(), heads.q.float())
        if heads.q_bias is not None:
            q = q + heads.q_bias.float()[:, None]
        span = min(self.span, q.shape[1])
        starts = range(0, q.shape[1] - span + 1, self.stride)
        return torch.stack([similarity(q[:, start : start + span]) for start in starts]).mean(0)


def similarity(q: Tensor) -> Tensor:
    """[..., T, D] -> [...] float64: the mean cosine over pairs of different rows."""
    unit = torch.nn.functional.normalize(q.double(), dim=-1)
    count = q.shape[-2]
    own = unit.square().sum((-1, -2))
    return (unit.sum(-2).square().sum(-1) - own) / (count * (count - 1))
