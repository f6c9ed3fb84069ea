"""What taking heads away does: recall of a passkey in filler, without the copy heads of SmolLM2 and without as many others.

Recall is the share of the key's digits that are the likeliest next token when the earlier ones are given. The digits of one key share its
text, so the unit of every error is the text. Random sets are drawn from all heads but the five, weaker copy heads among them, so that no
knowledge of the answer goes into the control.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.bench.effects_stats import Estimate, block

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions.base import Head, Intervention
    from headscope.interventions.head_mask import Mode
    from headscope.scope import Scope

COPY: tuple[Head, ...] = ((18, 6), (17, 3), (17, 4), (6, 0), (18, 7))
"""The five heads of SmolLM2-135M that attend most to a passkey while it is being said."""
START = "There is important info hidden inside a lot of irrelevant text. Find it and memorize it. "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: `texts` of about `tokens` tokens, `modes` of HeadMask, `randoms` sets of as many heads."""

    texts: int = 3
    tokens: int = 590
    modes: tuple[Mode, ...] = ("zero",)
    randoms: int = 3


FULL = Sizes(40, 590, ("zero", "uniform", "mean"), 20)


def passkey(scope: Scope, number: int, tokens: int) -> tuple[Tensor, int]:
    """(ids [1, N], where the answer's digits begin) of text `number`: its key and its place in the filler are drawn from that number."""
    draw = random.Random(number)
    key, depth = "".join(draw.choices("0123456789", k=5)), draw.uniform(0.1, 0.9)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    copies = max((tokens - 60) // len(scope.encode(FILLER)[0]), 1)
    before = int(copies * depth)
    text = scope.encode(START + FILLER * before + needle + FILLER * (copies - before) + QUESTION)[0]
    answer = scope.encode(" " + key)[0]
    return torch.cat([text, answer])[None], len(text) + len(answer) - len(key)


def measure(scope: Scope, sizes: Sizes, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One table, a row per set of heads and mode."""
    from headscope.interventions import HeadMask
    from headscope.interventions.prefix import Prefix
    from headscope.interventions.record import mean_outputs

    texts = [passkey(scope, number, sizes.tokens) for number in range(sizes.texts)]
    prefixes = [Prefix(scope, ids) for ids, _ in texts]

    def recall(edit: Intervention | None) -> Tensor:
        """[texts] float64."""
        out = []
        for prefix, (ids, start) in zip(prefixes, texts, strict=True):
            guess = prefix.run(*() if edit is None else (edit,))[0, start - 1 : -1].argmax(-1).cpu()
            out.append((guess == ids[0, start:].cpu()).double().mean())
        return torch.stack(out)

    every = list(HeadMask("all").pairs(scope))
    others = [passkey(scope, 1000 + number, sizes.tokens)[0] for number in range(4)]
    usual = mean_outputs(scope, others, every) if "mean" in sizes.modes else None

    def mask(heads: Sequence[Head], mode: Mode) -> Intervention:
        if mode == "mean" and usual is not None:
            return HeadMask(list(heads), "mean", usual[[every.index(head) for head in heads]])
        return HeadMask(list(heads), mode)

    rows = [["none", "", str(Estimate.of(recall(None))), ""]]
    for mode in sizes.modes:
        one = recall(mask(COPY, mode))
        rows.append([f"the {len(COPY)} copy heads", mode, str(Estimate.of(one)), ""])
        say(f"without the copy heads ({mode}): recall {Estimate.of(one)}")
        pool = [head for head in every if head not in COPY]
        sets = [recall(mask(random.Random(seed).sample(pool, len(COPY)), mode)) for seed in range(sizes.randoms)]
        means = [float(values.mean()) for values in sets]
        under = f"{sum(value < 0.95 for value in means)} of {len(means)} below 0.95, the lowest {min(means):.3f}"
        rows.append([f"{len(COPY)} other heads, mean of {len(means)} draws", mode, str(Estimate.of(torch.cat(sets))), under])
    title = f"HeadMask, {scope.name}, passkeys in {texts[0][0].shape[1]} tokens, {len(texts)} texts"
    return [block(title, ("heads taken away", "mode", "recall", "draws"), rows)]


__all__ = ["COPY", "FULL", "Sizes", "measure", "passkey"]
