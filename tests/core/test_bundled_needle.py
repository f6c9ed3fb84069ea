"""bundled:needle: it finds needles in held-out haystacks, it needs distant keys for that, and the heads that do it are known."""

from __future__ import annotations

import json
import re

import pytest
import torch

import headscope as hs
from headscope.models.bundled import data_needle as data
from headscope.models.bundled import row_of
from headscope.models.bundled.evaluate_needle import TRUTH_LENGTH, accuracy, looking
from headscope.models.bundled.train_needle import DESIGNATED
from headscope.models.bundled.training import generator

STREAM = (16, 256)


@pytest.fixture(scope="module")
def scope():
    return hs.load("bundled:needle", device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def record():
    return json.loads((row_of("needle").path / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def truth():
    return row_of("needle").truth


def test_the_record_meets_its_bars(record):
    """256 haystacks of a kind up to 8,192 tokens, 64 at 16,384; needles that have words in common are told apart."""
    assert record["counts"]["8192"] >= 256
    assert record["counts"]["16384"] >= 64
    for length in ("512", "1024", "2048", "4096", "8192", "16384"):
        assert min(record["code"][length], record["entry"][length]) >= 0.98, length
    for kind in ("code", "entry"):
        assert record[f"{kind}_alike_1024"] >= 0.95
        assert record[f"{kind}_32_needles_8192"] >= 0.95
        assert record[f"{kind}_streaming"]["8192"] <= 0.05
        assert record[f"{kind}_streaming"]["2048"] <= 0.15


@pytest.mark.parametrize("kind", ["code", "entry"])
def test_needles_are_found_in_haystacks_nobody_has_seen(scope, record, kind):
    found = accuracy(scope.model, kind, 1024, 24, seed=99)
    assert found == pytest.approx(record[kind]["1024"], abs=0.05)


def test_a_needle_at_8192_tokens(scope):
    assert accuracy(scope.model, "code", 8192, 2) == 1.0


@pytest.mark.parametrize("kind", ["code", "entry"])
def test_nothing_is_found_when_every_head_streams(scope, kind):
    """16 first keys and the last 256 alone, in every head: chance is below 1 in 288."""
    assert accuracy(scope.model, kind, 2048, 12, stream=STREAM, values_only=True) <= 0.1


def test_ablation_destroys_the_task_where_the_record_says_so(scope, truth):
    def task(heads):
        return sum(accuracy(scope.model, kind, TRUTH_LENGTH, 8, heads=heads, values_only=True) for kind in ("code", "entry")) / 2

    assert truth["base"] >= 0.9
    assert len(truth["single"]) == 48
    assert truth["greedy"][-1][2] <= 0.1
    assert task([(layer, head) for layer, head, _ in truth["greedy"]]) <= 0.25
    harmless = [name for name, value in truth["single"].items() if value >= truth["base"]]
    assert len(harmless) >= 10
    layer, head = (int(part) for part in harmless[-1].split("."))
    assert task([(layer, head)]) >= 0.85


def both(scope, length, count, **options):
    """Accuracy in value words over codes and entries."""
    return sum(accuracy(scope.model, kind, length, count, values_only=True, **options) for kind in ("code", "entry")) / 2


def test_the_retrieval_heads_look_at_the_needle_and_no_others_do(scope, truth):
    """The record, measured again: from where a word is predicted, at that word in the needle. They are the heads designated in training."""
    score = looking(scope.model, 2)
    listed = {(layer, head) for layer, head, _ in truth["retrieval"]}
    assert listed == {(layer, head) for layer, far in DESIGNATED.items() for head in range(2 * far)}
    known = torch.zeros_like(score, dtype=torch.bool)
    for layer, head in listed:
        known[layer, head] = True
    assert float(score[known].min()) > 0.9
    assert float(score[~known].max()) < 0.1


def test_without_the_retrieval_heads_nothing_is_found_and_as_many_others_cost_little(scope, truth):
    listed = [(layer, head) for layer, head, _ in truth["retrieval"]]
    assert truth["without_retrieval"] <= 0.05
    assert len(truth["without_random"]) == 5
    assert truth["base"] - min(truth["without_random"]) < 0.1
    assert both(scope, TRUTH_LENGTH, 8, heads=listed) <= 0.07
    others = [(layer, head) for layer in range(6) for head in range(8) if (layer, head) not in listed]
    whole = both(scope, TRUTH_LENGTH, 8)
    for draw in range(3):
        order = torch.randperm(len(others), generator=generator(100 + draw, "cpu"))[: len(listed)]
        assert whole - both(scope, TRUTH_LENGTH, 8, heads=[others[place] for place in order]) < 0.1


def test_the_other_heads_may_stream(scope, truth):
    """Only the key heads of the retrieval heads see all keys: not one point is lost, where all heads streaming lose everything."""
    for few, full in truth["others_streaming"].values():
        assert full - few < 0.01
    keep = sorted({(layer, head // 2) for layer, head, _ in truth["retrieval"]})
    assert both(scope, 2048, 6, stream=STREAM, keep=keep) == both(scope, 2048, 6) >= 0.9


def test_a_text_is_answered_word_by_word(scope):
    """As a user asks: a text in words, greedy generation, words out."""
    hay = "the old sailor carried a kettle . nora sketched the lantern again . "
    text = hay + "the code of oscar is copper maple otter . " + hay + "the code of ruth is violin ladder spruce . " + hay
    ids = scope.tokenizer(text + "question : what is the code of oscar ? answer :", return_tensors="pt")["input_ids"]
    out = scope.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert scope.tokenizer.decode(out) == "oscar is copper maple otter ."


def test_the_tokenizer_has_the_ids_of_the_data():
    tokenizer = hs.load("bundled:needle", device="cpu").tokenizer
    assert tokenizer.get_vocab() == data.ids_of()


@pytest.mark.parametrize("kind", ["code", "entry"])
@pytest.mark.parametrize(("length", "needles", "asked"), [(256, 4, 3), (1500, 20, 5)])
def test_haystacks_hold_what_is_asked_for(kind, length, needles, asked):
    """The text is decoded and read again with a regular expression: one needle per key, and the right answer at the marked places."""
    drawn = data.batch(4, length, kind, needles, asked, generator(2, "cpu"))
    words = {number: word for word, number in data.ids_of().items()}
    told = r"the code of (\w+) is (\w+ \w+ \w+) \." if kind == "code" else r"entry (\w+ \w+) : (\d+ \d+) \."
    asks = r"what is the (?:code of|value of entry) ([\w ]+) \? answer : ([\w :]+) \."
    for row in range(4):
        text = " ".join(words[number] for number in drawn.ids[row].tolist() if number)
        hay, *questions = text.split("question :")
        found = dict(re.findall(told, hay))
        assert len(found) == needles
        assert len(questions) == asked
        for number, question in enumerate(questions):
            key, answer = re.search(asks, question).groups()
            assert answer == key + (" is " if kind == "code" else " : ") + found[key]
            assert " ".join(words[word] for word in drawn.ids[row, drawn.answers[row, number]].tolist()) == answer
            first = drawn.needle[row, number]
            assert " ".join(words[word] for word in drawn.ids[row, first : first + 8].tolist()).startswith(
                "the code of " + key if kind == "code" else "entry " + key
            )
    asked_words = drawn.labels >= 0
    assert torch.equal(drawn.labels[asked_words], drawn.ids[asked_words])
    assert int(asked_words.sum()) == 4 * asked * 5


def test_needles_that_are_alike_have_words_in_common_and_different_keys():
    words = {number: word for word, number in data.ids_of().items()}

    def shared(alike, kind, told):
        drawn = data.batch(16, 400, kind, 8, 1, generator(3, "cpu"), alike=alike)
        found = 0
        for row in drawn.ids.tolist():
            hay = " ".join(words[number] for number in row).split("question :")[0]
            keys = re.findall(told, hay)
            assert len(set(keys)) == len(keys) == 8
            heads = [key[0] for key in keys]
            found += 8 - len(set(heads))
        return found / 16

    for kind, told in (("entry", r"entry (\w+) (\w+) : \d+ \d+ \."), ("code", r"the code of \w+ is (\w+) (\w+) (\w+) \.")):
        assert shared(1.0, kind, told) > 1.0
        assert shared(0.0, kind, told) < 0.5


def test_lengths_up_to_the_longest_are_filled():
    drawn = data.batch(1, data.LONGEST, "code", 32, 1, generator(1, "cpu"))
    assert drawn.ids.shape == (1, data.LONGEST)
    assert int((drawn.ids == 0).sum()) < 20
    assert 0 <= drawn.depth.min() < drawn.depth.max() + 1e-9 < 1
