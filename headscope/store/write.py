"""Writing a run directory, whole at once or a layer at a time.

The card is written last and lists every other file with its size and checksum, so a directory without a card is not a run, and a file that
was cut short by a full disk or a broken copy is noticed before a number is read from it.

`RunWriter` takes one layer after another, in any order, and holds none of them: the maps and statistics of 1,024 heads of 131,072 tokens
are 14 GiB, and q and k of all of them 40, which no caller should have to hold together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import RunError, refusal
from headscope.store import files
from headscope.store.atomic import atomic_directory
from headscope.store.kept import KeptLayer, kept_group, write_kept
from headscope.store.pictures import PictureReader, Pictures, write_pictures
from headscope.store.pyramid import MapWriter
from headscope.store.schema import CARD, HEADS, KEPT, MAPS, SCHEMA_VERSION, STATISTICS, TABLES, TOKENS

if TYPE_CHECKING:
    import pandas as pd

    from headscope.store.content import MapInfo, RunContent, Tokens
    from headscope.store.read import Run


@dataclass(frozen=True, slots=True)
class RunLayout:
    """What a run will hold, known before its first layer is.

    `layers`: numbers of the main stack; `heads`: the most that a layer has. `statistics`: name -> dtype; each array is [L, H, tokens].
    """

    layers: tuple[int, ...]
    heads: int
    tokens: int
    statistics: dict[str, np.dtype[Any]] = field(default_factory=dict)
    maps: MapInfo | None = None
    kept: tuple[int, ...] = ()


class RunWriter:
    """Fills a run directory: `layer` for each layer, then `finish`."""

    def __init__(self, folder: Path, layout: RunLayout, path: Path | None = None) -> None:
        """`folder`: an empty one to fill. `path`: what it is going to be, for messages."""
        self.folder = folder
        self.path = path or folder
        self.layout = layout
        self.finished = False
        self._written: set[int] = set()
        shape = (len(layout.layers), layout.heads, layout.tokens)
        shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {name: (kind, shape) for name, kind in layout.statistics.items()}
        self._statistics = files.StatisticsWriter(folder / STATISTICS, shapes) if shapes else None
        info = layout.maps
        self._maps = None if info is None else MapWriter(folder / MAPS, info, len(layout.layers), layout.heads)
        self._kept = kept_group(folder / KEPT) if layout.kept else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="headscope-write")
        self._busy: Future[None] | None = None

    def layer(
        self, layer: int, statistics: dict[str, np.ndarray], finest: dict[str, np.ndarray], kept: KeptLayer | None = None
    ) -> dict[str, np.ndarray]:
        """Writes one layer: statistics [h, N], level 0 of each plane [h, n, n], q and k where the layout names the layer.

        A layer with fewer heads than the widest is filled up with NaN (integers: -1). Returns the statistics as views of the file, which
        take no memory. Maps, q and k are compressed and written by a thread while the caller goes on; one layer waits at most, and what
        went wrong with it is raised by the next call. RunError for a layer that the layout does not have, or that was written before.
        """
        with self._writing():
            return self._layer(layer, statistics, finest, kept)

    def _layer(
        self, layer: int, statistics: dict[str, np.ndarray], finest: dict[str, np.ndarray], kept: KeptLayer | None
    ) -> dict[str, np.ndarray]:
        layout = self.layout
        if layer not in layout.layers or layer in self._written:
            why = "it was written before" if layer in self._written else f"the run has the layers {list(layout.layers)}"
            raise refusal(RunError, f"layer {layer}", why, "write each layer once")
        index = layout.layers.index(layer)
        views = {}
        if self._statistics is not None:
            for name, kind in layout.statistics.items():
                values = _filled(statistics[name], layout.heads, kind)
                self._statistics.write(name, index, values)
                views[name] = self._statistics.mapped(name, index)[: statistics[name].shape[0]]
        if layer in layout.kept and kept is None:
            raise refusal(RunError, f"q and k of layer {layer}", "they are to be kept and were not given", "capture with keep=")
        self._wait()
        self._busy = self._pool.submit(self._large, layer, finest, kept if layer in layout.kept else None)
        self._written.add(layer)
        return views

    def _large(self, layer: int, finest: dict[str, np.ndarray], kept: KeptLayer | None) -> None:
        if self._maps is not None:
            for plane in self._maps.info.planes:
                values = _filled(finest[plane], self.layout.heads, np.dtype(np.float32))
                self._maps.write(self.layout.layers.index(layer), plane, values)
        if kept is not None:
            write_kept(self._kept, layer, kept)

    def _wait(self) -> None:
        """Until the layer before is on its way to the disk; raises what went wrong with it."""
        busy, self._busy = self._busy, None
        if busy is not None:
            busy.result()

    def finish(
        self,
        card: dict[str, Any],
        heads: pd.DataFrame,
        tokens: Tokens | None = None,
        tables: dict[str, pd.DataFrame] | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        """Writes what is about all layers, and the card last. RunError when a layer is missing."""
        missing = [layer for layer in self.layout.layers if layer not in self._written]
        if missing and (self._statistics or self._maps or self._kept is not None):
            raise refusal(RunError, f"layers {missing}", "they were never written", "write every layer before finish()")
        with self._writing():
            self._wait()
            if self._statistics is not None:
                self._statistics.close()
            if self._maps is not None:
                self._maps.close()
            sums = None if self._statistics is None else self._statistics.sums
            seal(self.folder, card, heads, tokens, tables, sums, pictures)
        self.finished = True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What a full disk says, in one line; an OSError from anywhere else in a long measurement is not taken for one of writing."""
        try:
            yield
        except OSError as error:
            why = f"it could not be written ({error.strerror or error})"
            raise refusal(RunError, str(self.path), why, "nothing was kept; free space or choose another path") from error

    def close(self) -> None:
        """Lets go of open files and of the thread."""
        self._pool.shutdown()
        if self._statistics is not None:
            self._statistics.close()


@contextmanager
def run_writer(path: str | Path, layout: RunLayout, *, overwrite: bool = False) -> Iterator[RunWriter]:
    """A RunWriter on a directory that becomes `path` when the block ends, if `finish` was called in it; else nothing is left behind.

    RunError when the path exists and `overwrite` is false, when it cannot be written, or when the block ends unfinished.
    """
    target = Path(path).absolute()
    elsewhere: OSError | None = None
    try:
        with atomic_directory(target, overwrite=overwrite) as folder:
            writer = RunWriter(folder, layout, target)
            try:
                yield writer
            except OSError as error:
                elsewhere = error
                raise _Elsewhere from error
            finally:
                writer.close()
            if not writer.finished:
                raise refusal(RunError, str(path), "its card was never written", "call finish() before the block ends")
    except _Elsewhere:
        assert elsewhere is not None
        raise elsewhere from elsewhere.__cause__


class _Elsewhere(Exception):
    """An OSError of the block's own, on its way past the directory that is being written."""


def write_run(
    path: str | Path,
    card: dict[str, Any],
    heads: pd.DataFrame,
    content: RunContent | Run | None = None,
    *,
    tables: dict[str, pd.DataFrame] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a run directory and returns its absolute path.

    `card`: the run card as plain data (`files` and `schema_version` are filled in here). `heads`: one row per head. `content`: in memory,
    or another run, which is copied a layer at a time. `tables`: further tables by name. RunError when the path exists and `overwrite` is
    false, or cannot be written; then nothing is left behind.
    """
    target = Path(path).absolute()
    with atomic_directory(target, overwrite=overwrite) as folder:
        if content is not None:
            writer = RunWriter(folder, layout_of(content), target)
            try:
                _copy_layers(writer, content)
                given = content.pictures
                pictures = given.load() if isinstance(given, PictureReader) else given
                writer.finish(card, heads, content.tokens, tables, pictures)
            finally:
                writer.close()
        else:
            seal(folder, card, heads, None, tables, None)
    return target


def layout_of(content: RunContent | Run) -> RunLayout:
    """The layout of what is there already."""
    names = content.statistics
    first = content.layers[0] if content.layers else None
    kinds, tokens = {}, 0
    for name in names:
        one = content.statistic(name, first, 0)
        kinds[name], tokens = one.dtype, one.shape[-1]
    return RunLayout(content.layers, content.heads_per_layer, tokens, kinds, content.maps, content.kept_layers)


def _copy_layers(writer: RunWriter, content: RunContent | Run) -> None:
    layout = writer.layout
    planes = layout.maps.planes if layout.maps is not None else ()
    for layer in layout.layers:
        writer.layer(
            layer,
            {name: content.statistic(name, layer) for name in layout.statistics},
            {plane: content.finest(plane, layer) for plane in planes},
            content.kept_layer(layer) if layer in layout.kept else None,
        )


def seal(
    folder: Path,
    card: dict[str, Any],
    heads: pd.DataFrame,
    tokens: Tokens | None,
    tables: dict[str, pd.DataFrame] | None,
    sums: dict[str, list[str]] | None,
    pictures: Pictures | None = None,
) -> None:
    """The tables, the text, and last the card with every file's size and checksum; `sums`: those of the statistics' layers."""
    files.write_heads(folder / HEADS, heads)
    for name, table in (tables or {}).items():
        files.write_table(folder / TABLES, name, table)
    if tokens is not None:
        files.write_tokens(folder / TOKENS, tokens)
    if pictures is not None:
        write_pictures(folder, pictures)
    entries = [entry for entry in sorted(folder.rglob("*")) if entry.is_file()]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(files.sha256_of, entries))
    listed: dict[str, dict[str, Any]] = {
        entry.relative_to(folder).as_posix(): {"sha256": found, "bytes": entry.stat().st_size}
        for entry, found in zip(entries, digests, strict=True)
    }
    if sums is not None:
        listed[STATISTICS]["layers"] = sums
    whole = {**card, "schema_version": SCHEMA_VERSION, "files": listed}
    (folder / CARD).write_text(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _filled(values: np.ndarray, heads: int, kind: np.dtype[Any]) -> np.ndarray:
    """[heads, ...] of a dtype: missing heads are NaN, or -1."""
    values = np.asarray(values).astype(kind, copy=False)
    if values.shape[0] == heads:
        return values
    fill = np.nan if np.issubdtype(kind, np.floating) else -1
    return np.concatenate([values, np.full((heads - values.shape[0], *values.shape[1:]), fill, dtype=kind)])
