"""Distance from the semantic centre: which heads bring something of their own?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import each_call, long_enough, not_readable, texts_of, weight_rows
from headscope.profile.texts import data_facts

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.active import Unit
    from headscope.scope import Scope


@dataclass(frozen=True)
class SemanticDistance(ActiveProbe):
    """How far what a head gathers lies from what the heads of its layer gather on average (Task-KV's heterogeneous heads).

    With A' the last `window` rows of A: C = mean over these rows of A' (a weight per key), I = the `tokens` keys of the largest C, and the
    head's semantic vector v' = sum_{s in I} C_s V_s. The semantic centre is the mean of v' over the layer's heads:

        semantic_distance = |v' - centre|        semantic_rank = place of the head in its layer by that distance, 0 nearest, 1 farthest

    The paper gives a full cache to the farthest heads of each layer, more of them in the first layers, and to the one nearest the centre;
    all others keep sinks, recent and middle tokens. Distances are comparable within a layer only, ranks across layers.

    High: the head differs from its neighbours on this text. A property of a prompt rather than of the model: give texts of your task.
    Departures: none known; there is no official code. Distance is Euclidean.
    """

    window: int = 32
    tokens: int = 256

    name: ClassVar[str] = "semantic_distance"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("semantic_distance", "length of v", "gathers what its layer's other heads do not", (0.0, None)),
        Metric("semantic_rank", "place in its layer", "is among its layer's most different heads"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass, and 32 rows of A a head"
    source: ClassVar[str] = "Task-KV, arXiv:2501.15113"

    def __post_init__(self) -> None:
        if self.window < 1 or self.tokens < 1:
            raise refusal(ProbeError, f"window={self.window}, tokens={self.tokens}", "they count tokens", "pass window=32, tokens=256")

    def unfit(self, scope: Scope) -> str | None:
        few = next((module.name for module in scope.topology.main if module.heads < 2), None)
        return super().unfit(scope) or not_readable(scope) or (f"{few} has one head, which is its own centre" if few else None)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        texts = texts_of(scope, data, work)
        for text in texts:
            long_enough(self.name, text, self.window, "it reads the rows of a window")
        units = [work.unit(f"text {i} {text.sha256}", partial(self._one, scope, text.ids)) for i, text in enumerate(texts)]
        distances = [torch.stack([unit[f"layer {layer}"] for unit in units]).mean(0) for layer in scope.topology.layers]
        ranks = [one.argsort(stable=True).argsort().double() / (len(one) - 1) for one in distances]
        return Findings({"semantic_distance": stack(distances), "semantic_rank": stack(ranks)}, data=[data_facts(texts[0].kind, texts)])

    def _one(self, scope: Scope, ids: Tensor) -> Unit:
        out: Unit = {}

        def see(call: AttentionCall, output: Tensor) -> None:
            vectors = semantic_vectors(call, self.window, self.tokens)
            out[f"layer {call.layer}"] = (vectors - vectors.mean(0)).norm(dim=1).cpu()

        each_call(scope, ids, see)
        return out


def semantic_vectors(call: AttentionCall, window: int, tokens: int) -> Tensor:
    """v' [H, Dv] float64 of one sequence's call."""
    rows = call.q.shape[2]
    columns = weight_rows(call, rows - window, rows, torch.float64)[0].mean(1)  # [H, Nk]
    best = columns.topk(min(tokens, columns.shape[1]), dim=1)
    assert call.v is not None
    values = call.v[0].double().repeat_interleave(call.group, 0)
    picked = values.gather(1, best.indices[..., None].expand(-1, -1, values.shape[-1]))
    return (best.values[..., None] * picked).sum(1)
