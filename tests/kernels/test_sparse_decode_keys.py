"""Choosing single keys by exact scores, against stable sorts of the same scores. On a machine without CUDA in Triton's interpreter."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.sparse_decode_keys as kernels
from headscope.kernels.sparse_decode_choose import scores_and_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("seed", range(14))
def test_lists_are_those_of_a_stable_sort(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several stretches; smooth ones, some that repeat, and some whose sample misleads, which are searched whole."""
    if DEVICE == "cpu":
        for name, value in (("SAMPLE", 64), ("ROOM", 256), ("STRETCH", 256)):
            monkeypatch.setattr(kernels, name, value)
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group = rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 2, 3))
    keys = rng.choice((40, 700)) if DEVICE == "cpu" else rng.choice((40, 5000, 70000))
    heads, grouped, tail = kv_heads * group, rng.random() < 0.4, rng.random() < 0.5
    rows = kv_heads if grouped else heads
    scores = torch.randn(batch, rows, keys, generator=gen) * rng.choice((0.01, 1.0, 30.0))
    if seed % 3 == 0:
        scores = (scores * 2).round() / 2
    if seed % 4 == 1:
        scores[..., : keys // 5] += 20.0
        scores[..., torch.arange(0, keys, max(1, keys // 64))] = -9.0
    lengths = [rng.randint(1, keys) for _ in range(batch)]
    table = [(0, 0, 0)] * heads
    for g in range(kv_heads):
        shared = (rng.randint(1, keys + 3), rng.randint(0, 3), rng.randint(1, 40))
        for place in range(group):
            if rng.random() < 0.8:
                table[g * group + place] = shared if grouped else (rng.randint(1, keys + 3), rng.randint(0, 3), rng.randint(1, 40))
    first = [max(table[g * group : (g + 1) * group]) for g in range(kv_heads)] if grouped else table
    tables = [torch.tensor(one, dtype=torch.int32, device=DEVICE) for one in (table, first, lengths)]
    lists, rules = kernels.select_keys(scores.to(DEVICE), heads, kv_heads, *tables, keys, tail)
    for b, length in enumerate(lengths):
        for g in range(kv_heads):
            found: dict[int, int] = {}
            for place in range(group):
                keep, sink, window = table[g * group + place]
                count = max(0, length - window)
                own = scores[b, g if grouped else g * group + place, :count].clone()
                own[:sink] = torch.inf
                chosen = own.sort(descending=True, stable=True).indices[:keep].tolist() if keep else []
                for key in chosen + (list(range(count, length)) if keep and tail else []):
                    found[key] = found.get(key, 0) | 1 << place
            many = int(lists.counts[b, g])
            entries, bits = lists.entries[b, g, :many].tolist(), lists.bits[b, g, :many].tolist()
            assert entries == sorted(entries)
            assert dict(zip(entries, bits, strict=True)) == found
    assert rules.tolist() == [[[0, 0, max(0, length - window)] for _, _, window in table] for length in lengths]


def test_weights_of_a_group() -> None:
    gen = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 6, 32, generator=gen) * 3, torch.randn(2, 2, 300, 32, generator=gen)
    scores, tops, totals = scores_and_sums(q.to(DEVICE), k.to(DEVICE), 0.5)
    exact = 0.5 * (q.double()[:, :, None] @ k.double().repeat_interleave(3, 1).transpose(-1, -2))[:, :, 0]
    assert torch.allclose(scores.cpu().double(), exact, atol=1e-4, rtol=0)
    found = kernels.group_weights(scores, tops, totals, 2).cpu().double()
    expected = torch.log_softmax(exact, -1).unflatten(1, (2, 3)).logsumexp(2)
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)
