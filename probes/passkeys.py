"""Texts whose answers lie far back: what gates are trained on, and what a head's distant keys are good for.

Three tasks, since no one text can be read by every model. `passkeys`: sequences of spelling words hidden in prose, asked for at the end, as
DuoAttention trains on, with our own wording; for any tokenizer that can spell the words. `needles`: the haystacks of the bundled needle
model in its own vocabulary. `repeats`: random tokens said twice, where the second copy is the answer; it needs no tokenizer at all.

Pieces are tokenized one by one and joined as ids, so that where an answer stands is known and never searched for: a search goes wrong
wherever the tokenizer joins a needle's edge with what surrounds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.text import MIN_BLOCK, TokenPool, repeated_random

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

Task = Literal["passkeys", "needles", "repeats"]
TASKS: tuple[Task, ...] = ("passkeys", "needles", "repeats")

WORDS = (
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike"),
    *("november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu"),
)
"""The spelling alphabet."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
OPENING = "What follows is a long collection of essays. Here and there a passkey is written between two of their sentences.\n\n"
NEEDLE = "\n\nNote it down: the words of the {ordinal} passkey are"
QUESTION = "\n\nQuestion: which words make up the {ordinal} passkey?\nAnswer:"
WORDS_EACH = (32, 16, 8, 4)
COUNTS = (10, 5, 3, 2, 1)
SHARE = 0.6
"""Most of a text that passkeys, questions and answers may take."""
NEEDLES = 8


@dataclass(frozen=True, slots=True, eq=False)
class PasskeyText:
    """One text: `ids` int64 [N]; `answer` bool [N], the tokens of questions and answers, which stand together at the end; `first`, where
    the first answer begins and ends, without its question, where that is known.
    """

    ids: Tensor
    answer: Tensor
    task: Task
    first: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def start(self) -> int:
        """Index of the first answer token."""
        return int(self.answer.int().argmax())

    def facts(self, sequences: int) -> dict[str, Any]:
        """The run card's entry: this text stands for all that were drawn like it."""
        sha256 = hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()
        return {"name": self.task, "kind": "own", "sha256": sha256, "sequences": sequences, "tokens": len(self)}


@dataclass(frozen=True, eq=False)
class PasskeyMaker:
    """Draws texts of one task for one model. `context`: the longest that it can make."""

    task: Task
    context: int
    scope: Scope

    @classmethod
    def of(cls, scope: Scope, context: int, task: str = "auto") -> PasskeyMaker:
        """`task` "auto" takes needles where the vocabulary is the needle model's, passkeys where it can spell them, else repeats.

        Raises ProbeError for a task that the model's vocabulary has no words for.
        """
        if task not in ("auto", *TASKS):
            raise unknown_name(ProbeError, "task", task, ("auto", *TASKS))
        tokenizer = _tokenizer(scope)
        able: dict[Task, bool] = {"needles": _knows_needles(tokenizer), "passkeys": _can_spell(tokenizer), "repeats": True}
        chosen = next((name for name in able if able[name] and task in (name, "auto")), None)
        if chosen is None:
            raise refusal(
                ProbeError, f"task {task!r} on {scope.name}", "its vocabulary does not have the words", "use task='auto' or 'repeats'"
            )
        if chosen == "repeats":
            context = min(context, 2 * len(TokenPool.of(scope).ordinary) + 1)
        return cls(chosen, context, scope)

    def text(self, length: int, generator: torch.Generator) -> PasskeyText:
        """A text of at most `length` tokens. ProbeError when that is too short for the task."""
        if self.task == "needles":
            return _needles(length, generator)
        if self.task == "repeats":
            return self._repeats(length, generator)
        return _passkeys(_tokenizer(self.scope), length, generator)

    def _repeats(self, length: int, generator: torch.Generator) -> PasskeyText:
        pool = TokenPool.of(self.scope)
        block = min((length - (pool.bos is not None)) // 2, len(pool.ordinary))
        if block < MIN_BLOCK:
            raise _too_short("repeats", length, 2 * MIN_BLOCK + 1)
        seed = int(torch.randint(1 << 31, (), generator=generator))
        ids = repeated_random(pool, block=block, repeats=2, seed=seed).ids
        return PasskeyText(ids, torch.arange(len(ids)) >= len(ids) - block, "repeats")


def _tokenizer(scope: Scope) -> Any:
    tokenizer = getattr(scope, "tokenizer", None)
    return getattr(tokenizer, "tokenizer", tokenizer)


def _knows_needles(tokenizer: Any) -> bool:
    from headscope.models.bundled.data_needle import ids_of

    return tokenizer is not None and ids_of().items() <= tokenizer.get_vocab().items()


def spells(scope: Scope) -> bool:
    """True for a model whose tokenizer can write ordinary prose."""
    return _can_spell(_tokenizer(scope))


def _can_spell(tokenizer: Any) -> bool:
    """True when the passkeys' words come apart, and neither they nor the questions hold an unknown word."""
    if tokenizer is None:
        return False
    try:
        spelled = [tuple(_pieces(tokenizer, f" {word}")) for word in WORDS]
        seen = {number for one in spelled for number in one} | set(_pieces(tokenizer, NEEDLE + QUESTION))
    except Exception:  # what a tokenizer without an unknown token raises at a word it lacks; `tokenizers` has no narrower class for it
        return False
    unknown = getattr(tokenizer, "unk_token_id", None)
    return len(set(spelled)) == len(WORDS) and all(spelled) and unknown not in seen


def _pieces(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _too_short(task: str, length: int, least: int) -> ProbeError:
    return refusal(ProbeError, f"task {task!r} in {length} tokens", f"it needs {least}", "raise the context")


def _passkeys(tokenizer: Any, length: int, generator: torch.Generator) -> PasskeyText:
    from headscope.data.natural import bundled

    words = [_pieces(tokenizer, f" {word}") for word in WORDS]
    told = [_pieces(tokenizer, NEEDLE.format(ordinal=ordinal)) for ordinal in ORDINALS]
    asked = [_pieces(tokenizer, QUESTION.format(ordinal=ordinal)) for ordinal in ORDINALS]
    stop = _pieces(tokenizer, ".")
    each_word = sum(map(len, words)) / len(words)
    count, each = _shape(length, each_word, max(map(len, told)) + max(map(len, asked)) + 2 * len(stop))
    drawn = torch.randint(len(WORDS), (count, each), generator=generator).tolist()
    spelled = [[number for word in row for number in words[word]] for row in drawn]
    needles = [[*told[place], *row, *stop] for place, row in enumerate(spelled)]
    answers = [[*asked[place], *row, *stop] for place, row in enumerate(spelled)]
    begin = list(tokenizer("a")["input_ids"])
    begin = begin[:1] if begin and begin[0] == getattr(tokenizer, "bos_token_id", None) else []
    begin += _pieces(tokenizer, OPENING)
    room = length - len(begin) - sum(map(len, needles)) - sum(map(len, answers))
    essays = list(bundled().values())
    first = int(torch.randint(len(essays), (), generator=generator))
    book: list[int] = []
    for number in range(first, first + len(essays) * (1 + length // 2048)):
        if len(book) >= room:
            break
        book += _pieces(tokenizer, essays[number % len(essays)] + "\n\n")
    book = book[:room]
    at = torch.linspace(0.05, 0.95, 1000)[torch.randperm(1000, generator=generator)[:count]].sort().values
    ids, last = begin, 0
    for place, needle in zip((at * len(book)).long().tolist(), needles, strict=True):
        ids = [*ids, *book[last:place], *needle]
        last = place
    ids = [*ids, *book[last:]]
    total = len(ids) + sum(map(len, answers))
    answer = torch.arange(total) >= len(ids)
    begun = len(ids) + len(asked[0])
    return PasskeyText(
        torch.tensor([*ids, *(number for row in answers for number in row)], dtype=torch.int64),
        answer,
        "passkeys",
        (begun, begun + len(spelled[0])),
    )


def _shape(length: int, word: float, around: int) -> tuple[int, int]:
    """(passkeys, words of each): the paper's 10 of 32 where they fit, shorter ones before fewer."""
    for count in COUNTS:
        for each in WORDS_EACH:
            if count * (2 * each * word + around) <= SHARE * length:
                return count, each
    raise _too_short("passkeys", length, int((2 * WORDS_EACH[-1] * word + around) / SHARE) + 1)


def _needles(length: int, generator: torch.Generator) -> PasskeyText:
    """A haystack of the needle model with as many questions as needles, cut behind the last answer."""
    from headscope.models.bundled.data_needle import CODE_ASKED, batch

    kind = ("code", "entry")[int(torch.randint(2, (), generator=generator))]
    question = len(CODE_ASKED.split())
    count = min(NEEDLES, length // (6 * question))
    if count < 1:
        raise _too_short("needles", length, 6 * question)
    made = batch(1, length, kind, count, count, generator)
    end = int(made.answers.max()) + 2  # the full stop behind the last answer
    ids = made.ids[0, :end]
    begin = _first_question(ids.tolist(), count)
    first = made.answers[0, int(made.answers[0, :, 0].argmin())]
    return PasskeyText(ids.clone(), torch.arange(end) >= begin, "needles", (int(first.min()), int(first.max()) + 1))


def _first_question(ids: Sequence[int], count: int) -> int:
    """Where the first of the last `count` questions begins."""
    from headscope.models.bundled.data_needle import ids_of

    word = ids_of()["question"]
    return [place for place, number in enumerate(ids) if number == word][-count]
