"""GGUF files: a tiny Llama written here comes back with the same weights; damaged files end in one clear line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.errors import ModelError
from headscope.models import gguf, load

HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 4, 2, 64, 96, 2
PIECES = ["<|endoftext|>", *(chr(code) for code in range(ord("!"), ord("~") + 1)), "Ġ", "th", "the"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(PIECES), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps Llama's rotary pairs side by side, transformers half a head apart."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: LlamaForCausalLM, *, quantised: bool = False, pre: str = "smollm", architecture: str = "llama") -> Path:
    """A GGUF file of a tiny Llama, in float32 or with Q8_0 matrices; in place, the model gets the weights that the file really holds."""
    import gguf as library

    writer = library.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(5e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(PIECES))
    writer.add_file_type(7 if quantised else 0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(PIECES)
    writer.add_token_types([3] + [1] * (len(PIECES) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            kind = library.GGMLQuantizationType.Q8_0
            stored = name
            if ".layers." in name:
                _, _, layer, rest = name.split(".", 3)
                stored = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
            stored = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }.get(name, stored)
            array = weight.numpy().copy()
            heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
            array = interleave(array, heads) if heads else array
            if quantised and array.ndim == 2:
                packed = library.quants.quantize(array, kind)
                held = library.quants.dequantize(packed, kind)
                if heads:
                    held = held.reshape(heads, held.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(held.shape)
                weight.copy_(torch.from_numpy(held.copy()))
                writer.add_tensor(stored, packed, raw_dtype=kind)
            else:
                writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny())


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "q8_0"])
def test_same_weights_as_the_file_holds(quantised: bool, tmp_path: Path) -> None:
    original = tiny()
    path = write(tmp_path / "Tiny.Q8_0.gguf", original, quantised=quantised)
    scope = load(path)
    assert (scope.name, scope.source) == ("Tiny.Q8_0", str(path))
    assert scope.model.dtype == torch.float32
    for name, weight in original.state_dict().items():
        assert torch.equal(scope.model.state_dict()[name], weight), name
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(scope.model(ids).logits, original(ids).logits)


def test_comes_back_as_a_plain_model(file: Path, tmp_path: Path) -> None:
    """transformers marks it as quantised, and then refuses to save it."""
    model, _ = gguf.read(file, dtype=torch.float32)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_digits_are_single_tokens_where_the_file_says_smollm(file: Path, tmp_path: Path) -> None:
    """GGUF names the pre-tokenizer and does not hold it; without it, runs of spaces before a digit split differently."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    text = "in  1234, the  7"
    expected = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]).pre_tokenize_str(text)
    _, tokenizer = gguf.read(file, dtype=torch.float32)
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) == expected
    _, plain = gguf.read(write(tmp_path / "plain.gguf", tiny(), pre="gpt-2"), dtype=torch.float32)
    assert plain.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) == ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


def test_dtype_is_honoured(file: Path) -> None:
    assert load(file, dtype="bfloat16").model.dtype == torch.bfloat16
    assert gguf.native_dtype(gguf.check(file)) == "float32"


def test_native_dtype_of_a_quantised_file(tmp_path: Path) -> None:
    assert gguf.native_dtype(gguf.check(write(tmp_path / "q.gguf", tiny(), quantised=True))) == "bfloat16"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: b"", "it starts with b''"),
        (lambda data: b"GG", "it starts with b'GG'"),
        (lambda data: b"<htm" + data[4:], "it starts with b'<htm', not with b'GGUF'"),
        (lambda data: data[:4] + struct.pack("<I", 99) + data[8:], "format version reads as 99"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "format version reads as 50331648"),
        (lambda data: data[:4], "format version reads as 0"),
        (lambda data: data[:20], "truncated or damaged"),
        (lambda data: data[:900], "truncated or damaged"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:-64], "truncated"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 40) + data[16:], "truncated or damaged"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 40) + data[24:], "truncated or damaged"),
        (lambda data: data[:8] + struct.pack("<QQ", 0, 0), "it holds no tensors"),
    ],
    ids=[
        "empty", "two-bytes", "html", "version", "big-endian", "only-magic", "half-header", "in-the-keys", "half", "last-bytes",
        "tensor-count", "key-count", "no-tensors",
    ],
)  # fmt: skip
def test_damaged_files(spoil, says: str, file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ModelError, match=says) as caught:
        load(bad)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file"):
        load(tmp_path / "none.gguf")


def test_an_architecture_that_transformers_does_not_convert(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.gguf", tiny(), architecture="clip")
    with pytest.raises(ModelError, match=r"architecture clip\): transformers cannot convert it"):
        load(path)
