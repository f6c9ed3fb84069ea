"""HeadProfile: one row per head, with the roles it was given and the card that says what the numbers are about."""

from headscope.profile.card import RunCard
from headscope.profile.compare import Comparison, compare
from headscope.profile.profile import HeadProfile
from headscope.profile.result import ProbeResult
from headscope.profile.roles import ROLES, RoleRule
from headscope.profile.runner import profile

__all__ = ["ROLES", "Comparison", "HeadProfile", "ProbeResult", "RoleRule", "RunCard", "compare", "profile"]
