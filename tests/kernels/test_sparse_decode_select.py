"""Choosing blocks in two launches, against stable sorts of the same scores. On a machine without CUDA in Triton's interpreter."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

from headscope.kernels.sparse_decode_select import LARGEST, can_select, select_blocks, stand_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Row = tuple[int, int, int]


def expected(scores: torch.Tensor, kv_heads: int, table: list[Row], lengths: list[int], size: int, grouped: bool) -> list[dict[int, int]]:
    """Per sequence and key head: block -> bits of the heads that keep it."""
    group = scores.shape[1] // kv_heads
    out = []
    for b, length in enumerate(lengths):
        for g in range(kv_heads):
            found: dict[int, int] = {}
            for place in range(group):
                keep, first, window = table[g * group + place]
                count = max(0, length - window) // size
                own = scores[b, g * group : (g + 1) * group, :count].double()
                ranked = torch.log_softmax(own, -1).logsumexp(0) if grouped else own[place].clone()
                ranked[:first] = torch.inf
                for block in ranked.sort(descending=True, stable=True).indices[:keep].tolist() if keep else []:
                    found[block] = found.get(block, 0) | 1 << place
            out.append(found)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_lists_are_those_of_a_stable_sort(seed: int) -> None:
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group = rng.choice((1, 2)), rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4))
    blocks, size, grouped = rng.choice((1, 20, 70, 130)), rng.choice((4, 16)), rng.random() < 0.4
    heads = kv_heads * group
    scores = torch.randn(batch, heads, blocks, generator=gen) * rng.choice((0.01, 1.0, 50.0))
    if seed % 3 == 0 and not grouped:
        scores = (scores * 2).round() / 2  # equal scores, zeros of both signs among them
    lengths = [rng.randint(1, blocks * size + 3) for _ in range(batch)]
    table: list[Row] = [(0, 0, 0)] * heads
    for g in range(kv_heads):
        shared = (rng.randint(1, blocks + 3), rng.randint(0, 3), rng.randint(1, 40))
        for place in range(group):
            if rng.random() < 0.8:
                table[g * group + place] = shared if grouped else (rng.randint(1, blocks + 3), rng.randint(0, 3), rng.randint(1, 40))
    tail = seed % 2 == 1
    lists, rules = select_blocks(
        scores.to(DEVICE),
        kv_heads,
        torch.tensor(table, dtype=torch.int32, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        size,
        grouped,
        max(window for _, _, window in table) if tail else 0,
    )
    assert lists.block == size
    for at, found in enumerate(expected(scores, kv_heads, table, lengths, size, grouped)):
        b, g = divmod(at, kv_heads)
        count = int(lists.counts[b, g])
        entries, bits = lists.entries[b, g, :count].tolist(), lists.bits[b, g, :count].tolist()
        if tail:
            own = {h: max(0, lengths[b] - table[g * group + h][2]) // size for h in range(group) if table[g * group + h][0]}
            behind = range(min(own.values(), default=0), -(-lengths[b] // size)) if own else range(0)
            entries, tail_entries = entries[: count - len(behind)], entries[count - len(behind) :]
            bits, tail_bits = bits[: len(entries)], bits[len(entries) :]
            assert tail_entries == list(behind)
            assert tail_bits == [sum(1 << h for h, begin in own.items() if block >= begin) for block in behind]
        assert entries == sorted(entries)
        assert dict(zip(entries, bits, strict=True)) == found
    assert rules.tolist() == [[[0, 0, max(0, length - window) // size * size] for _, _, window in table] for length in lengths]


@pytest.mark.parametrize("bounds", [False, True])
def test_estimates_of_blocks(bounds: bool) -> None:
    gen = torch.Generator().manual_seed(1)
    q, stands = torch.randn(2, 6, 40, generator=gen), torch.randn(2, 2, 50, 80 if bounds else 40, generator=gen)
    found = stand_scores(q.to(DEVICE), stands.to(DEVICE), 45, 0.5, bounds).cpu()
    each = stands[:, :, :45].repeat_interleave(3, 1).double()
    wide = q.double()[:, :, None]
    exact = (wide.clamp(min=0) * each[..., :40] + wide.clamp(max=0) * each[..., 40:]).sum(-1) if bounds else (wide * each).sum(-1)
    assert torch.allclose(found.double(), 0.5 * exact, atol=1e-5, rtol=0)


def test_what_one_program_holds_is_said() -> None:
    assert can_select(LARGEST // 4, 4)
    assert can_select(LARGEST // 4, 3)
    assert not can_select(LARGEST // 4 + 1, 4)
