"""MoA's elastic windows."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format, table_of
from headscope.export.files import dump, read_json
from headscope.export.fitting import Fitted, from_zero, rectangular
from headscope.export.imported import Found, Hints
from headscope.plans.patterns import Dense, Pattern, Span, Streaming
from headscope.plans.plan import SparsePlan

SINK = 64
SMALLEST = 128
"""Keys that MoA keeps of every head, at least, the 64 sinks among them."""


class MoA(Format):
    """`{"alphas": [[...] per layer], "betas": [[...]]}` per query head (arXiv:2406.14909, thu-nics/MoA). alpha + beta N is the size of a
    head's cache, the 64 sinks included, at least 128 and rounded up to a multiple of 64; headscope's span does not count its sinks, so
    alpha is the span's plus 64. N is the prompt and the new tokens together.
    """

    name: ClassVar[str] = "moa"
    title: ClassVar[str] = "MoA elastic windows"
    engine: ClassVar[str] = "MoA (thu-nics/MoA)"
    reader: ClassVar[str] = "MoA update_model_function, moa_config_to_cache_config"
    main: ClassVar[str] = "moa_alpha_beta.json"
    holds: ClassVar[tuple[str, ...]] = (
        "a window per query head that grows with the text, beside 64 sinks",
        "dense heads (alpha 0, beta 1)",
    )
    lacks: ClassVar[tuple[str, ...]] = (
        "other numbers of sinks than 64",
        "windows in tokens: sizes are multiples of 64, and in the prefill a row sees whole blocks of 64",
        "verticals, blocks and choices per input",
        "key heads shared by query heads: the model is converted to one key head per query head first (scripts/helper/gqa_to_mha.py)",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Spans with 64 sinks, and dense heads."""
        from_zero(plan.model, "MoA")
        rectangular(plan.model, "heads", "MoA")
        if plan.model.heads != plan.model.kv_heads:
            export.obstacles.append(
                "MoA runs models with a key head per query head, and this one shares them; convert it first (scripts/helper/gqa_to_mha.py)"
            )

        fitted = Fitted.of(plan)
        fitted.windows("MoA", None)

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            if isinstance(pattern, Streaming):
                size = max(SMALLEST, -(-(pattern.window + SINK) // SINK) * SINK)
                return Streaming(SINK, size - SINK), "MoA keeps 64 sinks, 128 keys at least, and counts in blocks of 64"
            if isinstance(pattern, Span):
                own = pattern.alpha if pattern.floor <= SMALLEST - SINK else max(pattern.alpha, pattern.floor)
                why = "MoA keeps 64 sinks, and a least window of 64 only: a larger one is added to the growing part"
                return Span(own + SINK - SINK, pattern.beta, SINK, SMALLEST - SINK), why
            return Dense(), "MoA has windows only"

        fitted.each(rule)
        fitted.notes += [
            "alpha counts the 64 sinks with the window: it is the plan's plus 64",
            "a decoding row sees the size rounded up to a multiple of 64; a prefill row sees whole blocks of 64, up to 63 keys fewer",
        ]
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """Two tables."""
        plan, model = export.patterns(), export.model
        tables: dict[str, list[list[float]]] = {"alphas": [], "betas": []}
        for layer, heads in zip(model.layers, model.heads, strict=True):
            pairs = [_pair(plan[layer, head]) for head in range(heads)]
            tables["alphas"].append([one for one, _ in pairs])
            tables["betas"].append([two for _, two in pairs])
        return {self.main: dump(tables)}

    def decode(self, path: Path, hints: Hints) -> Found:
        """A span per head; sizes below 128 are 128, as in the engine."""
        given = read_json(path)
        if not isinstance(given, dict) or not {"alphas", "betas"} <= set(given):
            raise refusal(ExportError, str(path), "it has no alphas and betas", "pass MoA's moa_alpha_beta.json")
        alphas, betas = (table_of(given[name], path, name) for name in ("alphas", "betas"))
        if [len(row) for row in alphas] != [len(row) for row in betas]:
            raise refusal(ExportError, str(path), "alphas and betas have different shapes", "copy the file again")
        model = hints.shape([len(row) for row in alphas])
        patterns: dict[tuple[int, int], Pattern] = {}
        for layer, (row, rates) in enumerate(zip(alphas, betas, strict=True)):
            for head, (alpha, beta) in enumerate(zip(row, rates, strict=True)):
                if not 0 <= beta <= 1:
                    raise refusal(ExportError, str(path), f"beta {beta} of head {layer}.{head}", "a window is no longer than its text")
                patterns[model.layers[layer], head] = _pattern(float(alpha), float(beta))
        notes = ["windows are those of decoding: alpha + beta N less the 64 sinks"]
        return Found(model, SparsePlan(model, patterns, "imported from MoA", {}, tuple(notes)), {}, notes)

    def load(self, export: Export) -> str:
        """The patch of a transformers model."""
        return (
            "import json; from MoA.models.interface import update_model_function\n"
            "model = update_model_function(model, model_name)\n"
            f"model.model.set_mixture_of_attention(json.load(open('{self.main}')), permute_head=True)"
        )


def _pair(pattern: Pattern) -> tuple[float, float]:
    if isinstance(pattern, Streaming):
        return float(pattern.window + SINK), 0.0
    if isinstance(pattern, Span):
        return float(pattern.alpha + SINK), float(pattern.beta)
    return 0.0, 1.0


def _pattern(alpha: float, beta: float) -> Pattern:
    if beta == 0:
        return Streaming(SINK, max(-(-int(max(alpha, SMALLEST)) // SINK) * SINK, SMALLEST) - SINK)
    return Dense() if beta == 1 and alpha >= 0 else Span(alpha - SINK, beta, SINK, SMALLEST - SINK)
