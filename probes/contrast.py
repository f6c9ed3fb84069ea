"""Contrast pairs: a clean and a corrupted text of equal length, and the two answers between which the model is asked to choose.

Patching and attribution read one number of a run: the logit of the right answer less that of the wrong one, at the last token. The two
texts of a pair have the same number of tokens, so that position i of one is position i of the other; patching between texts of different
lengths would move activations to other words without a word.

Pairs that a model does not solve say nothing about how it solves them. They are left out, and when fewer than half are left the probe is
refused with what the model answered: a model that guesses between the two answers solves a third of them, and its heads would be scored
for its luck.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import DataError, ProbeError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope


LEAST_SOLVED = 0.5
"""Share of the pairs that a model must solve."""


@dataclass(frozen=True, eq=False)
class ContrastPairs:
    """n pairs: `clean` and `corrupt`, lists of ids [N_i] int64, N_i alike within a pair; `answers`, `wrongs`: ids [n], right and wrong
    after the clean text. `name`: of the task. Raises DataError for pairs that do not fit.
    """

    clean: tuple[Tensor, ...]
    corrupt: tuple[Tensor, ...]
    answers: Tensor
    wrongs: Tensor
    name: str = "given pairs"

    def __post_init__(self) -> None:
        count = len(self.clean)
        if not count or not count == len(self.corrupt) == len(self.answers) == len(self.wrongs):
            given = f"{count} clean texts, {len(self.corrupt)} corrupted ones, {len(self.answers)} and {len(self.wrongs)} answers"
            raise refusal(DataError, given, "they go together one by one", "pass as many of each, and at least one")
        for place, (clean, corrupt) in enumerate(zip(self.clean, self.corrupt, strict=True)):
            if clean.shape != corrupt.shape or clean.dim() != 1 or len(clean) < 2:
                raise refusal(
                    DataError,
                    f"pair {place} of {self.name}: {len(clean)} and {len(corrupt)} tokens",
                    "position i of one text must be position i of the other",
                    "change words for words of as many tokens",
                )
        same = (self.answers == self.wrongs).nonzero()
        if len(same):
            raise refusal(DataError, f"pair {int(same[0])} of {self.name}", "both its answers are one token", "pass answers that differ")

    def __len__(self) -> int:
        return len(self.clean)

    def select(self, keep: Sequence[int]) -> ContrastPairs:
        """Some of the pairs."""
        index = torch.tensor(list(keep), dtype=torch.int64)
        clean, corrupt = (tuple(listed[i] for i in keep) for listed in (self.clean, self.corrupt))
        return ContrastPairs(clean, corrupt, self.answers[index], self.wrongs[index], self.name)

    def batches(self, size: int) -> list[ContrastPairs]:
        """The pairs in batches of one length each, at most `size` in one."""
        lengths: dict[int, list[int]] = {}
        for place, clean in enumerate(self.clean):
            lengths.setdefault(len(clean), []).append(place)
        return [self.select(listed[i : i + size]) for listed in lengths.values() for i in range(0, len(listed), size)]

    @property
    def fact(self) -> dict[str, Any]:
        """The card's entry."""
        hasher = hashlib.sha256()
        for one in (*self.clean, *self.corrupt, self.answers, self.wrongs):
            hasher.update(one.numpy().astype("<i8").tobytes())
        tokens = max(len(one) for one in self.clean)
        return {"name": self.name, "kind": "contrast pairs", "sha256": hasher.hexdigest(), "sequences": 2 * len(self), "tokens": tokens}

    @classmethod
    def given(cls, scope: Scope, data: Any) -> ContrastPairs:
        """From what a user passes: ContrastPairs, or a list of {"clean", "corrupt", "answer", "wrong"} of texts. An answer is what follows
        the clean text, with its space; where both answers begin alike, the common tokens are put behind both texts.
        """
        if isinstance(data, ContrastPairs):
            return data
        keys = {"clean", "corrupt", "answer", "wrong"}
        listed = data if isinstance(data, Sequence) and not isinstance(data, str) else None
        if listed is None or not all(isinstance(one, Mapping) and set(one) == keys for one in listed):
            raise refusal(
                DataError,
                f"a {type(data).__name__} as contrast pairs",
                "a pair is two texts and two answers",
                'pass ContrastPairs, or a list of {"clean": ..., "corrupt": ..., "answer": ..., "wrong": ...}',
            )
        return from_texts(scope, [(one["clean"], one["corrupt"], one["answer"], one["wrong"]) for one in data], "given pairs")


def from_texts(scope: Scope, texts: Sequence[tuple[str, str, str, str]], name: str) -> ContrastPairs:
    """Pairs from (clean, corrupt, answer, wrong). DataError for texts of different length, or answers that begin and end alike."""
    clean, corrupt, answers, wrongs = [], [], [], []
    for place, (right_text, corrupt_text, answer, wrong) in enumerate(texts):
        begin = scope.encode(right_text)[0].cpu()
        right, other = (scope.encode(right_text + one)[0].cpu() for one in (answer, wrong))
        differ = next((i for i, (a, b) in enumerate(zip(right, other, strict=False)) if a != b), None)
        if differ is None or differ < len(begin) or not torch.equal(right[: len(begin)], begin):
            raise refusal(
                DataError,
                f"pair {place}: answers {answer!r} and {wrong!r} after {right_text[-30:]!r}",
                "the text and its answers do not meet at the border of a token, or the answers do not differ",
                "begin an answer with its space, and end the text without one",
            )
        clean.append(right[:differ])
        corrupt.append(torch.cat([scope.encode(corrupt_text)[0].cpu(), right[len(begin) : differ]]))
        answers.append(int(right[differ]))
        wrongs.append(int(other[differ]))
    return ContrastPairs(tuple(clean), tuple(corrupt), torch.tensor(answers), torch.tensor(wrongs), name)


def last_logits(scope: Scope, ids: Sequence[Tensor]) -> Tensor:
    """Logits [n, V] after texts of one length."""
    takes = scope._forward_parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    if "use_cache" in takes:
        extra["use_cache"] = False
    out: Tensor = scope.model(input_ids=torch.stack(list(ids)).to(scope.device), **extra).logits[:, -1]
    return out


def contrast(logits: Tensor, pairs: ContrastPairs) -> Tensor:
    """logit(answer) - logit(wrong) [n] float64 on the CPU."""
    right, wrong = (logits.gather(1, one.to(logits.device)[:, None])[:, 0].double() for one in (pairs.answers, pairs.wrongs))
    return (right - wrong).cpu()


@dataclass(frozen=True, eq=False)
class Solved:
    """The pairs that a model solves, with its logit differences [n] on both texts; `tried`: how many there were."""

    pairs: ContrastPairs
    clean: Tensor
    corrupt: Tensor
    tried: int

    @property
    def numbers(self) -> dict[str, float]:
        """For the run card."""
        return {
            "pairs_tried": float(self.tried),
            "pairs_solved": float(len(self.pairs)),
            "logit_difference_clean": float(self.clean.mean()),
            "logit_difference_corrupt": float(self.corrupt.mean()),
        }


@torch.no_grad()
def solve(scope: Scope, pairs: ContrastPairs, batch: int, probe: str) -> Solved:
    """The pairs where the right answer leads by itself and the corruption takes away from its lead, in batches of one length.

    Raises ProbeError, saying what the model answered, when these are fewer than half.
    """
    kept: list[ContrastPairs] = []
    clean: list[Tensor] = []
    corrupt: list[Tensor] = []
    said: list[tuple[Tensor, int, int]] = []
    for part in pairs.batches(batch):
        logits = last_logits(scope, part.clean)
        right, spoilt = contrast(logits, part), contrast(last_logits(scope, part.corrupt), part)
        solved = (right > 0) & (spoilt < right)
        said += [(one, int(logits[i].argmax()), int(part.answers[i])) for i, one in enumerate(part.clean) if not solved[i]]
        good = solved.nonzero().flatten().tolist()
        if good:
            kept.append(part.select(good))
            clean.append(right[good])
            corrupt.append(spoilt[good])
    count = sum(len(part) for part in kept)
    if count < LEAST_SOLVED * len(pairs):
        raise refusal(
            ProbeError,
            f"probe {probe!r} on {scope.name}",
            f"it solves {count or 'none'} of {len(pairs)} pairs of {pairs.name}, which guessing does too: {_said(scope, said)}",
            "choose a task that the model can do, or pass your own pairs",
        )
    whole = ContrastPairs(
        tuple(one for part in kept for one in part.clean),
        tuple(one for part in kept for one in part.corrupt),
        torch.cat([part.answers for part in kept]),
        torch.cat([part.wrongs for part in kept]),
        pairs.name,
    )
    return Solved(whole, torch.cat(clean), torch.cat(corrupt), len(pairs))


def _said(scope: Scope, said: list[tuple[Tensor, int, int]]) -> str:
    """One example of what was answered."""
    ids, answer, right = said[0]
    if scope.tokenizer is None:
        return f"token {answer} where {right} was right"
    decode = scope.text_tokenizer.decode
    return f"after ...{decode(ids[-12:].tolist())!r} it says {decode([answer])!r} where {decode([right])!r} was right"


__all__ = ["ContrastPairs", "Solved", "contrast", "from_texts", "last_logits", "solve"]
