"""DuoAttention's directory of gates, which LServe reads too."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format, table_of
from headscope.export.files import dump, read_json, read_text
from headscope.export.fitting import Fitted
from headscope.export.gates import check_score_shape, describe_gates, fit_gates, found_gates, gates_of
from headscope.export.imported import Found, Hints
from headscope.plans.plan import Place, SparsePlan


class DuoAttention(Format):
    """`full_attention_heads.tsv`, one row per layer and one column per key head, and `config.json` with sink_size and recent_size, as
    duo_attn.utils.load_attn_pattern reads them (arXiv:2410.10819, mit-han-lab/duo-attention). LServe reads the table and takes its
    windows from the command line.
    """

    name: ClassVar[str] = "duo-attention"
    title: ClassVar[str] = "DuoAttention and LServe gates"
    engine: ClassVar[str] = "DuoAttention (mit-han-lab/duo-attention), LServe (mit-han-lab/omniserve)"
    reader: ClassVar[str] = "duo_attn.utils.load_attn_pattern, sparsify_attention_heads; LServe --static-sparse-attn-load-dir"
    main: ClassVar[str] = "full_attention_heads.tsv"
    holds: ClassVar[tuple[str, ...]] = ("a gate per key head", "one sink and one window for all streaming heads", "scores (gates)")
    lacks: ClassVar[tuple[str, ...]] = (
        "windows per head",
        "query heads of one key head that differ",
        "verticals, blocks and everything else that is not a sink with a window",
        "sparse prefill: DuoAttention computes the first chunk of a prompt in full",
        "LServe: windows in tokens (its sinks and windows are multiples of its cache block, from the command line)",
    )
    metrics: ClassVar[tuple[str, ...]] = ("duo_gate", "duo_change", "duo_error", "retrieval", "ind_sum")

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Dense or one window, whole key groups."""
        return fit_gates(plan, "DuoAttention", export.known)

    def encode(self, export: Export) -> dict[str, bytes]:
        """Gates of 0 and 1."""
        return self._files(export)[0]

    def encode_scores(self, export: Export) -> tuple[dict[str, bytes], dict[Place, float]]:
        """Gates as they are."""
        check_score_shape(export, "DuoAttention")
        return self._files(export)

    def _files(self, export: Export) -> tuple[dict[str, bytes], dict[Place, float]]:
        gates, sink, recent, written = gates_of(export)
        describe_gates(export, gates, sink, recent)
        export.notes += [
            f"in training recent_size {recent} means {recent} keys with the row's own, one fewer than in decoding",
            "the first chunk of a prompt is computed in full for every head; later chunks and decoding are sparse",
            f"LServe reads the table alone: --static-sparse-attn-load-dir . --static-sparsity {export.numbers.get('sparsity', 0.5)!r} "
            f"--dec-sink-token {sink} --dec-local-token {recent + 1}, both rounded up to whole cache blocks",
        ]
        text = io.StringIO()
        np.savetxt(text, gates, delimiter="\t")
        config: dict[str, Any] = {"sink_size": sink, "recent_size": recent}
        if export.plan is not None:
            config["sparsity"] = export.numbers["sparsity"]
        return {self.main: text.getvalue().encode(), "config.json": dump(config)}, written

    def decode(self, path: Path, hints: Hints) -> Found:
        """The table and the config beside it."""
        rows = [line.split("\t") if "\t" in line else line.split() for line in read_text(path).splitlines() if line.strip()]
        try:
            table = [[float(one) for one in row] for row in rows]
        except ValueError as error:
            raise refusal(
                ExportError, str(path), f"it is no table of gates ({error})", "pass DuoAttention's directory or its .tsv"
            ) from None
        config = read_json(path.with_name("config.json"))
        sizes = [config.get(name) if isinstance(config, dict) else None for name in ("sink_size", "recent_size")]
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes):
            raise refusal(
                ExportError, str(path.with_name("config.json")), f"sink_size, recent_size are {sizes}", "they count tokens; correct it"
            )
        return found_gates(table_of(table, path, "the table of gates"), int(sizes[0] or 0), int(sizes[1] or 0), hints, "duo_gate")

    def load(self, export: Export) -> str:
        """Loader and quantile."""
        share = export.numbers.get("sparsity", 0.5)
        return (
            "from duo_attn.utils import load_attn_pattern, sparsify_attention_heads\n"
            'gates, sink_size, recent_size = load_attn_pattern(".")\n'
            f"heads, sparsity = sparsify_attention_heads(gates, sparsity={share!r})"
        )
