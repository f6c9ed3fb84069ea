"""Random words, said twice: nothing but the first copy tells what comes next in the second."""

from __future__ import annotations

from typing import Any

import torch

from headscope.models.bundled.words import BOS, NOUNS, SPECIAL, build_tokenizer

WORDS = NOUNS[:124]
LENGTH = 256
FIRST = len(SPECIAL)
BOS_ID = SPECIAL.index(BOS)


def tokenizer() -> Any:
    """The tokenizer of the model: 124 nouns, 128 ids."""
    return build_tokenizer(WORDS, length=LENGTH)


def batch(count: int, period: int, source: torch.Generator, *, prefix: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), int64 [count, 1 + prefix + 2 * period]: <bos>, `prefix` random words, then `period` random words twice.

    Labels are -100 outside the second copy (and on its first word, which nothing tells).
    """
    device = source.device
    words = torch.randint(FIRST, FIRST + len(WORDS), (count, prefix + period), generator=source, device=device)
    start = torch.full((count, 1), BOS_ID, device=device)
    ids = torch.cat([start, words, words[:, prefix:]], dim=1)
    labels = ids.clone()
    labels[:, : 2 + prefix + period] = -100
    return ids, labels
