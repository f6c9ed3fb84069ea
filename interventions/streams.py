"""The streams of joint attention, and sets of tokens that are counted within the picture.

A picture's tokens stand in front of the text in one model and behind it in another; the picture itself is the same. So what names a part of
the picture counts from its own first token. The silent failure this avoids: the left half of the picture taken for the first words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.where import CLASSES, at_positions, read_positions

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def read_part(given: Any, name: str) -> Any:
    """A part of the picture in its one form: a slice, a tuple of token numbers or Values of a bool mask. InterventionError otherwise."""
    found = None if isinstance(given, str) or given is None else read_positions(given)
    if found is None:
        raise refusal(InterventionError, f"{name}={given!r}", "it names no part of the picture", "pass a slice, a list or a bool mask")
    return found


def spans(call: AttentionCall) -> dict[str, tuple[int, int]]:
    """Stream name -> (first, end) among the call's keys. InterventionError where the call does not say."""
    streams = call.facts.get("streams")
    if not isinstance(streams, tuple):
        raise refusal(
            InterventionError,
            f"a part of the picture in {call.module}",
            "which of its tokens are the picture's cannot be told from the call",
            "use it on a diffusion transformer's joint attention",
        )
    return {CLASSES[label]: (first, end) for label, first, end in streams}


def part_of(call: AttentionCall, part: Any, name: str) -> Tensor:
    """Bool [1 or B, Nk]: a part of the picture among the call's tokens. InterventionError where the picture has no such tokens."""
    first, end = spans(call)["image"]
    inside = at_positions(part, torch.arange(end - first, device=call.q.device), call.q.shape[0])
    if not bool(inside.any()):
        raise refusal(InterventionError, f"{name} in {call.module}", f"the picture has tokens 0..{end - first - 1}", "name some of these")
    out = torch.zeros(inside.shape[0], call.k.shape[2], dtype=torch.bool, device=call.q.device)
    out[:, first:end] = inside
    return out


def text_of(call: AttentionCall) -> Tensor:
    """Bool [1, Nk]: the text's tokens; none where the call has no text stream."""
    first, end = spans(call).get("text", (0, 0))
    out = torch.zeros(1, call.k.shape[2], dtype=torch.bool, device=call.q.device)
    out[:, first:end] = True
    return out


__all__ = ["part_of", "read_part", "spans", "text_of"]
