"""Which heads does a task need? Exhaustive single and greedy ablation, and what is left when every head streams.

Zero ablation: the slice of a head in the input of its output projection is set to zero. The attention kernel is not touched, so the
answer does not depend on one, and neither does it depend on headscope's own interventions, which are tested against it.

Greedy: the head whose loss hurts most is ablated for good, then the next is looked for, until accuracy is below `floor`. Redundant
heads, which single ablation cannot see, show there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Head = tuple[int, int]


@contextmanager
def ablated(layers: Sequence[Any], heads: Sequence[Head], head_dim: int) -> Iterator[None]:
    """While active, the heads (layer, head) write nothing. `layers`: modules with `self_attn.o_proj`, in order."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def hook_of(numbers: list[int]) -> Callable[..., Any]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            value = inputs[0].clone()
            for number in numbers:
                value[..., number * head_dim : (number + 1) * head_dim] = 0
            return (value, *inputs[1:])

        return hook

    handles = [layers[layer].self_attn.o_proj.register_forward_pre_hook(hook_of(numbers)) for layer, numbers in by_layer.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def streaming_but(layers: Sequence[Any], kept: Sequence[Head], group: int, mask: torch.Tensor) -> Iterator[None]:
    """While active, every head sees what `mask` (bool [1, 1, N, N]) allows, but those of the key heads `kept` (layer, key head) see all.

    `group`: query heads per key head. `layers`: modules with `self_attn`, in order, whose model is called with a mask of that shape.
    """
    causal = torch.ones_like(mask[0, 0]).tril()

    def hook_of(numbers: list[int]) -> Callable[..., Any]:
        def hook(module: Any, inputs: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            wide = mask.expand(1, module.config.num_attention_heads, -1, -1).clone()
            for number in numbers:
                wide[:, number * group : (number + 1) * group] = causal
            return inputs, given | {"attention_mask": wide.expand(given["hidden_states"].shape[0], -1, -1, -1)}

        return hook

    far = {layer: [number for where, number in kept if where == layer] for layer, _ in kept}
    handles = [layers[layer].self_attn.register_forward_pre_hook(hook_of(numbers), with_kwargs=True) for layer, numbers in far.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def streaming_mask(length: int, sink: int, window: int, device: str | torch.device) -> torch.Tensor:
    """Bool [1, 1, N, N], True where a query may look: causal, and one of the first `sink` keys or of the last `window`."""
    queries = torch.arange(length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    return ((keys <= queries) & ((keys < sink) | (queries - keys < window)))[None, None]


def search(
    accuracy: Callable[[Sequence[Head]], float], heads: Sequence[Head], *, floor: float, most: int = 12, shortlist: int | None = None
) -> dict[str, Any]:
    """Single and greedy ablation. `accuracy(heads)` is the task's accuracy with those heads gone.

    Returns base, single {"layer.head": accuracy}, and greedy [[layer, head, accuracy with all up to here gone], ...].
    `shortlist`: in each greedy round only so many candidates, those that hurt most in the last full round, are tried.
    """
    base = accuracy([])
    single = {head: accuracy([head]) for head in heads}
    gone: list[Head] = []
    path: list[list[float]] = []
    scores = dict(single)
    while len(gone) < min(most, len(heads)):
        if gone:
            left = sorted((head for head in heads if head not in gone), key=lambda head: scores[head])
            scores |= {head: accuracy([*gone, head]) for head in left[:shortlist]}
        best = min((head for head in heads if head not in gone), key=lambda head: scores[head])
        gone.append(best)
        path.append([*best, round(scores[best], 4)])
        if scores[best] <= floor:
            break
        scores[best] = float("inf")
    return {"base": round(base, 4), "single": {f"{a}.{b}": round(value, 4) for (a, b), value in single.items()}, "greedy": path}
