"""ROUGE-1 recall: how many of the reference's words does a response hold?

Written here because the whole of it is a count: the usual packages bring a stemmer and its corpus along for one division. The stemmer here
takes English endings off, which is enough where a response copies its reference; it is not Porter's, so recalls can differ from those
packages in the last words that only their stems share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence

WORD = re.compile(r"\w+")
ENDINGS = (("ies", "y"), ("sses", "ss"), ("ing", ""), ("edly", ""), ("ed", ""), ("ly", ""), ("s", ""))


def words(text: str, *, stem: bool = True) -> list[str]:
    """The words of a text in lower case, without punctuation; `stem` takes endings off words of more than three letters."""
    found = WORD.findall(text.lower())
    return [_stem(word) for word in found] if stem else found


def _stem(word: str) -> str:
    for ending, instead in ENDINGS:
        if len(word) - len(ending) >= 3 and word.endswith(ending) and not word.endswith("ss"):
            return word[: -len(ending)] + instead
    return word


def rouge1_recall(reference: Sequence[Hashable], response: Sequence[Hashable]) -> float:
    """Share of the reference's units that the response holds, each as often as it holds it; 0 for an empty reference."""
    wanted, given = Counter(reference), Counter(response)
    return sum((wanted & given).values()) / len(reference) if reference else 0.0
