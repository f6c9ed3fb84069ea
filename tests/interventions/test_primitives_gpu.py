"""The primitives on a CUDA device, where lse comes from the Triton kernels: the same dense twins, on the CPU in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headscope.interventions import p_site, s_site
from headscope.kernels.partial import exact_attention
from headscope.kernels.visible_mean import visible_mean

from .dense_edits import Dense, close
from .edit_cases import calls

CALLS = calls(rows=130)

pytestmark = pytest.mark.gpu


def moved(value, dtype):
    """A call, or the facts of its mask, on the device; floating point in a dtype."""
    changed = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if isinstance(part, torch.Tensor):
            changed[field.name] = part.cuda().to(dtype) if part.is_floating_point() else part.cuda()
        elif field.name == "mask":
            changed[field.name] = moved(part, dtype)
    return dataclasses.replace(value, **changed)


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_site(call, dtype):
    heads = [call.q.shape[1] - 1, 0]
    there = moved(call, dtype)
    limit = 1e-9 if dtype == torch.float64 else 2e-4
    keys = torch.zeros(call.k.shape[2], dtype=torch.bool)
    keys[[0, 2, 5]] = True
    on_device = keys.cuda()

    def fresh():
        return dataclasses.replace(there, facts=dict(call.facts)), exact_attention(there)

    one, out = fresh()
    close(out.cpu(), Dense(call), limit)
    close(p_site.redistribute(one, out, heads, on_device, keep=0.4).cpu(), Dense(call).redistribute(heads, keys, None, 0.4), limit)
    one, out = fresh()
    boosted = s_site.abs_boost(one, out, heads, on_device, 0.6)
    dense = Dense(call).boost(heads, keys, 0.6)
    close(boosted.cpu(), dense, limit)
    close(p_site.redistribute(one, boosted, heads, on_device, keep=0.4).cpu(), dense.redistribute(heads, keys, None, 0.4), limit)
    one, out = fresh()
    bias = keys.double() * 0.8
    close(exact_attention(s_site.key_bias(one, heads, bias)).cpu(), Dense(call).add(heads, bias), limit)
    for pattern in ("uniform", "argmax", *(() if call.is_cross else ("identity",))):
        one, out = fresh()
        close(p_site.mix(one, out, heads, pattern, 0.4).cpu(), Dense(call).mix(heads, pattern, 0.4), limit)
    cooled = s_site.temperature_before(there, heads, 2.0)
    got = exact_attention(cooled) if cooled is not None else s_site.temperature_after(*fresh(), heads, 2.0)
    close(got.cpu(), Dense(call).cool(heads, 2.0), limit)
    assert visible_mean(there).is_cuda
