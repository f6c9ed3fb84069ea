"""Haystacks of plain sentences with codes and entries hidden in them, and questions about those at the end.

    the quiet miller carried a copper kettle to the old barn . ... the code of alice is amber falcon river . ...
    entry mellow heron : 42 17 . ... question : what is the code of alice ? answer : alice is amber falcon river .

Names, adjectives, nouns and numbers of needles also occur in the haystack's own sentences, so no word gives a needle away: only the
question tells which one is meant. Every needle of a haystack is of the same form as the one that is asked for.

Sentences are drawn on the device, thousands at a time: a template is a row of (first id, how many ids) per slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from headscope.models.bundled.words import (
    ADJECTIVES,
    BOS,
    EOS,
    NAMES,
    NOUNS,
    NUMBERS,
    PLACES,
    SPECIAL,
    TIMES,
    VERBS,
    build_tokenizer,
)

LONGEST = 16384
GLUE = tuple("the a of in at to and with near from is was on by . : ? , ; code entry what value question answer who had then some".split())  # noqa: SIM905
GROUPS = {"name": NAMES, "noun": NOUNS, "adj": ADJECTIVES, "verb": VERBS, "place": PLACES, "time": TIMES, "num": NUMBERS}
WORDS = tuple(dict.fromkeys([*GLUE, *(word for group in GROUPS.values() for word in group)]))
BOS_ID, EOS_ID = SPECIAL.index(BOS), SPECIAL.index(EOS)

HAYSTACK = tuple(
    line.strip()
    for line in """
    the *adj *noun *verb the *noun near the *place .
    *name *verb a *adj *noun at the *place *time .
    *time *name *verb the *noun and the *noun .
    *name and *name *verb *num *noun ; then the *place was *adj .
    the *place of *name was *adj and *adj .
    *name had *num *adj *noun from the *place .
    a *noun was on the *noun by the *place .
    the *noun of the *place is *adj , and *name *verb it *time .
    *name *verb the *adj *noun with a *noun .
    some *noun from the *adj *place was *adj *time .
    in the *place *name *verb *num *noun with *name .
    who *verb the *noun of *name ? *name *verb the *noun *time .
    the *adj *noun : a *noun , a *noun and a *adj *noun .
    *name was in the *adj *place with the *noun of *name .
    """.strip().splitlines()
)  # fmt: skip
CODE = "the code of *name is *noun *noun *noun ."
CODE_ASKED = "question : what is the code of *name ? answer : *name is *noun *noun *noun ."
ENTRY = "entry *adj *noun : *num *num ."
ENTRY_ASKED = "question : what is the value of entry *adj *noun ? answer : *adj *noun : *num *num ."
WIDTH = 20
POOL = 14


def tokenizer() -> Any:
    """The word-level tokenizer of the model."""
    return build_tokenizer((*WORDS, "it"), length=LONGEST)


@lru_cache(maxsize=1)
def ids_of() -> dict[str, int]:
    """Word -> id."""
    return {word: number for number, word in enumerate([*SPECIAL, *WORDS, "it"])}


def span(slot: str) -> tuple[int, int]:
    """(first id, number of ids) of a slot: a group of words such as *noun, or one word."""
    table = ids_of()
    if slot.startswith("*"):
        group = GROUPS[slot[1:]]
        return table[group[0]], len(group)
    return table[slot], 1


@lru_cache(maxsize=4)
def _templates(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    """(first ids, numbers of ids, lengths) of the templates, and mean and standard deviation of the lengths."""
    first = torch.zeros(len(HAYSTACK), WIDTH, dtype=torch.long)
    size = torch.ones(len(HAYSTACK), WIDTH, dtype=torch.long)
    for row, line in enumerate(HAYSTACK):
        for column, slot in enumerate(line.split()):
            first[row, column], size[row, column] = span(slot)
    lengths = torch.tensor([len(line.split()) for line in HAYSTACK])
    return first.to(device), size.to(device), lengths.to(device), lengths.double().mean().item(), lengths.double().std().item()


def _sentences(count: int, number: int, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [count, number, WIDTH], lengths [count, number]) of random haystack sentences."""
    first, size, lengths, _, _ = _templates(str(source.device))
    kind = torch.randint(0, len(HAYSTACK), (count, number), generator=source, device=source.device)
    draw = torch.rand(count, number, WIDTH, generator=source, device=source.device)
    return first[kind] + (draw * size[kind]).long(), lengths[kind]


def _distinct(count: int, number: int, size: int, source: torch.Generator) -> torch.Tensor:
    """[count, number] different numbers below `size` in every row."""
    return torch.rand(count, size, generator=source, device=source.device).argsort(1)[:, :number]


def _pool(count: int, group: str, pool: int, source: torch.Generator) -> torch.Tensor:
    """[count, pool] ids: for every haystack a few words of a group."""
    first, size = span(group)
    return first + _distinct(count, pool, size, source)


def _alike(words: torch.Tensor, kind: str, share: float, pool: int, source: torch.Generator) -> torch.Tensor:
    """In a share of the haystacks the needles' words come from a small pool, so that different needles have words in common."""
    count, number, _ = words.shape
    near = words.clone()
    nouns = _pool(count, "*noun", pool, source)
    if kind == "code":
        pick = torch.randint(0, pool, (count, number, 3), generator=source, device=source.device)
        near[..., 1:] = nouns.gather(1, pick.flatten(1)).unflatten(1, (number, 3))
    else:
        pair = _distinct(count, number, pool * pool, source)
        near[..., 0] = _pool(count, "*adj", pool, source).gather(1, pair // pool)
        near[..., 1] = nouns.gather(1, pair % pool)
    chosen = torch.rand(count, 1, 1, generator=source, device=source.device) < share
    return torch.where(chosen, near, words)


def _needles(
    count: int, number: int, kind: str, source: torch.Generator, alike: float, pool: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(needle ids [count, number, a], question ids [count, number, b], answer words): needle and question agree slot by slot."""
    told, asked = (CODE.split(), CODE_ASKED.split()) if kind == "code" else (ENTRY.split(), ENTRY_ASKED.split())
    slots = [slot for slot in told if slot.startswith("*")]
    words = torch.stack(
        [span(slot)[0] + torch.randint(0, span(slot)[1], (count, number), generator=source, device=source.device) for slot in slots],
        dim=-1,
    )
    if kind == "code":
        words[..., 0] = span("*name")[0] + _distinct(count, number, len(NAMES), source)
    else:  # pairs of (adjective, noun), all different in a row
        pair = _distinct(count, number, len(ADJECTIVES) * len(NOUNS), source)
        words[..., 0] = span("*adj")[0] + pair // len(NOUNS)
        words[..., 1] = span("*noun")[0] + pair % len(NOUNS)
    if alike:
        words = _alike(words, kind, alike, pool, source)

    def fill(line: list[str]) -> torch.Tensor:
        out = torch.empty(count, number, len(line), dtype=torch.long, device=source.device)
        seen = 0
        for place, slot in enumerate(line):
            if slot == ":" and line[place - 1] == "answer":
                seen = 0  # the answer says the key again
            out[..., place] = words[..., seen] if slot.startswith("*") else span(slot)[0]
            seen += slot.startswith("*")
        return out

    return fill(told), fill(asked), len(asked) - asked.index("answer") - 3


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, labels int64 [count, length], labels -100 except on answers; depth [count, asked] in [0, 1): where the needle stands;
    answers [count, asked, words]: the positions of the answers' words; needle [count, asked]: the position of the needle's first word.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    depth: torch.Tensor
    answers: torch.Tensor
    needle: torch.Tensor


def batch(
    count: int,
    length: int,
    kind: str,
    needles: int,
    asked: int,
    source: torch.Generator,
    *,
    repeat: float = 0.0,
    alike: float = 0.0,
    pool: int = POOL,
) -> Batch:
    """`count` haystacks of `length` tokens with `needles` needles of a kind ("code" or "entry") and `asked` questions at the end.

    `repeat`: so many of the sentences are an earlier one said again. `alike`: in so many haystacks the needles have words in common (an
    entry's adjective or noun, a code's nouns, out of `pool` each), where half a key is not enough. Training uses both, held-out texts
    neither.
    """
    device = source.device
    told, questions, words = _needles(count, needles, kind, source, alike, pool)
    width = questions.shape[-1]
    room = length - 1 - asked * width
    number = room // 5
    ids, lengths = _sentences(count, number, source)
    if repeat:
        again = torch.rand(count, number, generator=source, device=device) < repeat
        earlier = (torch.rand(count, number, generator=source, device=device) * torch.arange(number, device=device)).long()
        which = torch.where(again, earlier, torch.arange(number, device=device))
        ids = ids.gather(1, which[..., None].expand(-1, -1, WIDTH))
        lengths = lengths.gather(1, which)
    # Where each needle goes: different sentences among those that surely fit (no template is longer than 15 words).
    _, _, _, mean, spread = _templates(str(device))
    sure = int((room - 4 * spread * (room / mean) ** 0.5) / mean)
    place = _distinct(count, needles, max(sure, needles), source)
    rows = torch.arange(count, device=device)[:, None]
    padded = torch.zeros(count, needles, WIDTH, dtype=torch.long, device=device)
    padded[..., : told.shape[-1]] = told
    ids[rows, place] = padded
    lengths[rows, place] = told.shape[-1]
    ends = lengths.cumsum(1)
    starts = ends - lengths
    column = torch.arange(WIDTH, device=device)
    keep = (ends <= room)[..., None] & (column < lengths[..., None])
    flat = torch.zeros(count, length + WIDTH, dtype=torch.long, device=device)
    target = torch.where(keep, 1 + starts[..., None] + column, torch.full_like(ids, length))
    flat.scatter_(1, target.flatten(1), torch.where(keep, ids, 0).flatten(1))
    flat[:, 0] = BOS_ID
    used = 1 + (ends * (ends <= room)).amax(1)
    # The last sentences leave a gap of a few words before the questions: everything moves up, so that padding stands at the end.
    offset = used[:, None] + torch.arange(asked * width, device=device)
    flat.scatter_(1, offset, questions[:, :asked].flatten(1))
    labels = torch.full_like(flat, -100)
    within = torch.arange(width - 1 - words, width - 1, device=device)
    answers = used[:, None, None] + torch.arange(asked, device=device)[None, :, None] * width + within
    labels.scatter_(1, answers.flatten(1), flat.gather(1, answers.flatten(1)))
    at = 1 + starts[rows, place][:, :asked]
    return Batch(flat[:, :length], labels[:, :length], at.double() / room, answers, at)
