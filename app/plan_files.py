"""Plans beside the runs: JSON files in the runs directory or its folder `plans`, named in an address by a key of this listing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.errors import HeadscopeError, RunError, refusal

if TYPE_CHECKING:
    from headscope.app.runs import Run
    from headscope.plans import SparsePlan

FOLDER = "plans"
LARGEST = 32 * 2**20
"""Bytes of a plan file; a larger one is not looked at."""


class PlanFiles:
    """The plans under one directory; a file is read again when it changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, tuple[int, SparsePlan | None]] = {}
        self._lock = threading.Lock()

    def paths(self) -> dict[str, Path]:
        """Plan id -> file, by name."""
        out: dict[str, Path] = {}
        for folder in (self.root, self.root / FOLDER):
            if not folder.is_dir():
                continue
            for child in sorted(folder.glob("*.json")):
                path = child.resolve()
                inside = path.is_file() and path.is_relative_to(self.root) and not child.name.startswith(".")
                if inside and child.name not in ("card.json", "tokens.json", "pictures.json") and path.stat().st_size <= LARGEST:
                    out.setdefault(child.stem, path)
        return out

    def open(self, name: str) -> SparsePlan:
        """The plan of an id; RunError when it is not listed, PlanError when it is no plan."""
        from headscope.plans import SparsePlan

        path = self.paths().get(name)
        if path is None:
            raise refusal(RunError, f"plan {name[:80]!r}", f"it is not among the plans in {self.root.name}/", "save a plan there first")
        plan = self._plan(path)
        return SparsePlan.load(path) if plan is None else plan

    def fitting(self, run: Run) -> dict[str, SparsePlan]:
        """The plans whose model has the layers and heads of a run."""
        out = {}
        for name, path in self.paths().items():
            plan = self._plan(path)
            if plan is not None and set(plan.model.places) == set(run.reasons):
                out[name] = plan
        return out

    def _plan(self, path: Path) -> SparsePlan | None:
        from headscope.plans import SparsePlan

        stamp = path.stat().st_mtime_ns
        with self._lock:
            known = self._read.get(path)
            if known is not None and known[0] == stamp:
                return known[1]
        try:
            plan: SparsePlan | None = SparsePlan.load(path)
        except HeadscopeError:  # some other JSON file; opening it by name says why
            plan = None
        with self._lock:
            self._read[path] = (stamp, plan)
        return plan
