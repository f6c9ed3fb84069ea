"""Tensors on their way to the CPU: every byte arrives, in its own tensor, whatever the sizes; a device's part is played by stand-ins."""

from __future__ import annotations

from contextlib import nullcontext
from random import Random

import pytest
import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.capture import normaliser
from headscope.statistics import offload
from headscope.statistics.accumulate import Grid
from headscope.statistics.offload import Arriving, fetch


class OnDevice(torch.Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = property(lambda self: True)


class Quiet:
    """An event and a stream of a device that is always done."""

    def __init__(self, *_: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    wait_event = record

    def synchronize(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch):
    """Small buffers and batches, so that tensors are cut and share tasks; nothing touches CUDA."""
    for name in ("Event", "Stream"):
        monkeypatch.setattr(torch.cuda, name, Quiet)
    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    sizes = {"BUFFER": 1 << 14, "BATCH": 1 << 16, "LEAST": 1 << 10, "AHEAD": 1 << 16}
    for name, value in sizes.items():
        monkeypatch.setattr(offload, name, value)
    monkeypatch.setattr(offload, "_page_locked", lambda: torch.empty(offload.BUFFER, dtype=torch.uint8))
    for table in ("_pools", "_waiting", "_flying"):
        monkeypatch.setattr(offload, table, {})
    yield
    for pool in offload._pools.values():
        pool.shutdown()


def test_everything_arrives(device):
    rng = Random(0)
    sent, arriving = [], []
    for step in range(20):
        batch = [torch.randn(rng.randint(1, 20000)) for _ in range(rng.randint(1, 6))]
        batch += [torch.randint(0, 9, (3, rng.randint(1, 700))), torch.randn(40, 30)[:, ::2], torch.zeros(0, 3), torch.ones(5) > 0]
        sent += batch
        arriving += fetch([x.as_subclass(OnDevice) for x in batch])
        if step == 7:
            offload.start()
    for x, one in zip(sent, arriving, strict=True):
        got = one.result()
        assert type(got) is torch.Tensor or not x.numel()
        assert got.dtype == x.dtype
        assert torch.equal(got, x)


def test_results_made_in_inference_mode_are_ordinary_tensors(device):
    with torch.inference_mode():
        one = fetch([torch.arange(70000).as_subclass(OnDevice)])[0]
    assert torch.equal(one.result(), torch.arange(70000))
    assert not one.result().is_inference()


def test_a_failed_copy_is_raised_where_the_result_is_read(device, monkeypatch):
    monkeypatch.setattr(offload, "_move", lambda *_: (_ for _ in ()).throw(RuntimeError("lost")))
    one = fetch([torch.ones(10).as_subclass(OnDevice)])[0]
    with pytest.raises(RuntimeError, match="lost"):
        one.result()


@pytest.mark.parametrize("how", ["add", "max"])
def test_a_grid_adds_up_what_arrives_and_what_is_placed(how):
    gen = torch.Generator().manual_seed(0)
    mixed, plain = Grid(how), Grid(how)
    for turn in range(12):
        piece = torch.rand(2, 3 + turn % 4, 5, generator=gen)
        at = (turn // 2, turn % 3)
        plain.place(piece, *at)
        if turn % 3 == 1:
            mixed.place(piece, *at)
        else:
            mixed.expect(Arriving(piece.clone()), *at)
        torch.testing.assert_close(mixed.value(), plain.value())


def test_an_lse_is_only_taken_for_the_call_it_belongs_to():
    q, k = torch.randn(1, 4, 256, 64), torch.randn(1, 2, 256, 64)
    heard = normaliser.Listening()
    heard.lse, heard.causal, heard.keys, heard.scale = torch.randn(1, 4, 256), True, 256, 0.125

    def of(**change):
        parts = {"q": q, "k": k, "v": None, "scale": 0.125, "mask": MaskFacts(True), **change}
        return heard.lse_of(AttentionCall("attention", 0, **parts))

    assert of() is heard.lse
    changes = [{"mask": MaskFacts(True, window=9)}, {"mask": MaskFacts(False)}, {"scale": 0.25}, {"softcap": 5.0}, {"query_offset": 8}]
    changes += [{"k": k[:, :, 1:]}, {"q": q[:, :, 1:]}, {"sink_logits": torch.zeros(4)}]
    assert all(of(**change) is None for change in changes)


def test_a_wrong_lse_is_not_believed():
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 200, 32, generator=gen), torch.randn(1, 2, 200, 32, generator=gen)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 32**-0.5
    lse = scores.masked_fill(torch.ones(200, 200).triu(1) > 0, -torch.inf).logsumexp(-1)
    given = {"query": q, "key": k, "value": k, "is_causal": True}
    assert normaliser._right(given, lse)
    assert normaliser._right(given, lse[..., None])
    assert not normaliser._right(given, lse * 1.4427)  # base 2
    assert not normaliser._right(given, scores.logsumexp(-1))  # no mask
    assert not normaliser._right(given, lse.roll(1, 1))  # other heads
