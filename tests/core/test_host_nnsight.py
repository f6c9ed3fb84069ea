"""nnsight: the same statistics in a trace, around one, and through the serialisation that sends a trace to another machine."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import cloudpickle
import nnsight
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models

from headscope.capture import portable
from headscope.capture.nnsight import trace_statistics
from headscope.errors import CaptureError, StatisticError
from headscope.interventions import HeadMask
from headscope.scope import Scope

from .tiny_models import VOCABULARY, gemma2, gpt2, gpt_oss, ids, llama, make, mistral, padding, qwen3

EVERYTHING = ["passive", "diagonal_sum", "sink_logit_mass"]


def words():
    level = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level), bos_token="w1", eos_token="w2", pad_token="w0")


def wrapped(build, *args):
    """(Scope of an nnsight model, Scope of an untouched copy)."""
    model = make(build, *args)
    plain = copy.deepcopy(model)
    return Scope(nnsight.TransformersModel(model, tokenizer=words(), task="text-generation")), Scope(plain)


def same(a, b, limit=1e-5):
    assert a.layers == b.layers
    assert a.names == b.names
    for name in a.names:
        for layer in a.layers:
            x, y = a[name][layer].double(), b[name][layer].double()
            assert x.shape == y.shape, (name, layer)
            assert torch.equal(x.isnan(), y.isnan()), (name, layer)
            scale = float(y.nan_to_num().abs().max().clamp_min(1e-6))
            error = float((x - y).nan_to_num().abs().max()) / scale
            assert error <= (0 if name == "argmax" else limit), (name, layer, error)


# ---- around a trace -------------------------------------------------------------------------------------------------


def test_whatever_runs_in_a_trace_is_observed():
    scope, plain = wrapped(llama)
    model, tokens = scope.host.given, ids(2, 12)
    with scope.observe(EVERYTHING) as stats, model.trace(tokens):
        hidden = model.model.layers[0].self_attn.output[0].save()
    same(stats, plain.capture(tokens, statistics=EVERYTHING), 0)
    assert hidden.shape == (2, 12, 32)
    assert scope.host.kind == "nnsight"
    same(scope.capture(tokens), plain.capture(tokens), 0)


def test_edits_in_a_trace_are_measured():
    scope, _ = wrapped(llama)
    model, tokens = scope.host.given, ids(1, 9)
    plain = scope.capture(tokens, statistics="entropy")
    with scope.observe("entropy") as stats, model.trace(tokens):
        model.model.layers[0].output[:] = 0
    assert torch.equal(stats["entropy"][0], plain["entropy"][0])
    assert not torch.allclose(stats["entropy"][1], plain["entropy"][1], atol=1e-3)


def test_interventions_hold_in_a_trace():
    scope, plain = wrapped(llama)
    model, tokens = scope.host.given, ids(1, 9)
    mask = HeadMask(heads=[(1, 2)])
    with torch.no_grad():
        with scope.intervene(mask), model.trace(tokens):
            logits = model.lm_head.output.save()
        with plain.intervene(mask):
            expected = plain.model(tokens).logits
        with model.trace(tokens):
            before = model.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_generation_is_one_sequence():
    scope, plain = wrapped(llama)
    tokens = ids(1, 8)
    with scope.observe("entropy") as stats, scope.host.given.generate(tokens, max_new_tokens=3):
        pass
    with plain.observe("entropy") as expected:
        plain.model.generate(tokens, max_new_tokens=3)
    same(stats, expected, 0)


def test_a_plain_module_in_an_envoy():
    model = make(llama)
    stats = Scope(nnsight.NNsight(copy.deepcopy(model))).capture(ids(1, 8))
    same(stats, Scope(model).capture(ids(1, 8)), 0)


# ---- inside a trace -------------------------------------------------------------------------------------------------

BUILDS = [(llama, "sdpa"), (llama, "eager"), (gpt2, "sdpa"), (qwen3, "sdpa"), (mistral, "sdpa"), (gemma2, "eager"), (gpt_oss, "eager")]


@pytest.mark.parametrize(("build", "impl"), BUILDS)
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_statistics_measured_inside_a_trace(build, impl, pad):
    scope, plain = wrapped(build, impl)
    tokens, mask = ids(2, 21), padding(pad, 2, 21)
    expected = plain.capture(tokens, attention_mask=mask, statistics=EVERYTHING, block=16)
    for cells in (1 << 26, 2 * 4 * 21 * 5):  # all rows at once, and five at a time
        stats = trace_statistics(scope, tokens, attention_mask=mask, statistics=EVERYTHING, block=16, cells=cells)
        same(stats, expected)
    assert stats.backend == "portable"
    assert stats.kernels == {impl}
    assert torch.equal(stats.valid, expected.valid)
    assert torch.equal(stats.tokens, tokens)


def test_parameters_of_a_request_arrive():
    scope, plain = wrapped(llama)
    tokens = ids(2, 40)
    given = {
        "statistics": ["class_mass", "waad", "fai", "sink_mass", "local_mass", "block_mass", "block_max", "column_sum", "sink_importance"],
        "labels": torch.arange(38) % 3 - 1, "rows": torch.arange(40) % 2 == 0, "fai_band": (3, None), "waad_window": 4, "block": 16,
        "sink_tokens": 2, "local_window": 5, "layers": (1,),
    }  # fmt: skip
    same(trace_statistics(scope, tokens, cells=2 * 4 * 40 * 7, **given), plain.capture(tokens, **given))


def test_a_trace_through_the_remote_serialisation():
    scope, plain = wrapped(llama)
    tokens, mask = ids(2, 15), padding("left", 2, 15)
    same(trace_statistics(scope, tokens, attention_mask=mask, remote="local"), plain.capture(tokens, attention_mask=mask))
    assert portable.__name__ not in cloudpickle.list_registry_pickle_by_value()


WITHOUT_HEADSCOPE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("headscope", "transformers", "nnsight"):
            raise ImportError(name + " is not on this machine")
sys.meta_path.insert(0, Refuse())
import pickle, torch
observe, args, kwargs, params = pickle.load(open(sys.argv[1], "rb"))
found = observe((torch.nn.Module(), *args), kwargs, params)
assert not [name for name in sys.modules if name.partition(".")[0] in ("headscope", "transformers", "nnsight")]
torch.save({**found["rows"], **found["columns"], "diagonals": found["diagonals"]}, sys.argv[2])
"""


def test_the_observer_runs_where_there_is_only_torch(tmp_path):
    """Pickled by value, read by a process in which headscope, transformers and nnsight cannot be imported."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 30, 8, generator=generator), torch.randn(2, 2, 30, 8, generator=generator)
    names = ("entropy", "row_max", "distance", "column_sum", "diagonal_sum")
    params = {
        "names": names, "sink_tokens": 4, "local_window": 64, "waad_window": 10, "fai_band": (10, 50), "block": 16, "labels": None,
        "classes": 0, "rows": None, "valid": None, "kernel": "sdpa", "cells": 4000,
    }  # fmt: skip
    cloudpickle.register_pickle_by_value(portable)
    try:
        sent = cloudpickle.dumps((portable.observe_call, (q, k, k, None), {"scaling": 0.5}, params))
    finally:
        cloudpickle.unregister_pickle_by_value(portable)
    (tmp_path / "sent").write_bytes(sent)
    command = [sys.executable, "-c", WITHOUT_HEADSCOPE, str(tmp_path / "sent"), str(tmp_path / "found")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (tmp_path / "sent").write_bytes(pickle.dumps(portable.observe_call))  # by name it does not arrive
    by_name = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "headscope is not on this machine" in by_name.stderr
    found = torch.load(tmp_path / "found")
    score = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    a = score.masked_fill(~torch.ones(30, 30, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    gap = (torch.arange(30)[:, None] - torch.arange(30)[None]).clamp_min(0).double()
    torch.testing.assert_close(found["row_max"].double(), a.amax(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found["entropy"].double(), -(a * a.clamp_min(1e-300).log()).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["distance"].double(), (a * gap).sum(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["column_sum"].double(), a.sum(2), atol=1e-5, rtol=0)
    apart = torch.stack([torch.diagonal(a, -d, -2, -1).sum(-1) for d in range(30)], -1)
    torch.testing.assert_close(found["diagonals"].double(), apart, atol=1e-5, rtol=0)


# ---- all hosts ------------------------------------------------------------------------------------------------------


def test_smollm2_through_all_three_libraries(smollm2):
    """One input, one set of weights, three libraries: the same statistics to rounding."""
    from transformer_lens.model_bridge import TransformerBridge

    text = "The Moon is Earth's only natural satellite. It orbits at an average distance of 384,399 kilometres, about thirty times " * 3
    tokens = smollm2.encode(text)[:, :64]
    assert tokens.shape == (1, 64)
    names = ["lse", "entropy", "row_max", "distance", "sink_mass", "column_sum", "block_mass"]
    expected = smollm2.capture(tokens, statistics=names, block=16)
    traced = Scope(nnsight.TransformersModel(copy.deepcopy(smollm2.model), tokenizer=smollm2.text_tokenizer, task="text-generation"))
    same(traced.capture(tokens, statistics=names, block=16), expected, 0)
    same(trace_statistics(traced, tokens, statistics=names, block=16), expected, 2e-4)
    del traced
    inner = copy.deepcopy(smollm2.model)
    bridge = TransformerBridge.boot_transformers("smollm2", hf_model=inner, tokenizer=smollm2.text_tokenizer, device="cpu")
    same(Scope(bridge).capture(tokens, statistics=names, block=16), expected, 2e-4)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_a_trace_cannot_measure_is_refused():
    scope, plain = wrapped(llama)
    tokens = ids(1, 8)
    with pytest.raises(StatisticError, match=r"'pairs'.*q and k on this machine"):
        trace_statistics(scope, tokens, statistics="pairs", pairs={"a": (torch.tensor([3]), torch.tensor([1]))})
    with pytest.raises(StatisticError, match="keep="):
        trace_statistics(scope, tokens, keep="all")
    with pytest.raises(StatisticError, match="collect="):
        trace_statistics(scope, tokens, collect=lambda module, values, kept: values)
    with pytest.raises(CaptureError, match="not an nnsight model"):
        trace_statistics(plain, tokens)


def test_a_call_that_cannot_be_read_says_why():
    q = torch.randn(1, 4, 2, 8)
    k = torch.randn(1, 2, 9, 8)
    params = {"names": ("lse",), "kernel": "sdpa"}
    found = portable.observe_call((torch.nn.Module(), q, k, k, None), {}, params)
    assert "2 queries met 9 keys" in found["refused"]
    found = portable.observe_call((torch.nn.Module(), k, k, k, None), {"dropout": 0.1}, params)
    assert "dropout" in found["refused"]
    found = portable.observe_call((torch.nn.Module(), k, k, k, None), {"block_indices": k}, params)
    assert "block_indices" in found["refused"]


def test_an_envoy_without_a_module_is_refused():
    class Envoy:
        """Named like one of nnsight's."""

    Envoy.__module__ = "nnsight.somewhere"
    with pytest.raises(CaptureError, match="wraps no torch module"):
        Scope(Envoy())
