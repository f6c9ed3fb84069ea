"""Measures `bundled:induction` on fixed held-out sequences, finds its heads, and writes evaluation.json, truth.json and CARD.md.

python -m headscope.models.bundled.evaluate_induction --model DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headscope.models.bundled import data_induction as data
from headscope.models.bundled.ablation import Head, ablated, search
from headscope.models.bundled.card import heads_table, load, training_lines, write
from headscope.models.bundled.training import generator, write_json

SEED = 12345
PERIODS = (16, 32, 64, 100, 127)


@torch.no_grad()
def accuracy(model: Any, *, period: int = 32, count: int = 64, seed: int = SEED, heads: Sequence[Head] = ()) -> float:
    """Share of the second copy's words (all but the first) that the model predicts, over `count` held-out sequences."""
    ids, labels = data.batch(count, period, generator(seed, "cpu"))
    with ablated(model.model.layers, heads, model.config.head_dim):
        guess = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
    asked = labels[:, 1:] >= 0
    return (guess == labels[:, 1:])[asked].double().mean().item()


@torch.no_grad()
def patterns(model: Any, *, period: int = 32, count: int = 64) -> dict[str, Any]:
    """Per head, [layer][head]: mean weight on the previous word (of the second copy's queries), and on the word after the earlier copy."""
    ids, _ = data.batch(count, period, generator(SEED, "cpu"))
    model.set_attn_implementation("eager")
    weights = model(input_ids=ids.to(model.device), output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    queries = torch.arange(1 + period, 2 * period)
    previous = [each[:, :, queries, queries - 1].mean((0, 2)).tolist() for each in weights]
    induction = [each[:, :, queries, queries - period + 1].mean((0, 2)).tolist() for each in weights]
    found = {"previous": previous, "induction": induction}
    return {name: [[round(value, 3) for value in row] for row in rows] for name, rows in found.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="evaluate bundled:induction")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's directory")
    where = parser.parse_args().model
    model = load(where, "cpu")
    table = {str(period): round(accuracy(model, period=period, count=128), 4) for period in PERIODS}
    every = [(layer, head) for layer in range(2) for head in range(4)]
    truth: dict[str, Any] = search(lambda heads: accuracy(model, heads=heads), every, floor=0.05)
    upper = search(lambda heads: accuracy(model, heads=heads), every[4:], floor=0.05)
    truth["greedy_layer1"] = upper["greedy"]
    truth["pattern"] = patterns(model)
    truth["task"] = "second copy of 32 words, 64 held-out sequences"
    seen = truth["pattern"]
    truth["previous_token"] = [[0, head] for head in range(4) if seen["previous"][0][head] > 0.5]
    truth["induction"] = [[1, head] for head in range(4) if seen["induction"][1][head] > 0.3]
    write_json(where / "evaluation.json", {"second_copy": table})
    write_json(where / "truth.json", truth)
    rows = "\n".join(f"| {period} | {value:.3f} |" for period, value in table.items())
    body = f"""
A Llama of two layers, four heads each, whose MLPs write nothing: attention alone. It continues words that were said before.

## Data
Random words out of 124 nouns, said twice (`data_induction.py`); training periods 8 to 100, held-out sequences from another seed ({SEED}).
It knows nothing but this: on sentences it is useless, which is the point.

## Numbers
Accuracy on the second copy (128 held-out sequences; chance 0.008):

| words before the repeat | accuracy |
| --- | --- |
{rows}

## Known heads
Weight on the previous word in layer 0: {seen["previous"][0]}.
Weight on the word after the earlier copy in layer 1: {seen["induction"][1]}.
Previous-token heads {truth["previous_token"]}, induction heads {truth["induction"]}.

{heads_table(truth)}
The four heads of layer 1 stand in for each other; only together are they missed. Greedy within layer 1 (head, accuracy with all up to
it gone): {"; ".join(f"{a}.{b} {value:.3f}" for a, b, value in truth["greedy_layer1"])}.

{training_lines(where, "train_induction")}"""
    write(where, "induction", body)


if __name__ == "__main__":
    main()
