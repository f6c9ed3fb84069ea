"""transformers' layer_types, sliding_window and per_layer_config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.files import dump, read_json
from headscope.export.fitting import Fitted, from_zero, layers, widest
from headscope.export.imported import Found, Hints
from headscope.export.words import word
from headscope.plans.patterns import Dense, Pattern, Streaming
from headscope.plans.plan import SparsePlan

FULL, SLIDING = "full_attention", "sliding_attention"


class TransformersConfig(Format):
    """Config entries: `layer_types` (full_attention or sliding_attention), `sliding_window`, and, where windows differ, `per_layer_config`
    {"03": {"sliding_window": 1024}} (transformers 5). sliding_window W keeps the keys (i - W, i], the row's own among them: the same W as
    headscope's window. Classes that read layer_types: Qwen2, Qwen3, Gemma 2 and 3, gpt-oss, Ministral, Cohere2, SmolLM3 ...;
    LlamaForCausalLM and MistralForCausalLM do not, and would ignore it.
    """

    name: ClassVar[str] = "transformers"
    title: ClassVar[str] = "transformers layer_types"
    engine: ClassVar[str] = "transformers 4.53 and later; per_layer_config: 5; vLLM for the same model classes"
    reader: ClassVar[str] = "AutoConfig.from_pretrained(NAME, **overrides)"
    main: ClassVar[str] = "config_overrides.json"
    holds: ClassVar[tuple[str, ...]] = (
        "full or sliding attention per layer, with a window per layer where the class reads per_layer_config",
    )
    lacks: ClassVar[tuple[str, ...]] = (
        "heads that differ within a layer",
        "sinks (unless the model has learned sink logits)",
        "verticals, blocks and choices per input",
        "classes without layer_types, which ignore it",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """One pattern per layer, dense or a window without sinks."""
        from_zero(plan.model, "layer_types")
        fitted = Fitted.of(plan)
        fitted.windows("transformers", export.known)
        for members in layers(plan.model):
            whole = widest({fitted.patterns[place] for place in members})
            for place in members:
                own = fitted.patterns[place]
                if not isinstance(own, Streaming | Dense):
                    why = "transformers has full and sliding layers only"
                else:
                    why = f"all heads of a layer are alike, and another has {word(whole)}"
                fitted.change(place, whole, why)
                if isinstance(whole, Streaming) and whole.sink:
                    fitted.change(place, Streaming(0, whole.window), "a sliding layer has no sinks")
        fitted.notes.append("sliding_window W keeps the keys (i - W, i], the row's own among them, as headscope's window does")
        fitted.notes.append(
            "classes that do not read layer_types (Llama, Mistral) ignore it without a word: check model.config.layer_types is used"
        )
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The entries to lay over the model's config."""
        windows = [_window(export.patterns()[members[0]]) for members in layers(export.model)]
        known = sorted({window for window in windows if window is not None})
        types = [FULL if window is None else SLIDING for window in windows]
        overrides: dict[str, Any] = {"layer_types": types}
        if known:
            overrides |= {"sliding_window": known[-1], "use_sliding_window": True, "max_window_layers": 0}
        if len(known) > 1:
            digits = max(2, len(str(len(windows) - 1)))
            overrides["per_layer_config"] = {
                f"{layer:0{digits}d}": {"sliding_window": window} for layer, window in enumerate(windows) if window not in (None, known[-1])
            }
            export.notes.append(
                "windows differ between layers: the class must read per_layer_config (transformers 5), else all have the largest"
            )
        return {self.main: dump(overrides, indent=2)}

    def decode(self, path: Path, hints: Hints) -> Found:
        """The entries, alone or in a model's config.json (also of its text_config)."""
        given = read_json(path)
        if isinstance(given, dict) and "layer_types" not in given and isinstance(given.get("text_config"), dict):
            given = given["text_config"]
        types = given.get("layer_types") if isinstance(given, dict) else None
        if not isinstance(types, list) or not types or not all(one in (FULL, SLIDING) for one in types):
            strange = [one for one in types if one not in (FULL, SLIDING)][:3] if isinstance(types, list) else types
            raise refusal(ExportError, str(path), f"its layer_types are {strange!r}", f"a list of {FULL} and {SLIDING} is read")
        window, per_layer = given.get("sliding_window"), given.get("per_layer_config") or {}
        if not isinstance(per_layer, dict) or not all(str(key).isdecimal() and isinstance(one, dict) for key, one in per_layer.items()):
            raise refusal(ExportError, str(path), "its per_layer_config is no table by layer", "correct it")
        own = {int(key): one.get("sliding_window", window) for key, one in per_layer.items()}
        windows = [own.get(layer, window) if kind == SLIDING else None for layer, kind in enumerate(types)]
        for layer, (kind, size) in enumerate(zip(types, windows, strict=True)):
            if kind == SLIDING and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise refusal(ExportError, str(path), f"layer {layer} slides with sliding_window {size!r}", "it counts keys; correct it")
        heads, kv_heads = given.get("num_attention_heads"), given.get("num_key_value_heads")
        counts = hints.model.heads if hints.model is not None else (int(heads or 1),) * len(types)
        model = hints.shape(
            counts if len(counts) == len(types) else (1,) * len(types), kv_heads=(int(kv_heads or heads or 1),) * len(types)
        )
        notes = [] if heads or hints.model is not None else ["the file does not say how many heads a layer has; each stands for its layer"]
        patterns: dict[tuple[int, int], Pattern] = {
            (layer, head): Dense() if windows[layer] is None else Streaming(0, int(windows[layer] or 1)) for layer, head in model.places
        }
        return Found(model, SparsePlan(model, patterns, "imported from transformers", {}, tuple(notes)), {}, notes)

    def load(self, export: Export) -> str:
        """As overrides of the config."""
        return (
            f"config = transformers.AutoConfig.from_pretrained(NAME, **json.load(open('{self.main}')))\n"
            "model = transformers.AutoModelForCausalLM.from_pretrained(NAME, config=config)"
        )


def _window(pattern: Pattern) -> int | None:
    return pattern.window if isinstance(pattern, Streaming) else None
