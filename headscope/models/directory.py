"""A directory with a transformers checkpoint: config.json, weights, and a tokenizer or processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headscope.errors import ModelError, refusal
from headscope.models import auto

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read(where: Path, *, dtype: Any, device: Any, attn_implementation: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer or processor or None) of a directory; ModelError when it is not a whole checkpoint. No network, ever."""
    config_file = where / "config.json"
    if not config_file.is_file():
        raise _no_config(where)
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(ModelError, f"{config_file}", f"it cannot be read as JSON ({error})", "fetch the checkpoint again") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise refusal(ModelError, f"{config_file}", "it names no model_type, so it is not a transformers configuration", auto.WRAP)
    if "auto_map" in settings and not _known_type(settings["model_type"]):
        raise refusal(
            ModelError,
            f"model {where}",
            f"its type {settings['model_type']!r} needs code from its repository, which headscope does not run",
            auto.WRAP,
        )
    if not any((where / name).is_file() for name in WEIGHTS):
        raise refusal(ModelError, f"model directory {where}", f"it holds no weights ({' or '.join(WEIGHTS[::2])})", "fetch it again, whole")
    return _from_pretrained(where, dtype, device, attn_implementation)


def _from_pretrained(where: Path, dtype: Any, device: Any, attn_implementation: str | None) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True)
        model = auto.build(where, config, dtype=dtype, device=device, attn_implementation=attn_implementation)
        return model, auto.text_or_processor(where, config)
    except (SafetensorError, EOFError, OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise refusal(
            ModelError,
            f"model {where}",
            f"transformers cannot load it ({auto.first_line(error)})",
            "fetch it again if it is damaged, or " + auto.WRAP,
        ) from error


def _known_type(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _no_config(where: Path) -> ModelError:
    given = f"model directory {where}"
    if (where / "model_index.json").is_file():
        instead = "load it with diffusers and pass hs.Scope(pipeline)"
        return refusal(ModelError, given, "it is a diffusers pipeline, not a transformers checkpoint", instead)
    if (where / "adapter_config.json").is_file():
        return refusal(ModelError, given, "it is an adapter without its base model", "merge it into the model, or " + auto.WRAP)
    ggufs = sorted(path.name for path in where.glob("*.gguf"))
    if ggufs:
        return refusal(ModelError, given, "it has no config.json", f"pass one of its GGUF files: {', '.join(ggufs)}")
    return refusal(ModelError, given, "it has no config.json", "pass the directory that save_pretrained wrote")
