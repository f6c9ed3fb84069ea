"""Values: a tensor inside an intervention, known by what it holds.

An intervention is plain data, and some need vectors: a head's mean output, another run's activations. A tensor compares element by element
and does not fit into JSON, so it is wrapped once: two are equal when their bytes are, and JSON carries the name of a safetensors file, the
tensor's shape, dtype and SHA-256. The silent failure this avoids is a specification that finds another file under the same name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.errors import InterventionError, refusal

MARK = "tensor"
"""The key by which JSON tells a stored tensor from other objects."""


class Values:
    """A tensor, on the CPU, compared by content. `file` is where it was read from or written to."""

    __slots__ = ("_digest", "_moved", "file", "tensor")

    def __init__(self, tensor: Any, file: Path | None = None) -> None:
        try:
            given = torch.as_tensor(tensor)
        except (TypeError, ValueError, RuntimeError):
            raise refusal(InterventionError, f"a {type(tensor).__name__}", "it is no tensor", "pass numbers or a tensor") from None
        self.tensor = given.detach().cpu().contiguous()
        self.file = file
        self._digest = ""
        self._moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def of(cls, given: Any) -> Values | None:
        """None as None, Values as they are, anything else wrapped."""
        return given if given is None or isinstance(given, Values) else cls(given)

    @property
    def digest(self) -> str:
        """SHA-256 of dtype, shape and bytes."""
        if not self._digest:
            head = f"{self.tensor.dtype}{tuple(self.tensor.shape)}".encode()
            self._digest = hashlib.sha256(head + self.tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return self._digest

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    def like(self, other: Tensor) -> Tensor:
        """The tensor in another's dtype and on its device; kept, so that decode steps do not copy it again."""
        key = (other.device, other.dtype)
        if key not in self._moved:
            self._moved[key] = self.tensor.to(device=other.device, dtype=other.dtype)
        return self._moved[key]

    def to_dict(self, key: str, file: str) -> dict[str, Any]:
        """What stands in JSON; `file` is relative to the JSON file."""
        return {
            MARK: key,
            "file": file,
            "sha256": self.digest,
            "shape": list(self.tensor.shape),
            "dtype": str(self.tensor.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any], folder: Path) -> Values:
        """The tensor that JSON names. InterventionError when the file is missing, has no such tensor, or holds another one."""
        from safetensors import SafetensorError, safe_open

        path = folder / str(given.get("file", ""))
        again = "write the specification again, with its tensors beside it"
        if not path.is_file():
            raise refusal(InterventionError, f"tensors {str(given.get('file'))!r}", f"there is no such file in {folder}", again)
        try:
            with safe_open(str(path), framework="pt") as stored:
                found = cls(stored.get_tensor(str(given[MARK])), path)
        except (SafetensorError, KeyError, OSError) as error:
            raise refusal(InterventionError, f"tensor {given[MARK]!r} of {path.name}", str(error), again) from None
        if found.digest != given.get("sha256"):
            raise refusal(
                InterventionError,
                f"tensor {given[MARK]!r} of {path.name}",
                "it is not the tensor that the specification was made with",
                again,
            )
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Values({list(self.tensor.shape)}, {str(self.tensor.dtype).removeprefix('torch.')}, {self.digest[:8]})"


def write_values(path: Path, values: dict[str, Values]) -> None:
    """Writes tensors to one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: value.tensor for key, value in values.items()}, str(partial))
    partial.replace(path)


__all__ = ["MARK", "Values", "write_values"]
