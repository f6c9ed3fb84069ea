"""`headscope models`."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope.cli.console import emit_json, size, table


def models(
    verify: Annotated[bool, typer.Option("--verify", help="Check the files of cached and bundled models against their checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the model sources that need no hub, and say what else `headscope profile MODEL` takes."""
    from headscope.models import catalog, verify_cache
    from headscope.models.catalog import verify_bundled

    checked = {**verify_bundled(), **verify_cache()} if verify else {}
    rows = [{**row.to_dict(), **({"verified": checked[row.name]} if row.name in checked else {})} for row in catalog()]
    if as_json:
        emit_json({"models": rows})
        return
    table(
        "models without a hub",
        ["name", "size", "licence", "cached", "what it is"],
        [(r["name"], size(r["size"]), r["licence"], "yes" if r["cached"] else "no", r["description"]) for r in rows],
        ["size"],
    )
    for name, verdict in checked.items():
        print(f"{name}: {verdict}")
    print("also: a hub id (org/name), a local directory with config.json, a .gguf file")
