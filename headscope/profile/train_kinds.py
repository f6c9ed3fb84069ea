"""Trains the classifier of `headscope.profile.kinds`: `python -m headscope.profile.train_kinds`.

Planted models give heads whose kind is certain, in half a minute on a CPU. Trained heads are seldom pure: they work on some rows and rest
on the first token on the others. So every planted head is also entered mixed with a sink head and with a uniform head of its own text, by
up to 60 %, and every sink head with another head by up to 35 %. Almost every feature is linear in the attention, and there the mixture is
exact; the two that are not (entropy, distance beyond the sink) are mixed all the same, which only blurs them.

The bundled induction model adds trained heads whose part was found by ablation. What no kind claims, far heads that copy nothing (a fixed
far offset, fixed columns), is one kind, "distant". Held out: planted models of other seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.models.planted import BlockLocal, Duplicate, Induction, Kind, Offset, Previous, Sink, Uniform, Vertical, planted_llama
from headscope.profile.features import FEATURES, features
from headscope.profile.kinds import FILE

KINDS = ("sink", "uniform", "previous_token", "local", "duplicate_token", "induction", "distant")
PROBES = ["sink", "streaming", "locality", "waad", "entropy", "previous_token", "duplicate_token", "induction", "razor"]
VOCAB = 300


def label(kind: Kind) -> str:
    """The classifier's name of a planted kind. An offset of up to 8 tokens, and a block, are local."""
    if isinstance(kind, Previous):
        return "previous_token"
    if isinstance(kind, Offset):
        return "previous_token" if kind.delta == 1 else "local" if kind.delta <= 8 else "distant"
    names = {
        Sink: "sink",
        Uniform: "uniform",
        Duplicate: "duplicate_token",
        Induction: "induction",
        Vertical: "distant",
        BlockLocal: "local",
    }
    return names[type(kind)]


def planted(seed: int) -> tuple[Any, list[str]]:
    """(profile, labels in order of its table) of one random planted model."""
    from headscope.scope import Scope

    draw = np.random.default_rng(seed)
    length = int(draw.choice([256, 512, 768]))
    often = draw.permutation(np.arange(2, VOCAB))
    heads: dict[tuple[int, int], Kind] = {(0, 0): Previous(), (0, 1): Duplicate(), (0, 2): Sink()}
    heads[0, 3] = Offset(int(draw.integers(2, 9)))
    heads[0, 4] = Offset(int(draw.integers(12, length // 3)))
    heads[1, 0], heads[1, 1] = Induction(), Sink()
    heads[1, 2] = BlockLocal(int(draw.choice([8, 16])))
    heads[1, 3] = Vertical(tokens=tuple(int(token) for token in often[3:9]))
    heads[1, 4] = Offset(int(draw.choice([0, 2, 3, 4, 6])))
    made = planted_llama(heads, layers=2, n_heads=8, vocab=VOCAB, max_positions=1024, sharpness=float(draw.uniform(6, 30)), seed=seed)
    scope = Scope(made.model, made.tokenizer(), name=f"planted {seed}")
    words = often[np.minimum(draw.zipf(1.3, length - 1) - 1, len(often) - 1)]
    ids = torch.tensor([made.bos, *words.tolist()])
    profile = scope.profile(PROBES, context=length, data=ids, seed=seed, maps=False, keep_statistics=False, progress=False)
    rows = zip(profile.table["layer"], profile.table["head"], strict=True)
    return profile, [label(made.heads[int(layer), int(head)]) for layer, head in rows]


def mixed(values: np.ndarray, labels: list[str], draw: np.random.Generator, copies: int = 4) -> tuple[np.ndarray, list[str]]:
    """The heads of one model, and copies of them mixed with a sink head or a uniform head by up to 60 %."""
    rests = {name: values[labels.index(name)] for name in ("sink", "uniform")}
    rows, names = [*values], [*labels]
    for row, name in zip(values, labels, strict=True):
        for rest in rests if name not in rests else ():
            for part in draw.uniform(0, 0.6, copies):
                rows.append((1 - part) * row + part * rests[rest])
                names.append(name)
        if name == "sink":
            for other, part in zip(draw.integers(len(values), size=copies), draw.uniform(0, 0.35, copies), strict=True):
                rows.append((1 - part) * row + part * values[other])
                names.append(name)
    return np.stack(rows), names


def bundled(seeds: range) -> tuple[np.ndarray, list[str]]:
    """The heads of the bundled induction model that its truth table names, on random tokens."""
    import headscope as hs
    from headscope.models.bundled import ROWS

    scope = hs.load("bundled:induction")
    known = next(row for row in ROWS if row.name == "induction").truth
    places = {(layer, head): kind for kind in ("previous_token", "induction") for layer, head in known[kind]}
    rows, names = [], []
    for seed in seeds:
        ids = torch.randint(3, int(scope.vocabulary or 0), (200,), generator=torch.Generator().manual_seed(seed))
        profile = scope.profile(PROBES, context=200, data=ids, seed=seed, maps=False, keep_statistics=False, progress=False)
        at = list(zip(profile.table["layer"], profile.table["head"], strict=True))
        values = features(profile)
        for place, kind in places.items():
            rows.append(values[at.index(place)])
            names.append(kind)
    return np.stack(rows), names


def collect(seeds: range, draw: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Training rows of many planted models."""
    rows, names = [], []
    for seed in seeds:
        profile, labels = planted(seed)
        more, told = mixed(features(profile), labels, draw)
        rows.append(more)
        names += told
        print(f"planted model {seed}: {len(told)} rows", file=sys.stderr)
    return np.concatenate(rows), names


def train(models: int = 60, held_out: int = 12) -> dict[str, Any]:
    """The classifier as plain data, with its accuracy on held-out planted models (pure heads, and mixed ones)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    draw = np.random.default_rng(0)
    rows, names = collect(range(models), draw)
    trained, kinds = bundled(range(10))
    rows, names = np.concatenate([rows, trained]), names + kinds
    scaler = StandardScaler().fit(rows)
    fitted = LogisticRegression(C=1.0, max_iter=5000, class_weight="balanced").fit(scaler.transform(rows), names)
    tests, told = collect(range(1000, 1000 + held_out), draw)
    guesses = fitted.predict(scaler.transform(tests))
    right = guesses == np.array(told)
    return {
        "features": list(FEATURES),
        "kinds": fitted.classes_.tolist(),
        "mean": scaler.mean_.round(6).tolist(),
        "scale": scaler.scale_.round(6).tolist(),
        "coefficients": fitted.coef_.round(5).tolist(),
        "intercepts": fitted.intercept_.round(5).tolist(),
        "trained": {"planted_models": models, "bundled": ["induction"], "rows": len(names), "seed": 0},
        "held_out": {
            "planted_models": held_out,
            "rows": len(told),
            "accuracy": round(float(right.mean()), 4),
            "by_kind": {kind: round(float(right[np.array(told) == kind].mean()), 4) for kind in sorted(set(told))},
        },
    }


if __name__ == "__main__":
    model = train()
    (Path(__file__).parent / FILE).write_text(json.dumps(model, indent=1) + "\n")
    print(json.dumps(model["held_out"], indent=1))
