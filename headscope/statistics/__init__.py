"""Statistics of attention that never need the N x N matrix: their table, a request for some of them, and the result."""

from headscope.statistics.definitions import DEFINITIONS, PASSIVE, Definition, definition
from headscope.statistics.partial import PartialStatistics
from headscope.statistics.request import StatisticsRequest
from headscope.statistics.result import HeadStatistics

__all__ = ["DEFINITIONS", "PASSIVE", "Definition", "HeadStatistics", "PartialStatistics", "StatisticsRequest", "definition"]
