"""A model's fingerprint: which model a profile or a plan was made of.

It must hold what makes heads mean something else, and nothing of how a model was loaded: a plan that was made in float32 on one machine
runs in bfloat16 on another. So values are compared to bfloat16's precision, and the config without its dtype and the version that wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

PASSING = ("transformers_version", "dtype", "torch_dtype")
"""What a config says about how a model was loaded or saved, and not about the model."""


def fingerprint_of(model: nn.Module) -> str:
    """16 hex digits that two models share only if their config, their parameters' names and shapes, and a sample of every parameter's
    values agree to bfloat16's precision. A copy in bfloat16 or float32 is the same model; a fine-tuned or quantised one is not.

    Reads a few values per tensor, so it costs milliseconds; weights that are kept on disk are known by their names and shapes.
    """
    digest = hashlib.sha256()
    known: Any = getattr(model, "config", None)
    known = known.to_dict() if hasattr(known, "to_dict") else dict(known) if isinstance(known, Mapping) else {}
    config = {key: value for key, value in known.items() if not key.startswith("_") and key not in PASSING}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        kind = "float" if value.is_floating_point() else str(value.dtype)
        digest.update(f"{name}{tuple(value.shape)}{kind}".encode())
        for part in _plain_parts(value.detach()):
            if part.is_meta:
                continue
            flat = part.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 61)][:64]
            digest.update(str(sample.bfloat16().tolist() if sample.is_floating_point() else sample.tolist()).encode())
    return digest.hexdigest()[:16]


def _plain_parts(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantisation library's tensor is made of (codes, scales), which it may not let be reshaped; else itself."""
    if not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(value, name))
