"""What changing heads costs on a CUDA device: whole forwards of a model of 8B width under each method, against plain sdpa and eager.

The model is a language model of Llama-3-8B's width behind a tiny picture encoder, so that one prompt serves methods for text and methods
for pictures, and every ratio is to the same forward. Each method edits all heads of all layers it may edit, and in every row: the most it
can cost. Ways take turns within a round, and times are medians over rounds, so that a clock that drifts meets all of them.

The silent failure this avoids: a method that is cheap because it found nothing to do. Random weights have no sinks, so thresholds are set
to where tokens pass them, and each way must have changed the logits.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import RunError, UnavailableError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.interventions.base import Intervention
    from headscope.scope import Scope

PLAIN, EAGER = "plain sdpa", "eager, nothing edited"
LIMIT = 1.15
PICTURE = 576
"""Image tokens: 24 x 24 patches."""
IMAGE_TOKEN = 31999
SINK_PHI = 3.0
"""VAR's threshold here: of normally distributed hidden states 0.5 % pass it in two dimensions."""


def model(tokens: int, layers: int = 4, device: str = "cuda", width: int = 4096) -> Any:
    """A Llava with a language model of Llama-3-8B's shape, of `layers` layers and random bfloat16 weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers, num_attention_heads=width // 128,
        num_key_value_heads=width // 512, head_dim=128, max_position_embeddings=max(tokens, 4096), rope_theta=500000.0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14, projection_dim=64
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PICTURE)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            made = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    made.set_attn_implementation("sdpa")
    return made


def prompt(tokens: int, device: str = "cuda") -> dict[str, Tensor]:
    """Random ids [1, tokens] with a picture behind the first four."""
    generator = torch.Generator(device=device).manual_seed(0)
    ids = torch.randint(3, 31000, (1, tokens), device=device, generator=generator)
    ids[:, 4 : 4 + PICTURE] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 336, 336, device=device, generator=generator).to(torch.bfloat16)
    return {"input_ids": ids, "pixel_values": pixels}


def methods(scope: Scope, inputs: dict[str, Tensor]) -> dict[str, Intervention]:
    """The interventions measured, each on all heads of all layers that it edits."""
    from headscope.interventions import ACT, VAR, VHR, HeadMask, SoftPAG

    heads = sum(module.heads for module in scope.topology.main)
    means = torch.randn(heads, scope.topology.main[0].head_dim, generator=torch.Generator().manual_seed(0))
    few = tuple((module.layer, head) for module in scope.topology.main for head in range(3, module.heads, 8) if module.layer is not None)
    every: dict[str, Any] = {"tau": SINK_PHI, "dimensions": (1, 2), "layers": (0, len(scope.topology.main))}
    return {
        "ACT, all heads": ACT("all"),
        "ACT, every 8th head": ACT(few),
        "VAR, all rows of all heads": VAR("all", rho=0.0, min_visual=0.0, positions=None, **every),
        "VAR, the paper's rule": VAR("all", min_visual=0.02, **every),
        "VHR, all heads": VHR.prepared(scope, inputs, "all"),
        "HeadMask zero, all heads": HeadMask("all"),
        "HeadMask mean, all heads": HeadMask("all", "mean", means),
        "HeadMask uniform, all heads": HeadMask("all", "uniform"),
        "HeadMask uniform, every 8th head": HeadMask(few, "uniform"),
        "SoftPAG identity, all heads": SoftPAG("all", u=0.5, stream="all"),
        "SoftPAG uniform, all heads": SoftPAG("all", u=0.5, kind="uniform", stream="all"),
    }


@dataclass(frozen=True)
class Way:
    """One way to run the forward pass: `run` gives the last token's logits within `block()`, which is opened before the clock starts."""

    run: Callable[[], Tensor]
    block: Callable[[], AbstractContextManager[Any]] = nullcontext


def ways(tokens: int, layers: int = 4, eager: bool = True) -> tuple[dict[str, Way], Any]:
    """Name -> a way to run the forward pass, and the model that they run."""
    import headscope as hs

    made, inputs = model(tokens, layers), prompt(tokens)
    scope = hs.Scope(made)

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = made(**inputs, use_cache=False, logits_to_keep=1).logits
        return logits

    @contextmanager
    def eagerly() -> Iterator[None]:
        made.set_attn_implementation("eager")
        try:
            yield
        finally:
            made.set_attn_implementation("sdpa")

    out = {PLAIN: Way(forward)}
    out |= {name: Way(forward, partial(scope.intervene, edit)) for name, edit in methods(scope, inputs).items()}
    return out | ({EAGER: Way(forward, eagerly)} if eager else {}), made


def measured(runs: dict[str, Way], rounds: int = 7) -> list[dict[str, Any]]:
    """One row per way: `ms` (median wall time of a forward until the device is done), `gib` (peak of the allocator, weights included), and
    the ratios of both to the first way."""
    plain = next(iter(runs.values())).run()
    changed: dict[str, bool] = {}
    peak: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, way in runs.items():
        with way.block():
            changed[name] = bool((way.run() != plain).any())
            peak[name] = _peak(way)
    for _ in range(rounds):
        for name, way in runs.items():
            if name == EAGER and len(times[name]) >= 3:
                continue
            with way.block():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                way.run()
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - begin))
    base = next(iter(runs))
    idle = [name for name in runs if name not in (PLAIN, EAGER) and not changed[name]]
    if idle:
        raise refusal(RunError, f"a benchmark of {', '.join(idle)}", "it changed nothing, so there was nothing to measure", "report it")
    ms = {name: statistics.median(value) for name, value in times.items()}
    return [
        {
            "forward": name,
            "ms": round(ms[name], 2),
            "ms_ratio": round(ms[name] / ms[base], 3),
            "gib": round(peak[name], 2),
            "gib_ratio": round(peak[name] / peak[base], 3),
        }
        for name in runs
    ]


def _peak(way: Way) -> float:
    """Peak of the allocator in GiB over one forward."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    way.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def growth(lengths: Iterable[int], layers: int = 2) -> list[dict[str, Any]]:
    """Peak memory beyond the plain forward's, in MiB, one row per way and one column per length: O(N) doubles where the length does."""
    table: dict[str, dict[str, Any]] = {}
    for tokens in lengths:
        runs, made = ways(tokens, layers, eager=False)
        base = 0.0
        for name, way in runs.items():
            with way.block():
                way.run()
                now = _peak(way)
            if name == PLAIN:
                base = now
            else:
                table.setdefault(name, {"forward": name})[str(tokens)] = round((now - base) * 1024)
        del runs, made
        torch.cuda.empty_cache()
    return list(table.values())


def run(tokens: int = 8192, layers: int = 4, rounds: int = 7, lengths: tuple[int, ...] = (4096, 8192, 16384)) -> dict[str, Any]:
    """`headscope bench interventions`: tables of ratios at one length, and of memory over lengths."""
    if not torch.cuda.is_available():
        raise refusal(UnavailableError, "bench interventions", "there is no CUDA device", "run it on one")
    if tokens < 2 * PICTURE or layers < 2 or rounds < 1:
        given = f"tokens={tokens}, layers={layers}, rounds={rounds}"
        raise refusal(RunError, given, f"the picture alone has {PICTURE} tokens, and methods differ by layer", "pass 8192, 4 and 7")
    runs, made = ways(tokens, layers)
    rows = measured(runs, rounds)
    del runs, made
    torch.cuda.empty_cache()
    memory = growth(lengths)
    targets = [
        {"what": f"{one['forward']} / {PLAIN}", "ratio": one["ms_ratio"], "limit": LIMIT, "met": one["ms_ratio"] <= LIMIT}
        for one in rows
        if one["forward"] not in (PLAIN, EAGER)
    ]
    shape = f"bfloat16, {layers} layers of Llama-3-8B's width, {tokens:,} tokens of which {PICTURE} are a picture's"
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "triton")},
        "tables": [
            {"title": "Targets", "columns": ["what", "ratio", "limit", "met"], "rows": targets},
            {"title": f"Forwards ({shape})", "columns": ["forward", "ms", "ms_ratio", "gib", "gib_ratio"], "rows": rows},
            {
                "title": "Peak memory beyond the plain forward's, MiB, by tokens (2 layers)",
                "columns": ["forward", *(str(one) for one in lengths)],
                "rows": memory,
            },
        ],
        "notes": ["VHR's run without the picture, which its prepared() makes once per prompt, is not in its forward"],
    }
