"""vLLM's and SGLang's dual-chunk attention: MInference's list beside the model, vertical_and_slash only."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from headscope.export.base import Export, Format
from headscope.export.files import dump
from headscope.export.fitting import Fitted, from_zero, rectangular
from headscope.export.imported import Found, Hints
from headscope.export.lists import Entry, listed, read_list_file
from headscope.export.words import EVERYTHING
from headscope.plans.dynamic import VerticalSlash
from headscope.plans.patterns import Pattern
from headscope.plans.plan import SparsePlan


class DualChunk(Format):
    """`sparse_attention_config.json` in the model's directory: for every layer and every query head ["vertical_and_slash", columns,
    diagonals, score]. Only models with dual_chunk_attention_config (Qwen2.5-1M) use it. The reader turns exactly 30 columns into 130.
    """

    main: ClassVar[str] = "sparse_attention_config.json"
    holds: ClassVar[tuple[str, ...]] = ("columns and diagonals chosen per input, a number of each per head",)
    lacks: ClassVar[tuple[str, ...]] = (
        "every other type: dense heads and windows choose every column instead",
        "exactly 30 columns",
        "models without dual-chunk attention",
        "decoding, which is dense; prompts below sparse_attention_threshold (32,768), which are dense",
    )
    extra: ClassVar[tuple[str, ...]] = ()

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Columns and diagonals; everything else keeps every column."""
        from_zero(plan.model, self.title)
        rectangular(plan.model, "heads", self.title)
        fitted = Fitted.of(plan)

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            if not isinstance(pattern, VerticalSlash):
                return VerticalSlash(EVERYTHING, 100), f"{self.title} has columns and diagonals only; every column is kept"
            sized = VerticalSlash(max(pattern.vertical, pattern.sink), max(pattern.slash, pattern.window))
            if sized.vertical <= 30:
                return VerticalSlash(31, sized.slash), "the reader raises exactly 30 columns to 130, so 31 are written"
            return sized, f"{self.title} chooses from the last 64 rows and forces the first 30 columns and the nearest 100 diagonals"

        fitted.each(rule)
        fitted.notes += ["sparse in the prefill of prompts longer than sparse_attention_threshold; decoding is dense", *self.extra]
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The list on one line."""
        scores = export.values("minference_score")
        entries: dict[tuple[int, int], Entry] = {}
        for place, pattern in export.patterns().patterns.items():
            assert isinstance(pattern, VerticalSlash)
            entries[place] = ("vertical_and_slash", pattern.vertical, pattern.slash, scores.get(place, 1.0))
        return {self.main: dump(listed(export, entries)).rstrip(b"\n")}

    def decode(self, path: Path, hints: Hints) -> Found:
        """What the reader would run: 30 columns are 130."""
        counts, entries = read_list_file(path, ("vertical_and_slash",), every_head=True)
        model = hints.shape(counts)
        raised = sum(entry[1] == 30 for entry in entries.values())
        notes = [f"{raised} heads have 30 columns in the file and 130 in the engine"] if raised else []
        patterns: dict[tuple[int, int], Pattern] = {
            place: VerticalSlash(130 if a == 30 else max(a, 30), max(b, 100)) for place, (_, a, b, _) in entries.items()
        }
        plan = SparsePlan(model, patterns, f"imported from {self.title}", {}, tuple(notes))
        return Found(model, plan, {"minference_score": {place: entry[3] for place, entry in entries.items()}}, notes)


class VllmDualChunk(DualChunk):
    """MInference's list as vLLM up to 0.10 reads it: `sparse_attention_config.json` in the model's directory, every query head of every
    layer, vertical_and_slash only; the reader turns exactly 30 columns into 130. The backend was removed in 0.11.
    """

    name: ClassVar[str] = "vllm-dual-chunk"
    title: ClassVar[str] = "vLLM dual-chunk sparse config"
    engine: ClassVar[str] = "vLLM 0.8.5 to 0.10 (the backend was removed in 0.11)"
    reader: ClassVar[str] = "vllm get_sparse_attention_config, DualChunkFlashAttentionImpl"
    language: ClassVar[str] = "bash"

    def load(self, export: Export) -> str:
        """The file beside the model, and the backend."""
        return f"cp {self.main} MODEL_DIRECTORY/\nVLLM_ATTENTION_BACKEND=DUAL_CHUNK_FLASH_ATTN vllm serve MODEL_DIRECTORY"


class SglangDualChunk(DualChunk):
    """The same file as SGLang's dual_chunk_flash_attn backend reads it. Where its getter caches without the layer, every layer runs with
    layer 0's list, so a plan whose layers differ should be checked on the version at hand.
    """

    name: ClassVar[str] = "sglang-dual-chunk"
    title: ClassVar[str] = "SGLang dual-chunk sparse config"
    engine: ClassVar[str] = "SGLang 0.4.7 and later (dual_chunk_flash_attn backend)"
    reader: ClassVar[str] = "sglang get_sparse_attention_config, DualChunkFlashAttentionBackend"
    language: ClassVar[str] = "bash"

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """As vLLM's, and a warning where layers differ."""
        fitted = super().fit(plan, export)
        rows = {
            tuple(fitted.patterns[layer, head] for head in range(heads))
            for layer, heads in zip(plan.model.layers, plan.model.heads, strict=True)
        }
        if len(rows) > 1:
            fitted.notes.append("layers differ, and versions of SGLang that cache the list without its layer run all layers with layer 0's")
        return fitted

    def load(self, export: Export) -> str:
        """The file beside the model, and the backend."""
        serve = "python -m sglang.launch_server --model-path MODEL_DIRECTORY --attention-backend dual_chunk_flash_attn"
        return f"cp {self.main} MODEL_DIRECTORY/\n{serve}"
