"""OV copying: does a head raise the token that it looks at?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.stream import all_weights, read_stream, unembedding, unembedding_name, why_no_weights

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.circuits import HeadWeights
    from headscope.probes.active import Unit
    from headscope.probes.stream import Stream
    from headscope.scope import Scope

VOCABULARY_AT_ONCE = 4096


@dataclass(frozen=True)
class OvCopying(ActiveProbe):
    """Whether the full OV circuit of a head copies: sum(lambda) / sum |lambda| over the eigenvalues of W_E W_V W_O W_U.

    That matrix [V, V] says by how much attending to token i raises the logit of token j. Positive eigenvalues mean that sets of tokens
    raise themselves: 1 is a head that copies, -1 one that suppresses what it looks at, about 0 one that does neither, and 0 exactly one
    that writes nothing. Its non-zero eigenvalues are those of W_O W_U W_E W_V [Dv, Dv], so the matrix is never made: W_U W_E is summed over
    the vocabulary once, and every head costs two products with it. All in float64. A query head uses the values of its group.

    norms: "fold" multiplies W_V by the gain of the layer's norm, W_U by that of the last one (and centres where the norm does), which is
    what the model computes up to a positive factor per token; "ignore" takes the weights as they stand. Rotary embedding plays no part;
    biases move all tokens alike and are left out.

    A high value is necessary for a head that copies and not sufficient: it must also look at the right token. A token's embedding is taken
    as what the head reads, which is true in the first layers and a simplification later.

    Departures: none from the formula; the published detectors multiply out [V, V] on a sample of tokens.
    """

    norms: str = "fold"

    name: ClassVar[str] = "ov_copying"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ov_copying", "share of eigenvalues", "raises the logit of the token it looks at", (-1.0, 1.0)),
    )
    data: ClassVar[str] = "weights"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "W_O", "unembedding")
    cost: ClassVar[str] = "weights only: one [d, V] x [V, d] product, then O(d^2 Dv) a head"
    source: ClassVar[str] = (
        "A Mathematical Framework for Transformer Circuits (Elhage et al. 2021, transformer-circuits.pub); "
        "In-context Learning and Induction Heads, arXiv:2209.11895"
    )

    def __post_init__(self) -> None:
        check_norms(self.name, self.norms)

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or why_no_weights(scope) or why_no_unembedding(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        no_data(self, data)
        stream, weights = read_stream(scope), all_weights(scope)

        def ends() -> dict[str, Tensor]:
            return {"ends": unembed_embed(scope, stream, self.norms == "fold")}

        whole = work.unit("ends", ends)["ends"]
        rows = []
        for layer in work.each(scope.topology.layers):
            rows.append(work.unit(f"layer {layer}", partial(self._layer, weights[layer], stream, layer, whole))["score"])
        return Findings({self.name: stack(rows)}, data=[weights_fact(scope)])

    def _layer(self, heads: HeadWeights, stream: Stream, layer: int, whole: Tensor) -> Unit:
        reads, writes = stream.layers[layer].reads, stream.layers[layer].writes
        out = []
        for head in range(len(heads.o)):
            value, output = heads.v[heads.kv_head(head)].double().cpu(), heads.o[head].double().cpu()
            if self.norms == "fold":
                value = reads.fold(value) if reads is not None else value
                output = writes.fold(output.T).T if writes is not None else output
            out.append(eigenvalue_score(output @ whole @ value))
        return {"score": torch.tensor(out, dtype=torch.float64)}


def eigenvalue_score(matrix: Tensor) -> float:
    """sum(lambda) / sum |lambda| of a square matrix; 0 for one whose eigenvalues are all 0."""
    values = torch.linalg.eigvals(matrix)
    size = float(values.abs().sum())
    return 0.0 if size <= 1e-12 * max(float(matrix.norm()), 1e-30) else float(values.real.sum()) / size


def unembed_embed(scope: Scope, stream: Stream, fold: bool) -> Tensor:
    """W_U W_E [d, d] float64 on the CPU, over the tokens that have both an embedding and a logit."""
    embed, unembed = scope.model.get_input_embeddings().weight.detach(), unembedding(scope)
    count = min(embed.shape[0], unembed.shape[1])
    total = torch.zeros(unembed.shape[0], embed.shape[1], dtype=torch.float64, device=embed.device)
    for first in range(0, count, VOCABULARY_AT_ONCE):
        rows = slice(first, min(first + VOCABULARY_AT_ONCE, count))
        part = unembed[:, rows].double()
        if fold and stream.final is not None:
            part = stream.final.fold(part)
        total += part @ embed[rows].double()
    return total.cpu()


def check_norms(name: str, norms: str) -> None:
    """ProbeError for a way of treating norms that does not exist."""
    from headscope.errors import ProbeError, unknown_name

    if norms not in ("fold", "ignore"):
        raise unknown_name(ProbeError, f"norms= of probe {name!r}", norms, ("fold", "ignore"))


def why_no_unembedding(scope: Scope) -> str | None:
    """Why there are no logits, or None."""
    from headscope.errors import ProbeError

    try:
        unembedding_name(scope)
    except ProbeError:
        return f"{scope.topology.model_class} has no output embedding"
    return None


def no_data(probe: ActiveProbe, data: Any) -> None:
    """ProbeError where a probe of weights is given data: it would be ignored."""
    from headscope.errors import ProbeError, refusal

    if data is not None:
        raise refusal(ProbeError, f"data for probe {probe.name!r}", "it reads weights only", "leave data out")


def weights_fact(scope: Scope) -> dict[str, Any]:
    """The card's entry of a probe that reads weights."""
    return {"name": "weights", "kind": "weights", "sha256": scope.fingerprint, "sequences": 0, "tokens": 0}
