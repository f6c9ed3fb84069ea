"""`headscope intervene`: what it prints, what it refuses, exit codes; on a model bundled with the package."""

from __future__ import annotations

import json

import pytest
import torch

import headscope as hs
from headscope.cli import main
from headscope.interventions import Add, HeadMask, KeyBias, Redistribute, Stack

MODEL = "bundled:induction"


@pytest.fixture(scope="module")
def scope():
    return hs.load(MODEL)


def run(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr)"""
    monkeypatch.setattr("sys.argv", ["headscope", "intervene", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out = capsys.readouterr()
    return ended.value.code or 0, out.out, out.err


def prompt_of(scope):
    return scope.text_tokenizer.decode(torch.arange(5, 21).repeat(2))


def test_json_of_a_stack(monkeypatch, capsys, tmp_path, scope):
    layer = scope.topology.layers[-1]
    stack = Stack((HeadMask("all", layers=(layer, layer + 1)), Redistribute([(0, 0)], "first", 0.4)))
    spec, prompt = stack.save(tmp_path / "spec.json"), prompt_of(scope)
    code, out, err = run(monkeypatch, capsys, MODEL, "--spec", spec, "--prompt", prompt, "--max-new-tokens", 6, "--json")
    assert code == 0, err
    found = json.loads(out)
    with scope.intervene(*stack):
        want = scope.generate(prompt, max_new_tokens=6)
    assert found["text"] == want.text
    assert found["baseline"] == scope.generate(prompt, max_new_tokens=6).text
    assert found["prompt"]["tokens"] == want.prompt_length
    assert found["explanation"] == stack.explain().splitlines()
    assert found["specification"] == json.loads(stack.to_json())


def test_words_and_one_intervention(monkeypatch, capsys, tmp_path, scope):
    spec = tmp_path / "spec.json"
    spec.write_text(KeyBias([(0, 0)], "first", 2.0).to_json())
    code, out, err = run(monkeypatch, capsys, MODEL, "--spec", spec, "--prompt", prompt_of(scope), "--max-new-tokens", 2)
    assert code == 0
    assert "1. add 2 to the scores of the keys of the first token, head 0.0" in " ".join(err.split())
    assert "without:" in out
    assert "with:" in out
    code, out, _ = run(monkeypatch, capsys, MODEL, "--spec", spec, "--prompt", prompt_of(scope), "--max-new-tokens", 2, "--no-baseline")
    assert code == 0
    assert "without:" not in out


def test_tensors_lie_beside_the_specification(monkeypatch, capsys, tmp_path, scope):
    width = scope.topology[0].head_dim
    spec = Stack((Add([(0, 0)], torch.ones(1, width)),)).save(tmp_path / "spec.json")
    assert (tmp_path / "spec.safetensors").is_file()
    code, out, _ = run(monkeypatch, capsys, MODEL, "--spec", spec, "--prompt", prompt_of(scope), "--max-new-tokens", 2, "--json")
    assert code == 0
    assert json.loads(out)["specification"] == {"file": str(spec)}


def test_heads_by_role_from_a_run(monkeypatch, capsys, tmp_path, scope):
    profile = scope.profile(probes=["sink"], context=32, data=torch.arange(5, 37).repeat(1, 1))
    profile.save(tmp_path / "run")
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"intervention": "head_mask", "heads": "top 2 sink"}))
    where = (MODEL, "--spec", spec, "--prompt", prompt_of(scope), "--max-new-tokens", 2, "--json")
    code, out, err = run(monkeypatch, capsys, *where)
    assert code == 1
    assert "--run" in json.loads(out)["error"]["message"]
    code, out, err = run(monkeypatch, capsys, *where, "--run", tmp_path / "run")
    assert code == 0, err
    heads = json.loads(out)["specification"]["interventions"][0]["heads"]
    assert [tuple(pair) for pair in heads] == hs.HeadProfile.load(tmp_path / "run").rank("sink", 2)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"intervention": "head_mask", "version": 9, "heads": "0.0"}, "newer headscope"),
        ({"intervention": "head_musk", "heads": "0.0"}, "did you mean head_mask"),
        ({"intervention": "head_mask", "heads": "0.99"}, "head 0.99"),
        ([{"intervention": "mix", "heads": "0.0"}, {"intervention": "redistribute", "heads": "0.0", "keys": [0], "keep": 0.4}], "order=1"),
        ({"intervention": "key_bias", "heads": "0.0", "keys": "pictures", "bias": 1.0}, "no set of keys"),
        ({"intervention": "head_mask", "heads": "0.0", "positions": "image"}, "no image tokens"),
        ("{", "no JSON"),
    ],
)
def test_bad_specifications_cost_one_line(monkeypatch, capsys, tmp_path, spec, words):
    path = tmp_path / "spec.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    code, out, err = run(monkeypatch, capsys, MODEL, "--spec", path, "--prompt", "a b", "--json")
    assert code == 1
    assert words in json.loads(out)["error"]["message"]
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_a_specification_that_is_not_there(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, MODEL, "--spec", tmp_path / "none.json", "--prompt", "a")
    assert code == 1
    assert "cannot be read" in err
