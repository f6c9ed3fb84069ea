"""Edited calls: what of an intervention's changes the host's own function can be told, and what is computed here.

q, k and v are handed to the host's function as they were edited. A mask, a scale, a soft cap and sink logits are not arguments that every
host takes in the same way, if at all, so heads for which one of these changed are computed by exact attention in blocks, O(N) memory. Only
these heads: a key bias on one head leaves the others to the model's own kernel, and to the bit what they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall, MaskFacts

FACTS = ("causal", "window", "key_valid", "query_valid", "query_segments", "key_segments", "allowed")


def untold_heads(edited: AttentionCall, original: AttentionCall) -> list[int]:
    """Query heads whose scores differ from what the host would compute of the edited q, k, v."""
    everyone = list(range(edited.q.shape[1]))
    if edited.scale != original.scale or edited.softcap != original.softcap:
        return everyone
    if edited.mask is not original.mask and any(_differs(edited.mask, original.mask, name) for name in FACTS):
        return everyone
    changed = torch.zeros(len(everyone), dtype=torch.bool, device=edited.q.device)
    if edited.sink_logits is not original.sink_logits:
        if edited.sink_logits is None or original.sink_logits is None:
            return everyone
        changed |= edited.sink_logits != original.sink_logits
    if edited.mask.bias is not original.mask.bias:
        if edited.mask.bias is None:
            return everyone
        changed |= _biased(edited.mask.bias, original.mask.bias)
    return changed.nonzero().flatten().tolist() if bool(changed.any()) else []


def _differs(edited: MaskFacts, original: MaskFacts, name: str) -> bool:
    a, b = getattr(edited, name), getattr(original, name)
    return a is not b and (isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or a != b)


def _biased(edited: Tensor, original: Tensor | None) -> Tensor:
    """[H] or [1] bool: where two biases differ; one that is the same in every row is compared in one row."""
    if original is None:
        part = edited[:, :, :1] if edited.stride(2) == 0 else edited
        return (part != 0).any(-1).any(-1).any(0)
    return (edited != original).any(-1).any(-1).any(0)


def exact_heads(call: AttentionCall, heads: list[int]) -> Tensor:
    """[B, Nq, len(heads), Dv]: the output of some heads of a call, by exact attention in blocks; 0 on rows that see no key."""
    from headscope.kernels.partial import exact_attention, select_heads

    return exact_attention(select_heads(call, heads))


__all__ = ["exact_heads", "untold_heads"]
