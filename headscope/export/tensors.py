"""safetensors of numpy arrays, to and from bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from headscope.errors import ExportError, refusal
from headscope.export.files import read_bytes
from headscope.store.schema import one_line

LARGEST = 8 * 2**30
"""Bytes of one file of tensors, at most."""


def save_tensors(content: Mapping[str, np.ndarray]) -> bytes:
    """The same arrays give the same bytes."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(values) for name, values in sorted(content.items())}))


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every array of a file. ExportError when it is none, or cut short."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_bytes(path, LARGEST)
    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise refusal(ExportError, str(path), f"it is damaged or no safetensors ({one_line(error)})", "copy the export again") from None
