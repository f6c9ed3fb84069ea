"""The decode kernels in Triton's interpreter, against dense float64 attention under the same rules."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the gpu extra is not installed")

import headscope.kernels.sparse_decode_host as host
from headscope.call import AttentionCall, MaskFacts
from headscope.errors import PlanError, UnavailableError
from headscope.kernels.sparse_decode_call import decode_attention, decode_refuses, decode_worth_it, visits
from headscope.kernels.sparse_dispatch import sparse_attention, sparse_backend
from headscope.kernels.sparse_naive import naive_sparse_attention
from headscope.plans import Blocks, Budget, Dense, Lines, Pattern, Power, Span, Streaming, Strided, TopKeys
from headscope.plans.cache_store import LayerStore
from headscope.plans.indices import Chosen

_spec = importlib.util.spec_from_file_location("sparse_decode_cases", Path(__file__).with_name("sparse_decode_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["sparse_decode_cases"] = cases
_spec.loader.exec_module(cases)

PATTERNS: tuple[Pattern, ...] = (
    *(Dense(), Streaming(3, 20), Strided(10, 3, 1, 8, 2), Lines((0, 5, 9), (0, 3, 7))),
    *(Span(2, 0.3, 4), Power(9, 8, 1), Chosen((1, 5, 50), 70), Blocks(((0,), (0, 1), (1, 2)), 16)),
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(host, "launch_for", lambda *given: (16, 1, 1))


def call_of(rows: int = 1, padded: bool = False, offset: int = 0, **more: object) -> AttentionCall:
    gen = torch.Generator().manual_seed(rows + offset)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, heads, count, 32, generator=gen).to(device) for heads, count in ((8, rows), (2, 90), (2, 90)))
    first = torch.tensor([0, 17], device=device) if padded else None
    valid = None if first is None else torch.arange(offset, offset + 90, device=device)[None] >= first[:, None]
    mask = MaskFacts(causal=True, key_valid=valid)
    given = {"query_offset": 90 + offset - rows, "key_offset": offset, "first_token": first, **more}
    return AttentionCall("m", 0, q, k, v, 0.2, mask, **given)


@pytest.mark.parametrize("seed", range(24))
def test_random_steps_equal_dense_attention_under_the_same_rules(seed: int) -> None:
    one = cases.step(seed, (16, 40, 64), (torch.float32, torch.float32, torch.float16, torch.bfloat16), 90)
    cases.compare(one, one.run())


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_every_pattern_equals_its_naive_twin(padded: bool, offset: int) -> None:
    call = call_of(padded=padded, offset=offset, sink_logits=torch.randn(8), softcap=4.0)
    if torch.cuda.is_available():
        call = replace(call, sink_logits=None)
    assert decode_refuses(call, PATTERNS) == ""
    found, expected = decode_attention(call, PATTERNS), naive_sparse_attention(call, PATTERNS)
    assert torch.allclose(found[0].double(), expected[0], atol=2e-6, rtol=0)
    assert torch.allclose(found[1].double(), expected[1], atol=2e-6, rtol=0)


def test_the_dispatcher_runs_it_by_name_and_refuses_what_it_does_not_take() -> None:
    call = call_of()
    found = sparse_attention(call, PATTERNS, backend="decode")
    assert torch.equal(found[0], decode_attention(call, PATTERNS)[0])
    assert sparse_backend(call, PATTERNS) == ("decode" if call.q.is_cuda else "blocked")
    with pytest.raises(UnavailableError, match="chosen per input"):
        sparse_attention(call, (TopKeys(4),) * 8, backend="decode")


def test_a_few_rows_at_once() -> None:
    patterns = (Dense(), Streaming(3, 20), Span(2, 0.3, 4), Chosen((1, 5, 50), 70)) * 2
    for padded in (False, True):
        call = call_of(rows=4, padded=padded)
        found, expected = decode_attention(call, patterns), naive_sparse_attention(call, [one.fixed(90) for one in patterns])
        if not padded:  # a span's window is that of its own text's length, which differs in the batch
            assert torch.allclose(found[0].double(), expected[0], atol=2e-6, rtol=0)
        assert torch.allclose(found[0][0].double(), expected[0][0], atol=2e-6, rtol=0)


def test_plans_that_keep_everything_equal_dense_attention() -> None:
    call = call_of()
    assert call.v is not None
    group = [x.repeat_interleave(4, 1).double() for x in (call.k, call.v)]
    weights = torch.softmax(call.q.double() @ group[0].transpose(-1, -2) * call.scale, -1)
    dense = decode_attention(call, (Dense(),) * 8)[0]
    assert torch.allclose(dense.double(), (weights @ group[1]).transpose(1, 2), atol=2e-6, rtol=0)
    for every in (Streaming(0, 90), Streaming(90, 1), Chosen((), 0), Span(0, 1.0, 0)):
        assert torch.equal(decode_attention(call, (every,) * 8)[0], dense), every


def test_lengths_may_change_without_cutting_the_work_anew() -> None:
    """As in a captured graph: rules, lists and work of the longest text, lengths read by the kernel."""
    one = cases.step(1, (32,), (torch.float32,), 90)
    assert one.lists is not None
    shortest = int(one.lengths.min())
    for length in (max(one.q.shape[2], shortest // 3), shortest):
        shorter = replace(one, lengths=torch.full_like(one.lengths, length), starts=torch.zeros_like(one.starts))
        cases.compare(shorter, shorter.run())


def test_a_mixed_store_is_read_as_it_lies() -> None:
    """Full heads and rings of one layer, in separate memory, one launch."""
    heads = (Dense(), Streaming(2, 9), Streaming(3, 20), Streaming(1, 30))
    gen = torch.Generator().manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    k, v = (torch.randn(2, 2, 90, 32, generator=gen).to(device) for _ in range(2))
    q = torch.randn(2, 4, 1, 32, generator=gen).to(device)
    starts = torch.tensor([0, 17], device=device)
    store = LayerStore(heads, 2, None)
    for begin, end in ((0, 40), (40, 88), (88, 89), (89, 90)):
        store.append(k[:, :, begin:end], v[:, :, begin:end], starts)
    valid = torch.arange(90, device=device)[None] >= starts[:, None]
    call = AttentionCall("m", 0, q, k, v, 0.2, MaskFacts(True, key_valid=valid), query_offset=89, first_token=starts)
    from headscope.plans.execute_decode import Memory, store_step
    from headscope.plans.execute_heads import Heads

    found = store_step(replace(call, k=k[:, :, 89:], v=v[:, :, 89:]), Heads(heads), store, {}, Memory())
    expected, _ = naive_sparse_attention(call, heads)
    assert torch.allclose(found.double(), expected, atol=2e-6, rtol=0)
    assert store.bytes < 4 * 2 * 2 * 2 * 90 * 32


# ---- the cutting of the work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(90,), (1000, 10, 10), (131072, 131072, 1152, 1152, 1152), (1, 1, 1)])
def test_work_covers_every_key_head_once_and_fits_the_device(keys: tuple[int, ...]) -> None:
    work = host.cut(keys, 1, torch.device("cpu"), per_processor=8.0, least=16)
    table, spans = work.table.tolist(), work.spans.tolist()
    for head in range(len(keys)):
        first, count = spans[head]
        assert table[first : first + count] == [[head, part, count] for part in range(count)]
    assert len(table) == sum(count for _, count in spans)
    slots = max(len(keys), 32)
    assert work.parts <= slots
    longest = max(-(-host.rounded(one) // count) for one, (_, count) in zip(keys, spans, strict=True))
    smaller = sum(-(-host.rounded(one) // max(1, longest - 1)) for one in keys)
    assert smaller > slots or longest <= 16  # no smaller part would have fitted


def test_visits_are_what_the_neediest_head_of_a_group_reads() -> None:
    assert visits((Dense(), Streaming(4, 60), Streaming(4, 60), Streaming(0, 10)), 1000, 2) == [1000, 64]


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_calls_that_are_no_decode_steps_are_named() -> None:
    call = call_of()
    dense = (Dense(),) * 8
    assert "rows" in decode_refuses(call_of(rows=30), dense)
    assert "keeps other keys for each of 2 rows" in decode_refuses(call_of(rows=2), (Lines((0,)),) * 8)
    assert "not the last" in decode_refuses(replace(call, query_offset=50), dense)
    assert "chosen per input" in decode_refuses(call, (TopKeys(4),) * 8)
    assert "chosen per input" in decode_refuses(call, (Budget(4),) * 8)
    assert "compensation" in decode_refuses(call, (Streaming(2, 5, True),) * 8)
    assert "mask" in decode_refuses(replace(call, mask=MaskFacts(True, allowed=torch.ones(1, 1, 1, 90, dtype=torch.bool))), dense)
    assert "float64" in decode_refuses(replace(call, q=call.q.double(), k=call.k.double(), v=call.k.double()), dense)


def test_on_a_cpu_a_plan_always_runs() -> None:
    call = call_of()
    if not call.q.is_cuda:
        assert decode_worth_it(call, (Dense(),) * 8) == ""


def test_launches_that_no_kernel_takes_are_refused() -> None:
    one = cases.step(0, (16,), (torch.float32,), 40)
    with pytest.raises(PlanError, match="a decode step is at most"):
        replace(one, q=one.q.repeat(1, 1, 80, 1)).run()
    odd = host.KeyLists(*(torch.zeros(one.q.shape[0], one.k.shape[1], 1, dtype=torch.int32),) * 2, torch.zeros(1, 1, dtype=torch.int32), 24)
    with pytest.raises(PlanError, match="power of two"):
        replace(one, lists=odd).run()
