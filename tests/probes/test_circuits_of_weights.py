"""OV copying and composition: against matrices that are made in full, in float64, and against TransformerLens."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import ProbeError
from headscope.models.bundled import BUNDLED
from headscope.models.planted import Duplicate, Induction, Previous, Sink, planted_llama
from headscope.probes import Composition, LogitAttribution, OvCopying
from headscope.probes.composition import KINDS
from headscope.probes.stream import NormForm, read_stream
from headscope.scope import Scope
from headscope.topology import Topology


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            **more,
        }
    )
    model = LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    return model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=53, n_embd=24, n_head=3, n_layer=2, n_positions=32, initializer_range=0.3, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def head_of(model, layer: int, head: int):
    """W_Q, W_K, W_V [d, D], W_O [D, d], gain of the norm before, and whether it centres; straight from the parameters."""
    if isinstance(model, LlamaForCausalLM):
        block, width = model.model.layers[layer], model.config.head_dim
        own, shared = slice(head * width, (head + 1) * width), slice(head // 2 * width, (head // 2 + 1) * width)
        attention = block.self_attn
        q, k, v = attention.q_proj.weight[own].T, attention.k_proj.weight[shared].T, attention.v_proj.weight[shared].T
        return q, k, v, attention.o_proj.weight[:, own].T, block.input_layernorm.weight, False
    block, width = model.transformer.h[layer], model.config.n_embd // model.config.n_head
    own = slice(head * width, (head + 1) * width)
    q, k, v = (part[:, own] for part in block.attn.c_attn.weight.split(model.config.n_embd, 1))
    return q, k, v, block.attn.c_proj.weight[own], block.ln_1.weight, True


def folded(weight: torch.Tensor, gain: torch.Tensor, centred: bool) -> torch.Tensor:
    matrix = gain.diag()
    if centred:
        matrix = (torch.eye(len(gain), dtype=gain.dtype) - 1 / len(gain)) @ matrix
    return matrix @ weight


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("norms", ["fold", "ignore"])
@torch.no_grad()
def test_ov_copying_is_that_of_the_whole_matrix(make, norms):
    """Eigenvalues of W_E W_V W_O W_U [V, V] itself; with norms, each map of the norm as a matrix."""
    model = make()
    found = OvCopying(norms=norms).run(Scope(model))["ov_copying"]
    last = model.model.norm if make is llama else model.transformer.ln_f
    embed, unembed = model.get_input_embeddings().weight, model.get_output_embeddings().weight.T
    for layer in range(found.shape[0]):
        for head in range(found.shape[1]):
            _, _, v, o, gain, centred = head_of(model, layer, head)
            end = unembed
            if norms == "fold":
                v, end = folded(v, gain, centred), folded(unembed, last.weight, centred)
            values = torch.linalg.eigvals(embed @ v @ o @ end)
            want = float(values.sum().real / values.abs().sum())
            assert float(found[layer, head]) == pytest.approx(want, abs=1e-9), (layer, head)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("norms", ["fold", "ignore"])
@torch.no_grad()
def test_composition_is_that_of_the_whole_matrices(make, norms):
    """Every pair from [d, d] products; the metric is the largest, the table holds the pairs in order."""
    model = make()
    result = Composition(norms=norms, top=10_000).run(Scope(model))
    layers, heads = result["k_composition"].shape
    assert all(result[f"{kind}_composition"][0].isnan().all() for kind in KINDS)
    seen = {}
    for layer in range(layers):
        for head in range(heads):
            q, k, v, o, gain, centred = head_of(model, layer, head)
            if norms == "fold":
                q, k, v = (folded(one, gain, centred) for one in (q, k, v))
            seen[layer, head] = (v @ o, q @ k.T)
    for row in result.tables["pairs"].itertuples():
        assert row.writer_layer < row.reader_layer
        ov, reader = seen[row.writer_layer, row.writer_head][0], seen[row.reader_layer, row.reader_head]
        right = {"Q": reader[1], "K": reader[1].T, "V": reader[0]}[row.kind]
        want = float((ov @ right).norm() / (ov.norm() * right.norm()))
        assert row.score == pytest.approx(want, abs=1e-12)
    table = result.tables["pairs"]
    assert len(table) == 3 * heads * heads * layers * (layers - 1) // 2
    for kind in KINDS:
        best = table[table.kind == kind.upper()].groupby(["reader_layer", "reader_head"]).score.max()
        assert {place: pytest.approx(value, abs=1e-12) for place, value in best.items()} == {
            (layer, head): float(result[f"{kind}_composition"][layer, head]) for layer in range(1, layers) for head in range(heads)
        }


@torch.no_grad()
def test_chance_level_is_what_random_turns_average_to():
    """E |A R B|^2 / (|A|^2 |B|^2) over random rotations R is 1 / d for any spectra; baseline=True takes its root away."""
    model = llama()
    scope = Scope(model)
    plain, less = Composition().run(scope), Composition(baseline=True).run(scope)
    chance = plain.numbers["composition_baseline"]
    assert chance == pytest.approx(32**-0.5)
    torch.testing.assert_close(less["k_composition"], plain["k_composition"] - chance, equal_nan=True)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 8, generator=generator).double() @ torch.randn(8, 32, generator=generator).double()
    b = torch.randn(32, 32, generator=generator).double() * torch.linspace(0, 3, 32).double()
    draws = []
    for _ in range(400):
        turn = torch.linalg.qr(torch.randn(32, 32, generator=generator).double()).Q
        draws.append(float((a @ turn @ b).square().sum() / (a.square().sum() * b.square().sum())))
    assert sum(draws) / len(draws) == pytest.approx(1 / 32, rel=0.05)


def test_planted_heads_copy_or_write_nothing():
    """An induction head that copies: W_E W_OV W_U = gain C C^T, all eigenvalues positive. Its feeder writes where no logit reads."""
    planted = planted_llama({(0, 0): Previous(), (0, 1): Duplicate(), (1, 2): Induction(), (1, 3): Sink()}, layers=2)
    scope = Scope(planted.model, name="planted")
    copying = OvCopying().run(scope)["ov_copying"]
    assert float(copying[1, 2]) == pytest.approx(1, abs=1e-6)
    copying[1, 2] = 0
    assert (copying == 0).all()
    result = Composition().run(scope)
    pairs = result.tables["pairs"]
    top = pairs[pairs.kind == "K"].iloc[0]
    assert (top.reader_layer, top.reader_head, top.writer_layer, top.writer_head) == (1, 2, 0, 0)
    assert result.top("k_composition", 1) == [(1, 2)]
    assert float(result["k_composition"][1].sum()) == pytest.approx(float(result["k_composition"][1, 2])), "no other head reads the feeder"


def test_bundled_induction_heads_read_the_previous_token_head():
    truth = BUNDLED["induction"].truth
    scope = hs.load("bundled:induction")
    feeders = {tuple(place) for place in truth["previous_token"]}
    readers = {tuple(place) for place in truth["induction"]}
    pairs = Composition().run(scope).tables["pairs"]
    top = pairs[pairs.kind == "K"].head(len(readers))
    assert {(row.writer_layer, row.writer_head) for row in top.itertuples()} <= feeders
    assert {(row.reader_layer, row.reader_head) for row in top.itertuples()} == readers
    copying = OvCopying().run(scope)["ov_copying"]
    assert all(float(copying[place]) > 0.5 for place in readers)
    assert all(float(copying[place]) < 0.5 for place in feeders)


@torch.no_grad()
def test_transformer_lens_agrees():
    """The library on the same weights: its composition scores of all pairs, its eigenvalues of the full OV circuit."""
    from transformer_lens import FactoredMatrix
    from transformer_lens.model_bridge import TransformerBridge

    scope = hs.load("bundled:induction")
    model = copy.deepcopy(scope.model)
    bridge = TransformerBridge.boot_transformers("induction", hf_model=model, tokenizer=scope.tokenizer, device="cpu")
    result = Composition(top=1000).run(scope)
    for kind in "QKV":
        theirs = bridge.all_composition_scores(kind)
        for row in result.tables["pairs"].itertuples():
            if row.kind == kind:
                want = float(theirs[row.writer_layer, row.writer_head, row.reader_layer, row.reader_head])
                assert row.score == pytest.approx(want, rel=1e-3), (kind, row)
    ours = OvCopying(norms="ignore").run(scope)["ov_copying"]
    embed, unembed = model.get_input_embeddings().weight, model.lm_head.weight.T
    for layer in range(2):
        for head in range(4):
            whole = FactoredMatrix(embed @ bridge.W_V[layer, head], bridge.W_O[layer, head] @ unembed)
            values = whole.eigenvalues
            assert float(ours[layer, head]) == pytest.approx(float(values.sum().real / values.abs().sum()), abs=1e-4)


@torch.no_grad()
def test_forms_of_norms_are_measured():
    """LayerNorm, RMSNorm, a gain of 1 + w: folding gives the norm's own derivative direction, for odd widths too."""

    class Shifted(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(width).double())

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    for width in (12, 13):
        layer = torch.nn.LayerNorm(width).double()
        layer.weight.data.uniform_(0.5, 2)
        layer.bias.data.normal_()
        form = NormForm.of("n", layer, width, torch.zeros(1).double())
        assert form.centred
        torch.testing.assert_close(form.gain, layer.weight.data, rtol=1e-6, atol=1e-8)
        rounded = copy.deepcopy(layer).to(torch.bfloat16)
        half = NormForm.of("n", rounded, width, torch.zeros(1, dtype=torch.bfloat16))
        torch.testing.assert_close(half.gain, rounded.weight.data.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(form.bias, layer.bias.data)
        x = torch.randn(width).double()
        parts = torch.randn(5, width).double()
        parts[4] = x - parts[:4].sum(0)
        torch.testing.assert_close(form.frozen(parts, x, layer(x)).sum(0) + form.bias, layer(x), rtol=1e-6, atol=1e-8)
        own = Shifted(width)
        form = NormForm.of("n", own, width, torch.zeros(1).double())
        assert not form.centred
        torch.testing.assert_close(form.gain, 1 + own.weight.data, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(form.frozen(parts, x, own(x)).sum(0), own(x), rtol=1e-6, atol=1e-8)


def test_refusals():
    scope = Scope(llama())
    with pytest.raises(ProbeError, match=r"unknown norms=.*fold, ignore"):
        OvCopying(norms="drop")
    with pytest.raises(ProbeError, match="top=0"):
        Composition(top=0)
    with pytest.raises(ProbeError, match=r"it reads weights only; leave data out"):
        OvCopying().run(scope, "some text")
    with pytest.raises(ProbeError, match=r"it has one layer"):
        Composition().run(Scope(llama(num_hidden_layers=1)))
    headless = Scope(llama().model)
    with pytest.raises(ProbeError, match=r"LlamaModel has no output embedding"):
        OvCopying().run(headless)
    assert Composition().run(headless)["k_composition"].shape == (3, 4)
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ProbeError, match=r"looks both ways"):
        Composition().run(Scope(BertForMaskedLM(config).eval()))


def test_a_layer_whose_attention_is_not_simply_added_is_refused():
    """A residual that is scaled on the way would make every circuit through it wrong by that factor."""
    model = llama()
    assert set(read_stream(Scope(model)).layers) == {0, 1, 2}
    block = model.model.layers[1]

    def forward(hidden_states, **kwargs):
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        middle = 0.7 * hidden_states + attended
        return middle + block.mlp(block.post_attention_layernorm(middle))

    block.forward = forward
    with pytest.raises(ProbeError, match=r"layers\.1\.self_attn .*not simply added to the residual stream"):
        read_stream(Scope(model))


def test_heads_without_an_output_projection_are_refused():
    scope = Scope(llama())
    modules = tuple(replace(module, output=None) if module.layer == 2 else module for module in scope.topology.modules)
    scope.topology = Topology(modules, scope.topology.model_class)
    for probe in (OvCopying(), Composition(), LogitAttribution(task="repeat")):
        with pytest.raises(ProbeError, match=r"layers\.2\.self_attn has no output projection W_O"):
            probe.run(scope)
