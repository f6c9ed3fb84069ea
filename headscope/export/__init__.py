"""Export and import: head profiles and plans as the files that other engines read, and back.

    profile.export("duo-attention", "out/")               plan.export("minference", "out/", lossy=True)
    profile = hs.export.read("out/", "duo-attention")     the same as a HeadProfile, with its plan

base      Format: fit, encode, decode, and the report and README around them
registry  the formats by name; one file each
loss      LossReport: what was asked for, what was written, what that costs
imported  ImportedProfile: what a file says, as a profile
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscope.export.base import Format
from headscope.export.imported import ImportedProfile, plan_of
from headscope.export.loss import HeadLoss, LossReport
from headscope.export.native import JSON_SCHEMA
from headscope.export.registry import FORMATS, find

if TYPE_CHECKING:
    from pathlib import Path

    from headscope.export.imported import Like
    from headscope.plans import SparsePlan
    from headscope.profile import HeadProfile

__all__ = ["FORMATS", "JSON_SCHEMA", "Format", "HeadLoss", "ImportedProfile", "LossReport", "find", "plan_of", "read", "write"]


def write(
    source: SparsePlan | HeadProfile,
    format: str,
    path: str | Path,
    *,
    lossy: bool = False,
    force: bool = False,
    length: int | None = None,
    metric: str | None = None,
    profile: HeadProfile | None = None,
) -> LossReport:
    """Writes a plan or a profile in a format by name; see `Format.write`."""
    return find(format).write(source, path, lossy=lossy, force=force, length=length, metric=metric, profile=profile)


def read(path: str | Path, format: str, *, like: Like | None = None, length: int | None = None) -> ImportedProfile:
    """Opens a file or export of a format by name; see `Format.read`."""
    return find(format).read(path, like=like, length=length)
