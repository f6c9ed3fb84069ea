"""A sequence measured in pieces: the pieces' sums put together are those of the whole, whatever the pieces' sizes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import itertools

from statistics_cases import close, every, make_call

from headscope.kernels.blocked import measure_blocked

N = 210


@pytest.mark.parametrize("cuts", [[0, 128, N], [0, 50, 137, N], [0, 1, 2, 200, *range(201, N + 1)]], ids=["aligned", "odd", "decode"])
@pytest.mark.parametrize("window", [None, 40])
def test_pieces_add_up(cuts: list[int], window: int | None) -> None:
    whole = make_call(rows=N, mask={"window": window})
    request = every(N, block=32)
    expected = measure_blocked(whole, request)
    parts = []
    for begin, end in itertools.pairwise(cuts):
        first = 0 if window is None else max(begin - window + 1, 0)  # a sliding cache drops what no row sees any more
        piece = replace(whole, q=whole.q[:, :, begin:end], k=whole.k[:, :, first:end], query_offset=begin, key_offset=first)
        parts.append(measure_blocked(piece, request))

    for name, value in expected.rows.items():
        close(name, torch.cat([part.rows[name] for part in parts], 2), value, 2e-6)
    totals = {**{name: torch.zeros_like(value) for name, value in {**expected.columns, **expected.counts}.items()}}
    cells = {name: torch.zeros_like(value) for name, value in expected.maps.items()}
    diagonals = torch.zeros_like(expected.diagonals)
    pairs = {name: torch.full_like(value, float("nan")) for name, value in expected.pairs.items()}
    for part in parts:
        for name, value in {**part.columns, **part.counts}.items():
            totals[name][..., part.key_offset : part.key_offset + value.shape[-1]] += value
        for name, value in part.maps.items():
            if name == "segment_mass":
                cells[name] += value
                continue
            i, j = part.query_offset // 32, part.key_offset // 32
            there = cells[name][:, :, i : i + value.shape[2], j : j + value.shape[3]]
            there.copy_(torch.maximum(there, value) if name == "block_max" else there + value)
        diagonals[..., : part.diagonals.shape[-1]] += part.diagonals
        for name, value in part.pairs.items():
            pairs[name] = torch.where(value.isnan(), pairs[name], value)
    for name, value in expected.columns.items():
        close(name, totals[name], value, 2e-6)
    for name, value in expected.counts.items():
        # keys that a sliding cache has dropped are not there to be counted
        assert torch.equal(totals[name], value) if window is None else bool((totals[name] <= value).all())
    for name, value in expected.maps.items():
        close(name, cells[name], value, 2e-6)
    close("diagonal_sum", diagonals, expected.diagonals, 2e-6)
    if window is None:
        for name, value in expected.pairs.items():
            close(name, pairs[name], value, 2e-6)
