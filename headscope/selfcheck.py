"""A check that anyone can run on their own model: captured statistics against eager attention.

The eager weights are asked of the model itself (`output_attentions=True`) and every statistic is computed from them by its formula, in
float64, with no code shared with the kernels. It needs the N x N matrix and is therefore only for short texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headscope.errors import CaptureError, DataError, refusal
from headscope.inputs import reads_ids

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics

NAMES = ("entropy", "row_max", "argmax", "distance", "distance_sq", "waad", "sink_mass", "local_mass", "column_sum", "sink_importance")
TOLERANCE = {"torch.float64": 1e-9, "torch.float32": 1e-5, "torch.bfloat16": 4e-2, "torch.float16": 5e-3}


def tiny_scope() -> Scope:
    """A random two-layer Llama with grouped queries, made on the spot."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from headscope.scope import Scope

    generator_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
        model = LlamaForCausalLM(config).eval()
    finally:
        torch.random.set_rng_state(generator_state)
    return Scope(model, name="random two-layer Llama")


def check_scope(scope: Scope, tokens: int = 64, seed: int = 0) -> dict[str, Any]:
    """Largest error of each statistic against eager attention on random tokens, relative to its own scale.

    Returns {"ok", "errors": {name: float}, "tolerance", "model", "tokens", "dtype", "logits_identical"}. Needs a model that can switch to
    eager attention; the model's own implementation is restored.
    """
    import torch

    if tokens < 1:
        raise refusal(DataError, f"tokens={tokens}", "it counts tokens and must be at least 1", "pass tokens=64")
    if not reads_ids(scope):
        why = "this check draws token ids, and this model reads none"
        raise refusal(DataError, scope.name or scope.topology.model_class, why, "the capture's own check runs at every capture of it")
    model: Any = scope.model
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=generator).to(scope.device)
    stats = scope.capture(ids, statistics=NAMES)
    before = model.config._attn_implementation
    with torch.no_grad():
        plain = model(input_ids=ids).logits if hasattr(model, "lm_head") else model(input_ids=ids)[0]
        with scope.observe(statistics=NAMES):
            observed = model(input_ids=ids).logits if hasattr(model, "lm_head") else model(input_ids=ids)[0]
        model.set_attn_implementation("eager")
        try:
            weights = model(input_ids=ids, output_attentions=True).attentions
        finally:
            model.set_attn_implementation(before)
    if not weights or weights[0] is None:
        raise refusal(
            CaptureError,
            scope.name,
            "its eager attention returns no weights",
            "this check cannot be made on this model; the capture's own check still runs",
        )
    errors = compare_with_eager(stats, weights)
    tolerance = TOLERANCE[str(scope.dtype)]
    identical = bool(torch.equal(plain, observed))
    return {
        "ok": identical and all(error <= tolerance for error in errors.values()),
        "errors": errors,
        "tolerance": tolerance,
        "logits_identical": identical,
        "model": scope.name,
        "tokens": tokens,
        "dtype": str(scope.dtype).removeprefix("torch."),
    }


def compare_with_eager(stats: HeadStatistics, weights: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest |captured - eager| of each statistic over layers, divided by max(|eager|) of that layer and statistic."""
    errors = dict.fromkeys(NAMES, 0.0)
    for layer, matrix in zip(stats.topology.layers, weights, strict=True):
        for name, expected in _formulas(matrix.double().cpu(), stats).items():
            got = stats[name][layer].double()
            if name == "argmax":  # ties to rounding: the weight at the reported place must be the largest
                at = matrix.double().cpu().gather(-1, stats[name][layer].long().unsqueeze(-1)).squeeze(-1)
                got, expected = at, matrix.double().cpu().amax(-1)
            scale = float(expected.abs().max().clamp_min(1e-30))
            errors[name] = max(errors[name], float((got - expected).abs().max()) / scale)
    return errors


def _formulas(a: Tensor, stats: HeadStatistics) -> dict[str, Tensor]:
    """Every statistic of NAMES from the dense matrix a [B, H, N, N], float64."""
    import torch

    request = stats.request
    n = a.shape[-1]
    t, s = torch.arange(n)[:, None], torch.arange(n)[None, :]
    d = (t - s).abs().double()
    seen_by = (n - torch.arange(n)).double() if all(module.causal for module in stats.topology.main) else torch.tensor(float(n))
    return {
        "entropy": -(a * a.clamp_min(1e-300).log()).sum(-1),
        "row_max": a.amax(-1),
        "argmax": a.argmax(-1).double(),
        "distance": (a * d).sum(-1),
        "distance_sq": (a * d * d).sum(-1),
        "waad": (a * d.clamp_max(request.waad_window)).sum(-1),
        "sink_mass": a[..., : request.sink_tokens].sum(-1),
        "local_mass": (a * (d < request.local_window)).sum(-1),
        "column_sum": a.sum(-2),
        "sink_importance": a.sum(-2) / seen_by,
    }
