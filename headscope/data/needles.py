"""Needles: facts that stand nowhere else, the questions about them, and their place in a haystack.

All were written for headscope. A needle is about things that no model can know and that the bundled essays never mention, so that a right
answer can only have been read from the haystack. The answer is a part of the needle's own words: what a head copies is then a span of the
haystack, and not a paraphrase of it.

A needle goes between two sentences of the haystack, found in the text itself. Looking for the ids of a full stop instead ties the place
to one tokenizer: with any other, the needle silently slides to wherever these ids happen to stand, or to the very beginning.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from headscope.errors import DataError, refusal

SENTENCE_END = re.compile("[.!?\u2026]+[\"'\u201d\u2019)\\]]*(?=\\s)")


@dataclass(frozen=True, slots=True)
class Needle:
    """`sentence` hides in the haystack; `question` asks for `answer`, which is a part of the sentence. `lead`: words that the answer begins
    with, put into a plain prompt (a chat asks without them), so that the next thing to be written is the answer itself.
    """

    name: str
    sentence: str
    question: str
    answer: str
    lead: str = ""

    def __post_init__(self) -> None:
        if self.sentence.count(self.answer) != 1 or not self.answer.strip():
            raise refusal(
                DataError,
                f"needle {self.name!r}",
                f"its answer {self.answer!r} stands {self.sentence.count(self.answer)} times in its sentence",
                "pass an answer that stands there once",
            )

    @property
    def answer_at(self) -> tuple[int, int]:
        """Characters [start, end) of the answer within the sentence."""
        start = self.sentence.index(self.answer)
        return start, start + len(self.answer)


NEEDLES: tuple[Needle, ...] = (
    Needle(
        "key",
        "The caretaker of Port Ellery hid the spare key under a copper bell in the flower garden.",
        "Where did the caretaker of Port Ellery hide the spare key?",
        "under a copper bell in the flower garden",
    ),
    Needle(
        "soup",
        "The best thing to eat in the village of Marrow is a bowl of chestnut soup with smoked trout.",
        "What is the best thing to eat in the village of Marrow?",
        "a bowl of chestnut soup with smoked trout",
    ),
    Needle(
        "prize",
        "The first prize of the Tarnley kite festival was a green bicycle with three silver lamps.",
        "What was the first prize of the Tarnley kite festival?",
        "a green bicycle with three silver lamps",
    ),
    Needle(
        "promise",
        "Before the long winter, Doctor Halvorsen promised to teach the twins how to play the wooden harp.",
        "What did Doctor Halvorsen promise before the long winter?",
        "to teach the twins how to play the wooden harp",
    ),
    Needle(
        "train",
        "The night train to Corvina leaves from the seventh platform behind the old fish market.",
        "From where does the night train to Corvina leave?",
        "from the seventh platform behind the old fish market",
    ),
)
"""Facts to be found and said again."""

REASONING_NEEDLES: tuple[Needle, ...] = (
    Needle(
        "holiday",
        "Of her two plans for Friday, Ines will follow the one that needs no boat. "
        "One plan of Ines is to row across the bay to the island of the seals. "
        "The other plan of Ines is to climb the hill behind the mill with a flask of tea.",
        "Which of her two plans for Friday will Ines follow?",
        "to climb the hill behind the mill with a flask of tea",
    ),
    Needle(
        "gift",
        "Of the two gifts that were offered, old Bertrand takes the one that makes no noise. "
        "The first gift for old Bertrand was a brass trumpet with a red ribbon. "
        "The second gift for old Bertrand was a woollen blanket with a pattern of owls.",
        "Which of the two gifts does old Bertrand take?",
        "a woollen blanket with a pattern of owls",
    ),
    Needle(
        "room",
        "Of the two rooms at the inn, Captain Odell always sleeps in the one that faces the orchard. "
        "The small blue room above the kitchen faces the harbour. "
        "The narrow yellow room at the end of the stairs faces the orchard.",
        "In which room of the inn does Captain Odell always sleep?",
        "narrow yellow room at the end of the stairs",
    ),
)
"""A rule, a wrong answer and the right one: what is to be said again has to be chosen first."""


FILLER = (
    "The morning was bright and the road was dry. A cart went by with hay. The dog slept in the shade. "
    "Some children threw stones into the pond. The bell rang and nobody came. Clouds moved slowly over the roofs. "
    "A woman carried water up the hill. The old gate stood open all day. "
)
"""Prose that says nothing, to be repeated: the easiest haystack, for models that find a needle in no other."""


def passkeys(count: int, *, digits: int = 5, seed: int = 0) -> list[Needle]:
    """Numbers to be found: "The pass key is 71932.", drawn by `seed`."""
    drawn = random.Random(seed)
    numbers = ["".join(drawn.choice("123456789") for _ in range(digits)) for _ in range(count)]
    return [
        Needle(f"passkey {number}", f"The pass key is {number}. Remember it.", "What is the pass key?", number, "The pass key is")
        for number in numbers
    ]


def sentence_ends(text: str) -> list[int]:
    """Characters after which a sentence has ended, white space next; the end of the text is not among them."""
    return [match.end() for match in SENTENCE_END.finditer(text)]


def hide(haystack: str, sentence: str, depth: float) -> tuple[str, int]:
    """(text, start): the sentence put between two sentences of the haystack, and the character at which it begins.

    `depth` 0 is in front of everything, 1 behind everything; else the last end of a sentence at or before that share of the characters.
    Raises DataError for a depth outside [0, 1].
    """
    if not 0 <= depth <= 1:
        raise refusal(DataError, f"depth={depth!r}", "it is a share of the haystack", "pass a number from 0 to 1")
    if depth == 1:
        return f"{haystack} {sentence}", len(haystack) + 1
    cut = max((end for end in sentence_ends(haystack) if end <= depth * len(haystack)), default=0)
    if cut == 0:
        return f"{sentence} {haystack}", 0
    return f"{haystack[:cut]} {sentence}{haystack[cut:]}", cut + 1
