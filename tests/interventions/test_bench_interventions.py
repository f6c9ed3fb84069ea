"""The benchmark of interventions: every way does something on the model it builds, refusals without a device, and on one its tables."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from headscope.bench import interventions_gpu as bench
from headscope.errors import RunError, UnavailableError
from headscope.scope import Scope


def test_every_way_changes_the_logits_and_leaves_the_model_as_it_was():
    """At a width that a CPU can run; on a device the benchmark itself refuses a way that changes nothing."""
    model = bench.model(640, 2, "cpu", 512).float()
    inputs = bench.prompt(640, "cpu")
    inputs["pixel_values"] = inputs["pixel_values"].float()
    scope = Scope(model)

    def last():
        with torch.no_grad():
            return model(**inputs, use_cache=False, logits_to_keep=1).logits

    plain, edits = last(), bench.methods(scope, inputs)
    assert int((inputs["input_ids"] == bench.IMAGE_TOKEN).sum()) == bench.PICTURE
    assert {type(edit).__name__ for edit in edits.values()} == {"ACT", "VAR", "VHR", "HeadMask", "SoftPAG"}
    for name, edit in edits.items():
        with scope.intervene(edit):
            assert float((last() - plain).abs().max()) > 1e-3, name
        assert torch.equal(last(), plain), name


def test_without_a_device_it_is_refused(monkeypatch, capsys):
    from headscope.cli.main import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="no CUDA device"):
        bench.run()
    monkeypatch.setattr(sys, "argv", ["headscope", "bench", "interventions", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "there is no CUDA device" in json.loads(printed.out)["error"]["message"]


@pytest.mark.gpu
def test_its_tables():
    result = bench.run(2048, 2, 1, (2048, 4096))
    targets, forwards, memory = (block["rows"] for block in result["tables"])
    assert forwards[0]["forward"] == bench.PLAIN
    assert forwards[-1]["forward"] == bench.EAGER
    assert len(targets) == len(memory) == len(forwards) - 2
    assert all(one["ms"] > 0 and one["gib"] > 0 for one in forwards)
    for block in result["tables"]:
        assert all(set(block["columns"]) <= set(row) for row in block["rows"])
    with pytest.raises(RunError, match="picture alone"):
        bench.run(tokens=600)
