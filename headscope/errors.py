"""Everything headscope refuses, as one small tree.

    HeadscopeError
    ├── ModelError            a model that cannot be found, read or converted
    │   └── DownloadError     a model source that could not be fetched whole
    ├── CaptureError          a model, call or mask that cannot be measured exactly
    ├── DataError             a text or token input that cannot be used
    ├── StatisticError        an unknown statistic, or one asked for without what it needs
    ├── ProbeError            an unknown probe, or one whose requirements are not met
    ├── InterventionError     an edit that cannot be made
    ├── PlanError             a sparse plan that cannot be run, or not on this model
    ├── ExportError           a format that cannot hold what it was given, or a file that is not of its format
    ├── RunError              a run directory that is missing, damaged or newer than this code
    └── UnavailableError      an optional package or device that is not there

headscope refuses rather than ignores: a number that is silently wrong costs more than an error. Each message says what was given,
why it cannot be, and what to do instead; `refusal` builds it in that order so that none of the three is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar


class HeadscopeError(Exception):
    """Root of every error that headscope raises on purpose."""


class ModelError(HeadscopeError):
    """A model that cannot be found, read or converted."""


class DownloadError(ModelError):
    """A model source that could not be fetched whole; nothing half-written is kept."""


class CaptureError(HeadscopeError):
    """A model, an attention call or a mask that cannot be measured exactly."""


class DataError(HeadscopeError):
    """A text or token input that cannot be used."""


class StatisticError(HeadscopeError):
    """An unknown statistic, or one asked for without what it needs."""


class ProbeError(HeadscopeError):
    """An unknown probe, or a probe whose requirements are not met."""


class InterventionError(HeadscopeError):
    """An edit of a model that cannot be made."""


class RunError(HeadscopeError):
    """A run directory that is missing, damaged, or written by newer code."""


class PlanError(HeadscopeError):
    """A sparse plan or pattern that says nothing a kernel could run, or that belongs to another model."""


class ExportError(HeadscopeError):
    """A format of another engine that cannot hold what it was given, or a file that is not of its format."""


class UnavailableError(HeadscopeError):
    """An optional package or a device that is needed and not there."""


E_ = TypeVar("E_", bound=HeadscopeError)


def refusal(kind: type[E_], given: str, why: str, instead: str) -> E_:
    """An error whose message states what was given, why it cannot be, and what to do instead.

    >>> str(refusal(DataError, "an empty text", "there is no token to attend to", "pass at least one token"))
    'an empty text: there is no token to attend to; pass at least one token'
    """
    return kind(f"{given}: {why}; {instead}")


def unknown_name(kind: type[E_], what: str, name: object, known: Iterable[str]) -> E_:
    """An error for a name that is not in a list, naming the close ones and then all of them."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return kind(f"unknown {what} {name!r}: {hint}known: {', '.join(names) if names else 'none'}")
