"""The fallback: any module that calls torch's scaled_dot_product_attention, with torch's own meaning of its arguments."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as bound_early

from headscope.errors import CaptureError, DataError, StatisticError
from headscope.interventions import HeadMask
from headscope.scope import Scope

from .tiny_models import IDS, VOCABULARY, compare, dense, eager_copy, ids, make, padding


class Attention(nn.Module):
    """What most hand-written attention looks like; `how` are the arguments of the call."""

    def __init__(self, width=32, heads=4, kv_heads=None, **how):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads or heads, width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * self.num_kv_heads * self.head_dim)
        self.proj = nn.Linear(width, width)
        self.how = how
        self.record = None

    def forward(self, x, context=None):
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.num_kv_heads, -1)).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        how = {name: value(x) if callable(value) else value for name, value in self.how.items()}
        self.record = (q.detach(), k.detach(), how)
        return self.proj(functional.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, blocks=2, **kw):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(**kw) for _ in range(blocks)])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def net(**kw):
    torch.manual_seed(0)
    model = Net(**kw).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(0, 0.3)
    return model


def rows(n=12, batch=2):
    return torch.randn(batch, n, 32, generator=torch.Generator().manual_seed(1))


def matrix(attention):
    """A [B, H, N, M] of the attention's last call, by torch's documentation."""
    q, k, how = attention.record
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = q @ k.transpose(-1, -2) * (how.get("scale") or q.shape[-1] ** -0.5)
    n, m = score.shape[-2:]
    if how.get("is_causal"):
        score = score.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(), -torch.inf)
    mask = how.get("attn_mask")
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask.double()
    return score.softmax(-1)


def causal_mask(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def slopes(x):
    """An additive mask per head, [H, N, N]: torch aligns it from the right, so its first dimension is heads and not batch."""
    n = x.shape[1]
    gap = (torch.arange(n)[:, None] - torch.arange(n)[None]).float()
    return -gap.abs() * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


def last_keys_hidden(x):
    mask = torch.ones(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool)
    mask[1, ..., -3:] = False
    return mask


def added(x):
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill(~causal_mask(x), -torch.inf)


CASES = {
    "plain": ({}, False),
    "causal": ({"is_causal": True}, True),
    "scale": ({"scale": 0.7}, False),
    "grouped": ({"kv_heads": 2, "enable_gqa": True, "is_causal": True}, True),
    "mask": ({"attn_mask": causal_mask}, True),
    "additive": ({"attn_mask": added}, True),
    "slopes": ({"attn_mask": slopes}, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("traced", [False, True], ids=["attributes", "example"])
def test_statistics_are_those_of_torchs_definition(case, traced):
    kw, causal = CASES[case]
    model, x = net(**kw), rows()
    scope = Scope(model, example=x) if traced else Scope(model)
    stats = scope.capture(x)
    assert stats.kernels == {"sdpa"}
    for layer in (0, 1):
        compare(stats, layer, dense(matrix(model.blocks[layer]), causal=causal))
    with torch.no_grad():
        before = model(x)
        with scope.observe():
            assert torch.equal(model(x), before)


def test_hidden_keys_are_padding():
    model, x = net(attn_mask=last_keys_hidden), rows()
    stats = Scope(model).capture(x)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, -3:] = False
    assert torch.equal(stats.valid, valid)
    compare(stats, 0, dense(matrix(model.blocks[0]), causal=False, row_valid=valid))


def test_topology_from_attributes_and_from_an_example():
    model = net(kv_heads=2, enable_gqa=True, is_causal=True)
    for scope in (Scope(model), Scope(model, example=rows())):
        assert [record.name for record in scope.topology.main] == ["blocks.0", "blocks.1"]
        first = scope.topology[0]
        assert (first.heads, first.kv_heads, first.head_dim, first.output) == (4, 2, 8, "blocks.0.proj")
        assert scope.host.kind == "module"
    assert Scope(model, example=rows()).topology[0].causal
    assert Scope(net(attn_mask=causal_mask), example=rows()).topology[0].causal
    assert not Scope(net(), example=rows()).topology[0].causal


def test_dict_and_tuple_inputs():
    model, x = net(), rows()
    expected = Scope(model).capture(x)["entropy"][0]
    for data in ({"x": x}, (x,)):
        assert torch.equal(Scope(model, example=data).capture(data)["entropy"][0], expected)


def test_a_masked_head():
    model, x = net(is_causal=True), rows()
    with torch.no_grad():
        with Scope(model).intervene(HeadMask(heads=[(1, 2)])):
            changed = model(x)
        model.blocks[1].proj.weight[:, 16:24] = 0
        torch.testing.assert_close(changed, model(x), atol=1e-6, rtol=0)


class Nested(nn.Module):
    """A function bound at import time, called from a core that is a module of its own, in a class whose heads have another name."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(32, 96)
        self.core = Core()

    def forward(self, x):
        return x + self.core(*self.to_qkv(x).unflatten(-1, (3, 8, 4)).permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)


class Core(nn.Module):
    def forward(self, q, k, v):
        return bound_early(q, k, v)


def test_heads_without_a_name_need_an_example():
    model = Nested().eval()
    with pytest.raises(CaptureError, match=r"core \(Core\).*names no number of heads.*example=inputs"):
        Scope(model)
    scope = Scope(model, example=rows())
    record = scope.topology["core"]
    assert (record.layer, record.heads, record.head_dim) == (0, 8, 4)
    assert scope.capture(rows())["entropy"][0].shape == (2, 8, 12)


# ---- transformers models off the interface -----------------------------------------------------------------------------


def falcon(impl="sdpa", **kw):
    config = hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS, **kw)
    return hf.FalconForCausalLM._from_config(config, attn_implementation=impl)


FALCONS = {"multi_query": {}, "alibi": {"alibi": True}, "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2}}


@pytest.mark.parametrize("kind", FALCONS)
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_falcon(kind, pad, monkeypatch):
    model = make(falcon, **FALCONS[kind])
    tokens, mask = ids(2, 14), padding(pad, 2, 14)
    stats = Scope(model).capture(tokens, attention_mask=mask)
    assert stats.kernels == {"sdpa"}
    seen = []

    def recording(q, k, v, **how):
        seen.append(Attention())
        seen[-1].record = (q, k, how)
        return bound_early(q, k, v, **how)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recording)
    with torch.no_grad():  # (its eager branch adds ALiBi twice, and so is no oracle)
        logits = model(tokens, attention_mask=mask).logits
        if kind != "alibi":
            eager = eager_copy(model)(tokens, attention_mask=mask).logits
            real = slice(None) if mask is None else mask.bool()
            torch.testing.assert_close(eager[real], logits[real], atol=1e-5, rtol=1e-4)
    assert len(seen) == 2
    for layer, call in enumerate(seen):
        a = matrix(call).nan_to_num()  # rows that see nothing
        compare(stats, layer, dense(a, causal=True, row_valid=mask), 2e-5)


@pytest.mark.parametrize("kind", ["multi_query", "alibi"])
def test_falcon_decodes_with_its_cache(kind):
    model = make(falcon, **FALCONS[kind])
    scope = Scope(model)
    whole = scope.capture(ids(1, 10), generate=4)
    again = scope.capture(whole.tokens)
    for name in ("entropy", "column_sum", "sink_importance", "row_max"):
        torch.testing.assert_close(whole[name][1], again[name][1], atol=1e-5, rtol=1e-5)
    chunked = scope.capture(whole.tokens, chunk=5)
    torch.testing.assert_close(chunked["sink_importance"][1], again["sink_importance"][1], atol=1e-5, rtol=1e-5)


def test_falcon_under_eager_is_refused_with_the_remedy():
    with pytest.raises(CaptureError, match=r"FalconAttention.*never reached.*_attn_implementation='sdpa'"):
        Scope(make(falcon, "eager")).capture(ids(1, 6))


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (hf.GPTJForCausalLM, hf.GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, **IDS)),
        (hf.BloomForCausalLM, hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4, **IDS)),
    ],
)
def test_a_softmax_of_ones_own_is_refused(cls, config):
    with pytest.raises(CaptureError, match=f"{cls.__name__}.*use a model"):
        Scope(cls(config))


# ---- refusals ----------------------------------------------------------------------------------------------------------


def test_modules_without_the_function_are_refused():
    with pytest.raises(CaptureError, match=r"MultiheadAttention keeps its q"):
        Scope(nn.TransformerEncoderLayer(32, 4))
    with pytest.raises(CaptureError, match="none of its modules calls"):
        Scope(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(CaptureError, match="none of its modules calls"):
        Scope(nn.Linear(2, 2), example=torch.zeros(1, 2))
    with pytest.raises(CaptureError, match=r"pass model\.module"):
        Scope(nn.DataParallel(net()))


def test_facts_that_do_not_fit_are_refused():
    model = net()
    scope = Scope(model)
    model.blocks[1].num_heads, model.blocks[1].num_kv_heads = 2, 2
    with pytest.raises(CaptureError, match=r"blocks\.1: q .*4 heads of 8.*example=inputs"):
        scope.capture(rows())

    class Folded(Attention):
        def forward(self, x):
            q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2).flatten(0, 1)
            return functional.scaled_dot_product_attention(q, q, q).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)

    with pytest.raises(CaptureError, match="heads and batch cannot be told apart"):
        Scope(Folded()).capture(rows())


def test_keys_from_nowhere_are_refused_and_cross_attention_is_not():
    class Reader(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.add_module(name, Attention())

        def forward(self, x, y):
            return next(self.children())(x, y)

    given = (rows(5), rows(9))
    with pytest.raises(CaptureError, match=r"5 queries and 9 keys.*cannot be seen"):
        Scope(Reader("attention")).capture(given)
    for scope in (Scope(Reader("cross_attention").eval()), Scope(Reader("attention").eval(), example=given)):
        name = scope.topology.modules[0].name
        assert scope.topology[name].kind == "cross"
        stats = scope.capture(given)
        a = matrix(next(scope.model.children()))
        torch.testing.assert_close(stats["column_sum"][name].double(), a.sum(2), atol=1e-5, rtol=0)
        with pytest.raises(StatisticError):
            stats["distance"][name]


def test_dropout_is_refused():
    with pytest.raises(CaptureError, match="dropout"):
        Scope(net(dropout_p=0.1)).capture(rows())


def test_an_unlisted_caller_is_refused():
    class Odd(Net):
        def forward(self, x):
            q = super().forward(x).unflatten(-1, (4, 8)).transpose(1, 2)
            return getattr(functional, "_".join(["scaled", "dot", "product", "attention"]))(q, q, q)

    with pytest.raises(CaptureError, match="outside of the modules known"):
        Scope(Odd()).capture(rows())


def test_a_fused_path_switched_off_is_refused():
    class Switch(Attention):
        fused_attn = True

        def forward(self, x):
            return super().forward(x) if self.fused_attn else x

    model = nn.Sequential(Switch(), Switch())
    scope = Scope(model)
    model[1].fused_attn = False
    with pytest.raises(CaptureError, match=r"^1 \(Switch\).*fused_attn = True"):
        scope.capture(rows())


def test_text_and_options_of_text_are_refused():
    scope = Scope(net())
    with pytest.raises(DataError, match="does not read token ids"):
        scope.capture("text")
    with pytest.raises(DataError, match="chunk="):
        scope.capture(rows(), chunk=4)


# ---- guards ------------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind():
    model, x = net(), rows()
    scope = Scope(model)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.blocks[1].proj.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), scope.observe():
        model(x)
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with scope.observe("entropy") as outer, scope.observe("entropy") as inner:
        model(x)
    assert torch.equal(outer["entropy"][1], inner["entropy"][1])
    assert len(outer.passes) == 1
    two = net(is_causal=True)
    with scope.observe("entropy") as mine, Scope(two).observe("entropy") as other:
        model(x)
        two(x)
    assert torch.equal(mine["entropy"][0], outer["entropy"][0])
    assert not torch.equal(mine["entropy"][0], other["entropy"][0])
    gone = weakref.ref(model)
    del model, scope, handle
    gc.collect()
    assert gone() is None
