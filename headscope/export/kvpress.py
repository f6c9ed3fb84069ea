"""kvpress: a DuoAttentionPress with gates of its own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format, table_of
from headscope.export.files import python_constants
from headscope.export.fitting import Fitted
from headscope.export.gates import check_score_shape, describe_gates, fit_gates, found_gates, gates_of
from headscope.export.imported import Found, Hints
from headscope.plans.plan import Place, SparsePlan

MODULE = '''"""Head gates for kvpress's DuoAttentionPress, written by headscope."""

from dataclasses import dataclass

import numpy as np
from kvpress import DuoAttentionPress

SINK_SIZE = {sink}
RECENT_SIZE = {recent}
HEAD_COMPRESSION_RATIO = {ratio!r}
GATES = [
{gates}
]


@dataclass
class HeadscopePress(DuoAttentionPress):
    """{words}"""

    head_compression_ratio: float = HEAD_COMPRESSION_RATIO

    @staticmethod
    def load_attention_pattern(model):
        """(sink_size, recent_size, gates [layers, key heads])."""
        return SINK_SIZE, RECENT_SIZE, np.array(GATES, dtype=float)
'''


class Kvpress(Format):
    """A module with a subclass of DuoAttentionPress, since kvpress fetches gates by the model's name and opens no local file. The press
    masks keys of streaming heads after the prefill (NVIDIA/kvpress, DuoAttentionPress).
    """

    name: ClassVar[str] = "kvpress"
    title: ClassVar[str] = "kvpress DuoAttentionPress"
    engine: ClassVar[str] = "kvpress 0.3 to 0.5 (NVIDIA/kvpress; it needs transformers < 5.3)"
    reader: ClassVar[str] = "kvpress.DuoAttentionPress.load_attention_pattern"
    main: ClassVar[str] = "headscope_press.py"
    holds: ClassVar[tuple[str, ...]] = ("a gate per key head", "one sink and one window for all streaming heads", "scores (gates)")
    lacks: ClassVar[tuple[str, ...]] = (
        "windows per head",
        "query heads of one key head that differ",
        "windows that slide: which keys are masked is fixed at the end of the prefill, and decoded keys are all kept",
        "sparse prefill, and memory: keys are masked, not dropped",
    )
    metrics: ClassVar[tuple[str, ...]] = ("duo_gate", "duo_change", "duo_error", "retrieval", "ind_sum")

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Dense or one window, whole key groups."""
        return fit_gates(plan, "kvpress", export.known)

    def encode(self, export: Export) -> dict[str, bytes]:
        """Gates of 0 and 1."""
        return self._files(export)[0]

    def encode_scores(self, export: Export) -> tuple[dict[str, bytes], dict[Place, float]]:
        """Gates as they are."""
        check_score_shape(export, "kvpress")
        return self._files(export)

    def _files(self, export: Export) -> tuple[dict[str, bytes], dict[Place, float]]:
        gates, sink, recent, written = gates_of(export)
        describe_gates(export, gates, sink, recent)
        export.notes.append("the window does not slide: the first decoded row sees what the plan says, each later one a key more")
        lines = ",\n".join("    [" + ", ".join(repr(float(gate)) for gate in row) + "]" for row in gates)
        ratio = export.numbers.get("sparsity", 0.5)
        words = f"{export.model.name}: {gates.shape[0]} layers of {gates.shape[1]} key heads.".replace("\\", "/").replace('"', "'")
        text = MODULE.format(sink=sink, recent=recent, ratio=ratio, gates=lines + ",", words=" ".join(words.split()))
        return {self.main: text.encode()}, written

    def decode(self, path: Path, hints: Hints) -> Found:
        """The module's constants; it is not run."""
        found = python_constants(path)
        sizes = [found.get(name) for name in ("SINK_SIZE", "RECENT_SIZE")]
        if "GATES" not in found or any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in sizes):
            raise refusal(ExportError, str(path), "it has no GATES, SINK_SIZE and RECENT_SIZE", "pass a press that headscope wrote")
        table = table_of(found["GATES"], path, "GATES")
        return found_gates(table, int(sizes[0] or 0), int(sizes[1] or 0), hints, "duo_gate")

    def load(self, export: Export) -> str:
        """The press as a context manager."""
        return "from headscope_press import HeadscopePress\nwith HeadscopePress()(model): model.generate(**inputs)"
