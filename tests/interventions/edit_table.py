"""Interventions with settings that change something, and how a model is run under them."""

from __future__ import annotations

import torch

from headscope.interventions import (
    Add,
    BoostScores,
    HeadMask,
    KeyBias,
    Lerp,
    Mix,
    Noise,
    PatchHeads,
    Redistribute,
    Replace,
    ReplaceQueries,
    RescaleRows,
    Scale,
    SetBias,
    SetRows,
    Temperature,
)

H = [(0, 1), (1, 3), (1, 0)]
VALUES = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def one_of_each() -> list:
    """Every registered intervention, with settings that change something."""
    return [
        KeyBias(H, [0, 2], 0.7),
        SetBias(H, slice(1, 4), bias=-0.5),
        SetBias(H, "first", mass=0.3),
        BoostScores(H, [1, 3], 0.6),
        Temperature(H, 2.0),
        ReplaceQueries(H, "zero"),
        Redistribute(H, "first", 0.4),
        Redistribute(H, [0, 1], 0.4, [2, 3]),
        Mix(H, "identity", 0.5),
        Mix(H, "uniform", 0.5),
        Mix(H, "argmax", 0.5),
        SetRows(H, [5, 6], positions=slice(7, None)),
        RescaleRows(H, 0.7),
        Scale(H, 2.0),
        Scale(H, [0.5, 1.0, 2.0]),
        Replace(H, VALUES),
        Lerp(H, VALUES, 0.3, positions="last_prompt"),
        Lerp(H, VALUES, [0.1, 0.2, 0.3]),
        Add(H, VALUES, 0.5),
        Noise(H, 0.5, seed=3),
        HeadMask(H),
        HeadMask(H, "uniform"),
        HeadMask(H, "noise", seed=2),
        HeadMask(H, "mean", VALUES),
        PatchHeads(H, VALUES),
        PatchHeads(H, VALUES, "q", positions=[5]),
        PatchHeads("0.0,0.1", VALUES[:1], "v", positions=[2]),
    ]


def name_of(edit):
    return f"{edit.name}-{edit.algebra()}" if hasattr(edit, "algebra") else None


def logits(model, tokens, **kw):
    with torch.no_grad():
        out = model(tokens, **kw)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
