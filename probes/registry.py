"""The probes by name. One line each; a name that comes twice is refused when this module is imported."""

from __future__ import annotations

from collections.abc import Iterable

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes.activation_patching import ActivationPatching
from headscope.probes.active import ActiveProbe, AnyProbe
from headscope.probes.attention_influence import AttentionInfluence
from headscope.probes.base import Described, Probe
from headscope.probes.block_sparsity import BlockSparsity
from headscope.probes.carve import Carve
from headscope.probes.circuit_overlap import CircuitOverlap
from headscope.probes.composition import Composition
from headscope.probes.duo_gates import DuoGates
from headscope.probes.duo_surrogate import DuoSurrogate
from headscope.probes.duplicate_token import DuplicateToken
from headscope.probes.entropy import Entropy
from headscope.probes.entropy_length import EntropyLength
from headscope.probes.fai import Fai
from headscope.probes.flexprefill import FlexPrefill
from headscope.probes.induction import Induction
from headscope.probes.key_overlap import KeyOverlap
from headscope.probes.late_sinks import LateSinks
from headscope.probes.layer_redundancy import LayerRedundancy
from headscope.probes.layer_stage import LayerStage
from headscope.probes.locality import Locality
from headscope.probes.logit_attribution import LogitAttribution
from headscope.probes.map_similarity import MapSimilarity
from headscope.probes.massive_activations import MassiveActivations
from headscope.probes.minference import MInference
from headscope.probes.moa import Moa
from headscope.probes.ov_copying import OvCopying
from headscope.probes.path_patching import PathPatching
from headscope.probes.pattern_cost import PatternCost
from headscope.probes.previous_token import PreviousToken
from headscope.probes.qr import QueryRetrieval
from headscope.probes.query_norm import QueryNorm
from headscope.probes.query_similarity import QuerySimilarity
from headscope.probes.razor import Razor
from headscope.probes.receiver import Receiver
from headscope.probes.retrieval import Retrieval
from headscope.probes.retrieval_reasoning import RetrievalReasoning
from headscope.probes.rhythm import Rhythm
from headscope.probes.semantic_distance import SemanticDistance
from headscope.probes.sink import Sink
from headscope.probes.sink_control import SinkControl
from headscope.probes.sink_positions import SinkPositions
from headscope.probes.soft_injection import SoftInjection
from headscope.probes.streaming import Streaming
from headscope.probes.vhd import Vhd
from headscope.probes.vision_mass import VisionMass
from headscope.probes.visual_sinks import VisualSinks
from headscope.probes.waad import Waad
from headscope.probes.xattention import XAttention

ProbeLike = str | AnyProbe | type[AnyProbe]
"""A probe by name, as a class, or as an instance with its own parameters."""


def register(*classes: type[AnyProbe]) -> dict[str, type[AnyProbe]]:
    """Probe classes by name; raises ProbeError when a probe or a metric comes twice, since one would silently replace the other."""
    found: dict[str, type[AnyProbe]] = {}
    metrics: dict[str, str] = {}
    for cls in classes:
        if cls.name in found:
            raise refusal(ProbeError, f"probe {cls.name!r}", f"{found[cls.name].__name__} has that name already", "choose another name")
        found[cls.name] = cls
        for metric in cls.metrics:
            if metric.name in metrics:
                raise refusal(
                    ProbeError,
                    f"metric {metric.name!r} of {cls.name!r}",
                    f"probe {metrics[metric.name]!r} has it already",
                    "choose another name",
                )
            metrics[metric.name] = cls.name
    return found


REGISTRY = register(
    Sink,
    SinkControl,
    Streaming,
    Locality,
    Waad,
    Fai,
    Entropy,
    PreviousToken,
    DuplicateToken,
    Induction,
    Razor,
    Receiver,
    Retrieval,
    RetrievalReasoning,
    QueryRetrieval,
    AttentionInfluence,
    BlockSparsity,
    DuoGates,
    DuoSurrogate,
    MInference,
    Moa,
    PatternCost,
    FlexPrefill,
    XAttention,
    SinkPositions,
    LateSinks,
    MassiveActivations,
    Rhythm,
    VisionMass,
    Vhd,
    VisualSinks,
    Carve,
    LayerStage,
    EntropyLength,
    OvCopying,
    Composition,
    LogitAttribution,
    ActivationPatching,
    PathPatching,
    CircuitOverlap,
    QuerySimilarity,
    QueryNorm,
    SemanticDistance,
    MapSimilarity,
    KeyOverlap,
    LayerRedundancy,
    SoftInjection,
)
"""Every probe, in the order in which their metrics stand in a profile."""

PASSIVE = tuple(name for name, cls in REGISTRY.items() if issubclass(cls, Probe))
"""The probes that need nothing but forward passes over texts."""

ACTIVE = tuple(name for name, cls in REGISTRY.items() if issubclass(cls, ActiveProbe))
"""The probes that run the model themselves."""

GROUPS = {"passive": PASSIVE, "active": ACTIVE, "all": tuple(REGISTRY)}


def named(probes: str | ProbeLike | Iterable[ProbeLike]) -> set[str]:
    """Names of the probes that were asked for one by one, not by a group."""
    listed = [probes] if isinstance(probes, (str, Described, type)) else list(probes)
    return {one.name if isinstance(one, Described) or not isinstance(one, str) else one for one in listed} - set(GROUPS)


def resolve(probes: str | ProbeLike | Iterable[ProbeLike]) -> list[AnyProbe]:
    """Instances from "passive", "active", "all", a name, or a list of names, classes and instances. ProbeError for a name that does not
    exist.
    """
    if isinstance(probes, (str, Described, type)):
        probes = [probes]
    out: list[AnyProbe] = []
    for item in probes:
        if isinstance(item, str) and item in GROUPS:
            out += [REGISTRY[name]() for name in GROUPS[item]]
        elif isinstance(item, str):
            if item not in REGISTRY:
                raise unknown_name(ProbeError, "probe", item, (*REGISTRY, *GROUPS))
            out.append(REGISTRY[item]())
        elif isinstance(item, (Probe, ActiveProbe)):
            out.append(item)
        elif isinstance(item, type) and issubclass(item, (Probe, ActiveProbe)):
            out.append(item())
        else:
            raise refusal(
                ProbeError, f"{item!r} as a probe", "it is neither a name, a Probe class nor a Probe", f"use one of {', '.join(REGISTRY)}"
            )
    if not out:
        raise refusal(ProbeError, "an empty list of probes", "there is nothing to measure", "name at least one, or pass 'passive'")
    unique = list(dict.fromkeys(out))
    names = [probe.name for probe in unique]
    for name in names:
        if names.count(name) > 1:
            raise refusal(
                ProbeError,
                f"probe {name!r} twice",
                "both would write the same columns of one profile",
                "make two profiles and compare them",
            )
    return unique
