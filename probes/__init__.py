"""Probes: one file per method that says what an attention head does. `REGISTRY` has them by name; each runs alone with `.run(scope)`."""

from __future__ import annotations

from headscope.probes import text
from headscope.probes.activation_patching import ActivationPatching
from headscope.probes.active import ActiveProbe, Findings, Work
from headscope.probes.attention_influence import AttentionInfluence
from headscope.probes.base import Metric, Needs, Probe
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
from headscope.probes.registry import ACTIVE, PASSIVE, REGISTRY, resolve
from headscope.probes.retrieval import Retrieval
from headscope.probes.retrieval_reasoning import RetrievalReasoning
from headscope.probes.rhythm import Rhythm
from headscope.probes.semantic_distance import SemanticDistance
from headscope.probes.sink import Sink
from headscope.probes.sink_control import SinkControl
from headscope.probes.sink_positions import SinkPositions
from headscope.probes.soft_injection import SoftInjection
from headscope.probes.streaming import Streaming
from headscope.probes.text import ProbeText
from headscope.probes.vhd import Vhd
from headscope.probes.vision_mass import VisionMass
from headscope.probes.visual_sinks import VisualSinks
from headscope.probes.waad import Waad
from headscope.probes.xattention import XAttention

__all__ = [
    "ACTIVE",
    "PASSIVE",
    "REGISTRY",
    "ActivationPatching",
    "ActiveProbe",
    "AttentionInfluence",
    "BlockSparsity",
    "Carve",
    "CircuitOverlap",
    "Composition",
    "DuoGates",
    "DuoSurrogate",
    "DuplicateToken",
    "Entropy",
    "EntropyLength",
    "Fai",
    "Findings",
    "FlexPrefill",
    "Induction",
    "KeyOverlap",
    "LateSinks",
    "LayerRedundancy",
    "LayerStage",
    "Locality",
    "LogitAttribution",
    "MInference",
    "MapSimilarity",
    "MassiveActivations",
    "Metric",
    "Moa",
    "Needs",
    "OvCopying",
    "PathPatching",
    "PatternCost",
    "PreviousToken",
    "Probe",
    "ProbeText",
    "QueryNorm",
    "QueryRetrieval",
    "QuerySimilarity",
    "Razor",
    "Receiver",
    "Retrieval",
    "RetrievalReasoning",
    "Rhythm",
    "SemanticDistance",
    "Sink",
    "SinkControl",
    "SinkPositions",
    "SoftInjection",
    "Streaming",
    "Vhd",
    "VisionMass",
    "VisualSinks",
    "Waad",
    "Work",
    "XAttention",
    "resolve",
    "text",
]
