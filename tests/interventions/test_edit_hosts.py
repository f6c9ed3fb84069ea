"""One edit of every site on every host: what a module's heads give is the call it met, edited densely."""

from __future__ import annotations

import copy
import math

import nnsight
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge

from headscope.errors import InterventionError
from headscope.interventions import (
    BoostScores,
    HeadMask,
    KeyBias,
    Mix,
    PatchHeads,
    Redistribute,
    ReplaceQueries,
    Scale,
    SetBias,
    Temperature,
    record_heads,
)
from headscope.scope import Scope

from ..core.diffusion_models import IMAGE, MODELS, TEXT, inputs
from ..core.tiny_models import VOCABULARY, gpt2, ids, llama, make, padding
from .dense_edits import Dense
from .edit_cases import Grab

H = [(0, 1), (1, 0)]

EDITS = {
    "key_bias": (KeyBias(H, [0, 3], 0.7), lambda d, h: d.add(h, d.members(keys(d, [0, 3])).double() * 0.7)),
    "set_bias": (SetBias(H, [1, 2], bias=-0.9), lambda d, h: d.add(h, d.members(keys(d, [1, 2])).double() * -0.9)),
    "boost_scores": (BoostScores(H, [1, 3], 0.6), lambda d, h: d.boost(h, keys(d, [1, 3]), 0.6)),
    "temperature": (Temperature(H, 2.0), lambda d, h: d.cool(h, 2.0)),
    "redistribute": (Redistribute(H, [0, 2], 0.4), lambda d, h: d.redistribute(h, keys(d, [0, 2]), None, 0.4)),
    "identity": (Mix(H, "identity", 0.5), lambda d, h: d.mix(h, "identity", 0.5)),
    "uniform": (Mix(H, "uniform", 0.5), lambda d, h: d.mix(h, "uniform", 0.5)),
    "argmax": (Mix(H, "argmax", 0.5), lambda d, h: d.mix(h, "argmax", 0.5)),
    "zero": (HeadMask(H), lambda d, h: d.rescale(h, 0.0)),
    "scale": (Scale(H, 2.0), lambda d, h: d.rescale(h, 2.0)),
}


def keys(dense, positions):
    where = torch.arange(dense.call.k.shape[2]) + dense.call.key_offset
    out = torch.isin(where, torch.tensor(positions))
    return out if dense.call.mask.key_valid is None else out & dense.call.mask.key_valid


def check(scope, run, edit, twin):
    """Run under the edit and compare every call of the edited modules with its dense twin."""
    kept = []
    with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, sites=("z",)) as record, torch.no_grad():
        run()
    bound, compared = edit.bind(scope), 0
    for name in bound.bound.heads:
        at = 0
        for call in (one for one in kept if one.module == name):
            rows = call.q.shape[2]
            dense = Dense(call)
            twin(dense, bound.heads_in(call))
            keep = dense.counts[..., None]
            got = record.passes[-1]["z", name][:, at : at + rows].double()
            error = torch.where(keep, (got - dense.output).abs(), 0.0)
            assert float(error.max()) < 1e-4 * max(1.0, float(dense.output.abs().max()))
            at += rows
            compared += 1
    assert compared
    return kept


def words():
    level = models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level), bos_token="w1", eos_token="w2", pad_token="w0")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    where = tmp_path_factory.mktemp("words")
    words().save_pretrained(where)
    return hf.AutoTokenizer.from_pretrained(where)


def bridged(build, tokenizer):
    model = make(build)
    model.config.architectures = [type(model).__name__]
    plain = copy.deepcopy(model)
    return TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, device="cpu"), plain


# ---- diffusers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "flux", "dit"])
@pytest.mark.parametrize("name", list(EDITS))
def test_diffusers(kind, name):
    model, given = MODELS[kind](), inputs(kind)
    with torch.no_grad():
        plain = model(**given, return_dict=False)[0]
    scope = Scope(model)
    check(scope, lambda: model(**given), *EDITS[name])
    with torch.no_grad():
        assert torch.equal(model(**given, return_dict=False)[0], plain)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_streams_of_joint_attention(kind):
    """Image rows alone, image keys alone; SD3 has the image first and Flux the text."""
    model, given = MODELS[kind](), inputs(kind)
    scope = Scope(model)
    image = slice(0, IMAGE) if kind == "sd3" else slice(TEXT, TEXT + IMAGE)
    rows = torch.zeros(1, IMAGE + TEXT, dtype=torch.bool)
    rows[:, image] = True
    check(scope, lambda: model(**given), Mix(H, "identity", 1.0, positions="image"), lambda d, h: d.mix(h, "identity", 1.0, rows))
    check(scope, lambda: model(**given), Mix(H, "query_mean", 0.5), lambda d, h: d.mix(h, "query_mean", 0.5))
    check(
        scope,
        lambda: model(**given),
        Redistribute(H, "text", 0.2, "image"),
        lambda d, h: d.redistribute(h, ~rows[0], rows[0], 0.2),
    )
    check(
        scope,
        lambda: model(**given),
        KeyBias(H, "text", -math.inf, positions="image"),
        lambda d, h: d.add(h, torch.where(d.members(~rows[0]), -math.inf, 0.0).double(), rows),
    )


def test_the_mean_query_and_the_blurred_one_in_dit():
    model, given = MODELS["dit"](), inputs("dit")
    scope = Scope(model)
    check(scope, lambda: model(**given), ReplaceQueries(H, "mean"), lambda d, h: d.mix(h, "query_mean", 1.0))
    kept = []
    with scope.intervene(ReplaceQueries(H, "blur", 1 / 3)), scope.intervene(Grab(kept)), torch.no_grad():
        model(**given)
    with scope.intervene(Grab(kept)), torch.no_grad():
        model(**given)
    blurred, own = kept[0].q, kept[2].q
    assert torch.equal(blurred[:, [0, 2, 3]], own[:, [0, 2, 3]])
    # a blur keeps the mean over an image only away from its borders, and makes neighbours more alike
    grid = (own[:, 1].unflatten(1, (4, 4)), blurred[:, 1].unflatten(1, (4, 4)))
    spread = [float((one[:, 1:] - one[:, :-1]).pow(2).mean()) for one in grid]
    assert spread[1] < 0.999 * spread[0]


def test_steps_and_branches():
    model = MODELS["dit"]()
    scope = Scope(model)
    scope.host.guidance = ("uncond", "cond")
    given = inputs("dit")
    edit = HeadMask([(1, 0)], steps=(1, 3), branches="cond")
    with scope.intervene(edit), record_heads(scope, sites=("z",)) as record, torch.no_grad():
        for _ in range(4):
            model(**given)
    name = scope.topology[1].name
    zero = [[not one["z", name][row, :, 0].any() for row in range(2)] for one in record.passes]
    assert zero == [[False, False], [False, True], [False, True], [False, False]]


def test_a_second_attention_beside_the_first_is_edited_by_name():
    model, given = MODELS["sd3"](), inputs("sd3")
    scope = Scope(model)
    name = "transformer_blocks.0.attn2"
    kept = []
    edit = Redistribute([(name, 1)], [0], 0.3)
    with scope.intervene(Grab(kept)), scope.intervene(edit), record_heads(scope, [(name, 1)]) as record, torch.no_grad():
        model(**given)
    call = next(one for one in kept if one.module == name)
    dense = Dense(call).redistribute([1], torch.arange(IMAGE) == 0, None, 0.3)
    torch.testing.assert_close(record.z(name)[:, :, 0].double(), dense.output[:, :, 1], rtol=1e-4, atol=1e-4)


def test_a_diffusion_model_does_not_decode():
    scope = Scope(MODELS["dit"]())
    with pytest.raises(InterventionError, match="token by token"), scope.intervene(Scale(H, 2.0, phase="decode")):
        pytest.fail("the block was entered")


# ---- TransformerLens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2], ids=lambda build: build.__name__)
@pytest.mark.parametrize("name", list(EDITS))
def test_transformer_lens(build, name, on_disk):
    bridge, plain = bridged(build, on_disk)
    tokens = ids(2, 12)
    edit, twin = EDITS[name]
    with torch.no_grad():
        before = bridge(tokens)
    check(Scope(bridge), lambda: bridge(tokens), edit, twin)
    with torch.no_grad(), Scope(bridge).intervene(edit):
        got = bridge(tokens)
    with torch.no_grad(), Scope(plain).intervene(edit):
        want = plain(tokens).logits
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    with torch.no_grad():
        assert torch.equal(bridge(tokens), before)


# ---- nnsight ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(EDITS))
def test_nnsight(name):
    model = make(llama)
    plain = Scope(copy.deepcopy(model))
    scope = Scope(nnsight.TransformersModel(model, tokenizer=words(), task="text-generation"))
    tokens = ids(1, 12)
    edit, twin = EDITS[name]
    with torch.no_grad(), scope.intervene(edit), scope.host.given.trace(tokens):
        got = scope.host.given.lm_head.output.save()
    with torch.no_grad(), plain.intervene(edit):
        assert torch.equal(got, plain.model(tokens).logits)
    check(scope, lambda: scope.model(tokens), edit, twin)


# ---- patches across hosts -----------------------------------------------------------------------------------------------------


def test_recording_and_patching_on_diffusers_and_transformer_lens(on_disk):
    dit, given = MODELS["dit"](), inputs("dit")
    other = {**given, "hidden_states": given["hidden_states"].flip(0)}
    bridge, _ = bridged(llama, on_disk)
    for scope, run, rerun in (
        (Scope(dit), lambda: dit(**given, return_dict=False)[0], lambda: dit(**other, return_dict=False)[0]),
        (Scope(bridge), lambda: bridge(ids(1, 9)), lambda: bridge(ids(1, 9, seed=3))),
    ):
        with torch.no_grad():
            with record_heads(scope) as theirs:
                rerun()
            with record_heads(scope) as own:
                plain = run()
            with scope.intervene(PatchHeads("all", own)):
                torch.testing.assert_close(run(), plain, rtol=0, atol=0)
            with scope.intervene(PatchHeads([(1, 2)], theirs)), record_heads(scope, [(1, 2)], ("z",)) as record:
                assert not torch.equal(run(), plain)
            assert torch.equal(record.z(1)[:, :, 0], theirs.z(1)[:, :, 2])


def test_decode_steps_of_a_padded_batch_with_a_cache_of_the_users():
    from transformers import DynamicCache

    model = make(llama)
    scope, tokens, mask = Scope(model), ids(2, 10), padding("left", 2, 10)
    for name, (edit, twin) in EDITS.items():

        def run():
            cache = DynamicCache(config=model.config)
            model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
            for step in range(2):
                grown = torch.cat([mask, torch.ones(2, step + 1, dtype=torch.int64)], 1)
                model(tokens[:, step : step + 1], attention_mask=grown, past_key_values=cache, use_cache=True)

        kept = check(scope, run, edit, twin)
        assert [call.q.shape[2] for call in kept] == [10, 10, 1, 1, 1, 1], name
