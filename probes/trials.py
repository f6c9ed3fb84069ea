"""Trial: one prompt with a needle in it, as token ids, and where everything stands in them.

Every place is found from characters, in the very text that is tokenized: tokens belong to a span when their characters do. Searching the
needle's ids in the prompt instead goes wrong without a word, for a word behind a blank has other ids than the same word alone; comparing
sets of ids puts the span off by a few tokens; and a needle that is tokenized alone, decoded and tokenized again leaves a BOS in the middle
of the prompt, which is a sink that says "here".

Two sources make trials: the needles of `headscope.data.needles` in prose, for any model with a tokenizer, and the haystacks of
`bundled:needle`, which knows no other words than its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headscope.data.natural import bundled, read_documents
from headscope.data.needles import NEEDLES, Needle, hide, sentence_ends
from headscope.errors import DataError, ProbeError, refusal
from headscope.probes.text import special_ids

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

Span = tuple[int, int]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ASK = "Answer the question from the text above, in the words of the text. Question: {question}"
NOTHING = "N/A"
"""The question of a null prompt."""


@dataclass(frozen=True, eq=False)
class Trial:
    """`ids` int64 [N], the prompt. Spans are tokens [start, end): `answer`, what is to be copied; `needle`, the sentence around it;
    `question`, the words that ask. `reference`: the answer in words (empty: it is judged by its ids). `follow` [n]: the ids that a perfect
    answer begins with, where these are known. `stop`: an answer ends at this text, or at one of `stop_ids`. `null_ids`, `null_question`:
    the same prompt with a question that asks for nothing.
    """

    ids: Tensor
    answer: Span
    needle: Span
    question: Span
    reference: str = ""
    follow: Tensor | None = None
    stop: str = ""
    stop_ids: tuple[int, ...] = ()
    null_ids: Tensor | None = None
    null_question: Span | None = None
    name: str = ""
    length: int = 0
    depth: float = 0.0

    def __post_init__(self) -> None:
        for what, span in (("answer", self.answer), ("needle", self.needle), ("question", self.question)):
            if not 0 <= span[0] < span[1] <= len(self.ids):
                raise refusal(DataError, f"{what}={span}", f"the prompt has {len(self.ids)} tokens", "pass tokens [start, end) in it")

    def __repr__(self) -> str:
        return f"Trial({self.name!r}, N={len(self.ids)}, depth={self.depth:g}, answer={self.answer})"


# ---- any tokenizer ----------------------------------------------------------------------------------------------


def tokenized(tokenizer: Any, text: str, ranges: Sequence[Span], *, special: bool = True) -> tuple[Tensor, list[Span]]:
    """(ids [N], the token span of each character range) of a text. `special`: with the tokens that the tokenizer puts around a text.

    A token belongs to a range when one of its characters does. A tokenizer that cannot say where its tokens stand (a slow one) is asked
    by prefixes: the ids that a text shares with its beginning up to the range are the tokens before it.
    """
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        places = [(start, end) if end > start else None for start, end in found["offset_mapping"]]
        ids = list(found["input_ids"])
        spans = []
        for low, high in ranges:
            inside = [number for number, place in enumerate(places) if place and place[0] < high and place[1] > low]
            spans.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    else:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        spans = []
        for low, high in ranges:
            before, _ = _shared(tokenizer, text[:low].rstrip(), ids, special)
            same, more = _shared(tokenizer, text[:high], ids, special)
            spans.append((before, same + more))  # a token that reaches over the end of the range belongs to it
    for (low, high), (start, end) in zip(ranges, spans, strict=True):
        if start >= end:
            raise refusal(DataError, f"{text[low:high]!r}", "the tokenizer gave no token for it", "use another text")
    return torch.tensor(ids, dtype=torch.int64), spans


def _shared(tokenizer: Any, beginning: str, ids: list[int], special: bool) -> tuple[int, bool]:
    """How many ids a text shares with its beginning, and whether the beginning has others behind them. Special tokens that the tokenizer
    puts behind every text do not count.
    """
    own = list(tokenizer(beginning, add_special_tokens=special)["input_ids"]) if beginning else []
    marks = special_ids(tokenizer)
    same = 0
    while same < min(len(own), len(ids)) and own[same] == ids[same]:
        same += 1
    return same, any(number not in marks for number in own[same:])


# ---- prose ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """How a haystack and a question become a text: the model's chat template where it has one (`chat`), else plain text."""

    tokenizer: Any
    chat: bool

    def text(self, body: str, question: str, lead: str = "") -> tuple[str, int, int]:
        """(text, character at which the body begins, character at which the question begins)."""
        if not self.chat:
            whole = f"{body}\n\nQuestion: {question}\nAnswer:"
            return f"{whole} {lead}".rstrip(), 0, whole.rindex(question)
        asked = f"{body}\n\n{ASK.format(question=question)}"
        told = [{"role": "user", "content": asked}]
        whole = str(self.tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True))
        if whole.count(asked) != 1:
            raise refusal(DataError, "the chat template", "it does not give the user's words back as they are", "pass chat=False")
        start = whole.index(asked)
        return whole, start, start + asked.rindex(question)


def needle_trials(
    scope: Scope,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    needles: Sequence[Needle] = NEEDLES,
    per_cell: int = 1,
    chat: bool | None = None,
    haystack: Any = None,
) -> list[Trial]:
    """Trials on a grid of prompt lengths (tokens, question and template included) and depths, `per_cell` needles each, taken in turn.

    `chat`: ask through the chat template (None: where the tokenizer has one). `haystack`: texts to hide needles in, as
    `headscope.data.natural_texts` takes them; None are the bundled essays, trial i beginning with essay i. A haystack that is too short
    is repeated, which makes copies of itself but never of the needle. Raises ProbeError for a length that does not hold a needle.
    """
    tokenizer = scope.text_tokenizer
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    if chat and not getattr(tokenizer, "chat_template", None):
        raise refusal(ProbeError, "chat=True", f"the tokenizer of {scope.name} has no chat template", "pass chat=False")
    if not needles or not lengths or not depths or per_cell < 1:
        raise refusal(ProbeError, "an empty grid", "there is no trial in it", "pass lengths, depths and needles")
    prompt = Prompt(tokenizer, chat)
    hay = Haystack.read(tokenizer, haystack)
    out: list[Trial] = []
    for length in lengths:
        for depth in depths:
            for _ in range(per_cell):
                number = len(out)
                needle = needles[(number + number // len(needles)) % len(needles)]  # shifted each round, lest a needle keep its depth
                out.append(_placed(prompt, needle, hay, number, length, depth))
    return out


def _following(tokenizer: Any, text: str, ids: Tensor, answer: str, special: bool) -> Tensor | None:
    """The ids of an answer behind a prompt; None where the two share a token."""
    more = torch.tensor(list(tokenizer(f"{text} {answer}", add_special_tokens=special)["input_ids"]), dtype=torch.int64)
    return more[len(ids) :] if len(more) > len(ids) and torch.equal(more[: len(ids)], ids) else None


class Haystack:
    """Documents to hide needles in, with what each takes in tokens."""

    def __init__(self, tokenizer: Any, documents: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.documents = list(documents)
        self._sizes: dict[str, int] = {}

    @classmethod
    def read(cls, tokenizer: Any, data: Any) -> Haystack:
        """From what `headscope.data.natural_texts` takes as texts; None are the bundled essays."""
        return cls(tokenizer, bundled().values() if data is None else read_documents(data)[1])

    def size(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        if text not in self._sizes:
            self._sizes[text] = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._sizes[text]

    def of(self, tokens: int, first: int) -> str:
        """Documents in a circle from number `first` on, cut to about `tokens` tokens; ends with white space."""
        parts: list[str] = []
        place = first
        while tokens > 0:
            part = self.documents[place % len(self.documents)]
            if self.size(part) >= tokens:
                parts.append(self._cut(part, tokens))
                break
            parts.append(part)
            tokens, place = tokens - max(self.size(part), 1), place + 1
        return "\n\n".join(parts) + "\n"

    def _cut(self, text: str, tokens: int) -> str:
        """The beginning of a text, about `tokens` tokens long, by the share of its characters, refined once."""
        part = text[: round(len(text) * tokens / max(self.size(text), 1)) + 64]
        size = len(self.tokenizer(part, add_special_tokens=False)["input_ids"])
        return part if size <= tokens else part[: round(len(part) * tokens / size)]

    def two_sentences(self, first: int) -> int:
        """Tokens of a document's first two sentences."""
        text = self.documents[first % len(self.documents)] + "\n"
        ends = sentence_ends(text)
        return self.size(text[: ends[min(1, len(ends) - 1)]]) if ends else self.size(text)


def _placed(prompt: Prompt, needle: Needle, haystack: Haystack, first: int, length: int, depth: float) -> Trial:
    """One trial of at most `length` tokens: the haystack is cut at the last end of a sentence that fits."""
    special = not prompt.chat
    bare = len(prompt.tokenizer(prompt.text(needle.sentence, needle.question, needle.lead)[0], add_special_tokens=special)["input_ids"])
    hay = haystack.of(length - bare, first)
    ends = sentence_ends(hay)
    while len(ends) >= 2:
        body, at = hide(hay[: ends[-1]], needle.sentence, depth)
        trial = _made(prompt, needle, body, at, length, depth, special)
        if len(trial.ids) <= length:
            return trial
        ends.pop()
    least = bare + haystack.two_sentences(first)
    raise refusal(
        ProbeError,
        f"a context of {length} tokens",
        f"the needle {needle.name!r} with its question and two sentences around it takes about {least}",
        "use a longer context",
    )


def _made(prompt: Prompt, needle: Needle, body: str, at: int, length: int, depth: float, special: bool) -> Trial:
    text, start, question = prompt.text(body, needle.question, needle.lead)
    first = start + at
    low, high = needle.answer_at
    ranges = [(first + low, first + high), (first, first + len(needle.sentence)), (question, question + len(needle.question))]
    ids, (answer, sentence, asked) = tokenized(prompt.tokenizer, text, ranges, special=special)
    null, _, place = prompt.text(body, NOTHING, needle.lead)
    null_ids, (null_question,) = tokenized(prompt.tokenizer, null, [(place, place + len(NOTHING))], special=special)
    follow = _following(prompt.tokenizer, text, ids, needle.answer, special) if needle.lead and not prompt.chat else None
    return Trial(
        ids,
        answer,
        sentence,
        asked,
        reference=needle.answer,
        follow=follow,
        stop="\n",
        null_ids=null_ids,
        null_question=null_question,
        name=needle.name,
        length=length,
        depth=depth,
    )


# ---- the words of bundled:needle --------------------------------------------------------------------------------


def is_synthetic(scope: Scope) -> bool:
    """Whether a model's words are those of `bundled:needle`, so that prose means nothing to it."""
    from headscope.models.bundled.data_needle import ids_of

    tokenizer = getattr(scope.tokenizer, "tokenizer", scope.tokenizer)
    return tokenizer is not None and scope.vocabulary == len(ids_of()) and tokenizer.get_vocab() == ids_of()


def synthetic_trials(scope: Scope, *, lengths: Sequence[int], per_length: int = 6, needles: int = 8, seed: int = 0) -> list[Trial]:
    """Trials in the words of `bundled:needle`: haystacks with `needles` needles, one asked for, codes and entries in turn.

    A prompt ends with "answer : alice is", the key that the answer begins with, for that stands in the question too; what is left to be
    written is the value. The null prompt asks for the key <unk>. `seed`: of the haystacks, drawn one by one; depths are drawn too.
    """
    from headscope.models.bundled import data_needle as data

    if needles < 1 or per_length < 1 or min(lengths) < 96 + 12 * needles:
        least = 96 + 12 * max(needles, 1)
        raise refusal(
            ProbeError, f"a context of {min(lengths)} tokens", f"{needles} needles and a question take {least}", "use a longer one"
        )
    full_stop, unknown = data.ids_of()["."], scope.text_tokenizer.unk_token_id
    out = []
    for length in lengths:
        for number in range(per_length):
            kind = ("code", "entry")[number % 2]
            drawn = data.batch(1, length, kind, needles, 1, torch.Generator().manual_seed(1_000_003 * seed + 1009 * length + number))
            told, asked = (data.CODE, data.CODE_ASKED) if kind == "code" else (data.ENTRY, data.ENTRY_ASKED)
            values = 3 if kind == "code" else 2
            answers, first = drawn.answers[0, 0], int(drawn.needle[0, 0])
            end = int(answers[-values])
            begin = end - (len(asked.split()) - 1 - values)
            ids = drawn.ids[0, :end].clone()
            null = ids.clone()
            null[[begin + place for place, word in enumerate(asked.split()[: end - begin]) if word.startswith("*")]] = unknown
            stop = first + len(told.split())
            trial = Trial(
                ids,
                (stop - 1 - values, stop - 1),
                (first, stop),
                (begin, end),
                reference=scope.text_tokenizer.decode(drawn.ids[0, answers[-values:]].tolist()),
                follow=drawn.ids[0, answers[-values:]].clone(),
                stop_ids=(full_stop,),
                null_ids=null,
                null_question=(begin, end),
                name=kind,
                length=length,
                depth=round(float(drawn.depth[0, 0]), 3),
            )
            out.append(trial)
    return out


# ---- what a probe was given -------------------------------------------------------------------------------------


SHORTEST = 256
"""Tokens below which no length is taken by default: a needle and its question alone take half of that."""


def parts_of(context: int, count: int) -> list[int]:
    """`count` lengths in even steps up to the context, none shorter than SHORTEST unless the context is."""
    return [max(context * part // count, min(context, SHORTEST)) for part in range(1, count + 1)]


def trials_of(
    scope: Scope,
    data: Any,
    *,
    context: int,
    lengths: Sequence[int] = (),
    depths: Sequence[float] = DEPTHS,
    per_cell: int = 1,
    needles: Sequence[Needle] = NEEDLES,
    chat: bool | None = None,
    seed: int = 0,
) -> list[Trial]:
    """Trials from what a user gave a probe: Trials, Needles, texts for a haystack, or nothing (the model's own words, or prose).

    `lengths` default to the four quarters of `context` (see `parts_of`).
    """
    if isinstance(data, Trial):
        return [data]
    if isinstance(data, Sequence) and not isinstance(data, str) and data and all(isinstance(one, Trial) for one in data):
        return list(data)
    if not lengths:
        lengths = parts_of(context, 4)
    if isinstance(data, Needle):
        data = [data]
    if isinstance(data, Sequence) and not isinstance(data, str) and data and all(isinstance(one, Needle) for one in data):
        needles, data = list(data), None
    if isinstance(data, torch.Tensor):
        raise refusal(
            ProbeError, "token ids", "where a needle stands in them is not known", "pass Trials, Needles, or texts for a haystack"
        )
    if data is None and is_synthetic(scope):
        return synthetic_trials(scope, lengths=lengths, per_length=len(depths) * per_cell, seed=seed)
    return needle_trials(scope, lengths=lengths, depths=depths, needles=needles, per_cell=per_cell, chat=chat, haystack=data)


def context_of(scope: Scope, context: int | None, answer: int) -> int:
    """The longest prompt: what was asked for, else 2,048, inside what the model was made for with room for an answer."""
    limit = scope.max_length
    wanted = 2048 if context is None else context
    if limit is None:
        return wanted
    room = limit - answer
    if context is not None and context > limit:
        raise refusal(ProbeError, f"a context of {context} tokens", f"{scope.name} was made for {limit}", f"use {room} or less")
    return min(wanted, room)
