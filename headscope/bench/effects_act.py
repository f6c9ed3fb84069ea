"""What ACT does to answers: heads calibrated on some items, judged on others made of other words, beside random sets of heads.

Prompts of two classes from templates, since no data set is at hand: they show whether a head filter found on some items holds on others,
not what the paper reports on its data sets. A template's items differ in words, subject and order, and no adjective of the calibration is
among the held-out ones. Which heads gain is decided on the calibration's mean log probability; the held-out items decide nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.bench.effects_stats import Estimate, block, difference, mcnemar, rank

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions.base import Head
    from headscope.scope import Scope

SETTING = "I went there with my friends last week. The {s} was {a} and the rest of the evening was {b}. I told everyone about it."
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "review": (
        f"Read the review and decide if the writer liked it. The review: {SETTING} Was the review good or bad? The review was",
        " good",
        " bad",
    ),
    "positive": (f"Text: {SETTING}\nIs the text positive or negative?\nAnswer:", " positive", " negative"),
    "liked": (f"{SETTING}\nQuestion: did the writer like it, yes or no?\nAnswer:", " yes", " no"),
    "mood": (f"A friend wrote to me: {SETTING} After that evening my friend must have felt very", " happy", " sad"),
}
"""Name -> text, the answer to a pleased text, the answer to a displeased one."""


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


GOOD = (
    words("great wonderful excellent superb lovely brilliant charming delightful amazing beautiful perfect fantastic"),
    words("nice fun fine warm clever splendid pleasant enjoyable exciting magical marvellous outstanding"),
)
BAD = (
    words("terrible awful boring dreadful horrible poor weak dull bad ugly disappointing annoying"),
    words("cold noisy silly dirty messy unpleasant tedious painful depressing frustrating miserable disgusting"),
)
"""Words to calibrate on, words to judge on."""
SUBJECTS = ("movie", "film", "book", "show", "play", "story", "song", "game", "meal", "hotel")
KEEP = 10


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `calibration`: items per template, 0 to take the heads in FOUND; `smaller`: how many of them a smaller
    calibration has, drawn `draws` times; `held`: held-out items; `randoms`: random sets of KEEP heads."""

    templates: tuple[str, ...] = ("review",)
    calibration: int = 0
    smaller: int = 24
    draws: int = 0
    held: int = 96
    randoms: int = 5
    batch: int = 32


FULL = Sizes(tuple(TEMPLATES), calibration=256, draws=4, held=600, randoms=20, batch=128)
FOUND: dict[str, tuple[Head, ...]] = {
    "review": ((20, 1), (13, 8), (11, 6), (16, 5), (16, 3), (1, 6), (16, 1), (10, 4), (10, 1), (11, 8)),
    "positive": ((9, 7), (1, 3), (4, 3), (2, 1), (5, 8), (1, 7), (3, 3), (25, 7), (3, 8), (11, 6)),
    "liked": ((2, 5), (11, 6), (2, 1), (5, 0), (29, 4), (13, 0), (8, 7), (16, 1), (6, 8), (7, 0)),
    "mood": ((24, 3), (16, 4), (1, 0), (8, 5), (11, 1), (1, 2), (2, 3), (11, 4), (20, 1), (16, 5)),
}
"""The heads of SmolLM2-135M that FULL's calibration found on each template."""


@dataclass(frozen=True, eq=False)
class Items:
    """Batches of prompts of one length each: `ids` list of [n, N], `right` list of bool [n], whether the writer is pleased, `labels` ids of
    the two answers."""

    ids: list[Tensor]
    right: list[Tensor]
    labels: tuple[int, int]

    def pick(self, output: Tensor) -> Tensor:
        """[n, 2] float64 on the CPU: the answers' logits at the last token of [n, N, V]. All others are let go, they are gigabytes."""
        return output[:, -1, list(self.labels)].double().cpu()

    def judge(self, picked: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(right answers bool [n], log p of the right one among the two [n] float64) from what was picked of each batch."""
        both = torch.cat([one.log_softmax(-1) for one in picked])
        pleased = torch.cat(self.right)
        logp = torch.where(pleased, both[:, 0], both[:, 1])
        return (both[:, 0] > both[:, 1]) == pleased, logp


def items(scope: Scope, template: str, part: int, count: int, *, batch: int = 32, seed: int = 0) -> Items:
    """`count` different items of a template, half of them pleased; `part` 0: calibration words, 1: held-out words."""
    text, yes, no = TEMPLATES[template]
    draw = random.Random(1000 * seed + part)
    texts: list[str] = []
    pleased: list[bool] = []
    while len(texts) < count:
        kind = len(texts) % 2 == 0
        first, second = draw.sample((GOOD if kind else BAD)[part], 2)
        said = text.format(s=draw.choice(SUBJECTS), a=first, b=second)
        if said not in texts:
            texts.append(said)
            pleased.append(kind)
    encoded = [scope.encode(one)[0] for one in texts]
    lengths: dict[int, list[int]] = {}
    for place, ids in enumerate(encoded):
        lengths.setdefault(len(ids), []).append(place)
    listed = [places[first : first + batch] for places in lengths.values() for first in range(0, len(places), batch)]
    begin = scope.encode(texts[0])[0]
    labels = tuple(int(scope.encode(texts[0] + answer)[0][len(begin)]) for answer in (yes, no))
    return Items(
        [torch.stack([encoded[place] for place in one]) for one in listed],
        [torch.tensor([pleased[place] for place in one]) for one in listed],
        (labels[0], labels[1]),
    )


def gains(scope: Scope, given: Items, say: Callable[[str], None]) -> tuple[list[Head], Tensor]:
    """Every head, and what ACT on it alone adds to each item's log probability: [heads, n] float64."""
    import headscope as hs
    from headscope.interventions import ACT

    seen: list[Tensor] = []

    def metric(output: Tensor, index: int) -> float:
        seen.append(given.pick(output))
        return 0.0

    table = hs.sweep(scope, lambda head: ACT([head]), "all", metric, data=list(given.ids), name="ACT, one head at a time").table
    heads: list[Head] = [(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]
    size = len(given.ids)
    logp = torch.stack([given.judge(seen[first : first + size])[1] for first in range(0, len(seen), size)])
    say(f"{len(heads)} heads on {logp.shape[1]} items")
    return heads, logp[1:] - logp[0]


def top(heads: Sequence[Head], gained: Tensor, keep: int = KEEP) -> tuple[Head, ...]:
    """The heads that gain most, best first; none that loses."""
    order = gained.argsort(descending=True, stable=True).tolist()
    return tuple(heads[place] for place in order[:keep] if float(gained[place]) > 0)


def measure(scope: Scope, sizes: Sizes, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A table per template."""
    return [_template(scope, name, sizes, say) for name in sizes.templates]


def _template(scope: Scope, name: str, sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    from headscope.interventions import ACT
    from headscope.interventions.prefix import Prefix

    every = ACT("all").pairs(scope)
    sets: dict[str, tuple[Head, ...]] = {}
    if sizes.calibration or name not in FOUND:
        count = sizes.calibration or sizes.smaller
        heads, gained = gains(scope, items(scope, name, 0, count, batch=sizes.batch), say)
        mean = gained.mean(1)
        for keep in (5, KEEP, 20, 40):
            sets[f"best {keep}, {count} items"] = top(heads, mean, keep)
        draw = torch.Generator().manual_seed(0)
        for number in range(sizes.draws if count > sizes.smaller else 0):
            some = torch.randperm(gained.shape[1], generator=draw)[: sizes.smaller]
            sets[f"best {KEEP}, {sizes.smaller} items, draw {number}"] = top(heads, gained[:, some].mean(1))
        sets[f"worst {KEEP}"] = top(heads, -mean)
        say(f"{name}: {int((mean > 0).sum())} of {len(heads)} heads gain; best {sets[f'best {KEEP}, {count} items']}")
    else:
        sets[f"best {KEEP}, found before"] = FOUND[name]
    chosen = next(label for label in sets if label.startswith(f"best {KEEP}"))
    randoms = [tuple(random.Random(seed).sample(every, KEEP)) for seed in range(sizes.randoms)]

    held = items(scope, name, 1, sizes.held, batch=sizes.batch)
    prefixes = [Prefix(scope, ids) for ids in held.ids]
    for one in prefixes:
        one.output = one.output[:, -1:].clone()  # all that is read; the rest is a gigabyte a batch

    def answers(heads: Sequence[Head] | None) -> tuple[Tensor, Tensor]:
        edits = () if heads is None else (ACT(list(heads)),)
        return held.judge([held.pick(one.run(*edits)) for one in prefixes])

    base = answers(None)
    found = {label: answers(heads) for label, heads in sets.items() if heads}
    say(f"{name}: held-out items, base {Estimate.of(base[0])}, {chosen} {Estimate.of(found[chosen][0])}")
    drawn = [answers(heads) for heads in randoms]
    right, logp = found[chosen]
    means = [float(one[0].double().mean()) for one in drawn]
    best = max(range(len(drawn)), key=means.__getitem__)
    rows = [["no edit", *_row(base, base)]]
    rows += [[label, *_row(one, base)] for label, one in found.items() if "draw" not in label]
    few = [one for label, one in found.items() if "draw" in label]
    if few:
        rows.append([f"best {KEEP}, {sizes.smaller} items: mean of {len(few)} draws", *_several(few)])
    rows.append(["all heads", *_row(answers(every), base)])
    rows.append([f"random {KEEP}: mean of {len(drawn)} sets", *_several(drawn)])
    rows.append([f"random {KEEP}: the most accurate set", *_row(drawn[best], base)])
    reached = rank(float(right.double().mean()), means), rank(float(logp.mean()), [float(one[1].mean()) for one in drawn])
    gap, p = difference(right, drawn[best][0]), mcnemar(right, drawn[best][0])
    title = (
        f"ACT, {scope.name}, template {name!r}, {len(right)} held-out items. Random sets and {chosen}: in accuracy {reached[0]}, in log p "
        f"{reached[1]}; more accurate than the best of them by {gap}, exact p {p:.2g}"
    )
    return block(title, ["heads", "accuracy", "log p of the right answer", "accuracy gained", "exact p"], rows)


def _row(one: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> list[str]:
    gained = "" if one is base else str(difference(one[0], base[0]))
    return [str(Estimate.of(one[0])), str(Estimate.of(one[1])), gained, "" if one is base else f"{mcnemar(one[0], base[0]):.2g}"]


def _several(many: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
    """The mean over sets and, in place of an error, the lowest and highest."""
    out = []
    for place in (0, 1):
        means = [float(one[place].double().mean()) for one in many]
        out.append(f"{sum(means) / len(means):.3f} ({min(means):.3f} to {max(means):.3f})")
    return [*out, "", ""]


__all__ = ["FOUND", "FULL", "TEMPLATES", "Items", "Sizes", "gains", "items", "measure", "top"]
