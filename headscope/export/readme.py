"""The README beside an export: what it is, for which model, the lines that load it, and what the target cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headscope.export.base import Format
    from headscope.export.loss import LossReport


def readme(form: Format, report: LossReport) -> str:
    """Markdown; the same export gives the same bytes."""
    model = report.model
    shape = f"{len(model.layers)} layers, {_span(model.heads)} heads on {_span(model.kv_heads)} key heads"
    changed = "every head as asked for" if report.lossless else f"{len(report.changed)} of {len(report.heads)} heads rounded, see loss.txt"
    files = "\n".join(f"- `{name}`" for name in report.files)
    notes = "\n".join(f"- {note}" for note in report.notes)
    lacks = "\n".join(f"- {one}" for one in form.lacks)
    return f"""# {form.title}

The {report.content} of {model.name} ({shape}) for {form.engine}: {changed}.

Load it, from this directory:

```{form.language}
{report.load}
```

Files:

{files}
- `loss.txt`, `headscope.json`: what was asked for and what was written, head by head; the second is for programs.

What the numbers mean there:

{notes or "- what they mean in headscope"}

What the format cannot express:

{lacks or "- nothing that a plan has"}

`headscope import . --format {form.name} --out RUN` reads it back.
"""


def _span(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
