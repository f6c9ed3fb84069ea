"""VAR against its definition on the dense matrix: planted sinks, gates, prefill and decode, padding, both variants, and what is refused."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache

import headscope as hs
from headscope.call import AttentionCall, MaskFacts
from headscope.errors import InterventionError
from headscope.interventions import ACT, VAR, Intervention, KeyBias, Scale, from_json, record_heads
from headscope.interventions.head_edit import Bound
from headscope.interventions.running import outputs_of
from headscope.interventions.var import sink_dimensions
from headscope.probes import VisualSinks
from headscope.probes.pictures import bundled_samples
from headscope.scope import Scope

from ..core.tiny_models import llama, llava, make
from .dense_edits import Dense
from .edit_cases import Grab

IMAGE, CELLS, PLANTED = 96, 16, (3, 11)
OPTIONS = {"tau": 4.0, "count": 1, "rho": 0.5, "min_visual": 0.3}


def prompts(lengths=(7, 4), seed: int = 0) -> dict[str, torch.Tensor]:
    """<bos>, a word, 16 image tokens, words; shorter ones padded in front."""
    source = torch.Generator().manual_seed(seed)
    rows = []
    for words in lengths:
        text = torch.randint(3, 90, (words + 1,), generator=source)
        row = torch.cat([torch.tensor([1]), text[:1], torch.full((CELLS,), IMAGE), text[1:]])
        rows.append(torch.nn.functional.pad(row, (max(lengths) - words, 0)))
    ids = torch.stack(rows)
    pixels = torch.randn(len(lengths), 3, 28, 28, generator=source).double()
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}


@pytest.fixture(scope="module")
def scope():
    """LLaVA in float64 with three layers, whose <bos> and image tokens 3 and 11 are massive in dimension 5."""
    model = make(lambda impl="sdpa": llava(impl)).double()
    layers = model.model.language_model.layers
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 5] = 500.0
        for layer in layers:  # attention that is neither flat nor one-hot
            layer.self_attn.q_proj.weight *= 0.6

    def plant(_, args, output):
        output = output.clone()
        output[..., list(PLANTED), 5] = 500.0
        return output

    model.model.multi_modal_projector.register_forward_hook(plant)
    return Scope(model)


def sinks_of(inputs, more: int = 0) -> torch.Tensor:
    """Bool [B, N + more]: the planted tokens."""
    ids = inputs["input_ids"]
    out = ids == 1
    for row, where in zip(out, ids == IMAGE, strict=True):
        row[where.nonzero()[list(PLANTED), 0]] = True
    return torch.nn.functional.pad(out, (0, more))


def by_hand(call, inputs, var) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, rows edited [B, H, Nq]) of one call by the definition, with loops over batch, heads and rows."""
    keys, start = call.k.shape[2], call.query_offset
    sinks = sinks_of(inputs, max(0, keys - inputs["input_ids"].shape[1]))[:, :keys]
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, max(0, keys - inputs["input_ids"].shape[1])), value=50)[:, :keys]
    image = ids == IMAGE
    dense = Dense(call)
    edited = torch.zeros(dense.a.shape[:3], dtype=torch.bool)
    for b in range(dense.a.shape[0]):
        for i in range(dense.a.shape[2]):
            if image[b, start + i] or ids[b, start + i] == 0:
                continue
            for h in range(dense.a.shape[1]):
                a = dense.a[b, h, i].clone()
                visual, on_sinks = float(a[image[b]].sum()), float(a[image[b] & sinks[b]].sum())
                if visual < var.min_visual or (visual - on_sinks) / visual < var.rho:
                    continue
                freed = var.p * float(a[sinks[b]].sum())
                shown = image[b] & ~sinks[b]
                new = a.clone()
                new[sinks[b]] *= 1 - var.p
                new[shown] += freed * a[shown] / a[shown].sum()
                dense.a[b, h, i] = new
                edited[b, h, i] = True
    return dense.output, edited


def test_the_example_by_hand() -> None:
    """(BOS .4 | vis .2 .1 .1 | txt .2) with sinks BOS and the first image token: .36 is freed."""
    row = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.2], dtype=torch.float64)
    known = torch.tensor([[True, True, False, False]])
    for options, want in (
        ({"rho": 0.4}, [0.16, 0.08, 0.28, 0.28, 0.2]),
        ({"rho": 0.6}, row.tolist()),
        ({"rho": 0.4, "min_visual": 0.5}, row.tolist()),
        ({"rho": 0.0, "min_visual": 0.0, "p": 1.0}, [0.0, 0.0, 0.4, 0.4, 0.2]),
        ({"variant": "official", "rho": 0.6}, [0.24, 0.12, 0.22, 0.22, 0.2]),  # sinks keep p, and r is their share
        ({"variant": "official", "rho": 0.4}, row.tolist()),
    ):
        ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 7]])
        call = AttentionCall(
            "m",
            0,
            torch.ones(1, 1, 1, 1).double(),
            row.log()[None, None, :, None],
            torch.eye(5).double()[None, None],
            1.0,
            MaskFacts(causal=True),
            query_offset=4,
            facts={"tokens": ids},
        )
        var = replace(VAR(**options), _bound=Bound({"m": [0]}, {"m": [0]}, IMAGE, state={"m": known}))
        assert var.after(call, row[None, None, None]).flatten().tolist() == pytest.approx(want, abs=1e-12), options


def test_sink_dimensions_are_found_from_the_model(scope) -> None:
    assert sink_dimensions(scope, 1) == (5,)
    calls: list = []
    with pytest.warns(UserWarning, match="never ran in it"), scope.intervene(Grab(calls)):
        assert VAR(**OPTIONS).bind(scope).bound.state["dimensions"] == (5,)
    assert not calls  # what is active here does not see that pass


def test_prefill_is_the_definition(scope) -> None:
    inputs, calls = prompts(), []
    var = VAR(**OPTIONS, layers=(0, 2))
    with scope.intervene(Grab(calls)), scope.intervene(var) as _, record_heads(scope, sites=("z",)) as record, torch.no_grad():
        scope.model(**inputs)
    text = [call for call in calls if call.layer is not None]
    total = edited = 0
    for call in text:
        want, rows = by_hand(call, inputs, var)
        keep = Dense(call).counts[..., None]
        assert float(torch.where(keep, record.z(call.layer) - want, 0.0).abs().max()) < 1e-10
        total, edited = total + rows.numel(), edited + int(rows.sum())
    assert 0.05 * total < edited < 0.5 * total  # some rows and heads, not all


def test_the_last_layer_is_left_alone_and_the_official_code_leaves_the_first_two(scope) -> None:
    assert VAR(**OPTIONS).bind(scope).layers == (0, 1)
    assert set(VAR(**OPTIONS).bind(scope).bound.heads) == {scope.topology.main[0].name}
    with pytest.raises(InterventionError, match="official variant leaves them all out"):
        VAR(**OPTIONS, variant="official").bind(scope)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decode_steps_keep_the_sinks_and_choose_heads_anew(scope, cache) -> None:
    inputs, calls = prompts(), []
    var = VAR(**OPTIONS, layers=(0, 2))
    with scope.intervene(Grab(calls)), scope.intervene(var), record_heads(scope, sites=("z",)) as record:
        scope.generate(inputs, max_new_tokens=6, min_new_tokens=6, cache_implementation=cache)
    text, edited = [call for call in calls if call.layer is not None], 0
    assert len(text) == 2 * 6
    for call in text:
        want, rows = by_hand(call, inputs, var)
        where = slice(call.query_offset, call.query_offset + call.q.shape[2])
        keep = Dense(call).counts[..., None]
        assert float(torch.where(keep, record.z(call.layer)[:, where] - want, 0.0).abs().max()) < 1e-10
        edited += int(rows.sum()) if call.q.shape[2] == 1 else 0
    assert edited > 0


def test_steps_with_a_cache_equal_one_pass(scope) -> None:
    inputs = prompts((9,))
    var, ids = VAR(**OPTIONS, layers=(0, 2)), inputs["input_ids"]
    with scope.intervene(var), torch.no_grad():
        whole = scope.model(**inputs).logits
        cache = DynamicCache(config=scope.model.config.text_config)
        parts = [scope.model(input_ids=ids[:, :20], pixel_values=inputs["pixel_values"], past_key_values=cache, use_cache=True).logits]
        parts += [
            scope.model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(20, ids.shape[1])
        ]
    assert float((torch.cat(parts, 1) - whole).abs().max()) < 1e-10
    with torch.no_grad():
        assert float((scope.model(**inputs).logits - whole).abs().max()) > 1e-3


def test_padding_changes_nothing(scope) -> None:
    both, var = prompts(), VAR(**OPTIONS, layers=(0, 2))
    alone = {name: value[1:, 3:] if name != "pixel_values" else value[1:] for name, value in both.items()}
    with scope.intervene(var):
        a = scope.generate(both, max_new_tokens=4, min_new_tokens=4).new_ids[1]
        b = scope.generate(alone, max_new_tokens=4, min_new_tokens=4).new_ids[0]
        with torch.no_grad():
            positions = (both["attention_mask"].cumsum(1) - 1).clamp_min(0)
            padded, bare = scope.model(**both, position_ids=positions).logits[1, -1], scope.model(**alone).logits[0, -1]
    assert torch.equal(a, b)
    assert torch.allclose(padded, bare, atol=1e-10)


def test_nothing_moved_is_nothing_changed(scope) -> None:
    inputs = prompts()
    with torch.no_grad():
        plain = scope.model(**inputs).logits
        for none in (
            {"p": 0.0},
            {"p": 1.0, "variant": "official", "layers": (0, 2)},
            {"rho": 1.0, "min_visual": 1.0},
            {"dimensions": (6,)},
        ):
            with scope.intervene(VAR(**{**OPTIONS, **none})):
                assert torch.equal(scope.model(**inputs).logits, plain), none


@dataclass(frozen=True)
class Fails(Intervention):
    """Raises in the second decode step."""

    def after(self, call, output):
        if call.query_offset > 26 and call.layer == 1:
            raise RuntimeError("stop")
        return output


def test_calls_of_the_picture_tower_are_read_only_where_somebody_looks(scope, monkeypatch) -> None:
    from headscope.capture.attach import Attachment

    names: list[str] = []
    real = Attachment._read
    monkeypatch.setattr(
        Attachment, "_read", lambda self, host, module, run, *rest: names.append(run.record.name) or real(self, host, module, run, *rest)
    )
    inputs, tower = prompts(), {module.name for module in scope.topology.modules if module.layer is None}
    with torch.no_grad(), scope.intervene(VAR(**OPTIONS, layers=(0, 2))):
        alone = scope.model(**inputs).logits
        assert tower
        assert not tower & set(names)
        assert set(names) == {module.name for module in scope.topology.main}
        with scope.intervene(Grab([])):
            assert torch.equal(scope.model(**inputs).logits, alone)
    assert tower <= set(names)


def test_an_exception_in_the_middle_leaves_nothing_behind(scope) -> None:
    inputs = prompts()
    with torch.no_grad():
        plain = scope.model(**inputs).logits

    def hooks() -> int:
        gc.collect()
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in scope.model.modules())

    before = hooks()
    with pytest.raises(RuntimeError, match="stop"), scope.intervene(VAR(**OPTIONS), Scale("0.1", 1.5), Fails()):
        scope.generate(inputs, max_new_tokens=6, min_new_tokens=6)
    assert hooks() == before
    with torch.no_grad():
        assert torch.equal(scope.model(**inputs).logits, plain)


def test_behind_a_key_bias_it_meets_the_biased_attention(scope) -> None:
    inputs, calls = prompts((7,)), []
    var = VAR(**OPTIONS, layers=(0, 1))
    bias = KeyBias("0.0,0.1,0.2,0.3", "image", 1.0)
    with scope.intervene(Grab(calls)), scope.intervene(var, bias), record_heads(scope) as record, torch.no_grad():
        scope.model(**inputs)
    call = next(one for one in calls if one.layer == 0)
    image = (inputs["input_ids"] == IMAGE)[:, None, None].double().expand(1, 4, call.q.shape[2], -1)
    want, rows = by_hand(replace(call, mask=replace(call.mask, bias=image)), inputs, var)
    assert float((record.z(0) - want).abs().max()) < 1e-10
    assert bool(rows.any())


def test_on_the_bundled_model_the_start_token_is_the_only_sink() -> None:
    """bundled:vlm was given a massive start token, on which idle heads rest. Sinks are found there and nowhere else; what VAR takes off it
    goes to the picture, in the heads and rows that look at the picture, and the answers survive."""
    seeing = hs.load("bundled:vlm", device="cpu")
    samples = bundled_samples(64, 33, kinds=("position",))
    inputs = {name: torch.cat([one.inputs[name] for one in samples]) for name in samples[0].inputs}
    wanted = torch.tensor([one.wanted for one in samples])
    labels = torch.full_like(samples[0].ids, 2)
    labels[samples[0].image] = 1
    labels[0] = 0

    def looks(*edits) -> tuple[torch.Tensor, float]:
        """(attention [L, B, H, 3] of the last row on start, picture, text; share of right answers)."""
        with seeing.intervene(*edits) if edits else nullcontext():
            with torch.no_grad():
                said = seeing.model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
            stats = seeing.capture(inputs, statistics=["class_mass"], labels=labels, label_names=("start", "picture", "text"))
        mass = torch.stack([stats["class_mass"][layer][:, :, -1] for layer in seeing.topology.layers])
        return mass, float((said == wanted).double().mean())

    mass, plain = looks()
    assert plain > 0.9
    found = VisualSinks().run(seeing, samples[:4]).tables["tokens"]
    assert len(found) > 0
    assert set(found["position"]) == {0}
    with seeing.intervene(VAR()):
        moved = outputs_of(seeing, {**inputs, "logits_to_keep": 1})
    assert float((moved - outputs_of(seeing, {**inputs, "logits_to_keep": 1})).abs().max()) > 1e-3
    assert float(mass[..., 0].mean(1).max()) > 0.9  # idle heads rest there
    assert looks(VAR())[1] > plain - 0.05


def test_what_is_refused(scope) -> None:
    with pytest.raises(InterventionError, match="reads no images"):
        VAR().bind(Scope(make(llama)))
    for options, words in (({"tau": 20.0}, "no token could be a sink"), ({"dimensions": (32,)}, r"0\.\.31")):
        with pytest.raises(InterventionError, match=words):
            VAR(**options).bind(scope)
    for options, words in (
        ({"p": 1.5}, "p=1.5"),
        ({"rho": -1}, "rho=-1"),
        ({"count": 0}, "at least one"),
        ({"variant": "code"}, "'code'"),
        ({"tau": 0}, "tau=0"),
    ):
        with pytest.raises(InterventionError, match=words):
            VAR(**options)
    with pytest.raises(InterventionError, match="order=1"), scope.intervene(VAR(**OPTIONS), ACT("0.1")):
        pytest.fail("the block was entered")
    inputs, cache = prompts((7,)), DynamicCache(config=scope.model.config.text_config)
    with torch.no_grad():
        scope.model(**inputs, past_key_values=cache, use_cache=True)
    with pytest.raises(InterventionError, match="open the block before"), scope.intervene(VAR(**OPTIONS)), torch.no_grad():
        scope.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, use_cache=True)


def test_it_is_written_down() -> None:
    for var in (VAR(), VAR("0.1,1.2", rho=0.5, dimensions=[3, 4], variant="official", layers=(0, 2)), VAR(positions=[20, 21])):
        assert from_json(var.to_json()) == var
    assert "60% of the attention on sinks" in VAR().explain()
    assert "all layers but the last" in VAR().explain()
    assert "move 40%" in VAR(variant="official").explain()
