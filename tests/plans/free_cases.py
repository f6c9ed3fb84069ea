"""A small model and plans of every kind of cache, shared by the tests of freeing caches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.plans import Blocks, Budget, Dense, Lines, Pattern, Power, Span, SparsePlan, Streaming, Strided, TopKeys
from headscope.scope import Scope

LAYERS = 2
PLANS: dict[str, tuple[Pattern, ...]] = {
    "streaming": (Streaming(2, 8), Streaming(3, 12), Streaming(2, 8), Streaming(0, 5)),
    "mixed": (Dense(), Streaming(2, 8), Streaming(2, 8), Streaming(4, 20)),
    "budgets": (Budget(10, 8), Budget(6, 4, grouped=False), Budget(5, 8, sink=2, recent=12), Streaming(2, 8)),
    "budget beside dense": (Budget(10, 8), Dense(), Budget(5, 8), Budget(7, 8)),
    "spans": (Span(4, 0.2, 2), Span(2, 0.1, 4), Streaming(1, 5), Streaming(2, 9)),
    "top keys": (TopKeys(10, window=4), TopKeys(6, refresh=3, window=4), Streaming(2, 8), Streaming(2, 8)),
    "top blocks": (
        *(TopKeys(16, window=4, block=8, estimate="bounds"),) * 2,
        TopKeys(12, refresh=2, block=4, estimate="mean"),
        Streaming(2, 8),
    ),
    "compensation": (Streaming(2, 8, True), Streaming(2, 8, True), Streaming(3, 5, True), Streaming(2, 8)),
    "spans that compensate": (Span(0.0, 0.2, 2, 6, True), Span(0.0, 0.2, 2, 6, True), Span(3, 0.1, 1, 4, True), Streaming(3, 12)),
    "windows that compensate beside others": (Streaming(2, 8, True), Streaming(4, 12, True), Streaming(2, 8, True), Streaming(3, 5)),
    "strided": (Strided(6, 3, 1, 8), Strided(10, 3, 1, 8, 2), Strided(4, 4, 3, 4), Streaming(2, 8)),
    "lines": (Lines((0, 3, 20, 44), (0, 1, 5, 9)), Streaming(2, 8), Lines((1, 2, 30), (0,)), Strided(4, 4, 1, 4)),
    "chosen together": (
        *(TopKeys(16, window=4, block=8, estimate="bounds", grouped=True),) * 2,
        *(TopKeys(7, refresh=2, window=5, grouped=True),) * 2,
    ),
    "blocks and power": (Power(5, 4, 2), Blocks(((0,), (0, 1), (1, 2)), 8), Blocks(((0,), (0, 1)), 4), Dense()),
    "lists": (Lines((0, 3), (0, 1, 5)), Strided(4, 3, 1, 8), Streaming(2, 8), TopKeys(5, window=3)),
}


def tiny(dtype: torch.dtype = torch.float64, device: str = "cpu", **more: Any) -> Scope:
    """A random Llama with two layers, four query heads and two key heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.3, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(dtype).to(device)
    model.set_attn_implementation("sdpa")
    return Scope(model, name="tiny")


def plan_of(scope: Scope, heads: tuple[Pattern, ...]) -> SparsePlan:
    """The same four patterns in every layer."""
    return SparsePlan(
        SparsePlan.uniform(scope, Dense()).model, {(layer, head): heads[head] for layer in range(LAYERS) for head in range(4)}
    )


def ids(count: int, seed: int = 0) -> torch.Tensor:
    """[1, count] random ids."""
    return torch.randint(1, 97, (1, count), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    """Two texts of 60 and 40 tokens, padded on the left."""
    batch = torch.cat([ids(60, 2), torch.cat([torch.zeros(1, 20, dtype=torch.int64), ids(40, 3)], 1)])
    mask = torch.ones_like(batch)
    mask[1, :20] = 0
    return {"input_ids": batch, "attention_mask": mask}


def written(scope: Scope, cache: Any = None, count: int = 6, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, logits [B, count, V]) of the model's own generate()."""
    more = {} if cache is None else {"past_key_values": cache}
    options = {name: one.to(scope.device) if isinstance(one, torch.Tensor) else one for name, one in options.items()}
    with torch.no_grad():
        out = scope.model.generate(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True, **more, **options,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)
