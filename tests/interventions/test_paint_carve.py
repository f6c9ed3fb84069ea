"""PAINT against the dense matrix and eager vision attention; carve: boxes, masks, what the model is shown again, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

import headscope as hs
from headscope.errors import InterventionError
from headscope.interventions import PAINT, carve, from_json, record_heads
from headscope.interventions.carve import best_regions, pixel_mask, seen_area, token_box
from headscope.interventions.paint import outstanding, strongest, tower_attention
from headscope.models.bundled import data_vlm
from headscope.probes import Carve
from headscope.probes.pictures import bundled_samples
from headscope.scope import Scope

from ..core.tiny_models import eager_copy, llama, llava, make, qwen_vl
from .dense_edits import Dense
from .edit_cases import Grab

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


@pytest.fixture(scope="module")
def scope():
    return Scope(make(llava).double())


# ---- PAINT --------------------------------------------------------------------------------------------------------------


def test_tokens_are_chosen_by_rank_and_by_quartiles() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 100.0]).double()  # quartiles 2.75, 6.25: beyond 11.5
    assert outstanding(values).nonzero().flatten().tolist() == [7]
    assert strongest(values, 0.25, ~outstanding(values)).nonzero().flatten().tolist() == [6]
    assert strongest(values, 0.5, torch.ones(8, dtype=torch.bool)).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_tokens_come_from_the_towers_cls_rows(scope) -> None:
    inputs = prompts()
    eager = eager_copy(scope.model)
    with torch.no_grad():
        maps = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    want = [one[:, :, 0, 1:].sum(1) for one in (maps[0], maps[-2])]  # two layers: the first is also the last but one
    for got, rows in zip(tower_attention(scope, inputs), want, strict=True):
        assert torch.allclose(got, rows, atol=1e-12)
    paint = PAINT.prepared(scope, inputs)
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        places = (inputs["input_ids"][row, real] == IMAGE).nonzero()[:, 0]
        low, high = want[1][row].quantile(0.25), want[1][row].quantile(0.75)
        summary = set((want[1][row] > high + 1.5 * (high - low)).nonzero()[:, 0].tolist())
        local = set(want[0][row].topk(4).indices.tolist()) - summary
        for values, chosen in ((paint.local, local), (paint.summary, summary)):
            assert set(values.tensor[row].nonzero()[:, 0].tolist()) == {int(places[one]) for one in chosen}
    assert bool(paint.local.tensor.any(1).all())


def masks(lengths) -> dict[str, torch.Tensor]:
    """Local: image tokens 1, 5, 6; summary: 2 and 9."""
    out = {}
    for name, tokens in (("local", [1, 5, 6]), ("summary", [2, 9])):
        out[name] = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
        out[name][:, [2 + one for one in tokens]] = True
    return out


def painted(inputs, **options) -> PAINT:
    from headscope.interventions.prompts import prompt_digest

    real = inputs["attention_mask"].bool()
    lengths = tuple(real.sum(1).tolist())
    return PAINT(**masks(lengths), lengths=lengths, prompt=prompt_digest(inputs["input_ids"], real), **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_scores_are_boosted_in_prefill_and_decode(scope, cache) -> None:
    inputs, calls = prompts(), []
    paint = painted(inputs, heads="0.0,0.3,1.1", alpha=0.9, beta=0.3)
    with scope.intervene(Grab(calls)), scope.intervene(paint), record_heads(scope, sites=("z",)) as record:
        scope.generate(inputs, max_new_tokens=5, min_new_tokens=5, cache_implementation=cache)
    text = [call for call in calls if call.layer is not None]
    assert len(text) == 10
    start = (~inputs["attention_mask"].bool()).sum(1)
    for call in text:
        keys, rows = call.k.shape[2], call.q.shape[2]
        dense = Dense(call)
        heads = [0, 3] if call.layer == 0 else [1]
        last = torch.arange(rows) == rows - 1
        before = dense.output.clone()
        for tokens, factor in (([1, 5, 6], 0.9), ([2, 9], 0.3)):
            members = torch.zeros(2, keys, dtype=torch.bool)
            for row in range(2):
                members[row, [int(start[row]) + 2 + one for one in tokens]] = True
            dense.boost(heads, members, factor, last[None])
        where = slice(call.query_offset, call.query_offset + rows)
        keep = dense.counts[..., None]
        assert float(torch.where(keep, record.z(call.layer)[:, where] - dense.output, 0.0).abs().max()) < 1e-10
        assert float((dense.output - before)[:, -1, heads].abs().max()) > 1e-4


def test_steps_with_a_cache_equal_one_pass(scope) -> None:
    inputs = prompts((9,))
    ids = inputs["input_ids"]
    short = {"input_ids": ids[:, :22], "attention_mask": torch.ones(1, 22, dtype=torch.int64), "pixel_values": inputs["pixel_values"]}
    paint = painted(short)
    with scope.intervene(paint), torch.no_grad():
        whole = scope.model(**inputs).logits
        cache = DynamicCache(config=scope.model.config.text_config)
        parts = [scope.model(**short, past_key_values=cache, use_cache=True).logits]
        parts += [scope.model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(22, 27)]
    assert float((torch.cat(parts, 1) - whole).abs().max()) < 1e-10
    with torch.no_grad():
        plain = scope.model(**inputs).logits
        assert torch.equal(whole[:, :21], plain[:, :21])
        assert float((whole - plain)[:, 21:].abs().max()) > 1e-3
        with scope.intervene(replace(paint, alpha=0.0, beta=0.0)):
            assert torch.equal(scope.model(**inputs).logits, plain)


def test_what_paint_refuses(scope, tmp_path) -> None:
    inputs = prompts()
    paint = painted(inputs, layers=(0, 1))
    with pytest.raises(InterventionError, match="not the prompt"), scope.intervene(paint), torch.no_grad():
        scope.model(**prompts(seed=1))
    ids = torch.cat([torch.tensor([5, 94]), torch.full((6,), IMAGE), torch.tensor([93, 7, 8, 9])])[None]
    hidden = inputs["attention_mask"].clone()
    hidden[0, 5] = 0
    for call, words in (
        (lambda: PAINT().bind(scope), "local=None"),
        (lambda: PAINT.prepared(Scope(make(llama)), inputs), "reads no images"),
        (lambda: PAINT.prepared(Scope(make(qwen_vl)), {"input_ids": ids}), "no CLS token"),
        (lambda: PAINT.prepared(scope, inputs, share=0.0), "share=0"),
        (lambda: PAINT.prepared(scope, {**inputs, "attention_mask": hidden}), "32 patches and the prompts 31 image tokens"),
        (lambda: PAINT(alpha=float("nan")), "alpha=nan"),
    ):
        with pytest.raises(InterventionError, match=words):
            call()
    path = tmp_path / "paint.json"
    path.write_text(paint.to_json(tmp_path / "paint.safetensors"))
    assert from_json(path.read_text(), tmp_path) == paint
    assert "6 local image tokens" in paint.explain()


# ---- carve --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing():
    return hs.load("bundled:vlm", device="cpu")


def drawn(sample) -> Image.Image:
    pixels = ((sample.inputs["pixel_values"][0, 0] + 1) / 2 * 255).round().byte().numpy()
    return Image.fromarray(pixels).convert("RGB")


def test_tokens_become_pixels() -> None:
    assert token_box((0, 0, 0, 0), (6, 6), (0, 0, 48, 48)) == (0, 0, 8, 8)
    assert token_box((2, 1, 3, 4), (6, 6), (0, 0, 48, 48)) == (8, 16, 40, 32)
    assert token_box((0, 0, 5, 5), (6, 6), (10, 0, 60, 50)) == (10, 0, 60, 50)
    assert token_box((1, 0, 1, 1), (3, 4), (0, 0, 10, 10)) == (0, 3, 5, 7)  # a token's share of a pixel counts
    kept = torch.zeros(6, 6, dtype=torch.bool)
    kept[1, 2] = kept[1, 3] = True
    mask = pixel_mask(kept, (0, 0, 48, 48), (48, 48))
    assert mask.nonzero().amin(0).tolist() == [8, 16]
    assert mask.nonzero().amax(0).tolist() == [15, 31]
    assert int(mask.sum()) == 8 * 16


def test_regions_that_stay() -> None:
    field = torch.zeros(4, 5).double()
    field[0, 0], field[1, 4] = 9.0, 5.0
    field[2, 1] = field[2, 2] = field[3, 2] = 4.0
    kept, found = best_regions(field, 0.75, 2)
    assert kept.nonzero().tolist() == [[0, 0], [2, 1], [2, 2], [3, 2]]
    assert [one["sum"] for one in found] == [12, 9]


def test_the_area_that_a_processor_shows() -> None:
    class Processor:
        do_center_crop, do_resize = True, True
        size, crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}

    class Reader:
        image_processor = Processor()

    class Fake:
        tokenizer = Reader()

    assert seen_area(Fake(), (640, 480)) == (80, 0, 560, 480)
    assert seen_area(Fake(), (300, 500)) == (0, 100, 300, 400)
    Processor.size, Processor.do_resize = {}, False
    assert seen_area(Fake(), (640, 480)) == (152, 72, 488, 408)
    Processor.do_center_crop = False
    assert seen_area(Fake(), (640, 480)) == (0, 0, 640, 480)


def test_the_map_is_the_probes_and_the_model_sees_what_is_left(seeing) -> None:
    sample = bundled_samples(1, 11, kinds=("position",))[0]
    found = carve(seeing, drawn(sample), sample.question, quantile=0.7, regions=2)
    table = Carve(quantile=0.7, regions=2).run(seeing, [(drawn(sample), sample.question)]).tables["regions"]
    assert [list(box) for box in found.boxes] == [
        [8 * left, 8 * top, 8 * right + 8, 8 * bottom + 8]
        for left, top, right, bottom in table[["left", "top", "right", "bottom"]].to_numpy().tolist()
    ]
    assert int(found.mask.sum()) == 64 * int(found.kept.sum()) == 64 * int(table["tokens"].sum())
    assert found.picture.size == (48, 48)
    masked = carve(seeing, drawn(sample), sample.question, quantile=0.7, regions=2, view="masked", fill=128)
    pixels = torch.from_numpy(numpy.asarray(masked.picture).copy())
    original = torch.from_numpy(numpy.asarray(drawn(sample)).copy())
    assert torch.equal(pixels[masked.mask], original[masked.mask])
    assert bool((pixels[~masked.mask] == 128).all())
    again = seeing.generate(hs.probes.pictures.asked(seeing, masked.picture, sample.question).inputs, max_new_tokens=4).text
    assert masked.answer in again
    cut = carve(seeing, drawn(sample), sample.question, quantile=0.7, regions=2, view="cropped", margin=1)
    left, top, right, bottom = found.crop
    assert cut.crop == (max(0, left - 8), max(0, top - 8), min(48, right + 8), min(48, bottom + 8))
    assert cut.picture.tobytes() == drawn(sample).crop(cut.crop).resize((48, 48), Image.Resampling.BICUBIC).tobytes()


def test_what_is_kept_holds_what_was_asked_for(seeing) -> None:
    """The cell's middle lies in the mask in 8 of 10 pictures or more, by chance in the share of its area; masked, most answers stay."""
    words = {number: word for word, number in data_vlm.ids_of().items()}
    hits, area, right = 0, 0.0, 0
    for sample in bundled_samples(10, 11, kinds=("position",)):
        found = carve(seeing, drawn(sample), sample.question, view="masked", tokens=2, max_new_tokens=2)
        row, column = (16 * part + 8 for part in divmod(sample.facts["asked"], 3))
        hits += bool(found.mask[row - 4 : row + 4, column - 4 : column + 4].any())
        area += float(found.mask.float().mean()) / 10
        right += found.answer == words[sample.wanted]
        assert found.answers[0] == words[sample.wanted]
    assert hits >= 8
    assert area < 0.5
    assert right >= 1


def test_what_carve_refuses(seeing, tmp_path) -> None:
    picture = Image.new("RGB", (48, 48))
    (tmp_path / "a.png").write_text("no picture")
    for call, words in (
        (lambda: carve(seeing, picture, "read the grid", view="cut"), "'cut'"),
        (lambda: carve(seeing, picture, "read the grid", margin=-1), "margin=-1"),
        (lambda: carve(seeing, picture, "read the grid", quantile=1.0), "quantile=1"),
        (lambda: carve(seeing, picture, "read the grid", layers=(3, 9)), r"layers=\(3, 9\)"),
        (lambda: carve(seeing, tmp_path / "a.png", "read the grid"), "cannot be read"),
        (lambda: carve(seeing, torch.zeros(3, 4), "read the grid"), "picture of bytes"),
        (lambda: carve(Scope(make(llama)), picture, "what?"), "reads no images"),
        (lambda: carve(Scope(make(llava)), picture, "what?"), "without a processor"),
    ):
        with pytest.raises(InterventionError, match=words):
            call()
