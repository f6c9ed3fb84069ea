"""Documents of a corpus, one after another: never more of it in memory than a batch.

    for name, text in documents("corpus.jsonl"): ...

A .jsonl file has one JSON object a line, a .parquet file one row a document; the text stands under `field`. A .txt file is one document. A
folder is all of these in it, in the order of their names. A row without text is refused with its place, since a corpus that is silently
shorter than its scores would be scored out of step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from headscope.errors import DataError, refusal

KINDS = (".jsonl", ".parquet", ".txt")
BATCH = 256


def documents(path: str | Path, field: str = "text") -> Iterator[tuple[str, str]]:
    """(name, text) of every document; names are "file:row", rows counted from 0. DataError for what cannot be read or holds no text."""
    path = Path(path)
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.suffix in KINDS)
        if not files:
            raise refusal(DataError, str(path), f"no {', '.join(KINDS)} file is in it", "pass a folder with one")
        for file in files:
            yield from documents(file, field)
        return
    if path.suffix not in KINDS:
        raise refusal(DataError, str(path), f"it is none of {', '.join(KINDS)}", "pass one of those, or a folder of them")
    if not path.is_file():
        raise refusal(DataError, str(path), "there is no such file", "pass the path of a corpus")
    rows = {".jsonl": _lines, ".parquet": _rows, ".txt": _whole}[path.suffix](path, field)
    for number, text in rows:
        if not isinstance(text, str) or not text.strip():
            raise refusal(
                DataError, f"{path}, document {number}", f"it has no text under {field!r}", "name the field, or leave the document out"
            )
        yield f"{path.name}:{number}", text


def _lines(path: Path, field: str) -> Iterator[tuple[int, object]]:
    number = -1
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise refusal(DataError, f"{path}, document {number}", f"it is not JSON ({error.msg})", "write one object a line") from None
            yield number, row.get(field) if isinstance(row, dict) else None


def _rows(path: Path, field: str) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise refusal(DataError, str(path), f"it is no parquet file ({str(error).splitlines()[0]})", "pass another") from None
    with file:
        if field not in file.schema_arrow.names:
            raise refusal(DataError, str(path), f"it has no column {field!r}", f"name one of {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(batch_size=BATCH, columns=[field]):
            for value in batch.column(0).to_pylist():
                yield number, value
                number += 1


def _whole(path: Path, field: str) -> Iterator[tuple[int, object]]:
    yield 0, path.read_text(encoding="utf-8")
