"""Readers of ModelOpt's, TensorRT-LLM's and OpenVINO's configs, from their documented behaviour."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


def modelopt(path: Path, module: str) -> dict[str, Any] | None:
    """The rule of an attention module: ignored names first, then every name with attn in it; None without a skip-softmax group."""
    groups = json.loads(path.read_text())["sparse_attention_config"]["config_groups"]
    group = next((one for one in groups.values() if one.get("algorithm") == "skip_softmax"), None)
    if group is None:
        return None
    rules = {f"*{name}*": {"enable": False} for name in group.get("ignore", [])}
    rules["*attn*"] = {"enable": True, "target": group["target_sparsity"]}
    return next((rule for name, rule in rules.items() if fnmatch.fnmatch(module, name)), None)


ROCKET = {"algorithm", "window_size", "kernel_size", "topr", "topk", "prompt_budget", "page_size", "kt_cache_dtype", "seq_len_threshold"}
SKIP = {"algorithm", "threshold_scale_factor", "target_sparsity"}


def tensorrt_llm(path: Path) -> dict[str, Any] | None:
    """The checked sparse_attention_config: unknown fields are an error, and a share lies in 0..1."""
    config = yaml.safe_load(path.read_text())["sparse_attention_config"]
    if config is None:
        return None
    known = {"rocket": ROCKET, "skip_softmax": SKIP}[config["algorithm"]]
    assert set(config) <= known
    target = config.get("target_sparsity") or {}
    assert all(0.0 <= share <= 1.0 for share in target.values())
    return dict(config)


@dataclass
class OpenVino:
    """openvino_genai.SparseAttentionConfig."""

    mode: str = "TRISHAPE"
    num_last_dense_tokens_in_prefill: int = 100
    num_retained_start_tokens_in_cache: int = 128
    num_retained_recent_tokens_in_cache: int = 1920
    xattention_threshold: float = 0.8
    xattention_block_size: int = 64
    xattention_stride: int = 8

    @classmethod
    def load(cls, path: Path, block: int = 32) -> OpenVino:
        found = cls(**json.loads(path.read_text()))
        assert found.mode in ("TRISHAPE", "XATTENTION")
        assert found.num_retained_start_tokens_in_cache % block == 0
        assert found.num_retained_recent_tokens_in_cache % block == 0
        return found

    def sees(self, row: int, chunk: int) -> set[int]:
        """Keys of a prefill row in TRISHAPE, whose prompt is computed in chunks of whole blocks."""
        begin = row - row % chunk
        start = range(min(self.num_retained_start_tokens_in_cache, begin))
        recent = range(max(0, begin - self.num_retained_recent_tokens_in_cache), begin)
        return {*start, *recent, *range(begin, row + 1)}
