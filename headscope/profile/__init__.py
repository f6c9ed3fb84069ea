"""HeadProfile: one row per head, with the roles it was given and the card that says what the numbers are about.

`profile`, which makes one, is looked up when it is first used: reading a run needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headscope.profile.card import RunCard
from headscope.profile.comparison import Comparison, compare
from headscope.profile.head_profile import HeadProfile
from headscope.profile.result import ProbeResult
from headscope.profile.roles import ROLES, RoleRule

if TYPE_CHECKING:
    from headscope.profile.runner import profile

__all__ = ["ROLES", "Comparison", "HeadProfile", "ProbeResult", "RoleRule", "RunCard", "compare", "profile"]


def __getattr__(name: str) -> Any:
    if name == "profile":
        from headscope.profile.runner import profile

        return profile
    raise AttributeError(f"module 'headscope.profile' has no attribute {name!r}; it has {', '.join(__all__)}")
