"""Heads on pictures: what is stored equals the model's own attention, survives the disk, and is served with its checks."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.app import tiles
from headscope.app.factory import create_app
from headscope.app.pages import head, heads, pictures
from headscope.errors import ProbeError, RunError
from headscope.profile.pictures import answer_profile, bundled_steps, fitted, step_profile
from headscope.store import PictureFacts, Pictures, open_run

LOCAL = {"Host": "localhost", "Accept-Encoding": "gzip"}


@pytest.fixture(scope="module")
def vlm():
    return hs.load("bundled:vlm")


@pytest.fixture(scope="module")
def sample(vlm):
    from headscope.probes.pictures import bundled_samples

    return bundled_samples(1, 3, kinds=["read"])[0]


@pytest.fixture(scope="module")
def root(vlm, sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each kind."""
    folder = tmp_path_factory.mktemp("pictures")
    answer_profile(vlm, sample, answer_tokens=4).save(folder / "answer")
    bundled_steps(hs.load("bundled:dit"), steps=3).save(folder / "steps")
    return folder


def test_a_words_weights_are_eager_attentions(vlm, sample, root: Path) -> None:
    run = open_run(root / "answer")
    found = run.pictures
    assert found is not None
    assert found.facts.kind == "answer"
    assert found.facts.grid == (6, 6)
    assert len(found.facts.labels) == 4
    ids = torch.tensor([run.tokens.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": sample.inputs["pixel_values"]}
    before = vlm.model.config.text_config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            eager = vlm.model(**inputs, output_attentions=True).attentions
    finally:
        vlm.model.set_attn_implementation(before)
    image, last = (ids[0] == ids[0, 1]).nonzero().flatten(), len(sample.ids) - 1
    assert len(image) == 36
    for layer, number in [(0, 0), (1, 7), (4, 3)]:
        expected = eager[layer][0, number][last : last + 4][:, image].numpy()
        np.testing.assert_allclose(found.head(layer, number), expected, atol=2e-6)
    mass = run.heads.set_index(["layer", "head"])["vision_mass"]
    assert mass[1, 7] == pytest.approx(found.head(1, 7).sum(-1).mean(), rel=1e-5)
    np.testing.assert_allclose(run.window(1, 7, last, last + 4, 1, 37), found.head(1, 7), atol=2e-6)


def test_a_steps_weights_are_the_softmax_of_its_q_and_k(root: Path) -> None:
    run = open_run(root / "steps")
    found = run.pictures
    assert found is not None
    assert (found.facts.kind, found.facts.grid, len(found.facts.labels)) == ("step", (8, 8), 3)
    assert found.picture.shape == (3, 8, 8, 3)
    between = found.head_between(2, 3)
    assert between is not None
    np.testing.assert_allclose(between.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.head(2, 3), between.mean(1), rtol=1e-5)
    kept = run.kept_layer(2)  # of the last step
    scores = np.asarray(kept.q[3]).astype(np.float64) @ np.asarray(kept.k[3]).astype(np.float64).T * kept.facts.scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(between[-1], weights / weights.sum(-1, keepdims=True), rtol=1e-4, atol=1e-7)
    assert np.abs(found.head(2, 3)[0] - found.head(2, 3)[-1]).max() > 1e-3
    place = np.arange(64)
    distance = np.hypot((place[:, None] // 8) - (place // 8), (place[:, None] % 8) - (place % 8))
    reach = run.heads.set_index(["layer", "head"])["reach"][2, 3]
    assert reach == pytest.approx((between * distance).sum(-1).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["answer", "steps"])
def test_the_card_says_which_kernels_ran_and_which_measured(root: Path, name: str) -> None:
    card = hs.HeadProfile.load(root / name).card
    assert card.attention_kernels == ["sdpa"]
    assert card.statistics_kernel == "blocked"


def test_pictures_survive_being_saved_again(root: Path, tmp_path: Path) -> None:
    hs.HeadProfile.load(root / "steps").save(tmp_path / "copy")
    first, second = open_run(root / "steps").pictures, open_run(tmp_path / "copy").pictures
    assert first is not None
    assert second is not None
    assert first.facts == second.facts
    np.testing.assert_array_equal(first.load().weights, second.load().weights)
    data = bytearray((tmp_path / "copy" / "pictures.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "copy" / "pictures.safetensors").write_bytes(bytes(data))
    with pytest.raises(RunError, match="checksum"):
        _ = open_run(tmp_path / "copy").pictures


def test_the_routes_serve_pictures_and_weights(root: Path) -> None:
    from PIL import Image

    client = create_app(root).server.test_client()
    found = open_run(root / "steps").pictures
    assert found is not None
    answer = client.get("/api/run/steps/picture/1", headers=LOCAL)
    assert answer.mimetype == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(gzip.decompress(answer.data)))), found.picture[1])
    weights = json.loads(gzip.decompress(client.get("/api/run/steps/2/3/pictures", headers=LOCAL).data))["weights"]
    np.testing.assert_allclose(weights, found.head(2, 3), rtol=1e-3)
    patch = json.loads(gzip.decompress(client.get("/api/run/steps/2/3/pictures/1/27", headers=LOCAL).data))["weights"]
    np.testing.assert_allclose(patch, found.head_between(2, 3)[1, 27], rtol=1e-3)
    every = tiles.decode(gzip.decompress(client.get("/api/run/steps/pictures/2", headers=LOCAL).data))[0]
    np.testing.assert_allclose(every[2 * 6 + 3], found.head(2, 3)[2], rtol=2e-3, atol=1e-6)
    for wrong in ("picture/3", "pictures/3", "2/9/pictures", "2/3/pictures/0/64", "2/3/pictures/9/0"):
        assert client.get(f"/api/run/steps/{wrong}", headers=LOCAL).status_code == 404
    assert client.get("/api/run/answer/2/3/pictures/0/0", headers=LOCAL).status_code == 404


def test_the_pages_show_them(root: Path, synthetic, plain) -> None:
    with create_app(root).server.test_request_context("/", headers={"Host": "localhost"}):
        text = plain(head.layout("answer", "1", "7", frame="2"))
        assert "On the picture, word by word" in text
        assert '"frame":2' in text
        assert "question :" in text
        assert "All heads on the picture" in plain(heads.layout("steps"))
        every = plain(pictures.layout("steps", frame="1", scale="shared"))
        assert "noise to digit" in every
        assert '"value":"shared"' in every
        assert "cannot be shown" in plain(pictures.layout("../steps"))
    with create_app(synthetic.path.parent).server.test_request_context("/", headers={"Host": "localhost"}):
        assert "has no picture" in plain(pictures.layout("tiny"))
        assert "On the picture" not in plain(head.layout("tiny", "0", "0"))


def test_what_has_no_picture_is_refused(smollm2) -> None:
    with pytest.raises(ProbeError, match="reads no images"):
        answer_profile(smollm2)
    with pytest.raises(ProbeError, match="1 steps and 2 labels"):
        step_profile(smollm2, [{}], ["a", "b"], np.zeros((1, 8, 8, 3), np.uint8), grid=(8, 8))
    with pytest.raises(ProbeError, match="own sampler"):
        bundled_steps(smollm2)


def test_shapes_that_do_not_go_together_are_refused() -> None:
    facts = PictureFacts("answer", ("a", "b"), (2, 3))
    picture, weights = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 1, 2, 6), np.float32)
    Pictures(facts, picture, weights)
    for wrong in (
        (facts, picture, weights[..., :5]),
        (facts, picture[..., :1], weights),
        (facts, np.zeros((3, 4, 4, 3), np.uint8), weights),
        (facts, np.zeros((1, 513, 4, 3), np.uint8), weights),
        (facts, picture, weights, np.zeros((1, 1, 2, 6, 5), np.float32)),
        (facts, picture, weights.astype(np.float64)),
        (PictureFacts("film", ("a", "b"), (2, 3)), picture, weights),
    ):
        with pytest.raises(RunError):
            Pictures(*wrong)
    large = np.zeros((1, 1025, 2050, 3), np.uint8)
    large[:, :10] = 200
    small = fitted(large)
    assert small.shape == (1, 205, 410, 3)
    assert small[0, 0, 0, 0] == 200
