"""Key sets: which keys an edit speaks of, in a form that means the same at every step of a generation.

"first"              the first real token of each sequence (where left padding ends)
"image", "text"      token classes (see `where`)
[0, 5], slice(0, 4)  absolute positions, counted from 0 with padding in front
a bool mask          [N] or [B, N]; keys beyond it, generated later, are not in it
"others"             as a target: every key that is not in the source
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import InterventionError, refusal
from headscope.interventions.where import CLASSES, LAST, at_positions, image_token_of, read_positions, token_class

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

FIRST, OTHERS = "first", "others"


def read_keys(given: Any, *, others: bool = False) -> Any:
    """A key set in its one form; InterventionError for anything else."""
    if isinstance(given, str):
        known = (FIRST, *CLASSES, *((OTHERS,) if others else ()))
        if given in known:
            return given
        raise refusal(
            InterventionError, f"keys={given!r}", "it names no set of keys", f"pass positions, a mask, or one of {', '.join(known)}"
        )
    if given is None:
        raise refusal(InterventionError, "keys=None", "no key is named", "pass e.g. keys=[0], keys='first', or a bool mask")
    found = read_positions(given)
    if found == LAST:
        raise refusal(InterventionError, f"keys={given!r}", "it names a query, not a key", "pass positions")
    return found


def refuse_classes(keys: Any, scope: Scope) -> None:
    """InterventionError for image or text tokens in a model that does not tell them apart."""
    if isinstance(keys, str) and keys in CLASSES and scope.host.kind != "diffusers" and image_token_of(scope) is None:
        raise refusal(
            InterventionError,
            f"keys={keys!r}",
            f"{scope.name} has no image tokens to tell from text",
            "use a vision-language or a diffusion model, or pass positions",
        )


def key_set(call: AttentionCall, keys: Any, image_token: int | None) -> Tensor:
    """Bool [1 or B, Nk]: the call's keys that a set names, padding left out."""
    batch, count, device = call.q.shape[0], call.k.shape[2], call.q.device
    here = torch.arange(count, device=device) + call.key_offset
    if isinstance(keys, str) and keys == FIRST:
        first = torch.zeros(1, dtype=torch.int64, device=device) if call.first_token is None else call.first_token.to(device)
        out = here[None] == first[:, None]
    elif isinstance(keys, str):
        out = token_class(call, keys, image_token, "key")
    else:
        out = at_positions(keys, here, batch)
    return out if call.mask.key_valid is None else out & call.mask.key_valid


__all__ = ["FIRST", "OTHERS", "key_set", "read_keys", "refuse_classes"]
