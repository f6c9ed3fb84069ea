"""The weights of an ONNX file, by name: a reader of exactly that, since nothing else of the format is needed.

An ONNX file is one protocol-buffer message. The five fields read here have kept their numbers since ONNX 1.0 (onnx.proto: ModelProto.graph
7; GraphProto.node 1, initializer 5; NodeProto.input 1, name 3; TensorProto.dims 1, data_type 2, name 8, raw_data 9), and the wire format is
public (protobuf.dev/programming-guides/encoding). Exporters fold transposed matrices into constants with made-up names; which node uses a
constant says what it is, so the nodes' names and inputs are read too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.errors import ModelError, refusal

if TYPE_CHECKING:
    import torch

FLOAT = 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class OnnxWeights:
    """tensors: float32 initializers by name; inputs: the names of what each named node reads, in its order."""

    tensors: dict[str, torch.Tensor]
    inputs: dict[str, tuple[str, ...]]


def read(path: Path) -> OnnxWeights:
    """Every float32 initializer of an ONNX file and the inputs of its nodes; ModelError for a file that is cut or no ONNX."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    try:
        whole = memoryview(path.read_bytes())
        (graph,) = (_message(value) for number, value in _fields(whole) if number == 7)
        for number, value in _fields(graph):
            if number == 1:
                names = [(part, bytes(_message(text)).decode()) for part, text in _fields(_message(value)) if part in (1, 3)]
                inputs["".join(text for part, text in names if part == 3)] = tuple(text for part, text in names if part == 1)
            elif number == 5:
                name, shape, kind, raw = _tensor(_message(value))
                if kind != FLOAT:
                    continue
                if len(raw) != 4 * math.prod(shape):
                    raise ValueError(f"{name} has {len(raw)} bytes for shape {shape}")
                tensors[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)
    except OSError as error:
        raise refusal(ModelError, f"ONNX file {path}", error.strerror or str(error), "fetch it again") from error
    except (ValueError, IndexError, TypeError) as error:
        raise refusal(ModelError, f"ONNX file {path}", f"it cannot be read ({error})", "fetch it again") from error
    return OnnxWeights(tensors, inputs)


def _tensor(message: memoryview) -> tuple[str, list[int], int, memoryview]:
    """(name, shape, data type, raw bytes) of a TensorProto."""
    name, shape, kind, raw = "", list[int](), 0, memoryview(b"")
    for number, value in _fields(message):
        if number == 1:  # repeated int64: one by one, or packed
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = bytes(_message(value)).decode()
        elif number == 9:
            raw = _message(value)
    return name, shape, kind, raw


def _message(value: int | memoryview) -> memoryview:
    """The bytes of a field that must have some."""
    if isinstance(value, int):
        raise ValueError(f"the number {value} where a message is expected")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: an int, or the bytes of a string or of a message inside."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == BYTES:
            size, place = _varint(message, place)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + size > len(message):
            raise ValueError(f"it ends {place + size - len(message)} bytes too early")
        yield number, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """(value, where the next byte is): seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _varints(message: memoryview) -> Iterator[int]:
    place = 0
    while place < len(message):
        value, place = _varint(message, place)
        yield value
