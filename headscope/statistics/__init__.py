"""Statistics of attention that never need the N x N matrix: their table, a request for some of them, and the result.

Request and result are looked up when they are first used: what a statistic means can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headscope.statistics.definitions import DEFINITIONS, PASSIVE, Definition, definition

if TYPE_CHECKING:
    from headscope.statistics.partial import PartialStatistics
    from headscope.statistics.request import StatisticsRequest
    from headscope.statistics.result import HeadStatistics

_LATER = {"HeadStatistics": "result", "PartialStatistics": "partial", "StatisticsRequest": "request"}

__all__ = ["DEFINITIONS", "PASSIVE", "Definition", "HeadStatistics", "PartialStatistics", "StatisticsRequest", "definition"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"headscope.statistics.{_LATER[name]}"), name)
    raise AttributeError(f"module 'headscope.statistics' has no attribute {name!r}; it has {', '.join(__all__)}")
