"""Small random SD3, Flux and DiT transformers with fixed weights, their inputs, and the parts of a pipeline around them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)

IMAGE, TEXT, WORDS = 16, 7, 7
NO_TEXT_ENCODERS = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}


def spread(model):
    """Fixed weights that make attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 or name.endswith("bias"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model.eval()


def sd3(**kw):
    return spread(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8, **kw,
        )
    )  # fmt: skip


def flux():
    return spread(
        FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=20, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def dit():
    return spread(
        DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10,
        )
    )  # fmt: skip


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(kind, batch=2):
    if kind == "dit":
        return {"hidden_states": noise(batch, 4, 8, 8), "timestep": torch.full((batch,), 5), "class_labels": torch.arange(batch)}
    common = {"encoder_hidden_states": noise(batch, WORDS, 20, seed=1), "pooled_projections": noise(batch, 16, seed=2)}
    if kind == "sd3":
        return {"hidden_states": noise(batch, 4, 8, 8), "timestep": torch.full((batch,), 500.0), **common}
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1).float()
    given = {"hidden_states": noise(batch, IMAGE, 16), "timestep": torch.full((batch,), 0.5), **common}
    return {**given, "img_ids": places, "txt_ids": torch.zeros(WORDS, 3)}


MODELS = {"sd3": lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"), "flux": flux, "dit": dit}


def vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,), norm_num_groups=4,
        latent_channels=4, sample_size=8, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(width):
    return {
        "prompt_embeds": noise(1, 5, width, seed=1), "pooled_prompt_embeds": noise(1, 16, seed=2),
        "negative_prompt_embeds": noise(1, 5, width, seed=3), "negative_pooled_prompt_embeds": noise(1, 16, seed=4),
    }  # fmt: skip
