"""The benchmark of effects: errors and exact tests against scipy, items that share no word between parts, its tables at a small size."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

import headscope as hs
from headscope.bench import effects, effects_act, effects_hunt, effects_injection, effects_masks
from headscope.bench.effects_stats import Estimate, difference, mcnemar, rank, sign_test
from headscope.errors import DataError


def test_errors_and_exact_tests_are_scipys():
    values = torch.tensor([0.2, 1.5, -3.0, 0.7, 2.2], dtype=torch.float64)
    found = Estimate.of(values)
    assert found.mean == pytest.approx(values.numpy().mean())
    assert found.error == pytest.approx(stats.sem(values.numpy()))
    assert math.isnan(Estimate.of([1.0]).error)
    with pytest.raises(ValueError, match="no items"):
        Estimate.of([])
    for wins, losses in ((0, 0), (3, 3), (1, 9), (40, 20), (300, 200)):
        want = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(want, rel=1e-9)
    one, other = torch.tensor([True, True, True, False, True]), torch.tensor([False, False, True, True, False])
    assert mcnemar(one, other) == pytest.approx(stats.binomtest(3, 4).pvalue)
    assert difference(one, other).mean == pytest.approx(0.4)
    assert rank(0.5, [0.4, 0.5, 0.6]) == "2 of 3 reach it"


def test_act_items_are_balanced_different_and_of_other_words(smollm2):
    parts = [effects_act.items(smollm2, "mood", part, 20, batch=8) for part in (0, 1)]
    words = []
    for part, given in enumerate(parts):
        texts = [smollm2.text_tokenizer.decode(ids) for batch in given.ids for ids in batch]
        pleased = torch.cat(given.right).tolist()
        assert len(set(texts)) == 20
        assert sum(pleased) == 10
        for text, kind in zip(texts, pleased, strict=True):
            assert sum(f" {word} " in text or f" {word}." in text for word in (effects_act.GOOD if kind else effects_act.BAD)[part]) == 2
        words.append({*effects_act.GOOD[part], *effects_act.BAD[part]})
    assert not words[0] & words[1]
    assert [smollm2.text_tokenizer.decode([one]) for one in parts[0].labels] == [" happy", " sad"]
    logits = torch.zeros(20, 3, smollm2.model.config.vocab_size)
    logits[:, -1, parts[0].labels[0]] = torch.cat(parts[0].right).float() * 2 - 1
    right, logp = parts[0].judge([parts[0].pick(logits)])
    assert bool(right.all())
    torch.testing.assert_close(
        logp, torch.where(torch.cat(parts[0].right), math.log(1 / (1 + math.exp(-1))), -math.log(1 + math.exp(-1))).double()
    )


def test_act_gains_are_those_of_single_runs(smollm2):
    """One head of the sweep against a run of its own; the best of two by hand."""
    from headscope.interventions import ACT

    given = effects_act.items(smollm2, "review", 0, 2, batch=2)
    with pytest.MonkeyPatch.context() as patch:
        whole = hs.sweep
        patch.setattr(hs, "sweep", lambda scope, factory, heads, metric, **more: whole(scope, factory, [(9, 2), (14, 6)], metric, **more))
        heads, gained = effects_act.gains(smollm2, given, lambda _: None)
    assert heads == [(9, 2), (14, 6)]
    for place, head in enumerate(heads):
        with torch.no_grad():
            plain = given.judge([given.pick(smollm2.model(ids).logits) for ids in given.ids])[1]
            with smollm2.intervene(ACT([head])):
                edited = given.judge([given.pick(smollm2.model(ids).logits) for ids in given.ids])[1]
        torch.testing.assert_close(gained[place], edited - plain, rtol=0, atol=2e-4)
    made = torch.tensor([[0.1, 0.3], [0.2, 0.5], [-1.0, 0.0]]).mean(1)
    assert effects_act.top([(0, 0), (0, 1), (1, 0)], made, 3) == ((0, 1), (0, 0))


def test_distance_is_to_the_nearest_digit():
    dit = hs.load("bundled:dit", device="cpu")
    pictures = effects_hunt.Pictures(dit, 4)
    drawn = pictures.draw((), 6, w=3.0)
    flat = drawn.flatten(1).clamp(-1, 1).numpy().astype(np.float64)
    for held, reference in ((True, pictures.held), (False, pictures.seen)):
        want = [min(np.linalg.norm(one - digit) for digit in reference.numpy()) for one in flat]
        np.testing.assert_allclose(pictures.distance(drawn, held=held).numpy(), want, rtol=1e-6)
    assert len(pictures.held) + len(pictures.seen) == 1797
    torch.testing.assert_close(pictures.draw([(0, 0)], 6, w=3.0, u=0.0), drawn, rtol=0, atol=0)
    assert not torch.equal(pictures.draw([(0, 0)], 6, w=3.0), drawn)


def test_its_tables_of_pictures():
    sizes = effects_hunt.Sizes(2, 4, 4, 2, 4, (3.0,), (0.5,), 1)
    found = effects_hunt.measure(hs.load("bundled:dit", device="cpu"), sizes, lambda _: None)
    sets, randoms, curve = (block["rows"] for block in found)
    assert [row[0] for row in sets][:4] == ["hunted", "no guidance", "one-shot, best 3", "worst 3"]
    assert sets[0][1] == sets[2][1], "one round of three is the one-shot search"
    assert sets[2][4] == "0.000 ± 0.000"
    assert len(randoms) == 4
    assert [row[0] for row in curve] == ["0.5", "1"]
    for block in found:
        assert all(len(row) == len(block["columns"]) for row in block["rows"])


def test_heads_of_an_earlier_search_are_taken_without_one(monkeypatch):
    monkeypatch.setattr(effects_hunt, "hunt", None)
    sizes = effects_hunt.Sizes(0, 2, 2, 1, 2, (1.0,), (), 1)
    sets, randoms, curve = effects_hunt.measure(hs.load("bundled:dit", device="cpu"), sizes, lambda _: None)
    assert sets["rows"][0][:2] == ["hunted", "4.3, 3.1, 2.5"]
    assert len(sets["rows"]) == 4 + 6
    assert "search of another run" in sets["title"]
    assert len(curve["rows"]) == 1
    assert len(randoms["rows"]) == 4


def test_a_passkey_is_where_it_is_said_to_be(smollm2):
    ids, start = effects_masks.passkey(smollm2, 5, 200)
    text = smollm2.text_tokenizer.decode(ids[0])
    answer = smollm2.text_tokenizer.decode(ids[0, start:])
    assert answer.isdecimal()
    assert len(answer) == 5
    assert text.count(answer) == 3
    assert 150 < ids.shape[1] < 230


def test_folds_ask_every_pair_once_and_never_show_it(smollm2, monkeypatch):
    seen = []

    def prepared(scope, rest, **more):
        seen.append(rest)
        return hs.interventions.SoftInjection("all", torch.zeros(270, 64), 0.0)

    monkeypatch.setattr(hs.interventions.SoftInjection, "prepared", prepared)
    sizes = effects_injection.Sizes(("plurals",), most=8, folds=4, asked=4, shots=2)
    told = effects_injection.of_task(smollm2, "plurals", sizes)
    assert len(set(told.pairs)) == 8
    for fold, rest in enumerate(seen):
        assert not set(rest) & set(told.pairs[2 * fold : 2 * fold + 2])
        assert len(rest) == 6
    assert torch.equal(told.right["injected"], told.right["none"]), "gates of 0 do nothing"
    assert float(told.loss["few"].mean()) < float(told.loss["none"].mean())
    assert len(told.row()) == len(effects_injection.COLUMNS)


def test_the_command(capsys, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from headscope.cli.main import app

    asked = []

    def measure(scope, sizes, say, *, journal=None):
        asked.append((scope.name, sizes, journal))
        return [{"title": "pictures", "columns": ["set", "distance"], "rows": [["none", "2.418 ± 0.031"]]}]

    monkeypatch.setattr(effects_hunt, "measure", measure)
    out = tmp_path / "effects.json"
    done = CliRunner().invoke(app, ["bench", "effects", "--only", "hunt", "--device", "cpu", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    kept = json.loads(out.read_text())
    assert kept["tables"][0]["rows"] == [["none", "2.418 ± 0.031"]]
    assert asked == [("Digits, unconditional", effects_hunt.Sizes(), None)]
    done = CliRunner().invoke(app, ["bench", "effects", "--only", "hunt", "--device", "cpu", "--full", "--journal", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "2.418 ± 0.031" in done.output
    assert asked[1][1:] == (effects_hunt.FULL, tmp_path)
    assert "standard error" in kept["notes"][0]
    with pytest.raises(DataError, match="unknown part"):
        effects.run(["hunts"])
