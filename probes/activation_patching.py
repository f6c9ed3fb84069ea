"""Activation patching: which heads carry what makes the answer right?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, unknown_name
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.contrast import ContrastPairs, contrast, solve
from headscope.probes.contrast_tasks import check_task, pairs_for
from headscope.probes.ov_copying import why_no_unembedding

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions.base import Head
    from headscope.interventions.patching import PatchSite
    from headscope.probes.active import Unit
    from headscope.scope import Scope

SITES = ("z", "q", "k", "v")


@dataclass(frozen=True)
class ActivationPatching(ActiveProbe):
    """How far one head's activations of another run move the answer there.

    A pair is a clean text and a corrupted one of as many tokens; ld is the logit of the clean answer less that of the wrong one at the last
    token. One head at a time takes its activations from the source run, in a target run:

        activation_patching = (mean ld(patched) - mean ld(target)) / (mean ld(source) - mean ld(target))

    direction: "denoise" patches clean into corrupt (what suffices to bring the answer back; TransformerLens' generic patching), "noise"
    corrupt into clean (what is necessary). at: "z", a head's output before W_O, or "q", "k", "v"; key heads are patched for their whole
    group and the value stands at each of its heads. positions: "all" tokens, or the "last" one.

    0: the head makes no difference (patching a run with itself is 0 exactly); 1: it alone carries the whole difference; below 0: it works
    against it. `all_heads` in the numbers is the effect of all heads at once.

    Data: `task` "ioi" (corruption "swap" or "abc"), "arithmetic" or "repeat" (see contrast_tasks), or your own pairs. Pairs that the model
    does not solve are left out.

    Departures: TransformerLens leaves the normalisation to its user; means are taken before the division.
    """

    task: str = "ioi"
    pairs: int = 16
    corruption: str = "swap"
    direction: str = "denoise"
    at: PatchSite = "z"
    positions: str = "all"
    batch: int = 16

    name: ClassVar[str] = "activation_patching"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("activation_patching", "share of the effect", "carries what makes the answer right", (None, None)),
    )
    data: ClassVar[str] = "contrast pairs"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "unembedding")
    cost: ClassVar[str] = "one forward pass over the pairs per head, half of its layers on average"
    source: ClassVar[str] = (
        "Interpretability in the Wild, arXiv:2211.00593; How to use and interpret activation patching, arXiv:2404.15255; "
        "TransformerLensOrg/TransformerLens patching"
    )

    def __post_init__(self) -> None:
        check_task(self.name, self.task, self.pairs, self.corruption)
        for field, known in (("direction", ("denoise", "noise")), ("at", SITES), ("positions", ("all", "last"))):
            if getattr(self, field) not in known:
                raise unknown_name(ProbeError, f"{field} of probe {self.name!r}", getattr(self, field), known)
        if self.at in ("k", "v") and self.positions == "last":
            raise ProbeError(f"positions='last' with at={self.at!r}: earlier keys are what the last token reads; pass positions='all'")

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or why_no_unembedding(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        pairs = pairs_for(scope, data, self.task, self.pairs, self.corruption, work.generator(0))
        solved = solve(scope, pairs, self.batch, self.name)
        denoise = self.direction == "denoise"
        batches = solved.pairs.batches(self.batch)
        source, target = (solved.clean, solved.corrupt) if denoise else (solved.corrupt, solved.clean)
        low, high = float(target.mean()), float(source.mean())
        sums = dict.fromkeys(scope.topology.layers, torch.zeros(0))
        whole = 0.0
        for number, part in enumerate(batches):
            patcher = Patcher(scope, part, denoise, self.at, self.positions)
            for layer in work.each(scope.topology.layers, f"{self.name} {number + 1}/{len(batches)}"):
                found = work.unit(f"batch {number} layer {layer}", partial(patcher.layer, layer))["patched"]
                sums[layer] = sums[layer] + found.sum(1) if len(sums[layer]) else found.sum(1)
            whole += float(work.unit(f"batch {number} all", patcher.every)["patched"].sum())
        count = len(solved.pairs)
        scores = [(sums[layer] / count - low) / (high - low) for layer in scope.topology.layers]
        return Findings(
            {self.name: stack(scores)},
            numbers={**solved.numbers, "all_heads": (whole / count - low) / (high - low)},
            data=[solved.pairs.fact],
        )


class Patcher:
    """One batch of pairs of one length: the source run's activations, recorded once, and the target run, continued from the layer that is
    patched. Nothing runs before the first question, so a journal that has the answers costs nothing.
    """

    def __init__(self, scope: Scope, pairs: ContrastPairs, denoise: bool, at: PatchSite, positions: str) -> None:
        self.scope, self.pairs, self.at = scope, pairs, at
        self.source, self.target = (pairs.clean, pairs.corrupt) if denoise else (pairs.corrupt, pairs.clean)
        self.rows = (len(pairs.clean[0]) - 1,) if positions == "last" else None
        self._ready: Any = None

    def patched(self, heads: tuple[Head, ...]) -> Tensor:
        """ld [n] with these heads patched."""
        from headscope.interventions.patching import PatchHeads
        from headscope.interventions.prefix import Prefix
        from headscope.interventions.record import record_heads

        if self._ready is None:
            with record_heads(self.scope, sites=(self.at,)) as record:
                Prefix(self.scope, self._inputs(self.source), reuse=False)
            self._ready = record, Prefix(self.scope, self._inputs(self.target))
        record, prefix = self._ready
        return contrast(prefix.run(PatchHeads(heads, record, self.at, positions=self.rows))[:, -1], self.pairs)

    def layer(self, layer: int) -> Unit:
        """ "patched" [H, n]: ld with each head of a layer patched by itself."""
        module = self.scope.topology[layer]
        rows: list[Tensor] = []
        for head in range(module.heads):
            shared = self.at in ("k", "v") and head % module.group
            rows.append(rows[-1] if shared else self.patched(self._group(layer, head)))
        return {"patched": torch.stack(rows)}

    def every(self) -> Unit:
        """ "patched" [n]: ld with all heads patched at once."""
        main = self.scope.topology.main
        return {"patched": self.patched(tuple((m.layer, head) for m in main for head in range(m.heads) if m.layer is not None))}

    def _group(self, layer: int, head: int) -> tuple[Head, ...]:
        count = self.scope.topology[layer].group if self.at in ("k", "v") else 1
        return tuple((layer, head + more) for more in range(count))

    def _inputs(self, ids: tuple[Tensor, ...]) -> dict[str, Any]:
        extra = {"logits_to_keep": 1} if "logits_to_keep" in self.scope._forward_parameters else {}
        return {"input_ids": torch.stack(ids), **extra}
