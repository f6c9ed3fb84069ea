"""Probes on attention matrices whose scores are known in closed form.

The statistics here come from dense matrices by their definitions, written out a second time and on purpose naively, so that the probes are
tested apart from capture and kernels.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.probes import (
    DuplicateToken,
    Entropy,
    Fai,
    Induction,
    Locality,
    PreviousToken,
    ProbeText,
    Razor,
    Receiver,
    Sink,
    SinkControl,
    Streaming,
    Waad,
)
from headscope.probes.text import TokenPool, repeated_random, repeated_token
from headscope.profile.passes import plan_passes
from headscope.statistics import HeadStatistics, StatisticsRequest
from headscope.topology import AttentionModule, Topology

BLOCK, REPEATS = 25, 4


def topology_of(heads: int, layers: int = 1, **facts) -> Topology:
    causal = facts.pop("causal", True)
    rows = [AttentionModule(f"layers.{i}.attn", i, "full", heads, heads, 8, causal, **facts) for i in range(layers)]
    return Topology(tuple(rows), "Dense")


def dense_statistics(matrices: list[torch.Tensor], request: StatisticsRequest, topology: Topology) -> HeadStatistics:
    """HeadStatistics of A [H, N, N] per layer, entry by entry from the definitions."""
    values: dict[str, dict[str, torch.Tensor]] = {name: {} for name in request.names if name != "pairs"}
    pairs: dict[str, dict[str, torch.Tensor]] = {name: {} for name in request.pairs}
    for module, a in zip(topology.main, matrices, strict=True):
        a = a.double()
        n = a.shape[-1]
        t, s = torch.arange(n)[:, None], torch.arange(n)[None, :]
        seen = (s <= t) if module.causal else torch.ones(n, n, dtype=torch.bool)
        lo, hi = request.fai_band
        band = (t - s >= lo) & (t - s <= (n if hi is None else hi)) & seen
        rows = {
            "entropy": -torch.where(a > 0, a * a.clamp_min(1e-300).log(), torch.zeros_like(a)).sum(-1),
            "row_max": a.amax(-1),
            "distance": (a * (t - s).abs()).sum(-1),
            "waad": (a * (t - s).abs().clamp_max(request.waad_window)).sum(-1),
            "sink_mass": (a * (s < request.sink_tokens)).sum(-1),
            "local_mass": (a * ((t - s).abs() < request.local_window)).sum(-1),
            "sink_logit_mass": 1 - a.sum(-1),
            "column_sum": a.sum(-2),
            "sink_importance": a.sum(-2) / seen.sum(0),
            "fai": (a * band).sum(-2) / band.sum(0),
        }
        if "segment_mass" in request.names:
            count = request.segment_count
            member = torch.zeros(count, n, dtype=torch.float64)
            for place, segment in enumerate(request.segments.tolist()):
                if segment >= 0:
                    member[segment, place] = 1
            rows["segment_mass"] = member @ a @ member.T
        for name, table in values.items():
            table[module.name] = rows[name][None]
        for name, (queries, keys) in request.pairs.items():
            pairs[name][module.name] = a[:, queries, keys][None]
    valid = {module.name: torch.ones(1, matrices[0].shape[-1], dtype=torch.bool) for module in topology.main}
    return HeadStatistics(request, topology, values=values, pairs=pairs, valid=valid, modules=tuple(valid))


def scores(probe, text: ProbeText, matrices: list[torch.Tensor], topology: Topology | None = None) -> dict[str, torch.Tensor]:
    topology = topology or topology_of(matrices[0].shape[0], len(matrices))
    probe.check(text, topology)
    (one,) = plan_passes([probe], text, topology)
    request = one.request()
    stats = dense_statistics(matrices, StatisticsRequest(names=tuple(request.pop("statistics")), **request), topology)
    return probe.score(stats, text)


def pool(tokens: int = 200, bos: int | None = 0) -> TokenPool:
    return TokenPool(np.arange(1, tokens), bos)


def random_text() -> ProbeText:
    return repeated_random(pool(), block=BLOCK, repeats=REPEATS, seed=3)


def natural(n: int) -> ProbeText:
    return ProbeText.natural(torch.arange(n))


def planted(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Saturated heads: each row divides its weight evenly over the keys it is after."""
    n = len(ids)
    wanted = {name: torch.zeros(n, n, dtype=torch.bool) for name in ("previous", "induction", "duplicate", "sink", "uniform")}
    for t in range(n):
        wanted["previous"][t, max(t - 1, 0)] = True
        wanted["sink"][t, 0] = True
        wanted["uniform"][t, : t + 1] = True
        for s in range(t + 1):
            if ids[s] == ids[t]:
                wanted["duplicate"][t, s] = True
            if s > 0 and ids[s - 1] == ids[t]:
                wanted["induction"][t, s] = True
        if not wanted["induction"][t].any():
            wanted["induction"][t, 0] = True
    return {name: mask.double() / mask.sum(-1, keepdim=True) for name, mask in wanted.items()}


# previous_token, ind_last, ind_sum, echo_last, echo_sum, alpha_1, distance, entropy on BOS + 4 x 25 distinct tokens, rounded as tabulated.
CLOSED_FORMS = {
    "previous": (1.00, 0.00, 0.00, 0.00, 0.00, 0.02, 1.0, 0.00),
    "induction": (0.01, 0.61, 1.00, 0.00, 0.00, 0.26, 30.3, 0.44),
    "duplicate": (0.00, 0.00, 0.00, 0.36, 0.64, 0.01, 18.6, 0.79),
    "sink": (0.01, 0.00, 0.00, 0.00, 0.00, 1.00, 50.0, 0.00),
    "uniform": (0.04, 0.02, 0.03, 0.02, 0.03, 0.05, 25.0, 3.65),
}


@pytest.mark.parametrize("head", CLOSED_FORMS)
def test_planted_heads_have_their_closed_form_scores(head: str) -> None:
    text = random_text()
    a = [planted(text.ids)[head][None]]
    as_natural = ProbeText.natural(text.ids)
    razor = scores(Razor(), text, a)
    found = (
        scores(PreviousToken(), as_natural, a)["previous_token"],
        razor["ind_last"],
        razor["ind_sum"],
        razor["echo_last"],
        razor["echo_sum"],
        scores(Sink(), as_natural, a)["sink"],
        scores(Locality(), as_natural, a)["distance"],
        scores(Entropy(), as_natural, a)["entropy"],
    )
    digits = [2, 2, 2, 2, 2, 2, 1, 2]
    for value, expected, places in zip(found, CLOSED_FORMS[head], digits, strict=True):
        assert value.shape == (1, 1)
        assert float(value) == pytest.approx(expected, abs=0.5001 * 10**-places)


def test_razor_of_perfect_heads_exactly() -> None:
    text = random_text()
    heads = planted(text.ids)
    induction = scores(Razor(), text, [heads["induction"][None]])
    assert float(induction["ind_sum"]) == pytest.approx(1.0, abs=1e-12)
    assert float(induction["ind_last"]) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=1e-12)
    duplicate = scores(Razor(), text, [heads["duplicate"][None]])
    assert float(duplicate["echo_sum"]) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-12)
    assert float(duplicate["echo_last"]) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3, abs=1e-12)


def test_second_block_scores_of_perfect_heads() -> None:
    """On the second block one earlier copy exists: induction reaches 1, and a duplicate head that may look at itself gives it half."""
    text = random_text()
    heads = planted(text.ids)
    both = [torch.stack([heads["induction"], heads["duplicate"], heads["uniform"]])]
    assert scores(Induction(), text, both)["induction"][0].tolist() == pytest.approx([1.0, 0.0, np.mean(1 / np.arange(27, 52))])
    assert scores(DuplicateToken(), text, both)["duplicate_token"][0].tolist() == pytest.approx([0.0, 0.5, np.mean(1 / np.arange(27, 52))])


@given(seed=st.integers(0, 2**31), block=st.integers(4, 12), repeats=st.integers(2, 4), bos=st.booleans())
@settings(max_examples=15, deadline=None)
def test_mul_form_is_the_detector_on_two_blocks(seed: int, block: int, repeats: int, bos: bool) -> None:
    """sum(A * D) / sum(A) with the dense pattern D, on the text cut after two blocks, for a random causal A."""
    text = repeated_random(pool(bos=0 if bos else None), block=block, repeats=repeats, seed=seed)
    n = len(text)
    a = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = a.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    cut = text.first + 2 * block
    ids = text.ids[:cut]
    duplicate = (ids[:, None] == ids[None, :]).tril(-1)
    pattern = torch.zeros_like(duplicate)
    pattern[:, 1:] = duplicate[:, :-1]
    short = a[:, :cut, :cut]
    expected = (short * pattern).sum((1, 2)) / short.sum((1, 2))
    assert torch.allclose(scores(Induction(), text, [a])["induction_mul"][0], expected, atol=1e-12)


def test_mul_form_divides_by_what_a_sink_logit_left() -> None:
    text = random_text()
    a = planted(text.ids)["induction"][None] * 0.75
    found = scores(Induction(), text, [a], topology_of(1, has_sinks=True))
    rows = 1 + 2 * BLOCK
    assert float(found["induction"]) == pytest.approx(0.75)
    assert float(found["induction_mul"]) == pytest.approx(0.75 * BLOCK / (0.75 * rows))


@pytest.mark.parametrize("offset", [1, 7, 40])
def test_fixed_offset_head(offset: int) -> None:
    """d and WAAD of a head that looks `offset` back (earlier rows at the first key), and its local mass as a step."""
    n = 120
    a = torch.zeros(1, n, n)
    for t in range(n):
        a[0, t, max(t - offset, 0)] = 1
    early = sum(range(offset))
    d = (early + (n - offset) * offset) / n
    clipped = (sum(min(t, 10) for t in range(offset)) + (n - offset) * min(offset, 10)) / n
    locality = scores(Locality(window=8), natural(n), [a])
    assert float(locality["distance"]) == pytest.approx(d)
    # Rows 0 .. offset look at the first token; all the others look back by the offset.
    assert float(locality["distance_beyond_sink"]) == pytest.approx(offset)
    assert float(locality["local_mass"]) == pytest.approx((min(offset, 8) if offset >= 8 else n) / n)
    assert float(scores(Waad(), natural(n), [a])["waad"]) == pytest.approx(clipped)


def test_distance_beyond_sink_of_a_pure_sink_is_zero() -> None:
    a = torch.zeros(1, 80, 80)
    a[:, :, 0] = 1
    found = scores(Locality(), natural(80), [a])
    assert float(found["distance"]) == pytest.approx(39.5)
    assert float(found["distance_beyond_sink"]) == 0


def test_distance_beyond_sink_leaves_the_sink_out() -> None:
    """Half on the first token and half on the token before: plain distance is large, without the sink it is 1."""
    n = 90
    a = torch.zeros(1, n, n)
    a[0, 0, 0] = 1
    for t in range(1, n):
        a[0, t, 0] += 0.5
        a[0, t, t - 1] += 0.5
    found = scores(Locality(), natural(n), [a])
    assert float(found["distance"]) > 20
    assert float(found["distance_beyond_sink"]) == pytest.approx(1.0)


def test_sink_position_length_and_rate() -> None:
    n = 40
    a = torch.zeros(2, n, n, dtype=torch.float64)
    a[0, :, 0] = 1
    for t in range(n):
        a[1, t, 2 if t >= 2 else t] = 1 if t < 30 else 0.5
        a[1, t, t] += 0 if t < 30 else 0.5
    text = natural(n)
    assert scores(Sink(), text, [a])["sink"][0].tolist() == pytest.approx([1.0, 1 / n])
    # Rows 2 .. 39: 28 with weight 1 and 10 with a half.
    assert scores(Sink(position=2), text, [a])["sink"][0].tolist() == pytest.approx([0.0, (28 + 5) / 38])
    assert scores(Sink(position=2, length=30), text, [a])["sink"][0].tolist() == pytest.approx([0.0, 1.0])
    alpha = torch.tensor([[0.31, 0.3, 0.1, float("nan")], [0.9, 0.8, 0.2, 0.1]], dtype=torch.float64)
    assert Sink().numbers({"sink": alpha})["sink_rate"] == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert SinkControl(eps=0.05).numbers({"sink_repeated": alpha})["sink_rate_repeated"] == 1.0


def test_repeated_token_without_positions_is_one_over_t() -> None:
    """Equal hidden states and no positions: A = 1 / t, so the control is the harmonic mean H_64 / 64, far below the sink threshold."""
    text = repeated_token(pool(), seed=1)
    n = len(text)
    assert n == 64
    assert set(text.ids.tolist()) == {int(text.ids[0])}
    a = torch.ones(1, n, n).tril()
    a /= a.sum(-1, keepdim=True)
    assert float(scores(SinkControl(), text, [a])["sink_repeated"]) == pytest.approx(sum(1 / t for t in range(1, 65)) / 64, rel=1e-6)


def test_streaming_recall() -> None:
    """Heads inside the A shape, outside it, and half in: rows that see nothing else do not count."""
    n, sink, recent = 60, 3, 10
    a = torch.zeros(4, n, n)
    for t in range(n):
        a[0, t, max(t - 9, 0)] = 1
        a[1, t, min(2, t)] = 1
        a[2, t, max(t - 10, 0)] = 1
        a[3, t, 0] += 0.5
        a[3, t, max(t - 20, 0)] += 0.5
    found = scores(Streaming(sink, recent), natural(n), [a])["streaming"][0].tolist()
    # Of the rows 13 .. 59, head 3's far half is on a sink key while t - 20 < 3, that is for the rows up to 22.
    assert found == pytest.approx([1.0, 1.0, 0.0, (10 * 1 + 37 * 0.5) / 47])


def test_fai_of_a_planted_anchor() -> None:
    """One key that every row of its band looks at with weight .8; the rest of the weight is on the row itself."""
    n, anchor = 150, 30
    a = torch.eye(n, dtype=torch.float64)[None].clone()
    for t in range(anchor + 10, anchor + 51):
        a[0, t, t], a[0, t, anchor] = 0.2, 0.8
    found = scores(Fai(), natural(n), [a])
    assert float(found["fai_peak"]) == pytest.approx(0.8)
    keys = n - 10  # the last ten keys have an empty band
    assert float(found["fai_band"]) == pytest.approx(0.8 / keys)
    ends = [1 / (n - s) for s in range(n)]
    for t in range(anchor + 10, anchor + 51):
        ends[t] -= 0.8 / (n - t)
    ends[anchor] += 0.8 * 41 / (n - anchor)
    assert float(found["fai_end"]) == pytest.approx(sum(ends) / n)


@pytest.mark.parametrize("window", [None, 9])
def test_normalised_entropy_of_uniform_is_one(window: int | None) -> None:
    n = 30
    a = torch.ones(1, n, n, dtype=torch.float64).tril()
    if window is not None:
        a = a.triu(1 - window)
    a = a / a.sum(-1, keepdim=True)
    found = scores(Entropy(), natural(n), [a], topology_of(1, window=window))
    assert float(found["entropy_normalised"]) == pytest.approx(1.0)
    seen = [min(t + 1, window or n) for t in range(n)]
    assert float(found["entropy"]) == pytest.approx(np.mean([math.log(k) for k in seen]))


def test_normalised_entropy_of_a_bidirectional_window() -> None:
    n, window = 20, 4
    place = torch.arange(n)
    a = ((place[:, None] - place[None, :]).abs() < window).double()
    a = (a / a.sum(-1, keepdim=True))[None]
    found = scores(Entropy(), natural(n), [a], topology_of(1, causal=False, window=window))
    assert float(found["entropy_normalised"]) == pytest.approx(1.0)


@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 4), min_size=10, max_size=14))
@settings(max_examples=15, deadline=None)
def test_receiver_is_the_kurtosis_of_vertical_scores(seed: int, sizes: list[int]) -> None:
    """Against scipy's kurtosis of nanmean over a sentence matrix with NaN above the fourth diagonal and in the first column."""
    segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    n = len(segments)
    a = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    a = a.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    found = scores(Receiver(), ProbeText.natural(torch.arange(n), segments), [a])["receiver"][0]
    for head in range(2):
        means = np.full((len(sizes), len(sizes)), np.nan)
        for j in range(len(sizes)):
            for i in range(1, j - 3):
                means[j, i] = a[head][segments == j][:, segments == i].mean()
        vertical = np.nanmean(means[5:, 1:-4], axis=0)
        assert float(found[head]) == pytest.approx(scipy.stats.kurtosis(vertical, fisher=True, bias=True), rel=1e-9)


def test_receiver_ranks_the_planted_receiver_first() -> None:
    """A head whose later sentences all look at sentence 3, against a head that looks at every sentence alike."""
    segments = torch.arange(20).repeat_interleave(5)
    a = torch.ones(2, 100, 100, dtype=torch.float64).tril()
    a[1, 40:, 15:20] += 50
    a = a / a.sum(-1, keepdim=True)
    even, peaked = scores(Receiver(), ProbeText.natural(torch.arange(100), segments), [a])["receiver"][0].tolist()
    assert peaked > 5
    assert peaked > even + 5


def test_a_sink_in_the_first_sentence_makes_no_receiver() -> None:
    segments = torch.arange(20).repeat_interleave(5)
    a = torch.ones(1, 100, 100, dtype=torch.float64).tril()
    a[0, :, 0] += 500
    a = a / a.sum(-1, keepdim=True)
    text = ProbeText.natural(torch.arange(100), segments)
    assert float(scores(Receiver(), text, [a])["receiver"]) < 1
    assert float(scores(Receiver(skip=0), text, [a])["receiver"]) > 10


def test_receiver_reads_no_more_than_its_limit() -> None:
    segments = torch.arange(30).repeat_interleave(2)  # the first is skipped, the next 19 are read
    a = torch.randn(1, 60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = a.masked_fill(~torch.ones(60, 60, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    limited = scores(Receiver(limit=19), ProbeText.natural(torch.arange(60), segments), [a])["receiver"]
    cut = scores(Receiver(), ProbeText.natural(torch.arange(40), segments[:40]), [a[:, :40, :40]])["receiver"]
    assert float(limited) == pytest.approx(float(cut), rel=1e-12)


def test_layers_with_fewer_heads_end_in_nan() -> None:
    rows = (AttentionModule("a", 0, "full", 3, 3, 8, True), AttentionModule("b", 1, "full", 1, 1, 8, True))
    n = 6
    a = torch.zeros(3, n, n)
    a[:, :, 0] = 1
    found = scores(Sink(), natural(n), [a, a[:1]], Topology(rows, "Ragged"))["sink"]
    assert found[0].tolist() == [1.0, 1.0, 1.0]
    assert found[1, 0] == 1.0
    assert found[1, 1:].isnan().all()
    assert Sink().numbers({"sink": found})["sink_rate"] == 1.0
