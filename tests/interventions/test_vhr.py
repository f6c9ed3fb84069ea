"""VHR and VisionScale: the example by hand, the whole pass recomputed with hooks on o_proj, decode, padding, other prompts, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache

import headscope as hs
from headscope.errors import HeadscopeError, InterventionError
from headscope.interventions import VHR, HeadMask, HeadSet, Intervention, Scale, Stack, VisionScale
from headscope.interventions.running import outputs_of
from headscope.interventions.vhr import paper_layers
from headscope.probes import Vhd
from headscope.probes.pictures import bundled_samples
from headscope.scope import Scope

from ..core.tiny_models import llama, llava, make, qwen_vl

IMAGE, CELLS = 96, 16


def prompts(lengths=(7, 4), seed: int = 0) -> dict[str, torch.Tensor]:
    """<bos>, a word, 16 image tokens, words; shorter ones padded in front."""
    source = torch.Generator().manual_seed(seed)
    rows = []
    for words in lengths:
        text = torch.randint(3, 90, (words + 1,), generator=source)
        row = torch.cat([torch.tensor([1]), text[:1], torch.full((CELLS,), IMAGE), text[1:]])
        rows.append(torch.nn.functional.pad(row, (max(lengths) - words, 0)))
    ids = torch.stack(rows)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": torch.randn(len(lengths), 3, 28, 28, generator=source).double(),
    }


def row_of(inputs, row: int) -> dict[str, torch.Tensor]:
    real = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row, real][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][row : row + 1]}


@pytest.fixture(scope="module")
def scope():
    return Scope(make(llava).double())


def rule(seen, unseen) -> torch.Tensor:
    """Bool [H] by the paper's equations, with plain numbers."""
    vhd = [float((a - b).square().sum()) ** 0.5 for a, b in zip(seen, unseen, strict=True)]
    loud = [float(b.square().sum()) for b in unseen]

    def high(values):
        mean = sum(values) / len(values)
        return [one > mean + (sum((other - mean) ** 2 for other in values) / len(values)) ** 0.5 for one in values]

    vhd = [0.0 if a and b else one for one, a, b in zip(vhd, high(vhd), high(loud), strict=True)]
    ranked = sorted(vhd)
    middle = (ranked[(len(vhd) - 1) // 2] + ranked[len(vhd) // 2]) / 2
    return torch.tensor([one > middle for one in vhd])


def hooked(model, edit, **inputs):
    """Logits with edit(layer, z [B, N, H, D]) applied to what goes into o_proj; and these z."""
    hooks, kept = [], []
    for number, layer in enumerate(model.model.language_model.layers):

        def hook(_, args, number=number):
            z = edit(number, args[0].unflatten(-1, (4, -1)).clone())
            kept.append(z)
            return (z.flatten(-2),)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits, kept
    finally:
        for one in hooks:
            one.remove()


def test_the_example_by_hand() -> None:
    """VHD (1, 2, 9, 4): median 3 takes the last two; with head 2 loud without the picture its 9 counts as 0, and the median is 1.5."""
    unseen = torch.zeros(1, 4, 2).double()
    apart = torch.tensor([1.0, 2.0, 9.0, 4.0]).double()
    seen = unseen.clone()
    seen[0, :, 0] = apart
    assert VHR().choice(seen, unseen).tolist() == [[False, False, True, True]]
    loud = torch.tensor([1.0, 1.0, 8.0, 1.0]).double()
    unseen[0, :, 1] = loud
    seen[0, :, 1] = loud
    assert VHR().choice(seen, unseen).tolist() == [[False, True, False, True]]
    assert VHR(outliers=False).choice(seen, unseen).tolist() == [[False, False, True, True]]
    assert rule(seen[0], unseen[0]).tolist() == [False, True, False, True]
    assert VHR(distance="cosine", outliers=False).choice(seen, unseen).tolist() == [[False, True, False, True]]  # angles 45, 63, 48, 76


def test_layers_of_the_paper() -> None:
    assert paper_layers(32) == {1, *range(18, 32)}
    assert paper_layers(5) == {1, 3, 4}
    assert paper_layers(1) == {0}


@pytest.mark.parametrize("without", ["removed", "blank"])
def test_a_batch_is_the_definition_recomputed_layer_by_layer(scope, without) -> None:
    inputs, model = prompts(), scope.model
    vhr = VHR.prepared(scope, inputs, "all", without=without, alpha=2.5)
    with scope.intervene(vhr), torch.no_grad():
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # rotations are made in float32, so they have to be the same ones
        got = scope.model(**inputs, position_ids=places).logits[:, -1]
    for row in range(2):
        one = row_of(inputs, row)
        if without == "blank":
            other = {**one, "pixel_values": torch.zeros_like(one["pixel_values"])}
        else:
            kept = one["input_ids"][0] != IMAGE
            ids = one["input_ids"][:, kept]
            places = torch.arange(len(kept))[None, kept]
            other = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
        _, unseen = hooked(model, lambda _, z: z, **other)
        picked = []

        def edit(layer, z, unseen=unseen, picked=picked):
            chosen = rule(z[0, -1], unseen[layer][0, -1])
            picked.append(chosen)
            z[:, -1, chosen] *= 2.5
            return z

        want, _ = hooked(model, edit, **one)
        assert float((got[row] - want[0, -1]).abs().max()) < 1e-10
        names = [module.name for module in scope.topology.main]
        assert vhr.selected[row] == tuple((names[at], head) for at, c in enumerate(picked) for head in c.nonzero()[:, 0].tolist())
    assert vhr.selected[0] != vhr.selected[1]


def test_steps_with_a_cache_equal_one_pass_and_heads_stay(scope) -> None:
    inputs = prompts((9,))
    ids = inputs["input_ids"]
    short = {"input_ids": ids[:, :22], "pixel_values": inputs["pixel_values"]}
    vhr = VHR.prepared(scope, short, "all")
    with scope.intervene(vhr), torch.no_grad():
        whole = scope.model(**inputs).logits
        chosen = vhr.selected
        cache = DynamicCache(config=scope.model.config.text_config)
        parts = [scope.model(**short, past_key_values=cache, use_cache=True).logits]
        parts += [scope.model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(22, 27)]
        assert vhr.selected == chosen
    assert float((torch.cat(parts, 1) - whole).abs().max()) < 1e-10
    with torch.no_grad():
        plain = scope.model(**inputs).logits
    assert torch.equal(whole[:, :21], plain[:, :21])
    assert all(float((whole - plain)[:, at].abs().max()) > 1e-3 for at in range(21, 27))


def test_static_and_dynamic_caches_padding_and_another_edit_on_top(scope) -> None:
    inputs = prompts()
    edits = (VHR.prepared(scope, inputs, "1.0,1.1,1.2,1.3"), HeadMask([(0, 2)]))
    with scope.intervene(*edits):
        dynamic = scope.generate(inputs, max_new_tokens=6, min_new_tokens=6).new_ids
        assert torch.equal(scope.generate(inputs, max_new_tokens=6, min_new_tokens=6, cache_implementation="static").new_ids, dynamic)
        beams = scope.generate(inputs, max_new_tokens=4, min_new_tokens=4, num_beams=2).new_ids
        assert beams.shape == (2, 4)
    one = row_of(inputs, 1)
    with scope.intervene(VHR.prepared(scope, one, "1.0,1.1,1.2,1.3"), HeadMask([(0, 2)])):
        assert torch.equal(scope.generate(one, max_new_tokens=6, min_new_tokens=6).new_ids[0], dynamic[1])


def test_positions_that_close_up_make_another_reference(scope) -> None:
    held, moved = (VHR.prepared(scope, prompts((7,)), text_positions=how).reference.tensor for how in ("keep", "shift"))
    assert held.shape == (1, 4, 8)  # the paper's layers of two: the second
    assert not torch.allclose(held, moved)
    qwen = Scope(make(qwen_vl))
    ids = torch.cat([torch.tensor([5, 94]), torch.full((6,), IMAGE), torch.tensor([93, 7, 8, 9])])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(24, 1176),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    vhr = VHR.prepared(qwen, inputs)
    with qwen.intervene(vhr):
        qwen.generate(inputs, max_new_tokens=2, min_new_tokens=2)
    assert len(vhr.selected[0]) == 2
    two = {**inputs, "input_ids": ids.repeat(2, 1), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.int64)}
    with pytest.raises(InterventionError, match="one prompt at a time"):
        VHR.prepared(qwen, two)


def test_no_reinforcement_is_no_change(scope) -> None:
    inputs = prompts()
    with torch.no_grad():
        plain = scope.model(**inputs).logits
        with scope.intervene(VHR.prepared(scope, inputs, alpha=1.0)):
            assert torch.equal(scope.model(**inputs).logits, plain)


@dataclass(frozen=True)
class Fails(Intervention):
    """Raises in a decode step."""

    def after(self, call, output):
        if call.query_offset > 26:
            raise RuntimeError("stop")
        return output


def test_an_exception_in_the_middle_leaves_nothing_behind(scope) -> None:
    inputs = prompts()
    with torch.no_grad():
        plain = scope.model(**inputs).logits
    with pytest.raises(RuntimeError, match="stop"), scope.intervene(VHR.prepared(scope, inputs), Fails()):
        scope.generate(inputs, max_new_tokens=6, min_new_tokens=6)
    with torch.no_grad():
        assert torch.equal(scope.model(**inputs).logits, plain)


def test_what_is_refused(scope) -> None:
    inputs = prompts()
    vhr = VHR.prepared(scope, inputs)
    with pytest.raises(InterventionError, match="not the prompt"), scope.intervene(vhr), torch.no_grad():
        scope.model(**prompts(seed=1))
    with pytest.raises(InterventionError, match="prepared for 2 prompts"), scope.intervene(vhr), torch.no_grad():
        scope.model(**row_of(inputs, 0))
    cache = DynamicCache(config=scope.model.config.text_config)
    with torch.no_grad():
        scope.model(**inputs, past_key_values=cache, use_cache=True)
    more = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)}
    with pytest.raises(InterventionError, match="open the block before"), scope.intervene(vhr), torch.no_grad():
        scope.model(**more, past_key_values=cache, use_cache=True)
    for call, words in (
        (lambda: VHR().bind(scope), "without a reference"),
        (lambda: replace(vhr, heads=((0, 1),)).bind(scope), r"\[2 prompts, 1 heads, Dv\]"),
        (lambda: VHR.prepared(Scope(make(llama)), inputs), "reads no images"),
        (lambda: VHR.prepared(scope, inputs, without="noise"), "'noise'"),
        (lambda: VHR.prepared(scope, inputs, text_positions="left"), "'left'"),
        (lambda: VHR.prepared(scope, inputs, distance="l1"), "'l1'"),
        (lambda: VHR.prepared(scope, inputs, "7.0"), "7"),
        (lambda: VHR.prepared(scope, {"pixel_values": inputs["pixel_values"]}), "no prompt"),
        (lambda: VisionScale("0.0").bind(Scope(make(llama))), "reads no images"),
        (lambda: VisionScale.chosen(scope, metric="sink"), "'sink'"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            call()
    with pytest.raises(InterventionError, match="order=1"), scope.intervene(vhr, Scale("1.0", 2.0)):
        pytest.fail("the block was entered")


def test_it_is_written_down_with_its_reference(scope, tmp_path) -> None:
    inputs = prompts()
    vhr = VHR.prepared(scope, inputs, alpha=1.5, outliers=False, distance="relative", phase="decode")
    stack = Stack((vhr, VisionScale("0.1", 0.5)))
    again = Stack.load(stack.save(tmp_path / "edits.json"))
    assert again.interventions == stack.interventions
    assert "multiply by 1.5" in vhr.explain()
    with scope.intervene(*again):
        a = scope.generate(inputs, max_new_tokens=4, min_new_tokens=4).new_ids
    with scope.intervene(*stack):
        assert torch.equal(scope.generate(inputs, max_new_tokens=4, min_new_tokens=4).new_ids, a)


def test_vision_scale_is_scale_in_text_rows(scope) -> None:
    inputs = prompts((7,))
    text = (inputs["input_ids"][0] != IMAGE).nonzero()[:, 0]

    def edit(layer, z):
        if layer == 0:
            z[:, text, 1] *= 0.5
        return z

    want, _ = hooked(scope.model, edit, **inputs)
    with scope.intervene(VisionScale("0.1", 0.5)), torch.no_grad():
        assert float((scope.model(**inputs).logits - want).abs().max()) < 1e-10


# ---- bundled:vlm --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing():
    return hs.load("bundled:vlm", device="cpu")


def batch(samples):
    inputs = {name: torch.cat([one.inputs[name] for one in samples]) for name in samples[0].inputs}
    return inputs, torch.tensor([one.wanted for one in samples])


def test_masking_the_heads_that_the_picture_moves_takes_its_effect_away(seeing) -> None:
    """16 of 40 heads, whose output becomes what it is for an even grey. Three random sets of others leave more of the answers each."""
    inputs, wanted = batch(bundled_samples(32, 21, kinds=("position",)))
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    vhd = Vhd(without="blank").run(seeing, bundled_samples(8, 12, kinds=("position",)))
    top = HeadSet(vhd.top("vhd_raw", 16))

    def accuracy(given) -> float:
        with torch.no_grad():
            return float((outputs_of(seeing, {**given, "logits_to_keep": 1})[:, -1].argmax(-1) == wanted).double().mean())

    whole, unseen = accuracy(inputs), accuracy(blank)
    assert whole > 0.9
    assert unseen < 0.3
    left = []
    for heads in (top, *(HeadSet.random(seeing, 16, seed, without=top) for seed in range(3))):
        with seeing.intervene(HeadMask.resampled(seeing, blank, list(heads))):
            left.append(accuracy(inputs))
    assert left[0] < 0.5
    assert min(left[1:]) > left[0] + 0.2


def test_on_the_bundled_model_reinforcement_keeps_the_answers(seeing) -> None:
    inputs, wanted = batch(bundled_samples(32, 22, kinds=("position",)))
    vhr = VHR.prepared(seeing, inputs, without="blank", alpha=1.5)
    with seeing.intervene(vhr), torch.no_grad():
        right = (seeing.model(**inputs).logits[:, -1].argmax(-1) == wanted).double().mean()
    assert float(right) > 0.9
    counts = [len(one) for one in vhr.selected]  # 4 of 8 heads in each of three layers; fewer where heads that rest on <bos> tie at nothing
    assert set(counts) <= {11, 12}
    assert counts.count(12) >= 16
