"""What a freeing cache takes of a device's memory during generate() at 32K tokens, by the allocator's own count, for every kind of plan.

Counted is everything that is alive when a decode step begins: keys, values, room to grow, chosen lists, what stands for blocks, sums of
dropped keys. What generate() itself holds (ids, masks, positions) is measured with the model's own cache and taken off.

The allocator's count is of its blocks, of which it does not split off a rest below 1 MiB where segments cannot grow; what the tensors asked
for is printed beside it.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from headscope.kernels.sparse_lists import forget
from headscope.plans import (
    Blocks,
    Budget,
    Dense,
    Lines,
    Pattern,
    Power,
    Span,
    SparsePlan,
    Streaming,
    Strided,
    TopBlocks,
    TopKeys,
    VerticalSlash,
)
from headscope.scope import Scope

pytestmark = pytest.mark.gpu

LENGTH, STEPS, LAYERS, HEADS, GROUP = 32768, 6, 3, 16, 4
SINK, WINDOW = 128, 1024
KEEP = LENGTH // 10

ONE: dict[str, Pattern] = {
    "dense": Dense(),
    "streaming": Streaming(SINK, WINDOW),
    "compensated": Streaming(4, 4000, True),
    "compensated spans": Span(0.0, 0.2, 4, 4000, True),
    "spans": Span(64, 0.1, 32),
    "strided": Strided(WINDOW, 8, 3),
    "lines": Lines(tuple(range(0, 32000, 40)), tuple(range(0, 512, 3))),
    "power": Power(WINDOW),
    "blocks": Blocks(((0,), (0, 1), (0, 2), (0, 1, 3))),
    "vertical and slash": VerticalSlash(100, 300),
    "top blocks of the prefill": TopBlocks(share=0.2),
    "budgets": Budget(KEEP),
    "budgets of each head": Budget(1000, grouped=False),
    "top keys": TopKeys(KEEP),
    "top keys, chosen together": TopKeys(KEEP, grouped=True),
    "top keys, now and then": TopKeys(KEEP, refresh=3),
    "top key blocks by bounds": TopKeys(KEEP, block=32, estimate="bounds"),
    "top key blocks by means": TopKeys(KEEP, block=16, estimate="mean"),
    "top key blocks, chosen together": TopKeys(KEEP, block=32, estimate="bounds", grouped=True),
}
MIXED: dict[str, tuple[Pattern, ...]] = {  # of a quarter of the key heads, and of the others
    "a quarter full": (Dense(), Streaming(SINK, WINDOW)),
    "a quarter full, the others compensated": (Dense(), Span(0.0, 0.2, 4, 4000, True)),
    "top key blocks beside streaming": (TopKeys(KEEP, block=32, estimate="bounds"), Streaming(SINK, WINDOW)),
}


@pytest.fixture(scope="module")
def scope() -> Scope:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=HEADS * 128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // GROUP, head_dim=128, max_position_embeddings=2 * LENGTH,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval().bfloat16()
    model.set_attn_implementation("sdpa")
    return Scope(model, name="wide")


@pytest.fixture(scope="module")
def dense(scope: Scope) -> tuple[int, int, int]:
    """(bytes of the model's own cache, of all else that a generation holds, of that what was asked for)."""
    _generated(scope, DynamicCache())  # the libraries' workspaces stay, and are no part of a generation
    cache = DynamicCache()
    found, asked, _ = _generated(scope, cache)
    torch.cuda.synchronize()
    with_cache = torch.cuda.memory_allocated()
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    whole = sum(x.untyped_storage().nbytes() for x in tensors)
    del cache, tensors
    gc.collect()
    freed = with_cache - torch.cuda.memory_allocated()
    assert freed == pytest.approx(whole, rel=1e-3)  # the allocator frees what the cache held, and nothing else
    return freed, found - freed, asked - whole


def _generated(scope: Scope, cache: Any) -> tuple[int, int, int]:
    """Bytes alive at the start of a decode step, more than before the prompt: the most of all steps but the first, in which budgets drop
    their keys; the same as the tensors asked for them; and how many tokens were seen.
    """
    ids = torch.randint(1, 97, (1, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    found: list[tuple[int, int]] = []

    def held() -> tuple[int, int]:
        return torch.cuda.memory_allocated(), torch.cuda.memory_stats()["requested_bytes.all.current"]

    def look(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            now = held()
            found.append((now[0] - before[0], now[1] - before[1]))

    hook = scope.model.register_forward_pre_hook(look, with_kwargs=True)
    forget()  # lists of an earlier case that go in this one would count as saved
    gc.collect()
    torch.cuda.synchronize()
    before = held()
    try:
        with torch.no_grad():
            scope.model.generate(ids, past_key_values=cache, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    finally:
        hook.remove()
    return max(one for one, _ in found[1:]), max(asked for _, asked in found[1:]), cache.get_seq_length()


@pytest.mark.parametrize("name", [*ONE, *MIXED])
def test_memory_is_the_plans_share(scope: Scope, dense: tuple[int, int, int], name: str) -> None:
    plan = SparsePlan.uniform(scope, ONE.get(name, Dense()))
    if name in MIXED:
        few, many = MIXED[name]
        plan = plan.replace({(layer, head): few if head < HEADS // 4 else many for layer in range(LAYERS) for head in range(HEADS)})
    with scope.execute(plan, cache="free") as ran:
        found, asked, length = _generated(scope, ran.new_cache())
    assert ran.ran["decode"] == LAYERS * (STEPS - 1), ran
    share, planned = (found - dense[1]) / dense[0], plan.kv_share(length)
    if name == "budgets of each head":  # the plan counts the neediest head of a group; heads may choose other keys each
        planned *= GROUP
    told = f"{(asked - dense[2]) / dense[0] / planned - 1:+.2%} asked for"
    print(f"KV {name}: {share:.4f} of dense, the plan says {planned:.4f}: {share / planned - 1:+.2%}, {told}")
    assert share <= planned * 1.05
