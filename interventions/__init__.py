"""Interventions: methods that change what heads do, one file each; see `headscope.interventions.base` for what they have in common.

The primitives that all methods are made of are functions in `s_site`, `p_site` and `z_site`, and, as interventions of their own, the
classes of `score_edits`, `weight_edits` and `output_edits`. `REGISTRY` maps the name that stands in JSON to the class. It is filled by
explicit imports, and refuses a name twice.
"""

from headscope.interventions.act import ACT
from headscope.interventions.activation_patching import activation_patching
from headscope.interventions.base import REGISTRY, Intervention, from_json, heads_of
from headscope.interventions.carve import Carved, carve
from headscope.interventions.circuit_reuse import CircuitReuse
from headscope.interventions.entropy_abf import EntropyABF
from headscope.interventions.guidance import Guidance, guided
from headscope.interventions.head_edit import HeadEdit
from headscope.interventions.head_hunter import HeadHunter, Hunt
from headscope.interventions.head_mask import HeadMask
from headscope.interventions.head_set import HeadSet
from headscope.interventions.in_context_brush import InContextBrush
from headscope.interventions.output_edits import Add, Lerp, Noise, Replace, Scale
from headscope.interventions.paint import PAINT
from headscope.interventions.patching import PatchHeads
from headscope.interventions.path_patching import PathPatching
from headscope.interventions.record import HeadRecord, record_heads
from headscope.interventions.rectified_sparse import RectifiedSparse
from headscope.interventions.rescaled_pattern import RescaledPattern
from headscope.interventions.rettention import Rettention
from headscope.interventions.score_edits import BoostScores, KeyBias, ReplaceQueries, SetBias, Temperature
from headscope.interventions.soft_injection import SoftInjection
from headscope.interventions.soft_pag import SoftPAG
from headscope.interventions.softplus_reweighting import SoftplusReweighting
from headscope.interventions.stacking import Stack
from headscope.interventions.values import Values
from headscope.interventions.var import VAR
from headscope.interventions.vhr import VHR
from headscope.interventions.vision_scale import VisionScale
from headscope.interventions.weight_edits import Mix, Redistribute, RescaleRows, SetRows

__all__ = [
    "ACT",
    "PAINT",
    "REGISTRY",
    "VAR",
    "VHR",
    "Add",
    "BoostScores",
    "Carved",
    "CircuitReuse",
    "EntropyABF",
    "Guidance",
    "HeadEdit",
    "HeadHunter",
    "HeadMask",
    "HeadRecord",
    "HeadSet",
    "Hunt",
    "InContextBrush",
    "Intervention",
    "KeyBias",
    "Lerp",
    "Mix",
    "Noise",
    "PatchHeads",
    "PathPatching",
    "RectifiedSparse",
    "Redistribute",
    "Replace",
    "ReplaceQueries",
    "RescaleRows",
    "RescaledPattern",
    "Rettention",
    "Scale",
    "SetBias",
    "SetRows",
    "SoftInjection",
    "SoftPAG",
    "SoftplusReweighting",
    "Stack",
    "Temperature",
    "Values",
    "VisionScale",
    "activation_patching",
    "carve",
    "from_json",
    "guided",
    "heads_of",
    "record_heads",
]
