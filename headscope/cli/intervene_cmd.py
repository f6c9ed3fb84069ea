"""`headscope intervene MODEL --spec spec.json --prompt ...`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from headscope.cli.console import emit_json, out, say
from headscope.errors import DataError, InterventionError, refusal

PAIRS = re.compile(r"\s*[\w.]+\.\d+\s*(,\s*[\w.]+\.\d+\s*)*")
"""Heads written out, "18.6, 17.3"; anything else is looked up in a profile."""


def intervene(
    model: Annotated[str, typer.Argument(help="Model: a name, a path, pypi:... or bundled:...")],
    spec: Annotated[Path, typer.Option(help="Specification: one intervention, a list of them, or a stack, as JSON.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    run: Annotated[Path | None, typer.Option(help='Run directory that heads like "top 5 induction" are looked up in.')] = None,
    baseline: Annotated[bool, typer.Option(help="Also write without interventions, to compare.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Let a model write with its heads changed, and say what was changed."""
    if max_new_tokens < 1:
        raise refusal(DataError, f"--max-new-tokens {max_new_tokens}", "it counts tokens", "pass 1 or more")
    stack = read_spec(spec, run)  # before the model is loaded: a bad specification should cost nothing
    text = sys.stdin.read() if prompt == "-" else prompt
    import headscope as hs

    scope = hs.load(model)
    stack.check(scope)
    explanation = stack.explain()
    if not as_json:
        for line in explanation.splitlines():
            say(line)
    with scope.intervene(*stack):
        changed = scope.generate(text, max_new_tokens=max_new_tokens)
    plain = scope.generate(text, max_new_tokens=max_new_tokens) if baseline else None
    if as_json:
        emit_json(
            {
                "model": {"name": scope.name, "source": scope.source, "revision": scope.revision},
                "specification": json.loads(stack.to_json(tensors=None)) if not _has_tensors(stack) else {"file": str(spec)},
                "explanation": explanation.splitlines(),
                "prompt": {"text": text, "tokens": changed.prompt_length},
                "text": changed.text,
                "baseline": None if plain is None else plain.text,
                "changed": None if plain is None else bool(changed.new_ids.tolist() != plain.new_ids.tolist()),
            }
        )
        return
    if plain is not None:
        out.print("without:", style="bold")
        out.print(str(plain.text), markup=False, soft_wrap=True)
        out.print("with:", style="bold")
    out.print(str(changed.text), markup=False, soft_wrap=True)


def read_spec(path: Path, run: Path | None = None) -> Any:
    """The Stack of a specification file; heads that are named by role or metric are looked up in a run."""
    from headscope.interventions import HeadSet, Stack

    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise refusal(InterventionError, str(path), f"it cannot be read ({error.strerror})", "pass the path of a specification") from None
    except ValueError as error:
        raise refusal(InterventionError, str(path), f"it is no JSON ({error})", "pass what Stack.save wrote") from None
    listed = given.get("interventions", [given]) if isinstance(given, dict) else given
    profile: Any = None
    for one in listed if isinstance(listed, list) else []:
        heads = one.get("heads") if isinstance(one, dict) else None
        if not isinstance(heads, str) or heads == "all" or PAIRS.fullmatch(heads):
            continue
        if run is None:
            raise refusal(InterventionError, f"heads {heads!r}", "they are chosen by a profile, and none was given", "pass --run RUN")
        if profile is None:
            import headscope as hs

            profile = hs.HeadProfile.load(run)
        one["heads"] = [list(pair) for pair in HeadSet.select(profile, heads)]
    return Stack.from_json(json.dumps(given), path.parent)


def _has_tensors(stack: Any) -> bool:
    from headscope.interventions.values import Values

    return any(isinstance(value, Values) for one in stack for value in one.settings().values())
