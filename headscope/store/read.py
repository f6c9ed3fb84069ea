"""Reading a run directory: what is asked for, when it is asked for, after a check of the file it comes from."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import RunError, refusal, unknown_name
from headscope.store import files
from headscope.store.atomic import restore_interrupted
from headscope.store.content import MapInfo, Tokens, check_head, layer_index, map_place, not_kept, slice_of, tile_span
from headscope.store.kept import KeptLayer, KeptReader
from headscope.store.pictures import PictureReader
from headscope.store.pyramid import MapReader
from headscope.store.schema import CARD, HEADS, KEPT, MAPS, PICTURES, STATISTICS, TABLES, TOKENS, check_version

if TYPE_CHECKING:
    import pandas as pd

    from headscope.profile.card import RunCard


def open_run(path: str | Path) -> Run:
    """Opens a run directory. RunError when it is missing, no run, newer than this code, or has a file missing or of the wrong size.

    Sizes are checked here; the checksum of a file, or of the tiles and pieces of q and k that are read, when it is (`Run.verify` checks
    all). A run that a killed process was replacing is put back first.
    """
    place = Path(path)
    restore_interrupted(place)
    return Run(place)


def read_card(path: Path) -> dict[str, Any]:
    """The card of a run directory as plain data, its version checked."""
    try:
        exists = path.exists()
    except OSError as error:  # a name that no directory can have
        raise refusal(RunError, str(path), error.strerror or str(error), "pass a directory that `headscope profile --out` wrote") from error
    if not exists:
        raise refusal(RunError, str(path), "there is no such directory", "pass a directory that `headscope profile --out` wrote")
    if not path.is_dir():
        raise refusal(RunError, str(path), "it is a file", "pass the run directory")
    place = path / CARD
    if not place.is_file():
        raise refusal(
            RunError, str(path), f"it is not a run directory (no {CARD} in it)", "pass a directory that `headscope profile --out` wrote"
        )
    value = files.readable(place, lambda: json.loads(place.read_text(encoding="utf-8")), (OSError, ValueError, RecursionError))
    if not isinstance(value, dict):
        raise refusal(RunError, str(place), "it is not a run card", "write the run again with `headscope profile`")
    check_version(value.get("schema_version"), place)
    return value


class Run:
    """A run directory on disk. Attributes are read when they are first used."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._card = read_card(self.path)
        listed = self._card.get("files")
        if not isinstance(listed, dict) or HEADS not in listed:
            raise refusal(RunError, str(self.path / CARD), "it lists no files", "write the run again with `headscope profile`")
        self._files: dict[str, dict[str, Any]] = listed
        self._checked: set[str] = set()
        for name in listed:
            self._check_size(name)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @cached_property
    def card(self) -> RunCard:
        """The run card."""
        from headscope.profile.card import RunCard

        return files.readable(self.path / CARD, lambda: RunCard.from_dict(self._card), (TypeError, KeyError, ValueError))

    @cached_property
    def heads(self) -> pd.DataFrame:
        """One row per head: layer, head, kv_head, module, kind, the metrics, `roles` (list), `reasons` (dict role -> why)."""
        self._check_sum(HEADS)
        return files.read_heads(self.path / HEADS)

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """What active probes found that is no number per head, by "probe.name"."""
        names = [name for name in self._files if name.startswith(f"{TABLES}/") and name.endswith(".parquet")]
        for name in names:
            self._check_sum(name)
        return {Path(name).stem: files.read_table(self.path / name) for name in names}

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layer numbers, ascending: the first axis of statistics and maps."""
        return tuple(sorted({int(layer) for layer in self.heads["layer"]}))

    @property
    def heads_per_layer(self) -> int:
        """The largest number of heads in a layer: the second axis."""
        return int(self.heads["head"].max()) + 1

    @cached_property
    def tokens(self) -> Tokens | None:
        """The shown text, None when the run keeps none."""
        if TOKENS not in self._files:
            return None
        self._check_sum(TOKENS)
        return files.read_tokens(self.path / TOKENS)

    @cached_property
    def _statistics(self) -> files.StatisticsReader | None:
        if STATISTICS not in self._files:
            return None
        sums = self._files[STATISTICS].get("layers")
        if sums is None:  # a run of before; a large one takes a while
            self._check_sum(STATISTICS)
        return files.StatisticsReader(self.path / STATISTICS, sums)

    @property
    def statistics(self) -> list[str]:
        """Names of the per-token statistics: "row/<name>", "column/<name>"."""
        return [] if self._statistics is None else list(self._statistics.names)

    def statistic(self, name: str, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """[L, H, N], or [H, N] of a layer, or [N] of a head; only that part is read. RunError for a name, layer or head that the run
        lacks.
        """
        reader = self._statistics
        if reader is not None:
            self._check_size(STATISTICS)
        if reader is None:
            raise refusal(RunError, f"statistic {name!r} of {self.path}", "this run keeps none", "profile again with keep_statistics=True")
        if name not in reader.names:
            raise unknown_name(RunError, "statistic", name, reader.names)
        return reader.read(name, slice_of(self.layers, reader.shape(name), layer, head))

    @cached_property
    def _maps(self) -> MapReader | None:
        return MapReader(self.path / MAPS) if self._checked_group(MAPS) else None

    @property
    def maps(self) -> MapInfo | None:
        """What the block maps are, None when the run has none."""
        return None if self._maps is None else self._maps.info

    def map(self, plane: str, layer: int, head: int, level: int = 0) -> np.ndarray:
        """[n, n] float32: one head's block map at a level of its pyramid. RunError for a plane, level, layer or head that the run lacks."""
        return self._read_map(plane, level, layer, head)

    def tile(self, plane: str, level: int, layer: int, head: int, i: int, j: int) -> np.ndarray:
        """One tile of a head's map, tile row `i` from the top and column `j`: [rows, columns] float32, TILE a side except at the edges.

        Reads and checks that tile alone; above a causal diagonal there is nothing to read and it is zeros. RunError for what the run lacks.
        """
        map_place(self.maps, self.layers, plane, layer, level)
        return self._read_map(plane, level, layer, head, *tile_span(self.maps, level, i, j))

    def finest(self, plane: str, layer: int) -> np.ndarray:
        """[H, n, n] float32: level 0 of a layer's heads."""
        return self._read_map(plane, 0, layer, slice(None))

    def _read_map(self, plane: str, level: int, layer: int, head: int | slice, *cells: slice) -> np.ndarray:
        index = map_place(self.maps, self.layers, plane, layer, level)
        reader = self._maps
        if reader is None:
            raise refusal(RunError, "block maps", "this run was made without them", "profile again with maps=True")
        if not isinstance(head, slice):
            check_head(head, reader.heads(plane, level))
        name = f"{MAPS}/{reader.file(plane, index, level)}"
        if name in self._files:  # a file of nothing but zeros is not written
            self._check_size(name)
            if not reader.checks_itself:
                self._check_sum(name)
        return reader.read(plane, level, index, head, *cells)

    @cached_property
    def _kept(self) -> KeptReader | None:
        return KeptReader(self.path / KEPT) if self._checked_group(KEPT) else None

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers whose q and k are there, so that `window` can recompute them."""
        return () if self._kept is None else self._kept.layers

    def kept_layer(self, layer: int) -> KeptLayer:
        """q, k, lse and the facts of a layer's attention call, read when they are sliced. RunError when they were not kept."""
        reader = self._kept
        if reader is None or layer not in reader.layers:
            layer_index(self.layers, layer)
            raise not_kept(layer, self.kept_layers)
        return reader.layer(layer)

    def window(self, layer: int, head: int, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
        """Exact weights of one head, queries q0..q1-1 on keys k0..k1-1: [q1 - q0, k1 - k0] float32, zero where a key is not visible.

        Recomputed from the q, k and lse that `profile(..., keep=...)` kept; only the pieces of the window are read. RunError when they were
        not kept, for a head or position that does not exist, and for a window of more than 2^26 weights.
        """
        kept = self.kept_layer(layer)
        check_head(head, kept.heads)
        for name, at in (("q", head), ("k", head // (kept.heads // kept.kv_heads)), ("lse", head)):
            place = f"{KEPT}/{layer}/{name}/c.{at}.{'0.0' if name != 'lse' else '0'}"
            if place in self._files:
                self._check_size(place)
        assert self._kept is not None
        return self._kept.window(layer, head, q0, q1, k0, k1)

    @cached_property
    def pictures(self) -> PictureReader | None:
        """Attention over a picture by frame, None when the run has none."""
        if PICTURES[0] not in self._files:
            return None
        for name in PICTURES:
            if name not in self._files:
                raise refusal(RunError, str(self.path), f"{name} is missing", "copy the run again, or write it again")
            self._check_sum(name)
        return PictureReader(self.path)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files but the card, as the card lists them."""
        return tuple(self._files)

    def _checked_group(self, folder: str) -> bool:
        """Whether the run has a zarr group, its metadata checked."""
        listed = [name for name in self._files if name.startswith(f"{folder}/")]
        for name in listed:
            if name.endswith("zarr.json"):
                self._check_sum(name)
        return bool(listed)

    def verify(self) -> None:
        """Checks every file's checksum; RunError names the first that is wrong."""
        self._checked.clear()
        for name in self._files:
            self._check_size(name)
            self._check_sum(name)

    def _check_size(self, name: str) -> None:
        place = self._place(name)
        if not place.is_file():
            raise refusal(RunError, str(place), "it is missing", "copy the run again, or write it again with `headscope profile`")
        size, expected = place.stat().st_size, self._files[name].get("bytes")
        if size != expected:
            kind = "it is cut short" if isinstance(expected, int) and size < expected else "it has the wrong size"
            raise refusal(
                RunError,
                str(place),
                f"{kind} ({size} bytes of {expected})",
                "copy the run again, or write it again with `headscope profile`",
            )

    def _check_sum(self, name: str) -> None:
        if name in self._checked:
            return
        place = self._place(name)
        found = files.readable(place, lambda: files.sha256_of(place), (OSError,))
        if found != self._files[name].get("sha256"):
            raise refusal(
                RunError, str(place), "its content is not what was written (wrong checksum)", "copy the run again, or write it again"
            )
        self._checked.add(name)

    def _place(self, name: str) -> Path:
        """The path of a listed file; a card that points out of its directory is refused."""
        if name.startswith("/") or ".." in Path(name).parts or not isinstance(self._files[name], dict):
            raise refusal(RunError, str(self.path / CARD), f"it lists {name!r}", "write the run again with `headscope profile`")
        return self.path / name

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {len(self._files)} files)"
