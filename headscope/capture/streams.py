"""Streams: which positions of a diffusion model's attention are image tokens and which are text.

Joint attention concatenates the two, SD3 with the image first and Flux with the text first, and nothing in the call says which. It is read
off the values, which are neither normalised nor rotated: the first text token's own projection stands where the text begins. A list of
model names would be wrong for the next model; a wrong order gives text and image masses that have changed places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from headscope.capture.steps import IMAGE, TEXT

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics.steps import Step

Stream = tuple[int, int, int]
"""(label, first position, position after the last)."""


@dataclass(slots=True, eq=False)
class Forward:
    """The forward pass that is running: its facts, its number of text tokens, and what its joint attention was found to be."""

    step: Step
    text: int
    image: int | None
    image_first: bool | None = None


def find_streams(forward: Forward, module: Any, v: Tensor, rows: int | None, text: Tensor | None) -> tuple[Stream, ...] | None:
    """Which positions of a call's keys are image tokens and which are text; None where that cannot be told.

    `rows`, `text`: the two streams that the module was given, if it was given two. A module that is given one has either the image alone
    or both already joined, as Flux's single blocks have, in the order of the joint blocks before it.
    """
    keys = v.shape[2]
    if not forward.text:
        return ((IMAGE, 0, keys),)
    if text is not None and rows is not None and rows + text.shape[1] == keys:
        if forward.image_first is None:
            forward.image_first = _image_first(module, v, text, rows)
        forward.image, forward.text = rows, text.shape[1]
    image, words = forward.image, forward.text
    if image == keys:
        return ((IMAGE, 0, keys),)
    if image is None or forward.image_first is None or image + words != keys:
        return None
    at_image, at_words = (0, image) if forward.image_first else (words, 0)
    return (IMAGE, at_image, at_image + image), (TEXT, at_words, at_words + words)


def timesteps(value: Any, rows: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    times = torch.as_tensor(value).detach().float().reshape(-1).tolist()
    return tuple(times * rows) if len(times) == 1 else tuple(times)


def _image_first(module: Any, v: Tensor, text: Tensor, rows: int) -> bool | None:
    """Whether image tokens come before text tokens in v [B, H, N, D]: where the first text token's own projection stands. None when it
    stands at neither place."""
    added = getattr(module, "add_v_proj", None)
    with torch.no_grad():
        if added is not None:
            first = _project(added, text[:, :1])
        elif getattr(module, "to_added_qkv", None) is not None:
            first = _project(module.to_added_qkv, text[:, :1]).chunk(3, -1)[-1]
        elif getattr(module, "to_v", None) is not None:
            first = _project(module.to_v, text[:, :1])
        else:
            return None
        here = v.transpose(1, 2).flatten(2)
        if first.shape[-1] != here.shape[-1]:
            return None
        size = float(first.float().norm()) + 1e-30
        errors = [float((here[:, at : at + 1].float() - first.float()).norm()) / size for at in (rows, 0)]
    if min(errors) > 0.05:
        return None
    return errors[0] < errors[1]


def _project(linear: Any, x: Tensor) -> Tensor:
    """A linear module's output without its hooks being run."""
    out: Tensor = functional.linear(x, linear.weight, linear.bias) if type(linear) is nn.Linear else linear(x)
    return out


__all__ = ["Forward", "Stream", "find_streams", "timesteps"]
