"""The residual stream at the layers of a live model: what each layer of the main stack is given, and what the last one gives.

A layer is found from its attention module: the nearest module above it that is an item of a ModuleList. Its first argument is the stream.
Hooks read it and change nothing; they come off when the block ends.

The silent failure this avoids: `output_hidden_states`, whose last entry has already passed the final norm in some models and not in others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headscope.errors import ProbeError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope


def layer_names(scope: Scope) -> list[str]:
    """Qualified names of the layers that hold the main stack's attention, in order. ProbeError where they cannot be found."""
    out = []
    for record in scope.topology.main:
        name = record.name
        while name:
            parent = name.rpartition(".")[0]
            if isinstance(scope.model.get_submodule(parent), nn.ModuleList):
                break
            name = parent
        if not name:
            raise refusal(
                ProbeError,
                f"{scope.name}: the layer around {record.name}",
                "no module above it is an item of a list of layers, so its residual stream cannot be found",
                "name other probes",
            )
        out.append(name)
    return out


def text_stack(scope: Scope) -> nn.Module:
    """The module that runs the layers of the main stack (and is told their positions)."""
    above = layer_names(scope)[0].rpartition(".")[0].rpartition(".")[0]
    module: nn.Module = scope.model.get_submodule(above)
    return module


@contextmanager
def watching(scope: Scope, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls see(place, hidden [B, N, d]) for the input of every layer (place 0, 1, ... in the main stack) and, as place L, the output of
    the last one, while the model runs in the block.
    """
    names = layer_names(scope)

    def before(place: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(given, torch.Tensor):
                raise refusal(
                    ProbeError, names[place], "its first argument is no tensor, so its residual stream is unknown", "name other probes"
                )
            see(place, given.detach())

        return hook

    def after(_: Any, args: Any, output: Any) -> None:
        see(len(names), (output[0] if isinstance(output, tuple | list) else output).detach())

    with ExitStack() as stack:
        for place, name in enumerate(names):
            stack.callback(scope.model.get_submodule(name).register_forward_pre_hook(before(place), with_kwargs=True).remove)
        stack.callback(scope.model.get_submodule(names[-1]).register_forward_hook(after).remove)
        yield


def rms_normed(hidden: Tensor) -> Tensor:
    """x / RMS(x) in float64, without a norm's gain: entries lie between -sqrt(d) and sqrt(d)."""
    wide = hidden.double()
    return wide / wide.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)


def first_dimensions(inputs: list[Tensor]) -> Tensor:
    """[d]: how large each dimension of the first token is, from its RMS-normed sizes [d] at every layer's input: their mean from the third
    layer on (over all where there are 3 or less). VAR's sink dimensions are the largest.
    """
    return torch.stack(inputs)[2 if len(inputs) > 3 else 0 :].mean(0)


__all__ = ["first_dimensions", "layer_names", "rms_normed", "text_stack", "watching"]
