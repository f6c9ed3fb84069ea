"""Where an edit acts: in which phase, at which query positions, in which denoising steps and guidance branches.

All of it comes down to one bool per query row of a call, or to the call not being touched at all. Positions are absolute and count the
padding in front, as row numbers of the batch do, so a chunk, a whole prefill and a decode step agree on them.

"decode" is a call with one query row behind a cache; everything else is "prefill". The silent failure this avoids: an edit of "the last
token" that, with a KV cache, is an edit of every generated token, because each of them is the last row of its own call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.values import Values

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope

Phase = Literal["prefill", "decode", "both"]
PHASES = ("prefill", "decode", "both")
CLASSES = ("image", "text")
"""Token classes: what an image became, and everything else that is no padding."""
LAST = "last_prompt"


def phase_of(call: AttentionCall) -> Literal["prefill", "decode"]:
    """ "decode" for one query row behind a cache, else "prefill"."""
    return "decode" if call.q.shape[2] == 1 and call.query_offset > 0 else "prefill"


def read_positions(given: Any) -> Any:
    """Positions in their one form: None (all), "last_prompt", a token class, a slice, a tuple of ints, or Values of a bool mask
    [N] or [B, N]. InterventionError for anything else."""
    if given is None or isinstance(given, Values):
        return given
    if isinstance(given, str):
        if given not in (LAST, *CLASSES):
            raise unknown_name(InterventionError, "positions", given, (LAST, *CLASSES))
        return given
    if isinstance(given, dict) and set(given) == {"slice"} and len(given["slice"]) == 3:
        given = slice(*given["slice"])
    if isinstance(given, slice):
        for value in (given.start, given.stop):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise refusal(
                    InterventionError,
                    f"positions={given!r}",
                    "a sequence that grows has no fixed end to count back from",
                    "count from the front, or pass positions='last_prompt'",
                )
        if given.step not in (None, 1):
            raise refusal(InterventionError, f"positions={given!r}", "it has a step", "pass the positions as a list")
        return given
    if isinstance(given, int) and not isinstance(given, bool):
        given = (given,)
    if isinstance(given, torch.Tensor) and given.dtype == torch.bool and given.dim() in (1, 2):
        return Values(given)
    if isinstance(given, torch.Tensor):
        given = given.tolist()
    listed = given if isinstance(given, Sequence | range) else ()
    if len(listed) and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in listed):
        return tuple(listed)
    raise refusal(
        InterventionError,
        "positions=" + repr(given)[:60],
        "query positions count from 0",
        "pass a slice, a list of positions, a bool mask [N] or [B, N], 'last_prompt', 'image' or 'text'",
    )


def positions_json(positions: Any) -> Any:
    """Positions as plain data (a mask stays Values, for the writer of tensors)."""
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop, positions.step]}
    return list(positions) if isinstance(positions, tuple) else positions


def at_positions(positions: Any, absolute: Tensor, batch: int) -> Tensor:
    """Bool [1 or B, n]: which absolute positions a slice, a tuple or a mask names."""
    if isinstance(positions, slice):
        inside = absolute >= (positions.start or 0)
        if positions.stop is not None:
            inside = inside & (absolute < positions.stop)
        return inside[None]
    if isinstance(positions, tuple):
        return torch.isin(absolute, torch.tensor(positions, device=absolute.device))[None]
    table = cast("Values", positions).tensor.to(absolute.device)
    table = table[None] if table.dim() == 1 else table
    if len(table) not in (1, batch):
        raise refusal(
            InterventionError, f"positions: a mask of {len(table)} sequences", f"the batch has {batch}", f"pass [N] or [{batch}, N]"
        )
    known = absolute < table.shape[1]
    return table[:, absolute.clamp(max=table.shape[1] - 1)] & known


def token_class(call: AttentionCall, name: str, image_token: int | None, side: Literal["query", "key"]) -> Tensor:
    """Bool [1 or B, Nq or Nk]: the rows or keys of a class. InterventionError where the call does not say what its tokens are."""
    count, offset = (call.q.shape[2], call.query_offset) if side == "query" else (call.k.shape[2], call.key_offset)
    device = call.q.device
    streams = call.facts.get("streams")
    if isinstance(streams, tuple):
        out = torch.zeros(1, count, dtype=torch.bool, device=device)
        for label, first, end in streams:
            if CLASSES[label] == name:
                out[:, first:end] = True
        return out
    ids = call.facts.get("tokens")
    if image_token is None or not isinstance(ids, torch.Tensor):
        raise refusal(
            InterventionError,
            f"token class {name!r} in {call.module}",
            "which of its tokens are image and which text cannot be told (no stream of image tokens, or no ids)",
            "pass positions as a bool mask [N] or [B, N]",
        )
    image = ids.to(device)[:, offset : offset + count] == image_token
    if name == "image":
        return image
    valid = call.mask.query_valid if side == "query" else call.mask.key_valid
    return ~image if valid is None else ~image & valid


def image_token_of(scope: Scope) -> int | None:
    """The id that stands for image tokens in a vision-language model's text; None where there is none."""
    config = getattr(scope.model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def step_of(call: AttentionCall) -> int:
    """The running number of the call's denoising step. InterventionError for a model that is not run in steps."""
    number = getattr(call.facts.get("step"), "forward", None)
    if number is None:
        raise refusal(InterventionError, "steps=", f"{call.module} is not run in denoising steps", "leave steps out")
    return int(number)


def rows_of(
    call: AttentionCall, phase: Phase, positions: Any, branches: tuple[str, ...] | None, image: int | None
) -> Tensor | Literal[True] | None:
    """The query rows to edit: True for all, None for none, else a bool mask [1 or B, Nq]."""
    if phase not in ("both", phase_of(call)):
        return None
    batch, count = call.q.shape[0], call.q.shape[2]
    mask: Tensor | None = None
    if isinstance(positions, str) and positions == LAST:
        if phase_of(call) == "decode":
            return None
        mask = _last(call)
    elif isinstance(positions, str):
        mask = token_class(call, positions, image, "query")
    elif positions is not None:
        if not _reached(positions, call.query_offset, count):
            return None
        mask = at_positions(positions, torch.arange(count, device=call.q.device) + call.query_offset, batch)
    if branches is not None:
        of_rows = call.facts.get("branches")
        if not isinstance(of_rows, tuple) or len(of_rows) != batch:
            raise refusal(
                InterventionError,
                f"branches={branches}",
                f"{call.module} does not say which branch its rows are",
                "set scope.host.guidance",
            )
        if not any(one in branches for one in of_rows):
            return None
        mine = torch.tensor([one in branches for one in of_rows], device=call.q.device)[:, None]
        mask = mine.expand(batch, count) if mask is None else mask & mine
    if mask is None:
        return True
    return mask if mask.is_cuda or bool(mask.any()) else None  # asking a device for one bit waits for all that is queued on it


def _reached(positions: Any, first: int, count: int) -> bool:
    """Whether a slice, a tuple or a mask names any of the positions first .. first + count - 1."""
    if isinstance(positions, slice):
        return (positions.start or 0) < first + count and (positions.stop is None or positions.stop > first)
    if isinstance(positions, tuple):
        return any(first <= one < first + count for one in positions)
    return bool(positions.tensor[..., first : first + count].any())


def _last(call: AttentionCall) -> Tensor:
    """The last real token of each sequence in this call."""
    count = call.q.shape[2]
    valid = call.mask.query_valid
    index = torch.arange(count, device=call.q.device)
    if valid is None:
        return (index == count - 1)[None]
    last = torch.where(valid, index, -1).amax(1, keepdim=True)
    return index[None] == last


__all__ = [
    "CLASSES",
    "LAST",
    "PHASES",
    "Phase",
    "at_positions",
    "image_token_of",
    "phase_of",
    "positions_json",
    "read_positions",
    "rows_of",
    "step_of",
    "token_class",
]
