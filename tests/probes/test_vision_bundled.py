"""Vision probes on bundled:vlm: they agree with one another and with ablation, and CARVE finds the cell that is asked for.

Ablation here gives heads, in the rows of text, the output that they have when the question stands alone (HeadMask, resample), which takes
the picture away from them and leaves them their part in reading the question. Zero ablation takes both, so it says nothing about pictures
alone.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

import headscope as hs
from headscope.interventions import HeadSet
from headscope.models.bundled import data_vlm, methods_vlm
from headscope.probes import Carve, LayerStage, Vhd, VisionMass, VisualSinks
from headscope.probes.pictures import bundled_samples, samples_of
from headscope.probes.vhd import effect
from headscope.profile.active import measure_active

QUESTIONS = 48


@pytest.fixture(scope="module")
def scope():
    return hs.load("bundled:vlm", device="cpu")


@pytest.fixture(scope="module")
def asked():
    """Position questions that the scores below are not made of."""
    return bundled_samples(QUESTIONS, 11, kinds=("position",))


@pytest.fixture(scope="module")
def vhd(scope):
    """By the paper's definition: the picture's tokens taken out."""
    return Vhd().run(scope, bundled_samples(15, 12))


@pytest.fixture(scope="module")
def mass(scope):
    return VisionMass().run(scope, bundled_samples(15, 12))


def test_vhd_and_vision_mass_agree(vhd, mass) -> None:
    assert spearmanr(vhd["vhd_raw"].flatten(), mass["vision_mass"].flatten())[0] > 0.7
    assert spearmanr(vhd["vhd"].flatten(), mass["vision_mass"].flatten())[0] > 0.7


def batch(samples) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    seen = {name: torch.cat([one.inputs[name] for one in samples]) for name in ("input_ids", "pixel_values")}
    blank = {**seen, "pixel_values": torch.zeros_like(seen["pixel_values"])}
    return seen, blank, torch.tensor([one.wanted for one in samples])


def test_the_top_heads_carry_the_picture_and_the_bottom_ones_do_not(scope, vhd) -> None:
    """40 % of the heads. Effect: how far the answer is from that to the question alone (total variation), as a share of the model's own,
    for each kind of question. Where a wrong guess tempts and the picture is noisy, answers go with the top heads too; they do not go with
    random ones (means over the kinds).
    """
    order = vhd.top("vhd_raw", scope.topology.heads)
    count = round(0.4 * len(order))
    sets = {"top": order[:count], "bottom": order[-count:], "random": list(HeadSet.random(scope, count, 0, without=HeadSet(order[:count])))}

    def each(measure, case, edit) -> list[float]:
        found = [measure(scope, methods_vlm.questions(kind, case, 32, 901), edit) for kind in data_vlm.GUESSED]
        return [float(torch.as_tensor(one).mean()) for one in found]

    def edit_of(heads):
        return lambda scope, inputs: [methods_vlm.unseen(scope, inputs, heads)]

    left = {name: each(methods_vlm.effect, "clean", edit_of(heads)) for name, heads in sets.items()}
    assert max(left["top"]) < 0.1
    assert min(left["bottom"]) > 0.95
    assert min(left["random"]) > 0.9
    misled = methods_vlm.HALLUCINATING
    whole = sum(each(methods_vlm.right, misled, None)) / 3
    right = {name: sum(each(methods_vlm.right, misled, edit_of(heads))) / 3 for name, heads in sets.items()}
    assert right["top"] < whole - 0.3
    assert right["bottom"] > whole - 0.15
    assert right["random"] > right["top"] + 0.15


def test_the_effect_of_a_picture(scope, asked) -> None:
    with_it, without = effect(scope, asked[:8])
    seen, blank, _ = batch(asked[:8])
    logits = scope.model(**seen).logits[:, -1].detach().double().softmax(-1)
    assert torch.allclose(with_it, logits, atol=1e-5)
    assert torch.allclose(without, scope.model(**blank).logits[:, -1].detach().double().softmax(-1), atol=1e-5)


def test_carve_finds_the_cell_that_is_asked_for(scope, asked) -> None:
    """In the layer whose head fetches a digit by its place, the best region covers the cell's middle in 8 of 10 pictures or more; a box of
    its size would by chance in the share of its area.
    """
    found = Carve(quantile=0.8, regions=1, layers=(4, 5)).run(scope, asked[:12])
    regions = found.tables["regions"]
    assert len(regions) == 12
    hits, area = 0, 0.0
    for sample, box in zip(asked, regions.to_dict("records"), strict=False):
        row, column = (2 * part + 0.5 for part in divmod(sample.facts["asked"], 3))
        hits += box["top"] - 0.5 <= row <= box["bottom"] + 0.5 and box["left"] - 0.5 <= column <= box["right"] + 0.5
        area += (box["bottom"] - box["top"] + 1) * (box["right"] - box["left"] + 1) / data_vlm.TOKENS / 12
    assert hits >= 0.8 * 12
    assert area < 0.15
    maps = found.tables["maps"]
    assert len(maps) == 12 * len(scope.topology.main) * data_vlm.TOKENS
    assert (maps["contrast"] > 0).all()
    contrast = found["carve_contrast"]
    assert float(contrast[4].argmax()) == 5  # goes where the question says
    assert float(contrast[4, 5]) > 0.9
    assert float(contrast[1].max()) < 0.5  # layer 1 takes in the whole grid whatever is asked


def test_layer_stages(scope) -> None:
    found = LayerStage().run(scope, bundled_samples(3, 3))
    table = found.tables["stages"]
    assert set(table["stage"]) <= {"looking", "reading", "answering", "none"}
    assert (table["image_mass"] + table["text_mass"] + table["sink_mass"]).tolist() == pytest.approx([1] * len(table), abs=1e-5)
    whole = LayerStage(window=len(table)).run(scope, bundled_samples(3, 3))
    assert float(whole["stage_image_to_answer"][0, 0]) > 0.2  # cut in all layers at once
    assert float(whole["stage_question_to_answer"][0, 0]) > 0.2
    assert len(set(whole["stage_image_to_answer"].flatten().tolist())) == 1


def test_a_picture_and_words_are_the_sample_that_they_make(scope) -> None:
    sample = bundled_samples(1, 5)[0]
    pixels = ((sample.inputs["pixel_values"][0, 0] + 1) / 2 * 255).round().byte().numpy()
    picture = Image.fromarray(pixels).convert("RGB")
    read = samples_of(scope, [(picture, sample.question)], count=1, seed=0)[0]
    assert torch.equal(read.ids, sample.ids)
    assert torch.equal(read.image, sample.image)
    assert read.grid == sample.grid
    assert (read.inputs["pixel_values"] - sample.inputs["pixel_values"]).abs().max() < 0.01
    a, b = (Vhd().run(scope, [one])["vhd_raw"] for one in (sample, (picture, sample.question)))
    assert torch.allclose(a, b, rtol=0.1, atol=0.1)
    other = Carve(general="question : read the grid ? answer :").run(scope, [(picture, sample.question)])
    assert len(other.tables["maps"]) == len(scope.topology.main) * data_vlm.TOKENS


def test_visual_sinks_say_how_far_the_model_is_from_having_any(scope) -> None:
    """The start token was given a large coordinate before training; no token of a picture has grown one."""
    found = VisualSinks(samples=3).run(scope)
    table = found.tables["tokens"]
    assert found.numbers["visual_sink_tau"] == 5.0
    assert found.numbers["phi_largest_visual"] < 5.0
    assert found.numbers["visual_sinks"] == 0
    assert set(table["position"]) == {0}
    assert not table["visual"].any()


def test_a_killed_run_goes_on(scope, tmp_path) -> None:
    journal = tmp_path / "journal"
    first = Vhd(samples=3).run(scope, journal=journal)
    kept = sorted(journal.glob("*.safetensors"))
    assert len(kept) == 3
    kept[1].unlink()
    again = Vhd(samples=3).run(scope, journal=journal)
    for name, values in first.scores.items():
        assert torch.equal(again[name], values)
    assert again.tables["vhd_questions"].equals(first.tables["vhd_questions"])


def test_in_a_profile_vision_probes_run_here_and_are_left_out_of_text_models(scope, tiny_llama) -> None:
    profile = scope.profile(probes=[Vhd(samples=2), VisionMass(samples=2)], context=32)
    assert {"vhd", "vision_mass"} <= set(profile.table)
    assert "vhd.vhd_questions" in profile.tables
    assert profile.card.data[0]["kind"] == "pictures"
    text = hs.Scope(tiny_llama)
    asked = [Vhd(), VisionMass(), VisualSinks(), Carve(), LayerStage()]
    found = measure_active(text, asked, named=set(), context=None, seed=0, progress=False, journal=None)
    assert found.left_out == dict.fromkeys(
        ("vhd", "vision_mass", "visual_sinks", "carve", "layer_stage"), "LlamaForCausalLM reads no images"
    )
