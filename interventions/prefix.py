"""Prefix reuse: an edit at layer l leaves everything below it alone, so a sweep over layers need run only what is above.

A base pass keeps every block's output. To start from block l, the blocks below return what they returned then, without running, and block
l meets the same residual stream to the bit; embeddings, masks and the head of the model run as ever. Over a sweep of all layers this saves
half. The blocks themselves are met, not a list of model names: a block is the part of a ModuleList that holds one layer's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headscope.interventions.running import outputs_of, prepared

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions.base import Intervention
    from headscope.scope import Scope


def blocks_of(scope: Scope) -> list[nn.Module]:
    """The blocks of the main stack in the order of its layers; empty where they cannot be told, and then nothing is reused."""
    if scope.host.kind not in ("transformers", "nnsight", "diffusers"):
        return []
    out: list[nn.Module] = []
    for record in scope.topology.main:
        block = _block(scope.model, record.name)
        if block is None or any(block is one for one in out):
            return []
        out.append(block)
    return out


def _block(model: nn.Module, name: str) -> nn.Module | None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        try:
            parent = model.get_submodule(".".join(parts[: end - 1]))
        except AttributeError:
            return None
        if isinstance(parent, nn.ModuleList) and parts[end - 1].isdigit():
            return parent[int(parts[end - 1])]
    return None


class Prefix:
    """One input, run once with every block's output kept, O(L N d) memory. `output` is that run's [B, N, V]."""

    def __init__(self, scope: Scope, data: Any, *, reuse: bool = True) -> None:
        self.scope = scope
        self.inputs = prepared(scope, data)
        self.blocks = blocks_of(scope) if reuse else []
        self._kept: dict[int, Any] = {}
        self.blocks_run = 0
        """Blocks that really ran since this was made, the first pass included."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(self._keeper(index)).remove)
            self.output: Tensor = outputs_of(scope, self.inputs)
        self.blocks_run += len(self.blocks)

    def _keeper(self, index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._kept[index] = output

        return keep

    def first_layer(self, interventions: tuple[Intervention, ...]) -> int:
        """The index of the first block that interventions may change; 0 where they do not say."""
        order = {record.name: index for index, record in enumerate(self.scope.topology.main)}
        first = len(self.blocks)
        for one in interventions:
            bound = getattr(one.bind(self.scope), "_bound", None)
            names = None if bound is None else list(bound.heads)
            if not names or any(name not in order for name in names):
                return 0
            first = min(first, *(order[name] for name in names))
        return first

    @contextmanager
    def from_layer(self, index: int) -> Iterator[None]:
        """In the block, blocks before `index` return what they returned in the first pass."""
        index = min(index, len(self.blocks))
        with ExitStack() as stack:
            for place, block in enumerate(self.blocks[:index]):
                last = place == index - 1
                stack.callback(_replaced(block, self._kept[place], last))
            yield

    def run(self, *interventions: Intervention) -> Tensor:
        """The model's output [B, N, V] on the input under interventions, from the first block that they touch."""
        if not interventions:
            return self.output
        start = self.first_layer(interventions) if self.blocks else 0
        with self.scope.intervene(*interventions), self.from_layer(start):
            out = outputs_of(self.scope, self.inputs)
        self.blocks_run += max(len(self.blocks) - start, 0)
        return out


def _replaced(block: nn.Module, output: Any, last: bool) -> Callable[[], None]:
    """Let a block return a kept output; the result undoes it. The one that a running block is given is a copy, which it may write to."""
    before = block.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _copied(output) if last else output

    block.__dict__["forward"] = forward

    def undo() -> None:
        if before is None:
            block.__dict__.pop("forward", None)
        else:
            block.__dict__["forward"] = before

    return undo


def _copied(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(_copied(one) for one in output)
    return output


__all__ = ["Prefix", "blocks_of"]
