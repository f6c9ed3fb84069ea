"""Run directories: written whole or not at all, read lazily, never trusted without a check."""

from headscope.store.content import MapInfo, RunContent, Tokens
from headscope.store.kept import KeptFacts, KeptLayer
from headscope.store.listing import RunEntry, list_runs
from headscope.store.pictures import PictureFacts, Pictures
from headscope.store.read import Run, open_run
from headscope.store.schema import SCHEMA_VERSION
from headscope.store.write import RunLayout, RunWriter, run_writer, write_run

__all__ = [
    "SCHEMA_VERSION",
    "KeptFacts",
    "KeptLayer",
    "MapInfo",
    "PictureFacts",
    "Pictures",
    "Run",
    "RunContent",
    "RunEntry",
    "RunLayout",
    "RunWriter",
    "Tokens",
    "list_runs",
    "open_run",
    "run_writer",
    "write_run",
]
