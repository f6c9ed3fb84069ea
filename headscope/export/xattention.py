"""XAttention's threshold table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format, table_of
from headscope.export.files import python_constants
from headscope.export.fitting import Fitted, from_zero, rectangular
from headscope.export.imported import Found, Hints
from headscope.plans.dynamic import TopBlocks
from headscope.plans.patterns import BLOCK, Dense, Pattern
from headscope.plans.plan import SparsePlan

NOTHING = 1e-9
"""The mass that stands for threshold 0, which keeps the first and the diagonal block alone."""


class XAttention(Format):
    """A Python list [layers][query heads] of thresholds, which the repository turns into a tensor (arXiv:2503.16428,
    mit-han-lab/x-attention, xattn/threshold): per row of blocks, the fewest blocks whose estimated masses reach the threshold.
    """

    name: ClassVar[str] = "xattention"
    title: ClassVar[str] = "XAttention thresholds"
    engine: ClassVar[str] = "XAttention (mit-han-lab/x-attention), prefill"
    reader: ClassVar[str] = "FastPrefillConfig.threshold, Xattention_prefill"
    main: ClassVar[str] = "headscope_threshold.py"
    holds: ClassVar[tuple[str, ...]] = ("a share of estimated mass per query head, in blocks of 128, one stride for all",)
    lacks: ClassVar[tuple[str, ...]] = (
        "windows, columns, diagonals, fixed blocks: such heads are computed in full (threshold 1)",
        "other block sizes and estimates",
        "decoding, which is dense",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Antidiagonal block choice with one stride; everything else dense."""
        from_zero(plan.model, "XAttention")
        rectangular(plan.model, "heads", "XAttention")
        fitted = Fitted.of(plan)
        strides = {one.stride for one in fitted.patterns.values() if isinstance(one, TopBlocks) and one.rule == "antidiagonal"}
        stride = min(strides, default=16)

        def rule(pattern: Pattern) -> tuple[Pattern, str]:
            if isinstance(pattern, TopBlocks) and pattern.rule == "antidiagonal" and pattern.mass is not None:
                sized = replace(pattern, block=BLOCK, stride=stride, expected=None)
                return sized, "XAttention has blocks of 128 and one stride for all heads"
            return Dense(), "XAttention has thresholds on estimated block masses only"

        fitted.each(rule)
        export.facts["stride"] = stride
        fitted.notes += [f"estimates are made with stride {stride}: FastPrefillConfig(stride={stride})", "prefill only; decoding is dense"]
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """A module with the table."""
        plan, model = export.patterns(), export.model
        rows = [[_threshold(plan[layer, head]) for head in range(heads)] for layer, heads in zip(model.layers, model.heads, strict=True)]
        lines = ",\n".join("    [" + ", ".join(map(repr, row)) + "]" for row in rows)
        stride = export.facts["stride"]
        return {self.main: f"stride = {stride}\nheadscope_threshold = [\n{lines},\n]\n".encode()}

    def decode(self, path: Path, hints: Hints) -> Found:
        """The table of a module; it is not run. Of several tables (one per stride) the one of the widest stride is taken."""
        found = python_constants(path)
        lists: dict[str, Any] = {name: value for name, value in found.items() if isinstance(value, list)}
        if not lists:
            raise refusal(ExportError, str(path), "it has no table of thresholds", "pass XAttention's threshold module")
        name = "headscope_threshold" if "headscope_threshold" in lists else max(lists, key=lambda one: (_stride_of(one), one))
        table = table_of(lists[name], path, name)
        stride = found.get("stride") if isinstance(found.get("stride"), int) else _stride_of(name) or 16
        model = hints.shape([len(row) for row in table])
        patterns: dict[tuple[int, int], Pattern] = {}
        scores: dict[tuple[int, int], float] = {}
        for layer, row in enumerate(table):
            for head, one in enumerate(row):
                if not 0 <= one <= 1:
                    raise refusal(
                        ExportError, str(path), f"threshold {one} of head {layer}.{head}", "it is a share of the mass; correct it"
                    )
                scores[layer, head] = float(one)
                chosen = TopBlocks(mass=max(float(one), NOTHING), rule="antidiagonal", block=BLOCK, stride=int(stride or 16))
                patterns[layer, head] = Dense() if one == 1 else chosen
        notes = [f"table {name} of {len(lists)}, stride {stride}"]
        zeros = sum(one == 0 for one in scores.values())
        if zeros:
            notes.append(f"{zeros} heads have threshold 0 (streaming heads): the first and the diagonal block, and the largest one")
        plan = SparsePlan(model, patterns, "imported from XAttention", {}, tuple(notes))
        return Found(model, plan, {"xattention_threshold": scores}, notes, {"stride": int(stride or 16)})

    def load(self, export: Export) -> str:
        """The table as FastPrefillConfig's tensor."""
        return (
            f"from headscope_threshold import headscope_threshold; config = FastPrefillConfig(stride={export.facts['stride']})\n"
            "config.threshold = torch.tensor(headscope_threshold).to('cuda'); model, tokenizer = load_model(config, name)"
        )


def _threshold(pattern: Pattern) -> float:
    if not isinstance(pattern, TopBlocks):
        return 1.0
    mass = float(pattern.mass or 0.0)
    return 0.0 if mass <= NOTHING else mass


def _stride_of(name: str) -> int:
    """The number at the end of a table's name."""
    tail = name.rsplit("_", 1)[-1]
    return int(tail) if tail.isdecimal() else 0
