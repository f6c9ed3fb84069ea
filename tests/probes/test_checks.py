"""Causal and copy checks: what a task loses without the heads it needs, and what it does not lose without others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

import headscope as hs
from headscope.data.needles import FILLER, passkeys
from headscope.errors import ProbeError
from headscope.models.bundled import row_of
from headscope.models.bundled.evaluate_needle import accuracy
from headscope.models.planted import Duplicate, Induction, Previous, Sink, planted_llama
from headscope.probes import Induction as InductionProbe
from headscope.probes import Retrieval
from headscope.probes.checks import NeedleTask, RepeatedTokens, causal_check, copy_check
from headscope.probes.trials import needle_trials, synthetic_trials
from headscope.scope import Scope


@pytest.fixture(scope="module")
def needle():
    return hs.load("bundled:needle", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def planted():
    model = planted_llama(
        {(0, 0): Previous(), (0, 1): Duplicate(), (1, 0): Induction(), (1, 1): Sink()}, vocab=64, max_positions=128, n_heads=4
    )
    return Scope(model.model, model.tokenizer(), name="planted")


@pytest.mark.parametrize("mode", ["zero", "uniform", "noise", "mean"])
def test_the_planted_circuit_is_what_repetition_needs(planted, mode):
    """Without the induction head nothing is predicted; without any head that writes nothing all stays exactly as it was."""
    task = RepeatedTokens(block=20, sequences=2)
    reference = torch.arange(2, 40) if mode == "mean" else None
    found = causal_check(planted, [(1, 0)], task, exclude=[(0, 0)], mode=mode, random_sets=3, reference=reference)
    assert found.base == 1.0
    assert found.top < 0.2
    assert found.random == found.worst_random == 1.0
    assert found.table["condition"].tolist() == ["all heads", "top", "random 0", "random 1", "random 2"]
    assert (found.table["loss"][2:] - found.table["loss"][0]).abs().max() < 1e-5
    assert found.table["loss"][1] > found.table["loss"][0] + 1


def test_random_sets_leave_the_top_heads_out_and_differ(planted):
    @dataclass
    class Task:
        name: str = "counted"

        def measure(self, scope):
            planted.model(input_ids=torch.tensor([[0, 2, 3]]))
            return {"accuracy": 1.0, "loss": 0.0}

    top = [(0, 0), (1, 0), (1, 1)]
    found = causal_check(planted, top, Task(), k=2, random_sets=40, exclude=[(1, 3)])
    drawn = [set(cell.split()) for cell in found.table["heads"][2:]]
    assert all(len(one) == 2 for one in drawn)
    assert set().union(*drawn) == {"0.1", "0.2", "0.3", "1.1", "1.2"}, "all the others, the third of the ranking among them"
    assert len({frozenset(one) for one in drawn}) == 10, "every pair of the five"
    again = causal_check(planted, top, Task(), k=2, random_sets=40, exclude=[(1, 3)])
    assert found.table.equals(again.table)
    assert not found.table.equals(causal_check(planted, top, Task(), k=2, random_sets=40, exclude=[(1, 3)], seed=1).table)


def test_what_cannot_be_checked_is_refused(planted, needle, smollm2):
    task = RepeatedTokens(block=10, sequences=1)
    with pytest.raises(ProbeError, match="3 of 8 heads are left"):
        causal_check(planted, [(0, h) for h in range(4)] + [(1, 0)], task)
    with pytest.raises(ProbeError, match="k=3: 1 heads are given"):
        causal_check(planted, [(0, 0)], task, k=3)
    trials = synthetic_trials(needle, lengths=(200,), per_length=1, needles=4)
    with pytest.raises(ProbeError, match="nothing of it is done"):
        causal_check(Scope(planted_needle(), needle.tokenizer), [(0, 0)], NeedleTask(trials))
    with pytest.raises(ProbeError, match="none of 1 trials was answered"):
        copy_check(Scope(planted_needle(), needle.tokenizer), trials)


def planted_needle():
    """A random model with the needle model's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=841, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
    )
    return LlamaForCausalLM(config).eval()


def test_the_needle_task_is_the_bundled_evaluation(needle):
    """Teacher-forced answers agree with the evaluation that came with the model, which shares no code with this."""
    ours = NeedleTask(synthetic_trials(needle, lengths=(512,), per_length=8)).measure(needle)
    theirs = sum(accuracy(needle.model, kind, 512, 4, seed=5, values_only=True) for kind in ("code", "entry")) / 2
    assert ours["accuracy"] >= 0.85
    assert abs(ours["accuracy"] - theirs) <= 0.25
    assert "recall" not in ours


def test_generated_and_forced_answers_agree(needle):
    """A trial whose ids to follow are known is read in one pass; without them it is generated. Greedily both are the same."""
    trials = synthetic_trials(needle, lengths=(256,), per_length=6)
    forced = NeedleTask(trials).measure(needle)
    written = NeedleTask([replace(trial, follow=None) for trial in trials], accept=0.99).measure(needle)
    assert forced["accuracy"] == written["accuracy"]
    assert forced["loss"] == pytest.approx(written["loss"], abs=1e-5)
    assert written["recall"] >= written["accuracy"]


def test_without_the_known_heads_the_bundled_model_finds_nothing(needle):
    """As many heads as the record names: zeroed, or without their far keys, the top ones find nothing; as many others lose nothing."""
    truth = row_of("needle").truth
    found = Retrieval().run(needle, synthetic_trials(needle, lengths=(384,), per_length=4, seed=3))
    top = found.top("retrieval", len(truth["retrieval"]))
    assert {tuple(head) for head in top} == {(layer, head) for layer, head, _ in truth["retrieval"]}
    drawn = [trial for trial in synthetic_trials(needle, lengths=(384,), per_length=9, seed=9) if trial.depth < 0.85]
    for mode, sets in (("zero", 5), ("streaming", 3)):
        check = causal_check(needle, top, NeedleTask(drawn), random_sets=sets, mode=mode)
        assert check.base >= 0.95
        assert check.top <= 0.1, "a value of two or three words is not guessed"
        assert check.base - check.worst_random < 0.1, mode


def test_smollm2_needs_its_induction_heads_to_go_on_with_a_repetition(smollm2):
    ranking = InductionProbe().run(smollm2, context=500).top(n=40)
    check = causal_check(smollm2, ranking, RepeatedTokens(block=40, repeats=4, sequences=1), k=5, random_sets=2, exclude=ranking)
    assert check.base > 0.6
    assert check.top < 0.1
    assert check.random > 0.5 * check.base
    loss = check.table.set_index("condition")["loss"]
    assert loss["top"] - loss["all heads"] > 3 * (loss[["random 0", "random 1"]].mean() - loss["all heads"])


def test_smollm2_needs_its_retrieval_heads_for_short_needles(smollm2):
    """A number hidden in filler: heads that are scored on some numbers are needed for others."""
    trials = needle_trials(smollm2, lengths=(250,), depths=(0.1, 0.3), needles=passkeys(4), haystack=FILLER, chat=False, per_cell=2)
    found = Retrieval(answer_tokens=6).run(smollm2, trials[:1])
    assert found.tables["retrieval_trials"]["accepted"].all()
    ranking = found.top("retrieval", 40)
    check = causal_check(smollm2, ranking, NeedleTask(trials[1::2]), k=10, mode="streaming", random_sets=2, exclude=ranking)
    assert check.base == 1.0
    assert check.worst_random == 1.0
    tokens = check.table.set_index("condition")["tokens"]
    assert tokens["all heads"] == 1.0
    assert tokens["top"] <= 0.5
    loss = check.table.set_index("condition")["loss"]
    assert loss["top"] > loss["all heads"] + 1.0
    assert loss[["random 0", "random 1"]].max() < loss["all heads"] + 0.15


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_streamed_heads_are_those_of_a_masked_matrix(tiny_llama, implementation):
    """Against a dense computation: z of the streamed heads from the whole matrix with far keys at -inf, left padding in the batch."""
    from headscope.interventions.record import record_heads
    from headscope.kernels.naive import naive_scores
    from headscope.probes.streamed import Streamed

    tiny_llama.set_attn_implementation(implementation)
    scope = Scope(tiny_llama)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    seen = {}

    class Keep(Streamed):
        def after(self, call, output):
            seen[call.layer] = call
            return super().after(call, output)

    with scope.intervene(Keep(((0, 1), (0, 2)), sink=3, recent=5)), record_heads(scope, sites=("z",)) as record, torch.no_grad():
        scope.model(input_ids=ids, attention_mask=mask)
    with record_heads(scope, sites=("z",)) as plain, torch.no_grad():
        scope.model(input_ids=ids, attention_mask=mask)
    call = seen[0]
    scores, _ = naive_scores(call)
    t, s = torch.arange(40)[:, None], torch.arange(40)[None]
    first = torch.tensor([0, 7])[:, None, None]
    near = ((t - s < 5)[None] | ((s < first + 3) & (s >= first))) & (s <= t)[None]
    weights = torch.softmax(scores.masked_fill(~near[:, None], -torch.inf), -1).nan_to_num(0.0)
    wanted = weights @ call.v.double().repeat_interleave(call.group, 1)
    got = record.z(0).transpose(1, 2).double()
    real = mask.bool()
    for head in (1, 2):
        assert torch.allclose(got[:, head][real], wanted[:, head][real], atol=1e-5)
    assert not torch.allclose(record.z(0)[:, :, 1], plain.z(0)[:, :, 1], atol=1e-3)
    assert torch.equal(record.z(0)[:, :, [0, 3]], plain.z(0)[:, :, [0, 3]])


def test_a_streamed_head_decodes_as_it_prefills(planted):
    """With a cache the mask counts from the same positions: greedy continuations agree with whole passes."""
    from headscope.probes.streamed import Streamed

    ids = planted_ids()
    with planted.intervene(Streamed(((1, 0),), sink=2, recent=6)):
        written = planted.generate(ids, max_new_tokens=6).ids
        with torch.no_grad():
            whole = planted.model(input_ids=written[:, :-1]).logits[0, ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(written[0, ids.shape[1] :], whole)
    free = planted.generate(ids, max_new_tokens=6).new_ids
    assert free[0].tolist() == list(range(12, 18))
    assert not torch.equal(written[:, ids.shape[1] :], free), "what is to be copied is far away"


def planted_ids() -> torch.Tensor:
    """BOS, tokens 2..41, and token 11 again."""
    return torch.cat([torch.tensor([0]), torch.arange(2, 42), torch.tensor([11])])[None]


def test_copying_is_looking_at_what_is_written(needle, planted):
    """In the bundled model a head that looks at the value while it is written copies it; chance is one word of two or three."""
    trials = synthetic_trials(needle, lengths=(256,), per_length=4)
    table = copy_check(needle, trials)
    layer, head = Retrieval().run(needle, trials).top(n=1)[0]
    best = table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]
    words = sum(trial.answer[1] - trial.answer[0] for trial in trials)
    # every word of a value is copied; at the full stop behind it the head may still look at the last word
    assert best["copies"] * best["looks"] == pytest.approx(words / (words + len(trials)))
    assert best["copies"] - best["chance"] > 0.3
    assert best["chance"] < 0.55
    assert len(table) == sum(module.heads for module in needle.topology.main)
    assert all(math.isnan(row.copies) == (row.looks == 0) for row in table.itertuples())


def test_a_check_goes_on_where_it_stopped(planted, tmp_path, monkeypatch):
    task = RepeatedTokens(block=12, sequences=1)
    whole = causal_check(planted, [(1, 0)], task, random_sets=3, journal=tmp_path / "a")
    runs = []
    inner = RepeatedTokens.measure

    def dies(self, scope):
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return inner(self, scope)

    monkeypatch.setattr(RepeatedTokens, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        causal_check(planted, [(1, 0)], task, random_sets=3, journal=tmp_path / "b")
    found = causal_check(planted, [(1, 0)], task, random_sets=3, journal=tmp_path / "b")
    assert len(runs) <= 2 + 1 + 3
    assert found.table.equals(whole.table)
