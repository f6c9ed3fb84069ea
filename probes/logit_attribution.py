"""Direct logit attribution: what a head's output says about the answer by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.contrast import ContrastPairs, contrast, last_logits, solve
from headscope.probes.contrast_tasks import check_task, pairs_for
from headscope.probes.ov_copying import why_no_unembedding
from headscope.probes.stream import all_weights, read_stream, unembedding, unembedding_name, watching, why_no_weights

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.circuits import HeadWeights
    from headscope.probes.active import Unit
    from headscope.probes.stream import Stream
    from headscope.scope import Scope


@dataclass(frozen=True)
class LogitAttribution(ActiveProbe):
    """How much each head moves the right answer's logit above the wrong one's, read straight from its output at the last token.

    logit_attribution = mean over pairs of z_h W_O^h D (W_U[:, answer] - W_U[:, wrong]), in logits. D is the last norm with its scale frozen
    at what it was in that run (centred for a LayerNorm), so the stream's parts add up: heads, MLPs, biases and the embedding together give
    the logit difference. A norm between W_O and the stream (Gemma 2) is frozen in the same way. The numbers give the logit difference, the
    heads' sum and the rest, which is what all other parts write.

    High: the head itself writes the answer (IOI's name movers); negative: it writes against it. A head that matters through later heads has
    0 here and a high value in activation patching.

    Data: the clean texts of `task` ("ioi", "arithmetic", "repeat"; see contrast_tasks), or your own pairs; pairs that the model does not
    solve are left out. Departures: logits behind a soft cap or a scale are attributed before it, and a note says so.
    """

    task: str = "ioi"
    pairs: int = 32
    batch: int = 16

    name: ClassVar[str] = "logit_attribution"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("logit_attribution", "logits", "writes the right answer rather than the wrong one", (None, None)),
    )
    data: ClassVar[str] = "contrast pairs"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "W_O", "unembedding")
    cost: ClassVar[str] = "3 forward passes over the pairs, and a product with W_O at one token"
    source: ClassVar[str] = (
        "A Mathematical Framework for Transformer Circuits (Elhage et al. 2021); Interpretability in the Wild, arXiv:2211.00593; "
        "TransformerLensOrg/TransformerLens logit_attrs"
    )

    def __post_init__(self) -> None:
        check_task(self.name, self.task, self.pairs, "swap")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or why_no_weights(scope) or why_no_unembedding(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        pairs = pairs_for(scope, data, self.task, self.pairs, "swap", work.generator(0))
        solved = solve(scope, pairs, self.batch, self.name)
        stream, weights = read_stream(scope), all_weights(scope)
        batches = solved.pairs.batches(self.batch)
        units = [work.unit(f"batch {i}", partial(attribute, scope, batches[i], stream, weights)) for i in work.each(range(len(batches)))]
        scores = [torch.cat([unit[f"layer {layer}"] for unit in units]).mean(0) for layer in scope.topology.layers]
        full = float(torch.cat([unit["read"] for unit in units]).mean())
        heads = float(torch.stack([score.sum() for score in scores]).sum())
        true = float(torch.cat([unit["logits"] for unit in units]).mean())
        notes = []
        if abs(true - full) > 1e-2 * max(abs(full), 1.0):
            notes.append(
                f"Logits pass a cap or a scale after the unembedding: attributions are to logits before it ({full:.3f}, not {true:.3f})."
            )
        return Findings(
            {self.name: stack(scores)},
            numbers={**solved.numbers, "logit_difference": full, "attributed_to_heads": heads, "attributed_to_the_rest": full - heads},
            data=[solved.pairs.fact],
            notes=notes,
        )


@torch.no_grad()
def attribute(scope: Scope, pairs: ContrastPairs, stream: Stream, weights: dict[int, HeadWeights]) -> Unit:
    """Of pairs of one length: "layer l" [n, H] each head's share, "read" [n] the logit difference as read from the last norm, "logits" [n]
    as the model gave it; float64.
    """
    from headscope.interventions import record_heads

    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, given: Tensor | None, made: Tensor | None) -> None:
        if given is not None and made is not None:
            seen[name] = (given[:, -1].double(), made[:, -1].double())

    head = unembedding_name(scope)
    norms = [part.writes.name for part in stream.layers.values() if part.writes is not None]
    names = dict.fromkeys([head, *norms, *([stream.final.name] if stream.final is not None else [])])
    with record_heads(scope, sites=("z",)) as record, watching(scope.model, list(names), see):
        logits = last_logits(scope, pairs.clean)
    table = unembedding(scope)
    right, wrong = (table[:, one.to(table.device)].T.double() for one in (pairs.answers, pairs.wrongs))
    direction = right - wrong  # [n, d]
    read = (seen[head][0].to(direction.device) * direction).sum(1)
    bias = getattr(scope.model.get_submodule(head), "bias", None)
    if bias is not None:
        read = read + (bias[pairs.answers.to(bias.device)] - bias[pairs.wrongs.to(bias.device)]).double()
    out: Unit = {"read": read.cpu(), "logits": contrast(logits, pairs)}
    for layer in scope.topology.layers:
        z = record.z(layer)[:, -1].double()  # [n, H, Dv]
        parts = torch.einsum("nhv,hvd->nhd", z, weights[layer].o.double().to(z.device))
        rows = []
        for i in range(len(pairs)):
            part = parts[i]
            after = stream.layers[layer].writes
            if after is not None:
                part = after.frozen(part, seen[after.name][0][i], seen[after.name][1][i])
            if stream.final is not None:
                part = stream.final.frozen(part, seen[stream.final.name][0][i], seen[stream.final.name][1][i])
            rows.append(part @ direction[i].to(part.device))
        out[f"layer {layer}"] = torch.stack(rows).cpu()
    return out
