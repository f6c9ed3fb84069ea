"""The files of a run other than its maps: how each is written and read back.

Readers turn whatever another library says about a broken file into one RunError that names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store.content import Tokens
from headscope.store.schema import SCHEMA_VERSION, check_version, one_line

if TYPE_CHECKING:
    import pandas as pd

T_ = TypeVar("T_")
CODES = {"float32": "F32", "int32": "I32", "float64": "F64", "int64": "I64"}
"""numpy's names of dtypes, as safetensors calls them."""
INTEGERS = ("layer", "head", "kv_head")
STRINGS = ("module", "kind")


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sum_of(values: np.ndarray) -> str:
    """Checksum of an array's bytes, 16 hex digits."""
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=8).hexdigest()


def readable(path: Path, read: Callable[[], T_], errors: tuple[type[BaseException], ...]) -> T_:
    """What `read` gives, or RunError that names the file."""
    try:
        return read()
    except errors as error:
        raise refusal(RunError, str(path), f"it is damaged ({one_line(error)})", "write the run again with `headscope profile`") from error


def canonical_heads(table: pd.DataFrame) -> pd.DataFrame:
    """A heads table with the dtypes that a run directory gives back: int64, object strings, float64 metrics, `roles` lists, `reasons`
    dicts.
    """
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in table.columns:
        values = table[name].tolist()
        if name in INTEGERS:
            columns[name] = np.array(values, dtype=np.int64)
        elif name in STRINGS:
            columns[name] = pd.Series([str(value) for value in values], dtype=object)
        elif name == "roles":
            columns[name] = pd.Series([list(value) for value in values], dtype=object)
        elif name == "reasons":
            columns[name] = pd.Series([dict(value) for value in values], dtype=object)
        else:
            columns[name] = np.array(values, dtype=np.float64)
    return pd.DataFrame(columns)


def write_heads(path: Path, table: pd.DataFrame) -> None:
    """heads.parquet, with schema_version in the file's metadata and `reasons` as JSON strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields, arrays = [], []
    for name in table.columns:
        values = table[name].tolist()
        if name in INTEGERS:
            kind = pa.int64()
        elif name in STRINGS:
            kind = pa.string()
        elif name == "roles":
            kind = pa.list_(pa.string())
        elif name == "reasons":
            kind, values = pa.string(), [json.dumps(value, ensure_ascii=False) for value in values]
        else:
            kind = pa.float64()
        fields.append(pa.field(name, kind))
        arrays.append(pa.array(values, type=kind, from_pandas=False))
    schema = pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def read_heads(path: Path) -> pd.DataFrame:
    """The table as `canonical_heads` has it."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> pd.DataFrame:
        stored = pq.read_table(path)
        check_version(int((stored.schema.metadata or {}).get(b"schema_version", b"0")), path)
        columns = {name: stored.column(name).to_pylist() for name in stored.column_names}
        columns["reasons"] = [json.loads(value) for value in columns["reasons"]]
        metrics = set(columns) - {*INTEGERS, *STRINGS, "roles", "reasons"}
        for name in metrics:
            columns[name] = [float("nan") if value is None else value for value in columns[name]]
        table = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
        return canonical_heads(table)

    return readable(path, read, (OSError, ValueError, KeyError, TypeError, pa.ArrowException))


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """tables/<name>.parquet; RunError for a name that is no file's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}", name):
        raise refusal(RunError, f"table {name!r}", "it names a file", "use letters, digits, '.', '_' and '-'")
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), folder / f"{name}.parquet")


def read_table(path: Path) -> pd.DataFrame:
    """A further table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return readable(path, lambda: pq.read_table(path).to_pandas(), (OSError, ValueError, KeyError, TypeError, pa.ArrowException))


class StatisticsWriter:
    """statistics.safetensors, filled a layer at a time.

    The library that reads this format writes a file from arrays that are all in memory, which for 1,024 heads of 131,072 tokens are 6 GiB.
    The format is a header (its length, 8 bytes; JSON with each array's dtype, shape and place) and the arrays one after another, so it can
    be written in any order once the shapes are known. One metadata key only, and names in order: the same arrays give the same file.

    `sums`: name -> a checksum per layer, so that a reader need not check gigabytes before it shows one head.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> None:
        """`shapes`: name -> dtype (float32 or int32) and [L, H, N]."""
        self.path = path
        self._shapes = shapes
        self.sums: dict[str, list[str]] = {name: [""] * shape[0] for name, (_, shape) in sorted(shapes.items())}
        self._places: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"schema_version": str(SCHEMA_VERSION)}}
        end = 0
        for name in sorted(shapes):
            kind, shape = shapes[name]
            size = int(np.prod(shape)) * kind.itemsize
            header[name] = {"dtype": CODES[kind.name], "shape": list(shape), "data_offsets": [end, end + size]}
            self._places[name] = end
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._base + end)

    def write(self, name: str, index: int, values: np.ndarray) -> None:
        """The layer at `index` of one array: [H, N]."""
        kind, shape = self._shapes[name]
        if values.shape != shape[1:]:
            raise ValueError(f"{name}: {values.shape} is not {shape[1:]}")
        self._file.seek(self._base + self._places[name] + index * int(np.prod(shape[1:])) * kind.itemsize)
        values = np.ascontiguousarray(values, dtype=kind)
        self._file.write(values.data)
        self.sums[name][index] = sum_of(values)

    def mapped(self, name: str, index: int) -> np.ndarray:
        """What was written as a view of the file, [H, N]; it takes no memory of its own, and changing it does not change the file."""
        kind, shape = self._shapes[name]
        self._file.flush()
        place = self._base + self._places[name] + index * int(np.prod(shape[1:])) * kind.itemsize
        return np.memmap(self.path, dtype=kind, mode="c", offset=place, shape=shape[1:])

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


class StatisticsReader:
    """Reads slices of statistics.safetensors; nothing but the header is read before it is asked for."""

    def __init__(self, path: Path, sums: Any = None) -> None:
        """`sums`: what StatisticsWriter noted; None for a file whose own checksum was checked."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        self._sums: dict[str, list[str]] | None = sums if isinstance(sums, dict) else None
        self._checked: set[tuple[str, int]] = set()
        self._errors = (OSError, ValueError, KeyError, SafetensorError)
        self._file: Any = readable(path, lambda: safe_open(str(path), framework="numpy"), self._errors)
        metadata = self._file.metadata() or {}
        version = metadata.get("schema_version", "")
        check_version(int(version) if version.isdigit() else version, path)
        self.names = sorted(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """[L, H, N]."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """A slice of one array; RunError where a layer that it touches is not what was written."""
        if self._sums is not None:
            for layer in range(*index[0].indices(self.shape(name)[0])) if isinstance(index[0], slice) else (index[0],):
                self._check(name, layer)
        return readable(self.path, lambda: np.asarray(self._file.get_slice(name)[index]), self._errors)

    def _check(self, name: str, layer: int) -> None:
        if (name, layer) in self._checked:
            return
        whole = readable(self.path, lambda: np.asarray(self._file.get_slice(name)[layer]), self._errors)
        listed = (self._sums or {}).get(name, ())
        if not isinstance(listed, list) or layer >= len(listed) or sum_of(whole) != listed[layer]:
            why = f"its content is not what was written (wrong checksum of {name}, layer {layer})"
            raise refusal(RunError, str(self.path), why, "copy the run again, or write it again")
        self._checked.add((name, layer))


def write_tokens(path: Path, tokens: Tokens) -> None:
    """tokens.json."""
    value = {"schema_version": SCHEMA_VERSION, "text": tokens.text, "ids": list(tokens.ids), "strings": list(tokens.strings)}
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokens(path: Path) -> Tokens:
    """The shown text."""

    def read() -> Tokens:
        value = json.loads(path.read_text(encoding="utf-8"))
        check_version(value["schema_version"], path)
        tokens = Tokens(str(value["text"]), tuple(int(number) for number in value["ids"]), tuple(str(piece) for piece in value["strings"]))
        if len(tokens.ids) != len(tokens.strings):
            raise ValueError(f"{len(tokens.ids)} ids and {len(tokens.strings)} strings")
        return tokens

    return readable(path, read, (OSError, ValueError, KeyError, TypeError))
