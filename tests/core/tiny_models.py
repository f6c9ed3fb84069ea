"""Random two-layer models of many architectures, and the statistics of a dense attention matrix in float64.

The oracle shares no code with headscope: the matrix comes from the model's own eager attention (`output_attentions=True`), and every
statistic is its formula from the table of definitions, written out over the matrix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOW = 8


def llama(impl: str = "sdpa", **kw: Any) -> Any:
    return hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**{**BASE, "num_key_value_heads": 2, **kw}), attn_implementation=impl)


def gpt2(impl: str = "sdpa", **kw: Any) -> Any:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS, **kw)
    return hf.GPT2LMHeadModel._from_config(config, attn_implementation=impl)


def gemma2(impl: str = "eager", **kw: Any) -> Any:
    config = hf.Gemma2Config(**BASE, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=1.5, **kw)
    return hf.Gemma2ForCausalLM._from_config(config, attn_implementation=impl)


def mistral(impl: str = "sdpa", **kw: Any) -> Any:
    config = hf.MistralConfig(**BASE, num_key_value_heads=2, sliding_window=WINDOW, **kw)
    return hf.MistralForCausalLM._from_config(config, attn_implementation=impl)


def qwen3(impl: str = "sdpa") -> Any:
    config = hf.Qwen3Config(**BASE, num_key_value_heads=2, head_dim=8)
    return hf.Qwen3ForCausalLM._from_config(config, attn_implementation=impl)


def phi3(impl: str = "sdpa") -> Any:
    return hf.Phi3ForCausalLM._from_config(hf.Phi3Config(**BASE, num_key_value_heads=2), attn_implementation=impl)


def gpt_oss(impl: str = "eager") -> Any:
    config = hf.GptOssConfig(**BASE, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1)
    return hf.GptOssForCausalLM._from_config(config, attn_implementation=impl)


def bert(impl: str = "sdpa") -> Any:
    config = hf.BertConfig(**BASE, max_position_embeddings=64)
    return hf.BertModel._from_config(config, attn_implementation=impl)


def dinov2(impl: str = "sdpa") -> Any:
    config = hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7)
    return hf.Dinov2Model._from_config(config, attn_implementation=impl)


def t5(impl: str = "sdpa") -> Any:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return hf.T5ForConditionalGeneration._from_config(config, attn_implementation=impl)


def bart(impl: str = "sdpa") -> Any:
    config = hf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **IDS,
    )
    return hf.BartForConditionalGeneration._from_config(config, attn_implementation=impl)


def llava(impl: str = "sdpa") -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = hf.LlamaConfig(**BASE, num_key_value_heads=2)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=96, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=impl)


def qwen_vl(impl: str = "sdpa") -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "patch_size": 14,
    }
    text = {**BASE, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=96, video_token_id=95, vision_start_token_id=94, vision_end_token_id=93
    )
    return hf.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=impl)


def make(build: Callable[..., Any], impl: str | None = None, **kw: Any) -> Any:
    """A model with fixed weights, larger than the usual initialisation so that attention is far from uniform."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = build(impl, **kw) if impl else build(**kw)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(0, 0.25)
            elif "sinks" in name:
                value.normal_(0, 1)
    torch.random.set_rng_state(state)
    return model.eval()


def eager_copy(model: Any) -> Any:
    """The same weights under eager attention."""
    twin = copy.deepcopy(model)
    for module in twin.modules():  # set_attn_implementation misses configs that stacks hold as copies (T5 before 5.18)
        if isinstance(getattr(module, "config", None), hf.PreTrainedConfig):
            module.config._attn_implementation_internal = "eager"
    return twin


def ids(batch: int, length: int, seed: int = 0, high: int = 90) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, high, (batch, length), generator=generator)


def padding(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """No padding, or a batch whose later sequences miss 5 tokens on one side."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    for index in range(1, batch):
        if kind == "left":
            mask[index, :5] = 0
        else:
            mask[index, -5:] = 0
    return mask


def dense(
    a: torch.Tensor,
    *,
    causal: bool,
    row_valid: torch.Tensor | None = None,
    sink_tokens: int = 4,
    local_window: int = 64,
    waad_window: int = 10,
    fai_band: tuple[int, int | None] = (10, 50),
    block: int = 128,
    first: int = 0,
) -> dict[str, torch.Tensor]:
    """Every passive statistic but lse of a matrix a [B, H, N, M] (rows and keys both from position `first` on), in float64."""
    a = a.detach().double()
    batch, _, n, m = a.shape
    row_valid = torch.ones(batch, n, dtype=torch.bool) if row_valid is None else row_valid.bool()
    begin = row_valid.int().argmax(1) if n == m else torch.zeros(batch, dtype=torch.int64)
    rows = row_valid[:, None, :, None]
    a = a * rows
    t, s = torch.arange(n)[:, None] + (m - n), torch.arange(m)[None, :]
    d = (t - s).abs().double()
    sink = (s < begin[:, None, None] + sink_tokens).double()[:, None]
    log = torch.where(a > 0, a.clamp_min(1e-300).log(), torch.zeros_like(a))
    out = {
        "entropy": -(a * log).sum(-1),
        "row_max": a.amax(-1),
        "distance": (a * d).sum(-1),
        "distance_sq": (a * d * d).sum(-1),
        "waad": (a * d.clamp_max(waad_window)).sum(-1),
        "sink_mass": (a * sink).sum(-1),
        "local_mass": (a * (d < local_window)).sum(-1),
    }
    out = {name: value.masked_fill(~row_valid[:, None], math.nan) for name, value in out.items()}
    out["argmax"] = a.argmax(-1).masked_fill(~row_valid[:, None], -1) + first
    key_valid = row_valid if n == m else torch.ones(batch, m, dtype=torch.bool)
    later = (((t >= s) if causal else torch.ones_like(t >= s)) & rows[:, 0]).sum(1) * key_valid
    out["column_sum"] = a.sum(2)
    out["sink_importance"] = a.sum(2) / torch.where(later > 0, later.double(), math.nan)[:, None]
    low, high = fai_band
    band = (t - s >= low) & (t - s <= (high if high is not None else n))
    inside = (band & rows[:, 0]).sum(1) * key_valid
    out["fai"] = (a * band).sum(2) / torch.where(inside > 0, inside.double(), math.nan)[:, None]
    nq, nk = -(-n // block), -(-m // block)
    padded = torch.zeros(*a.shape[:2], nq * block, nk * block, dtype=torch.float64)
    padded[:, :, :n, :m] = a
    cells = padded.unflatten(3, (nk, block)).unflatten(2, (nq, block))
    out["block_mass"] = cells.sum((3, 5))
    out["block_max"] = cells.amax((3, 5))
    return out


def compare(stats: Any, layer: Any, expected: dict[str, torch.Tensor], limit: float = 1e-5) -> dict[str, float]:
    """Largest |captured - dense| of each statistic, relative to the statistic's largest value; AssertionError above the limit."""
    errors = {}
    for name, want in expected.items():
        got = stats[name][layer]
        assert got.shape == want.shape, (name, layer, got.shape, want.shape)
        got = got.double()
        if name == "argmax":
            assert torch.equal(got.long(), want.long()), (name, layer)
            continue
        assert torch.equal(got.isnan(), want.isnan()), (name, layer, "NaN where a number is expected, or the reverse")
        scale = float(want.nan_to_num().abs().max().clamp_min(1e-12))
        errors[name] = float((got - want).nan_to_num().abs().max()) / scale
        assert errors[name] <= limit, (name, layer, errors[name])
    return errors
