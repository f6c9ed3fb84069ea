"""Map similarity: is a layer's attention that of an earlier layer over again?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import each_call, not_readable, texts_of, weight_rows
from headscope.profile.texts import data_facts

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.active import Unit
    from headscope.scope import Scope

CELLS = 1 << 25
"""Entries of A, of all heads together, that are made at a time."""


@dataclass(frozen=True)
class MapSimilarity(ActiveProbe):
    """Cosine of the attention maps of two layers, <A^l, A^m>_F / (|A^l| |A^m|), and of each head with its best match.

    map_similarity of a layer is that of its map and the layer's before it (NaN for the first); the table "layers" has all pairs. A layer's
    map is the mean of its heads' (maps="mean"), or all of its heads' side by side, head i against head i (maps="stacked"). map_twin of a
    head is the largest cosine with any head of an earlier layer, and the table "twins" says which one: that head's map could be used in its
    place.

    A few rows of all layers exist at a time; their products are added up to one matrix [heads, heads], from which every cosine follows.
    Two causal maps are never orthogonal: rows near the start are alike in all of them (row 0 is 1 on itself).

    High: the layer looks where the one before looked, and could share its map. Departures: the paper shares maps of inner layers and trains
    on; this measures only. It has no public code, and its choice between mean and stacked maps is not known to us.
    """

    maps: str = "mean"

    name: ClassVar[str] = "map_similarity"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("map_similarity", "cosine", "its layer's map is that of the layer before", (0.0, 1.0), "layer"),
        Metric("map_twin", "cosine", "a head of an earlier layer has the same map"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass with q and k of all layers kept, then O(heads^2 N^2)"
    source: ClassVar[str] = "EchoAtt, arXiv:2409.14595"

    def __post_init__(self) -> None:
        if self.maps not in ("mean", "stacked"):
            raise unknown_name(ProbeError, f"maps= of probe {self.name!r}", self.maps, ("mean", "stacked"))

    def unfit(self, scope: Scope) -> str | None:
        widths = {module.heads for module in scope.topology.main}
        few = "it has one layer" if len(scope.topology.main) < 2 else None
        odd = "its layers have different numbers of heads, which only maps='mean' can compare" if len(widths) > 1 else None
        return super().unfit(scope) or not_readable(scope) or few or (odd if self.maps == "stacked" else None)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        import pandas as pd

        texts = texts_of(scope, data, work)
        grams = [work.unit(f"text {i} {text.sha256}", partial(self._one, scope, text.ids))["gram"] for i, text in enumerate(texts)]
        layers = scope.topology.layers
        counts = [scope.topology[layer].heads for layer in layers]
        places = [(layer, head) for layer, count in zip(layers, counts, strict=True) for head in range(count)]
        between = torch.stack([layer_cosines(gram, counts, self.maps == "mean") for gram in grams]).mean(0)
        size = [gram.diagonal().sqrt() for gram in grams]
        heads = torch.stack([gram / (one[:, None] * one) for gram, one in zip(grams, size, strict=True)]).mean(0)
        rows, twins, first = [], [], 0
        for place, count in enumerate(counts):
            own = torch.full((count,), math.nan, dtype=torch.float64)
            if place:
                best = heads[first : first + count, :first].max(1)
                own = best.values
                for head, (value, index) in enumerate(zip(own.tolist(), best.indices.tolist(), strict=True)):
                    twins.append((layers[place], head, *places[index], value))
            rows.append(own)
            first += count
        before = [math.nan, *(float(between[i, i - 1]) for i in range(1, len(layers)))]
        if any(one.isnan().any() for one in grams):
            raise refusal(
                ProbeError, f"probe {self.name!r} on {scope.name}", "some rows of its attention are not numbers", "check the model"
            )
        return Findings(
            {
                "map_similarity": stack([torch.full((count,), value) for count, value in zip(counts, before, strict=True)]),
                "map_twin": stack(rows),
            },
            data=[data_facts(texts[0].kind, texts)],
            tables={
                "layers": pd.DataFrame(between.numpy(), index=list(layers), columns=list(layers)),
                "twins": pd.DataFrame(twins, columns=["layer", "head", "earlier_layer", "earlier_head", "cosine"]),
            },
        )

    def _one(self, scope: Scope, ids: Tensor) -> Unit:
        calls: dict[int, AttentionCall] = {}

        def see(call: AttentionCall, output: Tensor) -> None:
            calls[int(call.layer or 0)] = replace(call, v=None)

        each_call(scope, ids, see)
        return {"gram": gram_of([calls[layer] for layer in scope.topology.layers])}


@torch.no_grad()
def gram_of(calls: list[AttentionCall]) -> Tensor:
    """[heads, heads] float64: <A^g, A^h>_F of all heads of calls over one sequence, a few rows of A at a time."""
    heads, rows = sum(call.q.shape[1] for call in calls), calls[0].q.shape[2]
    total = torch.zeros(heads, heads, dtype=torch.float64)
    step = max(CELLS // (heads * rows), 1)
    dtype = torch.promote_types(calls[0].q.dtype, torch.float32)
    plain = all(_plain(call) for call in calls)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        seen = [replace(call, k=call.k[:, :, :stop], v=None) for call in calls] if plain else calls
        listed = [weight_rows(call, start, stop, dtype)[0].flatten(1) for call in seen]
        part = torch.cat([one.to(listed[0].device) for one in listed])
        total += (part @ part.T).double().cpu()
    return total


def _plain(call: AttentionCall) -> bool:
    """Whether rows before i can see no key from i on, and nothing is written out per key, so that those keys can be left away."""
    mask = call.mask
    written = (mask.key_valid, mask.key_segments, mask.allowed, mask.bias)
    return mask.causal and call.query_offset == call.key_offset and all(one is None for one in written)


def layer_cosines(gram: Tensor, counts: list[int], mean: bool) -> Tensor:
    """[L, L]: cosines of the layers' mean maps, or of their maps side by side."""
    edges = [0, *torch.tensor(counts).cumsum(0).tolist()]
    size = len(counts)
    out = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            block = gram[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
            out[i, j] = block.mean() if mean else block.diagonal().sum()
    norm = out.diagonal().sqrt()
    return out / (norm[:, None] * norm)
