"""MoA's influence: what the loss would lose with each attention weight, summed over blocks, and the span that a head needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch

from headscope.errors import ProbeError, refusal
from headscope.interventions.base import Intervention
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.block_choice import check_block
from headscope.probes.calls import main_modules, not_differentiable, not_readable, row_chunks, texts_of, weighed, weight_rows
from headscope.probes.duo_gates import frozen

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.probes.text import ProbeText
    from headscope.scope import Scope

WHOLE = 1e-9
"""A weight closer to 1 than this is its row's only one: without it there is nothing to renormalise, and its influence is set to 0."""


@dataclass(frozen=True)
class Moa(ActiveProbe):
    """How much a head's weights matter to the loss, how much of that lies far back, and how long a window the head needs.

    Taking the weight A_ij out and renormalising its row changes the loss, to first order, by E_ij = -A_ij (G_ij - sum_n G_in A_in) / (1 -
    A_ij), with G = dLoss/dA. |E| is summed over blocks of `block` x `block`. The loss is the mean cross-entropy of the `response` tokens
    that the model itself writes after the text (MoA profiles on the model's own answers); response=0 takes the text's own next tokens.

    `moa_influence` is the sum of |E| in nats; `moa_distant` the share of it on blocks beyond half of the context and outside the first;
    `moa_span` the smallest window, as a share of the context, which together with the first block holds `keep` of it. The table `spans`
    has, for every head and window, the share that is lost: MoA's objective, which it minimises over heads under a budget. The budget's
    integer program is not solved here.

    dLoss/dz comes from one backward pass; G_ij = dz_i . v_j and sum_n G_in A_in = dz_i . z_i, so rows are made a few at a time and never N
    x N. Departures: an entry that is its row's only weight (the first row always) has influence 0, since nothing is left to renormalise;
    the official code gives the first row -A G instead and adds an epsilon to 1 - A, which in half precision is what large weights are
    divided by. |E| is taken per entry; the official default sums signed values, which cancel, and whose shares mean little
    (`absolute=False`).

    Cost: the response's decode steps, one forward and one backward pass, and N^2 work per head in float64.
    """

    response: int = 64
    block: int = 64
    keep: float = 0.95
    absolute: bool = True
    texts: int = 1

    name: ClassVar[str] = "moa"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("moa_influence", "nats", "the loss depends on this head's weights", (None, None)),
        Metric("moa_distant", "share of the influence", "its weight far back is what matters", (None, None)),
        Metric("moa_span", "share of the context", "a long window is needed to keep its influence"),
    )
    data: ClassVar[str] = "natural"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "generation")
    cost: ClassVar[str] = "generation of the response, one forward and one backward pass, N^2 work per head"
    source: ClassVar[str] = "MoA, arXiv:2406.14909, thu-nics/MoA"

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or not_readable(scope) or not_differentiable(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        if self.response < 0 or not 0 < self.keep <= 1 or self.block < 1:
            raise refusal(ProbeError, f"{self!r}", "response counts tokens and keep is a share", "pass response=64, keep=0.95, block=64")
        texts = texts_of(scope, data, work, texts=self.texts)
        for text in texts:
            check_block(self.name, self.block, len(text))
            if len(text) - self.response < 4 * self.block:
                why = f"{self.response} of them are for the response, and the text before it needs 4 blocks of {self.block}"
                raise refusal(ProbeError, f"probe 'moa' on {len(text)} tokens", why, "raise the context, or pass a shorter response")
        keys = [(number, layer) for number in range(len(texts)) for layer in range(len(scope.topology.main))]
        maps: dict[int, Tensor] = {}
        losses: list[float] = []
        for number in work.each(range(len(texts)), "influence"):
            found = work.unit(f"text {number}", partial(self._text, scope, texts[number]))
            losses.append(float(found["loss"]))
            for _, layer in (key for key in keys if key[0] == number):
                one = found[f"layer {layer}"]
                maps[layer] = one if layer not in maps else joined(maps[layer], one)
        scores, table = self._scores(scope, [maps[layer] / len(texts) for layer in range(len(maps))])
        facts = {"name": texts[0].name, "kind": texts[0].kind, "sha256": texts[0].sha256, "sequences": len(texts), "tokens": len(texts[0])}
        return Findings(scores, {"moa_loss": sum(losses) / len(losses)}, [facts], {"spans": table})

    def _text(self, scope: Scope, text: ProbeText) -> dict[str, Any]:
        ids = text.ids
        first = 1
        if self.response:
            first = len(ids) - self.response
            made = scope.generate(ids[None, :first], max_new_tokens=self.response, min_new_tokens=self.response)
            ids = made.ids[0].cpu()
        maps, loss = influence(scope, ids, first, self.block, absolute=self.absolute)
        return {"loss": loss, **{f"layer {place}": one for place, one in enumerate(maps)}}

    def _scores(self, scope: Scope, maps: list[Tensor]) -> tuple[dict[str, Tensor], pd.DataFrame]:
        total, distant, spans, rows = [], [], [], []
        for module, one in zip(scope.topology.main, maps, strict=True):
            count = one.shape[-1]
            place = torch.arange(count)
            behind = place[:, None] - place
            whole = one.sum((-1, -2))
            # [H, windows]: what is lost when blocks `window` or more behind, but not the first, are gone
            lost = torch.stack([(one * ((behind >= window) & (place > 0))).sum((-1, -2)) for window in range(1, count + 1)], 1)
            share = lost / torch.where(whole == 0, torch.ones_like(whole), whole)[:, None]
            enough = (share <= 1 - self.keep + 1e-12).int().argmax(1) + 1
            total.append(whole)
            distant.append(share[:, count // 2 - 1])
            spans.append(enough.double() / count)
            rows += [
                (module.layer, head, (window + 1) * self.block, float(share[head, window]))
                for head in range(len(one))
                for window in range(count)
            ]
        scores = {"moa_influence": stack(total), "moa_distant": stack(distant), "moa_span": stack(spans)}
        return scores, pd.DataFrame(rows, columns=["layer", "head", "span", "lost"])


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two maps [H, n, n] of texts whose lengths may differ."""
    count = max(a.shape[-1], b.shape[-1])
    grown = [torch.nn.functional.pad(one, (0, count - one.shape[-1]) * 2) for one in (a, b)]
    return grown[0] + grown[1]


@dataclass(frozen=True)
class Traced(Intervention):
    """Puts every head output z under autograd and keeps it with its call; `first` begins the graph."""

    calls: dict[str, tuple[AttentionCall, Tensor]]
    modules: frozenset[str]

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        if call.module not in self.modules:
            return output
        z = output if output.requires_grad else output.detach().requires_grad_(True)
        self.calls[call.module] = (call, z)
        return z


def influence(scope: Scope, ids: Tensor, first: int, block: int, *, absolute: bool = True) -> tuple[list[Tensor], float]:
    """(per layer [H, n, n] float64 influence by block, loss) of the mean cross-entropy of tokens first.. of ids [N]."""
    calls: dict[str, tuple[AttentionCall, Tensor]] = {}
    inputs: dict[str, Any] = {"input_ids": ids[None].to(scope.device)}
    if "use_cache" in scope._forward_parameters:
        inputs["use_cache"] = False
    if "logits_to_keep" in scope._forward_parameters:
        inputs["logits_to_keep"] = len(ids) - first + 1
    with frozen(scope.model):
        with torch.enable_grad(), scope.intervene(Traced(calls, main_modules(scope))):
            logits = scope.model(**inputs).logits[0]
            wanted = ids[first:].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits[-len(wanted) - 1 : -1].float(), wanted)
        names = [module.name for module in scope.topology.main]
        gradients = torch.autograd.grad(loss, [calls[name][1] for name in names])
    value = float(loss.detach())
    del logits, loss
    if not math.isfinite(value):
        raise refusal(ProbeError, f"a loss of {value}", "there is no gradient to speak of", "load the model in float32 or bfloat16")
    out = []
    for name, gradient in zip(names, gradients, strict=True):
        out.append(block_influence(calls.pop(name)[0], gradient, block, absolute=absolute))
    return out, value


@torch.no_grad()
def block_influence(call: AttentionCall, gradient: Tensor, block: int, *, absolute: bool = True) -> Tensor:
    """[H, n, n] float64: |E| (or E) summed over blocks, from dLoss/dz [1, N, Hq, Dv]."""
    length, heads = call.q.shape[2], call.q.shape[1]
    count = -(-length // block)
    out = torch.zeros(heads, count, count, dtype=torch.float64)
    for start, stop in row_chunks(length, rows=block):
        effect = edge_influence(call, gradient, start, stop)[0]
        effect = effect.abs() if absolute else effect
        padded = torch.nn.functional.pad(effect.sum(1), (0, count * block - length))
        out[:, start // block] += padded.view(heads, count, block).sum(-1).cpu()
    return out


@torch.no_grad()
def edge_influence(call: AttentionCall, gradient: Tensor, start: int, stop: int) -> Tensor:
    """E of rows start..stop: [1, Hq, rows, N] float64, 0 where hidden and where A is 1."""
    assert call.v is not None
    weights = weight_rows(call, start, stop, torch.float64)
    dz = gradient[:, start:stop].transpose(1, 2).double()
    batch, heads, rows, _ = dz.shape
    v = call.v.double()
    grouped = dz.reshape(batch, call.k.shape[1], call.group * rows, -1)
    each = (grouped @ v.transpose(-1, -2)).view(batch, heads, rows, -1)  # G_ij = dz_i . v_j
    mean = (dz * weighed(call, weights)).sum(-1, keepdim=True)  # sum_n G_in A_in
    rest = 1 - weights
    return torch.where(rest > WHOLE, -weights * (each - mean) / rest.clamp_min(WHOLE), torch.zeros_like(weights))
