"""`headscope run MODEL --plan plan.json --prompt ...`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.console import emit_json, out, say, size
from headscope.errors import DataError, refusal


class CacheChoice(StrEnum):
    """Which KV cache the model writes with."""

    free = "free"
    dense = "dense"


def run(
    model: Annotated[str, typer.Argument(help="Model: a name, a path, pypi:... or bundled:...")],
    plan: Annotated[Path, typer.Option(help="Sparse plan: a plan.json of `headscope plan`.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    cache: Annotated[
        CacheChoice, typer.Option(help="free: keys that no head of a group may see any more are dropped; dense: all stay.")
    ] = CacheChoice.free,
    fallback: Annotated[bool, typer.Option(help="On a GPU, leave calls to the model where dense attention is faster.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Also run a plan made for other weights of the same shape.")] = False,
    baseline: Annotated[bool, typer.Option(help="Also write without the plan, to compare.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Let a model write under a sparse plan, and say what ran how and what its cache held."""
    if max_new_tokens < 1:
        raise refusal(DataError, f"--max-new-tokens {max_new_tokens}", "it counts tokens", "pass 1 or more")
    from headscope.plans import SparsePlan

    chosen = SparsePlan.load(plan)  # before the model is loaded: a bad plan should cost nothing
    text = sys.stdin.read() if prompt == "-" else prompt
    import headscope as hs

    scope = hs.load(model)
    with scope.execute(chosen, force=force, cache="free" if cache == "free" else "model", fallback=fallback) as ran:
        written = scope.generate(text, max_new_tokens=max_new_tokens)
        held = None if ran.cache is None else (ran.cache.bytes, ran.cache.dense_bytes)
    plain = scope.generate(text, max_new_tokens=max_new_tokens) if baseline else None
    length = int(written.ids.shape[1])
    if as_json:
        emit_json(
            {
                "model": {"name": scope.name, "source": scope.source, "revision": scope.revision},
                "plan": {"file": str(plan), "method": chosen.method, "heads": chosen.counts(), "density": chosen.density(length)},
                "prompt": {"text": text, "tokens": written.prompt_length},
                "text": written.text,
                "new_tokens": int(written.new_ids.shape[1]),
                "ran": {"heads": dict(ran.report), "calls": dict(ran.ran), "left_to_the_model": dict(ran.reasons)},
                "cache": {
                    "kind": str(cache.value),
                    "bytes": None if held is None else held[0],
                    "dense_bytes": None if held is None else held[1],
                    "share": None if held is None else held[0] / held[1],
                    "planned_share": chosen.kv_share(length),
                },
                "baseline": None if plain is None else plain.text,
                "same_as_baseline": None if plain is None else bool(plain.ids.tolist() == written.ids.tolist()),
            }
        )
        return
    say(f"{chosen.method}: {', '.join(f'{count} {kind}' for kind, count in chosen.counts().items())} heads")
    say(repr(ran))
    if held is not None:
        say(f"KV cache: {size(held[0])} of {size(held[1])} dense ({held[0] / held[1]:.1%}; planned {chosen.kv_share(length):.1%})")
    if plain is not None:
        out.print("without:", style="bold")
        out.print(str(plain.text), markup=False, soft_wrap=True)
        out.print("with:", style="bold")
    out.print(str(written.text), markup=False, soft_wrap=True)
