"""An export as one zip file, made in a temporary folder: a visitor names a format, never a place on this machine."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.app.runs import Run
from headscope.errors import ExportError, unknown_name

if TYPE_CHECKING:
    from headscope.export.loss import LossReport
    from headscope.plans.plan import SparsePlan

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same plan gives the same bytes


def export_zip(plan: SparsePlan, run: Run, name: str, *, lossy: bool, length: int) -> tuple[bytes, LossReport]:
    """(zip, report). ExportError when the format cannot hold the plan and `lossy` is false."""
    from headscope.export.registry import FORMATS

    if name not in FORMATS:
        raise unknown_name(ExportError, "format", name, FORMATS)
    with tempfile.TemporaryDirectory(prefix="headscope-export-") as folder:
        target = Path(folder) / name
        report = FORMATS[name].write(plan, target, lossy=lossy, length=length, profile=run.profile())
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(target.rglob("*")):
                if file.is_file():
                    entry = zipfile.ZipInfo(f"{name}/{file.relative_to(target).as_posix()}", _EPOCH)
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(entry, file.read_bytes())
        return buffer.getvalue(), report
