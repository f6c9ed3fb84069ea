"""Each format as its engine reads it: readers written from the documented behaviour, with its quirks, see the keys that the plan keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headscope.call import AttentionCall, MaskFacts
from headscope.errors import ExportError
from headscope.export import read
from headscope.plans import Blocks, Budget, Dense, Pattern, PlanModel, Span, SparsePlan, Streaming, Strided, TopBlocks, VerticalSlash
from headscope.plans.indices import choose

from .plan_cases import GROUPED, LENGTH, STATIC, WHOLE, mask, plans
from .readers import blocks, configs, duo, fake_kvpress, minference, moa, rtp, scores

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def gated(model: PlanModel, dense: set[tuple[int, int]], window: Streaming) -> SparsePlan:
    """Key heads (layer, group) that are dense, all others streaming."""
    size = {layer: heads // kv for layer, heads, kv in zip(model.layers, model.heads, model.kv_heads, strict=True)}
    return SparsePlan(model, {(layer, head): Dense() if (layer, head // size[layer]) in dense else window for layer, head in model.places})


GATES = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 1)))


@QUICK
@given(dense=GATES, sink=st.integers(0, 6), window=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
def test_duo_attention_keeps_the_heads_whatever_the_noise(
    dense: set[tuple[int, int]], sink: int, window: int, seed: int, tmp_path: Path
) -> None:
    plan = gated(GROUPED, dense, Streaming(sink, window))
    out = tmp_path / "duo"
    report = plan.export("duo-attention", out, force=out.exists())
    gates, sink_size, recent_size = duo.load(out)
    full = duo.full_heads(gates, report.numbers["sparsity"], seed)
    assert {(layer, group) for layer, group in zip(*np.nonzero(full), strict=True)} == dense
    assert json.loads((out / "config.json").read_text())["sparsity"] == report.numbers["sparsity"] == (6 - len(dense)) / 6
    if len(dense) < 6:
        seen = duo.decode(30, sink_size, recent_size)
        kept = mask(Streaming(sink, window), 30)
        assert seen == [set(row.nonzero()[:, 0].tolist()) for row in kept]


def test_duo_attention_reads_recent_0_as_every_key_so_a_window_of_1_is_written_as_2(tmp_path: Path) -> None:
    assert duo.decode(9, 1, 0)[-1] == set(range(9))
    plan = SparsePlan.uniform(GROUPED, Streaming(1, 1))
    with pytest.raises(ExportError, match="recent_size 0 as every key"):
        plan.export("duo-attention", tmp_path / "out")
    plan.export("duo-attention", tmp_path / "out", lossy=True)
    assert duo.load(tmp_path / "out")[1:] == (1, 1)


@QUICK
@given(dense=GATES, sink=st.integers(0, 6), window=st.integers(2, 9))
def test_kvpress_masks_what_the_plan_drops_at_the_first_decoded_row(
    dense: set[tuple[int, int]], sink: int, window: int, tmp_path: Path
) -> None:
    plan = gated(GROUPED, dense, Streaming(sink, window))
    out = tmp_path / "press"
    plan.export("kvpress", out, force=out.exists())
    with fake_kvpress.module(out / "headscope_press.py") as found:
        press = found.HeadscopePress()
        press.post_init_from_model(None)
        for layer in range(3):
            masked = press.masked(layer, 30)
            for head in range(4):
                row = plan[layer, head].visible(torch.tensor([30]), torch.arange(30))[0].numpy()
                assert np.array_equal(row, ~masked[head // 2])


def call(seed: int, length: int = 180) -> AttentionCall:
    q, k = torch.randn(2, 1, 1, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5
    return AttentionCall("m", 0, q, k, k, 0.25, MaskFacts(causal=True))


@pytest.mark.parametrize(
    "pattern", [VerticalSlash(40, 110), VerticalSlash(5, 3), VerticalSlash(60, 130), Streaming(9, 21), Streaming(0, 1)]
)
def test_minference_computes_the_plan_on_the_same_queries_and_keys(pattern: Pattern, tmp_path: Path) -> None:
    """The entry, run by the engine's own index rules, keeps exactly what headscope's rule keeps."""
    SparsePlan.uniform(GROUPED, pattern).export("minference", tmp_path / "out")
    one = minference.Reader(tmp_path / "out" / "best_pattern.json", 2)
    for seed in range(3):
        given_call = call(seed)
        seen = minference.mask(*one.head(3), given_call.q[0, 0], given_call.k[0, 0])
        assert torch.equal(seen, mask(choose(given_call, 0, pattern), 180))


def test_minference_has_a_default_for_missing_heads_and_four_items(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    path.write_text(
        json.dumps([{"0": ["stream_llm", 4, 9, 0.5], "1": ["block_sparse", 1, 2, 7]}, {"1": ["vertical_and_slash", 31, 200, 1]}])
    )
    found = read(path, "minference", length=12_800)
    assert found.plan_found is not None
    assert [minference.Reader(path, 1).head(head) for head in (0, 1)] == [
        ("vertical_and_slash", 1000, 6096),
        ("vertical_and_slash", 31, 200),
    ]
    assert dict(found.plan_found.patterns) == {
        (0, 0): Streaming(4, 9),
        (0, 1): TopBlocks(share=0.5, rule="pooled", block=64),
        (1, 0): VerticalSlash(1000, 6096),
        (1, 1): VerticalSlash(31, 200),
    }
    assert "1 heads are not in the file" in found.card.notes[0]
    path.write_text(json.dumps([{"0": ["stream_llm", 4, 9]}]))
    with pytest.raises(ExportError, match=r"head 0\.0 has 3 items"):
        read(path, "minference")
    with pytest.raises(ValueError, match="unpack"):
        minference.Reader(path, 0).head(0)


@pytest.mark.parametrize(("asked", "columns"), [(29, 31), (30, 31), (31, 31), (130, 130), (0, 31)])
def test_vllm_raises_30_columns_to_130(asked: int, columns: int, tmp_path: Path) -> None:
    plan = SparsePlan.uniform(GROUPED, VerticalSlash(asked, 200))
    plan.export("vllm-dual-chunk", tmp_path / "out", lossy=True)
    for layer in range(3):
        assert [minference.DualChunk(tmp_path / "out", layer, 4).sizes(head) for head in range(4)] == [(columns, 200)] * 4
    path = tmp_path / "out" / "sparse_attention_config.json"
    path.write_text(path.read_text().replace(f", {columns}, 200", ", 30, 200"))
    found = read(tmp_path / "out", "vllm-dual-chunk")
    assert found.plan_found is not None
    assert found.plan_found[1, 2] == VerticalSlash(130, 200)
    assert minference.DualChunk(tmp_path / "out", 1, 4).sizes(2) == (130, 200)
    path.write_text(path.read_text().replace('"3": [', '"5": ['))
    with pytest.raises(ExportError, match="layer 0 has no head 3"):
        read(tmp_path / "out", "vllm-dual-chunk")
    with pytest.raises(KeyError):
        minference.DualChunk(tmp_path / "out", 0, 4)


def test_sglang_that_caches_without_the_layer_runs_layer_0_everywhere_and_the_report_says_so(tmp_path: Path) -> None:
    plan = SparsePlan(GROUPED, {(layer, head): VerticalSlash(100 + layer, 200) for layer, head in GROUPED.places})
    report = plan.export("sglang-dual-chunk", tmp_path / "out")
    reader = minference.CachedDualChunk(tmp_path / "out", 4)
    assert [reader.sizes(layer, 0) for layer in range(3)] == [(100, 200)] * 3
    assert any("layer 0's" in note for note in report.notes)
    alike = SparsePlan.uniform(GROUPED, VerticalSlash(100, 200)).export("sglang-dual-chunk", tmp_path / "alike")
    assert not any("layer 0's" in note for note in alike.notes)
    reader = minference.CachedDualChunk(tmp_path / "alike", 4)
    assert [reader.sizes(layer, 0) for layer in range(3)] == [(100, 200)] * 3


def attention(plan: SparsePlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[H, N, D] under the plan's masks."""
    size = len(q) // len(k)
    seen = torch.stack([mask(plan[layer, head], q.shape[1]) for head in range(len(q))])
    weights = (q @ k.repeat_interleave(size, 0).mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights @ v.repeat_interleave(size, 0)


@pytest.mark.parametrize("length", [20, 21, 40])
def test_rtp_llm_gathers_heads_and_still_computes_the_plan(length: int, tmp_path: Path) -> None:
    """One dense head in each key group: the engine's gathering deals them to the right key heads. At and below the threshold it is dense,
    where the plan drops nothing.
    """
    window = Streaming(4, 16)
    plan = SparsePlan(GROUPED, {(layer, head): Dense() if head in (1, 2) or layer == 1 else window for layer, head in GROUPED.places})
    plan.export("rtp-llm", tmp_path / "out")
    entry = rtp.config(tmp_path / "out" / "headwise_config.json")
    q = torch.randn(4, length, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, v = torch.randn(2, 2, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for layer in range(3):
        assert torch.allclose(rtp.prefill(entry, layer, q, k, v), attention(plan, layer, q, k, v), atol=1e-12)


def test_rtp_llm_needs_as_many_dense_heads_in_every_group(tmp_path: Path) -> None:
    """Two dense heads of one key head go to two key heads in the engine; that is refused, and rounding makes it right."""
    plan = SparsePlan.uniform(GROUPED, Streaming(2, 6)).replace({(0, 0): Dense(), (0, 1): Dense()})
    q = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, v = torch.randn(2, 2, 30, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wrong = {"0": [1, 1, 0, 0], "sink_token_num": 2, "swa_token_num": 5, "seqlen_threshold": 9}
    assert not torch.allclose(rtp.prefill(wrong, 0, q, k, v), attention(plan, 0, q, k, v), atol=1e-3)
    with pytest.raises(ExportError, match="as many retrieval heads in every key group"):
        plan.export("rtp-llm", tmp_path / "out")
    plan.export("rtp-llm", tmp_path / "out", lossy=True)
    entry = rtp.config(tmp_path / "out" / "headwise_config.json")
    written = read(tmp_path / "out", "rtp-llm").plan_found
    assert written is not None
    assert torch.allclose(rtp.prefill(entry, 0, q, k, v), attention(written, 0, q, k, v), atol=1e-12)
    assert written[0, 2] == written[0, 3] == Dense()


def test_rtp_llm_takes_a_missing_layer_for_all_retrieval(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = {"num_hidden_layers": 3, "num_key_value_heads": 2, "headwise_config": {"1": [1, 0, 0, 1], "swa_token_num": 7}}
    path.write_text(json.dumps(config))
    found = read(path, "rtp-llm").plan_found
    assert found is not None
    assert rtp.retrieval(config["headwise_config"], 2, 4).all()
    assert [found[layer, 1] for layer in range(3)] == [Dense(), Streaming(4, 8), Dense()]
    assert found.model.kv_heads == (2, 2, 2)


def test_retrieval_heads_are_read_from_one_line_in_order(tmp_path: Path) -> None:
    from .test_export_round_trips import scored

    values = {place: number / 7 for number, place in enumerate(GROUPED.places)}
    scored({"retrieval": values}).export("retrieval-head", tmp_path / "out")
    path = tmp_path / "out" / "head_score.json"
    assert path.read_text().count("\n") == 1
    assert scores.retrieval_head(path)[0] == ([2, 3], 11 / 7)
    assert np.array_equal(scores.headkv(path, 3, 4), np.array(list(values.values())).reshape(3, 4))
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))) + '\n{"0-0": [9]}')
    found = read(shuffled, "retrieval-head")
    assert found.value(2, 3, "retrieval") == 11 / 7
    assert scores.headkv(shuffled, 3, 4)[0, 0] == 11 / 7
    assert sum("not in order" in note or "first of 2 lines" in note for note in found.card.notes) == 2
    shuffled.write_text(json.dumps({"0-0": [0.1, 0.2], "0-1": 0.5, "1-0": [1]}))
    with pytest.raises(ExportError, match="no head 1-1"):
        read(shuffled, "retrieval-head")


@QUICK
@given(
    pattern=st.one_of(
        st.builds(Span, st.floats(-100, 400), st.floats(0.01, 0.99), st.just(64), st.just(64)),
        st.integers(1, 9).map(lambda count: Streaming(64, count * 64)),
        st.just(Dense()),
    ),
    tokens=st.integers(1, 1500),
)
def test_moa_decodes_with_the_window_of_the_plan(pattern: Pattern, tokens: int, tmp_path: Path) -> None:
    """At least the plan's keys and fewer than 64 more; in the prefill at least those but for 63."""
    out = tmp_path / "moa"
    SparsePlan.uniform(WHOLE, pattern).export("moa", out, force=out.exists())
    static, circular = moa.sizes(out / "moa_alpha_beta.json", tokens)[1][2]
    row = mask(pattern, tokens)[-1].nonzero()[:, 0].tolist()
    seen = moa.decode(tokens, static, circular)
    assert set(row) <= seen
    assert len(seen) - len(row) < 64
    prefill = moa.prefill(tokens - 1, static, circular)
    assert len(set(row) - prefill) < 64


@QUICK
@given(plan=plans(STATIC))
def test_block_sparse_attention_computes_every_key_of_the_plan(plan: SparsePlan, tmp_path: Path) -> None:
    """Whole blocks: every key of the asked pattern, none of a block that it does not touch, and 127 more at most in streaming rows."""
    from headscope.export.tensors import load_tensors

    out = tmp_path / "bsa"
    plan.export("block-sparse-attention", out, lossy=True, length=LENGTH, force=out.exists())
    t = load_tensors(out / "block_sparse.safetensors")
    assert (t["head_mask_type"].dtype, t["streaming_info"].dtype) == (np.int32, np.int32)
    written = read(out, "block-sparse-attention").plan_found
    assert written is not None
    for (layer, head), pattern in plan.patterns.items():
        kind, info = int(t["head_mask_type"][layer, head]), t["streaming_info"][layer, 2 * head : 2 * head + 2]
        seen = blocks.block_sparse(kind, info, t.get(f"layer.{layer}.base_blockmask"), LENGTH)
        assert not (mask(pattern, LENGTH).numpy() & ~seen).any()
        now = mask(written[layer, head], LENGTH).numpy()
        assert not (now & ~seen).any()
        assert int((seen & ~now).sum(1).max()) <= 127
        if isinstance(written[layer, head], Blocks):
            assert np.array_equal(seen, now)


def test_xattention_keeps_the_blocks_that_the_threshold_asks_for(tmp_path: Path) -> None:
    masses = [0.3, 0.55, 0.8, 0.97]
    plan = SparsePlan(
        GROUPED, {(layer, head): TopBlocks(mass=masses[head], rule="antidiagonal", stride=8) for layer, head in GROUPED.places}
    )
    plan = plan.replace({(1, 2): Dense()})
    plan.export("xattention", tmp_path / "out")
    space: dict[str, object] = {}
    exec((tmp_path / "out" / "headscope_threshold.py").read_text(), space)
    table = torch.tensor(space["headscope_threshold"])
    assert table.shape == (3, 4)
    assert space["stride"] == 8
    assert float(table[1, 2]) == 1.0
    from headscope.plans.indices import block_estimate

    one = call(5, 900)
    for head in range(4):
        pattern = plan[0, head]
        assert isinstance(pattern, TopBlocks)
        estimate = block_estimate(one, 0, pattern)[0].numpy()
        found = choose(one, 0, pattern)
        assert isinstance(found, Blocks)
        for row in range(8):
            wanted = blocks.find_blocks(estimate[row, : row + 1], float(table[0, head]) - 1e-7)
            assert set(found.row(row)) == wanted


@QUICK
@given(plan=plans(STATIC))
def test_cudnn_intervals_are_the_mask(plan: SparsePlan, tmp_path: Path) -> None:
    from headscope.export.tensors import load_tensors

    out = tmp_path / "cudnn"
    report = plan.export("cudnn", out, lossy=True, length=LENGTH, force=out.exists())
    t = load_tensors(out / "mask_func.safetensors")
    for (layer, head), pattern in plan.patterns.items():
        function = t["functions"][t[f"layer.{layer}"]][head]
        assert np.array_equal(blocks.intervals(function), mask(pattern, LENGTH).numpy())
    assert all(isinstance(plan[one.layer, one.head], Span) for one in report.changed)


def test_a_sink_and_a_window_are_three_endpoints(tmp_path: Path) -> None:
    from headscope.export.tensors import load_tensors

    SparsePlan.uniform(WHOLE, Streaming(3, 5)).export("cudnn", tmp_path / "out", length=12)
    function = load_tensors(tmp_path / "out" / "mask_func.safetensors")["functions"][0]
    at = np.arange(12)
    assert np.array_equal(function, np.stack([np.minimum(3, at + 1), np.maximum(at + 1 - 5, np.minimum(3, at + 1)), at + 1]))


def test_cudnn_refuses_scattered_rows_and_needs_a_length(tmp_path: Path) -> None:
    from headscope.plans import Lines

    scattered = SparsePlan.uniform(WHOLE, Lines(tuple(range(0, 200, 2)), (0,)))
    with pytest.raises(ExportError, match="more than 32 runs of keys"):
        scattered.export("cudnn", tmp_path / "out", length=LENGTH)
    for name in ("cudnn", "flex-attention"):
        with pytest.raises(ExportError, match="--length"):
            scattered.export(name, tmp_path / "out")


def test_modelopt_leaves_the_named_layers_dense(tmp_path: Path) -> None:
    sparse = TopBlocks(share=0.25, rule="exact", block=128)
    plan = SparsePlan(GROUPED, {(layer, head): Dense() if layer == 1 else sparse for layer, head in GROUPED.places})
    plan.export("modelopt", tmp_path / "out")
    rules = [configs.modelopt(tmp_path / "out" / "sparse_attention_config.json", f"model.layers.{layer}.self_attn") for layer in range(12)]
    assert [rule["enable"] for rule in rules if rule] == [True, False, *[True] * 10]
    assert rules[0] is not None
    assert rules[0]["target"] == {"prefill": 0.75}
    mixed = plan.replace({(0, 1): Dense()})
    with pytest.raises(ExportError, match="one share of all key blocks"):
        mixed.export("modelopt", tmp_path / "mixed")
    SparsePlan.uniform(GROUPED, Dense()).export("modelopt", tmp_path / "dense")
    assert configs.modelopt(tmp_path / "dense" / "sparse_attention_config.json", "model.layers.0.self_attn") is None


def test_tensorrt_llm_reads_one_rule_for_the_model(tmp_path: Path) -> None:
    SparsePlan.uniform(GROUPED, Budget(2016, 32, 63)).export("tensorrt-llm", tmp_path / "rocket")
    found = configs.tensorrt_llm(tmp_path / "rocket" / "extra_config.yaml")
    assert found == {"algorithm": "rocket", "window_size": 32, "kernel_size": 63, "prompt_budget": 2048, "topk": 2048, "page_size": 4}
    SparsePlan.uniform(GROUPED, TopBlocks(share=0.25, rule="exact")).export("tensorrt-llm", tmp_path / "skip")
    assert configs.tensorrt_llm(tmp_path / "skip" / "extra_config.yaml") == {
        "algorithm": "skip_softmax",
        "target_sparsity": {"prefill": 0.75, "decode": 0.0},
    }
    mixed = SparsePlan.uniform(GROUPED, Budget(64)).replace({(0, 0): Dense()})
    with pytest.raises(ExportError, match="one rule for the whole model"):
        mixed.export("tensorrt-llm", tmp_path / "mixed")
    mixed.export("tensorrt-llm", tmp_path / "mixed", lossy=True)
    assert configs.tensorrt_llm(tmp_path / "mixed" / "extra_config.yaml") is None


@QUICK
@given(sink=st.integers(0, 70), window=st.integers(1, 120), chunk=st.sampled_from((32, 64)))
def test_openvino_sees_the_window_in_chunks_of_whole_blocks(sink: int, window: int, chunk: int, tmp_path: Path) -> None:
    out = tmp_path / "ov"
    SparsePlan.uniform(WHOLE, Streaming(sink, window)).export("openvino-genai", out, lossy=True, force=out.exists())
    config = configs.OpenVino.load(out / "sparse_attention_config.json")
    kept = mask(Streaming(sink, window), LENGTH)
    for row in range(0, LENGTH, 7):
        assert set(kept[row].nonzero()[:, 0].tolist()) <= config.sees(row, chunk)


def test_openvino_thresholds(tmp_path: Path) -> None:
    pattern = TopBlocks(mass=0.85, rule="antidiagonal", block=64, stride=8)
    SparsePlan.uniform(WHOLE, pattern).export("openvino-genai", tmp_path / "out")
    config = configs.OpenVino.load(tmp_path / "out" / "sparse_attention_config.json")
    assert (config.mode, config.xattention_threshold, config.xattention_block_size, config.xattention_stride) == ("XATTENTION", 0.85, 64, 8)
    strided = SparsePlan.uniform(WHOLE, Strided(8, 2))
    with pytest.raises(ExportError, match="one setting"):
        strided.export("openvino-genai", tmp_path / "no")
