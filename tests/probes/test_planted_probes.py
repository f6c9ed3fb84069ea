"""Planted heads through every layer of headscope: statistics kernels on one-hot q and k, capture of the live model, and the probes.

The text is BOS + 4 x 25 distinct tokens (N = 101). Numbers are exact: rationals and logarithms of integers, derived per kind of head (b is
the number of the row's block of 25):

    induction, block b >= 1: the b keys 25 m - 1 back, m = 1 .. b; the first 26 rows fall back to BOS
    duplicate, block b: the b + 1 keys 25 m back, m = 0 .. b
"""

from __future__ import annotations

from fractions import Fraction as F
from math import log

import pytest
import torch

from headscope import probes
from headscope.call import AttentionCall, MaskFacts
from headscope.kernels import measure, use_backend
from headscope.models.planted import Duplicate, Induction, Offset, Previous, Sink, planted_llama
from headscope.probes import ProbeText
from headscope.scope import Scope
from headscope.statistics import StatisticsRequest

K, R, N = 25, 4, 101
HARMONIC = [sum((F(1, i) for i in range(1, n + 1)), F(0)) for n in range(N + 1)]
CLIPPED = sum((F(sum(min(m, 10) for m in range(t + 1)), t + 1) for t in range(N)), F(0)) / N
EXACT = {
    # kind: previous_token, ind_last, ind_sum, echo_last, echo_sum, sink, distance, entropy, waad
    "previous": (1, 0, 0, 0, 0, F(2, 101), F(100, 101), 0, F(100, 101)),
    "induction": (F(1, 100), F(11, 18), 1, 0, 0, F(26, 101), F(6125, 202), F(25, 101) * F(log(6)), F(955, 101)),
    "duplicate": (0, 0, 0, F(13, 36), F(23, 36), F(1, 101), F(1875, 101), F(25, 101) * F(log(24)), F(2875, 606)),
    "sink": (F(1, 100), 0, 0, 0, 0, 1, 50, 0, F(955, 101)),
    "uniform": (
        (HARMONIC[101] - 1) / 100,
        sum(F(1, i + 2) for i in range(25, 100) if i % 25 != 24) / 72,
        sum(F(i // 25, i + 2) for i in range(25, 100)) / 75,
        (HARMONIC[101] - HARMONIC[26]) / 75,
        sum(F(i // 25, i + 2) for i in range(25, 100)) / 75,
        HARMONIC[101] / 101,
        25,
        sum(F(log(t)) for t in range(1, 102)) / 101,
        CLIPPED,
    ),
    "offset 5": (F(1, 100), 0, 0, 0, 0, F(6, 101), F(490, 101), 0, F(490, 101)),
    "offset 24": (F(1, 100), 1, 1, 0, 0, F(25, 101), F(2124, 101), 0, F(955, 101)),
    "offset 25": (F(1, 100), 0, 0, 1, 1, F(26, 101), F(2200, 101), 0, F(955, 101)),
}
METRICS = ("previous_token", "ind_last", "ind_sum", "echo_last", "echo_sum", "sink", "distance", "entropy", "waad")
KINDS = {
    "previous": Previous(),
    "induction": Induction(),
    "duplicate": Duplicate(),
    "sink": Sink(),
    "offset 5": Offset(5),
    "offset 24": Offset(24),
    "offset 25": Offset(25),
}


def exact(kind: str) -> dict[str, float]:
    return {name: float(value) for name, value in zip(METRICS, EXACT[kind], strict=True)}


# --- kernels on one-hot q and k: one shared key head, one query head per kind ---------------------------------------------------------


def one_hot_call(dtype: torch.dtype, nats: float = 40.0) -> AttentionCall:
    """k holds position, token, previous token and BOS in dimensions of their own; each query head reads those of its kind."""
    token = torch.zeros(N, K, dtype=dtype)
    token[1:] = torch.eye(K, dtype=dtype).repeat(R, 1)
    before = token.roll(1, 0)
    before[0] = 0
    position, bos = torch.eye(N, dtype=dtype), torch.eye(N, dtype=dtype)[:, :1]
    k = torch.cat([position, token, before, bos], dim=1)
    zero, one = torch.zeros(N, K, dtype=dtype), torch.ones(N, 1, dtype=dtype)

    def back(delta: int) -> torch.Tensor:
        out = torch.zeros(N, N, dtype=dtype)
        out[delta:, : N - delta] = torch.eye(N - delta, dtype=dtype)
        return out

    queries = {
        "previous": [2 * back(1), zero, zero, one],
        "induction": [0 * position, zero, 2 * token, one],
        "duplicate": [0 * position, 2 * token, zero, 0 * one],
        "sink": [0 * position, zero, zero, one],
        "uniform": [0 * position, zero, zero, 0 * one],
        "offset 5": [2 * back(5), zero, zero, one],
        "offset 24": [2 * back(24), zero, zero, one],
        "offset 25": [2 * back(25), zero, zero, one],
    }
    q = torch.stack([torch.cat(queries[kind], dim=1) for kind in EXACT])
    return AttentionCall("planted", 0, q[None], k[None, None], None, nats, MaskFacts(causal=True), kernel="one-hot")


PAIRS = {
    "previous_token": (torch.arange(1, N), torch.arange(N - 1)),
    "echo": tuple(torch.tensor([(1 + i, 1 + j) for i in range(K, K * R) for j in range(i % K, i, K)]).T),
    "induction": tuple(torch.tensor([(1 + i, 2 + j) for i in range(K, K * R) for j in range(i % K, i, K)]).T),
}
LAST = torch.tensor([j == i - K for i in range(K, K * R) for j in range(i % K, i, K)])
INSIDE = torch.tensor([j == i - K and i % K != K - 1 for i in range(K, K * R) for j in range(i % K, i, K)])


@pytest.mark.parametrize("backend", ["naive", "blocked"])
def test_kernels_give_the_closed_forms_on_one_hot_keys(backend):
    """Eight kinds of heads on one key head, float64: table values to 1e-12, and the columns, maps and diagonals that follow from them."""
    names = ("passive", "pairs", "diagonal_sum", "class_mass")
    labels = torch.arange(N) % 2
    request = StatisticsRequest(names, block=16, local_window=8, pairs=PAIRS, labels=labels)
    with use_backend(backend):
        found = measure(one_hot_call(torch.float64), request)
    for head, kind in enumerate(EXACT):
        rows = {name: value[0, head] for name, value in found.rows.items()}
        pairs = {name: value[0, head] for name, value in found.pairs.items()}
        got = {
            "previous_token": pairs["previous_token"].mean(),
            "ind_last": pairs["induction"][INSIDE].mean(),
            "ind_sum": pairs["induction"].sum() / (K * (R - 1)),
            "echo_last": pairs["echo"][LAST].mean(),
            "echo_sum": pairs["echo"].sum() / (K * (R - 1)),
            "sink": found.columns["column_sum"][0, head, 0] / found.counts["row_count"][0, 0],
            "distance": rows["distance"].mean(),
            "entropy": rows["entropy"].mean(),
            "waad": rows["waad"].mean(),
        }
        assert {name: float(value) for name, value in got.items()} == pytest.approx(exact(kind), abs=1e-12, rel=1e-12), kind
        diagonal = found.diagonals[0, head]
        place = torch.arange(len(diagonal), dtype=torch.float64) + found.diagonal_start
        assert float(diagonal.sum()) == pytest.approx(N, abs=1e-9)
        assert float((diagonal * place).sum() / N) == pytest.approx(exact(kind)["distance"], abs=1e-10)
        assert float(found.maps["block_mass"][0, head].sum()) == pytest.approx(N, abs=1e-9)
        assert float(rows["class_mass"].sum(-1).mean()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("backend", ["naive", "blocked"])
def test_kernels_row_by_row(backend):
    """Saturated rows in full: argmax, the largest weight, distances and their squares, sink and local mass, log-normaliser."""
    with use_backend(backend):
        found = measure(one_hot_call(torch.float64), StatisticsRequest(sink_tokens=1, local_window=6, block=16))
    row = {name: dict(zip(EXACT, value[0], strict=True)) for name, value in found.rows.items()}
    t = torch.arange(N)
    block = (t - 1).clamp(min=0) // K
    assert torch.equal(row["argmax"]["previous"], (t - 1).clamp(min=0))
    assert torch.equal(row["argmax"]["offset 5"], torch.where(t >= 5, t - 5, 0))
    assert torch.equal(row["argmax"]["induction"], torch.where(t > K, (t - 1) % K + 2, 0)), "the first of equal keys"
    assert torch.equal(row["argmax"]["duplicate"], torch.where(t > 0, (t - 1) % K + 1, 0)), "the first of equal keys"
    near = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(row["row_max"]["induction"], 1 / block.clamp(min=1).double(), **near)
    torch.testing.assert_close(row["row_max"]["duplicate"], 1 / (block + 1).double(), **near)
    torch.testing.assert_close(row["row_max"]["uniform"], 1 / (t + 1).double(), **near)
    torch.testing.assert_close(row["lse"]["uniform"], (t + 1).double().log(), **near)
    torch.testing.assert_close(row["lse"]["induction"], torch.where(t > K, 80 + block.clamp(min=1).double().log(), 40.0), **near)
    torch.testing.assert_close(row["distance_sq"]["offset 5"], t.clamp(max=5).double().square(), **near)
    torch.testing.assert_close(row["distance_sq"]["uniform"], (t * (2 * t + 1)).double() / 6, **near)
    torch.testing.assert_close(row["distance_sq"]["sink"], t.double().square(), **near)
    torch.testing.assert_close(row["sink_mass"]["offset 5"], (t <= 5).double(), **near)
    torch.testing.assert_close(row["local_mass"]["offset 5"], torch.ones(N, dtype=torch.float64), **near)
    torch.testing.assert_close(row["local_mass"]["sink"], (t < 6).double(), **near)
    torch.testing.assert_close(row["local_mass"]["offset 24"], (t < 6).double(), **near)
    torch.testing.assert_close(row["local_mass"]["uniform"], (6 / (t + 1).double()).clamp(max=1), **near)
    torch.testing.assert_close(row["local_mass"]["duplicate"], 1 / (block + 1).double(), **near)


@pytest.mark.parametrize("backend", ["naive", "blocked"])
def test_kernels_columns_and_maps(backend):
    """Columns: a head at offset 24 looks at each key once, 24 rows later. Maps: offset heads fill two diagonals of blocks."""
    with use_backend(backend):
        found = measure(one_hot_call(torch.float64), StatisticsRequest(block=16, fai_band=(10, 30)))
    heads = list(EXACT)
    sums, fai = found.columns["column_sum"][0], found.columns["fai_sum"][0]
    s = torch.arange(N)
    near = {"atol": 1e-12, "rtol": 1e-12}
    once = torch.where(s + 24 < N, 1.0, 0.0).double()
    once[0] += 24
    torch.testing.assert_close(sums[heads.index("offset 24")], once, **near)
    band = torch.where(s + 24 < N, 1.0, 0.0).double()
    band[0] += 24 - 10
    torch.testing.assert_close(fai[heads.index("offset 24")], band, **near)
    assert torch.equal(found.counts["row_count"][0], N - s)
    assert torch.equal(found.counts["fai_count"][0], (torch.minimum(s + 30, torch.tensor(N - 1)) - (s + 10) + 1).clamp(min=0))
    torch.testing.assert_close(sums[heads.index("uniform")][0], torch.tensor(float(HARMONIC[101]), dtype=torch.float64), **near)
    mass, peak = found.maps["block_mass"][0, heads.index("offset 5")], found.maps["block_max"][0, heads.index("offset 5")]
    want = torch.zeros(7, 7, dtype=torch.float64)
    for t in range(N):
        want[t // 16, max(t - 5, 0) // 16] += 1
    torch.testing.assert_close(mass, want, **near)
    torch.testing.assert_close(peak, (want > 0).double(), **near)


# --- the live model through capture ----------------------------------------------------------------------------------------------------

LAYERS = {
    (0, 0): "previous",
    (0, 1): "duplicate",
    (0, 2): "sink",
    (0, 3): "offset 5",
    (1, 0): "induction",
    (1, 1): "offset 24",
    (1, 3): "offset 25",
    (1, 4): "duplicate",
    (1, 5): "sink",
    (1, 6): "previous",
}


def kind_of(place: tuple[int, int]) -> str:
    return LAYERS.get(place, "uniform")


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["group 1", "group 2", "group 4"])
def planted(request):
    """At 30 nats nothing leaks that float32 could show: what is off is off by the measurement."""
    return planted_llama({place: KINDS[kind] for place, kind in LAYERS.items()}, kv_heads=8 // request.param, sharpness=30.0)


@pytest.fixture(scope="module")
def scope(planted):
    return Scope(planted.model, name="planted")


@pytest.fixture(scope="module")
def ids(planted):
    return planted.prompt(K, R)


def test_capture_gives_the_closed_forms(planted, scope, ids):
    stats = scope.capture(ids, statistics=["passive", "pairs"], pairs=PAIRS, sink_tokens=1)
    for layer, head in planted.heads:
        got = {
            "previous_token": stats.pairs("previous_token")[layer][0, head].mean(),
            "ind_last": stats.pairs("induction")[layer][0, head][INSIDE].mean(),
            "ind_sum": stats.pairs("induction")[layer][0, head].sum() / (K * (R - 1)),
            "echo_last": stats.pairs("echo")[layer][0, head][LAST].mean(),
            "echo_sum": stats.pairs("echo")[layer][0, head].sum() / (K * (R - 1)),
            "sink": stats["sink_importance"][layer][0, head, 0],
            "distance": stats["distance"][layer][0, head].mean(),
            "entropy": stats["entropy"][layer][0, head].mean(),
            "waad": stats["waad"][layer][0, head].mean(),
        }
        want = exact(kind_of((layer, head)))
        assert {name: float(value) for name, value in got.items()} == pytest.approx(want, abs=2e-5, rel=2e-5), (layer, head)


def row_numbers(a: torch.Tensor) -> dict[str, torch.Tensor]:
    """Row statistics of real rows from a matrix [n, n] of real tokens, float64."""
    at = torch.arange(len(a), dtype=torch.float64)
    distance = (at[:, None] - at).clamp(min=0)
    return {
        "entropy": -torch.xlogy(a, a).sum(-1),
        "distance": (a * distance).sum(-1),
        "distance_sq": (a * distance.square()).sum(-1),
        "waad": (a * distance.clamp(max=10)).sum(-1),
        "sink_mass": a[:, 0],
        "local_mass": (a * (distance < 8)).sum(-1),
        "row_max": a.amax(-1),
    }


OPTIONS = {
    "statistics": ["entropy", "distance", "distance_sq", "waad", "sink_mass", "local_mass", "row_max", "column_sum"],
    "sink_tokens": 1,
    "local_window": 8,
}


def compare(planted, stats, ids, mask=None):
    """Every row statistic and the column sums against the closed form's matrix, real positions only."""
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    for (layer, head), a in planted.expected(ids, mask).items():
        for row, keep in enumerate(valid):
            dense = a[row][keep][:, keep]
            for name, want in row_numbers(dense).items():
                got = stats[name][layer][row, head].double()
                scale = float(want.abs().max().clamp(min=1))
                assert float((got[keep] - want).abs().max()) <= 1e-5 * scale, (name, layer, head, row)
                assert got[~keep].isnan().all(), (name, layer, head)
            columns = stats["column_sum"][layer][row, head].double()
            torch.testing.assert_close(columns[keep], dense.sum(0), atol=2e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_count_from_the_first_real_token(planted, scope, side):
    batch, mask = torch.full((3, 60), planted.pad), torch.zeros(3, 60, dtype=torch.long)
    for row, length in enumerate((60, 47, 31)):
        where = slice(60 - length, 60) if side == "left" else slice(0, length)
        batch[row, where] = planted.prompt(15, 4, seed=row)[0, :length]
        mask[row, where] = 1
    compare(planted, scope.capture(batch, attention_mask=mask, **OPTIONS), batch, mask)


def test_decoded_rows_append(planted, scope):
    """Greedy decoding repeats the text, so the rows of the new tokens are known as well."""
    ids = planted.prompt(20, 2)
    stats = scope.capture(ids, generate=15, **OPTIONS)
    rows = stats["distance"][0].shape[-1]
    tokens = torch.cat([ids, ids[:, 1:16]], dim=1)[:, :rows]
    assert rows in (55, 56)
    compare(planted, stats, tokens)


def test_chunked_prefill_is_the_same(planted, scope, ids):
    compare(planted, scope.capture(ids, chunk=17, **OPTIONS), ids)


# --- the probes ------------------------------------------------------------------------------------------------------------------------


def score(probe, scope, text) -> dict[str, torch.Tensor]:
    needs = probe.needs(text, scope.topology)
    probe.check(text, scope.topology)
    options = dict(needs.parameters)
    if needs.pairs:
        options["pairs"] = needs.pairs
    if needs.segments is not None:
        options["segments"] = needs.segments
    return probe.score(scope.capture(text.ids, statistics=list(needs.names), **options), text)


@pytest.fixture(scope="module")
def repeated(ids):
    return ProbeText("repeated_random", ids[0], first=1, block=K, repeats=R)


@pytest.fixture(scope="module")
def natural(ids):
    return ProbeText.natural(ids[0])


def test_probes_give_the_table(planted, scope, repeated, natural):
    found: dict[str, torch.Tensor] = {}
    for probe, text in (
        (probes.PreviousToken(), natural),
        (probes.Sink(), natural),
        (probes.Locality(), natural),
        (probes.Entropy(), natural),
        (probes.Waad(), natural),
        (probes.Razor(), repeated),
    ):
        found |= score(probe, scope, text)
    for place in planted.heads:
        got = {name: float(found[name][place]) for name in METRICS}
        assert got == pytest.approx(exact(kind_of(place)), abs=2e-5, rel=2e-5), (place, kind_of(place))


def test_probes_of_the_second_block(planted, scope, repeated):
    """One earlier occurrence: a perfect induction head has 1, a duplicate head shares with itself; the ratio counts all 51 rows."""
    found = score(probes.Induction(), scope, repeated) | score(probes.DuplicateToken(), scope, repeated)
    even = float((HARMONIC[51] - HARMONIC[26]) / 25)
    want = {"induction": (1, 0), "offset 24": (1, 0), "duplicate": (0, 0.5), "offset 25": (0, 1), "uniform": (even, even)}
    for place in planted.heads:
        induction, duplicate = want.get(kind_of(place), (0, 0))
        assert float(found["induction"][place]) == pytest.approx(induction, abs=1e-5), place
        assert float(found["induction_mul"][place]) == pytest.approx(induction * 25 / 51, abs=1e-5), place
        assert float(found["duplicate_token"][place]) == pytest.approx(duplicate, abs=1e-5), place


def test_locality_beyond_the_sink(planted, scope, natural):
    """Weight on the first token taken out, an offset head is at its offset exactly, and a sink head nowhere."""
    found = score(probes.Locality(window=8), scope, natural)["distance_beyond_sink"]
    even = sum(F(t, 2) - F(t, t + 1) for t in range(N)) / (N - HARMONIC[101])
    want = {"previous": 1, "sink": 0, "offset 5": 5, "offset 24": 24, "offset 25": 25, "uniform": even}
    want |= {"induction": F(73, 2), "duplicate": F(1875, 100)}
    for place in planted.heads:
        assert float(found[place]) == pytest.approx(float(want[kind_of(place)]), abs=2e-4), (place, kind_of(place))


def test_streaming_recall(planted, scope, natural):
    """Rows t >= 4 + 20: what a window of 20 and four first tokens hold. Offset 24 and 25 lie outside except where the target is among
    the first four tokens."""
    found = score(probes.Streaming(sink=4, recent=20), scope, natural)["streaming"]
    rows = range(24, N)
    blocks = [(t, (t - 1) // K) for t in rows]
    want = {"previous": 1.0, "sink": 1.0, "offset 5": 1.0, "offset 24": 4 / 77, "offset 25": 5 / 77}
    want["uniform"] = sum(24 / (t + 1) for t in rows) / 77
    want["duplicate"] = sum((1 + (b > 0 and (t - 1) % K + 1 < 4)) / (b + 1) for t, b in blocks) / 77
    want["induction"] = sum(1.0 if b == 0 else ((t - 1) % K + 2 < 4) / b for t, b in blocks) / 77
    for place in planted.heads:
        assert float(found[place]) == pytest.approx(want[kind_of(place)], abs=1e-5), (place, kind_of(place))


def test_future_influence(planted, scope, natural):
    """FAI in the band 10 .. 50: an offset head at 24 or 25 reaches each key once in the band's rows, a previous-token head never."""
    found = score(probes.Fai(), scope, natural)
    for place, a in planted.expected(natural.ids[None]).items():
        a = a[0]
        band = [float(a[s + 10 : min(s + 50, N - 1) + 1, s].mean()) for s in range(N - 10)]
        end = [float(a[s:, s].mean()) for s in range(N)]
        assert float(found["fai_band"][place]) == pytest.approx(sum(band) / len(band), abs=1e-5), place
        assert float(found["fai_end"][place]) == pytest.approx(sum(end) / len(end), abs=1e-5), place
        if kind_of(place) in ("offset 24", "offset 25"):
            assert float(found["fai_peak"][place]) == pytest.approx(1 / 41, abs=1e-5), place
        if kind_of(place) in ("previous", "sink"):
            assert float(found["fai_peak"][place]) == pytest.approx(0, abs=1e-5), place


def test_a_repeated_token_has_no_sink(planted, scope):
    """Without BOS all rows are equal: heads that go by content are exactly uniform, A = 1/t, and only offsets still see a difference."""
    text = ProbeText("repeated_token", torch.full((64,), 17), block=1, repeats=64)
    found = score(probes.SinkControl(), scope, text)["sink_repeated"]
    for place in planted.heads:
        kind = kind_of(place)
        if kind in ("sink", "duplicate", "uniform", "induction"):
            assert float(found[place]) == pytest.approx(float(HARMONIC[64]) / 64, abs=1e-6), place
        elif kind == "previous":
            assert float(found[place]) == pytest.approx(2 / 64, abs=1e-6), place


def test_receiver_finds_the_head_that_looks_at_few_sentences(planted, scope, ids):
    """Ten sentences of ten tokens after BOS, which is the first one's: a sink head gives all to sentence 0, kurtosis of one peak."""
    segments = ((torch.arange(N) - 1).clamp(min=0) // 10).clamp(max=9)
    text = ProbeText.natural(ids[0], segments=segments)
    found = score(probes.Receiver(ignore=4, skip=0), scope, text)["receiver"]
    # v = (c, 0, 0, 0, 0, 0): mean c/6; Fisher kurtosis of one peak among n is n - 2 + 1 / (n - 1) - 3
    assert float(found[0, 2]) == pytest.approx(6 - 2 + 1 / 5 - 3, abs=1e-4)


@pytest.mark.parametrize("name", ["entropy", "normalised"])
def test_entropy_normalised(planted, scope, natural, name):
    found = score(probes.Entropy(), scope, natural)["entropy_normalised" if name == "normalised" else "entropy"]
    rows = torch.arange(1, N)
    block = (rows - 1) // K
    if name == "normalised":
        want = {"uniform": 1.0, "duplicate": float(((block + 1).log() / (rows + 1).log()).mean())}
        want["induction"] = float((block.clamp(min=1).log() / (rows + 1).log()).mean())
    else:
        want = {kind: exact(kind)["entropy"] for kind in ("uniform", "duplicate", "induction")}
    for place in planted.heads:
        assert float(found[place]) == pytest.approx(want.get(kind_of(place), 0.0), abs=1e-5), place


def test_a_profile_names_the_planted_heads(planted, ids):
    """Texts, passes, probes and thresholds together. Two roles go to fixed offsets as well: on a text that repeats every 25 tokens, 24 and
    25 tokens back is where induction and duplicate heads look."""
    tokenizer = planted.tokenizer()
    named = Scope(planted.model, tokenizer, name="planted")
    chosen = [name for name in probes.PASSIVE if name != "receiver"]
    profile = named.profile(probes=chosen, context=N, data=tokenizer.decode(ids[0, 1:]), repeats=3)
    roles = {(row.layer, row.head): row.roles for row in profile.table.itertuples()}
    also = {"induction": "offset 24", "duplicate_token": "offset 25"}
    for role, kind in (
        ("sink", "sink"),
        ("previous_token", "previous"),
        ("duplicate_token", "duplicate"),
        ("induction", "induction"),
        ("uniform", "uniform"),
    ):
        want = {place for place in planted.heads if kind_of(place) in (kind, also.get(role))}
        assert {place for place, names in roles.items() if role in names} == want, role
    numbers = {(row.layer, row.head): row for row in profile.table.itertuples()}
    for place in planted.heads:
        for metric in ("previous_token", "sink", "distance", "entropy", "waad"):
            assert getattr(numbers[place], metric) == pytest.approx(exact(kind_of(place))[metric], abs=2e-5, rel=2e-5), (place, metric)
