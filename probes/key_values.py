"""Key-value samples: a JSON object of random keys and sentences, and the question for one of its values.

Random keys carry no meaning, so a value can be told only by finding its key: nothing in the sentence says which one is asked for. Sentences
come from the bundled essays, each once in an object. Other keys of the same object are asked and answered first (`shots`), which shows a
base model what to do, and moves the one right answer far from the end.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.data.natural import bundled
from headscope.data.needles import sentence_ends
from headscope.errors import ProbeError, refusal
from headscope.probes.trials import NOTHING, Trial, is_synthetic, synthetic_trials, tokenized

if TYPE_CHECKING:
    from headscope.scope import Scope

TASK = "This is a JSON object. For a key, give its value and nothing else.\n\n{object}\n\n"
LETTERS = string.ascii_letters + string.digits
LONGEST = 30
"""Tokens of a value, at most."""


def key_value_trials(
    scope: Scope,
    *,
    length: int,
    samples: int = 8,
    shots: int = 3,
    key_length: int = 32,
    pairs: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> list[Trial]:
    """`samples` prompts of at most `length` tokens, each with as many pairs as fit (`pairs` at most); the one that is asked for is drawn.

    `key_length` random letters and digits a key. For a model with the words of `bundled:needle` its own entries, which are keys and values,
    are taken. Raises ProbeError for a length that does not hold `shots` + 2 pairs.
    """
    if samples < 1 or shots < 0 or key_length < 1 or (pairs is not None and pairs < shots + 2):
        raise refusal(
            ProbeError,
            f"samples={samples}, shots={shots}, key_length={key_length}, pairs={pairs}",
            "they count things, and a sample has two pairs more than shots",
            "pass samples=8, shots=3, key_length=32, pairs=5 or more",
        )
    if is_synthetic(scope):
        drawn = synthetic_trials(scope, lengths=(length,), per_length=2 * samples, seed=seed)
        return [trial for trial in drawn if trial.name == "entry"]
    sentences = list(_sentences(scope.text_tokenizer))
    most = len(sentences) if pairs is None else min(pairs, len(sentences))
    draws = (np.random.default_rng([seed, number]) for number in range(samples))
    return [_sample(scope, sentences, most, length, shots, key_length, chat, draw) for draw in draws]


def _sentences(tokenizer: Any) -> Iterator[str]:
    """Sentences of the bundled essays without quotation marks, of 6 words and at most 30 tokens, each once."""
    seen = set()
    for essay in bundled().values():
        for paragraph in essay.split("\n"):
            ends = [0, *sentence_ends(paragraph + "\n")]
            for start, end in pairwise(ends):
                sentence = paragraph[start:end].strip()
                plain = sentence.isascii() and '"' not in sentence and "\\" not in sentence
                if plain and sentence not in seen and len(sentence.split()) >= 6 and len(tokenizer(sentence)["input_ids"]) <= LONGEST:
                    seen.add(sentence)
                    yield sentence


def _sample(
    scope: Scope, sentences: list[str], most: int, length: int, shots: int, size: int, chat: bool, draw: np.random.Generator
) -> Trial:
    tokenizer = scope.text_tokenizer
    order = [sentences[place] for place in draw.permutation(len(sentences))]
    keys = ["".join(LETTERS[place] for place in draw.integers(0, len(LETTERS), size)) for _ in order]
    pick = draw.random(shots + 1)
    least = shots + 2
    low, high = least, max(least, most)
    while low < high:  # the most pairs that fit
        middle = (low + high + 1) // 2
        fits = len(_trial(tokenizer, keys[:middle], order[:middle], pick, chat, length).ids) <= length
        low, high = (middle, high) if fits else (low, middle - 1)
    trial = _trial(tokenizer, keys[:low], order[:low], pick, chat, length)
    if len(trial.ids) > length:
        raise refusal(
            ProbeError, f"a context of {length} tokens", f"{least} pairs and their questions take {len(trial.ids)}", "use a longer context"
        )
    return trial


def _trial(tokenizer: Any, keys: list[str], values: list[str], pick: np.ndarray, chat: bool, length: int) -> Trial:
    """The prompt of these pairs. `pick` [shots + 1] in [0, 1): which pairs are asked for, the last one without its answer."""
    left = list(range(len(keys)))
    asked = [left.pop(int(share * len(left))) for share in pick]
    pairs = json.dumps(dict(zip(keys, values, strict=True)), indent=0)
    body = TASK.format(object=pairs) + "".join(f"Key: {keys[one]}\nValue: {values[one]}\n\n" for one in asked[:-1])
    target = asked[-1]
    text, null = (body + f"Key: {key}\nValue:" for key in (keys[target], NOTHING))
    begin = 0
    if chat:
        whole = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        null = whole.replace(text, null)
        begin = whole.index(text)
        text = whole
    at = text.index(json.dumps(values[target]), begin) + 1
    line = text.index(json.dumps(keys[target]), begin)
    question = text.rindex(f"Key: {keys[target]}")
    end = at + len(values[target])
    ranges = [(at, end), (line, end), (question, question + len(f"Key: {keys[target]}"))]
    ids, (answer, needle, query) = tokenized(tokenizer, text, ranges, special=not chat)
    place = null.rindex(f"Key: {NOTHING}")
    null_ids, (null_query,) = tokenized(tokenizer, null, [(place, place + len(f"Key: {NOTHING}"))], special=not chat)
    return Trial(
        ids,
        answer,
        needle,
        query,
        reference=values[target],
        stop="\n",
        null_ids=null_ids,
        null_question=null_query,
        name=f"{len(keys)} pairs",
        length=length,
        depth=round((at - text.index(pairs, begin)) / len(pairs), 3),
    )
