"""Closed forms: scores chosen so that A is known on paper, checked for both kernels. The twin is not its own oracle."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.kernels import measure, use_backend
from headscope.statistics.partial import PartialStatistics
from headscope.statistics.request import StatisticsRequest

N = 150
BACKENDS = ("blocked", "naive")


def planted(scores: torch.Tensor, backend: str, mask: MaskFacts | None = None, **request: object) -> PartialStatistics:
    """Statistics of one head whose scores are a given matrix: q is the matrix, k the identity."""
    n = scores.shape[0]
    call = AttentionCall("m", 0, scores[None, None], torch.eye(n)[None, None], None, 1.0, mask or MaskFacts(True))
    with use_backend(backend):
        return measure(call, StatisticsRequest(**{"names": ("passive", "diagonal_sum"), **request}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform(backend: str) -> None:
    """A[t, s] = 1 / (t + 1): entropy ln(t + 1), mean distance t / 2, second moment t (2t + 1) / 6, column sum H_N - H_s."""
    out = planted(torch.zeros(N, N), backend, waad_window=10, local_window=64, sink_tokens=4, fai_band=(10, 50), block=16)
    t = torch.arange(N, dtype=torch.float64)

    def check(value: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(value[0, 0].double(), expected, rtol=2e-6, atol=1e-12)

    check(out.rows["lse"], (t + 1).log())
    check(out.rows["entropy"], (t + 1).log())
    check(out.rows["row_max"], 1 / (t + 1))
    check(out.rows["distance"], t / 2)
    check(out.rows["distance_sq"], t * (2 * t + 1) / 6)
    near = t.clamp(max=10)
    check(out.rows["waad"], (near * (near + 1) / 2 + 10 * (t - near)) / (t + 1))
    check(out.rows["local_mass"], (t + 1).clamp(max=64) / (t + 1))
    check(out.rows["sink_mass"], (t + 1).clamp(max=4) / (t + 1))
    assert (out.rows["argmax"] == 0).all()
    inverse = 1 / (t + 1)
    check(out.columns["column_sum"], inverse.flip(0).cumsum(0).flip(0))
    band = torch.stack([inverse[int(s) + 10 : int(s) + 51].sum() for s in t])
    check(out.columns["fai_sum"], band)
    assert out.counts["row_count"][0].tolist() == [N - s for s in range(N)]
    assert out.counts["fai_count"][0].tolist() == [min(max(N - s - 10, 0), 41) for s in range(N)]
    assert out.diagonals is not None
    check(out.diagonals, torch.stack([inverse[int(d) :].sum() for d in t]))
    masses = out.maps["block_mass"][0, 0].double()
    assert masses.shape == (10, 10)
    torch.testing.assert_close(masses.sum(-1), torch.tensor([16.0] * 9 + [N - 144.0], dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert float(masses.triu(1).abs().max()) == 0.0
    torch.testing.assert_close(
        out.maps["block_max"][0, 0, :, 0].double(), 1 / (torch.arange(10, dtype=torch.float64) * 16 + 1), rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("back", [0, 1, 17, 100])
def test_fixed_offset(backend: str, back: int) -> None:
    """All weight on the key `back` before: distance exactly `back`, entropy 0, one diagonal."""
    t = torch.arange(N)
    scores = torch.zeros(N, N)
    scores[t, (t - back).clamp_min(0)] = 200.0
    out = planted(scores, backend, local_window=17, waad_window=10, sink_tokens=1)
    rows = slice(back, None)
    exact = {
        "distance": back,
        "distance_sq": back**2,
        "waad": min(back, 10),
        "local_mass": float(back < 17),
        "row_max": 1.0,
        "entropy": 0.0,
    }
    for name, expected in exact.items():
        assert (out.rows[name][0, 0, rows].double() - expected).abs().max() < 1e-20 + 1e-12 * expected, name
    assert torch.equal(out.rows["argmax"][0, 0, rows], t[rows] - back)
    assert out.diagonals is not None
    assert float(out.diagonals[0, 0, back]) == N - back
    assert float(out.columns["column_sum"][0, 0, : N - back][1:].sub(1.0).abs().max()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_keys_of_unequal_weight(backend: str) -> None:
    """Weights 1 - p and p with p = 1e-6: an entropy that float32 sums next to a 1 would get wrong in the second digit."""
    p = 1e-6
    scores = torch.full((N, N), -300.0)
    t = torch.arange(N)
    scores[:, 0] = 0.0
    scores[t[1:], t[1:]] = math.log(p / (1 - p))
    out = planted(scores, backend, sink_tokens=1)
    expected = -(p * math.log(p) + (1 - p) * math.log1p(-p))
    assert float((out.rows["entropy"][0, 0, 1:].double() / expected - 1).abs().max()) < 2e-6
    assert float((out.rows["distance"][0, 0, 1:].double() / (t[1:] * (1 - p)) - 1).abs().max()) < 1e-6
    assert float((out.rows["local_mass"][0, 0, 80:].double() / p - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_of_equal_keys(backend: str) -> None:
    scores = torch.zeros(N, N)
    scores[:, 40] = scores[:, 90] = 3.0
    argmax = planted(scores, backend).rows["argmax"][0, 0]
    assert argmax.tolist() == [0] * 40 + [40] * (N - 40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bidirectional_uniform(backend: str) -> None:
    out = planted(torch.zeros(N, N), backend, MaskFacts(False), local_window=3)
    t = torch.arange(N, dtype=torch.float64)
    after = N - 1 - t
    torch.testing.assert_close(out.rows["distance"][0, 0].double(), (t * (t + 1) + after * (after + 1)) / (2 * N), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(out.rows["local_mass"][0, 0].double(), (1 + t.clamp(max=2) + after.clamp(max=2)) / N, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(out.columns["column_sum"][0, 0].double(), torch.ones(N, dtype=torch.float64), rtol=2e-6, atol=0.0)
    assert out.counts["row_count"].unique().tolist() == [N]
    assert out.diagonal_start == 1 - N
    assert out.diagonals is not None
    d = torch.arange(1 - N, N)
    torch.testing.assert_close(out.diagonals[0, 0].double(), (N - d.abs()).double() / N, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_logit_takes_its_share(backend: str) -> None:
    """One sink logit equal to ln(t + 1) on flat scores takes half; the rest is not renormalised."""
    n = 64
    call = AttentionCall(
        "m",
        0,
        torch.zeros(1, 1, 1, 4),
        torch.zeros(1, 1, n, 4),
        None,
        1.0,
        MaskFacts(True),
        query_offset=n - 1,
        sink_logits=torch.tensor([math.log(n)]),
    )
    with use_backend(backend):
        out = measure(call, StatisticsRequest(names=("lse", "entropy", "sink_logit_mass", "row_max", "column_sum")))
    assert float(out.rows["sink_logit_mass"]) == pytest.approx(0.5, rel=1e-6)
    assert float(out.rows["row_max"]) == pytest.approx(0.5 / n, rel=1e-6)
    assert float(out.rows["lse"]) == pytest.approx(math.log(2 * n), rel=1e-6)
    assert float(out.rows["entropy"]) == pytest.approx(0.5 * math.log(2 * n), rel=1e-6)
    assert float(out.columns["column_sum"].sum()) == pytest.approx(0.5, rel=1e-6)
