"""The planted model as a model: padding, decoding, prediction and its circuits, positions, the parts it is built from, and refusals."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from headscope.errors import DataError, ModelError
from headscope.models.planted import (
    BlockLocal,
    Duplicate,
    Induction,
    Offset,
    Previous,
    Sink,
    Uniform,
    Vertical,
    VisionLabel,
    planted_llama,
)
from headscope.models.planted.codes import codes, worst_cosine
from headscope.models.planted.rotary import rotary

MIXED = {
    (0, 1): Previous(),
    (0, 2): Duplicate(),
    (0, 3): Vertical(tokens=(0, 9, 70)),
    (1, 0): Induction(),
    (1, 1): Offset(7),
    (1, 2): VisionLabel((5, 6, 8)),
    (1, 3): Sink(),
    (1, 4): Vertical(positions=(0, 3, 40)),
    (1, 5): BlockLocal(16),
    (1, 6): Duplicate(),
    (2, 0): BlockLocal(50),
    (2, 5): Induction(copies=False),
    (2, 7): Vertical(positions=(99,)),
}


@pytest.fixture(scope="module")
def mixed():
    return planted_llama(MIXED, layers=3, kv_heads=4)


@contextmanager
def eager(model):
    """The eager kernel, which returns its weights; the model's own afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attentions(planted, ids, mask=None):
    with eager(planted.model), torch.no_grad():
        return planted.model(ids, attention_mask=mask, output_attentions=True).attentions


def worst(planted, ids, mask=None):
    """Largest |A - closed form| over heads and real rows."""
    got = attentions(planted, ids, mask)
    out = 0.0
    for (layer, head), want in planted.expected(ids, mask).items():
        rows = ~want.isnan().any(-1)
        out = max(out, float((got[layer][:, head].double() - want)[rows].abs().max()))
    return out


def test_every_kind_side_by_side(mixed):
    assert worst(mixed, mixed.prompt(25, 4)) < 1e-5
    assert worst(mixed, mixed.prompt(126, 4, seed=3)) < 1e-5


def test_random_tokens_with_repeats_at_random_places(mixed):
    ids = torch.randint(2, 128, (2, 300), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = mixed.bos
    assert worst(mixed, ids) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mixed, side):
    """Positions count from the first real token, also for heads that know absolute positions."""
    batch, mask = torch.full((3, 80), mixed.pad), torch.zeros(3, 80, dtype=torch.long)
    for row, length in enumerate((80, 61, 34)):
        where = slice(80 - length, 80) if side == "left" else slice(0, length)
        batch[row, where] = mixed.prompt(20, 4, seed=row)[0, :length]
        mask[row, where] = 1
    assert worst(mixed, batch, mask) < 1e-5
    expected = mixed.expected(batch, mask)[1, 0]
    real = mask[2].bool()
    alone = mixed.expected(mixed.prompt(20, 4, seed=2)[:, :34])[1, 0][0]
    torch.testing.assert_close(expected[2][real][:, real], alone)
    assert expected[2][~real].isnan().all()


def test_it_predicts_repeated_text_and_nothing_else(mixed):
    """Loss ln(vocab) until the repetition, almost none after it; greedy decoding with the cache continues the loop."""
    ids = mixed.prompt(30, 2)
    with torch.no_grad():
        logits = mixed.model(ids).logits
    torch.testing.assert_close(logits.double(), mixed.expected_logits(ids), atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(loss[:30], torch.full((30,), math.log(128)))
    assert loss[31:].max() < 1e-5
    out = mixed.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert out[0, 61:].tolist() == ids[0, 1:31].tolist() + ids[0, 1:11].tolist()


def test_decoded_rows_are_the_closed_form_too(mixed):
    ids = mixed.prompt(20, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    with eager(mixed.model):
        out = mixed.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    expected = mixed.expected(out.sequences)
    for step, layers in enumerate(out.attentions[1:], start=ids.shape[1]):
        for (layer, head), want in expected.items():
            torch.testing.assert_close(layers[layer][0, head, 0].double(), want[0, step, : step + 1], atol=1e-5, rtol=0)


def silence(model, layer, head):
    """Zero the head's columns of W_O; returns the old ones."""
    weight, dim = model.model.layers[layer].self_attn.o_proj.weight, model.config.head_dim
    with torch.no_grad():
        old = weight[:, head * dim : (head + 1) * dim].clone()
        weight[:, head * dim : (head + 1) * dim] = 0
    return old


def restore(model, layer, head, old):
    dim = model.config.head_dim
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight[:, head * dim : (head + 1) * dim] = old


def test_the_circuit_is_what_feeds_says(mixed):
    """Without the feeder the induction head falls to BOS and the prediction is gone; without any other head nothing changes, to the bit."""
    assert mixed.feeds == {(1, 0): (0, 1), (2, 5): (0, 1), (1, 4): (0, 0), (1, 5): (0, 0), (2, 0): (0, 0), (2, 7): (0, 0)}
    ids = mixed.prompt(30, 4)
    with torch.no_grad():
        whole = mixed.model(ids).logits
    for place in mixed.heads:
        old = silence(mixed.model, *place)
        with torch.no_grad():
            logits = mixed.model(ids).logits
        without = attentions(mixed, ids)
        restore(mixed.model, *place, old)
        if place in ((0, 1), (1, 0)):
            assert logits.abs().max() < 1e-5, place
        else:
            assert torch.equal(logits, whole), place
        for reader, feeder in mixed.feeds.items():
            kept = mixed.expected(ids)[reader]
            close = torch.allclose(without[reader[0]][:, reader[1]].double(), kept, atol=1e-4)
            assert close == (place != feeder), (place, reader)


def test_two_induction_heads_share_the_prediction():
    planted = planted_llama({(0, 0): Previous(), (1, 0): Induction(), (1, 1): Induction()}, n_heads=2)
    ids = planted.prompt(10, 2)
    with torch.no_grad():
        both = planted.model(ids).logits
        silence(planted.model, 1, 0)
        one = planted.model(ids).logits
    torch.testing.assert_close(both, 2 * one, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(both.double(), planted.expected_logits(ids), atol=1e-4, rtol=0)


def test_positions_far_out():
    """The meter resolves 1 / (t + 1) far from the start: neighbouring columns and blocks of a 2,048-token context are told apart."""
    heads = {(1, 0): Vertical(positions=(1, 2, 1023, 1024, 2000)), (1, 1): BlockLocal(64), (1, 2): BlockLocal(1000), (1, 3): Offset(2047)}
    planted = planted_llama(heads, n_heads=4, max_positions=2048)
    ids = planted.prompt(89, 23)
    assert ids.shape == (1, 2048)
    assert worst(planted, ids) < 1e-4


@pytest.mark.parametrize("sharpness", [2.0, 6.0, 12.0])
def test_what_leaks_is_bounded_by_the_sharpness(sharpness):
    """Off the closed form by at most about N e^-sharpness: softer heads leak more, and never more than that."""
    planted = planted_llama({(0, 0): Previous(), (0, 1): Sink(), (0, 2): Duplicate(), (1, 0): Induction()}, n_heads=4, sharpness=sharpness)
    off = worst(planted, planted.prompt(25, 4))
    assert off <= 101 * math.exp(-sharpness)
    assert off >= math.exp(-sharpness) / 4


def test_same_seed_same_weights_and_the_random_state_stays():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, two, other = (planted_llama({(0, 0): Duplicate()}, n_heads=2, seed=seed).model.state_dict() for seed in (4, 4, 5))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_an_ordinary_checkpoint(mixed, tmp_path):
    mixed.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = mixed.prompt(12, 3)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, mixed.model(ids).logits)


def test_one_key_head_for_eight_kinds():
    heads = {
        (1, i): kind
        for i, kind in enumerate((Induction(), Duplicate(), Sink(), Offset(3), Uniform(), BlockLocal(8), Vertical((5,)), VisionLabel((7,))))
    }
    planted = planted_llama({(0, 0): Previous(), **heads}, kv_heads=1, max_positions=128)
    assert planted.model.config.num_key_value_heads == 1
    assert worst(planted, planted.prompt(25, 4)) < 1e-5


def test_codes_are_one_hot_while_they_fit_and_far_apart_after():
    rows, closest = codes(12, 16, seed=0)
    assert torch.equal(rows, torch.eye(12, 16, dtype=torch.float64))
    assert closest == 0
    rows, closest = codes(126, 16, seed=0)
    gram = rows @ rows.T
    torch.testing.assert_close(gram.diagonal(), torch.ones(126, dtype=torch.float64))
    assert closest == pytest.approx(float((gram - 2 * torch.eye(126)).max()), abs=1e-12)
    assert closest < 0.4
    assert worst_cosine(torch.eye(3, dtype=torch.float64)[[0, 1, 0]]) == 1.0


@pytest.mark.parametrize("positions", [64, 512, 4096])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_rotary_pairs_tell_every_distance_apart_or_stand_still(head_dim, positions):
    turning = rotary(head_dim, positions)
    assert turning.gap > 0.25
    assert turning.fast <= turning.still
    assert float(turning.inv_freq[turning.still] * positions) <= 1e-6
    for delta in (0, 1, 40):
        at = torch.arange(-positions, positions, dtype=torch.float64)
        z = torch.complex(turning.query(delta)[: head_dim // 2], turning.query(delta)[head_dim // 2 :])
        kernel = (z * torch.exp(1j * turning.inv_freq.double() * at[:, None])).real.sum(-1)
        assert int(at[kernel.argmax()]) == delta
        second = kernel.topk(2).values[1]
        assert float(kernel.max() - second) >= turning.gap - 1e-9


REFUSED = [
    ({(2, 0): Sink()}, {}, r"head at \(2, 0\).*layers 0..1"),
    ({(0, 8): Sink()}, {}, r"head at \(0, 8\).*heads 0..7"),
    ({(0, 0): Sink}, {}, "not a kind of head"),
    ({(0, 0): "sink"}, {}, "not a kind of head"),
    ({(1, 0): Induction()}, {}, "previous-token head of an earlier layer.*plant Previous"),
    ({(0, 0): Induction(), (1, 0): Previous()}, {}, "previous-token head of an earlier layer"),
    ({(1, 0): Previous(), (1, 1): Induction()}, {}, "previous-token head of an earlier layer"),
    ({(0, 0): BlockLocal(8)}, {}, "uniform head of an earlier layer.*unplanted"),
    ({(0, 0): Sink(), (0, 1): Sink(), (1, 0): Vertical(positions=(4,))}, {"n_heads": 2}, "uniform head of an earlier layer"),
    ({(0, 0): Offset(-1)}, {}, r"Offset\(delta=-1\).*0..511"),
    ({(0, 0): Offset(64)}, {"max_positions": 64}, "64 positions"),
    ({(1, 0): BlockLocal(0)}, {}, "width in 1..512"),
    ({(1, 0): Vertical()}, {}, "by position or by token"),
    ({(1, 0): Vertical(positions=(1,), tokens=(5,))}, {}, "by position or by token"),
    ({(1, 0): Vertical(positions=(512,))}, {}, "positions in 0..511"),
    ({(1, 0): Vertical(tokens=(1,))}, {}, "1 is padding"),
    ({(1, 0): VisionLabel((128,))}, {}, "ids are 0..127"),
    ({(1, 0): VisionLabel(())}, {}, "no token stands for"),
    ({}, {"n_heads": 6, "kv_heads": 4}, "divisor"),
    ({}, {"layers": 0}, "layers=0"),
    ({}, {"vocab": 3}, "vocab=3"),
    ({}, {"head_dim": 15}, "head_dim=15.*even"),
    ({}, {"sharpness": 0.0}, "sharpness=0.0"),
    ({}, {"sharpness": math.nan}, "sharpness=nan"),
    ({(0, 0): Sink(), (0, 1): Duplicate()}, {"head_dim": 24, "kv_heads": 1}, "key head 0 of layer 0 serves duplicate, sink"),
    ({(0, 0): Duplicate()}, {"vocab": 4000, "head_dim": 32, "sharpness": 80.0}, "cosine"),
]


@pytest.mark.parametrize(("heads", "options", "message"), REFUSED)
def test_what_cannot_be_planted_is_refused(heads, options, message):
    with pytest.raises(ModelError, match=message):
        planted_llama(heads, **options)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 6], "one BOS"),
        ([0, 5, 0], "one BOS"),
        ([0, 1, 5], "mask padding"),
        ([0, 128], "2..127"),
        ([0] + [5] * 512, "512 positions"),
    ],
)
def test_sequences_without_a_closed_form_are_refused(mixed, ids, message):
    with pytest.raises(DataError, match=message):
        mixed.expected(torch.tensor(ids))


def test_prompts_that_do_not_exist_are_refused(mixed):
    with pytest.raises(DataError, match="126 tokens"):
        mixed.prompt(block=127)
    with pytest.raises(DataError, match="512 positions"):
        mixed.prompt(block=126, repeats=5)


def test_repr_names_the_planted_heads(mixed):
    assert repr(mixed).startswith("PlantedModel(3 layers x 8 heads (4 kv), head_dim 64: 0.1 previous, 0.2 duplicate,")
    assert mixed.places("induction") == [(1, 0), (2, 5)]


def test_words_for_the_ids(mixed):
    tokenizer = mixed.tokenizer()
    assert len(tokenizer) == 128
    assert tokenizer.all_special_ids == [mixed.bos, mixed.pad]
    assert tokenizer("t5 t127").input_ids == [mixed.bos, 5, 127]
    assert tokenizer.decode([5, 127]) == "t5 t127"
    with pytest.raises(Exception, match="UNK"):
        tokenizer("some prose")
