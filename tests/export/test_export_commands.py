"""`headscope export`, `headscope import` and `headscope formats`: what they write, print and refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headscope.export import FORMATS
from headscope.plans import Dense, SparsePlan, Streaming
from headscope.profile import HeadProfile

from .plan_cases import GROUPED, WHOLE
from .test_export_round_trips import scored

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def headscope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `headscope ARGS` in this process: (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        from headscope.cli.main import main

        monkeypatch.setattr(sys, "argv", ["headscope", *map(str, args)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return int(str(code)), printed.out, printed.err

    return run


def test_a_plan_goes_out_and_comes_back(headscope: Run, tmp_path: Path) -> None:
    plan = SparsePlan.uniform(GROUPED, Streaming(4, 17)).replace({(1, 0): Dense(), (1, 1): Dense()})
    plan.save(tmp_path / "plan.json")
    code, out, err = headscope("export", tmp_path / "plan.json", "--format", "duo-attention", "--out", tmp_path / "duo")
    assert code == 0
    assert "Every head is written as asked for." in out
    assert "load_attn_pattern" in out
    assert f"wrote {tmp_path / 'duo' / 'full_attention_heads.tsv'}" in err.replace("\n", "")
    code, out, err = headscope(
        "import", tmp_path / "duo", "--format", "duo-attention", "--out", tmp_path / "run", "--plan", tmp_path / "back.json", "--json"
    )
    assert code == 0
    assert json.loads(out)["plan"] == {"streaming": 10, "dense": 2}
    assert SparsePlan.load(tmp_path / "back.json").patterns == plan.patterns
    assert HeadProfile.load(tmp_path / "run").matrix("duo_gate").tolist() == [[0.0] * 4, [1.0, 1.0, 0.0, 0.0], [0.0] * 4]
    code, out, err = headscope("show", tmp_path / "run", "--metric", "kept_share", "--top", 2, "--json")
    assert [row["head"] for row in json.loads(out)["top"]] == [0, 1]
    code, out, err = headscope("compare", tmp_path / "run", tmp_path / "run", "--json")
    assert code == 0
    code, out, err = headscope("export", tmp_path / "run", "--format", "kvpress", "--out", tmp_path / "press", "--json")
    report = json.loads(out)
    assert (code, report["changed"], report["numbers"]["sparsity"]) == (0, 0, 10 / 12)
    assert report["out"] == str(tmp_path / "press")


def test_refusals_are_one_line_and_exit_code_1(headscope: Run, tmp_path: Path) -> None:
    plan = SparsePlan.uniform(GROUPED, Streaming(4, 17)).replace({(1, 0): Dense()})
    plan.save(tmp_path / "plan.json")
    export = ("export", tmp_path / "plan.json", "--format", "duo-attention", "--out", tmp_path / "duo")
    code, out, err = headscope(*export)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "--lossy" in err
    assert not (tmp_path / "duo").exists()
    code, out, err = headscope(*export, "--lossy", "--json")
    assert (code, json.loads(out)["changed"]) == (0, 1)
    code, out, err = headscope(*export, "--lossy", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (1, "ExportError")
    assert "--force" in err
    assert headscope(*export, "--lossy", "--force")[0] == 0
    assert "unknown format" in headscope("export", tmp_path / "plan.json", "--format", "what", "--out", tmp_path / "x")[2]
    code, out, err = headscope("export", tmp_path / "plan.json", "--format", "cudnn", "--out", tmp_path / "x")
    assert code == 1
    assert "--length" in err
    assert headscope("export", tmp_path / "plan.json", "--format", "cudnn", "--out", tmp_path / "x", "--length", 64)[0] == 0


def test_scores_of_a_run(headscope: Run, tmp_path: Path) -> None:
    values = {place: number / 11 for number, place in enumerate(GROUPED.places)}
    scored({"retrieval": values}).save(tmp_path / "run")
    code, _, _ = headscope("export", tmp_path / "run", "--format", "retrieval-head", "--out", tmp_path / "out")
    assert code == 0
    found = json.loads((tmp_path / "out" / "head_score.json").read_text())
    assert found == {f"{layer}-{head}": [value] for (layer, head), value in values.items()}
    code, _, err = headscope(
        "import", tmp_path / "out", "--format", "retrieval-head", "--out", tmp_path / "back", "--plan", tmp_path / "p.json"
    )
    assert code == 1
    assert "scores and no plan" in err
    assert not (tmp_path / "back").exists()
    assert headscope("import", tmp_path / "out", "--format", "retrieval-head", "--out", tmp_path / "back")[0] == 0
    assert "it exists already" in headscope("import", tmp_path / "out", "--format", "retrieval-head", "--out", tmp_path / "back")[2]
    assert headscope("import", tmp_path / "out", "--format", "retrieval-head", "--out", tmp_path / "back", "--overwrite")[0] == 0


def test_like_names_a_run_or_a_plan(headscope: Run, tmp_path: Path) -> None:
    SparsePlan.uniform(WHOLE, Streaming(32, 33)).export("openvino-genai", tmp_path / "ov")
    (tmp_path / "ov" / "headscope.json").unlink()
    code, out, err = headscope("import", tmp_path / "ov", "--format", "openvino-genai", "--out", tmp_path / "run")
    assert code == 1
    assert "--like" in err
    SparsePlan.uniform(WHOLE, Dense()).save(tmp_path / "shape.json")
    code, out, err = headscope(
        "import", tmp_path / "ov", "--format", "openvino-genai", "--out", tmp_path / "run", "--like", tmp_path / "shape.json"
    )
    assert code == 0
    code, out, err = headscope(
        "import", tmp_path / "ov", "--format", "openvino-genai", "--out", tmp_path / "again", "--like", tmp_path / "run", "--json"
    )
    assert json.loads(out)["plan"] == {"streaming": 6}


def test_formats_lists_all_and_pages_say_what_they_lack(headscope: Run) -> None:
    code, out, _ = headscope("formats", "--json")
    rows = json.loads(out)["formats"]
    assert [row["name"] for row in rows] == list(FORMATS)
    assert all(row["holds"] and row["lacks"] and row["page"] and row["reader"] and row["engine"] for row in rows)
    code, out, _ = headscope("formats")
    assert all(name[:8] in out for name in FORMATS)
    for name, form in FORMATS.items():
        code, out, _ = headscope("formats", name)
        assert code == 0
        assert form.main in out
        assert all(line.split(",")[0] in out for line in (*form.holds, *form.lacks))
    assert headscope("formats", "nothing")[0] == 1
