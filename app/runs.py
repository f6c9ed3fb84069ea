"""The runs that the dashboard may show, and what it reads from each: the only file here that touches run directories.

An id in an address is a key of the listing, never a piece of a path: the runs directory is listed, each entry is resolved and must
still lie inside it (a link that leads out is not listed), and a request can only name what the listing holds. Files are opened when
a page first needs them; tensors and maps are read one head at a time, so a run of any size opens at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from headscope.app.plan_files import PlanFiles
from headscope.errors import RunError, refusal
from headscope.store import KeptLayer, MapInfo, open_run
from headscope.store.read import read_card

if TYPE_CHECKING:
    from headscope.profile import HeadProfile
    from headscope.store.pictures import PictureReader

RUN_FILES = ("card.json", "heads.parquet")
KEPT_OPEN = 8
_NOT_METRICS = ("layer", "head", "kv_head", "module", "kind", "roles", "reasons")


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a map pyramid: `cells` blocks a side, each of `block` x `block` tokens."""

    index: int
    block: int
    cells: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed run: its card, or the message of the error that kept it from being read."""

    id: str
    card: dict[str, Any] | None
    error: str = ""


class Run:
    """One run, as the pages need it."""

    def __init__(self, run: str, path: Path) -> None:
        self.id = run
        self.path = path
        self._store = open_run(path)
        self.card = read_card(path)
        self.table = self._store.heads
        self.metrics = [name for name in self.table.columns if name not in _NOT_METRICS and pd.api.types.is_numeric_dtype(self.table[name])]
        if not self.metrics:
            raise refusal(RunError, f"run {run}", "its table of heads has no metric", "profile the model with at least one probe")
        self.layers = list(self._store.layers)
        self.heads = self._store.heads_per_layer
        self.reasons = _reasons(self.table)
        self._place = {layer: index for index, layer in enumerate(self.layers)}
        self._grids: dict[str, np.ndarray] = {}
        self.partners: dict[str, str] = {}
        """Metric -> the one shown against it at first, once somebody has asked."""
        self.path = path
        card = path / "card.json"
        self.version = f"{card.stat().st_mtime_ns:x}"
        """Changes when the run is written again: part of every tile's address."""

    def profile(self) -> HeadProfile:
        """The run as a HeadProfile, for what needs one (choosing heads, planning, exporting)."""
        from headscope.profile import HeadProfile

        return HeadProfile(self.table, self._store.card, self._store, self.path, tables=self._store.tables)

    def has(self, layer: int, head: int) -> bool:
        """True when the run measured this head."""
        return (layer, head) in self.reasons

    def grid(self, metric: str) -> np.ndarray:
        """A metric as [layers, heads] float64, NaN where a layer has fewer heads; read-only."""
        known = self._grids.get(metric)
        if known is not None:
            return known
        out = np.full((len(self.layers), self.heads), np.nan)
        out[self.table["layer"].map(self._place).to_numpy(), self.table["head"].to_numpy()] = self.table[metric].to_numpy(dtype=np.float64)
        out.flags.writeable = False
        self._grids[metric] = out
        return out

    @cached_property
    def roles(self) -> dict[str, list[tuple[int, int]]]:
        """Role -> its heads, strongest first; roles in the order of their rules, without those that no head has."""
        from headscope.profile.roles import BY_NAME

        given = list(dict.fromkeys(role for why in self.reasons.values() for role in why))
        names = [name for name in BY_NAME if name in given] + [name for name in given if name not in BY_NAME]
        keys = list(zip(self.table["layer"].tolist(), self.table["head"].tolist(), strict=True))
        out = {}
        for name in names:
            rule = BY_NAME.get(name)
            known = rule is not None and set(rule.metrics) <= set(self.metrics)
            strength = rule.strength(self.table) if rule is not None and known else np.zeros(len(keys))
            out[name] = [keys[row] for row in np.argsort(-strength, kind="stable") if name in self.reasons[keys[row]]]
        return out

    def role_index(self, role: str) -> int:
        """A number per role that is the same in every run: the place of its symbol and colour."""
        from headscope.profile.roles import BY_NAME

        names = list(BY_NAME)
        return names.index(role) if role in BY_NAME else len(names) + list(self.roles).index(role)

    def rule(self, role: str) -> str:
        """A role's threshold in words and where it comes from; empty for a role that has no rule here."""
        from headscope.profile.roles import BY_NAME

        found = BY_NAME.get(role)
        return f"{found.rule} ({found.source})" if found else ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The shown text, one decoded piece a token; empty when the run keeps none."""
        kept = self._store.tokens
        return () if kept is None else kept.strings

    def statistics(self, kind: str) -> list[str]:
        """Names of the per-token statistics of the shown text: kind is 'row' or 'column'."""
        return [name.split("/", 1)[1] for name in self._store.statistics if name.startswith(kind + "/")]

    def series(self, kind: str, name: str, layer: int, head: int) -> np.ndarray:
        """One head's row or column statistic [N] over the shown text."""
        return self._store.statistic(f"{kind}/{name}", layer, head)

    @property
    def maps(self) -> MapInfo | None:
        """What the block maps are; None when the run has none."""
        return self._store.maps

    @property
    def levels(self) -> list[Level]:
        """The pyramid's levels, finest first; empty when the run has no maps."""
        info = self.maps
        return [] if info is None else [Level(index, info.block << index, cells) for index, cells in enumerate(info.sizes)]

    def map(self, plane: str, level: int, layer: int, head: int) -> np.ndarray:
        """One head's map at a level [n, n] float32."""
        return self._store.map(plane, layer, head, level)

    def tile(self, plane: str, level: int, layer: int, head: int, i: int, j: int) -> np.ndarray:
        """One tile of a head's map, sums or maxima of its blocks: [rows, columns] float32."""
        return self._store.tile(plane, level, layer, head, i, j)

    @property
    def pictures(self) -> PictureReader | None:
        """Attention over a picture by frame; None when the run has none."""
        return self._store.pictures

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers whose q and k are there, so that exact cells can be recomputed."""
        return self._store.kept_layers

    def kept_layer(self, layer: int) -> KeptLayer:
        """q, k and lse of a layer, read when they are sliced. RunError when they were not kept."""
        return self._store.kept_layer(layer)


class RunIndex:
    """The runs under one directory, or one run. Listing is redone for every request of the list; opened runs are kept until they change."""

    def __init__(self, root: str | Path) -> None:
        given = Path(root)
        if not given.is_dir():
            raise refusal(RunError, str(given), "there is no such directory", "make a run with `headscope profile MODEL --out runs/NAME`")
        self.root = given.resolve()
        self.single = self.root.name if _looks_like_run(self.root) else None
        self.plans = PlanFiles(self.root)
        self._open: dict[str, tuple[int, Run]] = {}
        self._lock = threading.Lock()

    def paths(self) -> dict[str, Path]:
        """Run id -> directory, by name."""
        if self.single is not None:
            return {self.single: self.root}
        found = {}
        for child in sorted(self.root.iterdir()):
            path = child.resolve()
            if path.is_dir() and path.is_relative_to(self.root) and not child.name.startswith(".") and _looks_like_run(path):
                found[child.name] = path
        return found

    def entries(self) -> list[Entry]:
        """Every run with its card or what is wrong with it, newest first, damaged ones last."""
        found = []
        for run, path in self.paths().items():
            try:
                open_run(path)  # checks that no file is missing or cut short
                found.append(Entry(run, read_card(path)))
            except RunError as error:
                found.append(Entry(run, None, str(error)))
        return sorted(found, key=lambda entry: (entry.card is not None, str((entry.card or {}).get("created", ""))), reverse=True)

    def open(self, run: str) -> Run:
        """The run of an id; RunError when it is not listed or cannot be read."""
        path = self.paths().get(run) if isinstance(run, str) else None  # a repeated query key arrives as a list
        if path is None:
            why = f"it is not among the runs in {self.root.name}/"
            raise refusal(RunError, f"run {str(run)[:80]!r}", why, "pick one from the list of runs")
        card = path / "card.json"
        stamp = card.stat().st_mtime_ns if card.is_file() else 0
        with self._lock:
            known = self._open.get(run)
            if known is None or known[0] != stamp:
                self._open[run] = known = (stamp, Run(run, path))
                while len(self._open) > KEPT_OPEN:
                    self._open.pop(next(iter(self._open)))
            return known[1]


def _looks_like_run(path: Path) -> bool:
    return any((path / name).exists() for name in RUN_FILES)


def _reasons(table: pd.DataFrame) -> dict[tuple[int, int], dict[str, str]]:
    out = {}
    for layer, head, roles, why in zip(table["layer"], table["head"], table["roles"], table["reasons"], strict=True):
        out[int(layer), int(head)] = {str(role): str(why.get(role, "")) for role in roles}
    return out
