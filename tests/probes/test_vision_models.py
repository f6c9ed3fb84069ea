"""Vision probes on LLaVA and Qwen2.5-VL: planted heads and sinks, eager attention as the oracle, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from headscope.errors import ProbeError
from headscope.models.planted import planted_llama
from headscope.probes import Carve, LayerStage, Vhd, VisionMass, VisualSinks
from headscope.probes.pictures import Sample, extended, samples_of, unseeing
from headscope.probes.vhd import last_outputs, text_only
from headscope.scope import Scope
from headscope.topology import Topology

from ..core.tiny_models import eager_copy, llava, make, qwen_vl

IMAGE, FIRST, CELLS = 96, 2, 16
PROBES = (Vhd, VisionMass, VisualSinks, Carve, LayerStage)


def llava_inputs(seed: int = 0, words: int = 7) -> dict[str, torch.Tensor]:
    """<bos>, a word, 16 image tokens, `words` words."""
    source = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 90, (words + 1,), generator=source)
    ids = torch.cat([torch.tensor([1]), text[:1], torch.full((CELLS,), IMAGE), text[1:]])[None]
    pixels = torch.randn(1, 3, 28, 28, generator=source)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def qwen_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """A word, vision_start, 2 x 3 image tokens (4 x 6 patches), vision_end, words."""
    source = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 90, (6,), generator=source)
    ids = torch.cat([text[:1], torch.tensor([94]), torch.full((6,), IMAGE), torch.tensor([93]), text[1:]])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(24, 3 * 2 * 14 * 14, generator=source),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }


BUILDS = {"llava": (llava, llava_inputs), "qwen": (qwen_vl, qwen_inputs)}


@pytest.fixture(scope="module", params=list(BUILDS))
def both(request):
    build, inputs = BUILDS[request.param]
    model = make(build)
    return request.param, Scope(model), eager_copy(model), [inputs(seed) for seed in range(2)]


def test_pictures_are_found_in_the_ids(both) -> None:
    name, scope, _, inputs = both
    sample = samples_of(scope, inputs, count=1, seed=0)[0]
    ids = inputs[0]["input_ids"][0]
    assert torch.equal(sample.image, ids == IMAGE)
    assert torch.equal(sample.frame, torch.isin(ids, torch.tensor([93, 94, 96])) if name == "qwen" else ids == IMAGE)
    assert sample.grid == ((2, 3) if name == "qwen" else (4, 4))
    assert sample.end == (9 if name == "qwen" else 18)


def test_vision_mass_is_eager_attention_on_image_tokens(both) -> None:
    _, scope, eager, inputs = both
    found = VisionMass(answer_tokens=4).run(scope, inputs)
    answer, question = torch.zeros(2, 2, 4, dtype=torch.float64)
    for given in inputs:
        with torch.no_grad():
            written = eager.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
        ends = (written == 2).nonzero()
        written = written[: max(1, int(ends[0]))] if len(ends) else written
        sample = extended(samples_of(scope, [given], count=1, seed=0)[0], written[:-1])
        with torch.no_grad():
            maps = eager(**sample.inputs, output_attentions=True, use_cache=False).attentions
        mass = torch.stack([one[0][..., sample.image].sum(-1).double() for one in maps])
        last = given["input_ids"].shape[1] - 1
        answer += mass[..., last:].mean(-1) / len(inputs)
        question += mass[..., sample.end : last + 1].mean(-1) / len(inputs)
    assert torch.allclose(found["vision_mass"], answer, atol=1e-5)
    assert torch.allclose(found["vision_mass_question"], question, atol=1e-5)
    table = found.tables["layers"]
    assert (table["answer_image"] + table["answer_first"] + table["answer_text"]).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert table["answer_image"].tolist() == pytest.approx(answer.mean(1).tolist(), abs=1e-5)


def test_vhd_is_the_distance_between_two_runs_that_anyone_can_make(both) -> None:
    """The oracle hooks o_proj's input of the eager twin; the run without the picture holds the positions it had beside it."""
    name, scope, eager, inputs = both
    given = inputs[0]
    layers = eager.model.language_model.layers
    seen: list[list[torch.Tensor]] = []

    def run(**call) -> None:
        kept: list[torch.Tensor] = []
        hooks = [one.self_attn.o_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1].double())) for one in layers]
        with torch.no_grad():
            eager(**call, use_cache=False)
        for hook in hooks:
            hook.remove()
        seen.append(kept)

    ids = given["input_ids"]
    if name == "qwen":
        held, _ = eager.model.get_rope_index(ids, given["mm_token_type_ids"], given["image_grid_thw"])
    else:
        held = torch.arange(ids.shape[1])[None]
    frame = torch.isin(ids[0], torch.tensor([93, 94, 96]))
    words = ids[:, ~frame]
    run(**given)
    run(input_ids=words, attention_mask=torch.ones_like(words), position_ids=held[..., ~frame])
    run(input_ids=words, attention_mask=torch.ones_like(words), position_ids=torch.arange(words.shape[1])[None])
    for positions, other in (("keep", 1), ("shift", 2)):
        found = Vhd(positions=positions, outliers=False).run(scope, [given])
        apart = torch.stack([(a - b).reshape(4, -1).norm(dim=-1) for a, b in zip(seen[0], seen[other], strict=True)])
        assert torch.allclose(found["vhd"], apart, atol=1e-4), positions
        assert torch.equal(found["vhd"], found["vhd_raw"])
    assert not torch.allclose(Vhd(positions="keep").run(scope, [given])["vhd_raw"], Vhd(positions="shift").run(scope, [given])["vhd_raw"])


def test_all_vision_probes_run_on_both_families(both) -> None:
    _, scope, _, inputs = both
    found = LayerStage().run(scope, inputs)
    assert bool(found["stage_image_mass"].isfinite().all())
    total = found["stage_image_mass"] + found["stage_text_mass"] + found["stage_sink_mass"]
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    sinks = VisualSinks(dimensions=(0, 1), tau=2.0).run(scope, inputs)
    assert bool(((sinks["visual_nonsink"] >= 0) & (sinks["visual_nonsink"] <= 1)).all())


# ---- planted: a head that sees only text, one that sees only the picture, one whose values are zero ----------------------


@pytest.fixture(scope="module")
def planted():
    """LLaVA of one layer whose hidden states carry a flag (dimension 0: 1 for text, -1 for the picture) and a constant (dimension 1).

    Head 0 looks at text only, head 1 at the picture only (key heads 0 and 1 see opposite flags through the slowest rotation), head 2 shares
    the keys of the first group but writes values of zero.
    """
    model = make(llava)
    del model.model.language_model.layers[1:]
    model.config.text_config.num_hidden_layers = 1
    attention = model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        table, last = model.get_input_embeddings().weight, model.model.multi_modal_projector.linear_2
        table[:, 0], table[:, 1] = 1.0, 1.0
        last.weight[:2], last.bias[0], last.bias[1] = 0.0, -1.0, 1.0
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.zero_()
        slow = 3  # of head_dim 8: the pair (3, 7) turns slowest
        for head in range(4):
            attention.q_proj.weight[8 * head + slow, 1] = 6.0
        attention.k_proj.weight[slow, 0], attention.k_proj.weight[8 + slow, 0] = 6.0, -6.0
        model.model.language_model.layers[0].input_layernorm.weight.fill_(1.0)
    return Scope(model)


def test_a_text_only_head_has_no_vhd_while_positions_are_held(planted) -> None:
    inputs = [llava_inputs(seed) for seed in range(3)]
    mass = VisionMass(answer_tokens=1).run(planted, inputs)["vision_mass"][0]
    assert mass.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-6)  # query heads 0, 1 read key head 0; 2, 3 read key head 1
    held = Vhd().run(planted, inputs)["vhd_raw"][0]
    assert held[:2].tolist() == pytest.approx([0, 0], abs=1e-5)
    assert float(held[2:].min()) > 0.1
    moved = Vhd(positions="shift").run(planted, inputs)["vhd_raw"][0]
    assert float(moved[:2].min()) > 1e-3  # the text looks as if it saw the picture, because it moved


def test_a_head_whose_values_are_zero_has_no_vhd(planted) -> None:
    weight = planted.model.model.language_model.layers[0].self_attn.v_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[8:] = 0.0  # key head 1
    try:
        for kind in ("l2", "relative", "cosine"):
            found = Vhd(distance=kind, positions="shift").run(planted, [llava_inputs()])["vhd_raw"][0]
            assert found[2:].tolist() == [0, 0]
    finally:
        with torch.no_grad():
            weight.copy_(before)


# ---- VAR: sinks planted in the residual stream --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sinking():
    """LLaVA whose <bos> and image tokens 3 and 11 are massive in dimension 5."""
    model = make(llava)
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 5] = 500.0

    def plant(_, args, output):
        output = output.clone()
        output[..., [3, 11], 5] = 500.0
        return output

    model.model.multi_modal_projector.register_forward_hook(plant)
    return Scope(model)


def test_planted_sinks_are_labelled_and_r_is_exact(sinking) -> None:
    inputs = [llava_inputs(seed) for seed in range(2)]
    found = VisualSinks(tau=4.0, count=1, rho=0.5).run(sinking, inputs)
    assert "sink dimensions 5 (found from the first token); tau 4 of at most 5.66" in found.notes
    assert any("no BOS" in note for note in found.notes)  # this scope has no tokenizer
    table = found.tables["tokens"]
    assert set(table["layer"]) == {0, 1}
    visual = table[table["visual"]]
    assert set(visual["position"]) == {FIRST + 3, FIRST + 11}
    assert set(zip(visual["row"], visual["column"], strict=True)) == {(0, 3), (2, 3)}
    assert set(table[~table["visual"]]["position"]) == {0}
    assert table["phi"].min() > 0.9 * math.sqrt(32)
    assert found.numbers["visual_sinks"] == 2

    eager = eager_copy(sinking.model)
    image, sink = torch.zeros(25, dtype=torch.bool), torch.tensor([FIRST + 3, FIRST + 11])
    image[FIRST : FIRST + CELLS] = True
    seen, hit = [], []
    for given in inputs:
        with torch.no_grad():
            maps = eager(**given, output_attentions=True, use_cache=False).attentions
        a = torch.stack([one[0][:, FIRST + CELLS :].double() for one in maps])
        seen.append(a[..., image].sum(-1))
        hit.append(a[..., sink].sum(-1))
    mass, on_sinks = torch.cat(seen, -1), torch.cat(hit, -1)
    assert torch.allclose(found["visual_sink_mass"], on_sinks.mean(-1), atol=1e-5)
    assert torch.allclose(found["visual_nonsink"], (mass - on_sinks).sum(-1) / mass.sum(-1), atol=1e-5)
    ratio = (mass - on_sinks) / mass
    assert torch.allclose(found["image_centric"], ((mass >= 0.2) & (ratio >= 0.5)).double().mean(-1), atol=1e-9)


def test_given_dimensions_are_taken_and_wrong_ones_refused(sinking) -> None:
    found = VisualSinks(tau=4.0, dimensions=(5,)).run(sinking, [llava_inputs()])
    assert "dimensions" not in found.tables
    assert found.numbers["visual_sinks"] == 2
    none = VisualSinks(tau=4.0, dimensions=(6,)).run(sinking, [llava_inputs()])
    assert none.numbers["visual_sinks"] == 0
    assert torch.equal(none["visual_nonsink"], torch.ones(2, 4).double())
    with pytest.raises(ProbeError, match=r"has 0\.\.31"):
        VisualSinks(dimensions=(32,)).run(sinking, [llava_inputs()])
    with pytest.raises(ProbeError, match=r"phi is at most 5\.7, so no token could be a sink"):
        VisualSinks(tau=20.0).run(sinking, [llava_inputs()])
    scaled = VisualSinks(dimensions=(5,)).run(sinking, [llava_inputs()])
    assert scaled.numbers["visual_sink_tau"] == pytest.approx(20 / 64 * math.sqrt(32))


def test_the_dimension_is_read_off_bos_where_the_prompt_has_none() -> None:
    model = make(llava)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 8] = 500.0
    scope = Scope(model, planted_llama({}, vocab=97).tokenizer())  # its BOS is id 0, and the prompt begins with id 1
    found = VisualSinks(tau=4.0, count=1).run(scope, [llava_inputs()])
    assert "sink dimensions 8 (found from the first token); tau 4 of at most 5.66" in found.notes
    assert "the prompt does not begin with BOS (0), which the sink dimensions were read off" in found.notes
    assert found.tables["dimensions"]["dimension"][0] == 8


def test_without_bos_and_with_the_picture_first_no_dimension_can_be_found(sinking) -> None:
    given = llava_inputs()
    given = {name: value[:, FIRST:] if name != "pixel_values" else value for name, value in given.items()}
    with pytest.raises(ProbeError, match="the prompt begins with the picture while the tokenizer has no BOS"):
        VisualSinks(tau=4.0).run(sinking, [given])
    assert VisualSinks(tau=4.0, dimensions=(5,)).run(sinking, [given]).numbers["visual_sinks"] == 2


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", PROBES)
def test_on_a_text_model(probe, tiny_llama) -> None:
    with pytest.raises(ProbeError, match="LlamaForCausalLM reads no images"):
        probe().run(Scope(tiny_llama, object()))


def test_a_model_that_reads_pictures_by_cross_attention_or_names_no_image_token() -> None:
    model = make(llava)
    scope = Scope(model)
    cross = replace(scope.topology.modules[0], kind="cross")
    seen = SimpleNamespace(topology=Topology((cross,), "Mllama"), model=model)
    assert "by cross-attention" in (unseeing(seen) or "")
    config = SimpleNamespace(vision_config=object())
    nameless = SimpleNamespace(topology=scope.topology, model=SimpleNamespace(config=config))
    assert "names no image token" in (unseeing(nameless) or "")
    assert unseeing(scope) is None


def test_data_that_cannot_be_used() -> None:
    scope = Scope(make(llava))
    good = llava_inputs()
    text = {name: value[:, FIRST + CELLS :] for name, value in good.items() if name != "pixel_values"}
    for data, words in (
        (None, "only bundled:vlm brings pictures"),
        ([], "no list of questions"),
        ("what is this?", "no list of questions"),
        (["what is this?"], r"it is no \(picture, question\)"),
        ([(None, "what is this?")], "scoped without a processor"),
        ([{"pixel_values": good["pixel_values"]}], "model inputs hold input_ids"),
        ([text], "no image token"),
        ([{**good, "input_ids": good["input_ids"][:, : FIRST + CELLS]}], "nothing follows the picture"),
        ([{**good, "input_ids": good["input_ids"].repeat(2, 1)}], "pass inputs of batch 1"),
    ):
        with pytest.raises(ProbeError, match=words):
            Vhd().run(scope, data)
    with pytest.raises(ProbeError, match="without a tokenizer"):
        Carve().run(scope, [good])


def test_a_model_that_answers_nothing_rightly_is_said() -> None:
    scope = Scope(make(llava))
    sample = samples_of(scope, [llava_inputs()], count=1, seed=0)[0]
    wrong = Sample(sample.inputs, sample.image, sample.frame, "a question", wanted=95)
    with pytest.raises(ProbeError, match="none of 1 questions was answered rightly"):
        LayerStage().run(scope, [wrong])


def test_a_picture_that_is_no_grid_has_no_regions(both) -> None:
    name, _, _, inputs = both
    if name == "llava":
        assert samples_of(Scope(make(llava)), inputs, count=1, seed=0)[0].grid == (4, 4)
        return
    two = dict(inputs[0])
    two["image_grid_thw"] = torch.tensor([[1, 4, 6], [1, 4, 6]])
    assert samples_of(Scope(make(qwen_vl)), [two], count=1, seed=0)[0].grid is None


def test_the_run_without_a_picture_holds_no_image_token(both) -> None:
    _, scope, _, inputs = both
    sample = samples_of(scope, inputs, count=1, seed=0)[0]
    _, places = last_outputs(scope, sample.inputs)
    given = text_only(sample, places)
    assert not torch.isin(given["input_ids"], torch.tensor([93, 94, 96])).any()
    assert given["position_ids"].shape[-1] == given["input_ids"].shape[1]
