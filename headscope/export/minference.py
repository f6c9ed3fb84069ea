"""MInference's pattern file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from headscope.export.base import Export, Format
from headscope.export.files import dump
from headscope.export.fitting import Fitted, from_zero, rectangular
from headscope.export.imported import Found, Hints
from headscope.export.lists import Entry, listed, read_list_file
from headscope.export.words import EVERYTHING
from headscope.plans.dynamic import TopBlocks, VerticalSlash
from headscope.plans.patterns import Pattern, Streaming
from headscope.plans.plan import SparsePlan

TOP = 100
"""Key blocks per row of blocks that MInference's block-sparse kernel keeps, whatever the file says."""
SIDE = 64
LONGEST = 131_072
"""Tokens at which a fixed number of blocks is turned into a share where no length is given."""


class MInference(Format):
    """A list over layers of {"head": [type, a, b, score]} (arXiv:2407.02490, microsoft/MInference). Types: vertical_and_slash (columns,
    diagonals), stream_llm (first, nearest), block_sparse (always the top 100 blocks of 64). The score is not read.
    """

    name: ClassVar[str] = "minference"
    title: ClassVar[str] = "MInference patterns"
    engine: ClassVar[str] = "MInference 0.1 (microsoft/MInference)"
    reader: ClassVar[str] = "minference.MInference(config_path=...)"
    main: ClassVar[str] = "best_pattern.json"
    holds: ClassVar[tuple[str, ...]] = (
        "columns and diagonals chosen per input, a number of each per head",
        "a sink and a window per head",
        "block choice by mean queries and keys, the top 100 blocks of 64",
        "a score per head, which the engine ignores",
    )
    lacks: ClassVar[tuple[str, ...]] = (
        "dense heads: every column is chosen instead, which costs more than dense attention",
        "other numbers of blocks, other block sizes",
        "decoding, which is dense",
        "fewer than 100 diagonals",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Columns and diagonals, windows, top blocks; everything else keeps every column."""
        from_zero(plan.model, "MInference")
        rectangular(plan.model, "heads", "MInference")
        top = TopBlocks(share=_share(export.known or LONGEST), rule="pooled", block=SIDE)
        fitted = Fitted.of(plan)
        fitted.windows("MInference", export.known)

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            if isinstance(pattern, VerticalSlash):
                fixed = VerticalSlash(pattern.vertical, pattern.slash)
                sized = VerticalSlash(max(fixed.vertical, fixed.sink, pattern.sink), max(fixed.slash, fixed.window, pattern.window))
                return sized, "MInference chooses from the last 64 rows and forces the first 30 columns and the nearest 100 diagonals"
            if isinstance(pattern, Streaming):
                return pattern, ""
            if isinstance(pattern, TopBlocks) and pattern == top and top.share != 1:
                return pattern, ""
            return VerticalSlash(EVERYTHING, 100), "MInference has no such type; every column is kept"

        fitted.each(rule)
        if any(isinstance(one, VerticalSlash) and one.vertical == EVERYTHING for one in fitted.patterns.values()):
            fitted.notes.append("heads with 16,777,216 columns keep everything and cost more than dense attention would")
        fitted.notes += [
            "stream_llm's window counts the row's own key, as headscope's does",
            "sparse in the prefill only; decoding is dense, for windows too",
        ]
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The list on one line, as json.dump writes it."""
        scores = export.values("minference_score")
        entries: dict[tuple[int, int], Entry] = {}
        for place, pattern in export.patterns().patterns.items():
            score = scores.get(place, 1.0)
            if isinstance(pattern, Streaming):
                entries[place] = ("stream_llm", pattern.sink, pattern.window, score)
            elif isinstance(pattern, TopBlocks):
                entries[place] = ("block_sparse", 1000, 6096, score)
            else:
                assert isinstance(pattern, VerticalSlash)
                entries[place] = ("vertical_and_slash", pattern.vertical, pattern.slash, score)
        return {self.main: dump(listed(export, entries)).rstrip(b"\n")}

    def decode(self, path: Path, hints: Hints) -> Found:
        """Patterns and scores; a head that is missing runs with the engine's default of 1000 columns and 6096 diagonals."""
        counts, entries = read_list_file(path, ("vertical_and_slash", "stream_llm", "block_sparse"), every_head=False)
        model = hints.shape(counts)
        top = TopBlocks(share=_share(hints.length or LONGEST), rule="pooled", block=SIDE)
        patterns: dict[tuple[int, int], Pattern] = {}
        notes = []
        missing = 0
        for place in model.places:
            if place not in entries:
                missing += 1
            kind, a, b, _ = entries.get(place, ("vertical_and_slash", 1000, 6096, 1.0))
            if kind == "stream_llm":
                patterns[place] = Streaming(a, max(b, 1))
            elif kind == "block_sparse":
                patterns[place] = top
            else:
                patterns[place] = VerticalSlash(max(a, 30), max(b, 100))
        if missing:
            notes.append(f"{missing} heads are not in the file; MInference runs them with 1000 columns and 6096 diagonals")
        if any(one == top for one in patterns.values()):
            notes.append(
                f"block_sparse keeps the top {TOP} blocks of {SIDE}: a share of {top.share:.3f} at {hints.length or LONGEST:,} tokens"
            )
        scores = {place: entry[3] for place, entry in entries.items()} | dict.fromkeys((p for p in model.places if p not in entries), 1.0)
        plan = SparsePlan(model, patterns, "imported from MInference", {}, tuple(notes))
        return Found(model, plan, {"minference_score": scores}, notes)

    def load(self, export: Export) -> str:
        """The patch of a transformers model."""
        return (
            "from minference import MInference\n"
            f'model = MInference(attn_type="minference", model_name={export.model.name!r}, config_path="{self.main}")(model)'
        )


def _share(tokens: int) -> float:
    return min(1.0, TOP * SIDE / max(tokens, 1))
