"""WAAD and FAI on responses: by hand, planted, decode against teacher-forced, eager attention, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.errors import ProbeError
from headscope.models.planted import Offset, Vertical, planted_llama
from headscope.probes import Rhythm
from headscope.probes import token_rhythm as tr
from headscope.probes.responses import prompt_ids
from headscope.probes.rhythm import head_sets
from headscope.scope import Scope

NAN = float("nan")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask(text: str) -> torch.Tensor:
    return torch.tensor([one == "x" for one in text])


# ---- the formulas, by hand --------------------------------------------------------------------------------------------


def test_preplan_tokens_are_the_largest_drops() -> None:
    waad = t(1, 5, 5.5, 2, 2)
    delta = tr.drops(waad)
    assert delta[:4].tolist() == [4, 0.5, 3.5, 0]
    assert math.isnan(delta[4])
    assert torch.equal(tr.top_share(delta, 0.4), mask("x.x.."))  # ceil(.4 * 4) = 2
    assert torch.equal(tr.top_share(t(1, 1, 1, 1, 1), 0.4), mask("xx..."))
    assert torch.equal(tr.top_share(t(NAN, 1, NAN, 2), 0.5), mask("...x"))


def test_an_anchor_is_dominated_when_waad_is_low_and_a_drop_led_to_it() -> None:
    waad = t(1, 5, 5.5, 2, 2, 2, 2, 9)
    best, where = tr.introductions(tr.drops(waad), 2)
    assert math.isnan(best[0])
    assert best[1:].tolist() == [4, 4, 3.5, 3.5, 0, 0, 7]
    assert where.tolist() == [-1, 0, 0, 2, 2, 3, 4, 6]
    anchors = mask(".xxx.x.x")
    assert torch.equal(tr.dominated(waad, anchors, 2.0, 3.0, 2), mask("...x...."))
    assert torch.equal(tr.dominated(waad, anchors, 6.0, 3.0, 2), mask(".xxx...."))


def test_gamma_weights() -> None:
    preplan, anchors, led = mask("x.x."), mask(".xxx"), mask("..x.")
    intro = torch.tensor([-1, 0, 0, 2])
    assert tr.gamma_weights("local", preplan=preplan).tolist() == [1.5, 1, 1.5, 1]
    assert tr.gamma_weights("global", anchors=anchors, gain=2.0).tolist() == [1, 2, 2, 2]
    coupled = tr.gamma_weights("coupled", anchors=anchors, dominated=led, introduced_by=intro, gain=1.5, alpha=0.5)
    assert coupled.tolist() == [1.25, 1.5, 1.25, 1.5]
    whole = tr.gamma_weights("coupled", anchors=anchors, dominated=led, introduced_by=intro, alpha=0.0)
    assert torch.equal(whole, tr.gamma_weights("global", anchors=anchors))  # alpha = 0 leaves every anchor its gain
    given_away = tr.gamma_weights("coupled", anchors=anchors, dominated=led, introduced_by=intro, alpha=1.0)
    assert given_away.tolist() == [1.5, 1.5, 1, 1.5]
    assert float((coupled - 1).sum()) == pytest.approx(float((whole - 1).sum()))  # one introducer each: weight moves, none is lost
    with pytest.raises(ProbeError, match="without preplan"):
        tr.gamma_weights("local")
    with pytest.raises(ProbeError, match="known: coupled, global, local"):
        tr.gamma_weights("loc", preplan=preplan)


def test_peaks_and_what_follows_them() -> None:
    curve = t(0, 3, 1, 2, 2, 0, 9)
    assert torch.equal(tr.peaks(curve, 0.99), mask(".x.xx.."))
    assert torch.equal(tr.peaks(curve, 0.3), mask(".x.x..."))  # ceil(.3 * 7) = 3: the values 9, 3 and the first 2
    assert not tr.peaks(t(1, 1, 1, 1), 0.9).any()
    assert tr.follows(mask("x..x"), mask(".x.."), 1) == (0.5, 0.5)
    assert tr.follows(mask("x..."), mask("...x"), 2) == (0.0, 0.75)
    assert math.isnan(tr.follows(mask("...."), mask("..x."), 1)[0])


def test_head_sets_take_a_share_of_each_end() -> None:
    distance = torch.arange(20.0).reshape(4, 5).flip(0).double()
    local, far = head_sets(distance, 0.3)
    assert set(distance[local].tolist()) == set(map(float, range(6)))
    assert set(distance[far].tolist()) == set(map(float, range(14, 20)))
    local, far = head_sets(distance, 0.3, torch.tensor([False, True, True, False]))
    assert set(distance[local].tolist()) == {5, 6, 7}
    assert set(distance[far].tolist()) == {12, 13, 14}


# ---- planted heads ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    made = planted_llama({(0, 0): Offset(3), (0, 1): Offset(15), (1, 0): Vertical(tokens=(7,))}, layers=2, n_heads=2, vocab=64)
    return Scope(made.model, made.tokenizer(), name="planted")


@pytest.fixture(scope="module")
def given():
    """20 prompt ids, 60 response ids; token 7 is the response's tenth."""
    ids = torch.arange(80) % 40 + 8
    ids[0], ids[29] = 0, 7
    return ids[:20], ids[20:]


def test_planted_offsets_and_anchor(planted, given) -> None:
    """Offset 3: d = 3, WAAD = 3. Offset 15: d = 15, WAAD = min(15, 10). Vertical: FAI of its token is 1 to the end and in the band."""
    found = Rhythm(share=0.5, layers="all").run(planted, [given])
    assert found["response_distance"][0].tolist() == pytest.approx([3, 15], abs=1e-3)
    assert found["response_waad"][0].tolist() == pytest.approx([3, 10], abs=1e-3)
    rows = range(20, 80)
    bos = sum(row for row in rows if row < 29)  # before the token, the head rests on BOS
    assert float(found["response_distance"][1, 0]) == pytest.approx((bos + sum(row - 29 for row in rows if row >= 29)) / 60, abs=1e-3)
    table = found.tables["tokens"]
    heads = found.tables["heads"].set_index(["layer", "head"])["set"]
    assert heads[0, 0] == heads[0, 1] == "local"
    assert heads[1, 0] == heads[1, 1] == "global"
    assert table["waad"].to_numpy() == pytest.approx(6.5, abs=1e-3)  # mean of 3 and 10
    uniform = [sum(1 / (row + 1) for row in range(29, 80)) / 51, sum(1 / (row + 1) for row in range(39, 80)) / 41]
    at = table.set_index("position").loc[29]
    assert at["fai_end"] == pytest.approx((1 + uniform[0]) / 2, abs=1e-4)
    assert at["fai_band"] == pytest.approx((1 + sum(1 / (row + 1) for row in range(39, 80)) / 41) / 2, abs=1e-4)
    assert at["anchor"]
    assert at["fai_peak"]
    assert table["fai_end"].isna().sum() == 10
    assert table["fai_band"].isna().sum() == 10
    assert not table["anchor"].iloc[-10:].any()


def test_the_band_is_cut_at_the_end_of_the_response(planted, given) -> None:
    found = Rhythm(share=0.5, lo=5, hi=8, horizon="band").run(planted, [given])
    at = found.tables["tokens"].set_index("position")
    band = [sum(1 / (row + 1) for row in range(s + 5, min(79, s + 8) + 1)) / (min(79, s + 8) - s - 4) for s in (40, 73)]
    assert at["fai_band"][40] == pytest.approx(band[0] / 2, abs=1e-4)  # the vertical head gives this key nothing
    assert at["fai_band"][73] == pytest.approx(band[1] / 2, abs=1e-4)
    assert at["anchor"][29]


def test_without_the_first_token_distance_is_that_of_the_rest(planted, given) -> None:
    found = Rhythm(share=0.5, beyond_first=True).run(planted, [given])
    assert float(found["response_distance"][1, 0]) == pytest.approx(sum(row - 29 for row in range(29, 80)) / 51, abs=1e-3)


# ---- SmolLM2 ----------------------------------------------------------------------------------------------------------

PROMPT = "Count from one to twenty in words."


@pytest.fixture(scope="module")
def spoken(smollm2, tmp_path_factory):
    journal = tmp_path_factory.mktemp("rhythm") / "journal"
    return Rhythm(new_tokens=24).run(smollm2, [PROMPT], journal=journal), journal


def test_decode_steps_are_the_teacher_forced_rows(smollm2, spoken) -> None:
    forced = spoken[0]
    decoded = Rhythm(new_tokens=24, mode="decode").run(smollm2, [PROMPT])
    for name, values in forced.scores.items():
        assert torch.allclose(decoded[name], values, atol=1e-3, rtol=1e-4), name
    a, b = decoded.tables["tokens"], forced.tables["tokens"]
    assert a["token"].tolist() == b["token"].tolist()
    for name in ("waad", "fai_band", "fai_end"):
        assert a[name].to_numpy() == pytest.approx(b[name].to_numpy(), abs=1e-4, nan_ok=True)


def test_curves_are_those_of_eager_attention(smollm2, spoken) -> None:
    """The paper's way: average the matrices of a set of heads, then apply the formulas."""
    found = spoken[0]
    table = found.tables["tokens"]
    first = int(table["position"][0])
    ids = prompt_ids(smollm2, PROMPT)
    made = smollm2.generate(ids[None], max_new_tokens=24).ids[0][: first + len(table)]
    model = smollm2.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(input_ids=made[None], output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    a = torch.stack([one[0].double() for one in out.attentions])
    n = len(made)
    rows, keys = torch.arange(n)[:, None], torch.arange(n)
    distance = (a * (rows - keys).clamp_min(0)).sum(-1)[..., first:].mean(-1)
    assert torch.allclose(found["response_distance"], distance, atol=2e-3)
    local, far = head_sets(distance, 0.3)
    waad = (a[local].mean(0) * (rows - keys).clamp(0, 10)).sum(-1)[first:]
    assert table["waad"].to_numpy() == pytest.approx(waad.numpy(), abs=1e-4)
    glob = a[far].mean(0)
    for s in range(first, n - 10):
        band = glob[s + 10 : min(n, s + 51), s].mean()
        assert table["fai_band"][s - first] == pytest.approx(float(band), abs=1e-5)
        assert table["fai_end"][s - first] == pytest.approx(float(glob[s:, s].mean()), abs=1e-5)
    log = out.logits[0, first - 1 : -1].double().log_softmax(-1)
    assert table["entropy"].to_numpy() == pytest.approx(-(log.exp() * log).sum(-1).numpy(), abs=1e-3)


def test_a_killed_run_goes_on_with_the_same_numbers(smollm2, spoken) -> None:
    first, journal = spoken
    files = sorted(journal.glob("*.safetensors"))
    assert len(files) == 2
    again = Rhythm(new_tokens=24).run(smollm2, [PROMPT], journal=journal)
    for name, values in first.scores.items():
        assert torch.equal(again[name], values)


def test_numbers_are_shares_of_what_the_table_shows(spoken) -> None:
    found = spoken[0]
    table = found.tables["tokens"]
    assert found.numbers["anchors_dominated"] == pytest.approx(table["dominated"].sum() / table["anchor"].sum())
    peaks = table["waad_peak"]
    assert found.numbers["entropy_at_peaks"] == pytest.approx(table["entropy"][peaks].mean())
    assert found.numbers["entropy_elsewhere"] == pytest.approx(table["entropy"][~peaks].mean())
    assert table["preplan"].sum() == math.ceil(0.4 * (len(table) - 1))
    assert table["anchor"].sum() == math.ceil(0.4 * (len(table) - 10))
    assert (found.tables["heads"]["set"] == "local").sum() == 81


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_bad_input(smollm2, planted, given) -> None:
    with pytest.raises(ProbeError, match="are the least that have a rhythm"):
        Rhythm().run(planted, [(given[0], given[1][:4])])
    with pytest.raises(ProbeError, match="no room is left for a response"):
        Rhythm().run(smollm2, [PROMPT], context=20)
    with pytest.raises(ProbeError, match="the context is 40"):
        Rhythm().run(planted, [given], context=40)
    with pytest.raises(ProbeError, match="without a tokenizer"):
        Rhythm().run(Scope(planted.model), [given])
    with pytest.raises(ProbeError, match="sampled steps cannot be taken twice"):
        Rhythm(mode="decode", temperature=0.7)
    with pytest.raises(ProbeError, match="two sets must not overlap"):
        Rhythm(share=0.6)
    with pytest.raises(ProbeError, match="no list of prompts"):
        Rhythm().run(planted, {"prompt": 1})
