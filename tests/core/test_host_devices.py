"""Models spread over devices, in other dtypes, and hosts recognised without their libraries being imported."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from headscope.circuits import head_weights
from headscope.errors import CaptureError
from headscope.interventions import HeadMask
from headscope.scope import Scope

from .tiny_models import compare, dense, gpt2, ids, llama, make

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def split(model, where, folder):
    """The model with its second layer kept elsewhere: on the CPU by accelerate's hooks, or on disk."""
    if where == "disk":
        return disk_offload(model, offload_dir=folder, execution_device=torch.device("cpu"))
    if where == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    places = dict.fromkeys(PARTS, "cpu")
    places["model.layers.1"] = "disk"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk", "map"])
def test_a_model_whose_weights_come_and_go(where, tmp_path):
    plain = make(llama)
    model = split(copy.deepcopy(plain), where, str(tmp_path))
    scope, tokens = Scope(model), ids(2, 14)
    stats, expected = scope.capture(tokens), Scope(plain).capture(tokens)
    for name in stats.names:
        for layer in (0, 1):
            assert torch.equal(stats[name][layer].nan_to_num(), expected[name][layer].nan_to_num()), (name, layer)
            assert stats[name][layer].device.type == "cpu"
    with torch.no_grad():
        before = model(tokens).logits
        with scope.observe(), scope.intervene(HeadMask(heads=[(1, 0)])):
            changed = model(tokens).logits
        assert torch.equal(model(tokens).logits, before)
    assert not torch.equal(changed, before)
    assert len(scope.fingerprint) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["balanced", "by name"])
def test_a_model_over_two_devices(how, tmp_path):
    """A model split over two GPUs (or one GPU and host memory) gives the statistics of the same model on one, to the bit."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=1024, attn_implementation="sdpa",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    second = 1 if torch.cuda.device_count() > 1 else "cpu"
    names = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(4)), "model.norm", "model.rotary_emb", "lm_head"]
    places = {name: second if name.endswith((".2", ".3", "norm", "lm_head")) else 0 for name in names}
    one = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": 0}).eval()
    two = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="balanced" if how == "balanced" else places
    ).eval()
    if torch.cuda.device_count() > 1:
        assert {parameter.device.index for parameter in two.parameters()} == {0, 1}
    tokens = torch.randint(0, 512, (1, 700), generator=torch.Generator().manual_seed(0))
    for options in ({"keep": "all"}, {"chunk": 256}, {"generate": 3}):
        found, expected = Scope(two).capture(tokens, **options), Scope(one).capture(tokens, **options)
        assert found.backend == expected.backend == "triton"
        for name in expected.names:
            for layer in range(4):
                assert torch.equal(found[name][layer].nan_to_num(), expected[name][layer].nan_to_num()), (name, layer, options)
    scope = Scope(two)
    with torch.no_grad():
        before = two(tokens.to(scope.device)).logits
        with scope.intervene(HeadMask(heads=[(3, 1)])):
            masked = two(tokens.to(scope.device)).logits
        with Scope(one).intervene(HeadMask(heads=[(3, 1)])):
            expected_logits = one(tokens.to(one.device)).logits
        assert torch.equal(two(tokens.to(scope.device)).logits, before)
    assert torch.equal(masked.cpu(), expected_logits.cpu())
    assert not torch.equal(masked, before)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(build, dtype):
    """Statistics of a low-precision model are exact for the q and k that it has, in float32; of a float64 model in float64."""
    model = make(build).to(dtype)
    stats = Scope(model).capture(ids(2, 14), keep="all")
    assert stats["entropy"][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for layer in (0, 1):
        name = stats.topology[layer].name
        q, k = stats._kept[name].calls[0].q, stats._kept[name].pieces[0]
        assert q.dtype == dtype
        score = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / q.shape[-1] ** 0.5
        a = score.masked_fill(~torch.ones(14, 14, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        compare(stats, layer, dense(a, causal=True))


class Int8Linear(torch.nn.Module):
    """A linear layer kept in 8 bits, as quantisation libraries put them in a model's place."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def test_quantised_weights():
    """What is read are activations, so the weights may be kept in any way; only their circuits cannot be cut out of them."""
    model = make(llama)
    exact = Scope(copy.deepcopy(model)).capture(ids(2, 14))
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    scope = Scope(model)
    stats = scope.capture(ids(2, 14), keep="all")
    kept = stats._kept["model.layers.1.self_attn"]
    q, k = kept.calls[0].q.double(), kept.pieces[0].double().repeat_interleave(2, 1)
    a = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~torch.ones(14, 14, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    compare(stats, 1, dense(a, causal=True))
    assert not torch.equal(stats["entropy"][0], exact["entropy"][0])
    torch.testing.assert_close(stats["entropy"][0], exact["entropy"][0], atol=0.05, rtol=0.05)
    with pytest.raises(CaptureError, match="quantised"):
        head_weights(scope, 0)


class Codes(torch.Tensor):
    """A float tensor kept as int8 codes and scales that knows how to multiply and little else, as torchao's tensors are."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    def __repr__(self):
        return f"Codes({list(self.shape)})"

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if function in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            plain = [arg.dequantize() if isinstance(arg, Codes) else arg for arg in args]
            return function(*plain, **(kwargs or {}))
        raise NotImplementedError(f"Codes: {function}")


def test_weights_in_tensors_of_a_quantisation_library():
    """Captured and profiled like any other; their circuits are those of the numbers they stand for."""
    model = make(llama)
    plain = copy.deepcopy(model)
    for one, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear, twin = getattr(one.self_attn, name), getattr(other.self_attn, name)
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (linear.weight.detach() / scale).round().to(torch.int8)
            linear.weight = torch.nn.Parameter(Codes(codes, scale), requires_grad=False)
            with torch.no_grad():
                twin.weight.copy_(codes * scale)
    scope, expected = Scope(model), Scope(plain)
    stats, wanted = scope.capture(ids(2, 14)), expected.capture(ids(2, 14))
    for name in wanted.names:
        for layer in (0, 1):
            torch.testing.assert_close(stats[name][layer], wanted[name][layer], atol=1e-5, rtol=1e-5, equal_nan=True)
    profile = scope.profile(["entropy"], data=ids(1, 20)[0], context=20, progress=False)
    assert profile.card.model["fingerprint"] == scope.fingerprint != expected.fingerprint
    model.model.layers[0].self_attn.q_proj.weight.codes[0, 0] += 1
    assert Scope(model).fingerprint != scope.fingerprint
    model.model.layers[0].self_attn.q_proj.weight.codes[0, 0] -= 1
    for part in ("q", "k", "v", "o"):
        assert torch.equal(getattr(head_weights(scope, 1), part), getattr(head_weights(expected, 1), part))


def test_recognising_a_host_imports_no_other_library():
    code = """
import sys, torch
from headscope.scope import Scope
from headscope.errors import CaptureError
class Own(torch.nn.Module):
    num_heads = 2
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert Scope(Own()).capture(torch.randn(1, 2, 5, 4), statistics="entropy")["entropy"][0].shape == (1, 2, 5)
for wrong in (3, "gpt2", None, torch.nn.Linear(2, 2)):
    try:
        Scope(wrong)
    except CaptureError:
        continue
    raise SystemExit("accepted")
loaded = [name for name in ("diffusers", "transformer_lens", "nnsight", "accelerate.big_modeling") if name in sys.modules]
raise SystemExit(" ".join(loaded[:3]) if {"diffusers", "transformer_lens", "nnsight"} & set(loaded) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrappers_are_refused_with_what_to_pass_instead():
    with pytest.raises(CaptureError, match="_orig_mod"):
        Scope(torch.compile(make(llama)))

    class Adapted(torch.nn.Module):
        def get_base_model(self):
            return None

    with pytest.raises(CaptureError, match=r"get_base_model\(\)"):
        Scope(Adapted())
