"""The decode kernels on the device: hundreds of random steps, and CUDA graphs that stay right while the text grows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

from headscope.kernels.sparse_decode_host import NEVER, Places, cut, decode

_spec = importlib.util.spec_from_file_location("sparse_decode_cases", Path(__file__).with_name("sparse_decode_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["sparse_decode_cases"] = cases
_spec.loader.exec_module(cases)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", range(300))
def test_random_steps(seed: int) -> None:
    one = cases.step(seed, (64, 80, 96, 128, 256), (torch.bfloat16, torch.float16, torch.float32), 3000, "cuda")
    cases.compare(one, one.run())
    cases.compare(one, one.run())  # the second launch takes the remembered kernel


def test_a_captured_graph_follows_lengths_rules_and_lists() -> None:
    gen = torch.Generator(device="cuda").manual_seed(0)
    capacity = 4096
    q, k, v = (
        torch.randn(2, heads, count, 128, generator=gen, device="cuda", dtype=torch.bfloat16)
        for heads, count in ((8, 1), (2, capacity), (2, capacity))
    )
    rules = torch.tensor([[(0, NEVER, NEVER), (4, 100, NEVER)] * 4], dtype=torch.int32, device="cuda")
    lengths = torch.full((2,), 1000, dtype=torch.int32, device="cuda")
    work = cut([capacity, capacity], 2, q.device)
    chosen = torch.rand(2, 8, capacity, generator=gen, device="cuda").cpu() < 0.1
    lists = cases.lists_of(chosen, 2, 1, "cuda")
    places = Places.of(k, v)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return decode(q, places, rules, lengths, work, scale=128**-0.5, lists=lists)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    for step, length in enumerate((1000, 1001, 2500, 4096, 17)):
        lengths.fill_(length)
        if step == 3:
            rules.copy_(torch.tensor([[(2, 50, NEVER), (0, 0, 100)] * 4], dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        starts = torch.zeros(2, dtype=torch.int32, device="cuda")
        one = cases.Step(q, k, v, rules, lengths, starts, lists, chosen.to("cuda"), None, None, None, None, work, True)
        cases.compare(one, (out, lse))
