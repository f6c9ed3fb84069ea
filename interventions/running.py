"""One forward pass over whatever a scope's model takes, with or without its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import InterventionError, refusal
from headscope.inputs import model_inputs, moved

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope


def prepared(scope: Scope, data: Any) -> Any:
    """Data as the model takes it: texts and ids checked and encoded, anything else moved to the model's device."""
    if scope.host.takes_text:
        return model_inputs(scope, data, None, False, False)
    return moved(data, scope.device)


def run_once(scope: Scope, data: Any) -> None:
    """One forward pass without gradients, for what can be seen at its attention; only the last token's logits are made."""
    with torch.no_grad():
        inputs = prepared(scope, data)
        if scope.host.takes_text:
            scope._run_once(inputs)
        else:
            scope.host.run(inputs)


def outputs_of(scope: Scope, data: Any, *, grad: bool = False) -> Tensor:
    """[B, N, V] logits of one forward pass over data; of a model without logits its first output. Without a KV cache."""
    inputs = prepared(scope, data)
    with torch.set_grad_enabled(grad):
        if not isinstance(inputs, Mapping):
            out = scope.model(*inputs) if isinstance(inputs, tuple) else scope.model(inputs)
        elif scope.host.takes_text and "use_cache" in scope._forward_parameters and not scope.model.config.is_encoder_decoder:
            out = scope.model(**{"use_cache": False, **inputs})
        else:
            out = scope.model(**inputs)
    for name in ("logits", "last_hidden_state", "sample"):
        found = getattr(out, name, None)
        if isinstance(found, torch.Tensor):
            return found
    first = out[0] if isinstance(out, Sequence | Mapping) and not isinstance(out, Mapping) else out
    if not isinstance(first, torch.Tensor):
        raise refusal(
            InterventionError,
            f"{type(scope.model).__name__}",
            "its output holds no tensor that could be judged",
            "pass a metric of the scope",
        )
    return first


def each_input(data: Any) -> list[Any]:
    """Data as a list of inputs: a list of texts, of id tensors or of dicts is one input each; anything else is one input."""
    if isinstance(data, list | tuple) and data and not all(isinstance(one, int) for one in data):
        return list(data)
    return [data]


__all__ = ["each_input", "outputs_of", "prepared", "run_once"]
