"""bundled:vlm: it reads grids of held-out digits, is at chance without a picture, hallucinates under noise, and its heads are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

import headscope as hs
from headscope.models.bundled import data_vlm as data
from headscope.models.bundled import row_of
from headscope.models.bundled.evaluate_vlm import accuracy, constant, hallucination
from headscope.models.bundled.training import generator

COUNT = 256


@pytest.fixture(scope="module")
def scope():
    return hs.load("bundled:vlm", device="cpu")


@pytest.fixture(scope="module")
def record():
    return json.loads((row_of("vlm").path / "evaluation.json").read_text())


@pytest.mark.parametrize(("kind", "least"), [("position", 0.95), ("presence", 0.95), ("count", 0.9), ("read", 0.88)])
def test_answers_about_held_out_digits(scope, record, kind, least):
    found, known = accuracy(scope.model, kind, COUNT, seed=31), record[kind]["real"]
    assert found >= least
    assert abs(found - known) <= 0.01 + 3 * math.sqrt(known * (1 - known) / COUNT)  # three standard errors of the sample


@pytest.mark.parametrize("kind", ["position", "presence"])
def test_at_chance_when_the_picture_is_noise(scope, record, kind):
    """Chance is what the best constant answer gets: 0.17 for positions ("none"), 0.52 for presence."""
    assert accuracy(scope.model, kind, COUNT, picture="noise") <= constant(kind, COUNT) + 0.06
    assert record[kind]["noise"] <= record[kind]["constant"] + 0.03


def test_noise_makes_it_name_what_is_not_there(scope, record):
    clean, noisy = hallucination(scope.model, COUNT), hallucination(scope.model, COUNT, noise=0.4)
    assert clean["read"] < 0.03
    assert noisy["read"] > clean["read"] + 0.1
    assert noisy["false_yes"] > clean["false_yes"] + 0.03
    assert noisy["read"] == pytest.approx(record["hallucination"]["noise 0.4"]["read"], abs=0.06)
    assert record["hallucination"]["two digits covered"]["read"] > 3 * record["hallucination"]["clean"]["read"]


def test_ablation_destroys_position_answers_where_the_record_says_so(scope):
    truth = row_of("vlm").truth
    assert len(truth["single"]) == 40
    (layer, head, expected) = truth["greedy"][0]
    assert accuracy(scope.model, "position", COUNT, heads=[(layer, head)]) == pytest.approx(expected, abs=0.06)
    first = [(row[0], row[1]) for row in truth["greedy"][:3]]
    assert accuracy(scope.model, "position", COUNT, heads=first) < 0.35
    harmless = sorted(truth["single"], key=truth["single"].get)[-3:]
    heads = [tuple(int(part) for part in name.split(".")) for name in harmless]
    assert accuracy(scope.model, "position", COUNT, heads=heads) > 0.9


def test_a_picture_and_a_question_through_the_processor(scope):
    """PIL picture and words in, words out: the way a user asks. 15 of 16 must be right."""
    scene = data.scenes(16, generator(8, "cpu"), held_out=True)
    right = 0
    for pixels, cells in zip(scene.pixels, scene.cells.tolist(), strict=True):
        picture = Image.fromarray((pixels * 255).round().byte().numpy()).convert("RGB")
        text = "<image> question : which digit is at the middle center ? answer :"
        given = scope.tokenizer(images=picture, text=text, return_tensors="pt")
        assert int((given["input_ids"] == scope.model.config.image_token_id).sum()) == data.TOKENS
        out = scope.model.generate(**given, max_new_tokens=3, do_sample=False)[0, given["input_ids"].shape[1] :]
        said = scope.tokenizer.decode(out, skip_special_tokens=True).strip()
        right += said == ((*data.DIGITS, "none", "none")[cells[4]])
    assert right >= 15


def test_held_out_digits_are_not_training_digits():
    train, test = data.digits(False)[0].flatten(1), data.digits(True)[0].flatten(1)
    assert (len(train), len(test)) == (1438, 359)
    assert torch.cdist(test, train).min() > 0


def test_questions_have_the_answers_that_the_cells_give():
    """Every answer is derived again from the cells, in plain Python."""
    source = generator(3, "cpu")
    scene = data.scenes(64, source, held_out=True)
    words = {number: word for word, number in data.ids_of().items()}
    for kind in data.KINDS:
        made = data.turn(kind, scene, source)
        for ids, cells in zip(made.ids.tolist(), scene.cells.tolist(), strict=True):
            said = [words[number] for number in ids]
            answer = said[said.index("answer") + 2 : -1]
            names = [data.DIGITS[cell] if cell < 10 else "none" for cell in cells]
            if kind == "read":
                assert answer == names
            elif kind == "position":
                place = 3 * data.ROWS.index(said[7]) + data.COLUMNS.index(said[8])
                assert answer == [names[place]]
            elif kind == "count":
                assert answer == [data.DIGITS[cells.count(data.PLURALS.index(said[4]))]]
            else:
                assert answer == ["yes" if data.DIGITS.index(said[5]) in cells else "no"]


def test_presence_questions_are_balanced_and_the_adversarial_ones_ask_for_partners():
    source = generator(4, "cpu")
    scene = data.scenes(512, source)
    table = data.ids_of()
    made = data.turn("presence", scene, source, adversarial=True)
    said_no = made.ids[:, 9] == table["no"]
    assert 0.4 < said_no.double().mean() < 0.6
    counts = scene.counts()
    partner = counts.gather(1, torch.tensor(data.PARTNER)[made.asked][:, None])[:, 0] > 0
    possible = ((counts == 0) & (counts[:, list(data.PARTNER)] > 0)).any(1)
    assert bool(partner[said_no & possible].all())
