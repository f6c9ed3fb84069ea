"""OpenVINO GenAI's SparseAttentionConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.files import dump, read_json
from headscope.export.fitting import Fitted, widest
from headscope.export.imported import Found, Hints
from headscope.plans.dynamic import TopBlocks
from headscope.plans.patterns import Dense, Pattern, Streaming
from headscope.plans.plan import SparsePlan

CACHE = 32
"""Tokens of a block of OpenVINO's KV cache on CPUs; sizes must be multiples of it (16 divides it, the size on GPUs)."""
DEFAULTS: dict[str, Any] = {
    "mode": "TRISHAPE",
    "num_last_dense_tokens_in_prefill": 100,
    "num_retained_start_tokens_in_cache": 128,
    "num_retained_recent_tokens_in_cache": 1920,
    "xattention_threshold": 0.8,
    "xattention_block_size": 64,
    "xattention_stride": 8,
}


class OpenVinoGenAi(Format):
    """The fields of openvino_genai.SparseAttentionConfig, one setting for the whole model: TRISHAPE (first and recent tokens of the cache,
    beside the chunk being computed) or XATTENTION (block choice by a threshold of estimated mass), in the prefill only.
    """

    name: ClassVar[str] = "openvino-genai"
    title: ClassVar[str] = "OpenVINO GenAI sparse attention"
    engine: ClassVar[str] = "OpenVINO GenAI 2025.2 and later"
    reader: ClassVar[str] = "openvino_genai.SchedulerConfig.sparse_attention_config"
    main: ClassVar[str] = "sparse_attention_config.json"
    holds: ClassVar[tuple[str, ...]] = ("one sink and window for the model", "or one threshold of estimated block mass for the model")
    lacks: ClassVar[tuple[str, ...]] = (
        "heads and layers that differ",
        "windows in tokens: sizes are multiples of the cache block (32)",
        "columns, diagonals, fixed blocks",
        "decoding, which is dense",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """One window, one threshold, or dense (threshold 1)."""
        fitted = Fitted.of(plan)
        fitted.windows("OpenVINO", export.known)
        kinds = set(fitted.patterns.values())
        chosen = [one for one in kinds if isinstance(one, TopBlocks) and one.rule == "antidiagonal" and one.mass is not None]
        whole = widest(kinds)
        why = "OpenVINO has one setting for the whole model"
        if isinstance(whole, Streaming):
            whole = Streaming(-(-whole.sink // CACHE) * CACHE, -(-(whole.window - 1) // CACHE) * CACHE + 1)
            why = f"OpenVINO has one window for the whole model, in blocks of {CACHE}"
            fitted.notes.append(
                f"a row of the prefill sees {whole.sink} first tokens, {whole.window - 1} before its chunk, and the chunk so far"
            )
        elif len(chosen) == len(kinds):
            first = chosen[0]
            whole = TopBlocks(mass=max(one.mass or 0 for one in chosen), rule="antidiagonal", block=first.block, stride=first.stride)
            why = "OpenVINO has one threshold for the whole model"
        for place in list(fitted.patterns):
            fitted.change(place, whole, why)
        fitted.notes.append("sparse in the prefill only; decoding is dense")
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The fields."""
        one = next(iter(export.patterns().patterns.values()))
        config = {**DEFAULTS, "num_last_dense_tokens_in_prefill": 0}
        if isinstance(one, Streaming):
            config |= {"num_retained_start_tokens_in_cache": one.sink, "num_retained_recent_tokens_in_cache": one.window - 1}
        elif isinstance(one, TopBlocks):
            config |= {"mode": "XATTENTION", "xattention_threshold": float(one.mass or 1.0)}
            config |= {"xattention_block_size": one.block, "xattention_stride": one.stride}
        else:
            config |= {"mode": "XATTENTION", "xattention_threshold": 1.0}
        return {self.main: dump(config, indent=2)}

    def decode(self, path: Path, hints: Hints) -> Found:
        """The setting, for every head of the model that `like` names."""
        given = read_json(path)
        if not isinstance(given, dict) or given.get("mode") not in ("TRISHAPE", "XATTENTION"):
            raise refusal(ExportError, str(path), "its mode is neither TRISHAPE nor XATTENTION", "pass the fields of SparseAttentionConfig")
        config = {**DEFAULTS, **given}
        counts = [config[name] for name in DEFAULTS if name not in ("mode", "xattention_threshold")]
        share = config["xattention_threshold"]
        if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in counts) or not isinstance(share, int | float):
            raise refusal(ExportError, str(path), "its sizes are no whole numbers", "correct it")
        if hints.model is None:
            raise refusal(
                ExportError, str(path), "it does not say how many layers and heads there are", "pass the model with like= (--like)"
            )
        if config["mode"] == "TRISHAPE":
            pattern: Pattern = Streaming(config["num_retained_start_tokens_in_cache"], config["num_retained_recent_tokens_in_cache"] + 1)
        elif share >= 1:
            pattern = Dense()
        else:
            sizes = {"block": max(config["xattention_block_size"], 1), "stride": max(config["xattention_stride"], 1)}
            pattern = TopBlocks(mass=max(float(share), 1e-9), rule="antidiagonal", **sizes)
        last = config["num_last_dense_tokens_in_prefill"]
        notes = [f"the last {last} tokens of a prompt are dense in the engine and not in this plan"] if last else []
        return Found(hints.model, SparsePlan.uniform(hints.model, pattern, method="imported from OpenVINO", notes=tuple(notes)), {}, notes)

    def load(self, export: Export) -> str:
        """The scheduler's config."""
        return (
            "import json, openvino_genai as ov; fields = json.load(open('sparse_attention_config.json'))\n"
            "scheduler = ov.SchedulerConfig(); scheduler.use_sparse_attention = True\n"
            "fields['mode'] = getattr(ov.SparseAttentionMode, fields['mode'])\n"
            "scheduler.sparse_attention_config = ov.SparseAttentionConfig(**fields)"
        )
