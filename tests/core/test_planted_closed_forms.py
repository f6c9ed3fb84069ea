"""Closed forms of saturated heads on BOS + R x K distinct tokens, derived as rational numbers, against two other roads to the same values:
softmax over one-hot scores in float64, and the live Llama whose weights were written by hand. No road shares code with another.

With N = K R + 1 and b = 0 .. R - 1 the number of the row's block:

    induction, row of block b >= 1: the b keys K m - 1 tokens back (m = 1 .. b), equally; block 0 and BOS itself fall back to BOS
    duplicate: the b + 1 keys K m tokens back (m = 0 .. b), equally
"""

from __future__ import annotations

import math
from fractions import Fraction as F

import pytest
import torch

from headscope.models.planted import Duplicate, Induction, Offset, Previous, Sink, Uniform, planted_llama

PUBLISHED = {
    # prev, ind_last, ind_sum, echo_last, echo_sum, alpha_1, d, H to two digits, as tabulated for BOS + 4 x 25 tokens
    "previous": (1.00, 0, 0, 0, 0, 0.02, 1.0, 0),
    "induction": (0.01, 0.61, 1.00, 0, 0, 0.26, 30.3, 0.44),
    "duplicate": (0, 0, 0, 0.36, 0.64, 0.01, 18.6, 0.79),
    "sink": (0.01, 0, 0, 0, 0, 1.00, 50.0, 0),
    "uniform": (0.04, 0.02, 0.03, 0.02, 0.03, 0.05, 25.0, 3.65),
}
NAMES = ("prev", "ind_last", "ind_sum", "echo_last", "echo_sum", "alpha_1", "d", "H")
SHAPES = [(25, 4), (7, 3), (3, 6)]
shapes = pytest.mark.parametrize(("k", "r"), SHAPES, ids=[f"{r}x{k}" for k, r in SHAPES])


def mean(values) -> F:
    values = list(values)
    return sum(values, F(0)) / len(values)


def closed_form(name: str, k: int, r: int, delta: int = 1) -> dict[str, float]:
    """The eight numbers of the table and WAAD (W = 10), as exact as they come: rationals, and logarithms of integers."""
    n = k * r + 1
    out = dict.fromkeys((*NAMES, "waad"), F(0))
    later = range(1, r)
    if name in ("previous", "offset"):
        out["prev"] = F(1) if delta == 1 else F(int(delta > 1), n - 1)
        out["alpha_1"] = F(delta + 1, n)
        out["d"] = F(delta * (delta - 1), 2 * n) + F((n - delta) * delta, n)
        out["waad"] = mean(F(min(t, delta, 10)) for t in range(n))
        if delta == k:
            out["echo_last"] = F(1)
        if delta == k - 1:
            out["ind_last"] = F(1)
        out["echo_sum"] = mean(F(int(delta % k == 0 and 0 < delta // k <= i // k)) for i in range(k, k * r))
        out["ind_sum"] = mean(F(int((delta + 1) % k == 0 and 0 < (delta + 1) // k <= i // k)) for i in range(k, k * r))
    elif name == "induction":
        out["prev"] = F(1, n - 1)
        out["ind_last"] = mean(F(1, b) for b in later)
        out["ind_sum"] = F(1)
        out["alpha_1"] = F(k + 1, n)
        out["d"] = (F(k * (k + 1), 2) + k * sum(F(k * (b + 1), 2) - 1 for b in later)) / n
        out["H"] = F(k, n) * F(math.log(math.factorial(r - 1)))
        reach = [min(t, 10) for t in range(k + 1)]
        out["waad"] = (sum(reach) + k * sum(mean(F(min(k * m - 1, 10)) for m in range(1, b + 1)) for b in later)) / n
    elif name == "duplicate":
        out["echo_last"] = mean(F(1, b + 1) for b in later)
        out["echo_sum"] = mean(F(b, b + 1) for b in later)
        out["alpha_1"] = F(1, n)
        out["d"] = F(k * k * r * (r - 1), 4 * n)
        out["H"] = F(k, n) * F(math.log(math.factorial(r)))
        out["waad"] = F(k, n) * sum(mean(F(min(k * m, 10)) for m in range(b + 1)) for b in range(r))
    elif name == "sink":
        out |= {"prev": F(1, n - 1), "alpha_1": F(1), "d": F(n - 1, 2), "waad": mean(F(min(t, 10)) for t in range(n))}
    else:
        out["prev"] = mean(F(1, t + 1) for t in range(1, n))
        out["ind_last"] = out["echo_last"] = mean(F(1, i + 2) for i in range(k, k * r))
        out["ind_sum"] = out["echo_sum"] = mean(F(i // k, i + 2) for i in range(k, k * r))
        out["alpha_1"] = mean(F(1, t) for t in range(1, n + 1))
        out["d"] = F(n - 1, 4)
        out["H"] = F(math.lgamma(n + 1) / n)
        out["waad"] = mean(F(sum(min(m, 10) for m in range(t + 1)), t + 1) for t in range(n))
    return {key: float(value) for key, value in out.items()}


def measured(a: torch.Tensor, k: int, r: int) -> dict[str, float]:
    """The same numbers read off a matrix [N, N], entry by entry; row t = 1 + i holds token i."""
    n = k * r + 1
    a = a.double()
    rows = range(k, k * r)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0).double()
    return {
        "prev": float(a.diagonal(-1).mean()),
        "ind_last": sum(float(a[1 + i, 1 + i - k + 1]) for i in rows) / len(rows),
        "ind_sum": sum(float(a[1 + i, 2 + j]) for i in rows for j in range(i % k, i, k)) / len(rows),
        "echo_last": sum(float(a[1 + i, 1 + i - k]) for i in rows) / len(rows),
        "echo_sum": sum(float(a[1 + i, 1 + j]) for i in rows for j in range(i % k, i, k)) / len(rows),
        "alpha_1": float(a[:, 0].mean()),
        "d": float((a * distance).sum(-1).mean()),
        "H": float(-torch.xlogy(a, a).sum(-1).mean()),
        "waad": float((a * distance.clamp(max=10)).sum(-1).mean()),
    }


def one_hot_attention(name: str, k: int, r: int, delta: int = 1, nats: float = 60.0) -> torch.Tensor:
    """Softmax over scores of one-hot tokens and positions, float64: match 2, BOS 1, the rest 0, times `nats`."""
    n = k * r + 1
    token = torch.eye(k + 1, dtype=torch.float64)[torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(k).repeat(r)])]
    token[0] = 0
    position = torch.eye(n, dtype=torch.float64)
    shifted = torch.zeros(n, n, dtype=torch.float64)
    shifted[delta:, : n - delta] = torch.eye(n - delta, dtype=torch.float64)
    earlier = torch.zeros(n, n, dtype=torch.float64)
    earlier[1:, :-1] = torch.eye(n - 1, dtype=torch.float64)
    bos = torch.zeros(n, dtype=torch.float64)
    bos[0] = 1
    scores = {
        "previous": 2 * shifted @ position.T + bos,
        "offset": 2 * shifted @ position.T + bos,
        "induction": 2 * token @ (earlier @ token).T + bos,
        "duplicate": 2 * token @ token.T,
        "sink": bos.expand(n, n),
        "uniform": torch.zeros(n, n, dtype=torch.float64),
    }[name]
    return torch.softmax((nats * scores).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf), -1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_closed_forms_round_to_the_published_table(name):
    got = closed_form(name, 25, 4)
    for key, value in zip(NAMES, PUBLISHED[name], strict=True):
        half = 0.05 if key == "d" else 0.005
        assert abs(got[key] - value) <= half + 1e-9, (key, got[key])


CASES = [(name, 1) for name in PUBLISHED] + [("offset", delta) for delta in (0, 2, 5, 10, 11, 64, 24, 25)]


@pytest.mark.parametrize(("name", "delta"), CASES, ids=[f"{name}-{delta}" for name, delta in CASES])
def test_dense_float64_attention_gives_the_closed_forms(name, delta):
    for k, r in SHAPES:
        if delta <= k * r:
            got = measured(one_hot_attention(name, k, r, delta), k, r)
            assert got == pytest.approx(closed_form(name, k, r, delta), abs=1e-12, rel=1e-12), (k, r)


HEADS = {
    (0, 0): Previous(),
    (0, 1): Duplicate(),
    (0, 2): Sink(),
    (0, 3): Offset(5),
    (1, 0): Induction(),
    (1, 1): Offset(11),
    (1, 2): Sink(),
    (1, 3): Duplicate(),
    (1, 4): Previous(),
}


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["one query head per key head", "two", "four"])
def planted(request):
    planted = planted_llama(HEADS, kv_heads=8 // request.param)
    planted.model.set_attn_implementation("eager")
    return planted


@shapes
def test_the_live_model_gives_the_closed_forms(planted, k, r):
    """Every planted head of a real Llama, with one, two and four query heads of different kinds on one key head."""
    with torch.no_grad():
        attentions = planted.model(planted.prompt(k, r), output_attentions=True).attentions
    for (layer, head), kind in planted.heads.items():
        want = closed_form(kind.name, k, r, getattr(kind, "delta", 1))
        got = measured(attentions[layer][0, head], k, r)
        assert got == pytest.approx(want, abs=1e-5, rel=1e-5), (layer, head, kind)


@shapes
def test_the_expected_attention_is_the_dense_one(planted, k, r):
    expected = planted.expected(planted.prompt(k, r))
    for place, kind in planted.heads.items():
        dense = one_hot_attention(kind.name, k, r, getattr(kind, "delta", 1))
        torch.testing.assert_close(expected[place][0], dense, atol=1e-12, rtol=0)


def test_offset_rows_are_exact_and_waad_is_clipped_at_ten(planted):
    """Row by row: distance delta and WAAD min(delta, 10) wherever the target exists, the row's own number before that."""
    ids = planted.prompt(25, 4)
    with torch.no_grad():
        attentions = planted.model(ids, output_attentions=True).attentions
    at = torch.arange(ids.shape[1], dtype=torch.float64)
    distance = (at[:, None] - at).clamp(min=0)
    for place, delta in (((0, 3), 5.0), ((1, 1), 11.0)):
        a = attentions[place[0]][0, place[1]].double()
        torch.testing.assert_close((a * distance).sum(-1), at.clamp(max=delta), atol=1e-5, rtol=0)
        torch.testing.assert_close((a * distance.clamp(max=10)).sum(-1), at.clamp(max=min(delta, 10.0)), atol=1e-5, rtol=0)


def test_unplanted_heads_are_uniform():
    planted = planted_llama({(0, 1): Sink()}, layers=1, n_heads=2)
    assert planted.truth == {(0, 0): "uniform", (0, 1): "sink"}
    assert isinstance(planted.heads[0, 0], Uniform)
