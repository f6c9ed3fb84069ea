"""Rows of A and streaming outputs made at the seam: against a dense float64 softmax with every fact of a mask, and autograd through it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from headscope import Scope
from headscope.call import AttentionCall, MaskFacts
from headscope.errors import DataError, ProbeError
from headscope.probes import BlockSparsity, DuoGates, DuoSurrogate, FlexPrefill, MInference, Moa, ProbeText, Work, XAttention
from headscope.probes.calls import (
    check_streaming,
    context_of,
    each_call,
    full_output,
    score_rows,
    streaming_output,
    streaming_rows,
    texts_of,
    weight_rows,
)
from headscope.profile.journal import Journal

HEADS, KV, N, D = 4, 2, 37, 8


def made(
    *, kv: int = KV, window: int | None = None, softcap: float | None = None, sinks: bool = False, bias: bool = False
) -> AttentionCall:
    source = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, N, D, generator=source, dtype=torch.float64) for heads in (HEADS, kv, kv))
    mask = MaskFacts(True, window, bias=torch.randn(1, HEADS, N, N, generator=source, dtype=torch.float64) if bias else None)
    logits = torch.randn(HEADS, generator=source, dtype=torch.float64) if sinks else None
    return AttentionCall("m", 0, q, k, v, 0.4, mask, softcap=softcap, sink_logits=logits)


def dense(call: AttentionCall, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, outputs) of every row under `allowed` [N, N], one head at a time and with nothing shared."""
    weights, outputs = torch.zeros(HEADS, N, N, dtype=torch.float64), torch.zeros(N, HEADS, D, dtype=torch.float64)
    for head, row in itertools.product(range(HEADS), range(N)):
        keys = [s for s in range(row + 1) if bool(allowed[row, s]) and (call.mask.window is None or row - s < call.mask.window)]
        kv = head // (HEADS // call.k.shape[1])
        scores = []
        for s in keys:
            score = float(call.q[0, head, row] @ call.k[0, kv, s]) * call.scale
            score = call.softcap * math.tanh(score / call.softcap) if call.softcap else score
            scores.append(score + (float(call.mask.bias[0, head, row, s]) if call.mask.bias is not None else 0.0))
        total = sum(math.exp(one) for one in scores) + (math.exp(float(call.sink_logits[head])) if call.sink_logits is not None else 0.0)
        for s, score in zip(keys, scores, strict=True):
            weights[head, row, s] = math.exp(score) / total
            outputs[row, head] += weights[head, row, s] * call.v[0, kv, s]
    return weights, outputs


FACTS = [
    {},
    {"kv": 4},
    {"kv": 1},
    {"window": 9},
    {"softcap": 1.5},
    {"sinks": True},
    {"bias": True},
    {"window": 20, "softcap": 2.0, "sinks": True},
]


@pytest.mark.parametrize("facts", FACTS, ids=[",".join(one) or "plain" for one in FACTS])
def test_rows_and_streaming_outputs_are_exact(facts: dict) -> None:
    call = made(**facts)
    everything = torch.ones(N, N, dtype=torch.bool)
    weights, outputs = dense(call, everything)
    torch.testing.assert_close(weight_rows(call, 5, 20, torch.float64)[0], weights[:, 5:20], atol=1e-12, rtol=0)
    torch.testing.assert_close(full_output(call, rows=16)[0], outputs, atol=1e-12, rtol=0)
    behind = torch.arange(N)[:, None] - torch.arange(N)
    for sink, recent in ((3, 6), (0, 1), (5, 40)):
        _, near = dense(call, (behind < recent) | (torch.arange(N) < sink))
        torch.testing.assert_close(streaming_output(call, sink, recent, rows=10)[0], near, atol=1e-12, rtol=0)
        torch.testing.assert_close(streaming_rows(call, 30, 37, sink, recent)[0].transpose(0, 1), near[30:], atol=1e-12, rtol=0)


def test_scores_of_chosen_columns_are_those_of_all() -> None:
    call = made(window=12, bias=True)
    columns = torch.tensor([0, 3, 11, 30])
    assert torch.equal(score_rows(call, 8, 33, columns), score_rows(call, 8, 33)[..., columns])


def test_gradients_go_through_streaming_and_full_outputs() -> None:
    call = made()
    for leaf in (call.q, call.k, call.v):
        leaf.requires_grad_(True)
    wanted = torch.randn(1, N, HEADS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    behind = torch.arange(N)[:, None] - torch.arange(N)
    for make, allowed in (
        (lambda: streaming_output(call, 3, 6, rows=10), (behind >= 0) & ((behind < 6) | (torch.arange(N) < 3))),
        (lambda: full_output(call), behind >= 0),
    ):
        mine = torch.autograd.grad((make() * wanted).sum(), (call.q, call.k, call.v))
        k, v = (part.repeat_interleave(HEADS // KV, 1) for part in (call.k, call.v))
        plain = torch.softmax((call.q @ k.transpose(-1, -2) * call.scale).masked_fill(~allowed, -math.inf), -1) @ v
        theirs = torch.autograd.grad((plain.transpose(1, 2) * wanted).sum(), (call.q, call.k, call.v))
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_each_call_shows_every_layer_and_changes_nothing(tiny_llama) -> None:
    scope, ids = Scope(tiny_llama), torch.arange(3, 43)
    seen = []
    before = tiny_llama(ids[None]).logits
    each_call(scope, ids, lambda call, output: seen.append((call.layer, tuple(output.shape))))
    assert seen == [(0, (1, 40, 4, 8)), (1, (1, 40, 4, 8))]
    assert torch.equal(tiny_llama(ids[None]).logits, before)


@pytest.mark.parametrize(("sink", "recent", "words"), [(64, 192, "keep every key"), (-1, 5, "they count keys"), (3, 0, "sees itself")])
def test_a_window_that_keeps_everything_is_refused(sink: int, recent: int, words: str) -> None:
    with pytest.raises(ProbeError, match=words):
        check_streaming("p", sink, recent, 256)


def test_texts_and_contexts(tiny_llama) -> None:
    scope = Scope(tiny_llama)
    assert context_of(scope, Work(Journal())) == 256
    with pytest.raises(DataError, match="was made for 256"):
        context_of(scope, Work(Journal(), context=257))
    (drawn,) = texts_of(scope, None, Work(Journal(), context=100))
    assert (drawn.kind, drawn.block, len(drawn)) == ("repeated_random", 20, 80)
    rows = texts_of(scope, torch.arange(60).view(2, 30), Work(Journal()))
    assert [text.ids.tolist() for text in rows] == [list(range(30)), list(range(30, 60))]


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "bfloat16"])
def test_every_probe_reads_other_models(kind: str) -> None:
    """No rotary embedding and one key head per head; a sliding window; half precision: finite numbers of the right shape."""
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=200, n_positions=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        window = 64 if kind == "mistral" else None
        model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, max_position_embeddings=300, sliding_window=window))
    scope = Scope((model.to(torch.bfloat16) if kind == "bfloat16" else model).eval())
    ids = torch.randint(2, 200, (260,), generator=torch.Generator().manual_seed(0))
    found = [
        DuoGates(steps=2, sink=4, recent=16).run(scope, context=120),
        DuoSurrogate(sink=4, recent=16).run(scope, context=120),
        MInference(scoring="outputs").run(scope, data=ids),
        Moa(response=8, block=32).run(scope, data=ids),
        FlexPrefill(block=32).run(scope, data=ids),
        XAttention(block=32).run(scope, data=ids),
        BlockSparsity(block=32).run(scope, ProbeText.natural(ids)),
    ]
    for result in found:
        for metric in result.probe.metrics:
            values = result[metric.name]
            assert values.shape == (2, 4), metric.name
            low, high = (math.inf if bound is None else bound for bound in metric.range)
            assert bool(values.isfinite().all())
            assert float(values.min()) >= (-math.inf if low == math.inf else low - 1e-6)
            assert float(values.max()) <= high + 1e-3, metric.name
