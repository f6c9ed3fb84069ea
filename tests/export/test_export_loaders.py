"""Exports opened by the engines' own loaders that run on a CPU, and models that headscope executes under a plan and under its export."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headscope.errors import ExportError
from headscope.export import FORMATS, read
from headscope.export.flex_attention import block_lists
from headscope.export.masks import tables
from headscope.plans import Blocks, Budget, Dense, Lines, Pattern, Power, Span, SparsePlan, Streaming, Strided, TopBlocks, VerticalSlash
from headscope.scope import Scope

from .plan_cases import GROUPED, LENGTH, STATIC, mask

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def scope() -> Scope:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    model.set_attn_implementation("sdpa")
    return Scope(model, name="tiny")


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (1, count), generator=torch.Generator().manual_seed(seed))


def layered(scope: Scope, patterns: tuple[Pattern, ...]) -> SparsePlan:
    model = SparsePlan.uniform(scope, Dense()).model
    return SparsePlan(model, {(layer, head): patterns[layer] for layer, head in model.places})


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_transformers_runs_the_layers_as_planned(kind: str, tmp_path: Path) -> None:
    """from_pretrained with the overrides computes what headscope computes under the plan, to rounding, and generates the same tokens."""
    torch.manual_seed(0)
    model: Qwen3ForCausalLM | GptOssForCausalLM
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**TINY)).eval()
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        facts = {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 3, "rope_parameters": rope}
        model = GptOssForCausalLM(GptOssConfig(**TINY, **facts)).eval()
    model.save_pretrained(tmp_path / "model")
    dense = Scope(model, name="tiny")
    plan = layered(dense, (Streaming(0, 12), Dense(), Streaming(0, 12)))
    report = plan.export("transformers", tmp_path / "out")
    assert "from_pretrained" in report.load
    overrides = json.loads((tmp_path / "out" / "config_overrides.json").read_text())
    config = AutoConfig.from_pretrained(tmp_path / "model", **overrides)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config).eval()
    assert loaded.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    tokens = ids(60)
    with torch.no_grad():
        theirs = loaded(tokens).logits
        before = model(tokens).logits
        with dense.execute(plan):
            ours = model(tokens).logits
    assert torch.allclose(ours, theirs, atol=2e-4)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_transformers_windows_per_layer_are_read_by_the_config(tmp_path: Path) -> None:
    plan = SparsePlan(GROUPED, {(layer, head): (Streaming(0, 12), Dense(), Streaming(0, 30))[layer] for layer, head in GROUPED.places})
    plan.export("transformers", tmp_path / "out")
    overrides = json.loads((tmp_path / "out" / "config_overrides.json").read_text())
    assert overrides["per_layer_config"] == {"00": {"sliding_window": 12}}
    Qwen3Config(**TINY).save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", **overrides)
    assert [config.per_layer_config[layer].sliding_window for layer in range(3)] == [12, 30, 30]
    found = read(tmp_path / "out", "transformers").plan_found
    assert found is not None
    assert found.patterns == plan.patterns
    config.save_pretrained(tmp_path / "whole")
    whole = read(tmp_path / "whole" / "config.json", "transformers").plan_found
    assert whole is not None
    assert (whole.model.heads, whole.model.kv_heads) == ((4, 4, 4), (2, 2, 2))
    assert whole.patterns == plan.patterns


def test_transformers_refuses_sinks_and_heads_that_differ(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a sliding layer has no sinks"):
        SparsePlan.uniform(GROUPED, Streaming(4, 12)).export("transformers", tmp_path / "out")
    with pytest.raises(ExportError, match="all heads of a layer are alike"):
        SparsePlan.uniform(GROUPED, Streaming(0, 12)).replace({(1, 2): Dense()}).export("transformers", tmp_path / "out")


# ---- FlexAttention --------------------------------------------------------------------------------------------------


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("flex_masks_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


FLEX = (
    (Dense(), Streaming(4, 40), Streaming(0, 1), Streaming(130, 5)),
    (Strided(8, 3, 1, 32, 2), Power(9, 16, 3), Lines((0, 7, 200), (0, 1, 128)), Blocks(((0,), (0,), (1,)), 128)),
    (Streaming(4, 40), Dense(), Dense(), Lines((), (0,))),
)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_plan(tmp_path: Path) -> None:
    """Uncompiled on the CPU, with the exported module's BlockMasks, against attention under the patterns' own masks."""
    plan = SparsePlan(GROUPED, {(layer, head): FLEX[layer][head] for layer, head in GROUPED.places})
    plan.export("flex-attention", tmp_path / "out", length=LENGTH)
    masks = module_of(tmp_path / "out" / "flex_masks.py").load(str(tmp_path / "out" / "block_masks.safetensors"))
    q = torch.randn(1, 4, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, 1, 2, LENGTH, 16, generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        seen = torch.stack([mask(plan[layer, head], LENGTH) for head in range(4)])
        weights = (q.double() @ k.double().repeat_interleave(2, 1).mT / 4).masked_fill(~seen, -torch.inf).softmax(-1)
        wanted = weights @ v.double().repeat_interleave(2, 1)
        found = flex_attention(q, k, v, block_mask=masks[layer], enable_gqa=True)
        assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_flex_blocks_are_full_partial_or_left_out(tmp_path: Path) -> None:
    """The block lists themselves, which compiled kernels go by and uncompiled ones ignore, against the masks."""
    plan = SparsePlan(GROUPED, {(layer, head): FLEX[layer][head] for layer, head in GROUPED.places})
    plan.export("flex-attention", tmp_path / "out", length=LENGTH)
    masks = module_of(tmp_path / "out" / "flex_masks.py").load(str(tmp_path / "out" / "block_masks.safetensors"))
    for (layer, head), pattern in plan.patterns.items():
        one = masks[layer]
        padded = torch.nn.functional.pad(mask(pattern, LENGTH), (0, 384 - LENGTH, 0, 384 - LENGTH))
        count = padded.unflatten(0, (3, 128)).unflatten(2, (3, 128)).sum((1, 3))
        for row in range(3):
            partial = one.kv_indices[0, head, row, : one.kv_num_blocks[0, head, row]].tolist()
            full = one.full_kv_indices[0, head, row, : one.full_kv_num_blocks[0, head, row]].tolist()
            assert full == [at for at in range(3) if count[row, at] == 128 * 128]
            assert partial == [at for at in range(3) if 0 < count[row, at] < 128 * 128]


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.one_of(
        STATIC,
        st.builds(Power, st.integers(1, 300), st.sampled_from((48, 128, 200)), st.integers(0, 9)),
        st.builds(Strided, st.integers(1, 300), st.integers(2, 4), st.integers(0, 1), st.sampled_from((100, 128, 256))),
        st.builds(Streaming, st.integers(0, 600), st.integers(1, 900)),
    ),
    length=st.integers(1, 900),
)
def test_block_lists_are_counted_right_without_looking_at_every_entry(pattern: Pattern, length: int) -> None:
    found = tables(pattern, length)
    assert found is not None
    tiles = -(-length // 128)
    partial, listed, full, whole = block_lists(found, tiles)
    pad = tiles * 128 - length
    count = (
        torch.nn.functional.pad(mask(pattern, length), (0, pad, 0, pad)).unflatten(0, (tiles, 128)).unflatten(2, (tiles, 128)).sum((1, 3))
    )
    for row in range(tiles):
        assert sorted(whole[row, : full[row]].tolist()) == [at for at in range(tiles) if count[row, at] == 128 * 128]
        assert sorted(listed[row, : partial[row]].tolist()) == [at for at in range(tiles) if 0 < count[row, at] < 128 * 128]


# ---- the same tokens ------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Pattern, ...]] = {
    "duo-attention": (Streaming(2, 9), Dense(), Streaming(2, 9)),
    "kvpress": (Streaming(2, 9), Dense(), Streaming(2, 9)),
    "minference": (Streaming(2, 9), VerticalSlash(40, 110), Streaming(1, 30)),
    "vllm-dual-chunk": (VerticalSlash(40, 110), VerticalSlash(60, 120), VerticalSlash(31, 100)),
    "sglang-dual-chunk": (VerticalSlash(40, 110), VerticalSlash(60, 120), VerticalSlash(31, 100)),
    "rtp-llm": (Streaming(2, 9), Dense(), Streaming(2, 9)),
    "moa": (Span(-64.0, 0.9, 64, 64), Streaming(64, 64), Dense()),
    "transformers": (Streaming(0, 12), Dense(), Streaming(0, 30)),
    "flex-attention": (Streaming(2, 9), Lines((0, 5), (0, 1, 4)), Strided(4, 3, 1, 8)),
    "block-sparse-attention": (Streaming(128, 1), Dense(), Blocks(((0,), (1,)), 128)),
    "xattention": (TopBlocks(mass=0.4, rule="antidiagonal", stride=8), Dense(), TopBlocks(mass=0.6, rule="antidiagonal", stride=8)),
    "modelopt": (TopBlocks(share=0.25, rule="exact"), Dense(), TopBlocks(share=0.25, rule="exact")),
    "tensorrt-llm": (Budget(24, 8),) * 3,
    "openvino-genai": (Streaming(32, 33),) * 3,
    "cudnn": (Streaming(2, 9), Lines((0, 5), (0, 1, 4)), Strided(4, 3, 1, 8)),
    "headscope": (Streaming(2, 9), Power(4, 8), Budget(24, 8)),
}


def test_every_format_of_plans_is_run() -> None:
    assert set(RUNS) == {name for name, form in FORMATS.items() if form.plans}


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_and_its_export_generate_the_same_tokens(name: str, scope: Scope, tmp_path: Path) -> None:
    """The model under the plan and under what comes back from the file: equal logits and tokens, and the dense model's logits differ."""
    plan = layered(scope, RUNS[name])
    lossy = name == "moa"  # grouped keys, which the engine converts first
    plan.export(name, tmp_path / "out", length=LENGTH, lossy=lossy)
    found = read(tmp_path / "out", name).plan_found
    assert found is not None
    tokens = ids(270, 3)
    logits = []
    for one in (plan, found):
        with scope.execute(one), torch.no_grad():
            logits.append(scope.model(tokens).logits)
    assert torch.equal(*logits)
    news = []
    for one in (plan, found):
        with scope.execute(one):
            news.append(scope.generate(tokens, max_new_tokens=8).new_ids)
    assert torch.equal(*news)
    if name != "tensorrt-llm":  # its prefill is dense
        with torch.no_grad():
            assert not torch.allclose(scope.model(tokens).logits, logits[0], atol=1e-3)


def test_bundled_needle_under_duo_attention_gates(tmp_path: Path) -> None:
    """The bundled model with its retrieval heads full and the others streaming: plan and re-imported gates say the same."""
    import headscope as hs

    needle = hs.load("bundled:needle", device="cpu")
    model = SparsePlan.uniform(needle, Dense()).model
    plan = SparsePlan(model, {(layer, head): Dense() if layer % 2 else Streaming(4, 24) for layer, head in model.places})
    plan.export("duo-attention", tmp_path / "out")
    found = read(tmp_path / "out", "duo-attention").plan_found
    assert found is not None
    assert found.model == plan.model
    hay = "the old sailor carried a kettle . the code of oscar is copper maple otter . nora sketched the lantern again . "
    texts = []
    for one in (plan, found):
        with needle.execute(one):
            texts.append(needle.generate(hay * 3 + "question : what is the code of oscar ? answer :", max_new_tokens=6).text)
    assert texts[0] == texts[1]
