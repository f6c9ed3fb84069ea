"""Retrieval probes against what is known: a planted copying head, the official counting done step by step on eager attention, the bundled
needle model's recorded heads, and SmolLM2's own answers."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score

import headscope as hs
from headscope.call import AttentionCall, MaskFacts
from headscope.data.needles import NEEDLES, REASONING_NEEDLES
from headscope.errors import CaptureError, ProbeError
from headscope.kernels.naive import naive_weights
from headscope.models.bundled import row_of
from headscope.models.planted import Duplicate, Induction, Previous, Sink, planted_llama
from headscope.probes import QueryRetrieval, Retrieval, RetrievalReasoning
from headscope.probes.answers import answer, reading, row_weights
from headscope.probes.key_values import key_value_trials
from headscope.probes.retrieval import copies, copy_score
from headscope.probes.trials import Trial, needle_trials, synthetic_trials
from headscope.scope import Scope

TEXTS = [f"{one.sentence} {one.question} Question: N/A Answer:" for one in (*NEEDLES, *REASONING_NEEDLES)]


@pytest.fixture(scope="module")
def needle():
    return hs.load("bundled:needle", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def known(needle):
    """[L, H] bool: the heads that the model's record names."""
    out = torch.zeros(len(needle.topology.main), needle.topology.main[0].heads, dtype=torch.bool)
    for layer, head, *_ in row_of("needle").truth["retrieval"]:
        out[layer, head] = True
    return out


def auc(known: torch.Tensor, scores: torch.Tensor) -> float:
    return float(roc_auc_score(known.flatten(), scores.flatten()))


# --- a planted copying head -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    model = planted_llama(
        {(0, 0): Previous(), (0, 1): Duplicate(), (1, 0): Induction(), (1, 1): Sink()}, vocab=64, max_positions=128, n_heads=4
    )
    return Scope(model.model, model.tokenizer(), name="planted")


def planted_trial(length: int = 60, size: int = 6, at: int = 20) -> Trial:
    """Distinct tokens; the prompt ends with the token before the needle's answer, so the induction head goes on from there."""
    ids = torch.arange(2, 2 + length)
    span = (1 + at, 1 + at + size)
    prompt = torch.cat([torch.tensor([0]), ids, ids[at - 1 : at]])
    return Trial(prompt, span, (span[0] - 1, span[1]), (len(prompt) - 1, len(prompt)), name="planted")


@pytest.mark.parametrize("mode", ["decode", "teacher_forced"])
@pytest.mark.parametrize("count", ["set", "steps"])
def test_a_planted_copying_head_has_1_and_all_others_0(planted, mode, count):
    """Closed form: the induction head looks at the token that it writes in each of the six steps, and nobody else does."""
    trial = planted_trial()
    found = Retrieval(mode=mode, count=count, answer_tokens=6).run(planted, [trial])
    wanted = torch.zeros(2, 4, dtype=torch.float64)
    wanted[1, 0] = 1.0
    assert torch.equal(found["retrieval"], wanted)
    assert torch.equal(found["retrieval_active"], wanted)
    table = found.tables["retrieval_trials"]
    assert table["recall"].tolist() == [1.0]
    assert table["accepted"].tolist() == [True]
    assert table["copying_heads"].tolist() == [1]
    assert found.numbers == {"retrieval_trials": 1.0, "retrieval_accepted": 1.0, "retrieval_heads": 1 / 8}
    by_trial = found.tables["retrieval_by_trial"]
    assert by_trial.loc[(by_trial["layer"] == 1) & (by_trial["head"] == 0), "0"].item() == 1.0


def test_r2_and_qr_on_the_planted_head(planted):
    """The head's whole weight is on the answer in all six steps (R2 = 1); the row of the question's one token looks at the answer's first
    token, which stands in the needle (QR = 1). A duplicate head's row of that token shares its weight with the needle's copy of it."""
    trial = planted_trial()
    reasoning = RetrievalReasoning().run(planted, [trial])["retrieval_reasoning"]
    assert reasoning[1, 0] == pytest.approx(1.0, abs=1e-4)
    assert reasoning[1, 1] == pytest.approx(0.0, abs=1e-6)
    raw = QueryRetrieval(calibrate=False).run(planted, [trial])
    assert torch.equal(raw["qr"], raw["qr_raw"])
    assert raw["qr_raw"][1, 0] == pytest.approx(1.0, abs=1e-4)
    assert raw["qr_raw"][0, 1] == pytest.approx(0.5, abs=1e-4)
    assert raw["qr_raw"][1, 1] == pytest.approx(0.0, abs=1e-6)
    assert raw["qr_raw"][1, 2] == pytest.approx(7 / len(trial.ids), abs=1e-6), "a uniform head: the needle's share of all keys"
    with pytest.raises(ProbeError, match="no null prompt"):
        QueryRetrieval().run(planted, [trial])


def test_set_and_steps_differ_when_the_answer_is_said_again():
    """By hand: span 10 11 10, two heads. Written: 10 11 10 10. Head 0 copies in every step, head 1 only in the last."""
    trial = Trial(torch.tensor([5, 10, 11, 10, 7]), (1, 4), (0, 4), (4, 5))
    written = torch.tensor([10, 11, 10, 10])
    strongest = torch.tensor([[[1, 2, 3, 1], [0, 1, 2, 3]]])
    assert copy_score(strongest, trial, written, "set").tolist() == [[1.0, 0.5]]
    assert copy_score(strongest, trial, written, "steps").tolist() == [[4 / 3, 1 / 3]]
    looks, copied = copies(strongest, trial, written)
    assert looks.sum(-1).tolist() == [[4, 3]]
    assert copied.sum(-1).tolist() == [[4, 1]]
    missing = torch.full((1, 1, 4), -1)
    assert math.isnan(copy_score(missing, trial, written, "set").item())
    beyond = torch.full((1, 1, 4), 9)  # a key that was generated is no key of the prompt
    assert copy_score(beyond, trial, written, "set").item() == 0.0


# --- the official counting, step by step ------------------------------------------------------------------------


def official(scope, trial: Trial, limit: int) -> tuple[torch.Tensor, list[int]]:
    """The counting of the official script: prefill, then one eager step a token, the largest weight of all keys, steps counted."""
    model = scope.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    start, end = trial.answer
    written: list[int] = []
    with torch.no_grad():
        past = model(input_ids=trial.ids[None, :-1], use_cache=True).past_key_values
        token = trial.ids[-1:]
        score = torch.zeros(len(scope.topology.main), scope.topology.main[0].heads, dtype=torch.float64)
        for _ in range(limit):
            out = model(input_ids=token[None], past_key_values=past, use_cache=True, output_attentions=True)
            past, token = out.past_key_values, out.logits[0, -1:].argmax(-1)
            written.append(int(token))
            for layer, weights in enumerate(out.attentions):
                for head in range(weights.shape[1]):
                    at = int(weights[0, head, -1].argmax())
                    if start <= at < end and int(trial.ids[at]) == written[-1]:
                        score[layer, head] += 1 / (end - start)
            if written[-1] in trial.stop_ids:
                break
    model.set_attn_implementation(before)
    return score, written


@pytest.mark.parametrize("mode", ["decode", "teacher_forced"])
def test_steps_are_what_the_official_script_counts(needle, mode):
    trials = synthetic_trials(needle, lengths=(200,), per_length=2, needles=6)
    found = Retrieval(count="steps", mode=mode, accept=None).run(needle, trials)
    by_trial = found.tables["retrieval_by_trial"]
    for number, trial in enumerate(trials):
        score, written = official(needle, trial, 50)
        assert by_trial[str(number)].tolist() == score.flatten().tolist()
        assert found.tables["retrieval_trials"]["steps"][number] == len(written)


def test_an_answer_said_twice_has_steps_above_1_and_a_set_of_1(planted):
    """The needle leads back to its own beginning, so the planted model says it over again: x a b c x | a b c x a b c x. From the second
    round on the head shares its weight among equal copies; the first of them, the needle's, is the strongest."""
    ids = torch.arange(2, 42)
    prompt = torch.cat([torch.tensor([0]), ids[:30], ids[30:34], ids[30:31]])
    trial = Trial(prompt, (32, 35), (31, 35), (35, 36), name="circle")
    found = {count: Retrieval(count=count, answer_tokens=8).run(planted, [trial]) for count in ("set", "steps")}
    assert found["set"].tables["retrieval_trials"]["answer"][0] == "33 34 35 32 33 34 35 32"
    assert found["set"]["retrieval"][1, 0] == 1.0
    assert 1.0 < found["steps"]["retrieval"][1, 0] <= 2.0
    assert found["steps"]["retrieval"].sum() == found["steps"]["retrieval"][1, 0], "no other head copies"


# --- the bundled needle model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "metric"),
    [
        (Retrieval(), "retrieval"),
        (Retrieval(mode="teacher_forced", count="steps"), "retrieval"),
        (RetrievalReasoning(), "retrieval_reasoning"),
        (QueryRetrieval(), "qr"),
        (QueryRetrieval(), "qr_raw"),
    ],
)
def test_the_known_heads_of_the_bundled_model_come_first(needle, known, probe, metric):
    trials = synthetic_trials(needle, lengths=(256, 512), per_length=2)
    found = probe.run(needle, trials)
    assert auc(known, found[metric]) >= 0.95
    if metric == "retrieval":
        assert found.numbers["retrieval_accepted"] >= 3
        assert found["retrieval"][known].max() == 1.0


def test_decode_and_one_pass_say_the_same(needle, smollm2):
    for scope, trials in (
        (needle, synthetic_trials(needle, lengths=(300,), per_length=2)),
        (smollm2, needle_trials(smollm2, lengths=(220,), depths=(0.5,))),
    ):
        step, once = (Retrieval(mode=mode, accept=None, answer_tokens=16).run(scope, trials) for mode in ("decode", "teacher_forced"))
        assert torch.equal(step["retrieval"], once["retrieval"])
        assert torch.equal(step["retrieval_active"], once["retrieval_active"])
        r2 = [RetrievalReasoning(mode=mode).run(scope, trials)["retrieval_reasoning"] for mode in ("decode", "teacher_forced")]
        assert torch.allclose(r2[0], r2[1], atol=1e-4)
        assert float(r2[0].max()) > 0.05


def test_smollm2_answers_short_needles_with_heads_that_copy(smollm2):
    """Own needles in 400 tokens of prose, asked through its chat template."""
    found = Retrieval(lengths=(400,), depths=(0.3,), answer_tokens=30).run(smollm2)
    table = found.tables["retrieval_trials"]
    assert table["accepted"].all()
    assert table["answer"][0].strip().endswith("under a copper bell in the flower garden.")
    score = found["retrieval"]
    assert 0.3 < float(score.max()) <= 1.0
    assert float((score == 0).double().mean()) > 0.3, "most heads copy nothing"
    assert 0.01 < found.numbers["retrieval_heads"] < 0.3
    assert found.scores["retrieval_active"][tuple(divmod(int(score.argmax()), score.shape[1]))] == 1.0
    without = Retrieval(lengths=(400,), depths=(0.3,), answer_tokens=30, exclude_sink=4).run(smollm2)["retrieval"]
    assert float(without.sum()) > float(score.sum()) * 0.9, "without the sink more heads' strongest key is the word itself"


# --- reading rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_are_those_of_the_dense_matrix(softcap, window, sinks):
    torch.manual_seed(3)
    q, k = torch.randn(1, 6, 5, 8, dtype=torch.float64), torch.randn(1, 2, 19, 8, dtype=torch.float64)
    mask = MaskFacts(causal=True, window=window, key_valid=torch.arange(19)[None] >= 2)
    call = AttentionCall(
        "m", 0, q, k, None, 0.4, mask, softcap=softcap, sink_logits=torch.randn(6) if sinks else None, query_offset=14, key_offset=0
    )
    rows = torch.tensor([0, 3, 4])
    assert torch.allclose(row_weights(call, rows), naive_weights(call)[0][:, rows], atol=1e-12)


def test_rows_of_a_sliding_cache_keep_their_positions(tiny_llama):
    """A window of 16 in decode: the cache drops keys, and the strongest key is still named by its absolute position."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=16, max_position_embeddings=128, attn_implementation="sdpa",
    )  # fmt: skip
    scope = Scope(MistralForCausalLM(config).eval())
    ids = torch.randint(3, 97, (1, 40))
    with reading(scope, 39, 60, lambda weights: weights.argmax(-1)) as reader:
        out = scope.generate(ids, max_new_tokens=8, min_new_tokens=8)
    step = reader.result(8)
    scope.model.set_attn_implementation("eager")
    dense = scope.model(input_ids=out.ids[:, :-1], output_attentions=True, use_cache=False).attentions
    for layer, rows in enumerate(step):
        assert torch.equal(rows, dense[layer][0, :, 39:47].argmax(-1))
        assert int(rows.min()) >= 39 - 15
    with pytest.raises(CaptureError, match="of them were seen"):
        reader.result(9)


def dense(scope, ids: torch.Tensor) -> list[torch.Tensor]:
    """Eager weights of a whole pass, per layer [H, N, N]."""
    before = scope.model.config._attn_implementation
    scope.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = scope.model(input_ids=ids[None], output_attentions=True, use_cache=False).attentions
    scope.model.set_attn_implementation(before)
    return [layer[0].double() for layer in weights]


def test_r2_is_the_sum_of_the_largest_weights_inside_the_answer(needle):
    """By loops over the dense matrix: steps, heads, the n largest weights, those in the span."""
    trial = synthetic_trials(needle, lengths=(160,), per_length=2, needles=4)[1]
    start, end = trial.answer
    count = end - start
    written = answer(needle, trial, limit=count).ids
    matrix = dense(needle, torch.cat([trial.ids, written[:-1]]))
    wanted = torch.zeros(len(matrix), len(matrix[0]), dtype=torch.float64)
    for layer, weights in enumerate(matrix):
        for head in range(len(weights)):
            for step in range(len(written)):
                row = weights[head, len(trial.ids) - 1 + step]
                for at in row.argsort(descending=True)[:count].tolist():
                    if start <= at < end:
                        wanted[layer, head] += row[at] / count
    found = RetrievalReasoning().run(needle, [trial])["retrieval_reasoning"]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert float(wanted.max()) > 0.5


def test_qr_is_the_question_s_mean_weight_on_the_needle_without_a_bos_too(needle):
    """Dense matrices with and without the question, in a random model with a tokenizer that has no BOS, and in the bundled one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = sorted({word for text in (*hs.data.bundled().values(), *TEXTS) for word in re.findall(r"\w+|[^\w\s]", text)})
    core = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(["?", *(one for one in names if one != "?")])}, unk_token="?")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names) + 1,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    scope = Scope(LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?"))
    assert scope.tokenizer.bos_token_id is None
    for one, trials in (
        (scope, needle_trials(scope, lengths=(200,), depths=(0.5,))),
        (needle, synthetic_trials(needle, lengths=(200,), per_length=1)),
    ):
        trial = trials[0]
        asked, null = (
            torch.stack([layer[:, slice(*rows), slice(*trial.needle)].sum(-1).mean(-1) for layer in dense(one, ids)])
            for ids, rows in ((trial.ids, trial.question), (trial.null_ids, trial.null_question))
        )
        found = QueryRetrieval().run(one, trials)
        assert torch.allclose(found["qr_raw"], asked, atol=1e-5)
        assert torch.allclose(found["qr"], asked - null, atol=1e-5)
    with pytest.raises(ProbeError, match="none of 1 trials was answered"):
        Retrieval(lengths=(200,), depths=(0.5,), answer_tokens=6).run(scope)


# --- what cannot be measured ------------------------------------------------------------------------------------


def test_a_model_that_answers_nothing_is_refused_with_what_it_said(tiny_llama, planted, smollm2):
    planted_wrong = planted_trial()
    wrong = replace(planted_wrong, answer=(40, 46), needle=(39, 46))
    with pytest.raises(ProbeError, match=r"none of 1 trials was answered \(ROUGE-1 recall > 0\.5\); the best answer, for .*recall 0\.00"):
        Retrieval(answer_tokens=6).run(planted, [wrong])
    assert Retrieval(answer_tokens=6, accept=None).run(planted, [wrong])["retrieval"].max() == 0.0
    random = Scope(tiny_llama, smollm2.tokenizer)
    with pytest.raises(ProbeError, match=r"none of 1 trials was answered"):
        Retrieval(answer_tokens=6).run(Scope(tiny_llama, planted.tokenizer, name="random"), [planted_trial()])
    with pytest.raises(ProbeError, match="scoped without a tokenizer"):
        Retrieval().run(Scope(tiny_llama))
    assert random.tokenizer is not None


def test_a_context_too_short_is_refused_before_anything_runs(smollm2):
    for probe in (Retrieval(), RetrievalReasoning(), QueryRetrieval()):
        with pytest.raises(ProbeError, match="a context of 64 tokens"):
            probe.run(smollm2, context=64)
        with pytest.raises(ProbeError, match="was made for 8192"):
            probe.run(smollm2, context=9000)


@pytest.mark.parametrize("wrong", [{"count": "all"}, {"mode": "fast"}, {"answer_tokens": 0}, {"exclude_sink": -1}])
def test_parameters_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ProbeError):
        Retrieval(**wrong)


# --- going on where a run stopped -------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_and_gives_the_same(needle, tmp_path, monkeypatch):
    """Killed in the third trial; the second run reads two from the journal, answers two, and equals an unbroken run to the bit."""
    trials = synthetic_trials(needle, lengths=(160,), per_length=4, needles=4)
    probe = Retrieval(answer_tokens=8)
    whole = probe.run(needle, trials)
    done = []
    inner = Retrieval.trial

    def dies(self, scope, trial):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(trial)
        return inner(self, scope, trial)

    monkeypatch.setattr(Retrieval, "trial", dies)
    with pytest.raises(KeyboardInterrupt):
        probe.run(needle, trials, journal=tmp_path / "journal")
    monkeypatch.setattr(Retrieval, "trial", lambda self, scope, trial: (done.append(trial), inner(self, scope, trial))[1])
    found = probe.run(needle, trials, journal=tmp_path / "journal")
    assert len(done) == 4, "the first two were not answered again"
    assert torch.equal(found["retrieval"], whole["retrieval"])
    assert found.tables["retrieval_trials"].equals(whole.tables["retrieval_trials"])
    other = Retrieval(answer_tokens=7).run(needle, trials, journal=tmp_path / "journal")
    assert len(done) == 8, "other settings are other trials"
    assert other.numbers["retrieval_trials"] == 4.0


def test_an_answer_ends_where_it_should(needle, smollm2):
    trial = synthetic_trials(needle, lengths=(160,), per_length=1, needles=4)[0]
    found = answer(needle, trial)
    assert found.ids[-1] == trial.stop_ids[0]
    assert len(found.ids) == 4
    assert found.rows == []
    assert found.recall == 1.0
    prose = key_value_trials(smollm2, length=300, samples=1, shots=1, key_length=4)[0]
    said = answer(smollm2, prose, limit=40)
    assert said.text.count("\n") <= 1
    assert said.text.strip()
