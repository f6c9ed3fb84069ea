"""The bundled diffusion transformers: what they draw is close to held-out digits, and words are obeyed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from headscope.models.bundled import row_of
from headscope.models.bundled.data_dit import DIGITS, WORDS, encode, pictures, random_text
from headscope.models.bundled.diffusion import read_transformer
from headscope.models.bundled.evaluate_dit import quality, read
from headscope.models.bundled.flow import embed, pooled, sample, text_table
from headscope.models.bundled.training import generator


def load(name):
    return read_transformer(row_of(name).path, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def dit():
    return load("dit")


@pytest.fixture(scope="module")
def sd3():
    return load("sd3")


def test_classes(dit, sd3):
    assert type(dit).__name__ == "DiTTransformer2DModel"
    assert type(sd3).__name__ == "SD3Transformer2DModel"


def test_unconditional_pictures_are_near_held_out_digits_and_have_room(dit):
    record = json.loads((row_of("dit").path / "evaluation.json").read_text())
    found = quality(sample(dit, 96, steps=8, seed=3))
    assert found["distance"] == pytest.approx(record["steps_8"]["distance"], abs=0.25)
    assert found["confidence"] == pytest.approx(record["steps_8"]["confidence"], abs=0.07)
    assert found["distance"] < 0.4 * record["noise"]["distance"]
    # Room for guidance: the classifier is less sure of them than of real digits, and their spread is further off.
    assert record["steps_8"]["confidence"] < record["training"]["confidence"] - 0.03
    assert record["steps_8"]["frechet"] > record["training"]["frechet"] + 0.2


def test_words_are_drawn(sd3):
    asked = np.arange(60) % 10
    text = embed([f"a handwritten digit {DIGITS[number]}" for number in asked], row_of("sd3").path)
    drawn = sample(sd3, 60, steps=8, seed=1, text=text)
    assert (read(drawn) == asked).mean() >= 0.93
    assert (read(sample(sd3, 60, steps=8, seed=1, text=torch.zeros_like(text))) == asked).mean() < 0.4


def test_the_seed_decides_and_guidance_zero_changes_nothing(sd3):
    text = embed(["a seven", "zero"], row_of("sd3").path)
    first = sample(sd3, 2, steps=2, seed=5, text=text)
    assert torch.equal(first, sample(sd3, 2, steps=2, seed=5, text=text, guidance=0.0))
    assert not torch.equal(first, sample(sd3, 2, steps=2, seed=6, text=text))
    assert not torch.equal(first, sample(sd3, 2, steps=2, seed=5, text=text, guidance=1.0))


def test_guidance_without_words_is_refused(dit):
    with pytest.raises(ValueError, match="pass text"):
        sample(dit, 1, steps=1, seed=0, guidance=1.0)


def test_prompts():
    assert encode(["a handwritten digit seven", "", "Two"]).tolist() == [[1, 3, 4, 12], [0] * 4, [7, 0, 0, 0]]
    with pytest.raises(ValueError, match="cat"):
        encode(["a cat"])
    with pytest.raises(ValueError, match="at most 4"):
        encode(["a a a a a"])


def test_the_shipped_words_are_the_seeded_table():
    whole = embed([" ".join(WORDS[1:5])], row_of("sd3").path)[0]
    assert (whole - text_table()[1:5]).abs().max() < 0.02
    assert torch.equal(pooled(torch.zeros(1, 4, 96)), torch.zeros(1, 96))
    assert torch.allclose(pooled(whole[None]), whole.mean(0)[None])


def test_training_text_names_the_label_or_nothing():
    labels = torch.arange(10).repeat(20)
    ids = random_text(labels, generator(0, "cpu"), drop=0.25)
    empty = (ids == 0).all(1)
    assert 0.1 < empty.double().mean() < 0.4
    for row, label in zip(ids[~empty].tolist(), labels[~empty].tolist(), strict=True):
        assert [WORDS[number] for number in row if number][-1] == DIGITS[label]


def test_quality_of_the_held_out_digits_is_perfect():
    held, _ = pictures(True)
    found = quality(held)
    assert found["distance"] == 0
    assert abs(found["frechet"]) < 1e-6
