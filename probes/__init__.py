"""Probes: one file per method that says what an attention head does. `REGISTRY` has them by name; each runs alone with `.run(scope)`."""

from __future__ import annotations

from headscope.probes import text
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.base import Metric, Needs, Probe
from headscope.probes.duplicate_token import DuplicateToken
from headscope.probes.entropy import Entropy
from headscope.probes.fai import Fai
from headscope.probes.induction import Induction
from headscope.probes.locality import Locality
from headscope.probes.previous_token import PreviousToken
from headscope.probes.razor import Razor
from headscope.probes.receiver import Receiver
from headscope.probes.registry import ACTIVE, PASSIVE, REGISTRY, resolve
from headscope.probes.sink import Sink
from headscope.probes.sink_control import SinkControl
from headscope.probes.streaming import Streaming
from headscope.probes.text import ProbeText
from headscope.probes.waad import Waad

__all__ = [
    "ACTIVE",
    "PASSIVE",
    "REGISTRY",
    "ActiveProbe",
    "DuplicateToken",
    "Entropy",
    "Fai",
    "Findings",
    "Induction",
    "Locality",
    "Metric",
    "Needs",
    "PreviousToken",
    "Probe",
    "ProbeText",
    "Razor",
    "Receiver",
    "Sink",
    "SinkControl",
    "Streaming",
    "Waad",
    "Work",
    "resolve",
    "text",
]
