"""`headscope formats`."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope.cli.console import emit_json, out, table


def formats(
    name: Annotated[str | None, typer.Argument(help="One format: its page, what it can and cannot express.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the formats that heads and plans are exported to and imported from."""
    from headscope.export import FORMATS, find

    if name is not None:
        row = find(name).describe()
        if as_json:
            emit_json(row)
            return
        out.print(f"{row['name']}: {row['title']}\n\n{row['page']}\n", markup=False, soft_wrap=True)
        out.print(f"engine   {row['engine']}\nreader   {row['reader']}\nfile     {row['file']}", markup=False, soft_wrap=True)
        out.print(f"scores   {', '.join(row['metrics']) or 'none: it holds a plan'}\n", markup=False, soft_wrap=True)
        for title, lines in (("can express", row["holds"]), ("cannot express", row["lacks"])):
            out.print(f"{title}\n" + "\n".join(f"  - {line}" for line in lines), markup=False, soft_wrap=True)
        return
    rows = [one.describe() for one in FORMATS.values()]
    if as_json:
        emit_json({"formats": rows})
        return
    cells = [(row["name"], _holds(row["plans"], row["metrics"]), row["engine"], "; ".join(row["lacks"][:2])) for row in rows]
    table("formats (headscope formats NAME says everything)", ["name", "holds", "engine", "cannot express"], cells)


def _holds(plans: bool, metrics: list[str]) -> str:
    return "plan, scores" if plans and metrics else "plan" if plans else "scores"
