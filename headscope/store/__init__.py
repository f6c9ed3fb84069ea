"""Run directories: written whole or not at all, read lazily, never trusted without a check."""

from headscope.store.content import MapInfo, RunContent, Tokens
from headscope.store.listing import RunEntry, list_runs
from headscope.store.read import Run, open_run
from headscope.store.schema import SCHEMA_VERSION
from headscope.store.write import write_run

__all__ = ["SCHEMA_VERSION", "MapInfo", "Run", "RunContent", "RunEntry", "Tokens", "list_runs", "open_run", "write_run"]
