"""Tasks for patching and attribution: texts with two answers, made for whatever tokenizer the model has.

- "ioi": two people, one of them acts, and the text asks for the other (indirect object identification; Wang et al., arXiv:2211.00593, has
  the task; the sentences here are our own). Names are those of our list that are one token in the model's tokenizer, as they stand in a
  sentence. Corrupted: "swap" lets the other one act, so that the right answer changes sides; "abc" names three other people before the
  question, so that neither answer is better.
- "arithmetic": sums and differences of one digit, after examples. Corrupted: another second number.
- "repeat": random tokens, twice; the text ends where the second copy asks for a token. Corrupted: in the first copy the token that
  precedes the answer changes places with another one, so that what must be looked up has moved, while the answer stays where it was. Needs
  no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import DataError, ProbeError, refusal, unknown_name
from headscope.probes.contrast import ContrastPairs, from_texts
from headscope.probes.text import TokenPool

if TYPE_CHECKING:
    from headscope.scope import Scope


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Adam Alan Alex Alice Amy Andrea Andrew Angela Ann Anna Anne Anthony Arthur Ben Brian Carl Carol Charles Charlie Chris Christine "
    "Claire Dan Daniel David Diana Donald Edward Elizabeth Emily Emma Eric Eva Frank Fred George Grace Graham Harry Helen Henry "
    "Howard Ian Jack Jackie James Jane Jason Jean Jennifer Jessica Jim Joe John Jonathan Joseph Julia Karen Kate Kelly Ken Kevin "
    "Laura Lee Lewis Linda Lisa Louis Lucy Luke Margaret Maria Marie Mark Martin Mary Matthew Max Michael Michelle Mike Nick Oliver "
    "Patrick Paul Peter Philip Rachel Ray Richard Robert Roger Rose Ruth Ryan Sam Sandra Sarah Simon Stephen Steve Susan Thomas Tim "
    "Tom Tony Victoria Walter William"
)
PLACES = _words("market station library garden school office museum kitchen bakery harbour theatre workshop")
THINGS = _words("letter basket ticket book coat lamp ring parcel drum key flute map")
SENTENCES = (
    "After {first} and {second} had come to the {place}, {actor} handed the {thing} to",
    "While {first} and {second} were waiting at the {place}, {actor} offered the {thing} to",
    "When {first} and {second} met again at the {place}, {actor} passed the {thing} to",
    "Because {first} and {second} worked together in the {place}, {actor} lent the {thing} to",
)
"""Of as many words each, so that most pairs have one length and run in one batch."""
CORRUPTIONS = ("swap", "abc")
FEWEST_NAMES = 5


def single_token_names(scope: Scope) -> list[str]:
    """The names of our list that are one token of the scope's tokenizer after a word. ProbeError when there are fewer than five."""
    found = one_token(scope, NAMES)
    if len(found) < FEWEST_NAMES:
        raise refusal(
            ProbeError,
            f"task 'ioi' on {scope.name}",
            f"{len(found)} of {len(NAMES)} first names are one token of its tokenizer and {FEWEST_NAMES} are needed",
            "use task='repeat', or pass your own pairs",
        )
    return found


def one_token(scope: Scope, words: Sequence[str]) -> list[str]:
    """Those of the words that are one token after another word, each token once."""
    unknown = getattr(scope.text_tokenizer, "unk_token_id", None)
    base = _encoded(scope, "Then")
    found: dict[int, str] = {}
    for word in words:
        ids = _encoded(scope, f"Then {word}")
        if len(ids) == len(base) + 1 and ids[:-1] == base and ids[-1] != unknown:
            found.setdefault(ids[-1], word)
    return list(found.values())


def _encoded(scope: Scope, text: str) -> list[int]:
    """Ids of a text, without special tokens at its end."""
    ids: list[int] = scope.encode(text)[0].tolist()
    while ids and ids[-1] in scope.text_tokenizer.all_special_ids and ids[-1] != getattr(scope.text_tokenizer, "unk_token_id", None):
        ids = ids[:-1]
    return ids


def ioi(scope: Scope, count: int, draw: torch.Generator, corruption: str = "swap") -> ContrastPairs:
    """Who gets it? `count` pairs, the two orders of the names in equal parts."""
    if corruption not in CORRUPTIONS:
        raise unknown_name(ProbeError, "corruption of task 'ioi'", corruption, CORRUPTIONS)
    names = single_token_names(scope)
    places, things = (one_token(scope, words) or list(words) for words in (PLACES, THINGS))
    texts = []
    for place in range(count):
        order = torch.randperm(len(names), generator=draw)[:5].tolist()
        subject, other, *three = (names[i] for i in order)
        fill = {
            "place": places[int(torch.randint(len(places), (1,), generator=draw))],
            "thing": things[int(torch.randint(len(things), (1,), generator=draw))],
        }
        sentence = SENTENCES[(place // 2) % len(SENTENCES)]
        first, second = (subject, other) if place % 2 else (other, subject)
        clean = sentence.format(first=first, second=second, actor=subject, **fill)
        if corruption == "swap":
            spoilt = sentence.format(first=first, second=second, actor=other, **fill)
        else:
            spoilt = sentence.format(first=three[0], second=three[1], actor=three[2], **fill)
        texts.append((clean, spoilt, f" {other}", f" {subject}"))
    return from_texts(scope, texts, f"ioi ({corruption})")


def arithmetic(scope: Scope, count: int, draw: torch.Generator, corruption: str = "swap") -> ContrastPairs:
    """How much is it? Sums and differences whose result is one digit, after four examples."""
    texts: list[tuple[str, str, str, str]] = []
    while len(texts) < count:
        lines = [_sum(draw) for _ in range(4)]
        first, second, sign = _sum(draw)
        others = [n for n in range(1, 10) if n != second and 0 < _result(first, n, sign) < 10]
        if not others:
            continue
        changed = others[int(torch.randint(len(others), (1,), generator=draw))]
        examples = "".join(f"{a}{s}{b}={_result(a, b, s)}\n" for a, b, s in lines)
        answer, wrong = (str(_result(first, n, sign)) for n in (second, changed))
        texts.append((f"{examples}{first}{sign}{second}=", f"{examples}{first}{sign}{changed}=", answer, wrong))
    return from_texts(scope, texts, "arithmetic")


def _sum(draw: torch.Generator) -> tuple[int, int, str]:
    """Two numbers and a sign whose result is 1 to 9."""
    while True:
        first, second, coin = (int(torch.randint(1, 10, (1,), generator=draw)) for _ in range(3))
        sign = "+-"[coin % 2]
        if 0 < _result(first, second, sign) < 10:
            return first, second, sign


def _result(first: int, second: int, sign: str) -> int:
    return first + second if sign == "+" else first - second


PERIOD = 16


def repeat(scope: Scope, count: int, draw: torch.Generator, corruption: str = "swap", period: int = PERIOD) -> ContrastPairs:
    """What came next last time? `period` different random ordinary tokens, and as many of them again as it takes to ask."""
    pool = TokenPool.of(scope)
    if len(pool.ordinary) < period:
        given = f"task 'repeat' with {period} different tokens"
        raise refusal(ProbeError, given, f"{scope.name} has {len(pool.ordinary)} ordinary ones", "pass your own pairs")
    ordinary = torch.from_numpy(pool.ordinary)
    begin = torch.tensor([] if pool.bos is None else [pool.bos], dtype=torch.int64)
    ask = period // 2
    places = [place for place in range(period - 1) if abs(place - ask) > 1]  # so that neither token is the other's answer
    clean, corrupt, answers, wrongs = [], [], [], []
    for _ in range(count):
        block = ordinary[torch.randperm(len(ordinary), generator=draw)[:period]]
        other = places[int(torch.randint(len(places), (1,), generator=draw))]
        moved = block.clone()
        moved[[ask, other]] = block[[other, ask]]
        clean.append(torch.cat([begin, block, block[: ask + 1]]))
        corrupt.append(torch.cat([begin, moved, block[: ask + 1]]))
        answers.append(int(block[ask + 1]))
        wrongs.append(int(block[other + 1]))
    return ContrastPairs(tuple(clean), tuple(corrupt), torch.tensor(answers), torch.tensor(wrongs), "repeat")


Builder = Callable[..., ContrastPairs]
TASKS: dict[str, Builder] = {"ioi": ioi, "arithmetic": arithmetic, "repeat": repeat}
NEEDS_WORDS = ("ioi", "arithmetic")


def check_task(probe: str, task: str, count: int, corruption: str) -> None:
    """ProbeError for a task that does not exist."""
    if task not in TASKS:
        raise unknown_name(ProbeError, f"task of probe {probe!r}", task, TASKS)
    if corruption not in CORRUPTIONS:
        raise unknown_name(ProbeError, f"corruption of probe {probe!r}", corruption, CORRUPTIONS)
    if corruption != "swap" and task != "ioi":
        raise refusal(ProbeError, f"corruption={corruption!r} of task {task!r}", "it is one of task 'ioi'", "leave it out")
    if count < 1:
        raise refusal(ProbeError, f"pairs={count}", "it counts pairs", "pass pairs=16")


def pairs_for(scope: Scope, data: Any, task: str, count: int, corruption: str, draw: torch.Generator) -> ContrastPairs:
    """The user's pairs, or `count` pairs of a task."""
    if data is not None:
        return ContrastPairs.given(scope, data)
    if task in NEEDS_WORDS and scope.tokenizer is None:
        why = f"{scope.name} was scoped without a tokenizer, and the task is in words"
        raise refusal(ProbeError, f"task {task!r}", why, "use task='repeat', or pass your own pairs of ids")
    try:
        return TASKS[task](scope, count, draw, corruption)
    except DataError as error:
        raise ProbeError(f"task {task!r} on {scope.name}: its tokenizer does not fit the task ({error})") from None


__all__ = ["CORRUPTIONS", "TASKS", "arithmetic", "check_task", "ioi", "pairs_for", "repeat", "single_token_names"]
