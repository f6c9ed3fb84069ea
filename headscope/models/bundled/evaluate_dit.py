"""Measures the bundled diffusion transformers on held-out digits and writes evaluation.json and CARD.md.

    python -m headscope.models.bundled.evaluate_dit --model DIR

Three numbers, since each alone can be gamed: the distance to the nearest held-out digit, how sure a classifier is, and the Frechet distance
to the held-out digits in the space of their first 16 principal components (mean and covariance of both, as FID does with Inception's).
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.models.bundled import data_dit as data
from headscope.models.bundled.card import training_lines, write
from headscope.models.bundled.flow import embed, sample
from headscope.models.bundled.training import say, write_json

SEED = 99


@lru_cache(maxsize=1)
def _judge() -> tuple[Any, Any, np.ndarray, np.ndarray, float]:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    pictures, labels = data.pictures(False)
    held, held_labels = data.pictures(True)
    train, test = pictures.flatten(1).numpy(), held.flatten(1).numpy()
    classifier = LogisticRegression(max_iter=2000, C=0.1).fit(train, labels.numpy())
    return classifier, PCA(16, random_state=0).fit(train), train, test, float(classifier.score(test, held_labels.numpy()))


def quality(pictures: torch.Tensor) -> dict[str, float]:
    """distance, confidence and frechet of generated pictures [n, 1, 8, 8] (about in [-1, 1]); smaller, larger and smaller is better.

    distance: mean over pictures of the Euclidean distance to the nearest held-out digit, in units of pixels in [-1, 1].
    """
    classifier, pca, _, test, _ = _judge()
    flat = pictures.detach().float().cpu().flatten(1).clamp(-1, 1).numpy()
    distance = np.sqrt(((flat[:, None] - test[None]) ** 2).sum(-1)).min(1).mean()
    return {
        "distance": round(float(distance), 4),
        "confidence": round(float(classifier.predict_proba(flat).max(1).mean()), 4),
        "frechet": round(_frechet(pca.transform(flat), pca.transform(test)), 4) + 0.0,
    }


def _frechet(one: np.ndarray, two: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    a, b = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = np.real(sqrtm(a @ b))
    return float(((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


def read(pictures: torch.Tensor) -> np.ndarray:
    """The digit that the classifier reads in each picture."""
    return np.asarray(_judge()[0].predict(pictures.detach().float().cpu().flatten(1).clamp(-1, 1).numpy()))


def evaluate(model: Any, where: Path, kind: str, count: int) -> dict[str, Any]:
    """The table of a model: quality by number of steps, and for the joint one how often the word asked for is what is drawn."""
    held, _ = data.pictures(True)
    seen, _ = data.pictures(False)
    found: dict[str, Any] = {"count": count, "classifier": round(_judge()[4], 4), "held_out": quality(held), "training": quality(seen)}
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(SEED))
    found["noise"] = quality(noise)
    empty = embed([""] * count, where) if kind == "sd3" else None
    for steps in (4, 8, 16, 32):
        found[f"steps_{steps}"] = quality(sample(model, count, steps=steps, seed=SEED, text=empty))
        say(f"{steps} steps: {found[f'steps_{steps}']}")
    if kind == "sd3":
        words = [data.DIGITS[number % 10] for number in range(count)]
        text = embed([f"a handwritten digit {word}" for word in words], where)
        for guidance in (0.0, 2.0):
            drawn = sample(model, count, steps=8, seed=SEED, text=text, guidance=guidance)
            obeyed = float((read(drawn) == np.arange(count) % 10).mean())
            found[f"words_guidance_{guidance:.0f}"] = quality(drawn) | {"obeyed": round(obeyed, 4)}
            say(f"words, guidance {guidance}: {found[f'words_guidance_{guidance:.0f}']}")
    return found


def main() -> None:
    """Command line."""
    from headscope.models.bundled.diffusion import read_transformer

    parser = argparse.ArgumentParser(description="evaluate bundled:dit or bundled:sd3")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--count", type=int, default=512, help="pictures per number")
    given = parser.parse_args()
    model = read_transformer(given.model, dtype=torch.float32, device="cpu")
    kind = "sd3" if type(model).__name__.startswith("SD3") else "dit"
    write_json(given.model / "evaluation.json", evaluate(model, given.model, kind, given.count))
    card(given.model, kind)


def card(where: Path, kind: str) -> None:
    """CARD.md from evaluation.json, config.json and training.json."""
    found = json.loads((where / "evaluation.json").read_text(encoding="utf-8"))
    config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    heads = f"{config['num_attention_heads']} heads of width {config['attention_head_dim']}"
    shape = f"{config['num_layers']} layers, {heads}, one token per pixel (64)"
    names = {"held_out": "held-out digits", "training": "training digits", "noise": "noise"}
    names |= {f"steps_{steps}": f"unconditional, {steps} steps" for steps in (4, 8, 16, 32)}
    names |= {"words_guidance_0": "words, 8 steps", "words_guidance_2": "words, 8 steps, guidance 2"}
    rows = "\n".join(
        f"| {name} | {found[key]['distance']:.2f} | {found[key]['confidence']:.3f} | {found[key]['frechet']:.2f} | "
        + (f"{found[key]['obeyed']:.3f} |" if "obeyed" in found[key] else "|")
        for key, name in names.items()
        if key in found
    )
    if kind == "dit":
        what = f"A plain `DiTTransformer2DModel` ({shape}), unconditional: the label is always 0."
    else:
        what = f"""An `SD3Transformer2DModel` ({shape}): joint attention over 64 picture tokens and 4 word tokens. Words are fixed
random vectors (`text.safetensors`), `headscope.models.bundled.flow.embed` looks them up; the empty prompt is unconditional."""
    state, real = found["steps_8"], found["training"]
    room = [
        f"{'worse' if (state[name] > real[name]) == smaller else 'not worse'} in {name} ({state[name]:.2f} and {real[name]:.2f})"
        for name, smaller in (("distance", True), ("confidence", False), ("frechet", True))
    ]
    note = "\nWith words the classifier already reads what was asked for, so guidance could hardly show itself." if kind == "sd3" else ""
    body = f"""
{what}
`headscope.models.bundled.flow.sample` draws pictures.

## Data
scikit-learn's digits, 8 x 8 in [-1, 1], every fifth held out; rectified flow; the averaged weights are kept.

## Numbers
{found["count"]} pictures from fixed noise. Distance to the nearest held-out digit (Euclidean), confidence of a logistic regression
({found["classifier"]:.3f} on held-out digits), Frechet distance to the held-out digits in 16 principal components, and how often the
digit asked for is the one read.

| pictures | distance | confidence | Frechet | obeyed |
| --- | --- | --- | --- | --- |
{rows}

The state to judge guidance in: unconditional, 8 steps. Against the training digits, the pictures are {"; ".join(room)} there.{note}

{training_lines(where, "train_dit")}"""
    write(where, kind, body)


if __name__ == "__main__":
    main()
