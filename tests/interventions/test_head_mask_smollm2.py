"""On SmolLM2: a passkey in some 590 tokens of filler is read by five copy heads, and by no five others."""

from __future__ import annotations

import pytest
import torch

from headscope.interventions import HeadMask, HeadSet
from headscope.interventions.prefix import Prefix

COPY = [(18, 6), (17, 3), (17, 4), (6, 0), (18, 7)]
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def passkey(scope, key, depth):
    """(ids [1, N] with the answer at the end, where the answer's digits begin)."""
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    copies = 550 // len(scope.encode(FILLER)[0])
    before = int(copies * depth)
    start = "There is important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    question = "What is the pass key? The pass key is "
    text = scope.encode(start + FILLER * before + needle + FILLER * (copies - before) + question.rstrip())[0]
    answer = scope.encode(" " + key)[0]
    return torch.cat([text, answer])[None], len(text) + len(answer) - len(key)


@pytest.fixture(scope="module")
def texts(smollm2):
    out = []
    for key, depth in (("60494", 0.3), ("27611", 0.65)):
        ids, start = passkey(smollm2, key, depth)
        assert ids.shape[1] > 560
        out.append((Prefix(smollm2, ids), ids, start))
    return out


def recall(texts, *edits):
    """Share of the digits that are the likeliest next token, the earlier ones given."""
    right = total = 0
    for prefix, ids, start in texts:
        guess = prefix.run(*edits)[0, start - 1 : -1].argmax(-1)
        right += int((guess == ids[0, start:]).sum())
        total += len(guess)
    return right / total


def test_the_copy_heads_carry_the_passkey_and_random_heads_do_not(smollm2, texts):
    assert recall(texts) == 1.0
    assert recall(texts, HeadMask(COPY)) <= 0.5
    assert recall(texts[:1], HeadMask(COPY, "uniform")) <= 0.5
    for seed in (0, 1):
        assert recall(texts[:1], HeadMask(HeadSet.random(smollm2, 5, seed, without=COPY))) >= 0.95
