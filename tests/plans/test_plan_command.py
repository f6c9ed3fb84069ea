"""`headscope plan`: what it prints and writes, its list, and one clear line for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope.errors import PlanError
from headscope.plans import Dense, SparsePlan, Streaming
from headscope.plans.planners import PLANNERS

from .made_profiles import made


@pytest.fixture
def headscope(monkeypatch, capsys):
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
        return int(code), printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    """A run of two layers of four heads with gates and maps, 256 tokens."""
    generator = np.random.default_rng(0)
    raw = np.tril(generator.random((2, 4, 16, 16)))
    maps = (raw / raw.sum(-1, keepdims=True) * 16).astype(np.float32)
    path = tmp_path_factory.mktemp("runs") / "made"
    made({"duo_gate": [[0.9, 0.1], [0.4, 0.8]]}, maps=maps, tokens=256, block=16).save(path)
    return path


def test_it_writes_a_plan_and_says_what_it_costs(headscope, run_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, printed, _ = headscope(
        "plan", run_directory, "--method", "duo", "--density", "0.6", "-o", "sink=4", "-o", "recent=32", "--out", out
    )
    assert code == 0
    plan = SparsePlan.load(out)
    assert plan.method == "duo"
    assert plan.parameters["length"] == 256
    assert plan.density(256) <= 0.6
    assert set(plan.patterns.values()) == {Dense(), Streaming(4, 32)}
    for word in ("density at 256 tokens", "attention mass kept", "FLOPs", "KV cache", "streaming heads"):
        assert word in printed


def test_json_says_everything(headscope, run_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, printed, _ = headscope("plan", run_directory, "--method", "duo", "-o", "sparsity=0.5", "--out", out, "--length", 4096, "--json")
    assert code == 0
    told = json.loads(printed)
    plan = SparsePlan.load(out)
    assert told["length"] == 4096
    assert told["density"] == pytest.approx(plan.density(4096))
    assert told["flops_share"] == pytest.approx(plan.density(4096))
    assert told["kv_bytes"] == plan.kv_bytes(4096)
    assert told["heads"] == plan.counts()
    assert told["kept_mass"]["basis"] == "extrapolated"
    assert np.shape(told["kept_mass"]["by_head"]) == (2, 4)
    direct = hs.plan(hs.HeadProfile.load(run_directory), "duo", sparsity=0.5, length=4096)
    assert direct.patterns == plan.patterns
    assert hs.HeadProfile.load(run_directory).plan("duo", sparsity=0.5, length=4096).to_json() == direct.to_json()


def test_the_list_has_every_planner(headscope) -> None:
    code, printed, _ = headscope("plan", "--list", "--json")
    assert code == 0
    told = json.loads(printed)["planners"]
    assert [one["name"] for one in told] == list(PLANNERS)
    assert {one["name"]: one["requires"]["metrics"] for one in told}["duo"] == [["duo_gate"], ["duo_change_group"]]
    code, printed, _ = headscope("plan", "--list")
    assert code == 0
    assert "duo_gate" in printed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--out", "OUT"], "pass --method M"),
        (["--method", "duo"], "--out plan.json"),
        (["--method", "best", "--out", "OUT"], "unknown planner 'best'"),
        (["--method", "duo", "--density", "2", "--out", "OUT"], "density=2.0"),
        (["--method", "duo", "-o", "sink", "--out", "OUT"], "no name=value"),
        (["--method", "duo", "-o", "sink=1", "-o", "sink=2", "--out", "OUT"], "pass it once"),
        (["--method", "duo", "-o", "size=1", "--out", "OUT"], "unknown option of planner 'duo' 'size'"),
        (["--method", "razor", "--out", "OUT"], "--probes razor"),
        (["--method", "s2", "-o", "density=0.3", "--density", "0.4", "--out", "OUT"], "--density 0.4 beside --option density=0.3"),
        (["--method", "s2", "-o", "length=512", "--length", "1024", "--out", "OUT"], "--length 1024 beside --option length=512"),
        (["--method", "s2", "-o", "stride=99999999999999999999999", "--out", "OUT"], "2,147,483,647 at most"),
    ],
)
def test_one_line_for_each_mistake(headscope, run_directory: Path, tmp_path: Path, given: list[str], words: str) -> None:
    out = tmp_path / "plan.json"
    code, _, err = headscope("plan", run_directory, *(str(out) if one == "OUT" else one for one in given))
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("headscope: ")]
    assert words in line
    assert not out.exists()


def test_a_plan_is_not_written_over(headscope, run_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("mine")
    code, _, err = headscope("plan", run_directory, "--method", "duo", "--out", out)
    assert code == 1
    assert "exists" in err
    assert out.read_text() == "mine"
    assert headscope("plan", run_directory, "--method", "duo", "--out", out, "--overwrite")[0] == 0
    assert SparsePlan.load(out).method == "duo"
    assert headscope("plan", "--method", "duo", "--out", tmp_path / "other.json")[0] == 1
    with pytest.raises(PlanError, match="unknown planner"):
        hs.plan(hs.HeadProfile.load(run_directory), "dou")
