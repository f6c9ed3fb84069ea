"""rtp-llm's headwise_config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.files import dump, read_json
from headscope.export.fitting import Fitted, groups, rectangular, to_one_window, to_two_classes
from headscope.export.imported import Found, Hints
from headscope.plans.patterns import Dense, Pattern, Streaming
from headscope.plans.plan import SparsePlan

DEFAULT = Streaming(4, 8193)
"""The engine's defaults: sink_token_num 4, swa_token_num 8192."""
SIZES = ("sink_token_num", "swa_token_num", "seqlen_threshold")


class RtpLlm(Format):
    """`headwise_config` of a model's config.json: per layer a list of 1 (retrieval, all keys) and 0 (sink and window) for every query head,
    sink_token_num, swa_token_num, seqlen_threshold (alibaba/rtp-llm, models/qwen_v2.py, cuda_headwise_impl/headwise.py). A layer that is
    missing is all retrieval.

    swa_token_num is FlashInfer's window_left, keys before the row's own, so a window of w is swa_token_num = w - 1. The engine gathers the
    retrieval heads of a layer and runs them with the key heads it has, which is right only where every key head has as many of them.
    """

    name: ClassVar[str] = "rtp-llm"
    title: ClassVar[str] = "rtp-llm headwise_config"
    engine: ClassVar[str] = "rtp-llm (alibaba/rtp-llm), prefill"
    reader: ClassVar[str] = "rtp_llm/models/qwen_v2.py, HeadWisePrefillAttnOp"
    main: ClassVar[str] = "headwise_config.json"
    holds: ClassVar[tuple[str, ...]] = ("retrieval or streaming per query head", "one sink and one window for all streaming heads")
    lacks: ClassVar[tuple[str, ...]] = (
        "windows per head",
        "key heads with different numbers of retrieval heads in a layer",
        "verticals, blocks and everything else that is not a sink with a window",
        "decoding, which is dense; prompts below seqlen_threshold, which are dense",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """Dense or one window; as many dense heads in every key group of a layer."""
        fitted = to_two_classes(plan, "rtp-llm", export.known)
        by_layer: dict[int, list[list[tuple[int, int]]]] = {}
        for members in groups(plan.model):
            by_layer.setdefault(members[0][0], []).append(members)
        for parts in by_layer.values():
            counts = [sum(isinstance(fitted.patterns[place], Dense) for place in members) for members in parts]
            for members, count in zip(parts, counts, strict=True):
                streaming = [place for place in members if not isinstance(fitted.patterns[place], Dense)]
                for place in streaming[: max(counts) - count]:
                    fitted.change(place, Dense(), "rtp-llm needs as many retrieval heads in every key group of a layer")
        one = to_one_window(fitted, "rtp-llm", DEFAULT)
        fitted.notes += [
            f"swa_token_num {one.window - 1} counts keys before the row's own: the plan's window of {one.window}",
            "sparse in the prefill only; decoding is dense",
            f"prompts shorter than seqlen_threshold {one.sink + one.window + 1} run dense, where the plan drops nothing either",
            "of a prompt computed in one piece, the rows at the window's edge count a sink twice (by reading the engine's source)",
        ]
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The entry of config.json."""
        plan, model = export.patterns(), export.model
        one = next((pattern for pattern in plan.patterns.values() if isinstance(pattern, Streaming)), DEFAULT)
        config: dict[str, Any] = {
            str(layer): [int(isinstance(plan[layer, head], Dense)) for head in range(heads)]
            for layer, heads in zip(model.layers, model.heads, strict=True)
        }
        sizes = (one.sink, one.window - 1, one.sink + one.window + 1)
        return {self.main: dump({"headwise_config": {**config, **dict(zip(SIZES, sizes, strict=True))}})}

    def decode(self, path: Path, hints: Hints) -> Found:
        """The entry, alone or in a model's config.json."""
        given = read_json(path)
        config = given.get("headwise_config") if isinstance(given, dict) else None
        if not isinstance(config, dict):
            raise refusal(ExportError, str(path), "it has no headwise_config", "pass a config.json of rtp-llm")
        sizes = [config.get(name, default) for name, default in zip(SIZES, (4, 8192, 16384), strict=True)]
        if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in sizes):
            raise refusal(ExportError, str(path), f"{', '.join(SIZES)} are {sizes}", "they count tokens; correct it")
        listed = {key: row for key, row in config.items() if key not in SIZES}
        for key, row in listed.items():
            if (
                not key.isdecimal()
                or not isinstance(row, list)
                or any(isinstance(one, bool) or one not in (0, 1) for one in row)
                or not row
            ):
                raise refusal(ExportError, str(path), f"layer {key!r} is no list of 0 and 1", "correct it")
        widths = {len(row) for row in listed.values()}
        if len(widths) != 1:
            raise refusal(ExportError, str(path), f"its layers have {sorted(widths) or 'no'} heads", "it is ragged; correct it")
        rows = {int(key): row for key, row in listed.items()}
        numbers = hints.model.layers if hints.model is not None else tuple(range(int(given.get("num_hidden_layers") or max(rows) + 1)))
        width = widths.pop()
        kv_heads = given.get("num_key_value_heads")
        model = hints.shape([width] * len(numbers), layers=numbers, kv_heads=None if kv_heads is None else [int(kv_heads)] * len(numbers))
        streaming = Streaming(sizes[0], sizes[1] + 1)
        patterns: dict[tuple[int, int], Pattern] = {
            (layer, head): streaming if layer in rows and not rows[layer][head] else Dense() for layer, head in model.places
        }
        notes = [f"prompts shorter than {sizes[2]} tokens run dense, and so does decoding"]
        absent = [layer for layer in numbers if layer not in rows]
        if absent:
            notes.append(f"layers {absent} are not in the file and keep all keys")
        return Found(model, SparsePlan(model, patterns, "imported from rtp-llm", {}, tuple(notes)), {}, notes)

    def load(self, export: Export) -> str:
        """Into the model's config.json."""
        rectangular(export.model, "heads", "rtp-llm")
        return (
            "import json, pathlib; at = pathlib.Path('MODEL_DIRECTORY/config.json')\n"
            f"at.write_text(json.dumps(json.loads(at.read_text()) | json.load(open('{self.main}'))))"
        )
