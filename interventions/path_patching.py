"""Path patching: what one head tells another, apart from everything else it does.

Two passes over the clean input. In the first, the senders give what they gave in the corrupt run and every other head (and MLP) is frozen
to its clean output at the position, so the receivers' inputs change through the direct path only; they are recorded. In the second, the
receivers get these inputs and the rest of the model runs freely. The effect is how far the metric moves from the clean run to the corrupt
one.

The receivers' inputs are recorded before their own outputs are frozen; the other order would record the clean ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import Head, Intervention, heads_of, resolve
from headscope.interventions.patching import PatchHeads, PatchSite, key_heads
from headscope.interventions.prefix import Prefix, blocks_of
from headscope.interventions.record import SITES, HeadRecord, _Recorder, record_heads
from headscope.interventions.running import outputs_of
from headscope.sweeps import Sweep, _number

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

MLPS = ("mlp", "feed_forward", "feedforward", "ffn", "ff", "block_sparse_moe", "moe")


class PathPatching:
    """Path patching between a clean and a corrupt input of one length (Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023,
    arXiv 2304.05969; frozen at one position as in circuit reuse, Merullo et al. 2023, arXiv 2310.08744).

    `metric`: of the output [B, N, V]. `position`: the query position that is patched and frozen; None: the last; "all":
    every one, as paths into keys and values need. `freeze_mlps`: MLPs stay
    clean in the first pass, so only paths through attention and the residual stream count. Raises InterventionError when the inputs differ
    in length or the metric does not tell them apart.
    """

    def __init__(
        self,
        scope: Scope,
        clean: Any,
        corrupt: Any,
        metric: Callable[[Tensor], Any],
        *,
        position: int | Literal["all"] | None = None,
        freeze_mlps: bool = True,
    ) -> None:
        self.scope, self.metric, self.freeze_mlps = scope, metric, freeze_mlps
        self._mlps = _mlps(scope) if freeze_mlps else []
        self._clean_mlps: dict[int, Tensor] = {}
        with record_heads(scope, sites=("z",)) as self._clean, ExitStack() as stack:
            for index, mlp in enumerate(self._mlps):
                stack.callback(mlp.register_forward_hook(self._keeper(index)).remove)
            self._prefix = Prefix(scope, clean)
        with record_heads(scope, sites=("z",)) as self._corrupt:
            other = outputs_of(scope, corrupt)
        lengths = [next(iter(one.passes[0].values())).shape[:2] for one in (self._clean, self._corrupt)]
        if lengths[0] != lengths[1]:
            raise refusal(
                InterventionError,
                f"inputs of {list(lengths[0])} and {list(lengths[1])} tokens",
                "a path is followed position by position",
                "pass inputs of one length",
            )
        self.clean, self.corrupt = _number(metric(self._prefix.output)), _number(metric(other))
        if self.clean == self.corrupt:
            raise refusal(
                InterventionError,
                f"metric {self.clean:.6g} on both inputs",
                "there is no difference to explain",
                "pass inputs that differ in it",
            )
        self.position: int | None = None if position == "all" else lengths[0][1] - 1 if position is None else position
        if self.position is not None and not 0 <= self.position < lengths[0][1]:
            raise refusal(InterventionError, f"position {position}", f"the inputs have {lengths[0][1]}", "pass one of them, or None")

    def effect(self, senders: Any, receivers: Any = None, at: PatchSite = "z") -> float:
        """(m_patched - m_clean) / (m_corrupt - m_clean). `receivers`: heads, and `at` which of their inputs ("q", "k", "v") or outputs
        ("z") carries the path; None: the model's output, i.e. the direct effect of the senders' first pass."""
        where = None if self.position is None else (self.position,)
        names = resolve(pairs := heads_of(senders), self.scope.topology)
        order = {record.name: index for index, record in enumerate(self.scope.topology.main)}
        if any(name not in order for name in names):
            raise refusal(InterventionError, f"senders {senders!r}", "they are not in the main stack", "pass heads of numbered layers")
        first = min(order[name] for name in names)
        frozen = [head for head in self._all_from(first) if head not in pairs]
        edits: list[Intervention] = []
        record: HeadRecord | None = None
        reached: tuple[Head, ...] = ()
        if receivers is not None:
            if at not in SITES:
                raise unknown_name(InterventionError, "site", at, SITES)
            self._empty_record(listed := heads_of(receivers), at)  # checks them
            reached = tuple(head for head in listed if order.get(self.scope.topology[head[0]].name, -1) >= first)
            if not reached:  # all of them lie below the senders and hear nothing of them
                return 0.0
            record = self._empty_record(reached, at)
            edits.append(_Recorder(record, None))
        if frozen:
            edits.append(PatchHeads(frozen, self._clean.stacked("z", frozen), positions=where))
        edits.append(PatchHeads(pairs, self._corrupt.stacked("z", pairs), positions=where))
        with self._frozen_mlps(first), self.scope.intervene(*edits), self._prefix.from_layer(first):
            out = outputs_of(self.scope, self._prefix.inputs)
        if record is not None:
            out = self._prefix.run(PatchHeads(reached, record, at, positions=where))
        return (_number(self.metric(out)) - self.clean) / (self.corrupt - self.clean)

    def sweep(self, receivers: Any = None, at: PatchSite = "z", senders: Any = "all") -> Sweep:
        """The effect of every sender, as a Sweep; senders above all receivers cannot reach them and count 0."""
        import pandas as pd
        from tqdm import tqdm

        listed = self._all_from(0) if isinstance(senders, str) and senders == "all" else list(heads_of(senders))
        rows = []
        for head in tqdm(listed, desc="paths", unit="head", disable=None, leave=False):
            value = self.effect([head], receivers, at)
            rows.append({"layer": head[0], "head": head[1], "value": value, "change": value})
        label = "direct effect" if receivers is None else f"effect by {at} of the receivers"
        return Sweep(
            pd.DataFrame(rows),
            0.0,
            label,
            facts={"clean": self.clean, "corrupt": self.corrupt, "position": "all" if self.position is None else self.position},
        )

    # ---- parts --------------------------------------------------------------------------------------------------

    def _all_from(self, first: int) -> list[Head]:
        main = self.scope.topology.main[first:]
        return [(record.layer, head) for record in main if record.layer is not None for head in range(record.heads)]

    def _empty_record(self, receivers: Sequence[Head], at: str) -> HeadRecord:
        if at in ("k", "v"):
            key_heads(tuple(receivers), self.scope)
        wanted = {name: sorted(of) for name, of in resolve(receivers, self.scope.topology).items()}
        kv_heads = {name: sorted({self.scope.topology[name].kv_head(head) for head in of}) for name, of in wanted.items()}
        return HeadRecord(self.scope.topology, (at,), wanted, kv_heads)

    def _keeper(self, index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._clean_mlps[index] = output[0] if isinstance(output, tuple) else output

        return keep

    @contextmanager
    def _frozen_mlps(self, first: int) -> Iterator[None]:
        def hook(index: int) -> Callable[..., Any]:
            def freeze(module: nn.Module, args: Any, output: Any) -> Any:
                whole = isinstance(output, torch.Tensor)
                changed = (output if whole else output[0]).clone()
                rows = slice(None) if self.position is None else self.position
                changed[:, rows] = self._clean_mlps[index][:, rows]
                return changed if whole else (changed, *output[1:])

            return freeze

        with ExitStack() as stack:
            for index, mlp in enumerate(self._mlps):
                if index >= first:
                    stack.callback(mlp.register_forward_hook(hook(index)).remove)
            yield


def _mlps(scope: Scope) -> list[nn.Module]:
    """The MLP of every block. InterventionError where one cannot be told."""
    out = []
    blocks = blocks_of(scope)
    for index, block in enumerate(blocks):
        found = next((child for name, child in block.named_children() if name in MLPS), None)
        if found is None:
            raise refusal(
                InterventionError,
                f"freeze_mlps=True in block {index} ({type(block).__name__})",
                "none of its parts is known to be its MLP",
                "pass freeze_mlps=False",
            )
        out.append(found)
    if not blocks:
        raise refusal(InterventionError, f"freeze_mlps=True in {scope.name}", "its blocks cannot be told", "pass freeze_mlps=False")
    return out


__all__ = ["PathPatching"]
