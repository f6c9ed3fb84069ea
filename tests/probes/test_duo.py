"""DuoAttention's gates and their surrogate: planted heads, a hand-made streaming mask in the model's own code, finite differences."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

import headscope as hs
from headscope import Scope
from headscope.errors import ProbeError
from headscope.models.bundled import BUNDLED
from headscope.models.planted import Induction, Previous, Sink, Uniform, planted_llama
from headscope.probes import DuoGates, DuoSurrogate, Work
from headscope.probes.duo_gates import _Texts, _Training, final_hidden, frozen, rank_agreement, schedule
from headscope.probes.passkeys import NEEDLE, PasskeyMaker, PasskeyText, _pieces
from headscope.profile.journal import Journal

SINK, RECENT = 3, 9


def marked(length: int = 60, answers: int = 20, vocabulary: int = 97) -> PasskeyText:
    ids = torch.randint(2, vocabulary, (length,), generator=torch.Generator().manual_seed(5))
    return PasskeyText(ids, torch.arange(length) >= length - answers, "repeats")


def training(model, text: PasskeyText, **settings) -> _Training:
    scope = Scope(model)
    source = _Texts.of("duo_gates", scope, text, Work(Journal()), "auto")
    return _Training(scope, DuoGates(**settings), SINK, RECENT, source)


def loss_at(one: _Training, gates: list[float] | torch.Tensor) -> float:
    with torch.no_grad():
        one.parameter.copy_(torch.as_tensor(gates))
        return float(one._loss(one.source.at(0))[0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("teacher", ["branch", "same_inputs"])
def test_gates_of_one_are_the_model_and_gates_of_zero_its_streaming_twin(tiny_llama, teacher: str, kv_heads: int) -> None:
    config = tiny_llama.config
    config.num_key_value_heads = kv_heads
    torch.manual_seed(1)
    model = type(tiny_llama)(config).double().eval()
    text = marked()
    one = training(model, text, teacher=teacher)
    assert loss_at(one, torch.ones(2 * kv_heads)) < 1e-14
    # transformers itself with the mask written out, [1, 1, N, N] additive
    behind = torch.arange(60)[:, None] - torch.arange(60)
    seen = (behind >= 0) & ((behind < RECENT) | (torch.arange(60) < SINK))
    mask = torch.zeros(1, 1, 60, 60, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    with torch.no_grad():
        full = model.model(text.ids[None]).last_hidden_state[0]
        near = model.model(text.ids[None], attention_mask=mask).last_hidden_state[0]
    expected = float((full - near)[text.answer].square().mean())
    assert expected > 1e-3
    assert loss_at(one, torch.zeros(2 * kv_heads)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("teacher", ["branch", "same_inputs"])
def test_the_gradient_of_a_gate_is_its_finite_difference(tiny_llama, teacher: str) -> None:
    one = training(tiny_llama.double(), marked(), teacher=teacher)
    one.parameter = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    with frozen(tiny_llama):
        (gradient,) = torch.autograd.grad(one._loss(one.source.at(0))[0], [one.parameter])
    for gate in range(4):
        low, high = (torch.full((4,), 0.5, dtype=torch.float64) for _ in range(2))
        low[gate] -= 3e-3
        high[gate] += 3e-3
        # the model's norms run in float32 whatever its dtype, so a smaller step would measure their rounding
        assert float(gradient[gate]) == pytest.approx((loss_at(one, high) - loss_at(one, low)) / 6e-3, rel=1e-3)


def test_the_two_teachers_differ_where_the_paper_and_the_code_do(tiny_llama) -> None:
    """With layer 0 streaming and layer 1 keeping all keys, the branch hands layer 1 the unchanged model's output."""
    gates = [0.0, 0.0, 1.0, 1.0]
    branch, same = (loss_at(training(tiny_llama, marked(), teacher=teacher), gates) for teacher in ("branch", "same_inputs"))
    assert branch > 0
    assert same > 0
    assert abs(branch - same) > 1e-3 * same


def planted():
    heads = {(0, 0): Previous(), (0, 1): Sink(), (1, 0): Induction(), (1, 1): Sink()}
    return planted_llama(heads, layers=2, n_heads=4, vocab=64, max_positions=160)


def test_planted_gates_and_surrogate() -> None:
    """Words repeat after 50 tokens and the window holds 12: the induction head needs all keys, every other head none."""
    model = planted()
    scope = Scope(model.model, model.tokenizer())
    found = DuoGates(steps=120, penalty=1e-3, sink=2, recent=12, task="repeats").run(scope, context=121)
    gates = found["duo_gate"]
    assert float(gates[1, 0]) > 0.9
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 0] = False
    assert float(gates[others].max()) < 0.05
    assert found.numbers["duo_gates_above_half"] == 1 / 8
    lost = DuoSurrogate(sink=2, recent=12, task="repeats").run(scope, context=121)["duo_error"]
    # its streaming rows fall back to BOS, which writes nothing: all of the output is lost but in the first word of the block (no target)
    assert float(lost[1, 0]) == pytest.approx(1.0, abs=1e-3)
    assert float(lost[others].max()) < 1e-6


def test_uniform_heads_lose_what_their_formula_says() -> None:
    """A uniform head's output is the mean of the values; with one value per token code the loss is that of two means."""
    model = planted_llama({(0, 0): Previous(), (1, 0): Uniform()}, layers=2, n_heads=2, vocab=64, max_positions=160)
    torch.manual_seed(0)
    with torch.no_grad():  # give the uniform head something to write
        model.model.model.layers[1].self_attn.v_proj.weight[:64].normal_()
        constant = model.model.model.embed_tokens.weight.abs().amax(0) > 1000  # the column that every row shares
        model.model.model.layers[1].self_attn.v_proj.weight[:, constant] = 0.0
        model.model.model.layers[1].self_attn.o_proj.weight[:, :64].normal_()
    scope = Scope(model.model, model.tokenizer())
    text = PasskeyMaker.of(scope, 121, "repeats").text(121, torch.Generator().manual_seed(0))
    found = DuoSurrogate(sink=2, recent=12).run(scope, data=text)
    lost = found["duo_error"]
    layer = model.model.model.layers[1]
    kept = {}
    layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: kept.update(v=out[0].double()))
    model.model(text.ids[None])
    v, o = kept["v"][:, :64], layer.self_attn.o_proj.weight[:, :64].double().T
    part = whole = 0.0
    for row in text.answer.nonzero().flatten().tolist():
        keys = sorted({0, 1, *range(row - 11, row + 1)})
        full, near = v[: row + 1].mean(0), v[keys].mean(0)
        part += float(((full - near) @ o).square().sum())
        whole += float((full @ o).square().sum())
    assert float(lost[1, 0]) == pytest.approx(part / whole, rel=1e-4)
    assert float(found["duo_change"][1, 0]) == pytest.approx(part / int(text.answer.sum()), rel=1e-4)
    assert torch.equal(found["duo_change"], found["duo_change_group"])  # one head a key head


def test_a_run_that_was_killed_goes_on_to_the_same_gates(tiny_llama, tmp_path, monkeypatch) -> None:
    scope = Scope(tiny_llama)
    probe = DuoGates(steps=9, every=3, sink=2, recent=5)
    whole = probe.run(scope, context=80)
    draw = _Texts.at

    def killed(self, step: int) -> PasskeyText:
        if step == 7:
            raise KeyboardInterrupt
        return draw(self, step)

    monkeypatch.setattr(_Texts, "at", killed)
    with pytest.raises(KeyboardInterrupt):
        probe.run(scope, context=80, journal=tmp_path / "j")
    monkeypatch.setattr(_Texts, "at", draw)
    kept = Journal(tmp_path / "j")
    again = probe.run(scope, context=80, journal=kept)
    assert kept.restored == 2
    assert torch.equal(again["duo_gate"], whole["duo_gate"])
    assert again.tables["training"].equals(whole.tables["training"])


def test_the_model_is_as_before_also_after_an_error(tiny_llama, monkeypatch) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    tiny_llama.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    flags = [parameter.requires_grad for parameter in tiny_llama.parameters()]
    modes = [module.training for module in tiny_llama.modules()]
    scope = Scope(tiny_llama)
    DuoGates(steps=2, sink=2, recent=5).run(scope, context=80)
    monkeypatch.setattr(_Training, "_step", lambda self, step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DuoGates(steps=2, sink=2, recent=5).run(scope, context=80)
    assert [parameter.requires_grad for parameter in tiny_llama.parameters()] == flags
    assert [module.training for module in tiny_llama.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_schedule_is_the_papers_on_its_number_of_steps() -> None:
    for step in (0, 20, 39, 399, 400, 1000, 1600, 1999):
        assert schedule(step, 2000) == min(1, max((step + 1) / 400, 0.1), max((2000 - step) / 400, 0.1))


def test_rank_agreement_is_spearmans() -> None:
    from scipy.stats import spearmanr

    a, b = (torch.randn(30, generator=torch.Generator().manual_seed(seed)).round(decimals=1) for seed in (0, 1))
    assert rank_agreement(a, b) == pytest.approx(float(spearmanr(a.numpy(), b.numpy()).statistic))


def test_bundled_induction_keeps_its_heads() -> None:
    truth = BUNDLED["induction"].truth
    scope = hs.load("bundled:induction")
    gates = DuoGates(steps=60).run(scope)["duo_gate"]
    known = torch.zeros_like(gates, dtype=torch.bool)
    for layer, head in truth["induction"]:
        known[layer, head] = True
    assert float(gates[known].min()) > 0.9
    assert float(gates[~known].max()) < float(gates[known].min())
    (previous,) = truth["previous_token"]
    assert float(gates[tuple(previous)]) < 0.1


def needle_heads() -> torch.Tensor:
    """[6, 8] bool: the heads that the model's record names."""
    known = torch.zeros(6, 8, dtype=torch.bool)
    for layer, head, _ in BUNDLED["needle"].truth["retrieval"]:
        known[layer, head] = True
    return known


def test_bundled_needle_loses_its_retrieval_heads_to_streaming() -> None:
    """The known heads lose more than every other head does."""
    found = DuoSurrogate().run(hs.load("bundled:needle"), context=1024)
    known = needle_heads()
    for name in ("duo_error", "duo_change"):
        assert float(found[name][known].min()) > 2 * float(found[name][~known].max()), name


def test_gates_keep_the_needle_models_retrieval_heads() -> None:
    """Two key heads of layer 0 are kept besides: without far keys they change the final state, though no answer."""
    gates = DuoGates(steps=25, rate=0.1).run(hs.load("bundled:needle"), context=256)["duo_gate"]
    known = needle_heads()
    assert float(gates[known].min()) > 0.9
    assert float((gates[~known] < 0.1).double().mean()) > 0.85


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_passkeys_stand_where_they_are_said_to(smollm2) -> None:
    maker = PasskeyMaker.of(smollm2, 2048)
    assert maker.task == "passkeys"
    text = maker.text(2048, torch.Generator().manual_seed(0))
    assert len(text) == 2048
    read = smollm2.text_tokenizer.decode
    book, asked = read(text.ids[: text.start].tolist()), read(text.ids[text.start :].tolist())
    questions = asked.split("Question:")[1:]
    assert len(questions) == 10
    for ordinal, question in zip(("first", "second", "third"), questions, strict=False):
        words = question.split("Answer:")[1].strip().rstrip(".")
        assert len(words.split()) >= 8
        assert NEEDLE.format(ordinal=ordinal).strip() + " " + words + "." in book
    assert not torch.equal(text.ids, maker.text(2048, torch.Generator().manual_seed(1)).ids)
    short = maker.text(300, torch.Generator().manual_seed(0))
    assert len(short) == 300
    assert "passkey?" in read(short.ids[short.start :].tolist())
    with pytest.raises(ProbeError, match="raise the context"):
        maker.text(60, torch.Generator())


def test_needles_are_questions_the_model_answers() -> None:
    scope = hs.load("bundled:needle")
    maker = PasskeyMaker.of(scope, 512)
    assert maker.task == "needles"
    text = maker.text(512, torch.Generator().manual_seed(2))
    words = scope.text_tokenizer.decode(text.ids.tolist()).split()
    assert words[text.start] == "question"
    assert words[-1] == "."
    right = scope.model(text.ids[None]).logits[0].argmax(-1)
    ends = [place for place, word in enumerate(words) if word == "answer" and place > text.start]
    asked = [place + 3 for place in ends]  # the first word after "answer : key"
    assert len(asked) >= 4
    assert sum(int(right[place]) == int(text.ids[place + 1]) for place in asked) >= len(asked) // 2


def test_words_the_tokenizer_lacks_lead_to_repeats(tiny_llama) -> None:
    assert PasskeyMaker.of(hs.load("bundled:induction"), 256).task == "repeats"
    maker = PasskeyMaker.of(Scope(tiny_llama), 256)
    assert (maker.task, maker.context) == ("repeats", 195)
    text = maker.text(101, torch.Generator().manual_seed(0))
    assert torch.equal(text.ids[:50], text.ids[50:])
    assert text.answer.tolist() == [False] * 50 + [True] * 50
    with pytest.raises(ProbeError, match="does not have the words"):
        PasskeyMaker.of(Scope(tiny_llama), 256, "passkeys")
    with pytest.raises(ProbeError, match="did you mean repeats"):
        PasskeyMaker.of(Scope(tiny_llama), 256, "repeat")


def test_pieces_carry_no_special_tokens(smollm2) -> None:
    assert smollm2.text_tokenizer.decode(_pieces(smollm2.text_tokenizer, " alpha.")) == " alpha."


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_refusals(tiny_llama) -> None:
    scope = Scope(tiny_llama)
    with pytest.raises(ProbeError, match="keep every key"):
        DuoGates(sink=40, recent=60).run(scope, context=120)
    with pytest.raises(ProbeError, match="keep every key"):
        DuoSurrogate(sink=40, recent=80).run(scope, context=120)
    with pytest.raises(ProbeError, match="it needs 9"):
        DuoGates().run(scope, context=8)
    with pytest.raises(ProbeError, match="did you mean branch"):
        DuoGates(teacher="brunch").run(scope)
    with pytest.raises(ProbeError, match="count steps"):
        DuoGates(steps=0).run(scope)
    with pytest.raises(ProbeError, match="marked answers"):
        DuoSurrogate().run(scope, data="a text")
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).eval()
    for probe in (DuoGates(), DuoSurrogate()):
        with pytest.raises(ProbeError, match="looks both ways"):
            probe.run(Scope(bert))


def test_final_hidden_is_what_the_unembedding_reads(tiny_llama) -> None:
    ids = torch.arange(3, 30)
    hidden = final_hidden(Scope(tiny_llama), ids)
    torch.testing.assert_close(tiny_llama.lm_head(hidden), tiny_llama(ids[None]).logits[0])
