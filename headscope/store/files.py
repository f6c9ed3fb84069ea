"""The files of a run other than its maps: how each is written and read back.

Readers turn whatever another library says about a broken file into one RunError that names the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store.content import Tokens
from headscope.store.pyramid import one_line
from headscope.store.schema import SCHEMA_VERSION, check_version

if TYPE_CHECKING:
    import pandas as pd

T_ = TypeVar("T_")
INTEGERS = ("layer", "head", "kv_head")
STRINGS = ("module", "kind")


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def write_statistics(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """statistics.safetensors. One metadata key only: with several their order, and so the checksum, would change from run to run."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    try:
        save_file(contiguous, str(path), metadata={"schema_version": str(SCHEMA_VERSION)})
    except SafetensorError as error:  # its own error class for a disk that is full
        raise OSError(one_line(error)) from error


class StatisticsReader:
    """Reads slices of statistics.safetensors; nothing but the header is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
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
        """A slice of one array."""
        return readable(self.path, lambda: np.asarray(self._file.get_slice(name)[index]), self._errors)


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
