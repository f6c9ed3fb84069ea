"""What can be loaded by name, without a model hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from headscope.models import cache
from headscope.models.bundled import BUNDLED
from headscope.models.pypi import REGISTRY


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One row of the catalog. `name` is what `hs.load` takes, `size` the bytes on disk once converted."""

    name: str
    kind: str
    size: int
    licence: str
    cached: bool
    description: str

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        state = "cached" if self.cached else "not fetched yet"
        return f"<code>{escape(self.name)}</code>: {escape(self.description)} ({self.size / 1e6:.0f} MB, {escape(self.licence)}, {state})"


def catalog() -> list[ModelSource]:
    """Every packaged and bundled model, in alphabetical order. Looks at sizes only, computes no checksum."""
    packaged = [
        ModelSource(row.spec, "pypi", row.bytes, row.licence, (row.entry / cache.MANIFEST).is_file(), row.description)
        for row in REGISTRY.values()
    ]
    bundled = [ModelSource(row.spec, "bundled", row.bytes, row.licence, True, row.description) for row in BUNDLED.values()]
    return sorted(packaged + bundled, key=lambda row: row.name)


def verify_bundled() -> dict[str, str]:
    """For every bundled model, "ok" or what is wrong with it."""
    verdicts = {row.spec: row.damage() for row in BUNDLED.values()}
    return {name: f"damaged: {reason}; install headscope again" if reason else "ok" for name, reason in verdicts.items()}


def verify_cache() -> dict[str, str]:
    """For every model in the cache, "ok" or what is wrong with it; all checksums are computed anew."""
    found = {row.spec: row.entry for row in REGISTRY.values() if row.entry.exists()}
    verdicts = {name: cache.damage(entry, full=True) for name, entry in found.items()}
    for name in (name for name, reason in verdicts.items() if reason):
        cache.forget(found[name])
    return {name: f"damaged: {reason}; the next load builds it again" if reason else "ok" for name, reason in verdicts.items()}
