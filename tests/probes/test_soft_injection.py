"""Soft injection: the edit and its gradient against finite differences, the optimiser against torch's, the best gates kept."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import DataError, ProbeError
from headscope.probes import SoftInjection
from headscope.probes import soft_injection as module
from headscope.probes.contrast import last_logits
from headscope.probes.icl_tasks import ICL_TASKS
from headscope.probes.soft_injection import Injection, encoded, examples, injected_loss, offsets, run, split
from headscope.scope import Scope

PAIRS = [(a, b) for a, b in ICL_TASKS["plurals"][:16]]


@pytest.fixture(scope="module")
def scope():
    """A random Llama in float64 with the words of a tokenizer of our own: every question and answer is one token."""
    from headscope.models.bundled.words import build_tokenizer

    torch.manual_seed(0)
    words = sorted({word for pair in (*ICL_TASKS["plurals"], *ICL_TASKS["past"]) for word in pair} | {"->"})
    tokenizer = build_tokenizer(words, length=256)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=256,
    )
    return Scope(LlamaForCausalLM(config).double().eval(), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def means():
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def hooked(scope, ids, gates, means):
    """The same edit by hooks on o_proj's input: (1 - a) z + a t at the last token."""
    handles = []
    for layer, block in enumerate(scope.model.model.layers):

        def edit(part, args, layer=layer):
            z = args[0].clone()
            own, mean = gates[4 * layer : 4 * layer + 4, None], means[4 * layer : 4 * layer + 4]
            z[:, -1] = ((1 - own) * z[:, -1].view(4, 8) + own * mean).flatten()
            return (z,)

        handles.append(block.self_attn.o_proj.register_forward_pre_hook(edit))
    try:
        return scope.model(input_ids=ids[None]).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_the_edit_is_a_mixture_at_the_last_token(scope, means):
    ids, _ = encoded(scope, PAIRS[0], PAIRS[1:4])
    logits = torch.linspace(-3, 3, 8, dtype=torch.float64)
    edit = Injection(logits, means, offsets(scope))
    torch.testing.assert_close(run(scope, [ids], edit)[0], hooked(scope, ids, torch.sigmoid(logits), means), rtol=1e-9, atol=1e-9)
    shut = Injection(torch.full((8,), -1000.0, dtype=torch.float64), means, offsets(scope))
    assert torch.equal(run(scope, [ids], shut)[0], last_logits(scope, [ids])[0]), "a gate of 0 is bitwise nothing"
    wide = Injection(torch.full((8,), 1000.0, dtype=torch.float64), means, offsets(scope))
    torch.testing.assert_close(run(scope, [ids], wide)[0], hooked(scope, ids, torch.ones(8).double(), means), rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_gates(scope, means):
    """Central differences of the loss through the live model; transformers' norms run in float32, hence the step and the tolerance."""
    logits = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(injected_loss(scope, PAIRS[0], logits, means), [logits])
    step = 1e-2
    for place in range(8):
        shift = torch.zeros(8, dtype=torch.float64)
        shift[place] = step
        with torch.no_grad():
            high, low = (float(injected_loss(scope, PAIRS[0], logits.detach() + sign * shift, means)) for sign in (1, -1))
        assert float(found[place]) == pytest.approx((high - low) / (2 * step), rel=2e-2, abs=1e-4)
    assert all(parameter.grad is None for parameter in scope.model.parameters())


def short(**more):
    return SoftInjection(
        **{"task": "plurals", "control": "past", "shots": 3, "prompts": 6, "steps": 12, "every": 3, "form": "arrow", **more}
    )


@pytest.fixture
def lenient(monkeypatch):
    """A random model solves nothing, and is refused; here the optimiser is what is looked at."""
    whole = SoftInjection._score

    def score(self, *args):
        return {**whole(self, *args), "accuracy": 0.5}

    monkeypatch.setattr(SoftInjection, "_score", score)


def test_the_best_validated_gates_are_kept(scope, lenient):
    """The loss of every check is in the table; the gates are those of the smallest, also where it is not the last."""
    seen = {}
    whole = SoftInjection._chunk

    def chunk(self, scope, parts, means, work, before, number):
        seen[number] = whole(self, scope, parts, means, work, before, number)
        return seen[number]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftInjection, "_chunk", chunk)
        result = short().run(scope)
    table = result.tables["validation"]
    assert table.step.tolist() == [3, 6, 9, 12]
    best = int(table.loss.argmin())
    assert best < 3, "this seed overshoots, so the last is not the best"
    assert torch.equal(result["soft_gate"].flatten(), torch.sigmoid(seen[best]["logits"]))
    assert result.numbers["best_step"] == table.step[best]
    assert not result.notes, "this tokenizer begins every text with a token of its own"


def test_steps_in_pieces_are_the_steps_of_one_optimiser(scope, means):
    """Adam's state goes through the units: the same logits as torch's Adam over all steps without a break."""
    probe = short()
    work = probe.work(scope, None, None, 0, False, None)
    parts = split(PAIRS, 3, work)
    found, checks = probe._optimise(scope, parts, means, work)
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.2)
    states = []
    for number in range(4):
        draw = work.generator(3, number)
        for _ in range(3):
            question = parts["train"][int(torch.randint(len(parts["train"]), (1,), generator=draw))]
            adam.zero_grad()
            injected_loss(scope, question, logits, means, "arrow").backward()
            adam.step()
        states.append(logits.detach().clone())
    best = min(range(4), key=lambda number: checks[number][1])
    torch.testing.assert_close(found, states[best], rtol=1e-6, atol=1e-6)


def test_a_killed_optimisation_goes_on(scope, lenient, tmp_path, monkeypatch):
    want = short().run(scope)
    asked = []
    whole = SoftInjection._chunk

    def chunk(self, *args):
        asked.append(args[-1])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(SoftInjection, "_chunk", chunk)
    with pytest.raises(KeyboardInterrupt):
        short().run(scope, journal=tmp_path / "units")
    found = short().run(scope, journal=tmp_path / "units")
    assert asked == [0, 1, 2, 2, 3]
    assert torch.equal(found["soft_gate"], want["soft_gate"])


@torch.no_grad()
def test_means_are_those_of_the_last_token(scope):
    """z of every head at the last token, by hooks, averaged over the prompts that the same seed draws."""
    probe = short()
    work = probe.work(scope, None, None, 0, False, None)
    draw = work.generator(1)
    total = torch.zeros(8, 8, dtype=torch.float64)
    for number in range(6):
        ids, _ = encoded(scope, PAIRS[number], examples(PAIRS, PAIRS[number], 3, draw), "arrow")
        seen = []
        handles = [
            b.self_attn.o_proj.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0])) for b in scope.model.model.layers
        ]
        scope.model(input_ids=ids[None])
        for handle in handles:
            handle.remove()
        total += torch.cat([one[0, -1].view(4, 8) for one in seen])
    torch.testing.assert_close(probe._means(scope, PAIRS, work, 1), total / 6)


def test_parts_share_no_pair(scope):
    work = short().work(scope, None, None, 0, False, None)
    for pairs in ICL_TASKS.values():
        parts = split(pairs, 10, work)
        listed = [pair for part in parts.values() for pair in part]
        assert sorted(listed) == sorted(pairs)
        assert min(len(part) for part in parts.values()) >= 10
        assert len(pairs) >= 44
    shown = examples(PAIRS, PAIRS[2], 5, torch.Generator().manual_seed(0))
    assert len(set(shown)) == 5
    assert PAIRS[2] not in shown


def test_smollm2_learns_opposites_from_examples(smollm2):
    """The task itself is within the model's reach: with ten examples the loss of the answer is far below that without."""
    probe = SoftInjection()
    work = probe.work(smollm2, None, None, 0, False, None)
    parts = split(ICL_TASKS["opposites"], 10, work)
    few = probe._score(smollm2, parts["test"][:4], parts["train"], None, work)
    none = probe._score(smollm2, parts["test"][:4], (), None, work)
    assert few["loss"] < none["loss"] - 3


def test_a_question_that_stands_first_is_told(scope, lenient, monkeypatch):
    """Without a token at the beginning of texts the form "arrow" puts the question first, and "qa" does not."""
    whole = Scope.encode
    monkeypatch.setattr(Scope, "encode", lambda self, text: whole(self, text)[:, 1:])
    assert any("begins with its question" in note for note in short().run(scope).notes)
    assert not short(form="qa").run(scope).notes


def test_refusals(scope):
    with pytest.raises(ProbeError, match=r"it solves none of \d+ questions with 3 examples: '\w+' -> .* where .* was right"):
        short().run(scope)
    with pytest.raises(ProbeError, match="unknown task of probe 'soft_injection' 'rhymes'"):
        SoftInjection(task="rhymes")
    with pytest.raises(ProbeError, match="unknown form of probe 'soft_injection' 'chat'"):
        SoftInjection(form="chat")
    with pytest.raises(ProbeError, match="steps is a multiple of every"):
        SoftInjection(steps=70)
    with pytest.raises(ProbeError, match=r"8 pairs: half of them are shown"):
        short().run(scope, PAIRS[:8])
    with pytest.raises(DataError, match="a pair is a question and an answer"):
        short().run(scope, ["hot", "cold"])
    with pytest.raises(ProbeError, match="without a tokenizer"):
        short().run(Scope(scope.model))
    with pytest.raises(ProbeError, match="it solves none of"):
        SoftInjection(prompts=2).run(hs.load("bundled:induction"))
    assert module.FEWEST_PAIRS == 12
