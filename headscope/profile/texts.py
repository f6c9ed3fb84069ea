"""The texts of a profile: one list per kind that its probes ask for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from headscope.data import check_data, natural_texts
from headscope.errors import DataError, ProbeError, refusal
from headscope.inputs import reads_ids
from headscope.probes.text import (
    MIN_BLOCK,
    REPEATED_TOKEN_LENGTH,
    ProbeText,
    TextKind,
    TokenPool,
    block_for,
    natural_probe_text,
    repeated_random,
    repeated_token,
)

if TYPE_CHECKING:
    from headscope.data.natural import TextData
    from headscope.scope import Scope


def build_texts(
    scope: Scope, kind: TextKind, *, context: int, data: TextData, texts: int, seed: int, repeats: int, beyond_context: bool
) -> list[ProbeText]:
    """`texts` texts of one kind; text i is drawn with seed + i. DataError or ProbeError when they cannot be made."""
    if not reads_ids(scope):
        why = "a profile is made on text, and this model reads no token ids"
        raise refusal(DataError, scope.name or scope.topology.model_class, why, "measure it on its own inputs: scope.capture({...})")
    if seed < 0:
        raise refusal(DataError, f"seed={seed}", "numpy's generators take none below 0", "pass seed=0 or more")
    if kind == "natural":
        check_data(data)
    check_context(scope, context, beyond_context)
    if kind == "natural":
        tokenizer = getattr(scope, "tokenizer", None)
        return [natural_probe_text(text, tokenizer) for text in natural_texts(tokenizer, context, texts=texts, data=data)]
    pool = TokenPool.of(scope)
    if kind == "repeated_token":
        length = min(REPEATED_TOKEN_LENGTH, context)
        return [repeated_token(pool, length=length, seed=seed + number) for number in range(texts)]
    block = block_for(context, len(pool.ordinary), repeats)
    if block < MIN_BLOCK:
        raise refusal(
            ProbeError,
            f"{repeats} repetitions in a context of {context}",
            f"a block would have {block} tokens and {MIN_BLOCK} is the least",
            f"use a context of {MIN_BLOCK * (repeats + 1)} or more",
        )
    return [repeated_random(pool, block=block, repeats=repeats, seed=seed + number) for number in range(texts)]


def check_context(scope: Scope, context: int, beyond_context: bool) -> None:
    """Raises DataError for a context that is no length, or longer than the model was trained for."""
    if context < 1:
        raise refusal(DataError, f"context={context}", "it counts tokens and must be at least 1", "pass context=2048")
    limit = scope.max_length
    if limit is not None and context > limit and not beyond_context:
        raise refusal(
            DataError,
            f"a context of {context} tokens",
            f"{scope.name or 'this model'} was made for {limit}",
            f"use a context of {limit} or less, or allow it with beyond_context",
        )


def data_facts(kind: TextKind, texts: list[ProbeText]) -> dict[str, Any]:
    """The card's entry for the texts of one kind. The checksum is over all ids in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.ids.numpy().astype("<i8").tobytes())
    return {
        "name": texts[0].name if len(texts) == 1 else f"{texts[0].name} and {len(texts) - 1} more",
        "kind": kind,
        "sha256": digest.hexdigest(),
        "sequences": len(texts),
        "tokens": len(texts[0]),
    }


def given_texts(data: Any) -> list[ProbeText] | None:
    """ProbeTexts that the caller made, None when the data is something else."""
    if isinstance(data, ProbeText):
        return [data]
    if (
        isinstance(data, (list, tuple))
        and data
        and not isinstance(data, torch.Tensor)
        and all(isinstance(item, ProbeText) for item in data)
    ):
        return list(data)
    return None
