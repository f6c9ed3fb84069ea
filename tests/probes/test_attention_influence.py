"""AttentionInfluence: heads by key-value samples, losses against a hand-made masked model, documents, and the command line."""

from __future__ import annotations

import json
import math
import sys

import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import headscope as hs
from headscope.data.corpus import documents
from headscope.errors import DataError, ProbeError
from headscope.models.bundled import row_of
from headscope.models.planted import Duplicate, Induction, Previous, Sink, planted_llama
from headscope.probes import AttentionInfluence
from headscope.probes.attention_influence import attention_influence, losses, top_share
from headscope.probes.trials import synthetic_trials
from headscope.scope import Scope


@pytest.fixture(scope="module")
def planted():
    heads = {(0, 0): Previous(), (0, 1): Duplicate(), (1, 0): Induction(), (1, 1): Sink()}
    model = planted_llama(heads, vocab=64, max_positions=128, n_heads=4)
    return Scope(model.model, model.tokenizer(), name="planted")


@pytest.fixture(scope="module")
def needle():
    return hs.load("bundled:needle", device="cpu", dtype="float32")


def test_only_the_head_that_a_text_needs_has_influence(planted):
    """A repeated text needs the induction head far more than one without repetition, where the uniform head copies what it should not;
    heads that write nothing change nothing."""
    again = torch.cat([torch.tensor([0]), torch.arange(2, 30), torch.arange(2, 30)])
    once = torch.cat([torch.tensor([0]), torch.arange(2, 58)])
    needed = attention_influence(planted, [again, once], [(1, 0)])
    assert needed["influence"][0] > 0.5
    assert needed["influence"][0] > 2 * needed["influence"][1]
    assert needed["tokens"].tolist() == [56, 56]
    idle = attention_influence(planted, [again, once], [(0, 1), (1, 1), (1, 3)])
    assert idle["influence"].abs().max() < 1e-6
    assert idle["base_loss"].tolist() == needed["base_loss"].tolist()


def test_losses_are_those_of_uniform_weights_by_hand(tiny_llama):
    """The reference model made by hand: W_Q of the masked head is zero, so that its scores are equal over all visible keys."""
    import copy

    scope = Scope(tiny_llama)
    ids = torch.randint(0, 97, (50,), generator=torch.Generator().manual_seed(2))
    found = attention_influence(scope, [ids], [(0, 2), (1, 3)])
    by_hand = copy.deepcopy(tiny_llama)
    for layer, head in ((0, 2), (1, 3)):
        with torch.no_grad():
            by_hand.model.layers[layer].self_attn.q_proj.weight[head * 8 : (head + 1) * 8] = 0
    for model, name in ((tiny_llama, "base_loss"), (by_hand, "masked_loss")):
        with torch.no_grad():
            wanted = model(input_ids=ids[None], labels=ids[None]).loss
        assert found[name][0] == pytest.approx(float(wanted), abs=1e-5)
    row = found.iloc[0]
    assert row["influence"] == pytest.approx((row["masked_loss"] - row["base_loss"]) / row["base_loss"], abs=1e-12)


def test_long_documents_are_read_in_windows(tiny_llama):
    scope = Scope(tiny_llama)
    ids = torch.randint(0, 97, (45,), generator=torch.Generator().manual_seed(2))
    got = losses(scope, ids, 20)
    assert len(got) == 19 + 19 + 4
    assert torch.allclose(got[:19], losses(scope, ids[:20], 100))
    assert torch.allclose(got[-4:], losses(scope, ids[40:], 100))
    assert len(losses(scope, ids[:1], 20)) == 0
    found = attention_influence(scope, [ids[:1], ids], [(0, 0)], context=20)
    assert math.isnan(found["influence"][0])
    assert found["tokens"].tolist() == [0, 42]
    with pytest.raises(DataError, match="document 1: it is empty"):
        attention_influence(Scope(tiny_llama, hs.load("bundled:needle").tokenizer), ["a", " "], [(0, 0)])


def test_the_top_share_is_a_share_of_the_heads_and_leaves_out_those_that_copy_nothing():
    score = torch.tensor([[0.5, 0.0, 0.2], [0.9, 0.0, math.nan]], dtype=torch.float64)
    assert top_share(score, (4, 7), 0.2) == [(7, 0)]
    assert top_share(score, (4, 7), 0.4) == [(7, 0), (4, 0)]
    assert top_share(score, (4, 7), 0.99) == [(7, 0), (4, 0), (4, 2)]
    assert top_share(torch.zeros(2, 3), (0, 1)) == []
    with pytest.raises(ProbeError, match="share=0"):
        AttentionInfluence(share=0)


def test_the_probe_finds_the_known_heads_by_entries(needle):
    """The bundled model's entries are keys and values; its essays are no documents for it."""
    found = AttentionInfluence(samples=3).run(needle, context=300)
    known = torch.zeros_like(found["retrieval_kv"])
    for layer, head, *_ in row_of("needle").truth["retrieval"]:
        known[layer, head] = 1
    assert roc_auc_score(known.flatten(), found["retrieval_kv"].flatten()) >= 0.95
    assert found.numbers["retrieval_kv_masked"] == round(0.05 * known.numel())
    assert "attention_influence" not in found.tables
    assert found.notes[-1].startswith("masked for the influence: ")


def test_texts_that_need_retrieval_rank_above_those_that_do_not(needle):
    """Documents of the bundled model: haystacks with their questions answered, against the same haystacks alone."""
    trials = synthetic_trials(needle, lengths=(300,), per_length=4, seed=5)
    heads = [(layer, head) for layer, head, *_ in row_of("needle").truth["retrieval"]]
    asked = [torch.cat([trial.ids, trial.follow]) for trial in trials]
    plain = [trial.ids[: trial.question[0]] for trial in trials]
    found = attention_influence(needle, asked + plain, heads)["influence"]
    assert (found[:4].to_numpy() > found[4:].to_numpy()).all()


def test_smollm2_is_refused_where_it_answers_no_key(smollm2):
    with pytest.raises(ProbeError, match="none of 1 trials was answered"):
        AttentionInfluence(samples=1, shots=2).run(smollm2, context=470)


# --- corpora and the command line ---------------------------------------------------------------------------------


def test_corpora_are_read_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "x": 1}\n')
    pd.DataFrame({"text": ["three", "four"]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "a.txt").write_text("zero\nand more")
    (tmp_path / "ignored.md").write_text("no")
    assert list(documents(tmp_path)) == [
        ("a.txt:0", "zero\nand more"), ("b.jsonl:0", "one"), ("b.jsonl:1", "two"), ("c.parquet:0", "three"), ("c.parquet:1", "four"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', "document 1: it has no text under 'text'"),
        ("a.jsonl", '{"text": \n', "document 0: it is not JSON"),
        ("a.jsonl", "[1]\n", "document 0: it has no text"),
        ("a.txt", "  \n", "document 0: it has no text"),
        ("a.parquet", "no parquet", "it is no parquet file"),
        ("a.csv", "x", "it is none of"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(documents(tmp_path / name))
    with pytest.raises(DataError, match=r"no such file|no \.jsonl"):
        list(documents(tmp_path / "missing.txt"))


def test_columns_and_folders_that_hold_no_text_are_refused(tmp_path):
    pd.DataFrame({"body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="it has no column 'text'; name one of body"):
        list(documents(tmp_path))
    assert list(documents(tmp_path, "body")) == [("a.parquet:0", "x")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl, \.parquet, \.txt file is in it"):
        list(documents(tmp_path / "empty"))


def run(monkeypatch, capsys, *args):
    from headscope.cli.main import main

    monkeypatch.setattr(sys, "argv", ["headscope", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_corpus_is_scored_from_the_command_line_and_goes_on_where_it_stopped(needle, tmp_path, monkeypatch, capsys):
    texts = [needle.text_tokenizer.decode(trial.ids[1:]) for trial in synthetic_trials(needle, lengths=(200,), per_length=5)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ("score", corpus, "--model", "bundled:needle", "--device", "cpu", "--heads", "2.0,3.1", "--context", 300)
    code, printed, _ = run(monkeypatch, capsys, *given, "--out", tmp_path / "a.parquet", "--json")
    assert code == 0
    facts = json.loads(printed)
    assert facts["documents"] == 5
    assert facts["heads"] == [[2, 0], [3, 1]]
    whole = pd.read_parquet(tmp_path / "a.parquet")
    assert whole["name"].tolist() == [f"corpus.jsonl:{number}" for number in range(5)]
    direct = attention_influence(needle, texts, [(2, 0), (3, 1)], context=300)
    assert whole["influence"].tolist() == pytest.approx(direct["influence"].tolist(), abs=1e-9)
    assert not (tmp_path / "a.parquet.journal").exists()

    import headscope.probes.attention_influence as module

    ran = []
    inner = module.losses

    def dies(*args):
        ran.append(1)
        if len(ran) == 5:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(module, "losses", dies)
    assert run(monkeypatch, capsys, *given, "--out", tmp_path / "b.parquet")[0] == 130
    assert not (tmp_path / "b.parquet").exists()
    assert run(monkeypatch, capsys, *given, "--out", tmp_path / "b.parquet")[0] == 0
    assert len(ran) == 5 + 6, "two documents were not read again"
    assert pd.read_parquet(tmp_path / "b.parquet").equals(whole)
    code, _, said = run(monkeypatch, capsys, *given, "--out", tmp_path / "b.parquet")
    assert (code, "exists already" in said) == (1, True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--out", "x.csv"), "scores are written as .parquet"),
        (("--out", "x.parquet", "--heads", "99.0"), "99"),
        (("--out", "x.parquet", "--heads", "2.0", "--limit", "0"), "no document is left"),
    ],
)
def test_scoring_that_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, more, message):
    corpus = tmp_path / "c.txt"
    corpus.write_text("the old barn was quiet .")
    monkeypatch.chdir(tmp_path)
    code, _, said = run(monkeypatch, capsys, "score", corpus, "--model", "bundled:needle", "--device", "cpu", *more)
    assert code == 1
    assert message in said
    assert len(said.strip().splitlines()[-1]) > 20
    assert not (tmp_path / "x.parquet").exists()
