"""Path patching: which heads tell the answer, or tell other heads, directly?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, stack
from headscope.probes.contrast import ContrastPairs, contrast, solve
from headscope.probes.contrast_tasks import check_task, pairs_for
from headscope.probes.ov_copying import why_no_unembedding

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions.base import Head
    from headscope.probes.active import Unit
    from headscope.scope import Scope

SITES = ("z", "q", "k", "v")


@dataclass(frozen=True)
class PathPatching(ActiveProbe):
    """How much of the answer a head gives directly: to the logits, or to the queries, keys, values or outputs of other heads.

    On the clean text, the sender's output at the patched position is that of the corrupted run while every other head (and, with
    freeze_mlps, every MLP) stays as it was there, so only the sender's own path changes. With receivers, their inputs (`at`) are recorded
    in that pass and put into a second clean pass, where everything else runs freely; without, the first pass's logits are read. Over the
    pairs, with ld the clean answer's logit less the wrong one's:

        path_patching = (mean ld(patched) - mean ld(clean)) / (mean ld(corrupt) - mean ld(clean))

    0: nothing goes that way (patching with the clean output is 0 exactly); 1: the whole difference does; below 0: it works against it.

    position: "last" freezes and patches the last token, as circuit reuse's code does; "all" does so at every token, which is needed where
    the path ends in keys or values, since those belong to earlier tokens. receivers: pairs (layer, head); a head of a group stands for its
    group at k and v.

    Data: `task` "ioi" (corruption "swap" or "abc"), "arithmetic" or "repeat" (see contrast_tasks), or your own pairs. Pairs that the model
    does not solve are left out. Departures: circuit reuse's code averages over pairs that the model gets wrong as well; the arithmetic
    paper divides by the clean logit, not by the whole difference.
    """

    task: str = "ioi"
    pairs: int = 16
    corruption: str = "swap"
    receivers: tuple[tuple[int, int], ...] = ()
    at: str = "q"
    position: str = "last"
    freeze_mlps: bool = True
    batch: int = 16

    name: ClassVar[str] = "path_patching"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("path_patching", "share of the effect", "gives the answer directly, or to the receivers", (None, None)),
    )
    data: ClassVar[str] = "contrast pairs"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "unembedding")
    cost: ClassVar[str] = "one forward pass over the pairs per head, two with receivers, half of its layers on average"
    source: ClassVar[str] = (
        "Interpretability in the Wild, arXiv:2211.00593; Localizing Model Behavior with Path Patching, arXiv:2304.05969; "
        "Circuit Component Reuse, arXiv:2310.08744, jmerullo/circuit_reuse; arithmetic heads, arXiv:2409.01659"
    )

    def __post_init__(self) -> None:
        check_task(self.name, self.task, self.pairs, self.corruption)
        for field, known in (("at", SITES), ("position", ("last", "all"))):
            if getattr(self, field) not in known:
                raise unknown_name(ProbeError, f"{field} of probe {self.name!r}", getattr(self, field), known)
        object.__setattr__(self, "receivers", tuple((int(layer), int(head)) for layer, head in self.receivers))
        if self.receivers and self.at in ("k", "v") and self.position == "last":
            raise refusal(
                ProbeError,
                f"receivers' {self.at} with position='last'",
                "the last token's own key is all that would change",
                "pass position='all'",
            )

    def unfit(self, scope: Scope) -> str | None:
        return super().unfit(scope) or why_no_unembedding(scope)

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        from headscope.interventions.base import resolve

        resolve(self.receivers, scope.topology)
        pairs = pairs_for(scope, data, self.task, self.pairs, self.corruption, work.generator(0))
        solved = solve(scope, pairs, self.batch, self.name)
        batches = solved.pairs.batches(self.batch)
        low, high = float(solved.clean.mean()), float(solved.corrupt.mean())
        sums = dict.fromkeys(scope.topology.layers, torch.zeros(0))
        whole = 0.0
        for number, part in enumerate(batches):
            tracer = Tracer(self, scope, part)
            for layer in work.each(scope.topology.layers, f"{self.name} {number + 1}/{len(batches)}"):
                found = work.unit(f"batch {number} layer {layer}", partial(tracer.layer, layer))["patched"]
                sums[layer] = sums[layer] + found if len(sums[layer]) else found
            whole += float(work.unit(f"batch {number} all", tracer.every)["patched"])
        count = len(solved.pairs)
        scores = [(sums[layer] / count - low) / (high - low) for layer in scope.topology.layers]
        return Findings(
            {self.name: stack(scores)},
            numbers={**solved.numbers, "all_heads": (whole / count - low) / (high - low)},
            data=[solved.pairs.fact],
        )


class Tracer:
    """One batch of pairs of one length; nothing runs before the first question, so a journal that has the answers costs nothing."""

    def __init__(self, probe: PathPatching, scope: Scope, pairs: ContrastPairs) -> None:
        self.probe, self.scope, self.pairs = probe, scope, pairs
        self.receivers = groups(scope, probe.receivers) if probe.at in ("k", "v") else probe.receivers
        self._paths: Any = None

    def patched(self, senders: tuple[Head, ...]) -> float:
        """Sum of ld over the pairs with these senders patched."""
        from headscope.interventions.path_patching import PathPatching as Paths

        if self._paths is None:
            self._paths = Paths(
                self.scope,
                self._inputs(self.pairs.clean),
                self._inputs(self.pairs.corrupt),
                lambda logits: contrast(logits[:, -1], self.pairs).mean(),
                position="all" if self.probe.position == "all" else None,
                freeze_mlps=self.probe.freeze_mlps,
            )
        paths = self._paths
        effect = paths.effect(senders, self.receivers or None, self.probe.at)
        return float(effect * (paths.corrupt - paths.clean) + paths.clean) * len(self.pairs)

    def layer(self, layer: int) -> Unit:
        """ "patched" [H]: sum of ld with each head of a layer as the sender."""
        heads = range(self.scope.topology[layer].heads)
        return {"patched": torch.tensor([self.patched(((layer, head),)) for head in heads], dtype=torch.float64)}

    def every(self) -> Unit:
        """ "patched": sum of ld with all heads as senders (with receivers: all heads below the last of them)."""
        last = max((layer for layer, _ in self.receivers), default=None)
        main = [m for m in self.scope.topology.main if m.layer is not None and (last is None or m.layer < last)]
        if not main:
            return {"patched": self.patched(((0, 0),))}
        return {"patched": self.patched(tuple((m.layer, head) for m in main for head in range(m.heads) if m.layer is not None))}

    def _inputs(self, ids: tuple[Tensor, ...]) -> dict[str, Any]:
        extra = {"logits_to_keep": 1} if "logits_to_keep" in self.scope._forward_parameters else {}
        return {"input_ids": torch.stack(ids), **extra}


def groups(scope: Scope, heads: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The heads and all that share their key heads, in order and once each."""
    out: dict[tuple[int, int], None] = {}
    for layer, head in heads:
        count = scope.topology[layer].group
        first = head - head % count
        out.update(dict.fromkeys((layer, first + more) for more in range(count)))
    return tuple(out)
