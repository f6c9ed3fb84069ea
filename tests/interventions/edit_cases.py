"""Random float64 calls of every kind: grouped queries, masks of all sorts, sinks, soft caps, windows, padding, decode steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.interventions import Intervention


def make_call(
    seed: int = 0,
    *,
    batch: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    rows: int = 13,
    keys: int | None = None,
    width: int = 8,
    v_width: int = 5,
    causal: bool = True,
    dtype: torch.dtype = torch.float64,
    **facts,
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    keys = rows if keys is None else keys

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = draw(batch, heads, rows, width), draw(batch, kv_heads, keys, width), draw(batch, kv_heads, keys, v_width)
    call_facts = {
        name: facts.pop(name) for name in ("softcap", "sink_logits", "query_offset", "key_offset", "first_token") if name in facts
    }
    mask = MaskFacts(causal=causal, **facts)
    return AttentionCall("m", 0, q * 1.5, k, v, width**-0.5, mask, **call_facts)


def calls(rows: int = 13) -> list[tuple[str, AttentionCall]]:
    valid = torch.ones(2, rows, dtype=torch.bool)
    valid[1, :4] = False
    right = torch.ones(2, rows, dtype=torch.bool)
    right[1, -3:] = False
    packed = (torch.arange(rows) // 5).expand(2, rows)
    mixed = torch.tensor([0, 1] * rows)[:rows].expand(2, rows)
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(2, 1, rows, rows, generator=generator) < 0.7
    allowed |= torch.eye(rows, dtype=torch.bool)
    bias = torch.randn(1, 6, rows, rows, generator=generator, dtype=torch.float64)
    bias[..., 2] = float("-inf")
    keys = rows + 9
    valid_keys = torch.ones(2, keys, dtype=torch.bool)
    valid_keys[1, :4] = False
    start = torch.tensor([0, 4])
    return [
        ("causal", make_call(0, rows=rows)),
        ("one group", make_call(1, rows=rows, heads=4, kv_heads=1)),
        ("no groups", make_call(2, rows=rows, heads=3, kv_heads=3, batch=1)),
        ("bidirectional", make_call(3, rows=rows, causal=False)),
        ("cross", replace(make_call(4, rows=rows, keys=7, causal=False), facts={"cross": True})),
        ("left padding", make_call(5, rows=rows, key_valid=valid, query_valid=valid, first_token=start)),
        ("right padding", make_call(6, rows=rows, key_valid=right, query_valid=right, causal=False)),
        ("window", make_call(7, rows=rows, window=4)),
        ("two-sided window", make_call(8, rows=rows, window=4, causal=False)),
        ("packed", make_call(9, rows=rows, query_segments=packed, key_segments=packed)),
        ("interleaved", make_call(10, rows=rows, query_segments=mixed, key_segments=mixed)),
        ("explicit mask", make_call(11, rows=rows, allowed=allowed)),
        ("bias", make_call(12, rows=rows, bias=bias)),
        ("soft cap", make_call(13, rows=rows, softcap=1.5)),
        ("sinks", make_call(14, rows=rows, sink_logits=torch.randn(6, generator=generator, dtype=torch.float64))),
        (
            "sinks, soft cap, window, padding",
            make_call(
                15,
                rows=rows,
                softcap=2.0,
                window=6,
                key_valid=valid,
                query_valid=valid,
                first_token=start,
                sink_logits=torch.randn(6, generator=generator, dtype=torch.float64),
            ),
        ),
        ("chunk", make_call(16, rows=rows, keys=keys, query_offset=9, key_valid=valid_keys, first_token=start)),
        ("decode", make_call(17, rows=1, keys=keys, query_offset=keys - 1, key_valid=valid_keys, first_token=start)),
        ("decode in a window", make_call(18, rows=1, keys=7, query_offset=30, key_offset=24, window=7)),
    ]


def in_dtype(call: AttentionCall, dtype: torch.dtype, device: str) -> tuple[AttentionCall, AttentionCall]:
    """The call rounded to a dtype on a device, and those very numbers in float64 on the CPU."""

    def moved(value, to, where):
        named = {slot: getattr(value, slot) for slot in value.__slots__}
        tensors = {slot: one for slot, one in named.items() if isinstance(one, torch.Tensor)}
        return replace(value, **{slot: one.to(where, to if one.is_floating_point() else one.dtype) for slot, one in tensors.items()})

    def both(value, to, where):
        facts = {name: fact.to(where) if isinstance(fact, torch.Tensor) else fact for name, fact in call.facts.items()}
        return replace(moved(value, to, where), mask=moved(value.mask, to, where), facts=facts)

    rounded = both(call, dtype, "cpu")
    return both(rounded, dtype, device), both(rounded, torch.float64, "cpu")


@dataclass(frozen=True)
class Grab(Intervention):
    """Keeps the calls it meets."""

    into: list = field(default_factory=list)

    def before(self, call):
        self.into.append(call)
        return call
