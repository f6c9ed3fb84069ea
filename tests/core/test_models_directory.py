"""Local checkpoints: whole ones load as what they are, everything else is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headscope.errors import ModelError
from headscope.models import load


@pytest.fixture
def saved(tiny_llama: torch.nn.Module, tmp_path: Path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def add_tokenizer(where: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "head": 1, "scope": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(where)


def edit(path: Path, **changes: object) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def test_loads_what_was_saved(saved: Path, tiny_llama: torch.nn.Module) -> None:
    add_tokenizer(saved)
    scope = load(saved)
    assert (type(scope.model).__name__, scope.name, scope.source, scope.revision) == ("LlamaForCausalLM", "tiny", str(saved), "")
    assert scope.tokenizer("head scope")["input_ids"] == [1, 2]
    assert not scope.model.training
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(scope.model(ids).logits, tiny_llama(ids).logits)


def test_without_a_tokenizer_it_is_ids_only(saved: Path) -> None:
    assert load(saved).tokenizer is None


def test_float32_on_cpu_whatever_the_checkpoint_holds(tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half", device="cpu").model.dtype == torch.float32
    assert load(tmp_path / "half", device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load(tmp_path / "half", device="cpu", dtype="torch.float64").model.dtype == torch.float64


def test_attention_implementation_is_the_callers(saved: Path) -> None:
    assert load(saved).model.config._attn_implementation == "sdpa"
    assert load(saved, attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load(saved, attn_implementation="nonsense")


def small(family: str) -> torch.nn.Module:
    """A tiny random model of a family that is not a causal language model alone."""
    import transformers as t

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if family == "bert":
        return t.BertForMaskedLM(t.BertConfig(vocab_size=50, **shape))
    if family == "vit":
        return t.ViTModel(t.ViTConfig(image_size=32, patch_size=16, **shape))
    text = {"model_type": "llama", "vocab_size": 50, "num_key_value_heads": 1, **shape}
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "projection_dim": 32, **shape}
    return t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49))


@pytest.mark.parametrize("family", ["bert", "vit", "llava"])
def test_the_checkpoint_names_its_class(family: str, tmp_path: Path) -> None:
    """A vision-language model keeps its tower and an encoder its head; every weight arrives."""
    model = small(family)
    model.save_pretrained(tmp_path / family)
    found = load(tmp_path / family).model
    assert type(found) is type(model)
    assert set(found.state_dict()) == set(model.state_dict())
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_without_architectures_the_type_decides(saved: Path) -> None:
    edit(saved / "config.json", architectures=None)
    assert type(load(saved).model).__name__ == "LlamaForCausalLM"


def test_an_image_processor_comes_with_a_vision_model(tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil

    small("vit").save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    scope = load(tmp_path / "vit")
    pixels = scope.tokenizer(images=torch.zeros(3, 40, 40, dtype=torch.uint8).numpy(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)


def test_missing_weights_are_not_made_up(saved: Path) -> None:
    """transformers fills them with random numbers and logs a line."""
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of LlamaForCausalLM \(model.layers.1.self_attn.k_proj.weight\)"):
        load(saved)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda where: (where / "config.json").unlink(), "it has no config.json; pass the directory that save_pretrained wrote"),
        (lambda where: (where / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda where: (where / "config.json").write_text("[]"), "names no model_type"),
        (lambda where: edit(where / "config.json", model_type=None), "names no model_type"),
        (lambda where: edit(where / "config.json", model_type="nonesuch", architectures=None), "transformers cannot load it"),
        (
            lambda where: edit(where / "config.json", model_type="nonesuch", auto_map={"AutoConfig": "code.Config"}),
            "needs code from its repository, which headscope does not run",
        ),
        (lambda where: (where / "model.safetensors").unlink(), "it holds no weights"),
        (lambda where: (where / "model.safetensors").write_bytes(b"\x08"), "transformers cannot load it"),
        (lambda where: (where / "model.safetensors").write_bytes((where / "model.safetensors").read_bytes()[:-99]), "cannot load it"),
        (lambda where: edit(where / "config.json", vocab_size=96), "cannot load it"),
        (lambda where: (where / "tokenizer.json").write_text("{"), "transformers cannot load it"),
    ],
    ids=[
        "no-config", "cut-config", "list", "no-type", "unknown-type", "remote-code", "no-weights", "short-weights", "cut-weights",
        "other-shape", "cut-tokenizer",
    ],
)  # fmt: skip
def test_refusals(spoil, says: str, saved: Path) -> None:
    add_tokenizer(saved)
    spoil(saved)
    with pytest.raises(ModelError, match=says) as caught:
        load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model_index.json", r"diffusers pipeline.*hs.Scope\(pipeline\)"),
        ("adapter_config.json", "adapter without its base model"),
        ("m.Q8_0.gguf", "pass one of its GGUF files: m.Q8_0.gguf"),
    ],
)
def test_directories_of_something_else(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=says):
        load(tmp_path)


def test_weights_from_the_pickle_format_load_too(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    torch.save(weights, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    found = load(saved).model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_loading_does_not_write(saved: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}
    copy = saved.with_name("copy")
    shutil.copytree(saved, copy)
    load(saved)
    assert {path.name: path.stat().st_mtime_ns for path in saved.iterdir()} == before
