"""Sinks by position, late sinks and massive activations: planted, against eager attention, and on SmolLM2."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.errors import ProbeError
from headscope.models.planted import Sink as PlantedSink
from headscope.models.planted import Vertical, planted_llama
from headscope.probes import LateSinks, MassiveActivations, ProbeText, SinkPositions
from headscope.probes.layer_inputs import rms_normed, watching
from headscope.scope import Scope

from ..core.tiny_models import eager_copy, gpt2, make, mistral

N, AT, TOKEN = 96, 20, 7


@pytest.fixture(scope="module")
def planted():
    """A sink, a head that looks at token 7 wherever it stands, and uniform heads."""
    made = planted_llama({(0, 0): PlantedSink(), (1, 1): Vertical(tokens=(TOKEN,))}, layers=2, n_heads=2, vocab=64)
    return Scope(made.model, made.tokenizer(), name="planted")


@pytest.fixture(scope="module")
def text():
    ids = torch.arange(N) % 40 + 8  # tokens 8 .. 47
    ids[0], ids[AT] = 0, TOKEN
    return ProbeText.natural(ids)


def uniform_alpha() -> torch.Tensor:
    """A[t, s] = 1 / (t + 1): alpha_s = mean over t >= s."""
    return torch.tensor([sum(1 / (t + 1) for t in range(s, N)) / (N - s) for s in range(N)], dtype=torch.float64)


def test_planted_sinks_by_position(planted, text) -> None:
    found = SinkPositions().run(planted, [text])
    alpha = uniform_alpha()[: N - 31]
    before = AT / N  # rows that fall back to BOS
    peak = torch.tensor([[1.0, float(alpha[0])], [float(alpha[0]), 1.0]])
    beyond = torch.tensor([[0.0, float(alpha[1])], [float(alpha[1]), 1.0]])
    assert torch.allclose(found["sink_peak"], peak.double(), atol=1e-5)
    assert torch.allclose(found["sink_beyond_first"], beyond.double(), atol=1e-5)
    assert found.numbers == {"sink_rate_anywhere": 0.5, "sink_rate_beyond_first": 0.25}
    table = found.tables["positions"]
    assert len(table) == N - 31
    assert table["sink_rate"][0] == 0.25
    assert table["sink_rate"][AT] == 0.25
    assert table["heads"].sum() == 2
    assert table["alpha"][0] == pytest.approx((1 + 2 * float(alpha[0]) + before) / 4, abs=1e-5)


@pytest.mark.parametrize(("options", "least"), [({}, 5 / N), ({"alpha": 2.0}, 2 / N), ({"threshold": 0.1}, 0.1)])
def test_planted_late_sinks(planted, text, options, least) -> None:
    found = LateSinks(**options).run(planted, [text])
    alpha = uniform_alpha()
    late = (alpha > least) & (torch.arange(N) > 0)
    sums = alpha * (N - torch.arange(N))
    assert found["late_sink_count"].tolist() == [[0, int(late.sum())], [int(late.sum()), 1]]
    mass = float(sums[late].sum()) / N
    expected = torch.tensor([[0.0, mass], [mass, (N - AT) / N]]).double()
    assert torch.allclose(found["late_sink_mass"], expected, atol=1e-5)
    table = found.tables["tokens"]
    first = table[table["position"] == AT].iloc[0]
    uniform = 2 * float(alpha[AT]) if bool(late[AT]) else 0.0
    assert first["received"] == pytest.approx((1 + uniform) / first["heads"], abs=1e-5)
    assert table["position"][0] == AT
    assert 0 not in set(table["position"])


@pytest.mark.parametrize("build", [mistral, gpt2])
def test_late_sinks_are_those_of_eager_attention(build) -> None:
    model = make(build)
    ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        maps = eager_copy(model)(input_ids=ids, output_attentions=True).attentions
    a = torch.stack([one[0].double() for one in maps])
    alpha = a.sum(2) / torch.arange(60, 0, -1)
    found = LateSinks(rows=8).run(Scope(model), [ProbeText.natural(ids[0])])
    late = alpha > 5 / 60
    late[..., 0] = False
    late[..., 53:] = False  # fewer than 8 rows
    assert torch.equal(found["late_sink_count"], late.sum(-1).double())
    assert torch.allclose(found["late_sink_mass"], (a.sum(2) * late).sum(-1) / 60, atol=1e-5)
    positions = SinkPositions(rows=8, eps=0.05).run(Scope(model), [ProbeText.natural(ids[0])])
    assert torch.allclose(positions["sink_peak"], alpha[..., :53].amax(-1), atol=1e-5)
    rate = (alpha[..., :53] > 0.05).double().mean((0, 1))
    assert torch.allclose(torch.tensor(positions.tables["positions"]["sink_rate"]), rate, atol=1e-9)


def test_two_texts_give_one_table_with_the_text_named(planted, text) -> None:
    found = SinkPositions().run(planted, [text, text])
    assert found.tables["positions"]["text"].tolist() == [0] * (N - 31) + [1] * (N - 31)


def test_sinks_in_a_profile_share_the_pass_and_keep_their_tables(planted, text) -> None:
    profile = planted.profile(probes=["sink", "sink_positions", "late_sinks"], context=N, data=text.ids, maps=False, keep_statistics=False)
    assert {"sink_positions.positions", "late_sinks.tokens"} <= set(profile.tables)
    assert profile.card.numbers["sink_rate_anywhere"] == 0.5


def test_a_text_too_short_for_sinks(planted, text) -> None:
    with pytest.raises(ProbeError, match="it needs 33"):
        SinkPositions().run(planted, [ProbeText.natural(text.ids[:20])])
    with pytest.raises(ProbeError, match="it needs 7"):
        LateSinks().run(planted, [ProbeText.natural(text.ids[:5])])
    with pytest.raises(ProbeError, match="alpha is a multiple"):
        LateSinks(alpha=0)


# ---- massive activations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def massive():
    """A random Mistral whose token 5 has 4,000 in dimension 9 and whose others are small."""
    model = make(mistral)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 9] = 4000.0
    return model


def test_massive_activations_are_found_where_they_were_planted(massive) -> None:
    ids = torch.randint(10, 90, (40,), generator=torch.Generator().manual_seed(1))
    ids[0] = ids[13] = 5
    found = MassiveActivations(ratio=500).run(Scope(massive), ids)
    entries = found.tables["entries"]
    assert entries["massive"].all()
    assert set(entries["position"]) == {0, 13}
    assert set(entries["dimension"]) == {9}
    assert found.numbers == {"massive_activations": 4.0, "massive_tokens": 2.0, "massive_dimensions": 1.0}
    assert torch.equal(found["massive_share"], torch.full((2, 4), 0.5).double())
    assert found.tables["dimensions"]["dimension"][0] == 9
    assert found.tables["dimensions"]["normed"][0] == pytest.approx(math.sqrt(32), rel=1e-3)
    assert "without a tokenizer" in found.notes[0]
    none = MassiveActivations(limit=1e6).run(Scope(massive), ids)
    assert none.numbers["massive_activations"] == 0
    assert len(none.tables["entries"]) == 2  # the largest of each layer, marked as not massive
    assert not none.tables["entries"]["massive"].any()


@pytest.mark.parametrize("build", [mistral, gpt2])
def test_the_stream_is_what_the_model_itself_gives_out(build) -> None:
    model = make(build)
    ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(3))
    seen: dict[int, torch.Tensor] = {}
    scope = Scope(model)
    with torch.no_grad(), watching(scope, seen.__setitem__):
        out = model(input_ids=ids, output_hidden_states=True)
    assert sorted(seen) == [0, 1, 2]
    for place in (0, 1):
        assert torch.equal(seen[place], out.hidden_states[place])
    hooks = [dict(module._forward_hooks) | dict(module._forward_pre_hooks) for module in model.modules()]
    ratio = MassiveActivations().run(scope, ids[0])["massive_ratio"][:, 0]
    assert hooks == [dict(module._forward_hooks) | dict(module._forward_pre_hooks) for module in model.modules()]
    size = torch.stack([seen[1][0], seen[2][0]]).double().abs()
    assert torch.allclose(ratio, size.amax((1, 2)) / size.flatten(1).median(1).values)
    normed = rms_normed(seen[0])
    assert torch.allclose(normed.square().mean(-1), torch.ones(1, 20).double())


def test_smollm2_has_one_massive_token_and_its_dimensions(smollm2) -> None:
    found = MassiveActivations(tokens=128).run(smollm2)
    entries = found.tables["entries"]
    massive = entries[entries["massive"]]
    assert found.numbers["massive_tokens"] == 1
    assert set(massive["position"]) == {0}
    assert massive["value"].abs().max() > 20_000
    assert massive["ratio"].max() > 10_000
    first = found.tables["dimensions"]
    assert set(massive["dimension"]) == set(first["dimension"][: int(found.numbers["massive_dimensions"])])
    assert first["normed"][0] > 20  # of at most 24: one dimension is nearly all of the first token
    assert found.notes == ("the tokenizer puts no BOS in front: the first token is 'Why'",)
    share = found["massive_share"]
    assert bool(((share == 0) | (share == 1)).all())


def test_smollm2_sinks_at_the_first_token(smollm2) -> None:
    found = SinkPositions().run(smollm2, context=128)
    assert found.numbers["sink_rate_anywhere"] > 0.3
    assert found.numbers["sink_rate_beyond_first"] < 0.3 * found.numbers["sink_rate_anywhere"]
    assert found.tables["positions"]["sink_rate"].idxmax() == 0
    late = LateSinks().run(smollm2, context=128)
    assert float(late["late_sink_mass"].max()) > 0.3
    assert float(late["late_sink_count"].min()) == 0


def test_massive_activations_refuses_what_it_cannot_read(massive) -> None:
    with pytest.raises(ProbeError, match="over a text"):
        MassiveActivations(tokens=1)
    assert MassiveActivations().unfit(Scope(make(gpt2))) is None
