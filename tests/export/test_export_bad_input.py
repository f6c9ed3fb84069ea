"""What a tired or hostile user gives: refused in one line that says what, why and what to do, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headscope.errors import ExportError, HeadscopeError
from headscope.export import FORMATS, files, find, read, write
from headscope.plans import Blocks, Budget, Dense, Lines, PlanModel, Power, SparsePlan, Streaming, TopBlocks, TopKeys, VerticalSlash

from .plan_cases import GROUPED, LENGTH, WHOLE
from .test_export_round_trips import scored

PLANS = [name for name, form in FORMATS.items() if form.plans]
STREAMING = SparsePlan.uniform(WHOLE, Streaming(64, 64))
RAGGED = PlanModel("ragged", (0, 1), (4, 2), (2, 2), (8, 8))
HOLES = PlanModel("holes", (0, 2), (4, 4), (2, 2), (8, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["duo-attention", "kvpress", "retrieval-head"])
def test_scores_that_are_no_numbers(name: str, value: float, tmp_path: Path) -> None:
    metric = find(name).metrics[0]
    profile = scored({metric: dict.fromkeys(GROUPED.places, 0.5) | {(1, 2): value}})
    for lossy in (False, True):
        with pytest.raises(ExportError, match=r"of head 1\.2 = (nan|inf): a head without a score cannot be ranked"):
            profile.export(name, tmp_path / "out", lossy=lossy)
    assert list(tmp_path.iterdir()) == []


LACKS: list[tuple[str, Any]] = [
    ("duo-attention", VerticalSlash(40, 200)),
    ("duo-attention", Streaming(4, 9, compensate=True)),
    ("kvpress", Lines((0,), (0,))),
    ("minference", Dense()),
    ("minference", Power(9)),
    ("minference", VerticalSlash(40, 200, last_q=32)),
    ("vllm-dual-chunk", Streaming(4, 9)),
    ("vllm-dual-chunk", Dense()),
    ("sglang-dual-chunk", Streaming(4, 9)),
    ("rtp-llm", Budget(64)),
    ("moa", Streaming(4, 9)),
    ("moa", VerticalSlash(40, 200)),
    ("transformers", Streaming(4, 9)),
    ("transformers", TopKeys(8)),
    ("flex-attention", VerticalSlash(40, 200)),
    ("block-sparse-attention", Streaming(4, 9)),
    ("block-sparse-attention", TopBlocks(share=0.5)),
    ("xattention", Streaming(4, 9)),
    ("modelopt", Streaming(4, 9)),
    ("tensorrt-llm", Streaming(4, 9)),
    ("openvino-genai", Streaming(4, 9)),
    ("openvino-genai", Lines((0,), (0,))),
    ("cudnn", Budget(64)),
]


@pytest.mark.parametrize(("name", "pattern"), LACKS, ids=lambda one: one if isinstance(one, str) else type(one).__name__)
def test_patterns_that_a_target_lacks_are_refused_unless_lossy(name: str, pattern: Any, tmp_path: Path) -> None:
    """The refusal names the head, what it would become and the way out; with lossy the report marks every head."""
    plan = SparsePlan.uniform(WHOLE, pattern)
    with pytest.raises(ExportError, match=r"head 0\.0 with .* it would become .*--lossy") as caught:
        plan.export(name, tmp_path / "out", length=LENGTH)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    report = plan.export(name, tmp_path / "out", length=LENGTH, lossy=True)
    assert len(report.changed) == 6
    assert all(one.why for one in report.changed)


def test_every_format_of_plans_is_refused_something() -> None:
    assert {name for name, _ in LACKS} == set(PLANS) - {"headscope"}


@pytest.mark.parametrize("name", [*PLANS, "retrieval-head"])
def test_models_that_a_table_cannot_hold(name: str, tmp_path: Path) -> None:
    """Layers with other numbers of heads, or without attention between them: refused where they would shift, exact where they are named."""
    tables = {"duo-attention", "kvpress", "minference", "vllm-dual-chunk", "sglang-dual-chunk", "moa", "xattention", "retrieval-head"}
    for model, named in ((RAGGED, {"block-sparse-attention", "rtp-llm"}), (HOLES, {"transformers"})):
        source: Any = SparsePlan.uniform(model, Dense())
        if name == "retrieval-head":
            source = scored({"retrieval": dict.fromkeys(model.places, 0.5)}, model)
        out = tmp_path / model.name
        fine = name not in tables | named and not (name in ("duo-attention", "kvpress") and model is RAGGED)
        if name in ("duo-attention", "kvpress") and model is RAGGED:  # as many key heads in every layer
            source.export(name, out, lossy=True, length=LENGTH)
            found = read(out, name).plan_found
            assert found is not None
            assert found.model == model
            continue
        if fine:
            source.export(name, out, lossy=True, length=LENGTH)
            found = find(name).read(out).plan_found
            assert found is not None
            assert found.patterns.keys() == dict.fromkeys(model.places).keys()
        else:
            with pytest.raises(ExportError, match=r"as many in every layer|in which they would become"):
                source.export(name, out, lossy=True, length=LENGTH)
            assert not out.exists()


def test_paths_that_exist(tmp_path: Path) -> None:
    out = tmp_path / "out"
    STREAMING.export("moa", out)
    first = (out / "moa_alpha_beta.json").read_bytes()
    with pytest.raises(ExportError, match=r"it exists already.*--force"):
        STREAMING.export("moa", out)
    other = SparsePlan.uniform(WHOLE, Dense())
    other.export("moa", out, force=True)
    assert (out / "moa_alpha_beta.json").read_bytes() != first
    other.export("duo-attention", out, force=True)
    assert not (out / "moa_alpha_beta.json").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="no export"):
        other.export("moa", mine, force=True)
    assert (mine / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ExportError):
            other.export("moa", place, force=True)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ExportError, match="no directory"):
        other.export("moa", tmp_path / "link", force=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    other.export("moa", empty, force=True)


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="it cannot be written"):
        STREAMING.export("moa", "/proc/nowhere/out")
    with pytest.raises(ExportError):
        STREAMING.export("moa", tmp_path / "a\0b")
    with pytest.raises(ExportError):
        STREAMING.export("moa", tmp_path / ("x" * 300))
    out = tmp_path / "out"
    STREAMING.export("moa", out)
    before = {one.name: one.read_bytes() for one in out.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="No space left on device"):
        SparsePlan.uniform(WHOLE, Dense()).export("moa", out, force=True)
    assert {one.name: one.read_bytes() for one in out.iterdir()} == before
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_the_old_export_is_put_back_when_the_new_one_cannot_move_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    STREAMING.export("moa", out)
    before = (out / "moa_alpha_beta.json").read_bytes()
    rename, calls = os.rename, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ExportError, match="Input/output error"):
        SparsePlan.uniform(WHOLE, Dense()).export("moa", out, force=True)
    assert (out / "moa_alpha_beta.json").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_wrong_names_lengths_and_sources(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"unknown format .duo-atention.: did you mean duo-attention"):
        write(STREAMING, "duo-atention", tmp_path / "out")
    assert find("Duo_Attention") is FORMATS["duo-attention"]
    for length in (0, -5, 2.5, True):
        with pytest.raises(ExportError, match="counts tokens"):
            STREAMING.export("moa", tmp_path / "out", length=length)
    with pytest.raises(ExportError, match="holds scores only"):
        STREAMING.export("retrieval-head", tmp_path / "out")
    profile = scored({"entropy": dict.fromkeys(GROUPED.places, 0.5)})
    with pytest.raises(ExportError, match="none of the metrics duo_gate"):
        profile.export("duo-attention", tmp_path / "out")
    with pytest.raises(ExportError, match="headscope plan RUN"):
        profile.export("minference", tmp_path / "out")
    with pytest.raises(ExportError, match="a plan has no scores"):
        STREAMING.export("duo-attention", tmp_path / "out", metric="entropy")
    report = profile.export("duo-attention", tmp_path / "out", metric="entropy")
    assert report.facts["metric"] == "entropy"


# ---- imports --------------------------------------------------------------------------------------------------------


def put(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / find(name).main
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


BAD: list[tuple[str, str]] = [
    ("duo-attention", "0.1\t0.2\n0.3\n"),
    ("duo-attention", "0.1\tnan\n0.3\t0.4\n"),
    ("duo-attention", "0.1\tmany\n"),
    ("duo-attention", ""),
    ("kvpress", "GATES = [[1.0], [0.0, 1.0]]\nSINK_SIZE = 4\nRECENT_SIZE = 8\n"),
    ("kvpress", "GATES = [[__import__('os').system('true')]]\nSINK_SIZE = 4\nRECENT_SIZE = 8\n"),
    ("kvpress", "def ("),
    ("minference", "[]"),
    ("minference", '[{"0": ["vertical_and_slash", 1, 2, NaN]}]'),
    ("minference", '[{"0": ["vertical_and_slash", 1, 2, 1], "0": ["vertical_and_slash", 1, 2, 1]}]'),
    ("minference", '[{"0": ["dense", 1, 2, 1]}]'),
    ("minference", '[{"0": ["vertical_and_slash", -1, 2, 1]}]'),
    ("minference", '[{"x": ["vertical_and_slash", 1, 2, 1]}]'),
    ("vllm-dual-chunk", '[{"0": ["stream_llm", 1, 2, 1]}]'),
    ("vllm-dual-chunk", '[{"0": ["vertical_and_slash", 1, 2, 1]}, {}]'),
    ("sglang-dual-chunk", '{"0": []}'),
    ("rtp-llm", '{"headwise_config": {"0": [1, 2]}}'),
    ("rtp-llm", '{"headwise_config": {"0": [1, 0], "1": [1]}}'),
    ("rtp-llm", '{"headwise_config": {"0": [1, 0], "sink_token_num": -1}}'),
    ("rtp-llm", "{}"),
    ("retrieval-head", '{"0-0": []}'),
    ("retrieval-head", '{"00": [1]}'),
    ("retrieval-head", '{"0-0": [1], "0-1": [Infinity]}'),
    ("retrieval-head", ""),
    ("moa", '{"alphas": [[1, 2], [3]], "betas": [[0, 0], [0]]}'),
    ("moa", '{"alphas": [[1]], "betas": [[2]]}'),
    ("moa", '{"alphas": [[1]]}'),
    ("transformers", '{"layer_types": ["chunked_attention"]}'),
    ("transformers", '{"layer_types": ["sliding_attention"]}'),
    ("transformers", "[1"),
    ("flex-attention", "no tensors"),
    ("block-sparse-attention", ""),
    ("xattention", "t = [[0.5, 2.0]]\n"),
    ("xattention", "t = [[0.5], [0.5, 0.1]]\n"),
    ("xattention", "stride = 8\n"),
    ("modelopt", '{"sparse_attention_config": {"config_groups": {"a": {"algorithm": "sparse_softmax"}}}}'),
    ("modelopt", '{"num_hidden_layers": 2}'),
    ("tensorrt-llm", "sparse_attention_config:\n  algorithm: dsa\n"),
    ("tensorrt-llm", "- a\n- b\n"),
    ("openvino-genai", '{"mode": "OTHER"}'),
    ("openvino-genai", '{"mode": "TRISHAPE", "num_retained_start_tokens_in_cache": 1.5}'),
    ("cudnn", "x" * 100),
    ("headscope", "{}"),
    ("headscope", '{"schema": "headscope-profile", "schema_version": 99}'),
    ("headscope", '{"schema": "headscope-plan", "schema_version": 1}'),
]


@pytest.mark.parametrize(("name", "text"), BAD)
def test_damaged_files(name: str, text: str, tmp_path: Path) -> None:
    path = put(tmp_path, name, text)
    (tmp_path / "config.json").write_text('{"sink_size": 4, "recent_size": 8}')
    with pytest.raises(ExportError) as caught:
        read(path, name, like=GROUPED)
    assert "\n" not in str(caught.value)


def test_every_format_meets_damage() -> None:
    assert {name for name, _ in BAD} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_or_flipped_files_are_read_right_or_refused(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Whatever happens to a file's bytes, the reader gives a profile or one of headscope's errors, never another."""
    form = find(name)
    good = tmp_path / "good"
    if not good.exists():
        source: Any = (
            SparsePlan.uniform(WHOLE, Streaming(64, 65)) if form.plans else scored({"retrieval": dict.fromkeys(GROUPED.places, 0.5)})
        )
        source.export(name, good, lossy=True, length=LENGTH)
    raw = bytearray((good / form.main).read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    bad = tmp_path / "bad"
    bad.mkdir(exist_ok=True)
    for one in good.iterdir():
        (bad / one.name).write_bytes(one.read_bytes())
    (bad / form.main).write_bytes(bytes(raw))
    try:
        form.read(bad)
    except HeadscopeError:
        return


def test_missing_huge_and_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FORMATS:
        with pytest.raises(ExportError, match="no such file"):
            read(tmp_path / "nothing", name, like=GROUPED)
    with pytest.raises(ExportError):
        read("a\0b", "moa")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(files.LIMIT + 1)
    with pytest.raises(ExportError, match=r"256 MiB"):
        read(big, "moa")
    with pytest.raises(ExportError, match=r"directory|no such file"):
        read(tmp_path, "moa")
    (tmp_path / "latin.json").write_bytes('{"alphas": "é"}'.encode("latin-1"))
    with pytest.raises(ExportError, match="UTF-8"):
        read(tmp_path / "latin.json", "moa")
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(ExportError):
        read(deep, "minference")


def test_a_file_for_another_model(tmp_path: Path) -> None:
    STREAMING.export("moa", tmp_path / "out", force=True)
    with pytest.raises(ExportError, match=r"a file of 2 layers with 3 heads: tiny has 3 layers with 4"):
        read(tmp_path / "out", "moa", like=GROUPED)
    gates = scored({"duo_gate": dict.fromkeys(GROUPED.places, 0.5)})
    gates.export("duo-attention", tmp_path / "gates")
    with pytest.raises(ExportError, match="key heads"):
        read(tmp_path / "gates", "duo-attention", like=WHOLE)
    wide = PlanModel("wide", (0, 1, 2), (8, 8, 8), (2, 2, 2), (8, 8, 8))
    found = read(tmp_path / "gates", "duo-attention", like=wide)
    assert found.matrix("duo_gate").shape == (3, 8)


def test_a_damaged_report_beside_the_file(tmp_path: Path) -> None:
    STREAMING.export("moa", tmp_path / "out")
    beside = tmp_path / "out" / "headscope.json"
    beside.write_text(json.dumps({**json.loads(beside.read_text()), "model": {"layers": [0]}}))
    with pytest.raises(ExportError, match="model in it is damaged"):
        read(tmp_path / "out", "moa")
    beside.unlink()
    assert read(tmp_path / "out", "moa").plan_found is not None


def test_tables_of_tensors_that_contradict_each_other(tmp_path: Path) -> None:
    from headscope.export.tensors import load_tensors, save_tensors

    plan = SparsePlan.uniform(WHOLE, Blocks(((0,), (1,)), 128))
    changes: dict[str, list[dict[str, np.ndarray]]] = {
        "cudnn": [
            {"functions": np.full((1, 3, 9), 99, np.int32)},
            {"layer.0": np.array([7, 0, 0], np.int32)},
            {"functions": np.zeros((1, 2, 9), np.int32)},
        ],
        "flex-attention": [{"length": np.array([9])}, {"layer.1.kind": np.array([5, 0, 0], np.int32)}, {"side": np.array([0.5])}],
        "block-sparse-attention": [
            {"head_mask_type": np.array([[3, 0, 0], [0, 0, 0]], np.int32)},
            {"streaming_info": np.zeros((2, 5), np.int32)},
        ],
    }
    for name, several in changes.items():
        plan.export(name, tmp_path / name, length=LENGTH, lossy=True)
        path = tmp_path / name / find(name).main
        whole = load_tensors(path)
        for change in several:
            path.write_bytes(save_tensors({**whole, **change}))
            with pytest.raises(ExportError):
                read(tmp_path / name, name)
