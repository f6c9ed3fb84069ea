"""TensorRT-LLM's sparse_attention_config: RocketKV or skip-softmax for the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.base import Export, Format
from headscope.export.files import read_text
from headscope.export.fitting import Fitted
from headscope.export.imported import Found, Hints
from headscope.plans.dynamic import Budget, TopBlocks
from headscope.plans.patterns import BLOCK, Dense, Pattern
from headscope.plans.plan import SparsePlan


class TensorRtLlm(Format):
    """The YAML that trtllm-serve takes with --config: `sparse_attention_config` with algorithm rocket (after the prefill, keep
    prompt_budget keys of every head: SnapKV's choice) or skip_softmax (skip a share of key blocks), the same for every head
    (NVIDIA/TensorRT-LLM). RocketKV's second stage, top pages per decode step, is set so wide that it keeps every page of the budget.
    """

    name: ClassVar[str] = "tensorrt-llm"
    title: ClassVar[str] = "TensorRT-LLM sparse attention"
    engine: ClassVar[str] = "TensorRT-LLM 1.2 and later, PyTorch backend"
    reader: ClassVar[str] = "trtllm-serve --config; tensorrt_llm.LLM(sparse_attention_config=...)"
    main: ClassVar[str] = "extra_config.yaml"
    language: ClassVar[str] = "bash"
    holds: ClassVar[tuple[str, ...]] = ("one budget of keys for every head after the prefill", "one share of blocks to skip in the prefill")
    lacks: ClassVar[tuple[str, ...]] = (
        "heads and layers that differ (layers left dense: the modelopt format)",
        "windows, sinks, columns, fixed blocks",
        "query heads of one key head that differ: keys are chosen per key head",
    )

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """One budget, one share, or dense."""
        fitted = Fitted.of(plan)
        kinds = set(fitted.patterns.values())
        budgets = [one for one in kinds if isinstance(one, Budget)]
        shares = [one.share for one in kinds if isinstance(one, TopBlocks) and one.share is not None and one.rule == "exact"]
        whole: Pattern = Dense()
        why = "TensorRT-LLM has one rule for the whole model, and these heads share none"
        if len(budgets) == len(kinds):
            whole = Budget(max(_keep(one) for one in budgets), max(one.window for one in budgets), min(one.pool for one in budgets))
            why = "TensorRT-LLM has one budget for all heads, chosen per key head, without sinks of its own"
        elif len(shares) == len(kinds):
            whole = TopBlocks(share=1 - (1 - max(shares)), rule="exact", block=BLOCK)
            why = "TensorRT-LLM skips one share of blocks for all heads"
        for place in list(fitted.patterns):
            fitted.change(place, whole, why)
        if isinstance(whole, Budget):
            fitted.notes += [
                f"prompt_budget {whole.keep + whole.window} counts the window's keys with the kept ones",
                "keys are chosen per key head, not per query head; topk is set so that decoding drops no page of the budget",
            ]
        elif isinstance(whole, TopBlocks):
            fitted.notes.append("target_sparsity needs the calibrated formula in the checkpoint's config.json (see the modelopt format)")
        return fitted

    def encode(self, export: Export) -> dict[str, bytes]:
        """The YAML."""
        one = next(iter(export.patterns().patterns.values()))
        if isinstance(one, Budget):
            lines = [
                "sparse_attention_config:",
                "  algorithm: rocket",
                f"  window_size: {one.window}",
                f"  kernel_size: {one.pool}",
                f"  prompt_budget: {one.keep + one.window}",
                f"  topk: {one.keep + one.window}",
                "  page_size: 4",
                "kv_cache_config:",
                "  enable_block_reuse: false",
                "enable_chunked_prefill: false",
            ]
        elif isinstance(one, TopBlocks):
            lines = [
                "attn_backend: TRTLLM",
                "sparse_attention_config:",
                "  algorithm: skip_softmax",
                "  target_sparsity:",
                f"    prefill: {1 - float(one.share or 1.0)!r}",
                "    decode: 0.0",
            ]
        else:
            lines = ["sparse_attention_config: null"]
        return {self.main: ("\n".join(lines) + "\n").encode()}

    def decode(self, path: Path, hints: Hints) -> Found:
        """The rule, for every head of the model that `like` names."""
        given = _mapping(read_text(path), path)
        config = given.get("sparse_attention_config")
        if "sparse_attention_config" not in given or not isinstance(config, dict | None):
            raise refusal(ExportError, str(path), "it has no sparse_attention_config", "pass the YAML that trtllm-serve takes")
        if hints.model is None:
            raise refusal(
                ExportError, str(path), "it does not say how many layers and heads there are", "pass the model with like= (--like)"
            )
        pattern = _rule(config, path)
        plan = SparsePlan.uniform(hints.model, pattern, method="imported from TensorRT-LLM")
        return Found(hints.model, plan)

    def load(self, export: Export) -> str:
        """On the command line."""
        return f"trtllm-serve MODEL --backend pytorch \\\n  --config {self.main}"


def _keep(pattern: Budget) -> int:
    """Keys before the window that a budget holds; more than the window of last keys count among them."""
    return pattern.keep + max(0, pattern.recent - pattern.window)


def _rule(config: dict[str, Any] | None, path: Path) -> Pattern:
    if config is None:
        return Dense()
    algorithm = config.get("algorithm")
    if algorithm == "rocket":
        window, pool, budget = (
            config.get(name, usual) for name, usual in (("window_size", 32), ("kernel_size", 63), ("prompt_budget", 2048))
        )
        if not all(isinstance(one, int) and one > 0 for one in (window, pool, budget)) or budget < window:
            raise refusal(ExportError, str(path), f"window {window}, kernel {pool}, budget {budget}", "they count keys; correct it")
        return Budget(budget - window, window, pool)
    if algorithm == "skip_softmax":
        target = config.get("target_sparsity")
        share = target.get("prefill", 0.0) if isinstance(target, dict) else target
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise refusal(ExportError, str(path), f"target_sparsity {target!r}", "a share of blocks is read, and raw thresholds are not")
        return TopBlocks(share=1 - float(share), rule="exact", block=BLOCK) if share else Dense()
    raise refusal(ExportError, str(path), f"algorithm {algorithm!r}", "rocket and skip_softmax are read")


def _mapping(text: str, path: Path) -> dict[str, Any]:
    """Nested mappings of plain scalars, which is all of YAML that these files use."""
    root: dict[str, Any] = {}
    stack: list[tuple[int, dict[str, Any]]] = [(-1, root)]
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split(" #")[0].rstrip()
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth = len(line) - len(line.lstrip())
        key, colon, value = line.strip().partition(":")
        while stack[-1][0] >= depth:
            stack.pop()
        if not colon or not key or key.startswith(("-", "{", "[")):
            raise refusal(ExportError, str(path), f"line {number} is no 'key: value'", "mappings of plain values are read")
        if value.strip():
            stack[-1][1][key] = _scalar(value.strip())
        else:
            inner: dict[str, Any] = {}
            stack[-1][1][key] = inner
            stack.append((depth, inner))
    return root


def _scalar(text: str) -> Any:
    words = {"null": None, "~": None, "true": True, "false": False}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")
