"""What `headscope bench quality` judges by, and what it shows planners: two sets that have nothing in common.

Judged by: haystacks of the seed of the needle model's card, or texts that the user gives. Shown to planners and to the probes that they
stand on: a haystack of another seed, or the bundled essays. The silent failure this avoids is a planner that was fitted to its own
examination.

All prompts of a task have one length, a multiple of the kernels' tile where the text is long: then a batch needs no padding, and runs in
the kernels that a single long prompt would run in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headscope.errors import DataError, PlanError, refusal, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

SEED = 4242
"""Of the haystacks that are judged by, which is the one of the model's card."""
SHOWN = 1717
"""Of the haystack that planners are shown."""
DECODED = 64
"""Tokens of a text that are decoded one by one for a perplexity."""
STRETCH = 6
"""Words in a row that two texts do not share by chance."""
KINDS: dict[str, tuple[str, int, float]] = {
    "code": ("code", 8, 0.0),
    "entry": ("entry", 8, 0.0),
    "code of 32": ("code", 32, 0.0),
    "entry alike": ("entry", 8, 1.0),
}
"""Haystacks: what is hidden, how many of it, and in what share of them the needles have words in common."""


@dataclass(frozen=True, eq=False)
class Task:
    """What a model is judged by. `prompts` [n][N] ids, `answers` [n][a] ids that follow, of one length in a kind; `kinds` [n]; `data`: what
    these are, in words; `length`: tokens of prompt and answer, which plans are made for.
    """

    name: str
    prompts: tuple[Tensor, ...]
    answers: tuple[Tensor, ...]
    kinds: tuple[str, ...]
    length: int
    perplexity: bool = False
    data: str = ""

    def part(self, count: int) -> Task:
        """The first `count` of each kind."""
        seen: dict[str, int] = {}
        kept = []
        for number, kind in enumerate(self.kinds):
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] <= count:
                kept.append(number)
        prompts, answers = tuple(self.prompts[n] for n in kept), tuple(self.answers[n] for n in kept)
        return Task(self.name, prompts, answers, tuple(self.kinds[n] for n in kept), self.length, self.perplexity, self.data)


def needle_task(length: int, count: int, kinds: tuple[str, ...] = ("code", "entry")) -> Task:
    """`count` held-out haystacks of each kind of KINDS, one question each. Their first words are left out so far that all prompts have one
    length; a haystack whose needle would go with them is drawn anew.
    """
    prompts, answers, named = [], [], []
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name(PlanError, "kind of haystack", kind, KINDS)
        found = _haystacks(kind, length, count, SEED)
        prompts += [ids for ids, _ in found]
        answers += [words for _, words in found]
        named += [kind] * count
    told = f"{count} haystacks each of {', '.join(kinds)}, seed {SEED}, {len(prompts[0]):,} tokens"
    whole = len(prompts[0]) + max(len(words) for words in answers)
    return Task(f"needle {length:,}", tuple(prompts), tuple(answers), tuple(named), whole, data=told)


def shown_haystack(length: int) -> Tensor:
    """[N] ids of the haystack that probes read, of another seed."""
    return _haystacks("code", length, 1, SHOWN)[0][0]


def _haystacks(kind: str, length: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(prompt, answer) of `count` haystacks."""
    from headscope.models.bundled import data_needle
    from headscope.models.bundled.training import generator

    hidden, needles, alike = KINDS[kind]
    tile = 128 if length >= 1024 else 16
    whole = (length - 48) // tile * tile
    if whole < 64:
        raise refusal(DataError, f"haystacks of {length} tokens", "the question alone takes 20", "use 128 tokens or more")
    source = generator(seed + length, "cpu")
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < count:
        one = data_needle.batch(1, length, hidden, needles, 1, source, alike=alike)
        places = one.answers[0, 0]
        gone = int(places[0]) - whole
        if gone >= 0 and int(one.needle[0, 0]) > gone:
            found.append((torch.cat([one.ids[0, :1], one.ids[0, 1 + gone : int(places[0])]]), one.ids[0, places]))
    return found


def text_task(scope: Scope, length: int, count: int, texts: Path | None) -> Task:
    """`count` texts of exactly `length` tokens from a .txt or .jsonl, the last tokens of which are decoded.

    DataError without texts, and for texts that hold a stretch of the bundled essays, which probes and planners have read: whoever judged a
    plan by those would be told how well it was fitted, not how well it works.
    """
    from headscope.data.natural import bundled, natural_texts

    if texts is None:
        raise refusal(
            DataError,
            "no texts to judge by",
            "the bundled essays are what probes and planners set their dials on",
            f"pass --texts FILE, a .txt or .jsonl with {count} texts of {length:,} tokens that they have not seen, books for instance",
        )
    found = natural_texts(scope.tokenizer, length, texts=count, data=texts)
    shown = " ".join(bundled().values()).split()
    known = {tuple(shown[at : at + STRETCH]) for at in range(len(shown) - STRETCH + 1)}
    for one in found:
        words = (one.text or "").split()
        both = next((words[at : at + STRETCH] for at in range(len(words) - STRETCH + 1) if tuple(words[at : at + STRETCH]) in known), None)
        if both is not None:
            raise refusal(
                DataError, f"texts {texts}", f"the bundled essays say {' '.join(both)!r} too, and planners read those", "pass other texts"
            )
    told = f"{count} texts of {texts.name}"
    decoded = min(DECODED, length // 4)
    ids = [one.ids for one in found]
    prompts, answers = tuple(one[:-decoded] for one in ids), tuple(one[-decoded:] for one in ids)
    told += f", {length:,} tokens of which {decoded} are decoded"
    return Task(f"text {length:,}", prompts, answers, ("text",) * count, length, perplexity=True, data=told)
