"""Models that look both ways, and models that read no text: what fits is measured, the rest is said."""

from __future__ import annotations

import sys

import pytest
import torch

import headscope as hs
from headscope.cli.main import main
from headscope.errors import DataError
from headscope.selfcheck import check_scope


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    return hs.Scope(BertModel(config, add_pooling_layer=False).eval(), name="bert")


@pytest.fixture(scope="module")
def vit():
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return hs.Scope(Dinov2Model(config).eval(), processor, name="vit")


def test_the_self_check_knows_attention_that_looks_both_ways(bert) -> None:
    found = check_scope(bert, tokens=48)
    assert found["ok"], found
    assert found["errors"]["distance"] < 1e-5
    assert found["errors"]["sink_importance"] < 1e-5


def test_a_vision_model_says_that_it_reads_pictures(vit) -> None:
    for wrong in ("a text", torch.zeros(1, 3, 28, 28), [[[0, 1]]]):
        with pytest.raises(DataError, match="vit reads pixel_values; pass a dict"):
            vit.capture(wrong)
    with pytest.raises(DataError, match="vit reads pictures"):
        vit.encode("a text")
    with pytest.raises(DataError, match="reads no token ids"):
        vit.profile("passive", context=64, progress=False)
    with pytest.raises(DataError, match="reads none"):
        check_scope(vit)
    stats = vit.capture({"pixel_values": torch.zeros(1, 3, 28, 28)}, statistics=["entropy"])
    assert stats["entropy"][1].shape == (1, 4, 5)


def test_a_diffusion_transformer_is_not_asked_for_a_tokenizer(capsys, monkeypatch, tmp_path) -> None:
    for arguments in (("profile", "bundled:sd3", "--out", str(tmp_path / "run")), ("doctor", "bundled:sd3")):
        monkeypatch.setattr(sys, "argv", ["headscope", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        printed = capsys.readouterr()
        assert len(printed.err.strip().splitlines()) == 1
        assert "token ids" in printed.err
    assert list(tmp_path.iterdir()) == []
