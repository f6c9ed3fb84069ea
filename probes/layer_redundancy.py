"""Layer redundancy: what would be missed without a layer's attention?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.calls import texts_of
from headscope.probes.stream import read_stream, watching
from headscope.profile.texts import data_facts

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.probes.active import Unit
    from headscope.probes.stream import Stream
    from headscope.scope import Scope


@dataclass(frozen=True)
class LayerRedundancy(ActiveProbe):
    """How little a layer turns the residual stream.

    attention_redundancy = mean over tokens of cos(X, X + Attn(norm X)), X the stream before the layer: what LLM-Drop ranks attention layers
    by, all from the whole model (one shot). block_influence = mean over tokens of 1 - cos(h_in, h_out) over the whole block with its MLP
    (ShortGPT; TAPPA's pruning combines it with query similarity). Both are numbers of a layer and stand at each of its heads.

    attention_redundancy near 1: the layer's attention hardly turns the stream, and LLM-Drop would drop it first. The table "layers"
    has both, with drop_order, 0 the first to go. A cosine does not say what the little that is added is for: check by ablation.

    Where a model normalises what attention gives before it is added (Gemma 2), that is what is added here. Departures: LLM-Drop and
    ShortGPT average over 256 and more texts of 2,048 tokens; here it is as many texts as given, one by default.
    """

    name: ClassVar[str] = "layer_redundancy"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("attention_redundancy", "cosine", "its layer's attention leaves the stream as it was", (-1.0, 1.0), "layer"),
        Metric("block_influence", "1 - cosine", "its block changes the stream", (0.0, 2.0), "layer"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass"
    source: ClassVar[str] = "What Matters in Transformers?, arXiv:2406.15786, CASE-Lab-UMD/LLM-Drop; ShortGPT, arXiv:2403.03853"

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        import pandas as pd

        texts = texts_of(scope, data, work)
        stream = read_stream(scope, logits=False)
        units = [work.unit(f"text {i} {text.sha256}", partial(self._one, scope, text.ids, stream)) for i, text in enumerate(texts)]
        layers = scope.topology.layers
        found = {metric.name: torch.stack([unit[metric.name] for unit in units]).mean(0) for metric in self.metrics}
        order = found["attention_redundancy"].argsort(descending=True, stable=True).argsort()
        table = {"layer": list(layers), **{name: values.tolist() for name, values in found.items()}, "drop_order": order.tolist()}
        counts = [scope.topology[layer].heads for layer in layers]
        return Findings(
            {name: stack([value.expand(count) for value, count in zip(values, counts, strict=True)]) for name, values in found.items()},
            data=[data_facts(texts[0].kind, texts)],
            tables={"layers": pd.DataFrame(table)},
        )

    def _one(self, scope: Scope, ids: Tensor, stream: Stream) -> Unit:
        from headscope.interventions.running import run_once

        given: dict[str, Tensor] = {}
        made: dict[str, Tensor] = {}
        names = {scope.topology[layer].name: part for layer, part in stream.layers.items()}
        added = {part.writes.name if part.writes is not None else name: part.block for name, part in names.items()}
        rows: dict[str, tuple[Tensor, Tensor]] = {}

        def see(name: str, before: Tensor | None, after: Tensor | None) -> None:
            if before is None or after is None:
                raise refusal(ProbeError, name, "what goes in and out of it is no hidden state", "name other probes")
            if name in added:
                made[added[name]] = after
                return
            given[name] = before
            delta = made.pop(name)
            x = given.pop(name).double().flatten(0, -2)
            mid, out = x + delta.double().reshape(x.shape), after.double().reshape(x.shape)
            cosine = torch.nn.functional.cosine_similarity
            rows[name] = cosine(x, mid, dim=-1).mean().cpu(), (1 - cosine(x, out, dim=-1)).mean().cpu()

        with watching(scope.model, [*added, *(part.block for part in stream.layers.values())], see):
            run_once(scope, ids[None])
        both = [rows[stream.layers[layer].block] for layer in scope.topology.layers]
        return {"attention_redundancy": torch.stack([one for one, _ in both]), "block_influence": torch.stack([one for _, one in both])}
