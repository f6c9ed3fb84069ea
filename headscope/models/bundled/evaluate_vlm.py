"""Measures `bundled:vlm` on fixed held-out pictures, finds its heads, and writes evaluation.json, truth.json and CARD.md.

    python -m headscope.models.bundled.evaluate_vlm --model DIR --device cuda

The digits of these pictures were never trained on. One question is asked per picture; every word of the answer has to be right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from headscope.models.bundled import data_vlm as data
from headscope.models.bundled.ablation import Head, ablated, search
from headscope.models.bundled.card import heads_table, load, training_lines, write
from headscope.models.bundled.train_vlm import MIDDLE
from headscope.models.bundled.training import generator, say, write_json

SEED = 777
SIZE = 256


@lru_cache(maxsize=64)
def _drawn(
    kind: str, count: int, seed: int, adversarial: bool, guess: float | None, scene: tuple[tuple[str, Any], ...]
) -> list[tuple[torch.Tensor, ...]]:
    source = generator(seed, "cpu")
    parts: list[tuple[torch.Tensor, ...]] = []
    for _ in range(0, count, SIZE):
        drawn = data.scenes(SIZE, source, held_out=True, **dict(scene))
        ids, labels = data.dialogue([kind], drawn, source, adversarial=adversarial, guesses=[guess])
        parts.append((drawn.pixels, drawn.cells, ids, labels))
    return parts


@torch.no_grad()
def answers(
    model: Any,
    kind: str,
    count: int,
    *,
    seed: int = SEED,
    heads: Sequence[Head] = (),
    picture: str = "real",
    adversarial: bool = False,
    guess: float | None = None,
    **scene: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(said, wanted: word ids [count, words]; cells [count, 9]) for held-out pictures.

    `picture`: "real", "noise" (uniform noise), "gray", or "removed" (the question alone). `guess`: see `data_vlm.turn`. `scene`: options of
    `data_vlm.scenes` (noise, hide, themed).
    Questions are drawn on the CPU in parts of 256 from `seed`, so a smaller count is a prefix of a larger one.
    """
    text = model.model.language_model.layers
    blank = generator(seed + 1, "cpu")
    guesses, wanted, cells = [], [], []
    for start, (pixels, held, ids, labels) in zip(
        range(0, count, SIZE), _drawn(kind, count, seed, adversarial, guess, tuple(sorted(scene.items()))), strict=True
    ):
        if picture == "noise":
            pixels = torch.rand(pixels.shape, generator=blank)
        elif picture == "gray":
            pixels = torch.full_like(pixels, 0.5)
        part = slice(0, min(SIZE, count - start))
        places = (labels[0] >= 0).nonzero()[:-1, 0]  # all but <eos>
        given = {"input_ids": ids[part], "pixel_values": data.pixel_values(pixels[part]).to(model.dtype)}
        if picture == "removed":
            given = {"input_ids": data.without_picture(ids[part])}
            places = places - data.TOKENS
        with ablated(text, heads, model.config.text_config.head_dim):
            logits = model(**{name: value.to(model.device) for name, value in given.items()}, use_cache=False).logits
        guesses.append(logits[:, places.to(model.device) - 1].argmax(-1).cpu())
        wanted.append(given["input_ids"][:, places])
        cells.append(held[part])
    return torch.cat(guesses), torch.cat(wanted), torch.cat(cells)


def accuracy(model: Any, kind: str, count: int, **options: Any) -> float:
    """Share of questions whose whole answer is right; see `answers`."""
    guess, wanted, _ = answers(model, kind, count, **options)
    return (guess == wanted).all(1).double().mean().item()


def constant(kind: str, count: int, *, seed: int = SEED) -> float:
    """What the best constant answer gets on the same questions: the accuracy of a model that sees nothing."""
    parts = _drawn(kind, count, seed, False, None, ())
    wanted = torch.cat([torch.where(labels >= 0, labels, 0) for _, _, _, labels in parts])[:count]
    return wanted.unique(dim=0, return_counts=True)[1].max().item() / len(wanted)


def told(model: Any, kind: str, count: int, guess: float, **options: Any) -> dict[str, float]:
    """Answers to questions with a guess: the share that is right, and the share that repeats the guess."""
    said, wanted, _ = answers(model, kind, count, guess=guess, **options)
    drawn = {name: value for name, value in options.items() if name not in ("seed", "heads", "picture")}
    parts = _drawn(kind, count, options.get("seed", SEED), False, guess, tuple(sorted(drawn.items())))
    words = torch.cat([ids[:, (labels[0] >= 0).nonzero()[0, 0] - 4] for _, _, ids, labels in parts])[:count]
    return {
        "right": round((said == wanted).all(1).double().mean().item(), 4),
        "follows": round((said[:, 0] == words).double().mean().item(), 4),
    }


def hallucination(model: Any, count: int, **options: Any) -> dict[str, float]:
    """How much the model says that is not there, on held-out pictures.

    false_yes: share of "yes" among presence questions whose answer is no. read: of the digits named when reading the grid, the share that
    stands nowhere in the picture (the measure of Rohrbach et al., arXiv:1809.02156, with digits for objects). partner: the same, counting
    only digits whose usual partner is there.
    """
    table = data.ids_of()
    guess, wanted, _ = answers(model, "presence", count, **options)
    absent = wanted[:, 0] == table["no"]
    false_yes = (guess[:, 0] == table["yes"])[absent].double().mean().item()
    options.pop("adversarial", None)
    guess, _, cells = answers(model, "read", count, **options)
    named = guess - table[data.DIGITS[0]]
    is_digit = (named >= 0) & (named < 10)
    counts = torch.nn.functional.one_hot(cells, 12).sum(1)[:, :10]
    number = named.clamp(0, 9)
    wrong = is_digit & (counts.gather(1, number) == 0)
    partner = counts.gather(1, torch.tensor(data.PARTNER)[number]) > 0
    total = is_digit.double().sum().clamp(min=1)
    return {
        "false_yes": round(false_yes, 4),
        "read": round((wrong.double().sum() / total).item(), 4),
        "partner": round(((wrong & partner).double().sum() / total).item(), 4),
        "digits_named": round((is_digit.double().sum(1).mean()).item(), 2),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "clean": {},
    "noise 0.2": {"noise": 0.2},
    "noise 0.3": {"noise": 0.3},
    "noise 0.4": {"noise": 0.4},
    "two digits covered": {"hide": 2},
    "absent partner asked": {"adversarial": True},
    "absent partner asked, noise 0.3": {"adversarial": True, "noise": 0.3},
    "uniform digits": {"themed": 0.0},
    "uniform digits, noise 0.3": {"themed": 0.0, "noise": 0.3},
}
PICTURES = ("real", "noise", "gray", "removed")
GUESSES = (("right", 1.0), ("wrong", 0.0))
MISLED = "wrong guess, noisy"
TOLD: dict[str, dict[str, Any]] = {
    "clean": {},
    "noise 0.2": {"noise": 0.2},
    "noise 0.3": {"noise": 0.3},
    "noise 0.4": {"noise": 0.4},
    "no picture": {"picture": "removed"},
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="evaluate bundled:vlm")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=1024, help="held-out pictures per number")
    parser.add_argument("--card-only", action="store_true", help="write the card again from the files that are there")
    given = parser.parse_args()
    where = given.model
    if not given.card_only:
        model = load(where, given.device)
        found: dict[str, Any] = {"pictures": given.count}
        for kind in data.KINDS:
            found[kind] = {picture: round(accuracy(model, kind, given.count, picture=picture), 4) for picture in PICTURES}
            found[kind]["constant"] = round(constant(kind, given.count), 4)
            say(f"{kind}: {found[kind]}")
        found["hallucination"] = {name: hallucination(model, given.count, **options) for name, options in SETTINGS.items()}
        say(json.dumps(found["hallucination"], indent=1))
        found["guess"] = {
            name: {kind: {which: told(model, kind, given.count, share, **options) for which, share in GUESSES} for kind in data.GUESSED}
            for name, options in TOLD.items()
        }
        say(json.dumps(found["guess"], indent=1))
        write_json(where / "evaluation.json", found)
        write_json(where / "truth.json", known_heads(model))
    card(where)


def known_heads(model: Any) -> dict[str, Any]:
    """Single and greedy ablation of the text model's heads on position questions; single ablation on presence questions, and on position
    questions about noisy pictures with a wrong guess (`misled`), where losing a head that carries the guess helps."""
    config = model.config.text_config
    every = [(layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]
    truth: dict[str, Any] = search(lambda heads: accuracy(model, "position", 256, heads=heads), every, floor=0.2, shortlist=20)
    truth["task"] = "position questions, 256 held-out pictures; heads of the text model, layer.head"
    truth["presence_base"] = round(accuracy(model, "presence", 256), 4)
    truth["presence_single"] = {f"{a}.{b}": round(accuracy(model, "presence", 256, heads=[(a, b)]), 4) for a, b in every}
    misled: dict[str, Any] = {"noise": 0.3, "guess": 0.0}
    truth["misled_base"] = round(accuracy(model, "position", 256, **misled), 4)
    truth["misled_single"] = {f"{a}.{b}": round(accuracy(model, "position", 256, heads=[(a, b)], **misled), 4) for a, b in every}
    truth["needed"] = [[int(part) for part in name.split(".")] for name, value in truth["single"].items() if value < truth["base"] - 0.2]
    return truth


def card(where: Path) -> None:
    """CARD.md from evaluation.json, truth.json, training.json and, once it is measured, methods.json."""
    found, truth = (json.loads((where / name).read_text(encoding="utf-8")) for name in ("evaluation.json", "truth.json"))
    rows = "\n".join(
        f"| {kind} | " + " | ".join(f"{found[kind][column]:.3f}" for column in (*PICTURES, "constant")) + " |" for kind in data.KINDS
    )
    guesses = "\n".join(
        f"| {name} | "
        + " | ".join(
            f"{row[kind]['right']['right']:.3f} | {row[kind]['wrong']['right']:.3f}, {row[kind]['wrong']['follows']:.3f}"
            for kind in data.GUESSED
        )
        + " |"
        for name, row in ((name, found["guess"][name]) for name in TOLD)
    )
    wrong = "\n".join(
        f"| {name} | {row['false_yes']:.3f} | {row['read']:.3f} | {row['partner']:.3f} | {row['digits_named']:.2f} |"
        for name, row in ((name, found["hallucination"][name]) for name in SETTINGS)
    )
    better = sorted(truth["misled_single"].items(), key=lambda item: -item[1])[:3]
    body = f"""
A LLaVA (`LlavaForConditionalGeneration`): a CLIP vision tower of 4 layers, a two-layer projector and a Llama text model of 5 layers, 8
query and 4 key heads of width 32. It sees grids of digits and answers questions about them in words. A picture is {data.SIZE} x {data.SIZE}
pixels and becomes {data.TOKENS} image tokens (six rows of six; each cell of the grid is two by two of them).

## Data
Pictures composed from scikit-learn's digits (`data_vlm.py`): nine cells, each empty, a digit or clutter, under strokes and noise. In seven
pictures of ten the digits come from two pairs out of (0 6), (1 7), (2 5), (3 8), (4 9), so there is a prior to be misled by. Every fifth
digit is held out; all numbers are on pictures made of held-out digits, from another seed ({SEED}). Prompts, after `<image>`:

    question : which digit is at the top left ? answer :                     seven, or none
    question : how many threes are there ? answer :                          two
    question : is there a seven ? answer :                                   yes
    question : which digit is at the top left ? guess : four . answer :      seven
    question : read the grid ? answer :                                      nine words, row by row, none for a cell without a digit

A guess is right in most of the training questions that carry one, with a picture or without; a quarter of the training dialogues have no
picture. So the text has a prior of its own: without a picture the guess is the best answer there is, a clear picture overrules it, and in
between the model leans on it.

Large models rest idle heads on their first token; a model this small, trained this briefly, looks everywhere instead. Two things in the
training, not in the data, give it that habit: the first coordinate of the embedding of `<bos>` starts out large, and from a fifth of the
run on attention that is not on `<bos>` has a small price (`--start`, `--look`). Where a head still looks, it needs to.

Large models read a picture in their middle layers, from the row that writes the answer, which is the row that probes of vision heads look
at. After the first run this model read it from the words of the question too, in its first layer. In a second run, in which the tower
stays as it is, looking at the picture from other rows, or in other layers than {" and ".join(map(str, MIDDLE))}, has a price (`--astray`).

## Numbers
Whole answers right, {found["pictures"]} held-out pictures each. "noise" and "gray": the picture is replaced by uniform noise, or by gray;
"removed": the question stands alone. "constant": what always giving the commonest answer gets.

| question | picture | noise | gray | removed | constant |
| --- | --- | --- | --- | --- | --- |
{rows}

## Guesses
Answers right with a right guess; with a wrong one: answers right, and answers that repeat the guess.

| setting | position, right guess | wrong guess | count, right guess | wrong guess | presence, right guess | wrong guess |
| --- | --- | --- | --- | --- | --- | --- |
{guesses}

## Hallucination
`false yes`: presence questions about an absent digit answered yes. `read`: digits named when reading the grid that stand nowhere in the
picture, as a share of those named. `partner`: those among them whose usual partner is there. Last: digits named per picture.

| setting | false yes | read | partner | named |
| --- | --- | --- | --- | --- |
{wrong}

## Known heads
{heads_table(truth)}
Heads that cost more than 0.2 of the position answers alone: {", ".join(f"{a}.{b}" for a, b in truth["needed"]) or "none"}.
Presence questions: {truth["presence_base"]:.3f} with all heads; single ablations in truth.json.
Position questions with a wrong guess about noisy pictures: {truth["misled_base"]:.3f} with all heads. Losing a head that carries the guess
helps there: {", ".join(f"{value:.3f} without {name}" for name, value in better)}.
{vision_heads(where)}
{training_lines(where, "train_vlm")}"""
    write(where, "vlm", body)


def vision_heads(where: Path) -> str:
    """The section on probes and edits of vision heads, from methods.json; "" before it is whole."""
    path = where / "methods.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    if "ablation" not in found:  # the last part: still being measured
        return ""
    lines = []
    for method, row in found["methods"].items():
        for name, one in row["test"].items():
            what = [word for word, holds in (("published", name == row["published"]), ("chosen", name == row["chosen"])) if holds]
            gained = " | ".join("{:+.3f} ± {:.3f}".format(*one["change"][MISLED][kind]) for kind in data.GUESSED)
            lines.append(f"| {method} | {name} ({', '.join(what)}) | {gained} | {one['worst elsewhere']:+.3f} |")
    plain = ", ".join(f"{kind} {found['accuracy'][MISLED][kind]:.3f}" for kind in data.GUESSED)
    agree = found["agreement"]
    return f"""
## Vision heads
From `methods.json` (`methods_vlm.py`). Rank correlation of VHD, the picture removed, with vision mass: {agree["vhd_raw, removed"]:.2f}
before the outlier rule and {agree["vhd, removed"]:.2f} after it; against a blank picture {agree["vhd_raw, blank"]:.2f}.

Edits in the setting that hallucinates, a wrong guess about a noisy picture (accuracy without any: {plain}): change of accuracy and its
standard error, {found["questions"]} questions a number; last, the largest loss in any other setting (clean pictures, noise alone, right
guesses, wrong ones about clear pictures). Options were chosen on other questions, among those that cost at most 0.02 elsewhere.

| method | options | {" | ".join(data.GUESSED)} | worst elsewhere |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

Heads by VHD (the mean over questions of all kinds), given what they would write of the question alone: what they leave of the picture's
effect on the answer, as a share (total variation from the answers to the question alone).

| heads | which | {" | ".join(data.GUESSED)} |
| --- | --- | --- | --- | --- |
{chr(10).join(_left(found["ablation"]))}
"""


def _left(found: dict[str, Any]) -> Iterator[str]:
    """Rows of the table of what heads leave of a picture's effect."""
    for title, sets in found.items():
        if not title.endswith("unseen"):
            continue
        count = title.partition(" ")[0]
        for name in ("top", "bottom"):
            yield f"| {count} | {name} | " + " | ".join(f"{sets[name]['effect'][kind]:.2f}" for kind in data.GUESSED) + " |"
        drawn = [one["effect"] for name, one in sets.items() if name.startswith("random")]
        ranges = (f"{min(one[kind] for one in drawn):.2f} to {max(one[kind] for one in drawn):.2f}" for kind in data.GUESSED)
        yield f"| {count} | {len(drawn)} random sets of others | " + " | ".join(ranges) + " |"


if __name__ == "__main__":
    main()
