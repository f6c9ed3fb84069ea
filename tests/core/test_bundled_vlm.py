"""bundled:vlm: it reads grids of held-out digits, is at chance without a picture, hallucinates under noise, and its heads are known."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import headscope as hs
from headscope.models.bundled import data_vlm as data
from headscope.models.bundled import methods_vlm, row_of, train_vlm
from headscope.models.bundled.card import training_lines
from headscope.models.bundled.evaluate_vlm import SEED, accuracy, constant, hallucination, told
from headscope.models.bundled.training import generator

COUNT, FEW = 256, 128


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
    assert truth["greedy"][-1][2] < 0.35
    assert len(truth["greedy"]) <= 8
    gone = [(row[0], row[1]) for row in truth["greedy"]]
    assert accuracy(scope.model, "position", COUNT, heads=gone) < 0.4
    harmless = sorted(truth["single"], key=truth["single"].get)[-3:]
    heads = [tuple(int(part) for part in name.split(".")) for name in harmless]
    assert accuracy(scope.model, "position", COUNT, heads=heads) > 0.9


def test_without_a_picture_the_guess_is_all_there_is(scope, record):
    """Right as often as the guess is, and near chance without one: 0.17 for positions ("none"), 0.52 for presence."""
    for kind in data.GUESSED:
        assert told(scope.model, kind, FEW, 1.0, picture="removed")["right"] > 0.95
        assert told(scope.model, kind, FEW, 0.0, picture="removed")["follows"] > 0.95
        assert record["guess"]["no picture"][kind]["wrong"]["follows"] > 0.95
    for kind in ("position", "presence"):
        assert record[kind]["removed"] <= record[kind]["constant"] + 0.05


def test_a_clear_picture_overrules_a_wrong_guess_and_a_noisy_one_less(scope, record):
    for kind in ("position", "presence"):
        clean, noisy = (told(scope.model, kind, FEW, 0.0, noise=noise) for noise in (data.NOISE, 0.4))
        assert clean["right"] > 0.85
        assert noisy["follows"] > clean["follows"]
        assert noisy["right"] < clean["right"] - 0.1
        helped = told(scope.model, kind, FEW, 1.0, noise=0.4)
        assert helped["right"] > noisy["right"] + 0.05
        known = record["guess"]["noise 0.4"][kind]["wrong"]["right"]
        assert noisy["right"] == pytest.approx(known, abs=0.01 + 4 * math.sqrt(known * (1 - known) / FEW))


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


def asked_in_turns(count: int, alone: float, seed: int = 5):
    turns = [(kind, 0.85 if told else None) for kind, told in train_vlm.TURNS]
    config = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=5, num_attention_heads=8))
    given = SimpleNamespace(batch=count, alone=alone, noisy=0.3, jitter=0.0, far=1.0)
    return turns, train_vlm.batch_of(turns, config, generator(seed, "cpu"), given)


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return train_vlm.build().eval()


def test_training_runs_the_models_own_forward_pass(untrained):
    """The captured step calls the modules one by one; without that test it could train another model than the one that is shipped."""
    _, made = asked_in_turns(8, 0.25)
    shown = len(made.pixels)
    assert shown == 6
    with torch.no_grad():
        logits, *_ = train_vlm.forward(untrained, made)
        whole = untrained(input_ids=made.ids[:shown], pixel_values=made.pixels, use_cache=False).logits
        text = made.ids[shown:]
        alone = untrained(input_ids=text, attention_mask=torch.ones_like(text), position_ids=made.places[shown:], use_cache=False).logits
    assert (logits[:shown] - whole).abs().max() < 1e-4
    assert (logits[shown:] - alone).abs().max() < 1e-4


def test_attention_that_training_pays_for_is_the_models_own(untrained):
    """Counted entry by entry from the eager maps: what is not on <bos>, and what goes to the picture from elsewhere than it is to."""
    _, made = asked_in_turns(3, 0.0)
    with torch.no_grad():
        *_, attended = train_vlm.forward(untrained, made)
        untrained.set_attn_implementation("eager")
        maps = untrained(input_ids=made.ids, pixel_values=made.pixels, output_attentions=True, use_cache=False).attentions
    elsewhere, astray = [], []
    for number, layer in enumerate(maps):
        elsewhere.append(1 - layer[:, :, 1:, 0].mean())
        for n, words in enumerate(made.labels):
            rows = range(1 + data.TOKENS, len(words) - 1)
            answering = [t for t in rows if words[t + 1] >= 0]
            seen = layer[n, :, :, 1 : 1 + data.TOKENS].sum(-1)
            paid = seen[:, [t for t in rows if t not in answering]].mean()
            astray.append(paid if number in (1, 2) else paid + seen[:, answering].mean())
    assert float(attended[0]) == pytest.approx(float(torch.stack(elsewhere).mean()), abs=1e-5)
    assert float(attended[1]) == pytest.approx(float(torch.stack(astray).mean()), abs=1e-5)
    assert 0.1 < float(attended[1]) < 1.8


def test_a_second_run_goes_on_from_the_first_and_leaves_its_sight_alone(tmp_path, monkeypatch):
    """The tower and the projector stay bit for bit, the text model moves, and the card tells both runs without their folders."""
    first = row_of("vlm").path
    words = ["train_vlm", "--out", str(tmp_path), "--device", "cpu", "--begin", str(first), "--steps", "2", "--batch", "2", "--astray", "5"]
    monkeypatch.setattr(sys, "argv", words)
    strict = torch.are_deterministic_algorithms_enabled()
    try:
        train_vlm.main()
    finally:
        torch.use_deterministic_algorithms(strict)
        torch.utils.deterministic.fill_uninitialized_memory = True
    before, after = (load_file(next(where.glob("*.safetensors"))) for where in (first, tmp_path))
    sight = [name for name in before if "language_model" not in name and "lm_head" not in name]
    assert len(sight) > 40
    assert all(torch.equal(before[name], after[name]) for name in sight)
    assert not any(torch.equal(before[name], after[name]) for name in before if name not in sight and before[name].ndim > 1)
    told = training_lines(tmp_path, "train_vlm")
    assert "--out FIRST" in told
    assert "--out DIR --device cpu --begin FIRST --steps 2" in told
    assert str(first) not in told


def test_a_second_run_without_a_first_is_refused_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_vlm", "--out", str(tmp_path / "out"), "--device", "cpu", "--begin", str(tmp_path)])
    with pytest.raises(SystemExit):
        train_vlm.main()
    assert "holds no training.json; give the folder that an earlier run wrote" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_step_gives_the_gradients_of_the_models_own_loss(untrained):
    """Weighted as the script weights them: one mean over all answer words, and the tower's loss with its weight."""
    model, summary = untrained, torch.nn.Linear(128, 10)
    _, made = asked_in_turns(4, 0.0)
    train_vlm.Learner(model, summary, "cpu", weight=0.3).gradients(made)
    weights = model.lm_head.weight, model.model.vision_tower.post_layernorm.weight, summary.bias
    found = [one.grad.clone() for one in weights]
    model.zero_grad()
    summary.zero_grad()
    towers = []
    model.model.vision_tower.post_layernorm.register_forward_hook(lambda *seen: towers.append(seen[-1]))
    out = model(input_ids=made.ids, pixel_values=made.pixels, labels=made.labels, use_cache=False)
    digits = torch.nn.functional.binary_cross_entropy_with_logits(summary(towers[0]), made.there)
    (out.loss + 0.3 * digits).backward()
    for mine, one in zip(found, weights, strict=True):
        assert float(one.grad.abs().max()) > 0
        assert torch.allclose(mine, one.grad, atol=1e-5, rtol=1e-3)


def test_dialogues_without_a_picture():
    """They lack the image tokens, begin anywhere, are never asked to read out what nobody sees, and end in padding."""
    turns, made = asked_in_turns(64, 0.5)
    table, shown = data.ids_of(), len(made.pixels)
    assert shown == 32
    assert bool((made.ids[:shown] == table[data.IMAGE]).sum(1).eq(data.TOKENS).all())
    assert not bool((made.ids[shown:] == table[data.IMAGE]).any())
    assert bool((made.ids[shown:, -data.TOKENS :] == 0).all())
    assert bool((made.labels[shown:, -data.TOKENS :] == -100).all())
    start = made.places[shown:, 1]
    assert bool((made.places[:, 0] == 0).all())
    assert bool((made.places[shown:, 2:] - made.places[shown:, 1:-1] == 1).all())
    assert int(start.min()) >= 1
    assert int(start.max()) <= 1 + data.TOKENS
    assert len(set(start.tolist())) > 10
    answers = {kind: len(data.turn(kind, data.scenes(1, generator(0, "cpu")), generator(0, "cpu")).answers) for kind in data.KINDS}
    assert bool(((made.labels[:shown] >= 0).sum(1) == sum(answers[kind] for kind, _ in turns)).all())
    assert bool(((made.labels[shown:] >= 0).sum(1) == sum(answers[kind] for kind, _ in turns if kind != "read")).all())
    asked = made.labels >= 0
    assert torch.equal(made.labels[asked], made.ids[asked])


def test_guesses_are_right_as_often_as_asked_and_wrong_ones_could_be_right():
    source = generator(6, "cpu")
    scene = data.scenes(2000, source, held_out=True)
    words = {number: word for word, number in data.ids_of().items()}
    numbers = data.DIGITS.index
    for kind in data.GUESSED:
        for share in (0.0, 0.8, 1.0):
            made = data.turn(kind, scene, source, guess=share)
            (first, end), place = data.layout([kind], [share])[0], made.answers[0]
            assert end - first == made.ids.shape[1]
            guess, answer = ([words[one] for one in column.tolist()] for column in (made.ids[:, place - 4], made.ids[:, place]))
            same = [a == b for a, b in zip(guess, answer, strict=True)]
            assert abs(sum(same) / 2000 - share) < 0.03
            pairs = [(a, b) for a, b in zip(guess, answer, strict=True) if a != b]
            if kind == "presence":
                assert {*guess} <= {"yes", "no"}
            elif kind == "count":
                assert all(abs(numbers(a) - numbers(b)) == 1 for a, b in pairs)
            else:
                assert {a for a, _ in pairs} == {*data.DIGITS, "none"} or not pairs
    with pytest.raises(ValueError, match="one word"):
        data.turn("read", scene, source, guess=0.5)


def test_options_of_methods_were_chosen_on_other_questions_and_the_card_says_what_they_did():
    """The choice is derived again: the largest gain among the options that cost at most 0.02 elsewhere, on the development questions."""
    where = row_of("vlm").path
    found = json.loads((where / "methods.json").read_text())
    assert found["agreement"]["vhd_raw, removed"] > 0.7
    for method, row in found["methods"].items():
        fit = {name: one["gain"] for name, one in row["development"].items() if one["worst elsewhere"] >= -methods_vlm.COST}
        assert (row["chosen"] is None) == (not fit)
        assert row["chosen"] is None or fit[row["chosen"]] == max(fit.values())
        assert row["published"] in row["test"]
        assert f"| {method} | {row['published']} (published" in row_of("vlm").card
    assert not {methods_vlm.DEV, methods_vlm.TEST} & {SEED}
    drawn = [methods_vlm.questions("position", "clean", 16, seed)[0].inputs["pixel_values"] for seed in (methods_vlm.DEV, methods_vlm.TEST)]
    assert not torch.equal(*drawn)
