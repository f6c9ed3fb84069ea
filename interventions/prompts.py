"""The prompt an intervention was prepared for: what VHR and PAINT read beforehand belongs to one batch of prompts and no other.

Rows are counted from each sequence's first real token, so it does not matter whether the batch is padded in front or behind, nor by how
much. The silent failure this avoids is a picture's head selection acting, without a word, on the next picture's question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import InterventionError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope


def refuse_blind(scope: Scope, what: str) -> None:
    """InterventionError for a model that gets no pictures as tokens."""
    from headscope.probes.pictures import unseeing

    why = unseeing(scope)
    if why is not None:
        raise refusal(InterventionError, f"{what} on {scope.name}", why, "use a vision-language model whose pictures become tokens")


def inputs_of(scope: Scope, given: Any) -> dict[str, Any]:
    """Model inputs from model inputs [B, N], a (picture, question) or a Sample."""
    from headscope.probes.pictures import Sample, samples_of

    if isinstance(given, Mapping):
        if not isinstance(given.get("input_ids"), torch.Tensor) or given["input_ids"].dim() != 2:
            raise refusal(InterventionError, "inputs without input_ids [B, N]", "there is no prompt", "pass what the processor returned")
        return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    return dict(given.inputs if isinstance(given, Sample) else samples_of(scope, [given], count=1, seed=0)[0].inputs)


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Bool [B, N]: what is no padding."""
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    return torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()


def one_of(inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The text of one sequence of a batch, without padding; of a batch of one, all its inputs."""
    real = real_tokens(inputs)
    if len(real) == 1 and bool(real.all()):
        return dict(inputs)
    ids = inputs["input_ids"][row, real[row]][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prompt_digest(ids: Tensor, real: Tensor) -> str:
    """One name for the real ids of a batch: SHA-256 of each sequence's length and ids."""
    found = hashlib.sha256()
    for row, kept in zip(ids.cpu().to(torch.int64), real.cpu(), strict=True):
        own = row[kept].contiguous()
        found.update(len(own).to_bytes(8, "little") + own.numpy().tobytes())
    return found.hexdigest()


def starts(call: AttentionCall) -> Tensor:
    """[B] absolute position of each sequence's first real token."""
    batch, device = call.q.shape[0], call.q.device
    return torch.zeros(batch, dtype=torch.int64, device=device) if call.first_token is None else call.first_token.to(device)


def repeated(value: Tensor, call: AttentionCall, what: str) -> Tensor:
    """A table of one row per prompt [b, ...] for the batch of a call: the same, or each row k times (beams, several answers)."""
    batch = call.q.shape[0]
    if batch % len(value):
        raise refusal(
            InterventionError, f"{what} prepared for {len(value)} prompts", f"{call.module} runs {batch}", "prepare it with the same inputs"
        )
    return value.to(call.q.device).repeat_interleave(batch // len(value), 0)


def last_rows(call: AttentionCall, lengths: tuple[int, ...], what: str) -> Tensor:
    """[B] absolute position of the last token of each prompt."""
    return starts(call) + repeated(torch.tensor(lengths), call, what) - 1


def refuse_other_prompt(call: AttentionCall, lengths: tuple[int, ...], prompt: str, what: str) -> None:
    """InterventionError where the ids up to the prompts' ends are known and are not those it was prepared for."""
    ids = call.facts.get("tokens")
    if not isinstance(ids, torch.Tensor):
        return
    ends = last_rows(call, lengths, what)
    here = torch.arange(ids.shape[1], device=call.q.device)[None]
    real = (here >= starts(call)[:, None]) & (here <= ends[:, None])
    each = call.q.shape[0] // len(lengths)
    if prompt_digest(ids[::each], real[::each]) != prompt:
        raise refusal(
            InterventionError,
            f"{what} in {call.module}",
            "this is not the prompt it was prepared for",
            "prepare it again",
        )


__all__ = [
    "inputs_of",
    "last_rows",
    "one_of",
    "prompt_digest",
    "real_tokens",
    "refuse_blind",
    "refuse_other_prompt",
    "repeated",
    "starts",
]
