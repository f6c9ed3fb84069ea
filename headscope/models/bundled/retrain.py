"""Trains again, compares: does a training script, run once more, give the numbers on the card?

    python -m headscope.models.bundled.train_vlm --out AGAIN
    python -m headscope.models.bundled.evaluate_vlm --model AGAIN
    python -m headscope.models.bundled.retrain --model headscope/models/bundled/weights/vlm --again AGAIN

Writes retraining.json beside the weights, from which the card takes its sentence. A card without it would promise what nobody tried.
Give every run that was made: a good one must not hide a bad one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headscope.models.bundled.training import say, write_json

SETTINGS = ("count", "constant", "few", "pictures", "classifier", "digits_named")
YARDSTICKS = ("counts", "held_out", "training", "noise")
"""Leaves and branches of evaluation.json that say how a number was measured, or measure something else than the model."""


def numbers(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every number of an evaluation that depends on the model."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key not in (YARDSTICKS if isinstance(value, dict) else SETTINGS):
                yield from numbers(value, f"{name}.{key}" if name else key)
    elif isinstance(found, list):
        for place, value in enumerate(found):
            yield from numbers(value, f"{name}.{place}")
    else:
        yield name, float(found)


def compare(shipped: Path, again: Path) -> dict[str, Any]:
    """Whether the weights are the same bit for bit, and the largest difference between numbers that both evaluations have."""
    was, now = (json.loads((where / "training.json").read_text(encoding="utf-8")) for where in (shipped, again))
    one, two = (dict(numbers(json.loads((where / "evaluation.json").read_text(encoding="utf-8")))) for where in (shipped, again))
    if one.keys() != two.keys():
        raise ValueError(f"{again}: its evaluation has other rows than {shipped}'s: {sorted(one.keys() ^ two.keys())[:3]}")
    apart = {name: round(abs(one[name] - two[name]), 4) for name in one}
    worst = max(apart, key=lambda name: apart[name])
    return {
        "seed": now["seed"],
        "device": now["device"],
        "torch": now["torch"],
        "same_weights": was["sha256"] == now["sha256"],
        "numbers": len(one),
        "largest_difference": apart[worst],
        "median_difference": round(statistics.median(apart.values()), 4),
        "where": worst,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="compare a retrained bundled model with the shipped one")
    parser.add_argument("--model", type=Path, required=True, help="the shipped checkpoint's directory")
    parser.add_argument("--again", type=Path, nargs="+", required=True, help="directories of retrained and evaluated checkpoints")
    given = parser.parse_args()
    rows = [compare(given.model, again) for again in given.again]
    say(json.dumps(rows, indent=1))
    write_json(given.model / "retraining.json", rows)


if __name__ == "__main__":
    main()
