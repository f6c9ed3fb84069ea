"""Replacement values of heads: one layout for means, for another run's outputs, for task vectors.

[heads, Dv] is one vector per head, [heads, N, Dv] one per position, [B, heads, N, Dv] one per sequence as well; heads stand in the order
of the intervention's own list and positions count as those of a call do. Rows beyond N have no value, and are refused rather than left
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from headscope.errors import InterventionError, refusal
from headscope.kernels.partial import head_index

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.interventions.base import Head
    from headscope.interventions.values import Values
    from headscope.scope import Scope


def check_values(values: Values, pairs: Sequence[Head], scope: Scope, name: str) -> None:
    """InterventionError for values of another number of heads, or of another width than these heads have."""
    shape = values.shape
    heads = shape[0] if len(shape) in (2, 3) else shape[1] if len(shape) == 4 else -1
    widths = {scope.topology[layer].head_dim for layer, _ in pairs if not scope.topology[layer].capturable}
    if heads != len(pairs) or (len(widths) == 1 and shape[-1] not in widths):
        width = next(iter(widths)) if len(widths) == 1 else "Dv"
        raise refusal(
            InterventionError,
            f"{name} {list(shape)} for {len(pairs)} heads of width {width}",
            "there must be one value per head, in the heads' order",
            f"pass [{len(pairs)}, {width}], [{len(pairs)}, N, {width}] or [B, {len(pairs)}, N, {width}]",
        )


def values_at(values: Values, places: list[int], call: AttentionCall, own: Tensor, rows: Tensor | Literal[True], who: str) -> Tensor:
    """[B or 1, Nq, len(places), Dv]: the values of a call's heads at its rows, in `own`'s dtype. Rows that are not edited get whatever."""
    table = values.like(own)
    if table.dim() == 2:
        return table[head_index(tuple(places), table.device)][None, None]
    batch, count = own.shape[0], own.shape[1]
    first, known = call.query_offset, table.shape[-2]
    if table.dim() == 4 and table.shape[0] not in (1, batch):
        raise refusal(InterventionError, f"{who}: values of {table.shape[0]} sequences", f"the batch has {batch}", "pass as many, or one")
    needed = first + count
    if rows is not True:
        edited = rows.any(0).nonzero()
        needed = first + int(edited.max()) + 1 if edited.numel() else 0
    if needed > known:
        raise refusal(
            InterventionError,
            f"{who} at position {needed - 1}",
            f"it has values for {known} positions",
            "use an input of that length, restrict positions= or phase='prefill', or pass one value per head",
        )
    part = table[..., first : first + count, :]
    if part.shape[-2] < count:
        part = torch.nn.functional.pad(part, (0, 0, 0, count - part.shape[-2]))
    index = head_index(tuple(places), table.device)
    picked = part[index] if table.dim() == 3 else part[:, index]
    picked = picked[None] if table.dim() == 3 else picked
    return picked.transpose(1, 2)


__all__ = ["check_values", "values_at"]
