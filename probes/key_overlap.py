"""Key overlap: do two layers look for the same few keys?"""

from __future__ import annotations

import math
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
class KeyOverlap(ActiveProbe):
    """How many of a layer's top keys are the top keys of the layer before: |S_l and S_m| / k on sampled rows.

    S_l are the k keys with the largest weight, summed over the layer's heads, in one row; k = `share` of the keys that the row sees,
    rounded up. The overlap is averaged over `rows` rows, spread evenly over the second half of the text. key_overlap is a layer's with the
    one before it (NaN for the first), the table "layers" has all pairs. key_overlap_head is a head's own top keys against those of the best
    match among the heads of the layer before. key_layers_reusable in the numbers counts layers whose overlap is at least `threshold`.

    High: the layer could take over the selection of the layer before and score nothing itself. Chance is `share`. Departures: the paper's
    k is 2,048 keys of a long context; its sensitivity measure and its plan over layers are not part of this probe.
    """

    share: float = 0.1
    rows: int = 32
    threshold: float = 0.85

    name: ClassVar[str] = "key_overlap"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("key_overlap", "share of top keys", "its layer looks for the keys of the layer before", (0.0, 1.0), "layer"),
        Metric("key_overlap_head", "share of top keys", "a head of the layer before looks for the same keys"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal")
    cost: ClassVar[str] = "one forward pass, and 32 rows of A a head"
    source: ClassVar[str] = "HyLRA, arXiv:2602.00777"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.rows < 1 or not 0 <= self.threshold <= 1:
            given = f"share={self.share}, rows={self.rows}, threshold={self.threshold}"
            raise refusal(ProbeError, given, "a share lies between 0 and 1, and one row is the least", "pass e.g. share=0.1, rows=32")

    def unfit(self, scope: Scope) -> str | None:
        few = "it has one layer" if len(scope.topology.main) < 2 else None
        return super().unfit(scope) or not_readable(scope) or few

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        import pandas as pd

        texts = texts_of(scope, data, work)
        for text in texts:
            long_enough(self.name, text, 2 * self.rows, f"it samples {self.rows} rows of the second half")
        units = [work.unit(f"text {i} {text.sha256}", partial(self._one, scope, text.ids)) for i, text in enumerate(texts)]
        layers = scope.topology.layers
        between = torch.stack([unit["layers"] for unit in units]).mean(0)
        counts = [scope.topology[layer].heads for layer in layers]
        before = [math.nan, *(float(between[i, i - 1]) for i in range(1, len(layers)))]
        heads = [torch.full((counts[0],), math.nan, dtype=torch.float64)]
        heads += [torch.stack([unit[f"heads {layer}"] for unit in units]).mean(0) for layer in layers[1:]]
        return Findings(
            {
                "key_overlap": stack([torch.full((count,), value) for count, value in zip(counts, before, strict=True)]),
                "key_overlap_head": stack(heads),
            },
            numbers={"key_layers_reusable": float(sum(value >= self.threshold for value in before[1:]))},
            data=[data_facts(texts[0].kind, texts)],
            tables={"layers": pd.DataFrame(between.numpy(), index=list(layers), columns=list(layers))},
        )

    def _one(self, scope: Scope, ids: Tensor) -> Unit:
        chosen: dict[int, tuple[Tensor, Tensor]] = {}
        count = len(ids)
        rows = torch.linspace(count // 2, count - 1, self.rows).round().long().tolist()

        def see(call: AttentionCall, output: Tensor) -> None:
            weights = torch.stack([weight_rows(call, row, row + 1)[0, :, 0] for row in rows], 1)  # [H, rows, Nk]
            chosen[int(call.layer or 0)] = top_keys(weights.sum(0, keepdim=True), rows, self.share)[0], top_keys(weights, rows, self.share)

        each_call(scope, ids, see)
        listed = [chosen[layer] for layer in scope.topology.layers]
        whole = torch.stack([one for one, _ in listed])  # [L, rows, Nk]
        k = whole[0].sum(-1)
        out: Unit = {"layers": torch.einsum("irs,jrs,r->ij", whole, whole, 1 / k) / len(rows)}
        for place in range(1, len(listed)):
            common = torch.einsum("grs,hrs,r->gh", listed[place][1], listed[place - 1][1], 1 / k) / len(rows)
            out[f"heads {scope.topology.layers[place]}"] = common.amax(1)
        return out


def top_keys(weights: Tensor, rows: list[int], share: float) -> Tensor:
    """[G, rows, Nk] float64 on the CPU: 1 at the ceil(share x (t + 1)) largest weights of row t, the earlier of equals, else 0."""
    out = torch.zeros(weights.shape, dtype=torch.float64)
    order = weights.double().cpu().sort(dim=-1, descending=True, stable=True).indices
    for place, row in enumerate(rows):
        out[:, place].scatter_(1, order[:, place, : math.ceil(share * (row + 1))], 1.0)
    return out
