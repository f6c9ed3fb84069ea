"""Encoder-decoders, vision towers and cross-attention: every attention module of the model, main stack or not, equals eager."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
import transformers as hf

from headscope.errors import StatisticError
from headscope.scope import Scope

from .tiny_models import IDS, VOCABULARY, bart, compare, dense, eager_copy, ids, llava, make, padding, qwen_vl, t5

PARAMETERS = {"block": 16, "fai_band": (2, 5), "local_window": 4}
LENGTH = 21
GENERATED = [("none", 5, "dynamic"), ("left", 5, "dynamic"), ("none", 5, "static"), ("left", 5, "static")]
ROWS = ("entropy", "row_max", "argmax", "sink_mass")


def dense_cross(a, row_mask, key_mask):
    """Statistics that cross-attention has, from its matrix [B, H, Nq, Nk]."""
    a = a.double()
    rows = torch.ones(a.shape[0], a.shape[2], dtype=torch.bool) if row_mask is None else row_mask.bool()
    keys = torch.ones(a.shape[0], a.shape[3], dtype=torch.bool) if key_mask is None else key_mask.bool()
    first = keys.int().argmax(1)
    sink = torch.arange(a.shape[3])[None] < first[:, None] + 4
    out = {
        "entropy": torch.special.entr(a).sum(-1),
        "row_max": a.amax(-1),
        "argmax": a.argmax(-1),
        "sink_mass": (a * sink[:, None, None]).sum(-1),
    }
    out = {name: value.masked_fill(~rows[:, None], -1 if name == "argmax" else math.nan) for name, value in out.items()}
    out["column_sum"] = (a * rows[:, None, :, None]).sum(2)
    return out


def names(scope, kind):
    return [module.name for module in scope.topology.modules if module.layer is None and (module.kind == "cross") == (kind == "cross")]


def captured(scope, inputs, count, cache):
    """Statistics of the inputs and of `count` generated tokens, by `Scope.capture` or around the model's own generate() with a cache."""
    if cache is None:
        return scope.capture(inputs, generate=count, **PARAMETERS)
    steps = count + 1  # the last token is never fed to the model
    with torch.no_grad(), scope.observe(**PARAMETERS) as stats:
        scope.model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, cache_implementation=cache)
    return stats


def check_both_stacks(scope, stats, out, mask, decoder_mask):
    for name, a in zip(names(scope, "encoder"), out.encoder_attentions, strict=True):
        compare(stats, name, dense(a, causal=False, row_valid=mask, **PARAMETERS))
    for layer, a in enumerate(out.decoder_attentions):
        compare(stats, layer, dense(a, causal=True, row_valid=decoder_mask, **PARAMETERS))
    for name, a in zip(names(scope, "cross"), out.cross_attentions, strict=True):
        compare(stats, name, dense_cross(a, decoder_mask, mask))


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", ["none", "right", "left"])
def test_encoder_decoder_in_one_pass(build, impl, pad):
    model = make(build, impl)
    scope = Scope(model)
    inputs = {
        "input_ids": ids(2, LENGTH),
        "attention_mask": padding(pad, 2, LENGTH),
        "decoder_input_ids": ids(2, 13, 1),
        "decoder_attention_mask": padding(pad, 2, 13),
    }
    stats = scope.capture(inputs, **PARAMETERS)
    with torch.no_grad():
        out = eager_copy(model)(**inputs, output_attentions=True, use_cache=False)
    check_both_stacks(scope, stats, out, inputs["attention_mask"], inputs["decoder_attention_mask"])
    assert torch.equal(stats.tokens, inputs["decoder_input_ids"])


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("pad", ["none", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_encoder_decoder_generation(build, pad, cache):
    """The encoder runs before the first forward of the whole model; its statistics join the decoder's sequence."""
    model = make(build)
    scope = Scope(model)
    tokens, mask = ids(2, LENGTH), padding(pad, 2, LENGTH)
    with torch.no_grad(), scope.observe(**PARAMETERS) as stats:
        model.generate(tokens, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, do_sample=False, cache_implementation=cache)
    assert len(stats.passes) == 1
    with torch.no_grad():
        out = eager_copy(model)(
            input_ids=tokens, attention_mask=mask, decoder_input_ids=stats.tokens, output_attentions=True, use_cache=False
        )
    check_both_stacks(scope, stats, out, mask, None)


def test_cross_attention_has_no_distances():
    scope = Scope(make(bart))
    stats = scope.capture({"input_ids": ids(1, 9), "decoder_input_ids": ids(1, 5)})
    cross = names(scope, "cross")[0]
    assert stats["entropy"][cross].shape == (1, 4, 5)
    assert stats["column_sum"][cross].shape == (1, 4, 9)
    for name in ("distance", "waad", "local_mass", "fai", "sink_importance"):
        assert cross not in stats[name]
        with pytest.raises(StatisticError, match="not measured"):
            stats[name][cross]


def test_speech_model_with_its_own_encoder():
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20, max_target_positions=32,
        decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[], **IDS,
    )  # fmt: skip
    model = make(lambda: hf.WhisperForConditionalGeneration._from_config(config, attn_implementation="sdpa"))
    scope = Scope(model)
    inputs = {
        "input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": ids(2, 9),
    }
    stats = scope.capture(inputs, **PARAMETERS)
    with torch.no_grad():
        out = eager_copy(model)(**inputs, output_attentions=True, use_cache=False)
    check_both_stacks(scope, stats, out, None, None)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("pad", "count", "cache"),
    [("none", None, None), ("left", None, None), ("right", None, None), ("none", 5, None), ("left", 5, None), *GENERATED],
)
def test_llava(impl, pad, count, cache):
    model = make(llava, impl)
    scope = Scope(model)
    tokens, mask = ids(2, 30), padding(pad, 2, 30)
    tokens[:, 8:24] = 96
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "pixel_values": pixels} | ({} if mask is None else {"attention_mask": mask})
    stats = captured(scope, inputs, count, cache)
    extra = {}
    if count and mask is not None:
        mask = torch.cat([mask, torch.ones(2, count, dtype=mask.dtype)], 1)
        extra = {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)}
    twin = eager_copy(model)
    with torch.no_grad():
        out = twin(input_ids=stats.tokens, pixel_values=pixels, attention_mask=mask, output_attentions=True, use_cache=False, **extra)
        tower = twin.model.vision_tower(pixels, output_attentions=True).attentions
    for layer, a in enumerate(out.attentions):
        compare(stats, layer, dense(a, causal=True, row_valid=mask, **PARAMETERS))
    for name, a in zip(names(scope, "vision"), tower, strict=True):
        compare(stats, name, dense(a, causal=False, **PARAMETERS))


def test_what_is_given_by_text_position_does_not_reach_the_tower():
    """`rows`, labels and pairs belong to the text; a picture's patches have positions of their own."""
    model = make(llava)
    tokens = ids(1, 24)
    tokens[:, 2:18] = 96
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))}
    scope = Scope(model)
    plain = scope.capture(inputs, statistics=["column_sum"])
    given = scope.capture(
        inputs,
        statistics=["column_sum", "class_mass", "pairs"],
        rows=torch.arange(24) >= 20,
        labels=(tokens[0] == 96).long(),
        pairs={"last": (torch.tensor([23]), torch.tensor([5]))},
    )
    for name in names(scope, "vision"):
        assert torch.equal(given["column_sum"][name], plain["column_sum"][name])
        assert name not in given["class_mass"]
        assert name not in given.pairs("last")
    assert float((given["column_sum"][0] - plain["column_sum"][0]).abs().max()) > 0.1
    assert given["class_mass"][1].shape == (1, 4, 24, 2)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("pad", "count", "cache"), [("none", None, None), ("left", None, None), ("none", 5, None), ("left", 5, None), *GENERATED]
)
def test_qwen_vl_calls_attention_once_per_image_or_window(impl, pad, count, cache, monkeypatch):
    """One layer attends within windows of 16 patches, the other within images: block-diagonal matrices, laid end to end."""
    model = make(qwen_vl, impl)
    scope = Scope(model)
    tokens, mask = ids(2, 30), padding(pad, 2, 30)
    tokens[0, 6:22] = 96
    tokens[1, 10:18] = 96
    mask = torch.ones_like(tokens) if mask is None else mask
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "pixel_values": torch.randn(96, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 8]]),
        "mm_token_type_ids": (tokens == 96).int(),
    }
    stats = captured(scope, inputs, count, cache)
    if count:
        mask = torch.cat([mask, torch.ones(2, count, dtype=mask.dtype)], 1)
    later = {"input_ids": stats.tokens, "attention_mask": mask, "mm_token_type_ids": (stats.tokens == 96).int()}
    twin = eager_copy(model)
    pieces: dict[str, list[torch.Tensor]] = {}
    where = {module: name for name, module in twin.named_modules()}
    code = import_module(type(twin).__module__)
    eager = code.eager_attention_forward

    def listening(module, *args, **kwargs):
        out, weights = eager(module, *args, **kwargs)
        pieces.setdefault(where[module], []).append(weights)
        return out, weights

    monkeypatch.setattr(code, "eager_attention_forward", listening)
    with torch.no_grad():
        twin(**{**inputs, **later}, use_cache=False)
    for layer in (0, 1):
        (a,) = pieces[scope.topology[layer].name]
        compare(stats, layer, dense(a, causal=True, row_valid=mask, **PARAMETERS))
    windows, images = names(scope, "vision")
    assert [rows for _, rows in stats.segments(windows)] == [16] * 6
    assert stats.segments(images) == ((0, 64), (64, 32))
    for name in (windows, images):
        check_segments(stats, name, pieces[name])


def check_segments(stats, name, matrices):
    """Each segment's statistics at its own positions; the map is the block-diagonal one of all segments together."""
    start = 0
    whole = torch.block_diag(*(a[0, 0] for a in matrices)).double()
    for a in matrices:
        expected = dense(a, causal=False, **PARAMETERS)
        end = start + a.shape[-1]
        for statistic in ("entropy", "row_max", "distance", "distance_sq", "waad", "sink_mass", "local_mass"):
            got = stats[statistic][name][..., start:end].double()
            torch.testing.assert_close(got, expected[statistic], rtol=1e-5, atol=1e-5)
        for statistic in ("column_sum", "sink_importance", "fai"):
            got = stats[statistic][name][..., start:end].double()
            torch.testing.assert_close(got, expected[statistic], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert torch.equal(stats["argmax"][name][..., start:end], expected["argmax"] + start)
        start = end
    n = whole.shape[0] // 16
    cells = whole.reshape(n, 16, n, 16)
    torch.testing.assert_close(stats["block_mass"][name][0, 0].double(), cells.sum((1, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats["block_max"][name][0, 0].double(), cells.amax((1, 3)), rtol=1e-5, atol=1e-6)


def test_a_tower_that_runs_alone_and_then_with_its_model():
    """Two passes: pictures looked at by themselves do not end up in the text's sequence."""
    model = make(llava)
    tokens = ids(1, 24)
    tokens[:, 2:18] = 96
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad(), Scope(model).observe(statistics=["entropy"]) as stats:
        model.model.vision_tower(pixels)
        model.model.vision_tower(pixels)
        model(input_ids=tokens, pixel_values=pixels)
    assert [len(one.layers) for one in stats.passes] == [2, 2, 4]
