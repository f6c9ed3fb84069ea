"""Z-site primitives: edits of a head's output z, the input of W_O.

    scale  gamma z      zero  0      replace  c      lerp  (1 - alpha) z + alpha c      patch  another run's z      add  z + c      noise
    z + sigma e

Each takes the call and all heads' outputs [B, Nq, Hq, Dv] and gives them back edited, on a copy; gamma = 1, alpha = 0 and sigma = 0 give
back the very object. They carry gradients, also to gamma, alpha and the values. `rows` is True or a bool mask [1 or B, Nq].

Before W_O, and not after it: there a head is a slice, while its image under W_O is spread over all coordinates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headscope.interventions.head_edit import Rows, merged, taken
from headscope.interventions.noise import position_noise

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall


def scale(call: AttentionCall, output: Tensor, heads: list[int], gamma: float | Tensor, rows: Rows = True) -> Tensor:
    """gamma z; `gamma` a number or one per head [h]."""
    if isinstance(gamma, float | int):
        return output if gamma == 1.0 else merged(output, heads, rows, taken(output, heads) * gamma)
    return merged(output, heads, rows, taken(output, heads) * gamma.to(output)[None, None, :, None])


def zero(call: AttentionCall, output: Tensor, heads: list[int], rows: Rows = True) -> Tensor:
    """z := 0."""
    return merged(output, heads, rows, torch.zeros_like(taken(output, heads)))


def replace(call: AttentionCall, output: Tensor, heads: list[int], values: Tensor, rows: Rows = True) -> Tensor:
    """z := values, broadcastable to [B, Nq, h, Dv]. With another run's z it is a patch."""
    return merged(output, heads, rows, values.expand(taken(output, heads).shape))


patch = replace


def lerp(call: AttentionCall, output: Tensor, heads: list[int], values: Tensor, alpha: float | Tensor, rows: Rows = True) -> Tensor:
    """(1 - alpha) z + alpha c; `alpha` a number or one per head [h]."""
    if isinstance(alpha, float | int):
        if alpha == 0.0:
            return output
        own = taken(output, heads)
        return merged(output, heads, rows, values.expand(own.shape) if alpha == 1.0 else (1.0 - alpha) * own + alpha * values)
    weight = alpha.to(output)[None, None, :, None]
    return merged(output, heads, rows, (1.0 - weight) * taken(output, heads) + weight * values)


def add(call: AttentionCall, output: Tensor, heads: list[int], values: Tensor, factor: float = 1.0, rows: Rows = True) -> Tensor:
    """z + factor c, `values` broadcastable to [B, Nq, h, Dv]."""
    return output if factor == 0.0 else merged(output, heads, rows, taken(output, heads) + factor * values)


def noise(
    call: AttentionCall, output: Tensor, heads: list[int], sigma: float, seed: int, rows: Rows = True, relative: bool = False
) -> Tensor:
    """z + sigma e, e standard normal by seed and place; `relative`: sigma counts in root mean squares of the row's own z."""
    if sigma == 0.0:
        return output
    own = taken(output, heads)
    size = own.float().pow(2).mean(-1, keepdim=True).sqrt().to(own.dtype) if relative else 1.0
    return merged(output, heads, rows, own + sigma * size * position_noise(call, seed, heads, own.shape[-1], own.dtype))


__all__ = ["add", "lerp", "noise", "patch", "replace", "scale", "zero"]
