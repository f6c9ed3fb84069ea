"""Rectified flow for the two bundled diffusion transformers: velocity, Euler sampling, and words for the joint one.

x_t = (1 - t) x_0 + t noise, and the model gives noise - x_0; t goes from 1 to 0, and the model is told 1000 t (the convention of SD3,
Esser et al., arXiv:2403.03206). A model is called as diffusers calls it, so hooks and processors on its attention see every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from headscope.models.bundled.data_dit import SIZE, WORDS, encode


def velocity(model: Any, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
    """Velocity [n, 1, 8, 8] at x [n, 1, 8, 8] and t [n] in [0, 1]. `text`: word vectors [n, 4, width] for the joint model, else None."""
    if text is None:
        label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return model(x, timestep=1000 * t, class_labels=label).sample
    return model(x, encoder_hidden_states=text, pooled_projections=pooled(text), timestep=1000 * t).sample


def pooled(text: torch.Tensor) -> torch.Tensor:
    """[n, width]: the mean of the words' vectors; the padding's vector is zero, so an empty prompt gives zero."""
    return text.sum(1) / (text.abs().sum(-1) > 0).sum(1).clamp(min=1)[:, None]


def text_table(width: int = 96, seed: int = 0) -> torch.Tensor:
    """Word vectors [words, width], fixed and random; the padding's is zero."""
    table = torch.randn(len(WORDS), width, generator=torch.Generator().manual_seed(seed))
    table[0] = 0
    return table


def embed(prompts: Sequence[str], where: Path) -> torch.Tensor:
    """Word vectors [n, 4, width] of prompts, from the table in a checkpoint directory (text.safetensors)."""
    from safetensors.torch import load_file

    return load_file(where / "text.safetensors")["words"].float()[encode(list(prompts))]


@torch.no_grad()
def sample(model: Any, number: int, *, steps: int, seed: int, text: torch.Tensor | None = None, guidance: float = 0.0) -> torch.Tensor:
    """Pictures [number, 1, 8, 8], about in [-1, 1], from seeded noise with `steps` Euler steps.

    `text`: word vectors [number, 4, width] for the joint model. `guidance` w > 0 adds w (conditional - unconditional), classifier-free
    (the unconditional one is the empty prompt); it needs text.
    """
    weight = next(model.parameters())
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 1, SIZE, SIZE, generator=source).to(weight.device, weight.dtype)
    if text is not None:
        text = text.to(weight.device, weight.dtype)
    elif guidance:
        raise ValueError("guidance compares a prompt with the empty one: pass text")
    times = torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(times):
        t = now.expand(number).to(weight.device, weight.dtype)
        v = velocity(model, x, t, text)
        if guidance and text is not None:
            v = v + guidance * (v - velocity(model, x, t, torch.zeros_like(text)))
        x = x + (then - now).item() * v
    return x
