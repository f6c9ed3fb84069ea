"""Places in a repeated text, shared by the probes that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.errors import ProbeError, refusal
from headscope.probes.text import ProbeText

if TYPE_CHECKING:
    from torch import Tensor


def shape(text: ProbeText) -> tuple[int, int, int]:
    """(first, K, R) of a repeated text."""
    if text.block is None or text.repeats is None:
        raise refusal(
            ProbeError, repr(text), "it does not say how it repeats", "build it with repeated_random, or give block= and repeats="
        )
    return text.first, text.block, text.repeats


def second_block(text: ProbeText, shift: int) -> tuple[Tensor, Tensor]:
    """Queries of the second block, and for each the key K - `shift` before it: shift 0 the same token, shift 1 the one that followed it."""
    first, block, _ = shape(text)
    queries = torch.arange(first + block, first + 2 * block)
    return queries, queries - block + shift


def earlier_occurrences(text: ProbeText, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """All (query, key) with the query in a later block and the key `shift` after an earlier occurrence of its token.

    Returns queries [P], keys [P], and `last` [P] bool: the key belongs to the most recent occurrence.
    """
    first, block, repeats = shape(text)
    queries, keys, last = [], [], []
    for later in range(1, repeats):
        rows = torch.arange(first + later * block, first + (later + 1) * block)
        for back in range(1, later + 1):
            queries.append(rows)
            keys.append(rows - back * block + shift)
            last.append(torch.full_like(rows, back == 1, dtype=torch.bool))
    return torch.cat(queries), torch.cat(keys), torch.cat(last)
